"""Which tokens of a trace a filter means: `lang=de,fr & phase=prompt`.

A filter is one condition or several joined by ` & `; a token must meet all of them.

- `column=value` or `column=value,value`: a column of the sequences (lang, domain, source, any metadata) has the value.
- `phase=prompt`: template, prompt or generated.
- `position=0`, `position=4-15`, `position=256+`: the place of the token in its sequence, counted from 0.
- `token=" the"`: the text of the token, exactly; the quotes keep the space (and commas; `"\\n"` is a line break).
- `token~pattern`, `column~pattern`: the regular expression is found in the token's text, or in the column.
- `text~<think>`: tokens that have a part in a match of the regular expression in the text of the whole sequence.
"""

import bisect
import json
import re

import numpy as np
import pandas as pd

from workbench import spelling
from workbench.analysis.counting import as_label
from workbench.errors import InputError
from workbench.schema import PHASES, UNKNOWN_TOKEN
from workbench.tracefile import Trace

OF_TOKENS = ("phase", "position", "token", "text")
"""What can be asked beside the columns of the sequences; these names win over columns of the same name."""
MOST_LISTED = 15
"""Values named in an error."""
CONDITION = re.compile(r"\s*([^=~]+?)\s*([=~])(.*)", re.DOTALL)
NEXT = re.compile(r"\s+&\s+(?=[^\s=~&]+\s*[=~])")
VALUE = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[^,]*?)\s*(?:,|$)', re.DOTALL)


def mask(trace: Trace, text: str) -> np.ndarray:
    """bool (n_tokens,): the tokens that the filter `text` means. InputError says what is wrong with it, and what the
    trace has, also when no token is meant."""
    chosen = np.ones(trace.n_tokens, bool)
    for condition in conditions(trace, text):
        chosen &= meets(trace, *condition)
    if not chosen.any():
        raise InputError(f"no token meets {text!r}; loosen one of its conditions.")
    return chosen


def sequence_mask(trace: Trace, text: str) -> np.ndarray:
    """bool (n_sequences,): the sequences that the filter `text` means; it may name columns only. Errors as `mask`."""
    chosen = np.ones(trace.n_sequences, bool)
    for name, sign, given in conditions(trace, text):
        if name in OF_TOKENS:
            raise InputError(f"{name}{sign}{given} means single tokens; expected conditions of columns, as in lang=de.")
        chosen &= by_column(trace, name, sign, given)
    if not chosen.any():
        raise InputError(f"no sequence meets {text!r}; loosen one of its conditions.")
    return chosen


def conditions(trace: Trace, text: str) -> list[tuple[str, str, str]]:
    """Name, sign and value of each condition."""
    check_unicode(text)
    found = [CONDITION.fullmatch(part) for part in NEXT.split(text.strip())]
    for part, condition in zip(NEXT.split(text.strip()), found, strict=True):
        if condition is None:
            raise InputError(
                f"{part!r} is not a condition; expected name=value or name~pattern, as in 'lang=de' or "
                f"'lang=de,fr & phase=prompt'. {names(trace.sequences())}"
            )
    return [(one[1], one[2], one[3]) for one in found if one is not None]


def check_unicode(text: str) -> None:
    """InputError for halves of characters, which pandas and DuckDB can't take."""
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise InputError(f"{text!r} is not Unicode text: type it anew.")


def meets(trace: Trace, name: str, sign: str, given: str) -> np.ndarray:
    """bool (n_tokens,): the tokens that meet one condition."""
    if name == "text":
        if sign == "=":
            raise InputError(f"text={given!r}: a text is searched, not compared; write text~{given}.")
        return in_text(trace, pattern(name, given))
    if name == "token":
        return by_token(trace, sign, given)
    if name == "position" and sign == "=":
        return by_position(trace, given)
    if name == "phase" and sign == "=":
        return by_phase(trace, given)
    if name in OF_TOKENS:
        raise InputError(f"{name}~{given}: patterns are for text, token and columns; write {name}=value.")
    return by_column(trace, name, sign, given)[trace.sequence_index()]


def by_column(trace: Trace, name: str, sign: str, given: str) -> np.ndarray:
    """bool (n_sequences,)"""
    sequences = trace.sequences()
    if name not in sequences.columns or sequences[name].isna().all():
        raise InputError(f"there is nothing called {name!r}. {names(sequences)}")
    labels = sequences[name].map(as_label)
    if sign == "~":
        wanted = pattern(name, given)
        return np.array([isinstance(label, str) and wanted.search(label) is not None for label in labels], bool)
    chosen = np.zeros(len(sequences), bool)
    for value in values(name, given):
        found = (labels == value).to_numpy(bool)
        if pd.api.types.is_numeric_dtype(sequences[name]) and not found.any():
            found = (sequences[name] == pd.to_numeric(pd.Series([value]), errors="coerce")[0]).to_numpy(bool)
        if not found.any():
            raise InputError(f"no sequence has {name} {value!r}; there is {listed(labels.dropna().unique())}.")
        chosen |= found
    return chosen


