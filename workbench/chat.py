"""Chats as text: a chat template applied, and which characters of the result are the messages' own."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from workbench.corpus import Row, texts
from workbench.errors import InputError

_MARKS = 0x100000  # private use plane 16: message i is marked by two characters of its own
_MARK = re.compile("[\U00100000-\U0010ffff]")
_MOST_MESSAGES = 30_000


@dataclass(frozen=True, slots=True)
class _Place:
    """Where marks go: outside of a content's white space or inside it, and at which of its ends."""

    outside: bool
    start: bool
    end: bool


# Templates may strip white space, or look at how a content begins or ends: one of these leaves each undisturbed.
_PLACES = (_Place(True, True, True), _Place(False, True, True), _Place(False, False, True), _Place(False, True, False))


@dataclass(frozen=True, slots=True)
class Rendered:
    """A chat as its template writes it. spans: (start, end) of the characters that are content, in order."""

    text: str
    spans: list[tuple[int, int]]


def render(row: Row, tokenizer: Any, generation_prompt: bool = False) -> Rendered:
    """Apply the tokenizer's chat template and find the messages' contents in the result.

    Contents are found by marking: each is put between two private-use characters, the template is applied to these
    messages too, and without the marks the result has to be the same text. White space that the template strips is
    outside the marks. A message that the template leaves out has no span; of one that it shortens, what is left counts.

    Raises InputError if the tokenizer has no chat template or is not a fast one (no character offsets), if the template
    refuses the chat, and if it treats marked content differently, so that content and template can't be told apart.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{row.where}: the row is a chat, but the tokenizer has no chat template; expected plain text. "
            "Use the tokenizer of a chat model, or map the column with the text: --column text=NAME."
        )
    if not tokenizer.is_fast:
        raise InputError(f"{row.where}: the row is a chat, and chats need a fast tokenizer (one with tokenizer.json).")
    messages = row.messages or []
    text = _apply(row, messages, tokenizer, generation_prompt)
    if _MARK.search(text) or len(messages) > _MOST_MESSAGES:
        raise InputError(
            f"{row.where}: the chat has characters of the private use plane 16, or over {_MOST_MESSAGES:,} messages. "
            "Correct or remove the row, or leave such rows out with --bad-rows skip."
        )
    for place in _PLACES:
        marked = _marked(row, messages, place, tokenizer, generation_prompt)
        found = marked and _read_marks(marked, messages, place)
        if found and found.text == text:
            return found
    raise InputError(
        f"{row.where}: the chat template changes the messages in a way that hides where they stand in the result. "
        "Put the chat into plain text, in a column `text`, or leave such rows out with --bad-rows skip."
    )


def _marked(row: Row, messages: list[dict[str, Any]], place: _Place, tokenizer: Any, prompt: bool) -> str | None:
    def mark(number: int, content: str) -> str:
        kept = content if place.outside else content.strip()
        left = content.index(kept)
        first = chr(_MARKS + 2 * number) if place.start else ""
        last = chr(_MARKS + 2 * number + 1) if place.end else ""
        return content[:left] + first + kept + last + content[left + len(kept) :] if kept else content

    try:
        return _apply(row, [_with_texts(each, n, mark) for n, each in enumerate(messages)], tokenizer, prompt)
    except InputError:  # it takes the messages, but not with marks there
        return None


def _apply(row: Row, messages: list[dict[str, Any]], tokenizer: Any, generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    except Exception as error:  # templates raise what they like, in Jinja's classes and Python's
        raise InputError(
            f"{row.where}: the tokenizer's chat template refuses the chat: {error}. "
            "Correct or remove the row, or leave such rows out with --bad-rows skip."
        ) from None


def _with_texts(message: dict[str, Any], number: int, change: Callable[[int, str], str]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        return message | {"content": change(number, content)}
    if isinstance(content, list):
        parts = [
            part | {"text": change(number, part["text"])}
            if isinstance(part, dict) and isinstance(part.get("text"), str)
            else part
            for part in content
        ]
        return message | {"content": parts}
    return message


def _read_marks(marked: str, messages: list[dict[str, Any]], place: _Place) -> Rendered | None:
    """The text without its marks, and the spans they enclose; None where they don't tell enough."""
    text = _MARK.sub("", marked)
    spans: list[tuple[int, int]] = []
    opened: tuple[int, int] | None = None  # where a content begins, and its message
    seen = set()
    for before, match in enumerate(_MARK.finditer(marked)):
        at = match.start() - before
        number, ends = divmod(ord(match[0]) - _MARKS, 2)
        seen.add(number)
        if ends and opened and opened[1] == number:
            spans.append((opened[0], at))
            opened = None
        elif ends:
            spans.append((at - _common(text[:at][::-1], messages[number], place, backwards=True), at))
        else:
            if opened:
                spans.append((opened[0], opened[0] + _common(text[opened[0] :], messages[opened[1]], place)))
            opened = at, number
    if opened:
        spans.append((opened[0], opened[0] + _common(text[opened[0] :], messages[opened[1]], place)))
    # A single mark may be gone although the rest of its message is there: then nothing is known about it.
    expected = {number for number, message in enumerate(messages) if any(map(str.strip, texts(message)))}
    return Rendered(text, spans) if place.start and place.end or seen == expected else None


def _common(text: str, message: dict[str, Any], place: _Place, backwards: bool = False) -> int:
    """How many characters of a content, of which the template has cut the other end, the text begins with."""
    contents = [content if place.outside else content.strip() for content in texts(message)]
    return max(len(commonprefix([text, content[::-1] if backwards else content])) for content in contents)
