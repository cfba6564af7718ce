"""What runs in a worker of `workbench.engines.ray`: shards of a corpus in, parts of a trace out."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
import torch

from workbench import parts
from workbench.errors import InputError, RunError
from workbench.forward import run_batch
from workbench.job import n_tokens, observing, token_ids
from workbench.location import located
from workbench.models import Model, load
from workbench.recipe import Recipe
from workbench.tokenization import Sequence, token_texts
from workbench.transaction import COMMIT_BYTES, Transaction, as_json, clean

TRIES = 5
"""How often a shard is begun: each time but the last its worker died."""
Batch = tuple[int, list[Sequence]]
"""A batch and its number among all of the run."""


@dataclass(frozen=True)
class Work:
    """What a worker has to know besides its shards.

    folder       where the parts go
    run, layers  the run's name, and its rows in the table `layers`
    record, recipe, experts  as `workbench.job.Job` has them
    model, loading           arguments of `workbench.load`
    generate     tokens to generate after each sequence
    """

    folder: str
    run: str
    layers: list[dict[str, Any]]
    record: list[str]
    model: str
    loading: dict[str, Any]
    recipe: Recipe | None
    experts: Literal["model", "fused"]
    generate: int


class Worker:
    """An actor that holds the model, and writes what it does with a shard as parts."""

    def __init__(self, work: Work, threads: int, tries: Any):
        self._work, self._threads, self._tries = work, threads, tries
        self._texts: dict[int, str] = {}  # of the token ids so far

    @cached_property
    def _model(self) -> Model:
        return load(self._work.model, **self._work.loading)  # with the first shard: so errors reach the driver as data

    def __call__(self, shards: pa.Table) -> pa.Table:
        """A row a shard: OUTCOME. What goes wrong as the user can expect is in it; everything else is raised."""
        return pa.Table.from_pylist([self._outcome(row) for row in shards.to_pylist()], schema=OUTCOME)

    def _outcome(self, row: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(self._threads)
        try:
            touched, error = self._trace(unpacked(row["shard"])), None
        except (InputError, RunError) as raised:
            touched, error = [], raised
        return {
            "tokens": row["tokens"],
            "touched": touched,
            "error": None if error is None else str(error),
            "refused": isinstance(error, InputError),
        }

    def _trace(self, shard: list[Batch]) -> list[int]:
        """Write the parts; returns what each intervention touched."""
        work, model = self._work, self._model
        gathered, first = Transaction(work.run, work.record, work.layers), shard[0][0]
        tried: Any = ray.get(self._tries.begin.remote(first))
        if tried > TRIES:
            raise RunError(
                f"{TRIES} workers died on the texts from {shard[0][1][0].seq} on: memory ran out, or a library "
                "crashed. Trace with a smaller --batch-tokens or fewer --workers"
            )
        with observing(model, work.record, work.recipe, work.experts, idle=True) as (recorder, applied):
            for number, batch in shard:
                if gathered.nbytes >= COMMIT_BYTES:
                    self._write(first, gathered)
                    first = number
                block = run_batch(model, recorder, batch, work.generate, predict="predictions" in work.record)
                ids = token_ids(block)
                self._texts |= token_texts(model.tokenizer, sorted(ids - self._texts.keys()))
                gathered.name({token: self._texts[token] for token in ids}, set())
                gathered.add(block)
            self._write(first, gathered)
            return [] if applied is None else applied.touched

    def _write(self, first: int, gathered: Transaction) -> None:
        # A folder can hold several runs, and each has a batch of this number.
        parts.write(located(self._work.folder), f"{parts.file_of(self._work.run)}-{first:08}", gathered)
        gathered.clear()


OUTCOME = pa.schema(
    [("tokens", pa.int64()), ("touched", pa.list_(pa.int64())), ("error", pa.string()), ("refused", pa.bool_())]
)


# --- shards


def shards(found: Iterable[list[Sequence]], done: set[int], size: int, generate: int) -> Iterator[pa.Table]:
    """Consecutive batches, numbered, of at least `size` tokens together; batches that are done are left out.

    A shard is a table of one row: its batches as `packed`, and its tokens, with what may be generated.
    """
    shard: list[Batch] = []
    tokens = 0
    for number, batch in enumerate(found):
        if not done.issuperset(sequence.seq for sequence in batch):
            shard.append((number, batch))
            tokens += n_tokens(batch, generate)
        if tokens >= size:
            yield pa.table({"shard": [packed(shard)], "tokens": [tokens]})
            shard, tokens = [], 0
    if shard:
        yield pa.table({"shard": [packed(shard)], "tokens": [tokens]})


_TEXTS = ("sha256", "lang", "domain", "source", "segment_id")
_SEQUENCES = pa.schema(
    [
        ("batch", pa.int64()),
        ("seq", pa.int64()),
        ("token_ids", pa.list_(pa.int32())),
        ("phase", pa.list_(pa.uint8())),
        *((name, pa.string()) for name in (*_TEXTS, "metadata")),
    ]
)


def packed(shard: list[Batch]) -> bytes:
    """Batches as a table in Arrow's IPC format, a row a sequence; texts as a trace holds them."""
    rows = [
        {"batch": number, "seq": one.seq, "token_ids": one.token_ids, "phase": one.phase}
        | {name: clean(getattr(one, name)) for name in _TEXTS}
        | {"metadata": as_json(one.metadata)}
        for number, batch in shard
        for one in batch
    ]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, _SEQUENCES) as stream:
        stream.write_table(pa.Table.from_pylist(rows, schema=_SEQUENCES))
    return sink.getvalue().to_pybytes()


def unpacked(shard: bytes) -> list[Batch]:
    """What `packed` was given."""
    found: dict[int, list[Sequence]] = {}
    for row in pa.ipc.open_stream(shard).read_all().to_pylist():
        batch = found.setdefault(row.pop("batch"), [])
        arrays = {"token_ids": np.array(row["token_ids"], np.int32), "phase": np.array(row["phase"], np.uint8)}
        batch.append(Sequence(**row | arrays | {"metadata": json.loads(row["metadata"])}))
    return list(found.items())
