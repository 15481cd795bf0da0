"""Derives FlashSloth's chat template from a decoder's, and finds the token ids before an instruction.

A chat template is a program, so it is run, not parsed: it renders conversations of marker words, and the text between
the markers becomes a `ChatFormat`. Comparing both templates on other conversations detects anything else that the
decoder's template does.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import TemplateError

from ..processing_flashsloth import ChatFormat

IMAGE_TOKEN, QUERY_TOKEN = "<image>", "<learnable>"
END_TOKEN = "</s>"  # as the original adds to Phi-2, whose only special token also begins texts
SYSTEM, QUESTIONS, ANSWERS = "Wordsofsystem", ("Firstquestion", "Secondquestion"), ("Firstanswer", "Secondanswer")
SYSTEMS = ("", "Be brief.", "Be brief", "Be brief ", "Be brief\n", "42", "简短")
CONTENTS = (
    *("word", "s", "7", "é", "图", "🙂", "", " word", "  word", "\tword", "\nword", "\n\nword", "\n\n\n", "\r\nword"),
    *('"word"', "'s", "(", ")", "]", ">", "|", "/", ".", ",", ":", "-", "#", "_", "=", "<b>", "@word", "$1", "…", "!"),
)
"""Texts whose first characters may merge with the preceding text into one token, in all common ways."""
EMPTY_THOUGHTS = re.compile(r"<think>\s*</think>\s*")
ADVICE = "write a chat template with <image> and <learnable>, and pass it with --chat-template FILE"

Messages = list[dict[str, Any]]
Render = Callable[..., str]


class ChatFormatError(ValueError):
    """A chat template cannot be used."""


def renderer(tokenizer: Any, template: str | None = None) -> Render:
    """Build a function that renders a conversation, optionally with `add_generation_prompt`.

    Args:
        tokenizer: The tokenizer, whose special tokens a template may use.
        template: The template. Default: the tokenizer's own, without the empty thinking blocks that hybrid reasoning
            models put before answers, because FlashSloth answers directly.

    Returns:
        A function from messages to text.
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
    """Derive FlashSloth's chat template from the decoder's.

    Args:
        tokenizer: Tokenizer of the decoder, with a chat template.

    Returns:
        A Jinja template. Apart from images and query tokens, it renders the same text as the decoder's.

    Raises:
        ChatFormatError: If a `ChatFormat` cannot express the decoder's template.
    """
    try:
        render = renderer(tokenizer)
        is_dated = "strftime_now" in tokenizer.get_chat_template()
        chat_format = read_chat_format(render, tokenizer, is_dated=is_dated)
        template = chat_format.build_template()
        _compare(render, renderer(tokenizer, template), chat_format, is_dated=is_dated)
    except (ChatFormatError, TemplateError) as error:
        raise ChatFormatError(f"the decoder's chat template is not supported: {error}; {ADVICE}.") from error
    return template


def check_template(tokenizer: Any, template: str) -> None:
    """Check that FlashSloth can use a chat template.

    Args:
        tokenizer: The tokenizer.
        template: The template, for example one that a user wrote.

    Raises:
        ChatFormatError: If it does not compile, lacks images or query tokens, or does not mark answers.
    """
    parts = [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]
    try:
        text = renderer(tokenizer, template)([{"role": "user", "content": parts}])
    except TemplateError as error:
        raise ChatFormatError(f"the chat template cannot be rendered: {error}.") from error
    if not re.search(rf"{IMAGE_TOKEN}\s*{QUESTIONS[0]}{QUERY_TOKEN}", text) or text.count(IMAGE_TOKEN) != 1:
        raise ChatFormatError(
            f"the chat template must write an image as {IMAGE_TOKEN} before the user's text and {QUERY_TOKEN} directly "
            f"after it, but wrote {text!r}."
        )
    if not re.search(r"\{%-?\s*generation\b", template):
        raise ChatFormatError("the chat template must put answers inside {% generation %} … {% endgeneration %}.")


