"""vLLM in processes of its own, from start to end: what they are asked, what they answer, why they died.

`vllm_worker` is what they execute, and says what passes between it and this process.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from workbench.engines import vllm_worker
from workbench.errors import InputError, RunError
from workbench.tokenization import Sequence

QUIET = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # for the sampled token that is left out: the model never reads it
}
_ERROR = re.compile(r"^(?:\([^)]*\) )?(?:ERROR [^\]]*\] )?\s*((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)")
"""A line of vLLM's log that says what went wrong: an exception's, logged as an error or not logged at all."""


class Processes:
    """vLLM, started once for each data-parallel rank; what is in `folder` passes between it and this process."""

    def __init__(self, folder: Path, log: Path):
        self.folder, self.log = folder, log
        self.started: list[subprocess.Popen] = []
        self._asked = 0

    def start(self, interpreter: str, ranks: int) -> None:
        # A script's folder comes first where it looks for modules; the workbench's would hide vLLM behind its own.
        script = shutil.copy(vllm_worker.__file__, self.folder / "workbench_vllm.py")
        port = str(_free_port())
        with self.log.open("wb") as log:
            for rank in range(ranks):
                several = {"RANK": str(rank), "SIZE": str(ranks), "MASTER_IP": "127.0.0.1", "MASTER_PORT": port}
                parallel = {f"VLLM_DP_{name}": value for name, value in several.items()} if ranks > 1 else {}
                environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ | QUIET | parallel
                try:
                    process = subprocess.Popen(
                        [interpreter, script, self.folder, str(rank)],
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        cwd=self.folder,
                        env=environment,
                        start_new_session=True,
                    )
                except OSError as error:
                    why = error.strerror or error
                    raise InputError(f"{interpreter} can't be run ({why}): name a Python interpreter.") from error
                self.started.append(process)

    def begin(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What the first says of itself once all have loaded the model. InputError if the environment can't."""
        for process in self.started:
            self._tell(process, request)
        for rank in range(len(self.started)):
            self._wait(self._ready(rank))
            self._check_accepted(rank)
        return json.loads(self._ready(0).read_bytes())

    def ask(self, number: int, batch: list[Sequence]) -> None:
        table = pa.table({"token_ids": pa.array([sequence.token_ids for sequence in batch], pa.list_(pa.int32()))})
        with pa.OSFile(str(self.folder / f"{number}.asked"), "wb") as file, pa.ipc.new_file(file, table.schema) as sink:
            sink.write_table(table)
        self._tell(self.started[self._asked % len(self.started)], number)
        self._asked += 1

    def answer(self, number: int) -> bytes:
        said = self._wait(self.folder / f"{number}.answer")
        for kind in ("asked", "answer"):
            (self.folder / f"{number}.{kind}").unlink()
        return said

    def end(self) -> None:
        """Let them end by themselves, so that vLLM gives back what the system lent it."""
        for process in self.started:
            self._tell(process, None)
        for process in self.started:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                return  # it has answered everything

    def _ready(self, rank: int) -> Path:
        return self.folder / f"{rank}.ready"

    def _check_accepted(self, rank: int) -> None:
        """InputError if the process has refused what it was asked, after which it ends."""
        ready = self._ready(rank)
        said = json.loads(ready.read_bytes()) if ready.exists() else {}
        if "refused" in said:
            raise InputError(f"{self.started[rank].args[0]} {plain(said['refused'])}.")  # type: ignore[index]

    def _tell(self, process: subprocess.Popen, what: Any) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(what).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            process.wait()
            raise self._failed(process) from None

    def _wait(self, path: Path) -> bytes:
        """The content of a file once it is there. RunError if a process ends before, InputError if it has refused."""
        while not path.exists():
            ended = next((rank for rank, process in enumerate(self.started) if process.poll() is not None), None)
            if ended is not None and not path.exists():  # it may have come in between
                self._check_accepted(ended)
                raise self._failed(self.started[ended])
            time.sleep(0.02)
        return path.read_bytes()

    def _failed(self, process: subprocess.Popen) -> RunError:
        code = process.returncode
        how = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
        with tempfile.NamedTemporaryFile(prefix="workbench-vllm-", suffix=".log", delete=False) as kept:
            kept.write(self.log.read_bytes())
        memory = ""
        said = _last_words(self.log.read_text(errors="replace"))
        if code == -signal.SIGKILL or re.search(r"(?i)memory|KV cache", said):
            memory = " If memory ran out: --engine-arg gpu_memory_utilization=…, a smaller --max-length, more GPUs."
        return RunError(f"vLLM {how}: {said}{memory} All it said is in {kept.name}. Continue with --resume.")


@contextmanager
def running(interpreter: str, folder: Path, ranks: int) -> Iterator[Processes]:
    """Processes that end with the block, with all that they have started."""
    processes = Processes(folder, folder / "log")
    try:
        processes.start(interpreter, ranks)
        yield processes
    finally:
        for process in processes.started:
            _kill(process)


def _kill(process: subprocess.Popen) -> None:
    """End a process and its group, first asking it to."""
    patience = time.monotonic() + 5
    with suppress(ProcessLookupError, PermissionError):  # none is left, or only what the system has to reap
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < patience:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _last_words(log: str) -> str:
    """The first and the last error that a log names, else its last lines."""
    lines = [line.rstrip() for line in log.splitlines() if line.strip()]
    errors = [match[1] for match in map(_ERROR.match, lines) if match]
    chosen = dict.fromkeys([errors[0], errors[-1]] if errors else lines[-3:])
    return plain(" … ".join(chosen)) + ("" if chosen else "it said nothing") + "."


def plain(text: str) -> str:
    """Without what a terminal would obey, and not too long."""
    return "".join(char if char.isprintable() else " " for char in str(text))[:600].rstrip(". ")
