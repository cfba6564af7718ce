"""Analyses in processes of their own, so that whoever asked can watch them, cancel them, and do something else.

    workers = Workers()
    answer = workers.ask(Asked("specialization", (("by", "lang"),), path="udhr.duckdb", run="demo.udhr"))
    answer.progress            # (3, 6): layers read, of all of them
    answer.cancel()            # stops the process
    answer.table()             # waits; what the analysis returns, or raises what it raised

The same question is answered once: asking again returns the same `Answer`, until it is pushed out by later ones.
"""

import atexit
import itertools
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock, Thread
from typing import Any

import numpy as np
import pandas as pd
from loky.backend.context import get_context
from pebble import ProcessExpired, ProcessFuture, ProcessPool

from workbench import analysis, slicing
from workbench.errors import RunError
from workbench.tracefile import Trace

SLOTS = 256
"""Questions whose progress is kept apart: more than can wait at a time."""
KEPT_BYTES = 256 * 2**20
"""Memory for answers that were given."""
LEFT = -1
"""In place of a question's progress: it was taken back."""
Tell = Callable[[int], None]
"""Hears how far an answer is: the layers that were read, or the checks that were made."""


@dataclass(frozen=True)
class Asked:
    """A question, as values that can be compared and sent to another process.

    name       the analysis, or one of OTHERS
    arguments  pairs of name and value; values are hashable
    path, run  the trace; "" for an analysis of a model
    n_tokens   of the run when it was asked: a run that has grown since is another question
    where      a filter of its sequences (workbench.slicing.where), "" for none
    sample     tokens to draw (workbench.slicing.sample), 0 for all
    model      name of the model, for analyses that look at one
    started    when the run was started (of two runs both), as text: another one of its name may take its place
    """

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()
    path: str = ""
    run: str = ""
    n_tokens: int = 0
    where: str = ""
    sample: int = 0
    model: str = ""
    started: str = ""


@dataclass(eq=False)
class Answer:
    """What becomes of a question."""

    asked: Asked
    future: ProcessFuture
    counter: np.ndarray = field(repr=False)
    slot: int
    n_layers: int
    started: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> bool:
        return self.future.done()

    @property
    def progress(self) -> tuple[int, int]:
        """Layers read so far, and all of them (0: not known). Some analyses read twice, and stay at all of them."""
        return max(0, min(int(self.counter[self.slot]), self.n_layers)), self.n_layers

    @property
    def seconds(self) -> float:
        """Since it was asked."""
        return time.monotonic() - self.started

    def wait(self, seconds: float) -> bool:
        """Whether it is done after at most so long."""
        try:
            self.future.exception(timeout=seconds)
        except TimeoutError:
            return False
        except CancelledError:
            pass
        return True

    def cancel(self) -> None:
        """Stop it: its process ends, and another one takes its place."""
        self.future.cancel()

    @property
    def cancelled(self) -> bool:
        return self.future.cancelled()

    def table(self) -> pd.DataFrame:
        """Wait for the table. InputError or RunError as the analysis raised them, RunError if it was cancelled."""
        try:
            return self.future.result()
        except CancelledError:
            raise RunError(f"{self.asked.name} was cancelled.") from None
        except (ProcessExpired, BrokenProcessPool) as error:
            raise RunError(
                f"{self.asked.name} ended its process ({error}), most likely for want of memory: take fewer tokens or "
                "another grouping."
            ) from error
        except MemoryError as error:
            raise RunError(f"{self.asked.name} ran out of memory: take fewer tokens or another grouping.") from error