def by_phase(trace: Trace, given: str) -> np.ndarray:
    phase = trace.tokens()["phase"].astype(str)
    chosen = np.zeros(len(phase), bool)
    for value in values("phase", given):
        if value not in PHASES:
            raise InputError(f"phase is {value!r}; expected {', '.join(PHASES)}.")
        found = (phase == value).to_numpy(bool)
        if not found.any():
            raise InputError(f"no token has phase {value!r}; there is {listed(phase.unique())}.")
        chosen |= found
    return chosen


def by_position(trace: Trace, given: str) -> np.ndarray:
    position = trace.tokens()["pos"].to_numpy()
    chosen = np.zeros(len(position), bool)
    for value in values("position", given):
        first, last = bounds(value)
        found = (position >= first) & (position <= last)
        if not found.any():
            raise InputError(f"no token has position {value}; the longest sequence ends at {position.max(initial=0)}.")
        chosen |= found
    return chosen


def bounds(value: str) -> tuple[int, float]:
    """First and last position of `4`, `4-15` or `256+`."""
    found = re.fullmatch(r"(\d+)(?:([-–])(\d+)|(\+))?", value)
    if found is None:
        raise InputError(f"position is {value!r}; expected a number, a range as in 4-15, or 256+.")
    first = int(found[1])
    return first, int(found[3]) if found[2] else np.inf if found[4] else first


def by_token(trace: Trace, sign: str, given: str) -> np.ndarray:
    token_ids = known_tokens(trace)
    vocabulary = trace.vocabulary()
    entries = vocabulary["text"].fillna("")
    if sign == "~":
        wanted = pattern("token", given)
        found = np.array([wanted.search(entry) is not None for entry in entries], bool)
        return np.isin(token_ids, vocabulary["token_id"][found])
    meant = values("token", given)
    for value in meant:
        if not (entries == value).any():
            close = [entry for entry in entries.unique() if entry.strip().casefold() == value.strip().casefold()]
            hint = f"there is {', '.join(map(quoted, close))}" if close else "it may be made of several: use text~"
            raise InputError(f"no token is {quoted(value)}; {hint}.")
    return np.isin(token_ids, vocabulary["token_id"][entries.isin(meant)])


def in_text(trace: Trace, wanted: re.Pattern) -> np.ndarray:
    known_tokens(trace)
    chosen = np.zeros(trace.n_tokens, bool)
    for first, texts in spelling.texts(trace):
        ends = np.cumsum([len(text) for text in texts]).tolist()
        for match in wanted.finditer("".join(texts)):
            if match.end() > match.start():
                begin = bisect.bisect_right(ends, match.start())
                chosen[first + begin : first + bisect.bisect_left(ends, match.end()) + 1] = True
    return chosen


def known_tokens(trace: Trace) -> np.ndarray:
    """The token ids; InputError where none is known."""
    token_ids = trace.tokens()["token_id"].to_numpy()
    if (token_ids == UNKNOWN_TOKEN).all() or trace.vocabulary().empty:
        raise InputError(
            f"run {trace.run!r} doesn't know its tokens (ids or their texts): trace the corpus with `workbench trace`, "
            "or pass token_ids and vocabulary to from_arrays."
        )
    return token_ids


def values(name: str, given: str) -> list[str]:
    """The values of a condition, at commas outside quotes."""
    found, at = [], 0
    while at < len(given) or not found:
        one = VALUE.match(given, at)
        if one is None or not one[1]:
            raise InputError(
                f"{name}={given}: a value is missing; expected {name}=value or {name}=value,value, in double quotes "
                "where it holds a comma or begins with a space."
            )
        found.append(unquoted(name, one[1]))
        at = one.end()
    return found


def unquoted(name: str, value: str) -> str:
    """A value without its quotes, if it has any."""
    if len(value) < 2 or not value.startswith('"'):
        return value
    try:
        plain = str(json.loads(value, strict=False))
    except ValueError as error:
        raise InputError(
            f'{name}={value}: not a quoted value ({error}); expected "…", with \\" for a quote and \\\\ for \\ in it.'
        ) from error
    check_unicode(plain)
    return plain


def pattern(name: str, given: str) -> re.Pattern:
    if not given:
        raise InputError(f"{name}~ has no pattern; expected a regular expression, as in {name}~<think>.")
    try:
        return re.compile(given)
    except re.error as error:
        raise InputError(f"{name}~{given}: not a regular expression ({error}); write \\ before . ( [ * + ?") from error


def names(sequences: pd.DataFrame) -> str:
    """What a condition can be about, for an error."""
    filled = [str(column) for column in sequences.columns if sequences[column].notna().any()]
    return f"A condition names {', '.join([*filled, *OF_TOKENS])}."


def listed(found: np.ndarray) -> str:
    """Values, not too many, for an error."""
    labels = sorted(map(str, found))
    rest = f" and {len(labels) - MOST_LISTED:,} more" if len(labels) > MOST_LISTED else ""
    return ", ".join(labels[:MOST_LISTED]) + rest


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
