"""Data files as streams of records: JSON lines, CSV, TSV, Parquet and plain text, compressed or not.

A record is ("file:line", {column: value}), or ("file:line", InputError) where one record is bad but the next can still
be read. A file that breaks off or is damaged raises InputError, after the records before the damage.
"""

import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workbench.errors import InputError

Record = tuple[str, Any]

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
COMPRESSIONS = (".gz", ".xz", ".zst")
PARQUET_ROWS = 1024
MOST_BYTES = 1 << 28
"""Of a line, or of a file that is one text: what is longer is no text, but maybe a small file that unpacks to fill the
memory."""


def is_data(path: Path) -> bool:
    """Whether the name ends in a known format, compressed or not."""
    return _format(path) in FORMATS


def stem(path: Path) -> str:
    """The file's name without its format and compression: `a/news.jsonl.gz` is `news`."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return name.stem


def check_format(path: Path) -> None:
    """Raise InputError if the name does not end in a known format."""
    if not is_data(path):
        raise InputError(
            f"{path}: unknown kind of file {path.suffix!r}; expected {' '.join(FORMATS)}, "
            f"all but .parquet also with {' '.join(COMPRESSIONS)}. Convert or rename the file."
        )


def members(folder: Path) -> list[Path]:
    """The files of a folder that make a corpus, by name: its data files or, if it has none but texts, its texts."""
    found = sorted(path for path in folder.iterdir() if path.is_file() and is_data(path))
    tables = [path for path in found if _format(path) != ".txt"]
    if not found:
        raise InputError(f"{folder}: the folder has no file to read; expected {' '.join(FORMATS)} in it.")
    return tables or found


def count_rows(path: Path) -> int | None:
    """How many rows a Parquet file has; None for the others, which don't say."""
    if _format(path) != ".parquet":
        return None
    with _parquet(path) as file:
        return file.metadata.num_rows


def records(path: Path) -> Iterator[Record]:
    """The records of one file. A line of plain text is a record (blank lines are none)."""
    match _format(path):
        case ".jsonl" | ".json":
            return _json_lines(path)
        case ".csv":
            return _table(path, ",")
        case ".tsv":
            return _table(path, "\t")
        case ".parquet":
            return _parquet_rows(path)
        case _:
            return _text_lines(path)


def folder_records(paths: list[Path]) -> Iterator[Record]:
    """The records of several files, one file after the other. A whole file of plain text is one record."""
    for path in paths:
        if _format(path) == ".txt":
            yield f"{path}:1", _decoded(str(path), _whole(path))
        else:
            yield from records(path)


def check_unicode(where: str, text: str) -> None:
    """Raise InputError if the text has half a surrogate pair: it is not Unicode text and can't be stored."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start + 1} is half a surrogate pair ({text[error.start]!r}); expected Unicode "
            "text. Correct or remove the row, or leave such rows out with --bad-rows skip."
        ) from None


def _format(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        suffix = Path(path.stem).suffix.lower()
        return "" if suffix == ".parquet" else suffix  # Parquet compresses within, and is read out of order
    return suffix


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, decompressed, with their 1-based numbers."""
    number = 0
    try:
        with _opened(path) as stream:
            for number, line in enumerate(iter(lambda: stream.readline(MOST_BYTES + 1), b""), 1):
                if len(line) > MOST_BYTES:
                    raise _too_long(f"{path}:{number}")
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.filename:  # the system refuses: permissions, a vanished file
            raise InputError(f"{path}: can't be read: {error.strerror}.") from None
        raise InputError(
            f"{path}:{number + 1}: the compressed file is truncated or damaged after line {number} ({error}); "
            "expected a whole file. Copy or download it again."
        ) from None


def _whole(path: Path) -> bytes:
    lines, size = [], 0
    for _, line in _lines(path):
        size += len(line)
        if size > MOST_BYTES:
            raise _too_long(str(path))
        lines.append(line)
    return b"".join(lines)


def _too_long(where: str) -> InputError:
    return InputError(f"{where}: longer than {MOST_BYTES >> 20} MiB; expected texts. Split it.")


def _opened(path: Path) -> io.BufferedIOBase:
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)
        case ".xz":
            return lzma.open(path)
        case ".zst":
            import pyarrow as pa

            return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))  # type: ignore[arg-type]
        case _:
            return path.open("rb")


