"""Questions about the tiny checkpoint's scenes, each with its only right answer."""

import random
import re
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
        "Describe this picture.",
        "Describe this image.",
        "Please describe the picture.",
        "What is in the picture?",
        "What is in the image?",
        "What is in this picture?",
        "What's in this image?",
        "What do you see?",
        "What can you see?",
        "What is shown here?",
        "What does the picture show?",
        "Caption this image.",
        "Describe what you see.",
        "Describe the scene.",
        "What's in the picture?",
        "Tell me what you see.",
    ),
    "colour": (
        "What colour is the {0}?",
        "What color is the {0}?",
        "Which colour is the {0}?",
        "Which color does the {0} have?",
        "What is the colour of the {0}?",
        "What's the color of the {0}?",
        "The {0} is what color?",
        "What is the color of the {0}?",
        "Tell me the colour of the {0}.",
        "Name the color of the {0}.",
    ),
    "colour alone": ("What colour is it?", "What color is it?", "What colour is this?", "What color is this?"),
    "shape of colour": (
        "Which shape is {0}?",
        "What shape is {0}?",
        "What shape is the {0} one?",
        "What is {0}?",
        "What shape does the {0} shape have?",
    ),
    "shape at place": ("Which shape is {0}?", "What shape is {0}?", "What is the shape {0}?"),
    "shape alone": (
        "What shape is this?",
        "Which shape is it?",
        "What shape do you see?",
        "Name the shape.",
        "What is the shape?",
    ),
    "thing alone": (
        "What is this?",
        "What's this?",
        "What is it?",
        "What is that?",
        "Name this.",
        "Which thing is this?",
        "What object is this?",
        "What do you call this?",
        "What is the name of this thing?",
    ),
    "category alone": ("What {0} is this?", "Which {0} is it?", "What {0} do you see?", "Name the {0}."),
    "category at place": ("What {0} is {1}?", "Which {0} do you see {1}?"),
    "place": ("What is {0}?", "What's {0}?", "What do you see {0}?", "Which thing is {0}?", "Which object is {0}?"),
    "where": (
        "Where is the {0}?",
        "Where's the {0}?",
        "Where do you see the {0}?",
        "Where is the {0} in the picture?",
        "In which part of the picture is the {0}?",
        "Where in the image is the {0}?",
        "What is the position of the {0}?",
    ),
    "count": (
        "How many {0} are there?",
        "How many {0} do you see?",
        "How many {0} can you see?",
        "Count the {0}.",
        "How many {0} are in the picture?",
        "How many {0} are in the image?",
        "What is the number of {0}?",
        "How many {0}?",
        "How many {0} does the picture have?",
        "How many {0} does the image show?",
    ),
    "neighbour": (
        "What is {0} the {1}?",
        "What's {0} the {1}?",
        "Which thing is {0} the {1}?",
        "What do you see {0} the {1}?",
        "Which object is {0} the {1}?",
        "What object is {0} the {1}?",
    ),
    "relation": ("Is the {0} {1} the {2}?",),
    "is there": (
        "Is there {0}?",
        "Is there {0} here?",
        "Do you see {0}?",
        "Is there {0} in the picture?",
        "Is there {0} in the image?",
        "Can you see {0}?",
        "Does the picture show {0}?",
        "Is {0} visible?",
        "Is {0} in the picture?",
        "Does the image contain {0}?",
        "Does the image show {0}?",
        "Is there {0} in this picture?",
    ),
    "are there": ("Are there any {0}?", "Are there {0} in the picture?", "Can you see any {0}?", "Do you see {0}?"),
    "is it": ("Is the {0} {1}?",),
    "sign": (
        "What does the sign say?",
        "Read the sign.",
        "What is written on the sign?",
        "What is on the sign?",
        "What's printed on the sign?",
        "What does the sign read?",
        "What word is on the sign?",
        "What text is on the sign?",
    ),
    "word": (
        "Read the word.",
        "What is the word?",
        "What word is this?",
        "Which word is written here?",
        "What does the word say?",
        "What word do you see?",
        "What is the word in the image?",
        "What word is written in the picture?",
    ),
    "number": (
        "What is the number?",
        "Read the number.",
        "What number is this?",
        "Which number is there?",
        "Which number is written here?",
        "What number do you see?",
        "What is the number in the picture?",
        "Which number do you see?",
    ),
    "text": (
        "Read the text.",
        "Read it.",
        "What is written in the picture?",
        "What is written here?",
        "What is printed?",
        "What is printed here?",
        "What does it say?",
        "What does the text say?",
        "What is the text?",
        "What text is in the image?",
        "What text do you see?",
        "What text is shown?",
        "What is written?",
        "Transcribe the text.",
        "What is written in this image?",
    ),
    "text at place": ("Read the text {0}.", "What is written {0}?", "What does the text {0} say?", "Read what is {0}."),
    "which image": (
        "Which image has {0}?",
        "Which picture has {0}?",
        "Which picture shows {0}?",
        "In which image is {0}?",
        "Which of the images has {0}?",
        "Which image contains {0}?",
        "Which of the two images shows {0}?",
        "Which one has {0}?",
    ),
}
CATEGORIES = {
    "animal": """
        ant bat bear bee bird butterfly camel cat chicken cow crab crocodile deer dog dolphin dragon duck elephant fish
        fox frog giraffe hedgehog horse koala ladybug lion lizard monkey mouse octopus owl panda parrot peacock pig
        penguin rabbit rooster scorpion shark shrimp snail snake spider swan tiger turtle unicorn whale wolf zebra
    """,
    "fruit": "apple avocado banana cherries grapes lemon peach pear pineapple strawberry tangerine tomato watermelon",
    "vehicle": "airplane ambulance bicycle bus car helicopter motorcycle rocket sailboat ship taxi tractor train",
}
CATEGORY_OF = {name: category for category, names in CATEGORIES.items() for name in names.split()}
BESIDE = {  # ways to put a relation; in answers to questions, only the first one
    "left of": ("left of", "left of", "to the left of", "on the left of"),
    "right of": ("right of", "right of", "to the right of", "on the right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under", "beneath"),
}