def find_end_token(tokenizer: Any, template: str) -> str:
    """Find the token that ends an answer.

    Args:
        tokenizer: The tokenizer.
        template: FlashSloth's chat template.

    Returns:
        The text of the token.

    Raises:
        ChatFormatError: If answers do not end with a special token.
    """
    answer_end = read_chat_format(renderer(tokenizer, template), tokenizer).answer_end
    return _special_tokens(tokenizer).findall(answer_end)[-1]


def find_instruction_starts(tokenizer: Any, template: str) -> list[list[int]]:
    r"""Find the sequences of token ids after which an instruction starts.

    The text of a user may merge with the characters before it into one token. So for every place where such a text may
    begin, and every way it may begin, this collects the ids before it that do not depend on the text: `USER:` and
    ` USER:`, or `<|im_start|>user\n` and, for texts whose leading line break merges with the `\n`, `<|im_start|>user`.
    The model uses the longest sequence that matches.

    Args:
        tokenizer: A tokenizer with `<image>` and `<learnable>`.
        template: FlashSloth's chat template.

    Returns:
        Sequences of token ids, sorted.

    Raises:
        ChatFormatError: If a text can merge with everything before it.
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
            f"the text before a user's message, {chat_format.user_prefix!r}, merges with some messages into one token; "
            "use a chat template with a special token there."
        )
    special_ids = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    for pattern in list(patterns):
        # `CONTENTS` cannot be complete. Nothing merges with a special token, so every prefix up to there is added, too.
        last = max((i for i, token_id in enumerate(pattern) if token_id in special_ids), default=len(pattern))
        patterns |= {pattern[:length] for length in range(last + 1, len(pattern))}
    return sorted(map(list, patterns))


def read_chat_format(render: Render, tokenizer: Any, *, is_dated: bool = False) -> ChatFormat:
    """Read a chat format from rendered conversations.

    Args:
        render: Renders conversations.
        tokenizer: The tokenizer.
        is_dated: Whether the template writes today's date, in which case its default system prompt is not kept.

    Raises:
        ChatFormatError: If the rendered conversations are inconsistent.
    """
    special = _special_tokens(tokenizer)
    (question, second_question), (answer, second_answer) = QUESTIONS, ANSWERS
    head, middle, between, _, tail = _split(render, [question, answer, second_question, second_answer])
    after_question = _split(render, [question])[1]
    prompted = _split(render, [question], add_generation_prompt=True)[1]

    user_suffix = _common_start(after_question, middle, special)
    generation_prompt = _without_start(prompted, user_suffix, "the generation prompt")
    answer_prefix = _without_start(middle.removeprefix(user_suffix), generation_prompt, "the text before an answer")
    end = _common_start(tail, between, special)
    ends = list(special.finditer(end))
    if not ends:
        raise ChatFormatError(f"no special token ends an answer, only {end!r}")
    answer_end = end[: ends[0].end()]
    user_prefix = _common_end(head, between.removeprefix(end), special)
    if not user_prefix:
        raise ChatFormatError(f"the first user turn begins with {head!r}, but a later one with {between!r}")
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
        closing=after_question.removeprefix(user_suffix),
    )
    chat_format = chat_format._replace(**_read_system(render, chat_format, is_dated))
    return chat_format._replace(trimmed_roles=_trimmed_roles(render, chat_format))


def _read_system(render: Render, chat_format: ChatFormat, is_dated: bool) -> dict[str, Any]:
    """The fields of a `ChatFormat` that describe system messages."""
    without = {"system_prefix": None, "system_suffix": "", "is_system_in_turn": False}
    try:
        head, middle, *_ = _split(render, [SYSTEM, *QUESTIONS[:1], *ANSWERS[:1], *QUESTIONS[1:]])
    except (ChatFormatError, TemplateError):
        return without
    prefix = chat_format.user_prefix
    if is_dated:  # formatted like the other turns, without the date and the text that the template adds
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
    """Render a conversation with these contents and split it at them: one more piece than there are contents."""
    has_system = contents[0] == SYSTEM
    roles = itertools.chain(["system"] * has_system, itertools.cycle(["user", "assistant"]))
    text = render([{"role": role, "content": c} for role, c in zip(roles, contents, strict=False)], **kwargs)
    pieces = []
    for content in contents:
        piece, found, text = text.partition(content)
        if not found:
            raise ChatFormatError("it drops or reorders messages")
        pieces.append(piece)
    return [*pieces, text]


def _compare(render: Render, derived: Render, chat_format: ChatFormat, *, is_dated: bool) -> None:
    """Raise if the derived template renders a text conversation differently from the original one."""
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
                    f"after {expected[:shared][-30:]!r} it writes {expected[shared:][:30]!r}, where "
                    f"{found[shared:][:30]!r} was expected from its other turns"
                )


def _heads(render: Render, chat_format: ChatFormat) -> list[str]:
    """Every kind of text that may precede a user's message, from rendered conversations."""
    question, answer = QUESTIONS[0], {"role": "assistant", "content": ANSWERS[0]}
    user = {"role": "user", "content": question}
    histories: list[Messages] = [[], [{"role": "user", "content": QUESTIONS[1]}, answer]]
    if chat_format.system_prefix is not None:
        histories += [[{"role": "system", "content": text}] for text in SYSTEMS]
    heads = [render([*history, user]).partition(question)[0] for history in histories]
    # If the system message is inside the first turn, the text of that turn begins with it.
    return [head for head in heads if head.endswith(chat_format.user_prefix)]


