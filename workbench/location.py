"""Where a trace is: a path on this machine, or the URL of a folder on another filesystem (`s3://bucket/trace`).

Filesystems are fsspec's: `s3://` takes the package s3fs, `gs://` gcsfs, `abfs://` adlfs, `hf://` comes with
huggingface_hub, `memory://` is this process's memory. Their credentials come from where those packages look for them.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from workbench.errors import InputError, RunError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_COLLAPSED = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
"""How a URL begins that was made a Path, which keeps one of the slashes."""


class Url(PurePosixPath):
    """A URL with what a Path has: `name`, `parent`, `/`. Its text keeps both slashes after the scheme."""

    def __str__(self) -> str:
        scheme, _, rest = super().__str__().partition(":/")
        return f"{scheme}://{rest}"

    def resolve(self) -> "Url":
        """Itself: a URL doesn't depend on where one is."""
        return self


def located(path: str | os.PathLike) -> Path | Url:
    """A Url for what begins with a scheme, else a Path; `file://` and `local://` are this machine.

    InputError for a URL without a host or bucket (`s3:///x`): what follows would be taken for one.
    """
    text = os.fspath(path)
    found = _SCHEME.match(text)
    if not found:
        return Path(text)
    scheme, rest = found[0].lower(), text[found.end() :]
    if scheme in ("file://", "local://"):
        return Path(rest)
    if rest.startswith("/"):
        raise InputError(f"{text}: nothing between :// and /; expected a host or bucket there.")
    return Url(scheme + rest)


def local_path(path: str | os.PathLike) -> Path:
    """The path, if it is on this machine; InputError for a URL."""
    there = located(path)
    if isinstance(there, Url) or (_COLLAPSED.match(str(there)) and not os.path.isdir(there.parts[0])):
        raise InputError(f"{path} is a URL; what is written here goes to this machine: give a path.")
    return there


def is_folder(path: Path | Url) -> bool:
    """Whether it is a folder on this machine, or a URL."""
    return isinstance(path, Url) or os.path.isdir(path)


def exists(path: str | os.PathLike) -> bool:
    """Whether there may be a trace: a file or folder on this machine, or a URL, which is not asked."""
    there = located(path)
    return isinstance(there, Url) or os.path.exists(there)


def filesystem(path: Path | Url) -> "tuple[AbstractFileSystem, str]":
    """The filesystem that `path` is on, and its name there. InputError if there is no such filesystem."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(str(path) if isinstance(path, Url) else str(path.absolute()))
    except (ImportError, ValueError, OSError) as error:
        raise InputError(f"{path}: {error}. Expected a folder, or a URL of a filesystem that fsspec knows.") from error


@contextmanager
def asking(path: Path | Url, failure: type[InputError] | type[RunError] = InputError) -> Iterator[None]:
    """Raises `failure`, with the reason, where the filesystem that `path` is on can't do what the block asks of it.

    Behind a URL that is any exception, because the packages that fsspec calls raise their own.
    """
    verb = "read" if failure is InputError else "written"
    try:
        yield
    except (InputError, RunError):
        raise
    except Exception as error:
        if not isinstance(path, Url) and not isinstance(error, OSError):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise failure(f"{path} can't be {verb}: {reason.rstrip('.')}.") from error
