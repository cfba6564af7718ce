"""Corpora: bundled names, files, folders and Hugging Face data sets, read as a stream of rows.

    for row in read("udhr"): ...
    read("reviews.csv.gz", columns={"text": "body", "lang": "language"})
    read("owner/dataset:config", split="test")

A row is one text (or one chat) with its metadata. Rows are read one at a time: memory stays flat however large the
corpus is. Text is passed on exactly as it is stored.
"""

import difflib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from workbench import bundled, files, hub
from workbench.errors import InputError

BadRows = Literal["refuse", "skip"]

BUNDLED = ("udhr", "libreoffice-help", "home-assistant", "typescript-messages", "domains")
"""The corpora under `data/corpora`, in the order in which `all` reads them."""

SAMPLES = ("demo", "all")
"""`demo`: a balanced sample of all bundled corpora (see `_demo`). `all`: every row of them."""

FIELDS = ("text", "messages", "lang", "domain", "source", "segment_id")
"""What a column can be mapped to. Every other column is kept as metadata."""

DEMO_BYTES = 1_000
"""Longest text of an aligned segment of the demo sample, in bytes of UTF-8: no tokenizer of bytes makes more tokens."""

DEMO_SEGMENTS = {"libreoffice-help": 84, "home-assistant": 100, "typescript-messages": 100}
"""Aligned segments of the demo sample, each in all its languages; of `udhr` all that are short enough."""

DEMO_CHARACTERS = 22_000
"""Characters of the demo sample from each domain of `domains`: 8 to 10 thousand tokens, where there are as many."""

MESSAGES_KEPT = 100


@dataclass(frozen=True, slots=True)
class Row:
    """One text or one chat (`messages`: a list of {"role", "content"}); exactly one of the two is not None.

    Rows with one `segment_id` are translations of each other. `metadata` holds every further column (JSON types).
    `where` is "file:line", for messages.
    """

    text: str | None
    messages: list[dict[str, Any]] | None
    lang: str | None
    domain: str | None
    source: str | None
    segment_id: str | None
    metadata: dict[str, Any]
    where: str


@dataclass(slots=True)
class Skipped:
    """The bad rows that the latest pass over a corpus left out: how many, and the first 100 messages."""

    count: int = 0
    messages: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Corpus:
    """Rows that can be read any number of times, always in the same order.

    `open()` starts a pass; it yields an InputError in place of each bad row. Iterating over the corpus itself raises
    the first of them or, with `bad_rows="skip"`, leaves them out and keeps count in `skipped`.
    """

    name: str
    n_rows: int | None
    """None where only reading the corpus would tell."""
    open: Callable[[], Iterator[Row | InputError]]
    bad_rows: BadRows = "refuse"
    skipped: Skipped = field(default_factory=Skipped, compare=False)

    def __iter__(self) -> Iterator[Row]:
        self.skipped.count = 0
        self.skipped.messages.clear()
        empty = True
        for row in self.open():
            if isinstance(row, InputError):
                self.reject(row)
            else:
                empty = False
                yield row
        if empty:
            raise InputError(
                f"{self.name}: all {self.skipped.count} rows are bad; expected at least one good row. "
                f"The first: {self.skipped.messages[0]}"
            )

    def reject(self, error: InputError) -> None:
        """Raise the error of a bad row, or note it and go on, as `bad_rows` says."""
        if self.bad_rows == "refuse":
            raise error
        self.skipped.count += 1
        if self.skipped.count <= MESSAGES_KEPT:
            self.skipped.messages.append(str(error))


def read(
    source: str | Path,
    *,
    columns: dict[str, str] | None = None,
    split: str = "train",
    bad_rows: BadRows = "refuse",
) -> Corpus:
    """Open a corpus.

    source    a bundled name (`udhr`, …, `demo`, `all`); a file .jsonl .json .csv .tsv .parquet .txt (a line, a text),
              also .gz .xz .zst; a folder of such files (of .txt files: a file, a text); a Hugging Face data set
              `owner/name` or `owner/name:config` (`hf:` in front of ids without a slash)
    columns   which column is the text, the language, …: {"text": "content", "lang": "language"}; keys are in FIELDS
    split     the split of a Hugging Face data set
    bad_rows  refuse the corpus at its first bad row, or skip and count them

    `source` of a row without one is the name of its corpus. Raises InputError for an unknown name, a missing file, an
    unknown extension or field; while reading, for bad rows, damaged files and empty corpora.
    """
    if bad_rows not in ("refuse", "skip"):
        raise InputError(f"bad_rows is {bad_rows!r}; expected 'refuse' or 'skip'.")
    for name in columns or {}:
        if name not in FIELDS:
            raise InputError(
                f"{name!r} is not a field of a corpus; expected one of {', '.join(FIELDS)}. "
                "Write field=column, as in text=content; other columns are kept as metadata under their own names."
            )
    return _read(source, columns or {}, split, bad_rows)