def _user_starts(heads: list[str], chat_format: ChatFormat, special: re.Pattern) -> list[tuple[str, int]]:
    """Every head, with the index of the character at which a pattern may begin."""
    starts = [(head, len(head) - len(chat_format.user_prefix)) for head in heads]
    if special.search(chat_format.user_prefix):
        return starts
    # Users may write `[INST]` themselves, but not the end token of the answer before it.
    ends = [_start_of_last_special(head[:start], special) for head, start in starts]
    return starts if None in ends else list(zip(heads, ends, strict=True))


def _ids_before(tokenizer: Any, head: str, start: int, content: str) -> tuple[int, ...]:
    """The token ids from the character `start` of a head on, without those that depend on the content after it."""
    encoded = tokenizer(head, add_special_tokens=False, return_offsets_mapping=True)
    whole = tokenizer(f"{head}{content}{QUERY_TOKEN}", add_special_tokens=False)["input_ids"]
    shared = _shared_length(encoded["input_ids"], whole)
    spans = encoded["offset_mapping"]
    return tuple(encoded["input_ids"][i] for i in range(shared) if spans[i][1] > start)


def _start_of_last_special(text: str, special: re.Pattern) -> int | None:
    """Start of the special token at the end of a text, ignoring white space after it."""
    matches = list(special.finditer(text))
    return matches[-1].start() if matches and not text[matches[-1].end() :].strip() else None


def _special_tokens(tokenizer: Any) -> re.Pattern:
    """Pattern that matches special tokens, which the text of a message cannot contain."""
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)")


def _symbols(text: str, special: re.Pattern) -> list[str]:
    """Split a text into special tokens and characters."""
    return re.findall(f"{special.pattern}|.", text, flags=re.DOTALL)


def _common_start(first: str, second: str, special: re.Pattern) -> str:
    symbols = _symbols(first, special)
    return "".join(symbols[: _shared_length(symbols, _symbols(second, special))])


def _common_end(first: str, second: str, special: re.Pattern) -> str:
    symbols = _symbols(first, special)[::-1]
    return "".join(symbols[: _shared_length(symbols, _symbols(second, special)[::-1])][::-1])


def _shared_length(first: Sequence, second: Sequence) -> int:
    """Length of the common start of two sequences."""
    differences = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differences, min(len(first), len(second)))


def _without_start(text: str, start: str, name: str) -> str:
    if not text.startswith(start):
        raise ChatFormatError(f"{name} should begin with {start!r}, but is {text!r}")
    return text.removeprefix(start)
