"""Tokenizer, processor and training conversations of the tiny checkpoint."""

import random
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from foreign import ForeignImages
from looks import looks_of, parts_of
from PIL import Image
from questions import BESIDE, REFUSAL, WORDINGS, Question, plural, questions, questions_on_two, refusals
from scenes import COLOURS, SHAPES, THINGS, Art, Layout, Scene, draw, scene_at
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import Dataset
from transformers import BatchFeature, PreTrainedTokenizerFast

from flashsloth import FlashSlothConfig, FlashSlothImageProcessor, FlashSlothProcessor
from flashsloth.image_processing_flashsloth import NUM_HD_TILES
from flashsloth.processing_flashsloth import build_chat_template
from flashsloth.training import FlashSlothDataCollator

PAD, END, IMAGE, QUERY, USER, ASSISTANT = "<|endoftext|>", "</s>", "<image>", "<learnable>", "USER:", "ASSISTANT:"
NUM_TOKENIZER_SCENES = 3000
LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz")
SMALL_LAYOUT = Layout(num_things=(2, 6), sides=(0.1, 0.32), share_texts=0.3)
TILES_LAYOUT = Layout(
    num_things=(2, 6), sides=(0.07, 0.3), share_texts=0.35, emoji_side=0.09, text_height=0.09
)  # small things and texts, for images that are split into tiles


@dataclass(frozen=True)
class Mix:
    """What is asked about.

    Attributes:
        num_questions: Number of questions that are drawn about an image; repetitions are dropped.
        weights: Relative frequency of each kind of question, by default 1.
        share_described: Share of the conversations with a description; half of these begin with it, others end with it.
        share_two: Share of the conversations about two images.
        share_split: Share of the batches whose images are split into tiles.
        share_foreign: Share of the conversations about foreign images.
        layouts: Scenes are drawn from one of these.
        split_layouts: And from one of these, if the image is split into tiles.
        apart: Whether each query looks at another part of what its question is about; see `parts_of`.
    """

    num_questions: int
    weights: Mapping[str, float]
    share_described: float = 0.25
    share_two: float = 0.0
    share_split: float = 0.0
    share_foreign: float = 0.0
    layouts: tuple[Layout, ...] = (Layout(),)
    split_layouts: tuple[Layout, ...] = (Layout(), TILES_LAYOUT)
    apart: bool = False


WEIGHTS = {
    "describe": 0.0,
    "colour": 1.5,
    "shape": 1.2,
    "thing": 2.0,
    "place": 1.0,
    "where": 1.5,
    "count": 2.5,
    "left of": 2.5,
    "above": 2.2,
    "is there": 1.8,
    "absent": 0.9,
    "read": 3.5,
}


