"""A cluster of Ray: connected or started, and what workers get of it."""

import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray._private import worker as driver
from ray.exceptions import RayError

from workbench.errors import InputError, RunError
from workbench.schema import first_line

TOKEN = (
    " A cluster that `ray start` made asks for a token: set RAY_AUTH_MODE=token, and have the cluster's token in "
    "~/.ray/auth_token or in RAY_AUTH_TOKEN."
)
"""Ray says of a missing token only that it failed to connect."""
OBJECT_STORE = 256 << 20
"""Bytes of shards that Ray keeps in memory on one machine; beyond that they go to its temporary folder."""


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Ray, connected or started, and left as it was."""
    if ray.is_initialized():
        yield
        return
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"} | os.environ
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    own = where == "local"
    # Sockets are in it, whose names can't be long; TMPDIR often is.
    temporary = tempfile.mkdtemp(prefix="ray", dir="/tmp") if own and os.path.isdir("/tmp") else None
    local = {"include_dashboard": False, "object_store_memory": OBJECT_STORE, "_temp_dir": temporary} if own else {}
    driver._worker_logs_enabled = False  # it prints a paragraph where a worker dies
    try:
        try:
            with _quiet(), _own_handler(signal.SIGTERM):
                ray.init(where, log_to_driver=False, logging_level=logging.ERROR, **local)
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            raise RunError(
                f"Ray ({where}) can't be used: {first_line(error).rstrip('.')}.{'' if own else TOKEN}"
            ) from error
        yield
    finally:
        ray.shutdown()
        driver._worker_logs_enabled = True
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _own_handler(which: signal.Signals) -> Iterator[None]:
    """The signal's handler after the block is that of before: Ray's would abort this process."""
    handler = signal.getsignal(which)
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():  # no other may set one
            signal.signal(which, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on the terminal from code that isn't Python's: Ray's says there which level of logging it was given."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@dataclass(frozen=True)
class Claim:
    """What the workers get of a cluster: so many CPUs and GPUs are each one's place, and so many threads it uses."""

    workers: int
    cpus: float
    gpus: float
    threads: int


def claim_of(workers: int, gpus: float) -> Claim:
    """Equal places for so many workers. InputError if the cluster hasn't so many GPUs.

    Workers that claimed all CPUs would leave none for Ray's own tasks, and all would wait for ever. Half of the CPUs,
    in pieces of at most one, are to be had on any cluster that nobody else uses, however they spread over machines.
    """
    there = ray.cluster_resources()
    cpus, all_gpus = there.get("CPU", 1.0), there.get("GPU", 0.0)
    if gpus and workers > (all_gpus * int(1 / gpus + 1e-6) if gpus <= 1 else all_gpus // gpus):
        raise InputError(
            f"{workers} workers with {gpus:g} GPUs each don't fit a cluster with {all_gpus:g} GPUs: ask for fewer "
            "--workers, or for a fraction with --worker-gpus."
        )
    return Claim(workers, int(min(1.0, cpus / workers / 2) * 1e4) / 1e4, gpus, max(1, int(cpus // workers)))


def stalled(claim: Claim, seconds: float) -> RunError:
    """That the workers have waited so long for their place."""
    return RunError(
        f"{claim.workers} workers with {claim.cpus:g} CPUs and {claim.gpus:g} GPUs each found no place within "
        f"{seconds:g} s: the cluster has {_listed(ray.cluster_resources())}, of which "
        f"{_listed(ray.available_resources())} are free. Wait, or ask for fewer --workers; then --resume."
    )


def _listed(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{resources.get(name, 0.0):g} {name}s" for name in ("CPU", "GPU"))
