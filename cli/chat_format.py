"""A decoder's chat format, read off its chat template, and the ids behind which an instruction starts.

A chat template is a program, so it is asked instead of parsed: it renders conversations of words that can be found
again, and the literal pieces between them are put into a FlashSloth template. What the decoder's template does beyond
that is found by comparing both on other conversations.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import TemplateError

from ..processing_flashsloth import ChatFormat

IMAGE_TOKEN, QUERY_TOKEN = "<image>", "<learnable>"
END_TOKEN = "</s>"  # what the original adds to Phi-2, whose only other special token also begins texts
SYSTEM, QUESTIONS, ANSWERS = "Wordsofsystem", ("Firstquestion", "Secondquestion"), ("Firstanswer", "Secondanswer")
SYSTEMS = ("", "Be brief.", "Be brief", "Be brief ", "Be brief\n", "42", "简短")
CONTENTS = (
    *("word", "s", "7", "é", "图", "🙂", "", " word", "  word", "\tword", "\nword", "\n\nword", "\n\n\n", "\r\nword"),
    *('"word"', "'s", "(", ")", "]", ">", "|", "/", ".", ",", ":", "-", "#", "_", "=", "<b>", "@word", "$1", "…", "!"),
)
"""Texts that begin in all the ways in which a text may merge with what stands before it."""
EMPTY_THOUGHTS = re.compile(r"<think>\s*</think>\s*")
WAY_OUT = "write a chat template with <image> and <learnable> yourself, and give it with --chat-template FILE"

Messages = list[dict[str, Any]]
Render = Callable[..., str]


class ChatFormatError(ValueError):
    """A chat template cannot be used."""


def renderer(tokenizer: Any, template: str | None = None) -> Render:
    """A function that renders a conversation, with `add_generation_prompt` if asked.

    Args:
        tokenizer: The tokenizer, whose special tokens a template may name.
        template: The template; default: the tokenizer's own, without the empty thoughts that hybrid models put before
            answers: FlashSloth answers at once.
    """

    def render(messages: Messages, add_generation_prompt: bool = False) -> str:
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=False,
        )
        return text if template else EMPTY_THOUGHTS.sub("", text)

    return render


def derive_template(tokenizer: Any) -> str:
    """Write FlashSloth's chat template in the decoder's own chat format.

    Args:
        tokenizer: The decoder's, which has a chat template.

    Returns:
        A Jinja template; without images and query tokens it renders what the decoder's own does.

    Raises:
        ChatFormatError: If the decoder's template does more than a `ChatFormat` can say.
    """
    try:
        render = renderer(tokenizer)
        is_dated = "strftime_now" in tokenizer.get_chat_template()
        chat_format = read_chat_format(render, tokenizer, is_dated=is_dated)
        template = chat_format.build_template()
        _compare(render, renderer(tokenizer, template), chat_format, is_dated=is_dated)
    except (ChatFormatError, TemplateError) as error:
        raise ChatFormatError(f"the decoder's chat template cannot be adopted: {error}; {WAY_OUT}.") from error
    return template


def check_template(tokenizer: Any, template: str) -> None:
    """Refuse a template that FlashSloth cannot use.

    Args:
        tokenizer: The tokenizer.
        template: A FlashSloth template, such as a user wrote.

    Raises:
        ChatFormatError: If it does not compile, forgets images or queries, or does not mark answers.
    """
    parts = [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]
    try:
        text = renderer(tokenizer, template)([{"role": "user", "content": parts}])
    except TemplateError as error:
        raise ChatFormatError(f"the chat template cannot be rendered: {error}.") from error
    if not re.search(rf"{IMAGE_TOKEN}\s*{QUESTIONS[0]}{QUERY_TOKEN}", text) or text.count(IMAGE_TOKEN) != 1:
        raise ChatFormatError(
            f"the chat template must write an image as {IMAGE_TOKEN} before its user's text and {QUERY_TOKEN} right "
            f"behind that text, but wrote {text!r}."
        )
    if not re.search(r"\{%-?\s*generation\b", template):
        raise ChatFormatError("the chat template must have its answers inside {% generation %} … {% endgeneration %}.")


def find_end_token(tokenizer: Any, template: str) -> str:
    """The token that ends an answer.

    Args:
        tokenizer: The tokenizer.
        template: FlashSloth's chat template.

    Raises:
        ChatFormatError: If no special token does.
    """
    answer_end = read_chat_format(renderer(tokenizer, template), tokenizer).answer_end
    return _special_tokens(tokenizer).findall(answer_end)[-1]


def find_instruction_starts(tokenizer: Any, template: str) -> list[list[int]]:
    r"""Id patterns behind which an instruction starts.

    For every place where a user's text may begin, and every way in which it may begin, the ids before it that the text
    leaves as they are: `USER:` and ` USER:`, or `<|im_start|>user\n` and, before a text that begins with a line break
    and merges with the one before it, `<|im_start|>user`. The longest pattern that is there is the one that counts.

    Args:
        tokenizer: The tokenizer, which knows `<image>` and `<learnable>`.
        template: FlashSloth's chat template.

    Raises:
        ChatFormatError: If a text can merge with all that stands before it.
    """
    render = renderer(tokenizer, template)
    chat_format = read_chat_format(render, tokenizer)
    special = _special_tokens(tokenizer)
    starts = _user_starts(_heads(render, chat_format), chat_format, special)
    parts = [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]
    with_image = render([{"role": "user", "content": parts}]).partition(QUESTIONS[0])[0]
    starts.append((with_image, with_image.index(IMAGE_TOKEN)))
    patterns = {
        _ids_before(tokenizer, head, start, content) for head, start in starts for content in (*CONTENTS, QUESTIONS[0])
    }
    if () in patterns:
        raise ChatFormatError(
            f"what stands before a user's text, {chat_format.user_prefix!r}, merges with some texts; use another chat "
            "template, with a special token before them."
        )
    special_ids = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    for pattern in list(patterns):
        # No list of texts is complete. Nothing merges with a special token, so the ids from there on are safe as well.
        last = max((i for i, token_id in enumerate(pattern) if token_id in special_ids), default=len(pattern))
        patterns |= {pattern[:length] for length in range(last + 1, len(pattern))}
    return sorted(map(list, patterns))


def read_chat_format(render: Render, tokenizer: Any, *, is_dated: bool = False) -> ChatFormat:
    """Read the pieces of a chat format off what a template renders.

    Args:
        render: Renders conversations.
        tokenizer: The tokenizer.
        is_dated: Whether the template writes today's date, so that its system prompt is not to be adopted.

    Raises:
        ChatFormatError: If the pieces do not fit together.
    """
    special = _special_tokens(tokenizer)
    (question, second_question), (answer, second_answer) = QUESTIONS, ANSWERS
    head, middle, between, _, tail = _split(render, [question, answer, second_question, second_answer])
    behind_question = _split(render, [question])[1]
    prompted = _split(render, [question], add_generation_prompt=True)[1]

    user_suffix = _common_start(behind_question, middle, special)
    generation_prompt = _without_start(prompted, user_suffix, "the generation prompt")
    answer_prefix = _without_start(middle.removeprefix(user_suffix), generation_prompt, "what precedes an answer")
    end = _common_start(tail, between, special)
    ends = list(special.finditer(end))
    if not ends:
        raise ChatFormatError(f"no special token ends an answer, only {end!r}")
    answer_end = end[: ends[0].end()]
    user_prefix = _common_end(head, between.removeprefix(end), special)
    if not user_prefix:
        raise ChatFormatError(f"a user's first turn begins with {head!r}, but a later one with {between!r}")
    bos = tokenizer.bos_token or ""
    start = bos if bos and head.startswith(bos) else ""
    chat_format = ChatFormat(
        start=start,
        lead="" if is_dated else head.removesuffix(user_prefix).removeprefix(start),
        user_prefix=user_prefix,
        user_suffix=user_suffix.removeprefix(QUERY_TOKEN),
        generation_prompt=generation_prompt,
        answer_prefix=answer_prefix,
        answer_end=answer_end,
        answer_suffix=end.removeprefix(answer_end),
        joint=between.removeprefix(end).removesuffix(user_prefix),
        closing=behind_question.removeprefix(user_suffix),
    )
    chat_format = chat_format._replace(**_read_system(render, chat_format, is_dated))
    return chat_format._replace(trimmed_roles=_trimmed_roles(render, chat_format))


def _read_system(render: Render, chat_format: ChatFormat, is_dated: bool) -> dict[str, Any]:
    """The fields that say where a system message goes."""
    without = {"system_prefix": None, "system_suffix": "", "is_system_in_turn": False}
    try:
        head, middle, *_ = _split(render, [SYSTEM, *QUESTIONS[:1], *ANSWERS[:1], *QUESTIONS[1:]])
    except (ChatFormatError, TemplateError):
        return without
    prefix = chat_format.user_prefix
    if is_dated:  # the block as the format's other turns are, without what the template adds
        header = prefix.replace("user", "system")
        is_known = header != prefix and header in head
        return {**without, "system_prefix": header, "system_suffix": chat_format.user_suffix} if is_known else without
    head = head.removeprefix(chat_format.start)
    if middle.endswith(prefix):
        return {**without, "system_prefix": head, "system_suffix": middle.removesuffix(prefix)}
    return {"system_prefix": head, "system_suffix": middle, "is_system_in_turn": True}


def _trimmed_roles(render: Render, chat_format: ChatFormat) -> frozenset[str]:
    contents = {"user": QUESTIONS[0], "assistant": ANSWERS[0]}
    if chat_format.system_prefix is not None:
        contents = {"system": SYSTEM, **contents}
    text = render([{"role": role, "content": f"\t{content}\t"} for role, content in contents.items()])
    return frozenset(role for role, content in contents.items() if f"\t{content}\t" not in text)


def _split(render: Render, contents: Sequence[str], **kwargs: bool) -> list[str]:
    """Render a conversation of these contents, and cut it at them: one piece more than contents."""
    has_system = contents[0] == SYSTEM
    roles = itertools.chain(["system"] * has_system, itertools.cycle(["user", "assistant"]))
    text = render([{"role": role, "content": c} for role, c in zip(roles, contents, strict=False)], **kwargs)
    pieces = []
    for content in contents:
        piece, found, text = text.partition(content)
        if not found:
            raise ChatFormatError("it drops a message, or changes the order of messages")
        pieces.append(piece)
    return [*pieces, text]


def _compare(render: Render, derived: Render, chat_format: ChatFormat, *, is_dated: bool) -> None:
    """Refuse a derived template that renders a plain conversation in another way than the original one."""
    turns = [
        {"role": "user", "content": "What is 2 + 2?\nExplain."},
        {"role": "assistant", "content": "4.\n\nCount: 1, 2, 3, 4."},
        {"role": "user", "content": "And 3 + 3?"},
        {"role": "assistant", "content": "6"},
    ]
    systems = [[]] if chat_format.system_prefix is None else [[], [{"role": "system", "content": "Be brief."}]]
    for system, count in itertools.product(systems, range(1, len(turns) + 1)):
        for add_generation_prompt in [False, True][: 1 + count % 2]:
            messages = system + turns[:count]
            expected = render(messages, add_generation_prompt=add_generation_prompt)
            found = derived(messages, add_generation_prompt=add_generation_prompt).replace(QUERY_TOKEN, "")
            if is_dated:
                expected, found = (text[text.index(chat_format.user_prefix) :] for text in (expected, found))
            if expected != found:
                shared = _shared_length(expected, found)
                raise ChatFormatError(
                    f"after {expected[:shared][-30:]!r} it writes {expected[shared:][:30]!r}, where plain turns would "
                    f"go on with {found[shared:][:30]!r}"
                )


def _heads(render: Render, chat_format: ChatFormat) -> list[str]:
    """All that may stand before a user's text, in conversations of every kind."""
    question, answer = QUESTIONS[0], {"role": "assistant", "content": ANSWERS[0]}
    user = {"role": "user", "content": question}
    befores: list[Messages] = [[], [{"role": "user", "content": QUESTIONS[1]}, answer]]
    if chat_format.system_prefix is not None:
        befores += [[{"role": "system", "content": text}] for text in SYSTEMS]
    heads = [render([*before, user]).partition(question)[0] for before in befores]
    # Where the system message stands inside the first turn, that turn's text begins with it.
    return [head for head in heads if head.endswith(chat_format.user_prefix)]