def _decoded(where: str, line: bytes) -> dict[str, str] | InputError:
    try:
        return {"text": line.decode()}
    except UnicodeDecodeError as error:
        return _not_utf8(where, error.start, line[error.start])


def _not_utf8(where: str, place: int, byte: int) -> InputError:
    return InputError(
        f"{where}: byte {place + 1} of it (0x{byte:02x}) is not UTF-8; expected UTF-8 text. "
        "Convert the file, as in `iconv -f ISO-8859-1 -t UTF-8`, or leave such rows out with --bad-rows skip."
    )


def _text_lines(path: Path) -> Iterator[Record]:
    for number, line in _lines(path):
        if line.strip():
            yield f"{path}:{number}", _decoded(f"{path}:{number}", line.rstrip(b"\r\n"))


def _json_lines(path: Path) -> Iterator[Record]:
    for number, line in _lines(path):
        if line.isspace():
            continue
        where = f"{path}:{number}"
        if number == 1 and line.lstrip().startswith(b"["):
            raise InputError(
                f"{where}: the file is one JSON array; expected an object a line. "
                f"Convert it: jq -c '.[]' {path} > {stem(path)}.jsonl"
            )
        yield where, _json_line(where, line)


def _json_line(where: str, line: bytes) -> Any:
    try:
        record = json.loads(line.decode().rstrip())
        if b"\\ud" in line.lower():  # an escaped surrogate, perhaps without its other half
            check_unicode(where, json.dumps(record, ensure_ascii=False))
    except UnicodeDecodeError as error:
        return _not_utf8(where, error.start, line[error.start])
    except InputError as error:
        return error
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)
        return InputError(
            f"{where}: not JSON: {reason}; expected one JSON object on each line. "
            "Correct or remove the line, or leave such rows out with --bad-rows skip."
        )
    return record


def _table(path: Path, delimiter: str) -> Iterator[Record]:
    """CSV or TSV with a header line. Values stay text."""
    csv.field_size_limit(sys.maxsize)  # a text may be longer than the module's 128 kB
    # Undecodable bytes travel through the parser as surrogates, so that only their own row is bad.
    lines = (line.decode(errors="surrogateescape") for _, line in _lines(path))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    first = 0  # last line of the row before
    try:
        header = next(reader, None)
        if header is None:
            return
        if isinstance(wrong := _table_row(f"{path}:1", header, header), InputError):
            raise wrong
        if len(set(header)) < len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise InputError(f"{path}:1: the column {twice!r} occurs twice; expected distinct names. Rename one.")
        first = reader.line_num
        for row in reader:
            where, first = f"{path}:{first + 1}", reader.line_num
            if row:
                yield where, _table_row(where, header, row)
    except csv.Error as error:
        raise InputError(
            f"{path}:{first + 1}: not a table that can be read: {error}; expected values separated by {delimiter!r}, "
            'in double quotes where they hold quotes ("" for each) or line breaks. Correct the row.'
        ) from None


def _table_row(where: str, header: list[str], row: list[str]) -> dict[str, str] | InputError:
    if len(row) != len(header):
        return InputError(
            f"{where}: the row has {len(row)} values; expected {len(header)}, one for each column of the header. "
            "Put values that hold the separator in double quotes, or leave such rows out with --bad-rows skip."
        )
    for value in row:
        escaped = next((place for place, char in enumerate(value) if "\udc80" <= char <= "\udcff"), None)
        if not value.isascii() and escaped is not None:
            before = len(value[:escaped].encode())
            return _not_utf8(f"{where}: {header[row.index(value)]!r}", before, ord(value[escaped]) - 0xDC00)
    return dict(zip(header, row, strict=True))


def _parquet(path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path}: not a whole Parquet file ({str(error).splitlines()[0]}). Copy, download or write it again."
    )


def _parquet_rows(path: Path) -> Iterator[Record]:
    import pyarrow as pa

    number = 0
    with _parquet(path) as file:
        try:
            for batch in file.iter_batches(PARQUET_ROWS):
                for place in range(batch.num_rows):
                    number += 1
                    yield f"{path}:{number}", _parquet_row(f"{path}:{number}", batch, place)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from None


def _parquet_row(where: str, batch, place: int) -> dict[str, Any] | InputError:
    try:
        return {name: column[place].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    except UnicodeDecodeError as error:
        return _not_utf8(where, error.start, error.object[error.start])
