"""Questions about the tiny checkpoint's scenes, each with its only right answer."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from scenes import COLOURS, SHAPES, THINGS, Scene, Thing

KINDS = (
    "describe",
    "colour",
    "shape",
    "thing",
    "place",
    "where",
    "count",
    "left of",
    "above",
    "is there",
    "absent",
    "read",
    "refuse",
)
REFUSAL = "I only know drawings, emoji and printed words."
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
FIRST_EDGE, SECOND_EDGE = 0.37, 0.63  # between left, middle and right
UNCLEAR = 0.035  # things nearer than this to an edge are at no clear place
CLEARLY_BESIDE = 0.12  # distance of the middles, as a fraction of the canvas
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
WORDINGS = {
    "describe": (
        "Describe the picture.",
        "Describe the image.",
        "What is in the picture?",
        "What is in the image?",
        "What do you see?",
        "What is shown here?",
        "Caption this image.",
    ),
    "colour": (
        "What colour is the {0}?",
        "What color is the {0}?",
        "Which colour is the {0}?",
        "The {0} is what color?",
    ),
    "shape of colour": ("Which shape is {0}?", "What shape is {0}?", "What shape is the {0} one?"),
    "shape at place": ("Which shape is {0}?", "What shape is {0}?"),
    "shape alone": ("What shape is this?", "Which shape is it?", "What shape do you see?"),
    "thing alone": ("What is this?", "What is it?", "What is that?", "Name this.", "Which thing is this?"),
    "place": ("What is {0}?", "What do you see {0}?", "Which thing is {0}?"),
    "where": ("Where is the {0}?", "Where do you see the {0}?", "In which part of the picture is the {0}?"),
    "count": (
        "How many {0} are there?",
        "How many {0} do you see?",
        "Count the {0}.",
        "How many {0} are in the picture?",
    ),
    "neighbour": ("What is {0} the {1}?", "Which thing is {0} the {1}?", "What do you see {0} the {1}?"),
    "relation": ("Is the {0} {1} the {2}?",),
    "is there": ("Is there {0}?", "Do you see {0}?", "Is there {0} in the picture?", "Can you see {0}?"),
    "sign": ("What does the sign say?", "Read the sign.", "What is written on the sign?"),
    "word": ("Read the word.", "What is the word?", "Which word is written here?", "What does the word say?"),
    "number": ("What is the number?", "Read the number.", "Which number is there?", "What number do you see?"),
    "text": (
        "Read the text.",
        "What is written in the picture?",
        "What does it say?",
        "What does the text say?",
        "What text is in the image?",
    ),
    "text at place": ("Read the text {0}.", "What is written {0}?", "What does the text {0} say?"),
}


class Question(NamedTuple):
    """A question and its answer.

    Attributes:
        kind: One of `KINDS`.
        text: The question.
        answer: The answer.
    """

    kind: str
    text: str
    answer: str


def place_of(thing: Thing) -> str:
    """Where a thing is, one of nine places: "top left", "top", …, "middle", …, "bottom right"."""
    x, y = ((middle > FIRST_EDGE) + (middle > SECOND_EDGE) for middle in thing.box.centre)
    return f"{ROWS[y]} {COLUMNS[x]}".strip() or "middle"


def is_clearly_placed(thing: Thing) -> bool:
    """Whether a thing is clearly at one of the nine places."""
    return all(abs(middle - edge) > UNCLEAR for middle in thing.box.centre for edge in (FIRST_EDGE, SECOND_EDGE))


def phrase_of(thing: Thing) -> str:
    """What a thing is: "dog", "red circle", "white sign STOP"."""
    return " ".join(filter(None, (thing.colour, thing.name, thing.text)))


def describe(scene: Scene) -> str:
    """Describe a scene: its things in reading order, each with its place; "nothing" if it has none."""
    ordered = sorted(scene.things, key=lambda thing: (_row(thing), thing.box.centre[0]))
    return ", ".join(f"{with_article(phrase_of(thing))} {place_of(thing)}" for thing in ordered) or "nothing"


def _row(thing: Thing) -> int:
    return (thing.box.centre[1] > FIRST_EDGE) + (thing.box.centre[1] > SECOND_EDGE)


def names_of(thing: Thing, scene: Scene) -> list[str]:
    """Names that only one thing of a scene has: "circle", "red circle", "red shape"."""
    candidates = [thing.name]
    if thing.colour:
        candidates.append(f"{thing.colour} {thing.name}")
    if thing.name in SHAPES:
        candidates.append(f"{thing.colour} shape")
    return [name for name in candidates if count(name, scene) == 1]


def count(name: str, scene: Scene) -> int:
    """How many things of a scene a name fits: "circle", "red circle", "red shape", "shape", "thing", "dog"."""
    *adjectives, noun = name.split(" ") if name not in THINGS else (name,)
    colour = adjectives[0] if adjectives else ""
    return sum(
        (noun in ("thing", thing.name) or (noun == "shape" and thing.name in SHAPES)) and colour in ("", thing.colour)
        for thing in scene.things
    )


def plural(name: str) -> str:
    """The plural of a name: "boxes", "ladies", "dogs"; names that end in s but are singular are rare enough."""
    irregular = {
        "mouse": "mice",
        "leaf": "leaves",
        "wolf": "wolves",
        "snowman": "snowmen",
        "fish": "fish",
        "deer": "deer",
    }
    *before, noun = name.split(" ")
    if noun in irregular:
        noun = irregular[noun]
    elif noun in PLURALS | UNCOUNTABLE:
        pass
    elif noun.endswith(("s", "x", "ch", "sh")):
        noun += "es"
    elif noun.endswith("y") and noun[-2] not in "aeiou":
        noun = f"{noun[:-1]}ies"
    elif noun in ("potato", "tomato"):
        noun += "es"
    else:
        noun += "s"
    return " ".join([*before, noun])


PLURALS = frozenset({"cherries", "fries", "glasses", "grapes", "jeans", "scissors", "sunglasses"})
UNCOUNTABLE = frozenset({"bread", "popcorn", "sushi"})


def with_article(name: str) -> str:
    """A name with "a" or "an"; none before a plural."""
    if name.split(" ")[-1] in PLURALS | UNCOUNTABLE:
        return name
    return f"{'an' if name[0] in 'aeiou' and not name.startswith(('uni', 'eu')) else 'a'} {name}"


def at(place: str, rng: random.Random) -> str:
    """A place as part of a question."""
    if place == "middle":
        return rng.choice(("in the middle", "in the center", "in the centre"))
    if " " in place:
        return rng.choice((place, f"at the {place}", f"in the {place} corner", f"at {place}"))
    if place in ("left", "right"):
        return rng.choice((f"on the {place}", f"at the {place}"))
    return f"at the {place}"


def word(name: str, rng: random.Random, *parts: str) -> str:
    """A wording of a question, sometimes typed carelessly."""
    text = rng.choice(WORDINGS[name]).format(*parts)
    return careless(text, rng)


def careless(text: str, rng: random.Random) -> str:
    """A text, sometimes without capitals or without its last mark."""
    if rng.random() < 0.12:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.1:
        text = text[:-1]
    return text


def questions(scene: Scene, rng: random.Random, *, clear: bool = True) -> list[Question]:
    """Questions about a scene that have exactly one right answer.

    Args:
        scene: The scene.
        rng: Chooses the wordings, and what is counted and missed.
        clear: Whether to describe a scene only if all of its things are at clear places.
    """
    references = {number: names_of(thing, scene) for number, thing in enumerate(scene.things)}
    asked: list[Question] = []
    if not clear or all(map(is_clearly_placed, scene.things)):
        asked.append(Question("describe", word("describe", rng), describe(scene)))
    for make in (_properties, _places, _positions):
        asked += make(scene, references, rng)
    asked += _texts(scene, rng)
    asked += _counts(scene, rng)
    asked += _existence(scene, rng)
    return asked


References = dict[int, list[str]]


def _properties(scene: Scene, references: References, rng: random.Random) -> Iterator[Question]:
    """Questions about colours, shapes and names."""
    shapes = [thing for thing in scene.things if thing.name in SHAPES]
    for number, thing in enumerate(scene.things):
        if thing.colour and thing.name in references[number]:
            yield Question("colour", word("colour", rng, thing.name), thing.colour)
        if thing.name in SHAPES and [shape.colour for shape in shapes].count(thing.colour) == 1:
            yield Question("shape", word("shape of colour", rng, thing.colour), thing.name)
    if len(shapes) == 1:
        yield Question("shape", word("shape alone", rng), shapes[0].name)
    if len(scene.things) == 1 and not scene.things[0].text:
        yield Question("thing", word("thing alone", rng), phrase_of(scene.things[0]))
        if scene.things[0].colour:
            yield Question(
                "colour", careless(f"What {rng.choice(('colour', 'color'))} is it?", rng), scene.things[0].colour
            )


def _places(scene: Scene, references: References, rng: random.Random) -> Iterator[Question]:
    """Questions about what is where."""
    clear = [number for number, thing in enumerate(scene.things) if is_clearly_placed(thing)]
    if len(clear) == len(scene.things):
        yield from _contents_of_places(scene, rng)
    for number in clear:
        if references[number]:
            name = rng.choice(references[number])
            yield Question("where", word("where", rng, name), place_of(scene.things[number]))


def _contents_of_places(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Questions about what is at a place, which holds one thing or nothing."""
    by_place: dict[str, list[Thing]] = {}
    for thing in scene.things:
        by_place.setdefault(place_of(thing), []).append(thing)
    for place, found in by_place.items():
        if len(found) == 1:
            kind = "thing" if found[0].name in THINGS else "place"
            yield Question(kind, word("place", rng, at(place, rng)), phrase_of(found[0]))
            if found[0].name in SHAPES:
                yield Question("shape", word("shape at place", rng, at(place, rng)), found[0].name)
    corner = f"{rng.choice(('top', 'bottom'))} {rng.choice(('left', 'right'))}"
    if corner not in by_place and rng.random() < 0.3:
        yield Question("place", word("place", rng, at(corner, rng)), "nothing")


