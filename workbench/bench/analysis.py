"""How fast the analyses are: `workbench bench analysis`.

Two parts. **against**: one trace of 200 thousand tokens × 16 layers × top-8 of 64 experts, two languages and two
domains, in a real trace file; each analysis beside straightforward Python with the same definition (the checkout's
`tests/references.py`: loops over tokens, as public scripts have them), and SRP beside a vectorised torch version too.
The numbers of both are compared first, and a difference ends the benchmark. Both start from ids in memory; point
estimates are compared, without resampling on either side. Where the loops would take too long they run on the first
texts of the trace only, and their time is scaled to all tokens in proportion (`reference_tokens` says how many ran).

**large**: 11.5 million tokens of the same kind, made up layer by layer, all windows of SRP and SCH, all cache policies
at all capacities, with resampling, in a process of its own: seconds of each part and the peak of memory.
"""

import importlib.util
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd

from workbench.arrays import from_arrays
from workbench.bench.generated import Generated
from workbench.bench.large import large
from workbench.errors import InputError
from workbench.tracefile import Trace

REFERENCES = Path(__file__).resolve().parents[2] / "tests" / "references.py"
WINDOWS = (4, 16, 64, 256)
CAPACITIES = (8, 16, 32, 48)
"""At which the loops simulate a cache: the workbench simulates all 64 in the same time."""
RATIOS, TOP_K = (1, 2, 3), 8
PARTS = ("against", "large")


def run(quick: bool = False, only: str | None = None) -> dict[str, Any]:
    """What `workbench bench analysis` prints. `only` is one of the parts, against or large."""
    if only not in (None, *PARTS):
        raise InputError(f"there is no part {only!r} of this benchmark; expected {' or '.join(PARTS)}.")
    result: dict[str, Any] = {
        "bench": "analysis",
        "date": datetime.now(UTC).date().isoformat(),
        "device": platform.processor() or platform.machine(),
    }
    if only != "large":
        result["against"] = against(*((4_000, 3) if quick else (200_000, 16)))
    if only != "against":
        result["large"] = large(*((20_000, 2) if quick else (11_500_000, 16)))
    return result


# --- against loops


class Held(Trace):
    """The first texts of a trace, with their ids in memory: what both sides of a comparison start from."""

    def __init__(self, trace: Trace, n_texts: int | None = None):
        self.__dict__.update(trace.__dict__)
        self._seqs, self._lengths, self._starts = (
            values[:n_texts] for values in (trace._seqs, trace._lengths, trace._starts)
        )
        self._held = [trace.experts(layer)[: self.n_tokens] for layer in range(trace.n_layers)]
        self._sequences, self._tokens = super().sequences(), super().tokens()
        self._vocabulary = super().vocabulary()

    def experts(self, layer: int) -> np.ndarray:
        return self._held[layer]

    def sequences(self) -> pd.DataFrame:
        return self._sequences.copy()

    def tokens(self) -> pd.DataFrame:
        return self._tokens.copy()

    def vocabulary(self) -> pd.DataFrame:
        return self._vocabulary.copy()


@dataclass
class Lists:
    """A trace as the loops read it: texts of each layer, tokens as lists of experts; language and ids of each text."""

    layers: list[list[list[list[int]]]]
    langs: list[str]
    token_ids: list[list[int]]
    n_experts: int


def as_lists(trace: Held) -> Lists:
    """The same trace as lists."""
    ends = np.cumsum(trace._lengths)[:-1]
    return Lists(
        [[text.tolist() for text in np.split(trace.experts(layer), ends)] for layer in range(trace.n_layers)],
        trace.sequences()["lang"].tolist(),
        [ids.tolist() for ids in np.split(trace.tokens()["token_id"].to_numpy(), ends)],
        int(trace.layers["n_experts"].max()),
    )


Numbers = np.ndarray | list
Ask = Callable[[Trace], Numbers]
Loops = Callable[[ModuleType, Lists], Numbers]


@dataclass
class Comparison:
    """One analysis, its numbers, and the loops that give the same.

    ask       numbers of the workbench, without resampling
    loops     the same numbers by the references
    complete  the analysis as it is used: with intervals, p values, nulls
    n_texts   texts that the loops run on; None: all
    """

    ask: Ask
    loops: Loops
    complete: Callable[[Trace], Any]
    n_texts: int | None = None


