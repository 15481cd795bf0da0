"""What the tiny checkpoint reads: its tokenizer, its processor, and conversations about drawn pictures."""

import random
from collections.abc import Iterator

import torch
from scenes import draw, questions, scene_at
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import BatchFeature, PreTrainedTokenizerFast

from flashsloth import FlashSlothConfig, FlashSlothImageProcessor, FlashSlothProcessor
from flashsloth.processing_flashsloth import build_chat_template

PAD, END, IMAGE, QUERY, USER, ASSISTANT = "<|endoftext|>", "</s>", "<image>", "<learnable>", "USER:", "ASSISTANT:"
VOCABULARY_SIZE = 512
NUM_TOKENIZER_SCENES = 2000
NUM_QUESTIONS = 5
SHARE_DESCRIBED_FIRST = 0.15
SHARE_DESCRIBED_LAST = 0.35
KIND_WEIGHTS = {"count": 2.0, "left of": 2.0, "above": 2.0}  # the slowest to be learned; 1 for every other kind
IGNORED = -100


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE on questions and answers; words on signs and numbers stay single characters."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    # `lstrip`: the blank before "ASSISTANT:" belongs to the token.
    control_tokens = [
        AddedToken(token, lstrip=token == ASSISTANT) for token in (PAD, END, IMAGE, QUERY, USER, ASSISTANT)
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=control_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_tokenizer_corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[IMAGE, QUERY, USER, control_tokens[-1]],
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def _tokenizer_corpus() -> Iterator[str]:
    for index in range(NUM_TOKENIZER_SCENES):
        scene = scene_at("train", index)
        for _, question, answer in questions(scene, random.Random(index)):
            words = [word for word in answer.split() if word.islower()]  # neither written words nor numbers
            yield f"{question} {' '.join(words)}"


def build_processor(config: FlashSlothConfig, tokenizer: PreTrainedTokenizerFast) -> FlashSlothProcessor:
    """The processor that fits a config; it has no system prompt."""
    side = config.vision_config.image_size
    return FlashSlothProcessor(
        FlashSlothImageProcessor(size={"height": side, "width": side}, do_image_splitting=False),
        tokenizer,
        chat_template=build_chat_template(system_prompt=""),
        image_seq_length=config.image_seq_length,
        num_query_tokens=config.num_query_tokens,
    )


def conversation(index: int, size: int) -> list[dict]:
    """A training conversation: a picture, up to `NUM_QUESTIONS` questions about it with their answers.

    A description comes last, if at all, more often than first, so that most questions have to be answered from the
    picture and not from what was said.

    Args:
        index: Which scene of the split "train".
        size: Side of the picture in pixels.

    Returns:
        Messages for `apply_chat_template`.
    """
    rng = random.Random(f"conversation:{index}")
    scene = scene_at("train", index)
    (_, describe, description), *others = questions(scene, rng)
    by_kind: dict[str, list[tuple[str, str]]] = {}
    for kind, question, answer in others:
        by_kind.setdefault(kind, []).append((question, answer))
    kinds = list(by_kind)
    turns = []
    for kind in rng.choices(kinds, [KIND_WEIGHTS.get(kind, 1.0) for kind in kinds], k=NUM_QUESTIONS):
        turn = rng.choice(by_kind[kind])
        if turn not in turns:
            turns.append(turn)
    described = rng.random()
    if described < SHARE_DESCRIBED_FIRST:
        turns.insert(0, (describe, description))
    elif described < SHARE_DESCRIBED_FIRST + SHARE_DESCRIBED_LAST:
        turns.append((describe, description))

    messages = []
    for question, answer in turns:
        content: list[dict] = [{"type": "text", "text": question}]
        if not messages:
            content.insert(0, {"type": "image", "image": draw(scene, size)})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


class ConversationDataset(Dataset):
    """Training conversations from number `start` on, drawn when asked for."""

    def __init__(self, start: int, length: int, size: int) -> None:
        self.start, self.length, self.size = start, length, size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[dict]:
        return conversation(self.start + index, self.size)


class ConversationCollator:
    """Makes batches of conversations; answers and their end token are the only labels."""

    def __init__(self, processor: FlashSlothProcessor) -> None:
        self.processor = processor
        self.answer_id, self.end_id = processor.tokenizer.convert_tokens_to_ids([ASSISTANT, END])

    def __call__(self, conversations: list[list[dict]]) -> BatchFeature:
        """Render, tokenize and label conversations."""
        batch = self.processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
        )
        batch["labels"] = self.label(batch["input_ids"])
        return batch

    def label(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """Ids from behind every `ASSISTANT:` up to its end token; `IGNORED` elsewhere."""
        begun = (input_ids == self.answer_id).cumsum(dim=1)
        is_end = input_ids == self.end_id
        ended_before = is_end.cumsum(dim=1) - is_end.long()
        in_answer = (begun > ended_before) & (input_ids != self.answer_id)
        return input_ids.masked_fill(~in_answer, IGNORED)
