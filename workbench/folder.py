"""A trace as a folder of Parquet parts, read by DuckDB: `docs/parts.md` has the layout, `workbench.parts` writes it.

A part is there when its file in `sequences` is: that one is written last. What else has the name of a part that isn't
there was left behind by a writer that died, and isn't read.

Files on this machine are read by DuckDB itself. Those behind a URL go through fsspec, and through `_Committed`, which
opens the files of the parts and no others, for reading only.
"""

import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import duckdb
from fsspec import AbstractFileSystem

from workbench.errors import InputError
from workbench.location import Url, asking, filesystem, is_folder

FORMAT_FILE = "format.parquet"
PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
"""What a part can be called."""
HEADERS = ("runs", "layers")
"""Tables that whoever begins a run writes; the others come in parts."""
SUFFIX = ".parquet"


def listing(folder: Path | Url, tables: Iterable[str]) -> dict[str, list[str]]:
    """The names of the parts that are there, sorted: of `sequences`, and of these tables.

    InputError if the folder is no trace.
    """
    fs, root = filesystem(folder)
    with asking(folder):
        fs.invalidate_cache()
        if not fs.exists(f"{root}/{FORMAT_FILE}"):
            raise InputError(_no_trace(folder))
        committed = _names(fs, f"{root}/sequences")  # first: what is listed here was whole before
        found = {table: _names(fs, f"{root}/{table}") for table in tables}
    return {table: sorted(names if table in HEADERS else names & committed) for table, names in found.items()} | {
        "sequences": sorted(committed)
    }


def held(folder: Path | Url) -> list[str]:
    """Names of what is in a folder, sorted; none if there is no such folder."""
    fs, root = filesystem(folder)
    with asking(folder):
        try:
            return sorted(entry.rsplit("/", 1)[-1] for entry in fs.ls(root, detail=False))
        except FileNotFoundError:
            return []


def _names(fs: AbstractFileSystem, folder: str) -> set[str]:
    try:
        files = [entry.rsplit("/", 1)[-1] for entry in fs.ls(folder, detail=False)]
    except FileNotFoundError:
        return set()
    return {name.removesuffix(SUFFIX) for name in files if name.endswith(SUFFIX) and PART.fullmatch(name)}


def _no_trace(folder: Path | Url) -> str:
    found = held(folder)
    what = f"it holds {', '.join(found[:5])}{', …' if found[5:] else ''}, but" if found else "it is empty:"
    return (
        f"{folder} is a folder but not a trace: {what} no {FORMAT_FILE}. Expected a DuckDB file, or a folder of parts "
        "as `workbench merge TRACE --out FOLDER/` writes it."
    )


# --- views


def create_views(
    con: duckdb.DuckDBPyConnection,
    folder: Path | Url,
    columns: Mapping[str, Mapping[str, str]],
    into: str = "main",
) -> None:
    """Make a view of each table in the schema `into`: the rows of the parts that are there now, in the table's types.

    columns  table -> column -> SQL type. `con` can still open files; see `confine`
    """
    found = listing(folder, [name for name in columns if name != "format"])
    where = _literal(_prefix(con, folder))
    files = {table: [f"{where}/{table}/{name}{SUFFIX}" for name in names] for table, names in found.items()}
    files["format"] = [f"{where}/{FORMAT_FILE}"]
    for table, types in columns.items():
        if files[table]:
            listed = ", ".join(_quoted(name) for name in files[table])
            # A folder such as `lang=de` on the way is no column.
            source = f"FROM read_parquet([{listed}], hive_partitioning = false)"
            chosen = ", ".join(f'"{name}"::{kind} AS "{name}"' for name, kind in types.items())
        else:
            source = "WHERE false"
            chosen = ", ".join(f'NULL::{kind} AS "{name}"' for name, kind in types.items())
        view = f"SELECT {chosen} {source}"
        if table == "vocabulary":  # each part brings the texts of its tokens, those of imports some of them only
            named = "text <> '' OR max(text) OVER (PARTITION BY run, token_id) = ''"
            view = f"SELECT DISTINCT * FROM ({view}) QUALIFY {named}"
        con.execute(f"CREATE VIEW {into}.{table} AS {view}")


def confine(con: duckdb.DuckDBPyConnection, *paths: Path | Url) -> None:
    """From now on `con` opens nothing outside of these folders. It could still write into them: only ask questions."""
    names = [_prefix(con, path) for path in paths if is_folder(path)]
    allowed = ", ".join(_quoted(name) for name in dict.fromkeys((*names, *map(_literal, names))))
    con.execute(f"SET allowed_directories = [{allowed}]")
    con.execute("SET enable_external_access = false")


def _prefix(con: duckdb.DuckDBPyConnection, folder: Path | Url) -> str:
    """What DuckDB calls the folder; a Url's filesystem is made known to `con`."""
    if isinstance(folder, Path):
        return str(folder.absolute())
    fs, root = filesystem(folder)
    guarded = _Committed(fs, root)
    if guarded.protocol not in con.list_filesystems():
        con.register_filesystem(guarded)
    return f"{guarded.protocol}://"


def _literal(name: str) -> str:
    """A name that DuckDB takes as it is, not as a pattern for the names of other files."""
    return re.sub(r"[*?\[]", lambda found: f"[{found[0]}]", name)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


