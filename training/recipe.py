"""The Trainer of FlashSloth's recipe: what a stage trains, the order of the rows, and answers in the evaluation."""

import logging
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from ..modeling_flashsloth import FlashSlothForConditionalGeneration
from .data import row_lengths
from .sampler import ModalityLengthSampler

logger = logging.getLogger(__name__)


def freeze_for_stage(
    model: FlashSlothForConditionalGeneration, stage: int, *, train_vision_tower: bool = False
) -> FlashSlothForConditionalGeneration:
    """Choose what trains (paper, section 4.1).

    Args:
        model: The model, which is changed.
        stage: 1, alignment: Spatial Attention Pooling and projector. 2, instruction tuning: all but the vision tower.
        train_vision_tower: Whether stage 2 trains the tower, too, as the paper says of FlashSloth-HD. The authors' code
            runs the tower under `torch.no_grad` there, so it does not learn: `False` is their way.

    Raises:
        ValueError: If there is no such stage.
    """
    if stage not in (1, 2):
        raise ValueError(f"`stage` must be 1 (alignment) or 2 (instruction tuning), but is {stage}.")
    model.requires_grad_(stage == 2)
    if stage == 1:
        model.model.spatial_attention_pooling.requires_grad_(True)
        model.model.multi_modal_projector.requires_grad_(True)
    else:
        model.model.vision_tower.requires_grad_(train_vision_tower)
    return model


class ResumeCallback(TrainerCallback):
    """Tells the sampler its epoch, and the user if there is nothing left to train.

    The data loader that skips what a resumed run has seen does not, when there are several processes: rows would come
    in the order of the first epoch.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say if the run was finished before."""
        if state.is_world_process_zero and state.global_step >= state.max_steps:
            logger.warning(
                "Step %d of %d was reached before; nothing is trained. To go on, raise max_steps or num_train_epochs.",
                state.global_step,
                state.max_steps,
            )

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Choose the order of the epoch that begins, or goes on."""
        if hasattr(train_dataloader, "set_epoch"):
            train_dataloader.set_epoch(int(state.epoch))


class FlashSlothTrainer(Trainer):
    """`Trainer` that groups rows by length and by kind, and can answer the questions of the evaluation rows.

    With `train_sampling_strategy="group_by_length"` a batch holds rows of like length, all with images or all
    without. `processing_class` must be the model's processor.

    It sets what `FlashSlothDataCollator` needs: rows keep their columns (`remove_unused_columns`), and every process
    makes its own batches of a stream (`dispatch_batches`). A finished training that is resumed is not trained further.

    Args:
        *args: As for `Trainer`.
        num_eval_answers: Number of evaluation rows whose last question is answered by `generate` whenever the model is
            evaluated; the share of answers that are equal to the row's is logged as `eval_exact_match`.
        **kwargs: As for `Trainer`.

    Raises:
        ValueError: If the arguments ask for `dispatch_batches`.
    """

    def __init__(self, *args: Any, num_eval_answers: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_eval_answers = num_eval_answers
        self.args.remove_unused_columns = False
        self.add_callback(ResumeCallback)
        for module in self.model.modules():
            # On some CPUs bitsandbytes lays 4-bit weights out anew when a model answers; no gradient passes them then.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False

    def create_accelerator_and_postprocess(self) -> None:
        """Start accelerate, so that no process divides its batches among the others."""
        if self.args.accelerator_config.dispatch_batches:
            raise ValueError(
                "`dispatch_batches` must be False: it divides a batch by rows, which the images of a batch are not. "
                "Leave it out of `accelerator_config`."
            )
        self.args.accelerator_config.dispatch_batches = False
        super().create_accelerator_and_postprocess()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train one epoch, unless a resumed run was at its last step: `Trainer` looks only after a step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not has_length(dataset):
            return super()._get_train_sampler(train_dataset)
        processor, args = self.processing_class, self.args
        num_tiles = processor.image_processor.get_number_of_image_patches(0, 0, {})
        lengths, has_image = row_lengths(dataset, tokens_per_image=num_tiles * processor.image_seq_length)
        return ModalityLengthSampler(
            lengths,
            has_image,
            batch_size=args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        return SequentialSampler(eval_dataset) if has_length(eval_dataset) else None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate; see `Trainer.evaluate` and `num_eval_answers`."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = self.eval_dataset[rows] if isinstance(rows, str) else rows
        if self.num_eval_answers and not isinstance(rows, dict):  # of several sets, each comes here by itself
            exact_match = {f"{metric_key_prefix}_exact_match": self._exact_match(rows)}
            self.log(exact_match)
            metrics |= exact_match
        return metrics

    @torch.no_grad()
    def _exact_match(self, rows: Any) -> float:
        """Share of the first rows' last answers that `generate` finds word by word."""
        conversations = [row.get("messages", []) for row in islice(rows, self.num_eval_answers)]
        conversations = [messages for messages in conversations if messages and messages[-1]["role"] == "assistant"]
        if not conversations:
            raise ValueError(
                "`num_eval_answers` needs evaluation rows that end in an answer (`messages`), but the first "
                f"{self.num_eval_answers} have none; set it to 0 to evaluate the loss only."
            )
        size = self.args.eval_batch_size
        batches = [conversations[first : first + size] for first in range(0, len(conversations), size)]
        return sum(map(self._num_right, batches)) / len(conversations)

    def _num_right(self, conversations: list[list[dict[str, Any]]]) -> int:
        processor = self.processing_class
        expected = [
            "".join(part["text"] for part in messages[-1]["content"] if part["type"] == "text").strip()
            for messages in conversations
        ]
        inputs = processor.apply_chat_template(
            [messages[:-1] for messages in conversations],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(self.args.device)
        longest = max(len(ids) for ids in processor.tokenizer([f" {answer}" for answer in expected])["input_ids"])
        model = self.accelerator.unwrap_model(self.model)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=longest + 1)  # and the end token
        found = processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])
        return sum(map(str.__eq__, found, expected))
