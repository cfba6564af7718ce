"""The `workbench` command in processes of their own that something happens to: what `bench reliability` runs.

They are forked from a server that has imported the library once, so that each starts in a fraction of a second.
"""

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

COMMIT_TOKEN_LAYERS = 3_000
"""So that a short run has many transactions."""
BEFORE, INSIDE, AFTER = "before commit", "between tables", "after commit"

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["workbench.capture", "workbench.cli", "transformers.models.olmoe.modeling_olmoe"])


@dataclass(frozen=True)
class Trouble:
    """What happens to a run, besides signals. Numbers of transactions and of passes count from 1; 0: never.

    file_bytes    longest file that the system lets it write
    memory_bytes  how much more memory it gets than it has when it starts
    dies          transaction in which the process kills itself, at `place`: BEFORE, INSIDE or AFTER
    error         "OutOfMemoryError" (torch's) or "MemoryError", raised by the experts in pass `at`
    nan           routers see NaN in pass `at`, for one token
    jump          seconds that the clock is put forward (or back) in transaction `at`
    pause         seconds of rest after each transaction, so that others get to look
    """

    file_bytes: int = 0
    memory_bytes: int = 0
    dies: int = 0
    place: str = BEFORE
    error: str = ""
    nan: bool = False
    jump: float = 0
    at: int = 0
    pause: float = 0


def start(arguments: list[str], log: Path, trouble: Trouble = Trouble()) -> BaseProcess:
    """`workbench …` in a process; what it prints is appended to `log`.

    `log`.told gets a line after each transaction: how many sequences the writer has said to be written.
    """
    process = _processes.Process(target=_main, args=(arguments, str(log), asdict(trouble)), daemon=True)
    process.start()
    return process


def ended(process: BaseProcess, seconds: float = 300) -> int | None:
    """Exit code, negative for a signal; None for one that hung, which is killed."""
    process.join(seconds)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    return code


def pipe() -> tuple[Any, Any]:
    """Two ends, for what a process tells: ours and its own."""
    return _processes.Pipe(duplex=False)


def process(function: Callable[..., Any], *given: Any) -> BaseProcess:
    """A function in a process of its own, begun."""
    made = _processes.Process(target=function, args=given, daemon=True)
    made.start()
    return made


def elsewhere(function: Callable[..., Any], *given: Any, seconds: float = 120) -> tuple[int | None, Any]:
    """What a function returns in a process of its own, and how that ended, as `ended` says; None where it crashed."""
    here, there = pipe()
    begun = process(_answer, there, function, given)
    there.close()
    try:
        answer = here.recv() if here.poll(seconds) else None
    except EOFError:  # it ended without an answer
        answer = None
    return (None if begun.is_alive() and answer is None else ended(begun, 10)), answer


def _answer(there: Any, function: Callable[..., Any], given: tuple[Any, ...]) -> None:
    _end_with(os.getppid())
    there.send(function(*given))


def _main(arguments: list[str], log: str, circumstances: dict[str, Any]) -> None:
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # until there is a command that they could be sent to
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    _end_with(os.getppid())
    import torch
    import transformers

    from workbench import cli, store, tally, transaction
    from workbench.__main__ import main

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # as `main` has it where nothing was imported before
    transformers.logging.disable_progress_bar()
    transaction.COMMIT_TOKEN_LAYERS = COMMIT_TOKEN_LAYERS
    tally.SECONDS = 0.0
    trouble = Trouble(**circumstances)
    _tell(store.Writer, f"{log}.told", trouble.pause)
    if trouble.dies:
        _die(store.Writer, trouble)
    if trouble.error or trouble.nan:
        _spoil(trouble)
    if trouble.jump:
        _put_clock(trouble)
    if trouble.file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (trouble.file_bytes, trouble.file_bytes))
    if trouble.memory_bytes:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + trouble.memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    sys.argv = ["workbench", *arguments]
    app = cli.app

    def begin() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        app()

    cli.app = begin
    main()