class Question(NamedTuple):
    """A question and its answer.

    Attributes:
        kind: One of `KINDS`.
        text: The question.
        answer: The answer.
        about: What has to be looked at for the answer, each thing with the place of its image; empty if that is
            everything or nothing.
    """

    kind: str
    text: str
    answer: str
    about: tuple[tuple[int, Thing], ...] = ()


def about(*things: Thing) -> tuple[tuple[int, Thing], ...]:
    """The things that a question about one image is about."""
    return tuple((0, thing) for thing in things)


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
    ordered = in_reading_order(scene)
    return ", ".join(f"{with_article(phrase_of(thing))} {place_of(thing)}" for thing in ordered) or "nothing"


def in_reading_order(scene: Scene) -> list[Thing]:
    """The things of a scene, row by row and from left to right."""
    return sorted(scene.things, key=lambda thing: (_row(thing), thing.box.centre[0]))


def _row(thing: Thing) -> int:
    return (thing.box.centre[1] > FIRST_EDGE) + (thing.box.centre[1] > SECOND_EDGE)


def names_of(thing: Thing, scene: Scene) -> list[str]:
    """Names that only one thing of a scene has: "circle", "red circle", "red shape", "shape"."""
    candidates = [thing.name]
    if thing.colour:
        candidates.append(f"{thing.colour} {thing.name}")
    if thing.name in SHAPES:
        candidates += [f"{thing.colour} shape", "shape"]
    return [name for name in candidates if count(name, scene) == 1]


def named(name: str, scene: Scene) -> list[Thing]:
    """The things that a name fits, in reading order: "circle", "red circle", "red shape", "shape", "thing", "dog"."""
    *adjectives, noun = name.split(" ") if name not in THINGS else (name,)
    colour = adjectives[0] if adjectives else ""
    things = in_reading_order(scene)
    classes = {"thing": things, "shape": [thing for thing in things if thing.name in SHAPES]}
    classes["text"] = [thing for thing in things if thing.text]
    found = classes.get(noun, [thing for thing in things if thing.name == noun])
    return [thing for thing in found if colour in ("", thing.colour)]


