"""Write a trace: whole sequences in large transactions, on a thread of its own, with flat memory.

>>> with Writer("trace.duckdb", run, layers) as writer:      # doctest: +SKIP
...     writer.add_vocabulary({17: "the"})
...     writer.append(block)

After a kill -9 at any moment the file opens and holds only whole blocks. The file is held only while a transaction is
committed, so other processes can read a run while it grows.
"""

import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import filelock

from workbench import connection, schema
from workbench.counts import Counts, CountsTransaction
from workbench.errors import InputError, RunError, interrupted
from workbench.location import local_path
from workbench.run_rows import check_same, layer_rows, now, run_row
from workbench.schema import COUNTS, PHASES, RECORDABLE, UNKNOWN_TOKEN
from workbench.transaction import Block, Transaction, insert_rows

__all__ = ["PHASES", "RECORDABLE", "UNKNOWN_TOKEN", "Block", "Counts", "Writer", "check_target"]

MODES = ("new", "overwrite", "append", "resume")
QUEUE_BYTES = 16 << 20
READERS_WAIT = 600.0
"""Seconds to wait for readers to let go of the file before the run fails."""


def check_target(path: str | os.PathLike, mode: str) -> None:
    """InputError if a run can't be written to `path` in this mode; changes nothing."""
    path = local_path(path)
    if mode not in MODES:
        raise InputError(f"mode {mode!r}: expected one of {', '.join(MODES)}.")
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file in it, such as {path / 'trace.duckdb'}.")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is not a folder: create it first, or write elsewhere.")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"can't write to the folder {path.parent}: permission denied.")
    if mode == "new" and path.exists():
        raise InputError(
            f"{path} exists. Replace it with --overwrite, finish its run with --resume, or add a run with --append."
        )
    if mode == "append" and not path.exists():
        raise InputError(f"{path} does not exist, so no run can be added to it. Leave out --append.")
    if mode in ("append", "resume") and path.exists():
        connection.connect(path).close()


