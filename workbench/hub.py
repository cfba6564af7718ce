"""Hugging Face data sets as streams of records, through the optional library `datasets`."""

from collections.abc import Iterator
from typing import Any

from workbench.errors import InputError
from workbench.files import Record


def dataset(name: str, split: str) -> tuple[Any, int | None]:
    """Open the data set `owner/name` or `owner/name:config` as a stream: the data set and, if known, its rows.

    The name may also be a local folder. No code of the data set is run. Raises InputError if `datasets` is not
    installed, or if there is no such data set, configuration or split.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{name} is no file here, and to read it as a Hugging Face data set the library datasets is needed: "
            "pip install 'moe-workbench[datasets]'"
        ) from None
    path, _, config = name.partition(":")
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(path, config or None, split=split, streaming=True)
    except Exception as error:  # the library raises errors of many kinds, its own and those of HTTP clients
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{name}, split {split!r}: no such file here, and as a Hugging Face data set it can't be opened: {reason} "
            "Check the id, the configuration (owner/name:config), the split and the connection."
        ) from None
    splits = found.info.splits
    return found, splits[split].num_examples or None if splits and split in splits else None


def records(found: Any, name: str) -> Iterator[Record]:
    """The records of an open data set."""
    number = 0
    try:
        for number, row in enumerate(found, 1):
            yield f"{name}:{number}", row
    except Exception as error:
        raise InputError(
            f"{name}:{number + 1}: reading the data set failed: {type(error).__name__}: {error} "
            "Check the connection, or download the data set and give its files."
        ) from None
