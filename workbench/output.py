"""Output files and folders appear whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from workbench.errors import InputError, RunError
from workbench.location import local_path

LOCK = ".*.lock"
"""What writers leave beside a file."""


@contextmanager
def new_file(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A name beside `path` to write to; renamed to `path` when the block ends well, deleted when it doesn't.

    InputError, before the block, if `path` exists and `overwrite` isn't given, its folder can't be written to, or it is
    a URL.
    """
    path = local_path(path)
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


@contextmanager
def new_folder(
    path: str | os.PathLike, overwrite: bool = False, *, marker: str = "config.json", contents: Collection[str] = ("*",)
) -> Iterator[Path]:
    """A folder beside `path` to write into; renamed to `path` when the block ends well, deleted when it doesn't.

    InputError, before the block, if `path` exists and `overwrite` isn't given, its parent isn't a folder, or it is a
    URL. Only a folder that holds the file `marker`, and nothing but what fits a pattern of `contents`, or nothing, is
    ever replaced.
    """
    path = local_path(path)
    if not path.name:
        raise InputError(f"{str(path)!r} has no name of its own; give that of a folder that isn't there yet.")
    path = path.resolve()  # the folder behind a link, not the link
    if path.is_file():
        raise InputError(f"{path} is a file; give the name of a folder that isn't there yet.")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another name, or replace it with --overwrite.")
    if path.exists() and any(path.iterdir()) and not (path / marker).is_file():
        raise InputError(f"{path} has no {marker}, so it isn't what would be replaced; choose another name.")
    names = sorted(one.name for one in path.iterdir()) if path.is_dir() else []
    for name in names:
        if not any(fnmatch(name, known) for known in contents):
            raise InputError(f"{path} holds {name}, too, which would be lost; choose another name.")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path.parent} is not a folder; create it first.")
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    replaced = path.with_name(f"{partial.name}.old")
    try:
        partial.mkdir()
        yield partial
        if path.exists():
            os.replace(path, replaced)
        os.replace(partial, path)
    except OSError as error:
        if replaced.exists() and not path.exists():
            os.replace(replaced, path)
        raise RunError(f"{path} could not be written: {error.strerror or error}. Nothing was left behind.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
