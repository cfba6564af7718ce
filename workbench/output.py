"""Output files appear whole or not at all."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workbench.errors import InputError, RunError


@contextmanager
def new_file(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A name beside `path` to write to; renamed to `path` when the block ends well, deleted when it doesn't.

    InputError, before the block, if `path` exists and `overwrite` isn't given, or its folder can't be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file.")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another name, or replace it with --overwrite.")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is not a folder; create it first.")
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise RunError(f"{path} could not be written: {error.strerror or error}. Nothing was left behind.") from error
    finally:
        partial.unlink(missing_ok=True)
