"""Rows into token sequences, and sequences into batches of similar length.

    found = sequences(read("udhr"), tokenizer, max_length=512)
    plan = survey(sequences(...))                      # how much there is, before a model runs
    for batch in batches(found, batch_tokens=4096): ...

Every token has a phase: 0 (template) for what the tokenizer or a chat template adds, 1 (prompt) for the text itself;
the codes are places in `workbench.store.PHASES`. Both passes tokenise anew: memory stays flat.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from workbench.chat import Rendered, render
from workbench.corpus import Corpus, Row
from workbench.errors import InputError, RunError

LongTexts = Literal["refuse", "split", "cut"]

TEMPLATE, PROMPT = 0, 1

CHUNK_ROWS = 256
CHUNK_CHARACTERS = 1_000_000
WINDOW = 2048
"""Sequences that batches are planned from."""
WINDOW_TOKENS = 2_000_000
"""Most tokens a batching window holds, so that very long sequences don't fill the memory."""


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    """One text, or one piece of a long one, as tokens.

    seq        0-based place among all sequences
    token_ids  int32 (n,), n >= 1
    phase      uint8 (n,), TEMPLATE or PROMPT
    sha256     hex digest of the row's text in UTF-8 (a chat's: as its template writes it)
    metadata   the row's; of a piece also split_row (0-based place of the row), split_part (0-based), split_parts
    """

    seq: int
    token_ids: np.ndarray
    phase: np.ndarray
    lang: str | None
    domain: str | None
    source: str | None
    segment_id: str | None
    metadata: dict[str, Any]
    sha256: str


@dataclass(frozen=True, slots=True)
class Survey:
    """What a pass over sequences found. Equal fingerprints: the same texts as the same tokens, in the same order."""

    n_sequences: int
    n_tokens: int
    longest: int
    """Tokens of the longest sequence."""
    fingerprint: str
    """SHA-256 hex digest over the texts' digests, the token ids and the phases."""
    marks: tuple[bytes, ...] = ()
    """The digest after each window of sequences, for `unchanged`."""


def sequences(
    corpora: Corpus | Iterable[Corpus],
    tokenizer: Any,
    *,
    max_length: int,
    long_texts: LongTexts = "refuse",
    generation_prompt: bool = False,
) -> Iterator[Sequence]:
    """Tokenise every row, in order, as a stream.

    tokenizer          a transformers tokenizer; chats need a fast one with a chat template
    max_length         most tokens of a sequence, special tokens included
    long_texts         what happens to a longer text: "refuse" (InputError), "split" into consecutive pieces, each with
                       the special tokens a text has, or "cut" after the first max_length tokens
    generation_prompt  end chats with the header of an answer, so that the model can write it

    Raises InputError for a text that is too long, a chat that the tokenizer can't take, and a text without any token;
    a corpus read with `bad_rows="skip"` leaves the last two out.
    """
    if tokenizer is None:
        raise InputError("The model has no tokenizer, so texts can't become tokens. Give one, as in --tokenizer NAME.")
    if long_texts not in ("refuse", "split", "cut"):
        raise InputError(f"long_texts is {long_texts!r}; expected 'refuse', 'split' or 'cut'.")
    if max_length < 1:
        raise InputError(f"max_length is {max_length}; expected at least 1 token.")
    seq = itertools.count()
    rows = itertools.count()
    for corpus in [corpora] if isinstance(corpora, Corpus) else corpora:
        for chunk in _chunks(corpus):
            for row, encoded in zip(chunk, _encode(chunk, tokenizer, generation_prompt), strict=True):
                if isinstance(encoded, InputError):
                    corpus.reject(encoded)
                    continue
                text, token_ids, phase = encoded
                place = next(rows)
                pieces = _fitted(row, token_ids, phase, max_length, long_texts)
                digest = hashlib.sha256(text.encode()).hexdigest()
                for part, (ids, phases) in enumerate(pieces):
                    metadata = row.metadata
                    if long_texts == "split" and len(pieces) > 1:
                        metadata = metadata | {"split_row": place, "split_part": part, "split_parts": len(pieces)}
                    yield Sequence(
                        seq=next(seq),
                        token_ids=ids,
                        phase=phases,
                        lang=row.lang,
                        domain=row.domain,
                        source=row.source,
                        segment_id=row.segment_id,
                        metadata=metadata,
                        sha256=digest,
                    )
    if next(seq) == 0:
        raise InputError(
            "No row of the corpus can be tokenised; expected at least one. Read it without --bad-rows skip."
        )