def _positions(scene: Scene, references: References, rng: random.Random) -> Iterator[Question]:
    """Questions about relative positions."""
    for number, anchor in enumerate(scene.things):
        if not references[number]:
            continue
        name = rng.choice(references[number])
        for relation in OPPOSITES:
            kind = "left of" if relation.endswith("of") else "above"
            steps = [_step(thing, anchor, relation) for thing in scene.things]
            found = [other for other, step in enumerate(steps) if step > CLEARLY_BESIDE]
            if len(found) == 1 and not any(0.03 < step <= CLEARLY_BESIDE for step in steps):
                answer = phrase_of(scene.things[found[0]])
                yield Question(kind, word("neighbour", rng, relation, name), answer)
            for other in found:
                if references[other]:
                    yield Question(kind, *_relation(rng.choice(references[other]), relation, name, rng))


def _step(thing: Thing, anchor: Thing, relation: str) -> float:
    """How far a thing is left of (right of, above, below) an anchor."""
    (x, y), (anchor_x, anchor_y) = thing.box.centre, anchor.box.centre
    return {"left of": anchor_x - x, "right of": x - anchor_x, "above": anchor_y - y, "below": y - anchor_y}[relation]


def _relation(name: str, relation: str, anchor: str, rng: random.Random) -> tuple[str, str]:
    """A question that offers two relations, or one to confirm or deny; and its answer."""
    if rng.random() < 0.4:
        choice = "above or below" if relation in ("above", "below") else "left or right of"
        return word("relation", rng, name, choice, anchor), relation.removesuffix(" of")
    stated = rng.choice((relation, OPPOSITES[relation]))
    return word("relation", rng, name, stated, anchor), "yes" if stated == relation else "no"


