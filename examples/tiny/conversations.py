"""Tokenizer, processor and training conversations of the tiny checkpoint."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from scenes import Scene, Thing, draw, names_of, questions, scene_at
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from flashsloth import FlashSlothConfig, FlashSlothImageProcessor, FlashSlothProcessor
from flashsloth.processing_flashsloth import build_chat_template

PAD, END, IMAGE, QUERY, USER, ASSISTANT = "<|endoftext|>", "</s>", "<image>", "<learnable>", "USER:", "ASSISTANT:"
VOCABULARY_SIZE = 512
NUM_TOKENIZER_SCENES = 2000
WHERE = "Where is the {0}?"
SIDES = ("Is the {0} {1}?", "Does the {0} stand {1}?")


@dataclass(frozen=True)
class Mix:
    """Which questions a training conversation contains.

    A description more often comes last than first, so that most questions have to be answered from the image and not
    from an earlier answer.

    Attributes:
        num_questions: Number of questions that are drawn; repetitions are dropped.
        weights: Relative frequency of each kind of question, by default 1. Yes-or-no questions of a kind count as a
            separate kind if `weights` has an entry for them. "where" and "side" are asked only in training, if
            `weights` has them: a model that knows whether the star is left or right soon learns whether it is left or
            right of the circle.
        described_first: Share of the conversations that begin with a description.
        described_last: Share of the conversations that end with a description.
        num_wordings: Number of wordings of every question to choose from.
        num_scenes: Number of candidate scenes; the first one with two objects in a row is used.
    """

    num_questions: int
    weights: Mapping[str, float]
    described_first: float
    described_last: float
    num_wordings: int = 1
    num_scenes: int = 1


CAPTIONS = Mix(0, {}, 1.0, 0.0)
QUESTIONS = Mix(
    9,
    {
        "count": 4.0,
        "shape": 2.0,
        "colour": 2.5,
        "left of": 3.5,
        "left of, yes or no": 4.0,
        "above": 3.0,
        "above, yes or no": 3.0,
        "where": 3.0,
        "side": 5.0,
        "read number": 1.2,
        "read word": 1.0,
    },
    0.05,
    0.2,
    num_wordings=2,
    num_scenes=2,
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on questions and answers; texts of signs and numbers remain single characters."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    # `lstrip`: the space before "ASSISTANT:" is part of the token.
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
            words = [word for word in answer.split() if word.islower()]  # neither texts of signs nor numbers
            yield f"{question} {' '.join(words)}"


def build_processor(config: FlashSlothConfig, tokenizer: PreTrainedTokenizerFast) -> FlashSlothProcessor:
    """Build the processor for a config; it has no system prompt."""
    side = config.vision_config.image_size
    return FlashSlothProcessor(
        FlashSlothImageProcessor(size={"height": side, "width": side}, do_image_splitting=False),
        tokenizer,
        chat_template=build_chat_template(system_prompt=""),
        image_seq_length=config.image_seq_length,
        num_query_tokens=config.num_query_tokens,
    )


def _plan(index: int, mix: Mix) -> tuple[Scene, list[tuple[str, str]]]:
    """Choose a scene of the split "train", questions about it, and their answers."""
    rng = random.Random(f"conversation:{index}")
    scene = _choose_scene(index, mix.num_scenes)
    (_, describe, description), *others = questions(scene, rng)
    for _ in range(mix.num_wordings - 1):
        others += questions(scene, rng)[1:]
    by_kind = _by_kind(others, scene, mix)
    kinds = list(by_kind)
    turns = []
    for kind in rng.choices(kinds, [mix.weights.get(kind, 1.0) for kind in kinds], k=mix.num_questions):
        turn = rng.choice(by_kind[kind])
        if turn not in turns:
            turns.append(turn)
    described = rng.random()
    if described < mix.described_first:
        turns.insert(0, (describe, description))
    elif described < mix.described_first + mix.described_last:
        turns.append((describe, description))
    return scene, turns


def _messages(scene: Scene, turns: list[tuple[str, str]], size: int) -> list[dict]:
    messages = []
    for question, answer in turns:
        content: list[dict] = [{"type": "text", "text": question}]
        if not messages:
            content.insert(0, {"type": "image", "image": draw(scene, size)})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def _choose_scene(index: int, num_scenes: int) -> Scene:
    for number in range(index * num_scenes, (index + 1) * num_scenes):
        scene = scene_at("train", number)
        cells = [(thing.row, thing.column) for thing in scene.things]
        if any((row, 0) in cells and (row, 1) in cells for row in (0, 1)):
            break
    return scene


def _by_kind(asked: list[tuple[str, str, str]], scene: Scene, mix: Mix) -> dict[str, list[tuple[str, str]]]:
    """Group questions and answers by the kinds that a mix distinguishes."""
    by_kind: dict[str, list[tuple[str, str]]] = {}
    for kind, question, answer in asked:
        confirmed = f"{kind}, yes or no"
        is_apart = answer in ("yes", "no") and confirmed in mix.weights
        by_kind.setdefault(confirmed if is_apart else kind, []).append((question, answer))
    named = [(name, thing) for thing in scene.things for name in names_of(thing, scene)]
    if "where" in mix.weights and named:
        by_kind["where"] = [(WHERE.format(name), thing.place) for name, thing in named]
    if "side" in mix.weights and named:
        by_kind["side"] = [turn for name, thing in named for turn in _sides(name, thing)]
    return by_kind


def _sides(name: str, thing: Thing) -> Iterator[tuple[str, str]]:
    """Questions about the side of the image that an object is on, worded like those about two objects."""
    for place, words in ((thing.column, ("left", "right")), (thing.row, ("above", "below"))):
        if place is not None:
            for wording in SIDES:
                yield wording.format(name, " or ".join(words)), words[place]
                for number, word in enumerate(words):
                    yield wording.format(name, word), "yes" if number == place else "no"


class ConversationDataset(Dataset):
    """Training conversations, generated on access, as rows for `FlashSlothDataCollator`.

    Each block is sorted by length, so that batches read in order have rows of similar length.

    Args:
        start: Number of the first conversation.
        length: Number of conversations.
        size: Side of an image, in pixels.
        mix: Which questions are asked.
        block: Number of conversations in a sorted block.
    """

    def __init__(self, start: int, length: int, size: int, mix: Mix, *, block: int = 1) -> None:
        self.start, self.length, self.size, self.mix, self.block = start, length, size, mix, block
        self._sorted: tuple[int, list[tuple[Scene, list[tuple[str, str]]]]] = (-1, [])  # number and plans of a block

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, list[dict]]:
        block, place = divmod(index, self.block)
        if block != self._sorted[0]:
            rows = range(block * self.block, min((block + 1) * self.block, self.length))
            plans = [_plan(self.start + row, self.mix) for row in rows]
            self._sorted = block, sorted(plans, key=lambda plan: len("".join(map("".join, plan[1]))))
        return {"messages": _messages(*self._sorted[1][place], self.size)}