def survey(found: Iterable[Sequence]) -> Survey:
    """Go through all sequences once: their number, their tokens, and a fingerprint. Raises what reading them raises."""
    n_sequences = n_tokens = longest = 0
    digest, marks = hashlib.sha256(), []
    for members in _windows(found, WINDOW):
        for sequence in members:
            n_sequences += 1
            n_tokens += len(sequence.token_ids)
            longest = max(longest, len(sequence.token_ids))
            _add(digest, sequence)
        marks.append(digest.digest())
    return Survey(n_sequences, n_tokens, longest, digest.hexdigest(), tuple(marks))


def unchanged(found: Iterable[Sequence], plan: Survey, name: str) -> Iterator[Sequence]:
    """The sequences of a second pass over the corpus `name`. RunError if they aren't those that `plan` is of, before
    the window (see `batches`) with the first that isn't."""
    digest, marks, n = hashlib.sha256(), iter(plan.marks), 0
    for members in _windows(found, WINDOW):
        for sequence in members:
            _add(digest, sequence)
        if digest.digest() != next(marks, None):
            raise _changed(name, f"some of the {len(members):,} texts from number {n:,} on")
        n += len(members)
        yield from members
    if next(marks, None) is not None:
        raise _changed(name, f"those after {n:,} texts")


def _add(digest: Any, sequence: Sequence) -> None:
    digest.update(f"{sequence.sha256} {len(sequence.token_ids)} ".encode())
    digest.update(sequence.token_ids.astype("<i4", copy=False).tobytes())
    digest.update(sequence.phase.tobytes())


def _changed(name: str, which: str) -> RunError:
    return RunError(
        f"the corpus {name} was changed while it was read: {which} are not as they were when the run began. What was "
        "written is of the texts as they were: put them back and use --resume, or trace the new ones as a new run."
    )


def batches(found: Iterable[Sequence], batch_tokens: int, window: int = WINDOW) -> Iterator[list[Sequence]]:
    """Group sequences of similar length, so that little is padded; see `plan`.

    Each window of consecutive sequences (at most `window` of them, and about 2 million tokens) is grouped by itself.
    Which sequences share a batch depends on their lengths alone: a second pass gives the same batches.
    """
    if batch_tokens < 1 or window < 1:
        raise InputError(f"batch_tokens is {batch_tokens} and window {window}; expected both to be at least 1.")
    for members in _windows(found, window):
        for batch in plan([len(member.token_ids) for member in members], batch_tokens):
            yield [members[place] for place in batch]


