"""What is known of imported texts beside their routing: a table with a row a text, in the order of the dump."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from workbench import files
from workbench.errors import InputError
from workbench.importers.documents import _SKIP


def rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", columns) of each text. InputError for a row that can't be read.

    .csv, .tsv, .jsonl or .parquet; lang, domain, source, segment_id, n_prompt and sha256 are what they are in a trace,
    `token_ids` is a list of ids, `text` is what sha256 is taken of, and every other column becomes metadata. Empty
    cells are missing values.
    """
    files.check_format(path)
    for where, record in files.records(path):
        if isinstance(record, InputError):
            raise InputError(str(record).replace(_SKIP, ""))
        if not isinstance(record, Mapping):
            raise InputError(f"{where}: expected a row with columns such as lang and domain.")
        row = {str(name): value for name, value in record.items() if value not in (None, "")}
        if (text := row.pop("text", None)) is not None and "sha256" not in row:
            row["sha256"] = hashlib.sha256(str(text).encode("utf-8", "replace")).hexdigest()
        if "n_prompt" in row:
            row["n_prompt"] = _whole(where, row["n_prompt"])
        yield where, row


def _whole(where: str, value: Any) -> int:
    try:
        found = int(value)
    except (TypeError, ValueError, OverflowError):
        found = -1
    if found < 0 or isinstance(value, bool) or (isinstance(value, float) and value != found):
        raise InputError(f"{where}: n_prompt is {value!r}; expected a whole number from 0 on.")
    return found
