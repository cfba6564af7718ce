"""A run that is about to begin, and what running it takes: shared by the engines that run a model in transformers."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from workbench.fused_experts import fused_experts
from workbench.fused_routing import fused_routing
from workbench.intervening import Intervened, intervene
from workbench.models import Model
from workbench.recipe import Recipe
from workbench.recorder import Recorder
from workbench.schema import COUNTS, UNKNOWN_TOKEN
from workbench.store import Block
from workbench.tally import Tally
from workbench.tokenization import Sequence


@dataclass(frozen=True)
class Job:
    """A run that can begin: all that was asked is checked, and nothing is written yet.

    header, layers  rows of the tables `runs` and `layers`
    record          of `schema.RECORDABLE`, in its order; or just `counts`
    experts         the implementation that the experts run by
    texts           the sequences, in order, read anew at each call
    n_tokens        of all sequences, with what may be generated after them
    longest         tokens of the longest sequence
    tally           of a run that counts
    """

    model: Model
    header: dict[str, Any]
    layers: list[dict[str, Any]]
    record: list[str]
    recipe: Recipe | None
    experts: Literal["model", "fused"]
    texts: Callable[[], Iterator[Sequence]]
    n_tokens: int
    longest: int
    tally: Tally | None


@contextmanager
def observing(
    model: Model,
    record: Iterable[str],
    recipe: Recipe | None,
    experts: Literal["model", "fused"],
    *,
    idle: bool = False,
) -> Iterator[tuple[Recorder, Intervened | None]]:
    """The model as a run needs it: the experts' implementation, interventions in force, and hooks that record.

    idle  as `workbench.intervene` has it
    """
    with ExitStack() as held:
        held.enter_context(_fused(model, experts))
        applied = None if recipe is None else held.enter_context(intervene(model, recipe, idle=idle))
        recorder = held.enter_context(Recorder(model, observed(record)))
        held.enter_context(torch.inference_mode())
        yield recorder, applied


@contextmanager
def _fused(model: Model, experts: Literal["model", "fused"]) -> Iterator[None]:
    """The experts by one implementation, and fused routers with fused experts on a GPU; on a CPU they gain nothing."""
    on_gpu = experts == "fused" and model.device.type != "cpu"
    with fused_experts(model, experts), fused_routing(model) if on_gpu else nullcontext():
        yield


def observed(record: Iterable[str]) -> set[str]:
    """What the recorder has to keep so that `record` can be written."""
    return {"probabilities" if name == "profiles" else name for name in record} - {"ids", "predictions", COUNTS}


def n_tokens(batch: list[Sequence], generate: int) -> int:
    """Tokens of a batch, with what may be generated after its sequences."""
    return sum(len(sequence.token_ids) + generate for sequence in batch)


def token_ids(block: Block) -> set[int]:
    """Those whose texts a trace has: of the tokens, and of what the model predicts."""
    ids = [block.tokens[name] for name in ("token_id", "predicted") if name in block.tokens]
    return set(np.unique(np.concatenate(ids)).tolist()) - {UNKNOWN_TOKEN}


def progress_bar(job: Job, shown: bool) -> tqdm:
    """A bar of the run's tokens; on a terminal only."""
    return tqdm(
        total=job.n_tokens,
        desc=f"tracing {Path(job.model.name).name}",
        unit=" tokens",
        unit_scale=True,
        disable=None if shown else True,
    )


def untold(done: int, total: int) -> None:
    """Nobody wants to know how far a run is."""
