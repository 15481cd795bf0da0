"""What the tiny checkpoint reads: its tokenizer, its processor, and conversations about drawn images."""

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
    """Which questions a training conversation holds.

    A description comes last, if at all, more often than first, so that most questions have to be answered from the
    image and not from what was said.

    Attributes:
        num_questions: How many are drawn; the same one is asked once.
        weights: How often a kind of question is drawn; 1 if it is not named. If they are named, questions of a kind
            with the answers yes and no are a kind of their own, and so are "where" and "side", which only training
            asks: whoever knows whether the star is left or right soon knows whether it is left or right of the circle.
        described_first: Share of the conversations that begin with a description.
        described_last: Share of the conversations that end with one.
        num_wordings: How many wordings there are to choose from.
        num_scenes: Of so many scenes, the first with two things side by side is taken.
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


def conversation(index: int, size: int, mix: Mix = QUESTIONS) -> list[dict]:
    """A training conversation: an image, questions about it and their answers.

    Args:
        index: Which scene of the split "train", or which `mix.num_scenes` of them.
        size: Side of the image in pixels.
        mix: Which questions.

    Returns:
        Messages for `apply_chat_template`.
    """
    return _messages(*_plan(index, mix), size)


def _plan(index: int, mix: Mix) -> tuple[Scene, list[tuple[str, str]]]:
    """A scene, and questions about it with their answers."""
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
    """Questions and answers of every kind that a mix tells apart."""
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
    """Questions on which side of the image a thing stands; they are worded as those on two things are."""
    for place, words in ((thing.column, ("left", "right")), (thing.row, ("above", "below"))):
        if place is not None:
            for wording in SIDES:
                yield wording.format(name, " or ".join(words)), words[place]
                for number, word in enumerate(words):
                    yield wording.format(name, word), "yes" if number == place else "no"


class ConversationDataset(Dataset):
    """Training conversations from number `start` on, drawn when asked for, as rows for `FlashSlothDataCollator`.

    Batches hold rows of like length if each block is read in order: it begins with its shortest conversation.

    Args:
        start: Number of the first conversation.
        length: How many there are.
        size: Side of an image in pixels.
        mix: Which questions they ask.
        block: So many conversations are sorted by length, and so on.
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