class Workers:
    """Processes that answer questions, `n` at a time; they start with the first question."""

    def __init__(self, n: int = 2) -> None:
        self._n = n
        self._folder = TemporaryDirectory(prefix="workbench-")
        self._file = Path(self._folder.name) / "progress"
        self._counter = np.memmap(self._file, np.int32, "w+", shape=SLOTS)
        self._pool = self._begin()
        self._slots = itertools.count()
        self._answers: OrderedDict[Asked, Answer] = OrderedDict()
        self._lock = Lock()
        atexit.register(self.close)

    def _begin(self) -> ProcessPool:
        # loky's processes are like spawned ones (a fork would inherit locks that threads hold), but don't run the main
        # script again, which in a Streamlit server is the page.
        return ProcessPool(self._n, initializer=_start, context=get_context("loky"))

    def warm(self) -> None:
        """Start the processes now, so that the first question doesn't wait for their imports."""
        self._pool.schedule(_ready)

    def ask(self, asked: Asked, n_layers: int = 0) -> Answer:
        """The answer to a question, begun if it wasn't; one that was cancelled or whose process died begins anew."""
        with self._lock:
            known = self._answers.pop(asked, None)
            if known is None or (known.done and (known.cancelled or _lost(known))):
                slot = next(self._slots) % SLOTS
                self._counter[slot] = 0
                if not self._pool.active:  # a process died at a moment at which it had no question
                    self._pool = self._begin()
                future = self._pool.schedule(_unless_left, args=[asked, self._file, slot])
                known = Answer(asked, future, self._counter, slot, n_layers)
            self._answers[asked] = known
            self._forget()
            return known

    def leave(self, asked: Asked) -> None:
        """Take a question back, unless a process is at it; whoever asks again begins anew."""
        with self._lock:
            known = self._answers.get(asked)
            if known is not None and not known.done and not known.future.running():
                del self._answers[asked]
                self._counter[known.slot] = LEFT  # cancelled, it would end the process that comes to it

    def known(self, asked: Asked) -> Answer | None:
        """The answer to a question if it was asked, whatever became of it."""
        return self._answers.get(asked)

    def close(self) -> None:
        """End the processes, whatever they do."""
        atexit.unregister(self.close)
        self._pool.stop()
        self._pool.join()
        self._folder.cleanup()

    def _forget(self) -> None:
        """Drop the oldest answers that are done, beyond KEPT_BYTES."""
        sizes = {asked: _size(one) for asked, one in self._answers.items()}
        total = sum(sizes.values())
        for asked in list(self._answers)[:-1]:
            if total <= KEPT_BYTES:
                break
            total -= sizes[asked]
            if sizes[asked]:
                del self._answers[asked]


def answer(asked: Asked, tell: Tell | None = None) -> pd.DataFrame:
    """Answer a question in this process."""
    if asked.name in OTHERS:
        return OTHERS[asked.name](asked, tell)
    ask = analysis.find(asked.name)[0]
    arguments = dict(asked.arguments)
    if analysis.subject(ask) == "model":
        from workbench.models import load

        return ask(load(asked.model), **arguments)
    trace = part(Trace(asked.path, asked.run), asked.where, asked.sample)
    return ask(trace if tell is None else _watched(trace, tell), **arguments)


def _validate(asked: Asked, tell: Tell | None) -> pd.DataFrame:
    from workbench.validate import validate

    return validate(asked.path, asked.run, progress=tell)


def _describe(asked: Asked, tell: Tell | None) -> pd.DataFrame:
    from workbench.models import describe

    described = describe(asked.model, local=True, **dict(asked.arguments))
    return pd.DataFrame([{name: value for name, value in described.items() if name != "layers"}])


def _query(asked: Asked, tell: Tell | None) -> pd.DataFrame:
    from workbench import query

    return query.ask(asked.path, dict(asked.arguments)["sql"], memory=query.MEMORY)


OTHERS = {"validate": _validate, "describe": _describe, "query": _query}
"""Questions beside the analyses: problems of a run, facts of a checkpoint on this machine (one row), a user's SQL."""


def part(trace: Trace, where: str, sample: int) -> Trace:
    """The sequences of a trace that a question is about; InputError for a wrong filter."""
    trace = slicing.where(trace, where) if where.strip() else trace
    return slicing.sample(trace, sample) if sample else trace


class _Watched(Trace):
    """A Trace that says which layers it has read."""

    tell: Tell
    seen: set[int]

    def _read(self, layer: int, *columns: str) -> Any:
        self.seen.add(layer)
        self.tell(len(self.seen))
        return super()._read(layer, *columns)


def _watched(trace: Trace, tell: Tell) -> Trace:
    watched = _Watched.__new__(_Watched)
    watched.__dict__.update(trace.__dict__, tell=tell, seen=set())
    return watched


def _unless_left(asked: Asked, file: Path, slot: int) -> pd.DataFrame:
    """Answer a question in a worker, unless it was taken back before its turn came: then CancelledError."""
    if np.memmap(file, np.int32, "r", shape=SLOTS)[slot] == LEFT:
        raise CancelledError
    return answer(asked, partial(_tell, file, slot))


# No global of this file may be set in a worker: where this module is pickled by value, as nnsight has it done for what
# it sends away, the functions of a task and of the initializer don't share their globals.
def _tell(file: Path, slot: int, done: int) -> None:
    """Write how far a question is into its place of the file that the asking process reads."""
    np.memmap(file, np.int32, "r+", shape=SLOTS)[slot] = done


def _start() -> None:
    """Begin a worker, which ends with the process that it works for, however that ends."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _ready() -> None:
    """Nothing: importing this file was the work."""


def _lost(known: Answer) -> bool:
    return isinstance(known.future.exception(), ProcessExpired | BrokenProcessPool | MemoryError)


def _size(known: Answer) -> int:
    """Bytes of a table that is there, 0 while it isn't."""
    if not known.done or known.cancelled or known.future.exception() is not None:
        return 0
    return int(np.sum(known.future.result().memory_usage(deep=True))) or 1