class Writer:
    """Appends blocks to one run of a trace; use it as a context manager.

    run     run (its name, unique in the file), model, revision, family, engine, dtype, recorded (of RECORDABLE, or
            just COUNTS), and as anything that JSON can hold: recipe, corpus, versions
    layers  one dict a router, in order of execution: name, n_experts, top_k, n_shared, gating, stack
    mode    "new" refuses an existing file; "overwrite" replaces it (the old one stays beside it, as `.NAME.before`,
            until the new run has finished); "append" adds a run; "resume" continues the run of that name, or begins it
            if there is no file yet

    Raises InputError if the run can't be written as asked, RunError if it breaks off; what was committed is kept.
    """

    def __init__(
        self, path: str | os.PathLike, run: Mapping[str, Any], layers: Sequence[Mapping[str, Any]], *, mode: str = "new"
    ):
        self.path = local_path(path)
        self.mode = mode
        self.run = run_row(run)
        self.layers = layer_rows(self.run["run"], layers)
        self.finished_sequences: set[int] = set()
        """Ids of the sequences that the file already held when the writer was opened."""
        self._lock = filelock.FileLock(self.path.parent / f".{self.path.name}.lock", timeout=0)
        self._before = self.path.parent / f".{self.path.name}.before"
        self._known_tokens: set[int] = set()
        self._committed = [0, 0]  # sequences, tokens
        self._queue: deque[Block | Counts | dict[int, str]] = deque()
        self._queued = 0  # bytes
        self._changed = threading.Condition()
        self._closing = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="trace writer", daemon=True)

    def __enter__(self) -> "Writer":
        check_target(self.path, self.mode)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise InputError(
                f"{self.path} is being written by another process. Wait for it to finish, or write to another file."
            ) from None
        try:
            check_target(self.path, self.mode)  # again: the file may have come into being before the lock was ours
            self._open()
        except BaseException:
            self._lock.release()
            raise
        self._thread.start()
        return self

    def append(self, block: Block | Counts) -> None:
        """Queue whole sequences; waits while the queue is full. Raises what went wrong with earlier blocks.

        block  Counts in a run that counts, else a Block
        """
        self._put(block, block.nbytes)

    def add_vocabulary(self, texts: Mapping[int, str]) -> None:
        """Texts of token ids; call it before the block in which they first occur. Ids that are known are skipped."""
        self._put(dict(texts), 0)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        status = "finished" if kind is None else "interrupted" if interrupted(error) else "failed"
        try:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            self._thread.join()
            self._close(status if self._error is None else "failed")
        finally:
            self._lock.release()
        if self._error is not None and kind is None:
            raise self._error

    # --- main thread

    def _put(self, item: Block | Counts | dict[int, str], nbytes: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._error or not self._queued or self._queued + nbytes <= QUEUE_BYTES)
            if self._error is not None:
                raise self._error
            self._queue.append(item)
            self._queued += nbytes
            self._changed.notify_all()

    def _open(self) -> None:
        if self.mode == "overwrite" and self.path.exists():
            _move(self.path, self._before)
        fresh = not self.path.exists()
        # A new file gets its name only when it is a trace: a reader never sees one without tables.
        target = self.path.parent / f".{self.path.name}.new" if fresh else self.path
        try:
            if fresh:
                _delete(target)
                schema.create(target)
            with connection.writing(target, wait=READERS_WAIT) as con:
                schema.migrate(con)
                if self.mode == "resume" and not fresh:
                    self._resume(con)
                else:
                    self._begin(con)
                if fresh:
                    # Closing would leave the tables in the log, without a word, if the disk is full.
                    con.execute("CHECKPOINT")
            if fresh:
                os.replace(target, self.path)
        except duckdb.Error as error:
            raise RunError(f"{self.path} can't be written: {_reason(error)}.") from error
        finally:
            if fresh:
                _delete(target)
                if not self.path.exists() and self._before.exists():
                    _move(self._before, self.path)

    def _begin(self, con: duckdb.DuckDBPyConnection) -> None:
        taken = [row["run"] for row in schema.runs(con)]
        if self.run["run"] in taken:
            raise InputError(
                f"{self.path} already has a run {self.run['run']!r}. Give this one another name with --run, "
                "or finish the old one with --resume."
            )
        con.execute("BEGIN")
        insert_rows(con, "runs", [self.run | {"started": now(), "status": "running"}])
        insert_rows(con, "layers", self.layers)
        con.execute("COMMIT")

    def _resume(self, con: duckdb.DuckDBPyConnection) -> None:
        name = schema.find_run(con, self.path, self.run["run"])
        had = con.sql("SELECT * FROM runs WHERE run = ?", params=[name]).to_arrow_table().to_pylist()[0]
        layers = (
            con.sql("SELECT * FROM layers WHERE run = ? ORDER BY layer", params=[name]).to_arrow_table().to_pylist()
        )
        check_same(self.path, had, layers, self.run, self.layers)
        done = con.execute("SELECT seq, n_tokens FROM sequences WHERE run = ?", [name]).fetchall()
        self.finished_sequences = {seq for seq, _ in done}
        self._committed = [len(done), sum(n for _, n in done)]
        known = con.execute("SELECT token_id FROM vocabulary WHERE run = ?", [name]).fetchall()
        self._known_tokens = {token_id for (token_id,) in known}
        con.execute("UPDATE runs SET status = 'running', finished = NULL WHERE run = ?", [name])

    def _close(self, status: str) -> None:
        try:
            with connection.writing(self.path, wait=READERS_WAIT) as con:
                values = [status, now() if status == "finished" else None, self.run["run"]]
                con.execute("UPDATE runs SET status = ?, finished = ? WHERE run = ?", values)
        except (duckdb.Error, InputError) as error:
            self._error = self._error or self._broke(error)
            return
        if status == "finished":
            _delete(self._before)
        elif self._before.exists() and not self._committed[0]:
            _delete(self.path)
            _move(self._before, self.path)

    # --- writer thread

    def _work(self) -> None:
        """Take blocks until closed; commit when enough is pending or the oldest has waited long enough."""
        pending: Any = (
            CountsTransaction(self.run["run"])
            if self.run["recorded"] == [COUNTS]
            else Transaction(self.run["run"], self.run["recorded"], self.layers)
        )
        try:
            done = False
            while not done:
                with self._changed:
                    self._changed.wait_for(lambda: self._queue or self._closing, timeout=pending.seconds_left())
                    item = self._queue.popleft() if self._queue else None
                    done = item is None and self._closing
                if item is not None:
                    self._take(item, pending)
                if done or pending.full() or pending.seconds_left() == 0:
                    self._commit(pending)
        except Exception as error:  # whatever it is, the main thread has to hear of it
            with self._changed:
                self._error = self._broke(error)
                self._queue.clear()
                self._changed.notify_all()

    def _take(self, item: Block | Counts | dict[int, str], pending: Transaction | CountsTransaction) -> None:
        if isinstance(item, dict):
            pending.name(item, self._known_tokens)
            return
        if pending.full(more=item.n_tokens):
            self._commit(pending)
        try:
            pending.add(item)  # pyright: ignore[reportArgumentType]  # a run has one kind only
        except RunError:
            self._commit(pending)  # the blocks before the bad one are whole
            raise
        with self._changed:
            self._queued -= item.nbytes
            self._changed.notify_all()

    def _commit(self, pending: Transaction | CountsTransaction) -> None:
        if pending.empty():
            return
        with connection.writing(self.path, wait=READERS_WAIT) as con:
            con.execute("BEGIN")
            pending.insert(con)
            con.execute("COMMIT")
        self._committed[0] += len(pending.sequences)
        self._committed[1] += pending.n_tokens
        self._known_tokens.update(pending.vocabulary)
        pending.clear()

    def _broke(self, error: Exception) -> RunError:
        """The error together with what it means for the file."""
        try:
            with connection.reading(self.path) as con:
                query = "SELECT count(*), coalesce(sum(n_tokens), 0)::BIGINT FROM sequences WHERE run = ?"
                n, tokens = con.execute(query, [self.run["run"]]).fetchall()[0]
            kept = f"{n:,} whole sequences ({tokens:,} tokens) are kept in it; --resume continues from there."
        except (InputError, duckdb.Error) as worse:
            kept = f"{self._committed[0]:,} sequences had been written, but now the file can't be read: {worse}"
        old = f" The file it was to replace is kept as {self._before}." if self._before.exists() else ""
        broken = RunError(f"writing {self.path} failed: {_reason(error)}. {kept}{old}")
        broken.__cause__ = error
        return broken


def _reason(error: Exception) -> str:
    why = schema.first_line(error).rstrip(".")
    if any(sign in str(error) for sign in ("No space left", "File too large", "Disk quota")):
        return f"the disk is full ({why})"
    return f"memory ran out ({why})" if "bad allocation" in str(error) else why


def _wal(path: Path) -> Path:
    return path.with_name(path.name + ".wal")


def _move(path: Path, to: Path) -> None:
    """Rename a trace and its write-ahead log, which DuckDB finds by name. If `to` exists, that is kept."""
    if to.exists():
        _delete(path)
        return
    if _wal(path).exists():
        os.replace(_wal(path), _wal(to))
    os.replace(path, to)


def _delete(path: Path) -> None:
    path.unlink(missing_ok=True)
    _wal(path).unlink(missing_ok=True)