def against(n_tokens: int, n_layers: int, repeats: int = 3) -> dict[str, Any]:
    """Compare, then time, each analysis; seconds by the clock and of processor time (all threads)."""
    references = load_references()
    compared = comparisons()
    with tempfile.TemporaryDirectory() as folder:
        trace = write(Path(folder) / "trace.duckdb", n_tokens, n_layers)
        reading = seconds(lambda: [trace.experts(layer) for layer in range(n_layers)], repeats)
        held = Held(trace)
        result: dict[str, Any] = {
            "tokens": held.n_tokens,
            "layers": n_layers,
            "reading_all_layers": reading,
            "estimates": "point estimates on both sides (n_resamples=0)",
            "analyses": {},
        }
        for name, one in compared.items():
            measured = compare(name, one, held, references, repeats)
            result["analyses"][name] = measured
            print(
                f"  {name:<20} {measured['seconds']:8.3f} s {measured['ratio']:8.0f} × "
                f"({measured['cpu_ratio']:.0f} × in processor time)",
                file=sys.stderr,
                flush=True,
            )
        result["srp_in_torch"] = compare_with_torch(held, references, repeats)
    return result


def compare(name: str, one: Comparison, held: Held, references: ModuleType, repeats: int) -> dict[str, Any]:
    """Equal numbers first; then the times and their ratio."""
    part = held if one.n_texts is None else Held(held, one.n_texts)
    lists = as_lists(part)
    loops: list[Numbers] = []
    slow = seconds(lambda: loops.append(one.loops(references, lists)), 1)
    equal(name, one.ask(part), loops[0])
    fast = seconds(lambda: one.ask(held), repeats)
    scale = held.n_tokens / part.n_tokens
    result = {
        "seconds": fast[0],
        "cpu_seconds": fast[1],
        "reference_seconds": round(slow[0] * scale, 3),
        "reference_cpu_seconds": round(slow[1] * scale, 3),
        "reference_tokens": part.n_tokens,
        "ratio": round(slow[0] * scale / fast[0], 1),
        "cpu_ratio": round(slow[1] * scale / fast[1], 1),
    }
    result["complete_seconds"], result["complete_cpu_seconds"] = seconds(lambda: one.complete(held), 1)
    return result


def equal(name: str, ours: Numbers, theirs: Numbers) -> None:
    """AssertionError unless the numbers are the same, to rounding."""
    a, b = np.asarray(ours, float), np.asarray(theirs, float)
    if a.shape != b.shape or not a.size or not np.allclose(a, b, rtol=1e-9, atol=1e-12, equal_nan=True):
        raise AssertionError(f"{name}: the numbers differ from those of the references; nothing was measured")


