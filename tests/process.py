"""The `workbench` command in processes that can be killed, limited and interrupted.

They are forked from a server that has imported the library once, so that each starts in a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["workbench.capture", "workbench.cli", "transformers.models.olmoe.modeling_olmoe"])


def start(*arguments: object, log: Path, **circumstances: Any) -> BaseProcess:
    """`workbench …` in a process of its own; `circumstances` are those of `_main`. Its output goes to `log`."""
    process = _context.Process(target=_main, args=([str(one) for one in arguments], str(log)), kwargs=circumstances)
    process.start()
    return process


def finish(process: BaseProcess, seconds: float = 120) -> int:
    """Exit code; negative for a signal."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"the process was still running after {seconds} s")
    return process.exitcode


def wait_for(path: Path, process: BaseProcess, seconds: float = 60) -> None:
    """Until the file is there, or the process has ended."""
    patience = time.monotonic() + seconds
    while not path.exists() and process.is_alive() and time.monotonic() < patience:
        time.sleep(0.002)


def _main(
    arguments: list[str],
    log: str,
    commit_token_layers: int | None = None,
    file_bytes: int | None = None,
    dies: str | None = None,
    pause: float = 0,
) -> None:
    """Runs in the new process.

    commit_token_layers  commit this often, so that a short run has many transactions; one that counts after each batch
    file_bytes           longest file that the system lets it write
    pause                seconds it rests after each transaction, so that others get to look
    dies                 where in its third transaction the process kills itself: see `_die`
    """
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    import resource

    import torch
    import transformers

    from workbench import counts, store, tally, transaction
    from workbench.__main__ import main

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # as `main` has it where nothing was imported before
    transformers.logging.disable_progress_bar()
    if commit_token_layers is not None:
        transaction.COMMIT_TOKEN_LAYERS = commit_token_layers
        tally.SECONDS = 0.0
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    if pause:
        _rest(store.Writer, pause)
    if dies is not None:
        _die(store.Writer, (transaction, counts), dies)
    sys.argv = ["workbench", *arguments]
    main()


def _rest(writer: Any, pause: float) -> None:
    commit = writer._commit

    def resting_commit(self: Any, pending: Any) -> None:
        commit(self, pending)
        time.sleep(pause)

    writer._commit = resting_commit


def _die(writer: Any, inserting: tuple[Any, ...], where: str) -> None:
    """Replace the step at which the process is to kill itself with one that does."""
    count = 0

    def kill(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    class Connection:
        """A connection that dies before or after COMMIT."""

        def __init__(self, con: Any) -> None:
            self._con = con

        def __getattr__(self, name: str) -> Any:
            return getattr(self._con, name)

        def execute(self, query: str, *rest: Any) -> Any:
            if query == "COMMIT" and where == "before commit":
                kill()
            done = self._con.execute(query, *rest)
            if query == "COMMIT" and where == "after commit":
                kill()
            return done

    insert_table, commit = inserting[0].insert_columns, writer._commit

    def dying_insert(con: Any, table: str, *rest: Any) -> None:
        if count == 3 and table in ("routing", "pairs") and where == "between tables":
            kill()
        insert_table(con, table, *rest)

    def counting_commit(self: Any, pending: Any) -> None:
        nonlocal count
        count += not pending.empty()
        if count != 3 or where == "between tables":
            commit(self, pending)
            return
        from contextlib import contextmanager

        from workbench import connection

        original = connection.writing

        @contextmanager
        def writing(*args: Any, **options: Any):
            with original(*args, **options) as con:
                yield Connection(con)

        connection.writing = writing
        commit(self, pending)

    for module in inserting:
        module.insert_columns = dying_insert
    writer._commit = counting_commit