def _end_with(parent: int) -> None:
    """Be killed when the server is, and with it the benchmark: PR_SET_PDEATHSIG."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _wrapped(owner: Any, name: str, step: Callable[..., None]) -> None:
    """Have a transaction that isn't empty followed by step(writer, its number)."""
    original, n = getattr(owner, name), 0

    def commit(self: Any, pending: Any) -> None:
        nonlocal n
        empty = pending.empty()
        original(self, pending)
        if not empty:
            n += 1
            step(self, n)

    setattr(owner, name, commit)


def _tell(writer: Any, path: str, pause: float) -> None:
    told = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def tell(self: Any, _: int) -> None:
        os.write(told, f"{self._committed[0]}\n".encode())
        time.sleep(pause)

    _wrapped(writer, "_commit", tell)


def _die(writer: Any, trouble: Trouble) -> None:
    """The process kills itself inside of a transaction."""
    from workbench import connection, counts, transaction

    original, writing, n = writer._commit, connection.writing, 0

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    class Connection:
        def __init__(self, con: Any):
            self._con = con

        def __getattr__(self, name: str) -> Any:
            return getattr(self._con, name)

        def execute(self, query: str, *rest: Any) -> Any:
            if query == "COMMIT" and trouble.place == BEFORE:
                die()
            done = self._con.execute(query, *rest)
            if query == "COMMIT" and trouble.place == AFTER:
                die()
            return done

    @contextmanager
    def fatal(*given: Any, **options: Any):
        with writing(*given, **options) as con:
            yield Connection(con)

    def commit(self: Any, pending: Any) -> None:
        nonlocal n
        n += not pending.empty()
        if n == trouble.dies and not pending.empty():
            if trouble.place == INSIDE:
                for module in (transaction, counts):
                    _before(module, "insert_columns", lambda con, table, *_: table in ("routing", "pairs") and die())
            else:
                connection.writing = fatal
        original(self, pending)

    writer._commit = commit


def _before(module: Any, name: str, step: Callable[..., Any]) -> None:
    original = getattr(module, name)

    def changed(*given: Any) -> Any:
        step(*given)
        return original(*given)

    setattr(module, name, changed)


def _spoil(trouble: Trouble) -> None:
    """A model whose pass number `at` runs out of memory, or has NaN in its routers."""
    import torch

    from workbench import models

    load = models.load

    def spoilt(*given: Any, **options: Any) -> Any:
        model = load(*given, **options)
        n = 0

        def count(*_: Any) -> None:
            nonlocal n
            n += 1

        def fail(*_: Any) -> None:
            if n == trouble.at:
                raise (torch.OutOfMemoryError if trouble.error == "OutOfMemoryError" else MemoryError)(
                    f"{trouble.error}: tried to allocate 20.00 GiB"
                )

        def poison(_: Any, given: tuple[Any, ...]) -> Any:
            if n != trouble.at:
                return None
            hidden = given[0].clone()
            hidden.view(-1, hidden.shape[-1])[0] = float("nan")
            return (hidden, *given[1:])

        model.module.register_forward_pre_hook(count)
        layer = model.layers[len(model.layers) // 2]
        if trouble.nan:
            layer.router.register_forward_pre_hook(poison)
        else:
            layer.experts.register_forward_pre_hook(fail)
        return model

    models.load = spoilt


def _put_clock(trouble: Trouble) -> None:
    """From transaction `at` on, the clock is `jump` seconds off: that of `time.time`, and of what a run says of itself.
    (No process can change the system's own clock without changing it for all.)"""
    from datetime import timedelta

    from workbench import run_rows, store

    ahead, now, clock = 0.0, run_rows.now, time.time

    def step(_: Any, n: int) -> None:
        nonlocal ahead
        ahead = trouble.jump if n >= trouble.at else 0.0

    store.now = run_rows.now = lambda: now() + timedelta(seconds=ahead)
    time.time = lambda: clock() + ahead
    _wrapped(store.Writer, "_commit", step)