def _texts(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Questions about what is written."""
    texts = [thing for thing in scene.things if thing.text]
    for thing in texts:
        wordings = []
        if [other.name for other in texts].count(thing.name) == 1:
            wordings.append(thing.name)
        if len(texts) == 1:
            wordings += ["text", rng.choice(("sign", "word"))]
        if wordings:
            yield Question("read", word(rng.choice(wordings), rng), thing.text)
        places = [place_of(other) for other in texts]
        if all(map(is_clearly_placed, texts)) and places.count(place_of(thing)) == 1:
            yield Question("read", word("text at place", rng, at(place_of(thing), rng)), thing.text)


def _counts(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Questions about numbers: of all things, of all shapes, of those with a name or a colour."""
    present = [thing.name for thing in scene.things if not thing.text]
    colours = [thing.colour for thing in scene.things if thing.name in SHAPES]
    names = ["thing", "shape", f"{rng.choice([*colours, rng.choice(tuple(COLOURS))])} shape"]
    names += [rng.choice([*present, rng.choice(SHAPES)]), rng.choice(present or THINGS)]
    if colours:
        names.append(f"{rng.choice(colours)} {rng.choice([name for name in present if name in SHAPES])}")
    for name in dict.fromkeys(names):
        shown = plural(rng.choice(("thing", "object")) if name == "thing" else name)
        yield Question("count", word("count", rng, shown), str(count(name, scene)))


def _existence(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Questions about what is there or not, as often the one as the other; and about properties of what is not."""
    present = [name for thing in scene.things for name in _descriptions(thing)]
    if present:
        yield Question("is there", word("is there", rng, with_article(rng.choice(present))), "yes")
    missing = _missing(scene, rng)
    yield Question("is there", word("is there", rng, with_article(missing)), "no")
    missing = _missing(scene, rng, shapes_only=rng.random() < 0.6)
    kind = rng.choice(("colour", "where") if missing.split(" ")[-1] in SHAPES else ("where",))
    yield Question("absent", word(kind, rng, missing), f"there is no {missing}")
    if not any(thing.text for thing in scene.things):
        name = rng.choice(("sign", "word", "number", "text"))
        yield Question("absent", word(name, rng), f"there is no {name}")


def _descriptions(thing: Thing) -> list[str]:
    names = [thing.name, thing.name]
    if thing.name in SHAPES:
        names += [f"{thing.colour} {thing.name}", f"{thing.colour} shape"]
    return names


def _missing(scene: Scene, rng: random.Random, *, shapes_only: bool = False) -> str:
    """Name something that a scene does not have; often it has a part of it."""
    shapes = [thing for thing in scene.things if thing.name in SHAPES]
    while True:
        kind = rng.random()
        if shapes and kind < 0.4:
            shape = rng.choice(shapes)
            name = rng.choice((f"{rng.choice(tuple(COLOURS))} {shape.name}", f"{shape.colour} {rng.choice(SHAPES)}"))
        elif kind < 0.7 or shapes_only:
            name = rng.choice(SHAPES)
        elif kind < 0.76:
            name = rng.choice(("sign", "number", "word"))
        else:
            name = rng.choice(THINGS)
        is_text = name in ("sign", "number", "word")
        if count(name, scene) == 0 and not (is_text and (shapes_only or any(thing.text for thing in scene.things))):
            return name


def questions_on_two(first: Scene, second: Scene, rng: random.Random) -> list[Question]:
    """Questions about two images: about one of them, and about which of them has something."""
    asked = []
    for number, scene in enumerate((first, second)):
        for kind, text, answer in questions(scene, rng, clear=False):
            asked.append(Question(kind, in_image(text, number, rng), answer))
    for number, (scene, other) in enumerate(((first, second), (second, first))):
        for thing in scene.things:
            for name in set(_descriptions(thing)):
                if count(name, other) == 0 and not (thing.text and any(found.text for found in other.things)):
                    text = rng.choice(("Which image has {0}?", "Which picture shows {0}?", "In which image is {0}?"))
                    answer = ("the first", "the second")[number]
                    asked.append(Question("where", careless(text.format(with_article(name)), rng), answer))
    return asked


def in_image(text: str, number: int, rng: random.Random) -> str:
    """Ask a question about one of two images."""
    mark = text[-1] if text[-1] in "?." else ""
    ordinal, image = ("first", "second")[number], rng.choice(("image", "picture"))
    if text.startswith(("Describe", "describe")):
        return f"{text.split(' ')[0]} the {ordinal} {image}{mark}"
    text = text.removesuffix(mark) if mark else text
    text = text.removesuffix(" in the picture").removesuffix(" in the image")
    return f"{text} in the {ordinal} {image}{mark}"


def refusals(rng: random.Random, ask: Callable[[], Scene]) -> list[Question]:
    """Questions about a foreign image, which might be asked about a scene; all have one answer."""
    asked = questions(ask(), rng, clear=False)
    return [Question("refuse", question.text, REFUSAL) for question in asked]


def find_kind(asked: Sequence[Question], kind: str) -> list[Question]:
    """The questions of a kind."""
    return [question for question in asked if question.kind == kind]