def plan(lengths: Several[int], batch_tokens: int) -> list[list[int]]:
    """Group places of `lengths` so that each group's padded size, members × longest, is at most `batch_tokens`.

    A length above that is a group of its own. Groups go from short to long.

    >>> plan([5, 2, 9, 2, 4], batch_tokens=10)
    [[1, 3], [4, 0], [2]]
    """
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and (len(groups[-1]) + 1) * lengths[place] <= batch_tokens:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def _windows(found: Iterable[Sequence], window: int) -> Iterator[list[Sequence]]:
    members: list[Sequence] = []
    tokens = 0
    for sequence in found:
        members.append(sequence)
        tokens += len(sequence.token_ids)
        if len(members) == window or tokens >= WINDOW_TOKENS:
            yield members
            members, tokens = [], 0
    if members:
        yield members


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in lists that a fast tokenizer can work on in parallel, small enough for memory to stay flat."""
    chunk: list[Row] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += len(row.text) if row.text is not None else len(str(row.messages))
        if len(chunk) == CHUNK_ROWS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


Encoded = tuple[str, np.ndarray, np.ndarray]


def _encode(rows: list[Row], tokenizer: Any, generation_prompt: bool) -> list[Encoded | InputError]:
    """(text, token ids, phases) of each row, or why it has none."""
    plain = [row.text for row in rows if row.text is not None]
    texts = iter(_encode_texts(plain, tokenizer)) if plain else iter(())
    chats = iter(_encode_chats([row for row in rows if row.messages is not None], tokenizer, generation_prompt))
    encoded = [next(texts if row.text is not None else chats) for row in rows]
    return [_with_prompt(row, each) for row, each in zip(rows, encoded, strict=True)]


def _with_prompt(row: Row, encoded: Encoded | InputError) -> Encoded | InputError:
    if isinstance(encoded, InputError) or (encoded[2] == PROMPT).any():
        return encoded
    return InputError(
        f"{row.where}: the tokenizer makes no token of the text {encoded[0][:40]!r}; expected at least one. "
        "Correct or remove the row, or leave such rows out with --bad-rows skip."
    )


def _encode_texts(texts: list[str], tokenizer: Any) -> list[Encoded]:
    found = tokenizer(
        texts,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        truncation=False,
        padding=False,
        verbose=False,  # a length above the tokenizer's own limit is dealt with here
    )
    return [
        (text, np.array(ids, np.int32), np.where(np.array(special, bool), np.uint8(TEMPLATE), np.uint8(PROMPT)))
        for text, ids, special in zip(texts, found["input_ids"], found["special_tokens_mask"], strict=True)
    ]


def _encode_chats(rows: list[Row], tokenizer: Any, generation_prompt: bool) -> list[Encoded | InputError]:
    if not rows:
        return []
    rendered: list[Rendered | InputError] = []
    for row in rows:
        try:
            rendered.append(render(row, tokenizer, generation_prompt))
        except InputError as error:
            rendered.append(error)
    texts = [each.text for each in rendered if not isinstance(each, InputError)]
    if not texts:
        return [each for each in rendered if isinstance(each, InputError)]
    # The template has written the special tokens already.
    found = tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        truncation=False,
        padding=False,
        verbose=False,
    )
    each_found = iter(zip(found["input_ids"], found["offset_mapping"], strict=True))
    encoded: list[Encoded | InputError] = []
    for each in rendered:
        if isinstance(each, InputError):
            encoded.append(each)
        else:
            ids, offsets = next(each_found)
            encoded.append((each.text, np.array(ids, np.int32), _phases(each, offsets)))
    return encoded


def _phases(rendered: Rendered, offsets: list[tuple[int, int]]) -> np.ndarray:
    """PROMPT for each token that has a character of a message's content, uint8 (n,)."""
    content = np.zeros(len(rendered.text) + 1, np.int64)  # content[i]: characters of content before character i
    for start, end in rendered.spans:
        content[start + 1 : end + 1] = 1
    content = content.cumsum()
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    return np.where(content[ends] > content[starts], np.uint8(PROMPT), np.uint8(TEMPLATE))


def _fitted(
    row: Row, token_ids: np.ndarray, phase: np.ndarray, max_length: int, long_texts: LongTexts
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The tokens as sequences of at most max_length."""
    n = len(token_ids)
    if n <= max_length:
        return [(token_ids, phase)]
    if long_texts == "refuse":
        raise InputError(
            f"{row.where}: the text has {n:,} tokens; expected at most {max_length:,} (the longest sequence). "
            "Use --long split to trace it in consecutive pieces, or --long cut to trace only its beginning."
        )
    # Every piece of a text gets the special tokens around it. Those of a chat stand where its template put them.
    prompt = np.flatnonzero(phase == PROMPT)
    before, after = (0, 0) if row.messages is not None else (int(prompt[0]), n - 1 - int(prompt[-1]))
    room = max_length - before - after
    if room < 1:
        raise InputError(
            f"{row.where}: max_length is {max_length}, but the tokenizer adds {before + after} special tokens to each "
            f"text; expected at least {before + after + 1}."
        )
    starts = range(before, n - after, room)
    pieces = []
    for start in starts if long_texts == "split" else starts[:1]:
        chosen = np.r_[0:before, start : min(start + room, n - after), n - after : n]
        pieces.append((token_ids[chosen], phase[chosen]))
    return pieces


def token_texts(tokenizer, token_ids: list[int]) -> dict[int, str]:
    """The text of each token id, special tokens included.

    A byte of a longer character decodes to U+FFFD; its vocabulary entry (`Ã`, `<0xE2>`) tells more, so that is kept.
    """
    decoded = [tokenizer.decode([token_id], clean_up_tokenization_spaces=False) for token_id in token_ids]
    entries = tokenizer.convert_ids_to_tokens(token_ids)
    return {
        token_id: (entry or "") if "\ufffd" in text else text
        for token_id, text, entry in zip(token_ids, decoded, entries, strict=True)
    }