def count(name: str, scene: Scene) -> int:
    """How many things of a scene a name fits; see `named`."""
    return len(named(name, scene))


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
        row, column = place.split(" ")
        other = {"top": "upper", "bottom": "lower"}[row]
        corners = (f"in the {place} corner", f"in the {place}", f"in the {other} {column} corner", f"{other} {column}")
        return rng.choice((place, f"at the {place}", f"at {place}", *corners))
    if place in ("left", "right"):
        return rng.choice((f"on the {place}", f"at the {place}", f"to the {place}", f"on the {place} side"))
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
        asked.append(Question("describe", word("describe", rng), describe(scene), about(*in_reading_order(scene))))
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
        names = [name for name in (thing.name, "shape") if name in references[number]]
        if thing.colour and names:
            name = rng.choice(names)
            yield Question("colour", word("colour", rng, name), thing.colour, about(thing))
            stated = thing.colour if rng.random() < 0.5 else rng.choice(tuple(COLOURS))
            answer = "yes" if stated == thing.colour else "no"
            yield Question("colour", word("is it", rng, name, stated), answer, about(thing))
        if thing.name in SHAPES and [shape.colour for shape in shapes].count(thing.colour) == 1:
            wordings = WORDINGS["shape of colour"]
            if any(other.colour == thing.colour for other in scene.things if other is not thing):
                wordings = tuple(text for text in wordings if "hape" in text)  # a sign may have the colour
            text = careless(rng.choice(wordings).format(thing.colour), rng)
            yield Question("shape", text, thing.name, about(thing))
    if len(shapes) == 1:
        yield Question("shape", word("shape alone", rng), shapes[0].name, about(shapes[0]))
    if len(scene.things) == 1 and not scene.things[0].text:
        yield from _only_thing(scene.things[0], rng)


def _only_thing(only: Thing, rng: random.Random) -> Iterator[Question]:
    """Questions about a shape or an emoji that is alone."""
    yield Question("thing", word("thing alone", rng), phrase_of(only), about(only))
    if only.name in CATEGORY_OF:
        yield Question("thing", word("category alone", rng, CATEGORY_OF[only.name]), only.name, about(only))
    if only.colour:
        yield Question("colour", word("colour alone", rng), only.colour, about(only))


def _places(scene: Scene, references: References, rng: random.Random) -> Iterator[Question]:
    """Questions about what is where."""
    clear = [number for number, thing in enumerate(scene.things) if is_clearly_placed(thing)]
    if len(clear) == len(scene.things):
        yield from _contents_of_places(scene, rng)
    for number in clear:
        if references[number]:
            name, thing = rng.choice(references[number]), scene.things[number]
            yield Question("where", word("where", rng, name), place_of(thing), about(thing))


