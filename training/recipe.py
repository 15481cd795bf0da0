"""FlashSloth's training recipe: which modules a stage trains, how rows are grouped, and answers during evaluation."""

import logging
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from ..configuration_flashsloth import check_transformers
from ..modeling_flashsloth import FlashSlothForConditionalGeneration
from .data import row_lengths, text_of
from .sampler import ModalityLengthSampler

logger = logging.getLogger(__name__)

# Not checked with the other hooks, because importing `Trainer` takes long.
check_transformers("trainer.Trainer", "trainer_callback.TrainerCallback")


def freeze_for_stage(
    model: FlashSlothForConditionalGeneration, stage: int, *, train_vision_tower: bool = False
) -> FlashSlothForConditionalGeneration:
    """Set which modules are trained (paper, section 4.1).

    Args:
        model: The model, modified in place.
        stage: 1, alignment: Spatial Attention Pooling and projector. 2, instruction tuning: all but the vision tower.
        train_vision_tower: Whether stage 2 also trains the vision tower, as the paper says of FlashSloth-HD. The
            authors' code runs the tower under `torch.no_grad`, so it is not trained: `False` reproduces their code.

    Returns:
        The same model.

    Raises:
        ValueError: If `stage` is neither 1 nor 2.
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
    """Sets the sampler's epoch, and warns if a resumed run has nothing left to train.

    In a resumed run with several processes, the data loader that skips rows already seen does not set the epoch, so the
    rows would come in the order of the first epoch.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn if the run is already finished."""
        if state.is_world_process_zero and state.global_step >= state.max_steps:
            logger.warning(
                "Step %d of %d has already been reached, so nothing is trained. To continue, raise max_steps or "
                "num_train_epochs.",
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
        """Set the order of the rows for the epoch that begins or is resumed."""
        if hasattr(train_dataloader, "set_epoch"):
            train_dataloader.set_epoch(int(state.epoch))


class FlashSlothTrainer(Trainer):
    """`Trainer` that groups rows by length and modality, and can answer the questions of evaluation rows.

    With `train_sampling_strategy="group_by_length"`, a batch has rows of similar length, either all with images or all
    without. `processing_class` must be the model's processor.

    It sets two arguments that `FlashSlothDataCollator` needs: `remove_unused_columns=False` keeps the columns of rows,
    and `dispatch_batches=False` lets every process build its own batches of a stream. Resuming a finished run trains
    nothing.

    Args:
        *args: As for `Trainer`.
        num_eval_answers: Number of evaluation rows whose last question `generate` answers in every evaluation. The
            share of answers that equal the row's is logged as `eval_exact_match`.
        **kwargs: As for `Trainer`.

    Raises:
        ValueError: If `dispatch_batches` is True.
    """

    def __init__(self, *args: Any, num_eval_answers: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_eval_answers = num_eval_answers
        self.args.remove_unused_columns = False
        self.add_callback(ResumeCallback)
        for module in self.model.modules():
            # On some CPUs, bitsandbytes repacks 4-bit weights in the first inference, and then gives no gradients. This
            # attribute is its only switch for that.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator with `dispatch_batches=False`."""
        if self.args.accelerator_config.dispatch_batches:
            raise ValueError(
                "`dispatch_batches` must be False: it splits every tensor of a batch by rows, but `pixel_values` has "
                "one entry per tile. Remove it from `accelerator_config`."
            )
        self.args.accelerator_config.dispatch_batches = False
        super().create_accelerator_and_postprocess()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train one epoch, unless a resumed run has done its last step: `Trainer` checks that only after a step."""
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
        """Evaluate, and compare `num_eval_answers` generated answers; see `Trainer.evaluate`."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = self.eval_dataset[rows] if isinstance(rows, str) else rows
        if self.num_eval_answers and not isinstance(rows, dict):  # for a dict, `Trainer` calls this for each set
            exact_match = {f"{metric_key_prefix}_exact_match": self._exact_match(rows)}
            self.log(exact_match)
            metrics |= exact_match
        return metrics

    @torch.no_grad()
    def _exact_match(self, rows: Any) -> float:
        """Share of the first `num_eval_answers` rows whose last answer `generate` reproduces exactly."""
        conversations = [row.get("messages", []) for row in islice(rows, self.num_eval_answers)]
        conversations = [messages for messages in conversations if messages and messages[-1]["role"] == "assistant"]
        if not conversations:
            raise ValueError(
                "`num_eval_answers` needs evaluation rows with `messages` that end with an answer, but the first "
                f"{self.num_eval_answers} have none; set it to 0 to evaluate only the loss."
            )
        size = self.args.eval_batch_size
        batches = [conversations[first : first + size] for first in range(0, len(conversations), size)]
        return sum(map(self._num_correct, batches)) / len(conversations)

    def _num_correct(self, conversations: list[list[dict[str, Any]]]) -> int:
        processor = self.processing_class
        expected = [text_of(messages[-1]["content"]).strip() for messages in conversations]
        questions = [messages[:-1] for messages in conversations]
        inputs = processor.encode_conversations(questions, padding=True).to(self.args.device)
        longest = max(len(ids) for ids in processor.tokenizer([f" {answer}" for answer in expected])["input_ids"])
        model = self.accelerator.unwrap_model(self.model)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=longest + 1)  # plus the end token
        found = processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])
        return sum(map(str.__eq__, found, expected))