def from_rows(
    rows: Sequence[str | dict[str, Any] | Row], name: str = "rows", *, bad_rows: BadRows = "refuse"
) -> Corpus:
    """A corpus from texts or dictionaries in memory: from_rows(["Hello", {"text": "Hallo", "lang": "de"}]).

    Or from rows, such as a part of another corpus: from_rows([row for row in read("udhr") if row.lang == "de"]).
    """

    def record(row: str | dict[str, Any] | Row) -> Any:
        if isinstance(row, Row):
            known = {field: getattr(row, field) for field in FIELDS if getattr(row, field) is not None}
            return row.metadata | known
        return {"text": row} if isinstance(row, str) else row

    def records() -> Iterator[files.Record]:
        for number, row in enumerate(rows, 1):
            yield f"{name}:{number}", record(row)

    return Corpus(name, len(rows), lambda: _rows(records(), {}, name), bad_rows)


def _read(source: str | Path, columns: dict[str, str], split: str, bad_rows: BadRows) -> Corpus:
    if source == "all":
        parts = [_read(name, columns, split, bad_rows) for name in BUNDLED]
        return Corpus("all", None, lambda: itertools.chain.from_iterable(part.open() for part in parts), bad_rows)
    if source == "demo":
        return Corpus("demo", None, lambda: _demo(columns), bad_rows)
    if source in BUNDLED:
        (path,) = bundled.path(f"corpora/{source}").glob("*.jsonl")
        return Corpus(str(source), None, lambda: _rows(files.records(path), columns, str(source)), bad_rows)
    if isinstance(source, str) and source.startswith("hf:"):
        return _hub(source.removeprefix("hf:"), columns, split, bad_rows)
    path = Path(source)
    if path.is_dir():
        members = files.members(path)
        return Corpus(path.name, None, lambda: _rows(files.folder_records(members), columns, path.name), bad_rows)
    if path.exists():
        files.check_format(path)
        name = files.stem(path)
        return Corpus(name, files.count_rows(path), lambda: _rows(files.records(path), columns, name), bad_rows)
    like_a_file = files.is_data(path) or path.parent.name and path.parent.is_dir()
    if isinstance(source, str) and not like_a_file and re.fullmatch(r"[\w.-]+/[\w.:-]+", source):
        return _hub(source, columns, split, bad_rows)
    if like_a_file or len(path.parts) > 1:
        raise InputError(f"{source}: no such file or folder. Check the path; bundled corpora: {_names()}.")
    close = difflib.get_close_matches(str(source), BUNDLED + SAMPLES, n=2, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    raise InputError(
        f"{source!r} is neither a bundled corpus nor a file. {hint}Bundled: {_names()}. "
        "Anything else is a path, or a Hugging Face data set as owner/name or hf:name."
    )


def _names() -> str:
    return ", ".join(BUNDLED + SAMPLES)


def _hub(name: str, columns: dict[str, str], split: str, bad_rows: BadRows) -> Corpus:
    dataset, n_rows = hub.dataset(name, split)
    source = name.rstrip("/").rpartition("/")[2].partition(":")[0]
    return Corpus(source, n_rows, lambda: _rows(hub.records(dataset, name), columns, source), bad_rows)


def _demo(columns: dict[str, str]) -> Iterator[Row | InputError]:
    """A balanced sample: segments of the aligned corpora in all their languages, and texts of each domain.

    Which ones is decided by the hash of their id, so the sample never changes. The sources are interleaved: the
    beginning of the sample is about as balanced as the whole.
    """
    placed: list[tuple[float, str, list[Row]]] = []
    for name in BUNDLED:
        domains: dict[str, dict[str, list[Row]]] = {}
        for row in _read(name, columns, "train", "refuse"):
            domains.setdefault(row.domain or "", {}).setdefault(row.segment_id or row.where, []).append(row)
        for domain, segments in domains.items():
            order = sorted(segments, key=lambda segment: hashlib.sha256(segment.encode()).digest())
            candidates = [segments[segment] for segment in order]
            if name == "domains":
                chosen = list(_demo_passages(candidates))
            else:
                short = [rows for rows in candidates if max(map(_bytes, rows)) <= DEMO_BYTES]
                chosen = short[: DEMO_SEGMENTS.get(name)]
            placed += [((place + 0.5) / len(chosen), domain, rows) for place, rows in enumerate(chosen)]
    placed.sort(key=lambda item: item[:2])
    for _, _, rows in placed:
        yield from rows


def _demo_passages(passages: Iterable[list[Row]]) -> Iterator[list[Row]]:
    taken = 0
    for rows in passages:
        text = rows[0].text or ""
        if sum(map(str.isdigit, text)) > len(text) / 4:  # tables of numbers: a token a digit
            continue
        if taken >= DEMO_CHARACTERS:
            return
        taken += len(text)
        yield rows


def _bytes(row: Row) -> int:
    return len((row.text or "").encode())


def _rows(records: Iterable[files.Record], columns: dict[str, str], name: str) -> Iterator[Row | InputError]:
    empty = True
    for where, record in records:
        empty = False
        try:
            if isinstance(record, InputError):
                raise record
            yield _row(where, record, columns, name)
        except InputError as error:
            yield error
    if empty:
        raise InputError(f"{name}: the corpus is empty; expected at least one row.")


def _row(where: str, record: dict[str, Any], columns: dict[str, str], name: str) -> Row:
    if not isinstance(record, dict):
        raise InputError(f'{where}: the row is {_short(record)}; expected a JSON object such as {{"text": "…"}}.')
    for each, column in columns.items():
        if column not in record:
            raise InputError(
                f"{where}: no column {column!r} for the field {each!r}; found {_listed(record)}. "
                f"Map the field to one of these, as in --column {each}=NAME."
            )
    chat = _is_chat(record, columns, where)
    used = {field: columns.get(field, field) for field in FIELDS if field not in ("text", "messages")}
    content = "messages" if chat else "text"
    used[content] = columns.get(content, content)
    labels = {field: _label(where, used[field], record.get(used[field])) for field in used if field != content}
    value = record[used[content]]
    return Row(
        text=None if chat else _text(where, used[content], value),
        messages=_messages(where, used[content], value) if chat else None,
        lang=labels["lang"],
        domain=labels["domain"],
        source=labels["source"] or name,
        segment_id=labels["segment_id"],
        metadata={column: _plain(value) for column, value in record.items() if column not in used.values()},
        where=where,
    )


def _is_chat(record: dict[str, Any], columns: dict[str, str], where: str) -> bool:
    """Whether the row's content is its messages: what is mapped decides, then which column there is."""
    if ("text" in columns) != ("messages" in columns):
        return "messages" in columns
    text, messages = columns.get("text", "text"), columns.get("messages", "messages")
    if record.get(text) is None and record.get(messages) is not None:
        return True
    if text not in record:
        close = difflib.get_close_matches("text", record, n=1, cutoff=0.5)
        likely = next((c for c in (*close, "content", "sentence", "prompt", "body") if c in record), "NAME")
        raise InputError(
            f"{where}: no column 'text' (nor 'messages'); found {_listed(record)}. "
            f"Say which column is the text: --column text={likely}."
        )
    return False


def _text(where: str, column: str, value: object) -> str:
    if not isinstance(value, str):
        kind = "missing (null)" if value is None else f"{_short(value)}, of type {type(value).__name__}"
        raise InputError(f"{where}: {column!r} is {kind}; expected text. {_REMEDY}")
    if not value or value.isspace():
        kind = "empty" if not value else f"only white space ({_short(value)})"
        raise InputError(f"{where}: {column!r} is {kind}; expected some text. {_REMEDY}")
    files.check_unicode(where, value)
    return value


_REMEDY = "Correct or remove the row, or leave such rows out with --bad-rows skip."


def _messages(where: str, column: str, value: object) -> list[dict[str, Any]]:
    if isinstance(value, str):  # as CSV and some Parquet files have it
        try:
            value = json.loads(value)
        except ValueError as error:
            raise InputError(
                f"{where}: {column!r} is text but not JSON ({error}); expected messages. {_REMEDY}"
            ) from None
    expected = f'expected a list of {{"role": "user", "content": "…"}}. {_REMEDY}'
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: {column!r} is {_short(value)}; {expected}")
    for number, message in enumerate(value, 1):
        if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
            raise InputError(f"{where}: message {number} is {_short(message)}; {expected}")
        content = message.get("content")
        if not isinstance(content, str | list | None):
            raise InputError(f"{where}: the content of message {number} is {_short(content)}; {expected}")
    if not any(text.strip() for message in value for text in texts(message)):
        raise InputError(f"{where}: no message has any text; {expected}")
    files.check_unicode(where, json.dumps(value, ensure_ascii=False, default=str))
    return value


def texts(message: dict[str, Any]) -> list[str]:
    """The texts of a message: its content, or the text parts of it."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content or [] if isinstance(part, dict) and isinstance(part.get("text"), str)]


def _label(where: str, column: str, value: object) -> str | None:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str | int | float):
        return str(value)
    raise InputError(f"{where}: {column!r} is {_short(value)}; expected a word or a number. {_REMEDY}")


def _plain(value: Any) -> Any:
    """The value in JSON types: what has no JSON form becomes text (dates: ISO 8601), NaN becomes null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None if math.isnan(value) else str(value)
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "…"


def _listed(record: dict[str, Any]) -> str:
    return ", ".join(map(repr, record)) or "no columns"