class _Committed(AbstractFileSystem):
    """The files of a folder on any filesystem, for reading; no other file, and no writing."""

    cachable = False

    def __init__(self, fs: AbstractFileSystem, root: str):
        super().__init__()
        self._fs, self._root = fs, root
        # DuckDB tells filesystems apart by it, and one connection may read several folders.
        self.protocol = f"parts-{sha256(fs.unstrip_protocol(root).encode()).hexdigest()[:16]}"

    def _inner(self, path: str) -> str:
        name = path.removeprefix(f"{self.protocol}://").strip("/")
        steps = name.split("/")
        if not (name == FORMAT_FILE or len(steps) == 2 and all(map(PART.fullmatch, steps))):
            raise PermissionError(f"{path} is no file of this trace")
        return f"{self._root}/{name}"

    def open(self, path: str, mode: str = "rb", **_: Any) -> "_Handle":  # type: ignore[override]
        if mode != "rb":
            raise PermissionError("a trace is only read")
        return _Handle(self._fs, self._inner(path))

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": self._fs.size(self._inner(path)), "type": "file"}

    def modified(self, path: str) -> datetime:
        return datetime.fromtimestamp(0, UTC)  # a file of a part never changes

    def glob(self, path: str, **_: Any) -> list[str]:  # type: ignore[override]
        return [path]

    def rm_file(self, path: str) -> None:
        raise PermissionError("a trace is only read")

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        raise PermissionError("a trace is only read")


class _Handle:
    """An open file for DuckDB, whose threads share it: each seeks and then reads, so each has a position of its own."""

    def __init__(self, fs: AbstractFileSystem, path: str):
        self._fs, self._path, self._size = fs, path, int(fs.size(path) or 0)
        self._here = threading.local()

    def seek(self, offset: int, whence: int = 0) -> int:
        self._here.at = offset + (0, self.tell(), self._size)[whence]
        return self._here.at

    def tell(self) -> int:
        return getattr(self._here, "at", 0)

    def read(self, size: int = -1) -> bytes:
        start = self.tell()
        end = self._size if size < 0 else min(start + size, self._size)
        self._here.at = max(start, end)
        return bytes(self._fs.cat_file(self._path, start=start, end=end)) if end > start else b""  # type: ignore[arg-type]

    def seekable(self) -> bool:
        return True

    def flush(self) -> None: ...

    def close(self) -> None: ...


# --- what is wrong


def why_not(folder: Path | Url, columns: Mapping[str, Mapping[str, str]], error: duckdb.Error) -> str:
    """What stopped a question, with the file that can't be read, if there is one."""
    said = str(error).strip().splitlines()[0]
    if not is_folder(folder):
        return f"{folder} is gone."
    for name, reason in damaged(folder, columns):
        return (
            f"{folder}: {name} is damaged or cut short ({reason}). Copy it again from where it came; or delete the "
            f"part, {_of_part(name)}, and write it again."
        )
    return f"{folder} can't be read as a trace: {said}. See `workbench validate {folder}`."


def _of_part(name: str) -> str:
    return f"*/{name.rsplit('/', 1)[-1]}"


def damaged(folder: Path | Url, columns: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, str]]:
    """Files that can't be read whole, as (TABLE/PART.parquet, reason). Reads everything, with its checksums."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fs, root = filesystem(folder)
    found = listing(folder, [name for name in columns if name != "format"])
    names = [FORMAT_FILE, *(f"{table}/{name}{SUFFIX}" for table, part in found.items() for name in part)]
    for name in names:
        try:
            with (
                fs.open(f"{root}/{name}", "rb") as stream,
                pq.ParquetFile(stream, page_checksum_verification=True) as file,
            ):
                for group in range(file.num_row_groups):
                    file.read_row_group(group)
        except (pa.ArrowException, OSError, ValueError) as error:
            yield name, str(error).strip().splitlines()[0].rstrip(".")


def disagreeing(folder: Path | Url, con: duckdb.DuckDBPyConnection) -> Iterator[str]:
    """What is wrong with parts whose files have other rows than their sequences ask for. `con` reads the folder."""
    import pyarrow.parquet as pq

    query = "SELECT run, count(*) FROM layers JOIN runs USING (run) WHERE recorded <> ['counts'] GROUP BY run"
    layers = dict(con.execute(query).fetchall())
    fs, root = filesystem(folder)
    found = listing(folder, ("tokens", "routing"))
    for part in found["sequences"]:
        with fs.open(f"{root}/sequences/{part}{SUFFIX}", "rb") as stream:
            rows = pq.read_table(stream, columns=["run", "n_tokens"]).to_pylist()
        kept = [row for row in rows if row["run"] in layers]
        wanted = {
            "tokens": sum(row["n_tokens"] for row in kept),
            "routing": sum(row["n_tokens"] * layers[row["run"]] for row in kept),
        }
        for table, n_wanted in wanted.items():
            n = 0
            if part in found[table]:
                with fs.open(f"{root}/{table}/{part}{SUFFIX}", "rb") as stream:
                    n = pq.read_metadata(stream).num_rows
            if n != n_wanted:
                yield f"part {part} has {n or 'no'} rows in {table}; by its sequences expected {n_wanted}"