def build_tokenizer(art: Art) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a token for every word of the questions and answers; printed text is spelled."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    control_tokens = [PAD, END, IMAGE, QUERY, USER, ASSISTANT]
    words = sorted(set(_words(art)) - set(alphabet))
    vocabulary = {token: number for number, token in enumerate([*control_tokens, *alphabet, *words])}
    backend = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    # `lstrip`: the space before "ASSISTANT:" is part of the token.
    added = [AddedToken(token, lstrip=token == ASSISTANT, special=True) for token in control_tokens]
    backend.add_special_tokens(added)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[IMAGE, QUERY, USER, added[-1]],
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def _words(art: Art) -> Iterator[str]:
    """Words of questions and answers as a byte-level pre-tokenizer cuts them, without those of printed text."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in _tokenizer_corpus(art):
        for word, _ in split.pre_tokenize_str(text):
            if (len(word.lstrip("Ġ")) > 1 or word == "Ġa") and LETTERS & set(word.lower()):
                yield word


def _tokenizer_corpus(art: Art) -> Iterator[str]:
    for index in range(NUM_TOKENIZER_SCENES):
        scene = scene_at("train", index, art)
        texts = {thing.text for thing in scene.things if thing.text}
        for question in questions(scene, random.Random(index), clear=False):
            answer = " ".join(part for part in question.answer.split() if part.strip(",") not in texts)
            yield f"{question.text} {answer}"
    for name in (*THINGS, *SHAPES, *COLOURS):
        yield f"a {name}, {plural(name)}. {name.capitalize()}"
    for wordings in (*WORDINGS.values(), *BESIDE.values()):
        yield from wordings
    yield f"the first, the second, both, image picture. In which? Which {REFUSAL}"


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


def choose(asked: Sequence[Question], mix: Mix, rng: random.Random) -> list[Question]:
    """Choose questions by the weights of their kinds.

    A description helps other answers, so most conversations have none, and half of the others have it last. It comes
    first in the other half: what is only asked last is not learned for a first question.
    """
    by_kind: dict[str, list[Question]] = {}
    for question in asked:
        by_kind.setdefault(question.kind, []).append(question)
    kinds = [kind for kind in by_kind if mix.weights.get(kind, 1.0) > 0]
    chosen: list[Question] = []
    if kinds:
        weights = [mix.weights.get(kind, 1.0) for kind in kinds]
        for kind in rng.choices(kinds, weights, k=mix.num_questions):
            question = rng.choice(by_kind[kind])
            if question not in chosen:
                chosen.append(question)
    described = by_kind.get("describe", [])
    if described and (not chosen or rng.random() < mix.share_described):
        chosen.insert(rng.choice((0, len(chosen))), rng.choice(described))
    return chosen


class ConversationDataset(Dataset):
    """Training conversations, generated on access, as rows for `TileCollator`.

    Each block is sorted by length, so that batches read in order have rows of similar length.

    Args:
        start: Number of the first conversation.
        length: Number of conversations.
        mix: What is asked about.
        art: Emoji art and fonts.
        foreign: Images that are nothing that the model knows.
        batch: Number of conversations in a batch of all processes.
        block: Number of batches in a sorted block; all images of a block are split into tiles, or none.
    """

    def __init__(
        self, start: int, length: int, mix: Mix, art: Art, foreign: ForeignImages, *, batch: int, block: int
    ) -> None:
        self.start, self.length, self.mix, self.art, self.foreign = start, length, mix, art, foreign
        self.batch, self.block = batch, block
        self._sorted: tuple[int, list[tuple[list[Any], list[Question]]]] = (-1, [])  # number and plans of a block

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        size = self.block * self.batch
        block, place = divmod(index, size)
        if block != self._sorted[0]:
            rows = range(block * size, min((block + 1) * size, self.length))
            plans = [self._plan(self.start + row) for row in rows]
            self._sorted = block, sorted(plans, key=lambda plan: len("".join(q.text + q.answer for q in plan[1])))
        images, asked = self._sorted[1][place]
        messages = as_messages([self._show(image) for image in images], asked)
        sizes = [(1, 1) if isinstance(image, int) else image[0].size for image in images]
        looks = [parts_of(question, sizes, self.art, self.mix.apart) for question in asked]
        return {"messages": messages, "do_image_splitting": self._is_split(block), "looks": looks, "sizes": sizes}

    def _is_split(self, block: int) -> bool:
        return random.Random(f"split:{self.start + block}").random() < self.mix.share_split

    def _plan(self, index: int) -> tuple[list[Any], list[Question]]:
        """What is shown, scenes with their layouts or the seed of a foreign image, and what is asked."""
        rng = random.Random(f"conversation:{index}")
        is_split = self._is_split((index - self.start) // (self.block * self.batch))
        layout = rng.choice(self.mix.split_layouts if is_split else self.mix.layouts)

        def scene(number: int = 0) -> Scene:
            return scene_at("train", 2 * index + number, self.art, layout)

        kind = rng.random()
        if kind < self.mix.share_foreign:
            asked = choose([*refusals(rng, scene)], self.mix, rng)[: rng.randint(1, 3)]
            return [rng.randrange(2**31)], asked
        if kind < self.mix.share_foreign + self.mix.share_two:
            first, second = scene(), scene(1)
            return [(first, layout), (second, layout)], choose(questions_on_two(first, second, rng), self.mix, rng)
        asked = [*questions(scene(), rng, clear=False), *questions(scene(), rng, clear=False)]
        return [(scene(), layout)], choose(asked, self.mix, rng)

    def _show(self, plan: tuple[Scene, Layout] | int) -> Image.Image:
        if isinstance(plan, int):
            return self.foreign.sample(random.Random(plan))
        return draw(plan[0], self.art, plan[1])


def as_messages(images: Sequence[Image.Image], asked: Sequence[Question]) -> list[dict]:
    """A conversation that begins with images."""
    messages = []
    for number, question in enumerate(asked):
        content: list[dict] = [{"type": "image", "image": image} for image in images] if number == 0 else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question.text}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
    return messages


class TileCollator:
    """Collates rows of `ConversationDataset`: batches of one tile per image, and batches of five.

    Args:
        processor: The model's processor.
        grid: Number of patches along a side of a tile; 0: batches have no `looks`.
    """

    def __init__(self, processor: FlashSlothProcessor, grid: int = 0) -> None:
        split = deepcopy(processor)
        split.image_processor.do_image_splitting = True
        self.collators = {False: FlashSlothDataCollator(processor), True: FlashSlothDataCollator(split)}
        self.grid = grid

    def __call__(self, rows: Sequence[dict[str, Any]]) -> BatchFeature:
        """Collate rows; the first one decides."""
        is_split = rows[0]["do_image_splitting"]
        batch = self.collators[is_split]([{"messages": row["messages"]} for row in rows])
        if self.grid:
            num_tiles = NUM_HD_TILES if is_split else 1
            batch["looks"] = looks_of([(row["looks"], row["sizes"]) for row in rows], self.grid, num_tiles)
        return batch
