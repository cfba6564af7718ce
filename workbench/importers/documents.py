"""JSON documents, and arrays inside them, from files that other tools wrote."""

import base64
import binascii
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from workbench import files
from workbench.errors import InputError

_SKIP = ", or leave such rows out with --bad-rows skip"


def lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of each line of a .jsonl file, compressed or not; InputError for a bad one."""
    for where, record in files.records(path):
        if isinstance(record, InputError):  # of a corpus bad rows can be left out
            raise InputError(str(record).replace(_SKIP, ""))
        yield where, _object(where, record)


def documents(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file: of a .json file the one it is or those of its list, else one a line."""
    if path.suffix.lower() != ".json":
        yield from lines(path)
        return
    try:
        whole = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not one JSON value: {error}. A file with one object a line ends in .jsonl."
        ) from None
    if not isinstance(whole, list):
        yield str(path), _object(str(path), whole)
        return
    for number, one in enumerate(whole):
        yield f"{path}[{number}]", _object(f"{path}[{number}]", one)


def _object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: a {type(value).__name__}; expected a JSON object.")
    return value


def part(where: str, value: dict[str, Any], name: str) -> dict[str, Any]:
    """The object `name` inside an object; empty if it is missing or null."""
    found = value.get(name)
    return {} if found is None else _object(f"{where}: {name}", found)


def number(where: str, value: dict[str, Any], name: str) -> int | None:
    """A whole number >= 0 in an object; None if it is missing or null."""
    found = value.get(name)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < 2**31:
        raise InputError(f"{where}: {name} is {found!r}; expected a whole number from 0 on.")
    return found


def decoded(where: str, name: str, value: Any) -> bytes:
    """The bytes of base64 text; InputError if it is something else, or cut short."""
    if not isinstance(value, str):
        raise InputError(f"{where}: {name} is a {type(value).__name__}; expected base64 text.")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(
            f"{where}: {name} is not whole base64 text ({error}), {len(value):,} characters. Was it cut short?"
        ) from None


def npy(where: str, data: bytes) -> np.ndarray:
    """The array of a .npy file's bytes. Nothing pickled is loaded, and no more is allocated than there are bytes."""
    stream = io.BytesIO(data)
    try:
        shape, fortran, dtype = npy_header(stream)
    except Exception as error:  # NumPy has Python parse the header, which raises whatever its parser does
        raise InputError(f"{where}: not a NumPy array (.npy): {first_line(error)}") from None
    n = math.prod(shape)
    held = len(data) - stream.tell()
    if n * dtype.itemsize != held:
        raise InputError(f"{where}: {held:,} bytes for {dtype} of shape {shape}, which takes {n * dtype.itemsize:,}.")
    flat = np.frombuffer(data, dtype, n, stream.tell())
    return flat.reshape(shape, order="F" if fortran else "C")


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def npy_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, and type of the array that begins in a stream. ValueError if it isn't one."""
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of the format; expected 1.0 or 2.0")
    shape, fortran, dtype = read(stream)
    if dtype.hasobject or not dtype.itemsize:
        raise ValueError(f"{dtype} would have to be unpickled; expected numbers")
    if any(size < 0 for size in shape):
        raise ValueError(f"shape {shape}")
    return shape, fortran, dtype