def _user_starts(heads: list[str], chat_format: ChatFormat, special: re.Pattern) -> list[tuple[str, int]]:
    """Every head, and where in it a pattern may begin (characters)."""
    starts = [(head, len(head) - len(chat_format.user_prefix)) for head in heads]
    if special.search(chat_format.user_prefix):
        return starts
    # A user may write `[INST]`, but not the end of an answer that stands before it.
    ends = [_start_of_last_special(head[:start], special) for head, start in starts]
    return starts if None in ends else list(zip(heads, ends, strict=True))


def _ids_before(tokenizer: Any, head: str, start: int, content: str) -> tuple[int, ...]:
    """The ids from the character `start` on that stand before a content and do not depend on it."""
    encoded = tokenizer(head, add_special_tokens=False, return_offsets_mapping=True)
    whole = tokenizer(f"{head}{content}{QUERY_TOKEN}", add_special_tokens=False)["input_ids"]
    shared = _shared_length(encoded["input_ids"], whole)
    spans = encoded["offset_mapping"]
    return tuple(encoded["input_ids"][i] for i in range(shared) if spans[i][1] > start)


def _start_of_last_special(text: str, special: re.Pattern) -> int | None:
    """Where the special token begins that ends a text, but for white space."""
    matches = list(special.finditer(text))
    return matches[-1].start() if matches and not text[matches[-1].end() :].strip() else None


def _special_tokens(tokenizer: Any) -> re.Pattern:
    """Matches the tokens that a message's text cannot contain."""
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)")


def _symbols(text: str, special: re.Pattern) -> list[str]:
    """A text as special tokens and characters."""
    return re.findall(f"{special.pattern}|.", text, flags=re.DOTALL)


def _common_start(first: str, second: str, special: re.Pattern) -> str:
    symbols = _symbols(first, special)
    return "".join(symbols[: _shared_length(symbols, _symbols(second, special))])


def _common_end(first: str, second: str, special: re.Pattern) -> str:
    symbols = _symbols(first, special)[::-1]
    return "".join(symbols[: _shared_length(symbols, _symbols(second, special)[::-1])][::-1])


def _shared_length(first: Sequence, second: Sequence) -> int:
    """How many items two sequences begin with in common."""
    differences = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differences, min(len(first), len(second)))


def _without_start(text: str, start: str, name: str) -> str:
    if not text.startswith(start):
        raise ChatFormatError(f"{name} should begin with {start!r}, but is {text!r}")
    return text.removeprefix(start)