def _contents_of_places(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Questions about what is at a place, which holds one thing or nothing."""
    by_place: dict[str, list[Thing]] = {}
    for thing in scene.things:
        by_place.setdefault(place_of(thing), []).append(thing)
    for place, found in by_place.items():
        shapes = [thing for thing in found if thing.name in SHAPES]
        if len(found) == 1:
            kind = "thing" if found[0].name in THINGS else "place"
            yield Question(kind, word("place", rng, at(place, rng)), phrase_of(found[0]), about(found[0]))
            if found[0].name in CATEGORY_OF:
                text = word("category at place", rng, CATEGORY_OF[found[0].name], at(place, rng))
                yield Question("thing", text, found[0].name, about(found[0]))
        if len(shapes) == 1:
            yield Question("shape", word("shape at place", rng, at(place, rng)), shapes[0].name, about(shapes[0]))
            name = f"shape {at(place, rng)}"
            yield Question("colour", word("colour", rng, name), shapes[0].colour, about(shapes[0]))
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
                other = scene.things[found[0]]
                text = word("neighbour", rng, rng.choice(BESIDE[relation]), name)
                yield Question(kind, text, phrase_of(other), about(anchor, other))
            for place in found:
                if references[place]:
                    asked, answer = _relation(rng.choice(references[place]), relation, name, rng)
                    yield Question(kind, asked, answer, about(anchor, scene.things[place]))


def _step(thing: Thing, anchor: Thing, relation: str) -> float:
    """How far a thing is left of (right of, above, below) an anchor."""
    (x, y), (anchor_x, anchor_y) = thing.box.centre, anchor.box.centre
    return {"left of": anchor_x - x, "right of": x - anchor_x, "above": anchor_y - y, "below": y - anchor_y}[relation]


def _relation(name: str, relation: str, anchor: str, rng: random.Random) -> tuple[str, str]:
    """A question that offers two relations, or one to confirm or deny; and its answer."""
    if rng.random() < 0.4:
        choice = "above or below"
        if relation.endswith("of"):
            choice = rng.choice(("left or right of", "left or right of", "to the left or right of"))
        return word("relation", rng, name, choice, anchor), relation.removesuffix(" of")
    stated = rng.choice((relation, OPPOSITES[relation]))
    text = word("relation", rng, name, rng.choice(BESIDE[stated]), anchor)
    return text, "yes" if stated == relation else "no"


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
            yield Question("read", word(rng.choice(wordings), rng), thing.text, about(thing))
        places = [place_of(other) for other in texts]
        if all(map(is_clearly_placed, texts)) and places.count(place_of(thing)) == 1:
            text = word("text at place", rng, at(place_of(thing), rng))
            yield Question("read", text, thing.text, about(thing))


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
        found = named(name, scene)
        yield Question("count", word("count", rng, shown), str(len(found)), about(*found))


def _existence(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """Questions about what is there or not, as often the one as the other; and about properties of what is not."""
    present = [name for thing in scene.things for name in _descriptions(thing)]
    if present:
        name = rng.choice(present)
        yield Question("is there", _is_there(name, rng), "yes", about(*named(name, scene)))
    missing = _missing(scene, rng)
    yield Question("is there", _is_there(missing, rng), "no")
    yield _about_missing(scene, rng)
    if not any(thing.text for thing in scene.things):
        name = rng.choice(("sign", "word", "number", "text"))
        yield Question("absent", word(name, rng), f"there is no {name}")


def _is_there(name: str, rng: random.Random) -> str:
    if rng.random() < 0.15:
        return word("are there", rng, plural(name))
    return word("is there", rng, rng.choice((with_article(name), with_article(name), f"any {name}")))


def _about_missing(scene: Scene, rng: random.Random) -> Question:
    """A question about something that a scene does not have."""
    missing = _missing(scene, rng, shapes_only=rng.random() < 0.6)
    is_shape = missing.split(" ")[-1] in SHAPES
    kind = rng.choice(("colour", "where", "neighbour", "relation") if is_shape else ("where", "neighbour"))
    relation = rng.choice(BESIDE[rng.choice(tuple(BESIDE))])
    text = word(kind, rng, missing) if kind in ("colour", "where") else word("neighbour", rng, relation, missing)
    if kind == "relation" and scene.things:
        other = rng.choice([name for thing in scene.things for name in names_of(thing, scene)] or ["thing"])
        if other != "thing":
            names = [missing, other]
            rng.shuffle(names)
            text = word("relation", rng, names[0], relation, names[1])
    return Question("absent", text, f"there is no {missing}")


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
        for kind, text, answer, seen in questions(scene, rng, clear=False):
            asked.append(Question(kind, in_image(text, number, rng), answer, tuple((number, one) for _, one in seen)))
    names = [name for scene in (first, second) for thing in scene.things for name in set(_descriptions(thing))]
    for name in [*dict.fromkeys(names), _missing_in_both(first, second, rng)]:
        found = [(number, one) for number, scene in enumerate((first, second)) for one in named(name, scene)]
        images = {number for number, _ in found}
        text = word("which image", rng, rng.choice((with_article(name), f"the {name}")))
        if len(images) == 1:
            asked.append(Question("where", text, ("the first", "the second")[images.pop()], tuple(found)))
        elif not images:
            asked.append(Question("absent", text, f"there is no {name}"))
        elif rng.random() < 0.5:
            asked.append(Question("where", text, "both", tuple(found)))
    return asked


def _missing_in_both(first: Scene, second: Scene, rng: random.Random) -> str:
    return _missing(Scene((*first.things, *second.things), first.size, first.ground, first.colours, 0), rng)


def in_image(text: str, number: int, rng: random.Random) -> str:
    """Ask a question about one of two images."""
    mark = text[-1] if text[-1] in "?." else ""
    ordinal, cardinal, image = ("first", "second")[number], number + 1, rng.choice(("image", "picture"))
    name = rng.choice((f"the {ordinal} {image}", f"the {ordinal} {image}", f"{image} {cardinal}"))
    if re.search("(the|this) (image|picture)", text):
        return re.sub("(the|this) (image|picture)", name, text)
    text = text.removesuffix(mark) if mark else text
    if rng.random() < 0.25:
        return f"In {name}, {text[0].lower()}{text[1:]}{mark}"
    return f"{text} in {name}{mark}"


def refusals(rng: random.Random, ask: Callable[[], Scene]) -> list[Question]:
    """Questions about a foreign image, which might be asked about a scene; all have one answer."""
    asked = questions(ask(), rng, clear=False)
    return [Question("refuse", question.text, REFUSAL) for question in asked]


def find_kind(asked: Sequence[Question], kind: str) -> list[Question]:
    """The questions of a kind."""
    return [question for question in asked if question.kind == kind]