def seconds(action: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Least seconds by the clock and of processor time."""
    wall, cpu = [], []
    for _ in range(repeats):
        clock, processor = time.perf_counter(), time.process_time()
        action()
        wall.append(time.perf_counter() - clock)
        cpu.append(time.process_time() - processor)
    return round(min(wall), 4), round(max(min(cpu), 1e-4), 4)


def write(path: Path, n_tokens: int, n_layers: int) -> Trace:
    """A trace file of made-up routing."""
    source = Generated(n_tokens, n_layers=n_layers, length=min(500, n_tokens // 4))
    ids = source.token_ids()
    return from_arrays(
        path,
        np.stack([source.experts(layer) for layer in range(n_layers)], axis=1),
        n_experts=source.layers["n_experts"].tolist(),
        seq=source.sequence_index(),
        sequences=source.sequences()[["lang", "domain", "source"]],
        token_ids=ids,
        vocabulary={int(token): f"token {token}" for token in np.unique(ids)},
    )


def load_references(path: Path = REFERENCES) -> ModuleType:
    """The loops, from the checkout."""
    if not path.is_file():
        raise InputError(
            f"{path} doesn't exist: this benchmark compares with the references kept beside the tests. Run it in a "
            "checkout of the repository, installed with `pip install -e .`."
        )
    spec = importlib.util.spec_from_file_location("references", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare_with_torch(held: Held, references: ModuleType, repeats: int) -> dict[str, Any]:
    """SRP by layer beside the vectorised version; both in the threads that they take by themselves."""
    import torch

    from workbench.analysis.consistency import consistency

    length, n_experts = int(held._lengths[0]), int(held.layers["n_experts"].max())
    windows = [window for window in WINDOWS if window <= length]
    layers = [torch.from_numpy(held.experts(layer).astype(np.int64)) for layer in range(held.n_layers)]

    def vectorised() -> list[list[float]]:
        return [references.srp_in_torch(experts, length, n_experts, windows) for experts in layers]

    def ours() -> np.ndarray:
        return consistency(held, windows=tuple(windows), n_resamples=0)["srp"].to_numpy().reshape(len(layers), -1)

    equal("consistency (torch)", ours(), vectorised())
    fast, slow = seconds(ours, repeats), seconds(vectorised, repeats)
    return {
        "seconds": fast[0],
        "cpu_seconds": fast[1],
        "torch_seconds": slow[0],
        "torch_cpu_seconds": slow[1],
        "torch_threads": torch.get_num_threads(),
        "ratio": round(slow[0] / fast[0], 2),
        "cpu_ratio": round(slow[1] / fast[1], 2),
    }


def comparisons() -> dict[str, Comparison]:
    """What is compared, by the name of the analysis."""
    from workbench.analysis.affinity import affinity
    from workbench.analysis.cache import cache
    from workbench.analysis.coactivation import coactivation
    from workbench.analysis.consistency import consistency
    from workbench.analysis.counting import experts_of
    from workbench.analysis.load import load
    from workbench.analysis.mutual_information import mutual_information
    from workbench.analysis.segment_cache import segment_cache
    from workbench.analysis.specialization import specialization
    from workbench.analysis.vocabulary import choices, frequent, ids_of_tokens, vocabulary

    policies = ("lru", "lfu", "aged-lfu", "window", "lookahead", "belady")
    spans = {"window": 64, "lookahead": 16}
    minimum = 10

    def cached(trace: Trace) -> np.ndarray:
        frame = cache(trace, policies=policies, n_resamples=0)
        return frame[(frame["layer"] >= 0) & frame["capacity"].isin(CAPACITIES)]["hit_rate"].to_numpy()

    def often(trace: Trace) -> np.ndarray:
        """The values alone: the whole analysis has a null for each id, which takes most of its time."""
        found, code, _ = frequent(ids_of_tokens(trace, "input"), minimum, None)
        kept = code >= 0
        counts = [
            choices(trace.experts(layer)[kept, :1], code[kept], len(found), experts_of(trace, layer))
            for layer in range(trace.n_layers)
        ]
        return np.concatenate([each.max(axis=1) / each.sum(axis=1) for each in counts])

    def segments(trace: Trace) -> np.ndarray:
        frame = segment_cache(trace, windows=WINDOWS, ratios=RATIOS, baselines=False, n_resamples=0)
        return frame[frame["layer"] >= 0].sort_values(["layer", "window", "ratio", "count"])["hit_rate"].to_numpy()

    return {
        "load": Comparison(
            lambda trace: load(trace, n_resamples=0)["share"].to_numpy(),
            lambda code, lists: [share for layer in lists.layers for share in code.shares(layer, lists.n_experts)],
            complete=load,
        ),
        "specialization": Comparison(
            lambda trace: specialization(trace, n_resamples=0, n_permutations=0)["share"].to_numpy(),
            lambda code, lists: [
                share
                for layer in lists.layers
                for shares in code.shares_by_group(layer, lists.langs, lists.n_experts).values()
                for share in shares
            ],
            complete=specialization,
        ),
        "mutual_information": Comparison(
            lambda trace: mutual_information(trace, n_resamples=0, n_permutations=0)["mutual_information"].to_numpy(),
            lambda code, lists: [
                code.mutual_information(layer, lists.langs, lists.n_experts) for layer in lists.layers
            ],
            complete=mutual_information,
        ),
        "coactivation": Comparison(
            lambda trace: coactivation(trace, n_resamples=0)["probability"].to_numpy(),
            lambda code, lists: [
                value
                for layer in lists.layers
                for i, row in enumerate(code.together(layer, lists.n_experts))
                for j, value in enumerate(row)
                if i != j
            ],
            n_texts=40,
            complete=coactivation,
        ),
        "affinity": Comparison(
            lambda trace: affinity(trace, n_resamples=0)["probability"].to_numpy(),
            lambda code, lists: [
                value
                for layer, following in zip(lists.layers[:-1], lists.layers[1:], strict=True)
                for row in code.onward(layer, following, lists.n_experts)
                for value in row
            ],
            n_texts=40,
            complete=affinity,
        ),
        "vocabulary": Comparison(
            often,
            lambda code, lists: [
                value for layer in lists.layers for value in code.favourites(layer, lists.token_ids, minimum).values()
            ],
            complete=vocabulary,
        ),
        "consistency": Comparison(
            lambda trace: consistency(trace, windows=WINDOWS, n_resamples=0)["srp"].to_numpy(),
            lambda code, lists: [
                found["srp"] if (found := code.srp([(layer, lists.n_experts)], window)) else np.nan
                for layer in lists.layers
                for window in WINDOWS
            ],
            n_texts=4,
            complete=consistency,
        ),
        "cache": Comparison(
            cached,
            lambda code, lists: [
                code.hit_rate(layer, capacity, policy, spans.get(policy, 1))
                for layer in lists.layers
                for policy in policies
                for capacity in CAPACITIES
            ],
            n_texts=4,
            complete=lambda trace: cache(trace, policies=policies),
        ),
        "segment_cache": Comparison(
            segments,
            lambda code, lists: [
                rate
                for layer in lists.layers
                for window in WINDOWS
                for ratio in RATIOS
                for rate in code.segment_hit_rates(layer, ratio * TOP_K, window)
            ],
            n_texts=4,
            complete=segment_cache,
        ),
    }
