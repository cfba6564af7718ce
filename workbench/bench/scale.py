"""Beyond one process and one memory: `workbench bench scale`.

    load         a folder of parts becomes one DuckDB file (`workbench merge`): million token-layers a second
    out_of_core  questions to a trace four times as large as the memory that DuckDB is given, over the same with all
    workers      `--engine ray` with a worker a core over one process that uses all of them

What a measurement is made of is in MEASUREMENTS: name -> function of the folder of parts.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench import analysis, connection, parts
from workbench.bench.generated import Generated
from workbench.bench.large import peak
from workbench.bench.made_up_trace import block, word
from workbench.combine import merge
from workbench.tracefile import Trace
from workbench.validate import validate

N_LAYERS, LENGTH = 16, 500
PART_TOKEN_LAYERS = 1_000_000
TIMES_LARGER = 4
LEAST_MEMORY = 64 << 20
"""However small the trace: with 26 MB DuckDB's joins and sorts of two threads ran out of memory."""

QUESTIONS: dict[str, Callable[[Trace], pd.DataFrame]] = {
    "specialization": lambda trace: analysis.find("specialization")[0](
        trace, by="lang", n_resamples=20, n_permutations=20
    ),
    "coactivation": lambda trace: analysis.find("coactivation")[0](trace),
    "validate": lambda trace: validate(trace.path),
    "sql: every set of experts": lambda trace: trace.sql(
        "SELECT count(*) AS sets, max(n) AS most FROM (SELECT layer, experts, count(*) AS n FROM routing GROUP BY ALL)"
    ),
    "sql: all rows sorted": lambda trace: trace.sql(
        "SELECT sum(place * pos)::HUGEINT::VARCHAR AS s FROM "
        "(SELECT pos, row_number() OVER (ORDER BY entropy, layer, seq, pos) AS place FROM routing)"
    ),
}


def bench_scale(n_tokens: int = 600_000, *, repeats: int = 3) -> dict[str, Any]:
    """Write `n_tokens` × 16 layers × top-8 of 64 experts, with weights, entropy and margin, as parts; measure on them.

    Returns for `load` and `write` million token-layers a second (of `load` the best of `repeats`; ids and weights of
    two layers are compared first); for each question of `out_of_core` the seconds with all memory and with a quarter of
    the trace's size, in processes of their own, their ratio, and their most memory. Answers are compared.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "parts"
        token_layers, seconds = write_parts(folder, n_tokens)
        result: dict[str, Any] = {
            "bench": "scale",
            "date": datetime.now(UTC).date().isoformat(),
            "device": platform.processor() or platform.machine(),
            "token_layers": token_layers,
            "write": {"million_token_layers_per_s": round(token_layers / seconds / 1e6, 2)},
        }
        for name, measure in MEASUREMENTS.items():
            result[name] = measure(folder, repeats)
        return result


def run(quick: bool = False) -> dict[str, Any]:
    """What `workbench bench scale` prints."""
    return bench_scale(20_000, repeats=1) if quick else bench_scale()


def write_parts(folder: Path, n_tokens: int) -> tuple[int, float]:
    """Write a trace of made-up routing; returns its token-layers, and the seconds that writing the parts took."""
    source = Generated(n_tokens, n_layers=N_LAYERS, length=LENGTH)
    random = np.random.default_rng(0)
    experts = [source.experts(layer) for layer in range(N_LAYERS)]
    token_ids = source.token_ids()
    texts = {int(token): word(int(token)) for token in np.unique(token_ids)}
    layers = [{"name": f"layers.{layer}", "n_experts": 64, "top_k": 8} for layer in range(N_LAYERS)]
    parts.begin(folder, {"run": "made-up", "recorded": ["ids", "weights", "entropy", "margin"]}, layers)
    seconds = 0.0
    each = PART_TOKEN_LAYERS // (N_LAYERS * LENGTH)
    for first in range(0, source.n_sequences, each):
        last = min(first + each, source.n_sequences)
        own = slice(first * LENGTH, last * LENGTH)
        made = block(source, first, last, token_ids[own], [ids[own] for ids in experts], random)
        started = time.perf_counter()
        gathered = parts.transaction(folder)
        gathered.name(texts, set())
        gathered.add(made)
        parts.write(folder, f"{first // each:06}", gathered)
        seconds += time.perf_counter() - started
    parts.finish(folder, "made-up")
    return source.n_tokens * N_LAYERS, seconds


def load(folder: Path, repeats: int) -> dict[str, Any]:
    """Parts into one DuckDB file."""
    there = Trace(folder)
    seconds = []
    out = folder.parent / "load.duckdb"
    for _ in range(repeats):
        started = time.perf_counter()
        merged = merge([folder], out, overwrite=True)
        seconds.append(time.perf_counter() - started)
        for layer in (0, N_LAYERS - 1):
            if not (
                np.array_equal(there.experts(layer), merged.experts(layer))
                and np.array_equal(there.weights(layer), merged.weights(layer))
            ):
                raise AssertionError(f"layer {layer} of the file is not that of the parts")
    rate = there.n_tokens * N_LAYERS / min(seconds) / 1e6
    return {"million_token_layers_per_s": round(rate, 2), "bytes": out.stat().st_size}


def out_of_core(folder: Path, repeats: int) -> dict[str, Any]:
    """Each of QUESTIONS to the file, with a limit and without."""
    file = folder.parent / "file.duckdb"
    merge([folder], file)
    size = file.stat().st_size
    memory = max(LEAST_MEMORY, size // TIMES_LARGER)
    questions = {}
    for name in QUESTIONS:
        plain, limited = (_asked(file, name, limit) for limit in (None, memory))
        if plain["answer"] != limited["answer"]:
            raise AssertionError(f"{name}: another answer with {memory:,} bytes of memory")
        print(f"  {name}: {plain['seconds']} s, limited {limited['seconds']} s", file=sys.stderr, flush=True)
        questions[name] = {
            "seconds": plain["seconds"],
            "limited_seconds": limited["seconds"],
            "ratio": round(limited["seconds"] / plain["seconds"], 2),
            "peak_bytes": plain["peak_bytes"],
            "limited_peak_bytes": limited["peak_bytes"],
        }
    return {"bytes": size, "memory": memory, "times_larger": round(size / memory, 2), "questions": questions}


def workers(folder: Path, repeats: int) -> dict[str, Any]:
    """See `workbench.bench.workers`, which is imported here alone: it loads torch, and memory is measured above."""
    from workbench.bench.workers import workers as measure

    return measure(folder, repeats)


MEASUREMENTS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "load": load,
    "out_of_core": out_of_core,
    "workers": workers,
}


def _asked(file: Path, question: str, memory: int | None) -> dict[str, Any]:
    """What `answer` prints, in a process whose DuckDB may use so many bytes."""
    limits = {} if memory is None else {connection.MEMORY: f"{memory // 1024}KiB"}
    code = f"from workbench.bench.scale import answer; answer({str(file)!r}, {question!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, env=os.environ | limits
    )
    return json.loads(done.stdout.splitlines()[-1])


def answer(file: str, question: str) -> None:
    """Print seconds, peak memory and a fingerprint of the answer to one of QUESTIONS."""
    trace = Trace(file)
    started = time.perf_counter()
    frame = QUESTIONS[question](trace)
    seconds = time.perf_counter() - started
    fingerprint = hashlib.sha256(frame.round(9).to_csv(index=False).encode()).hexdigest()
    print(json.dumps({"seconds": round(seconds, 2), "peak_bytes": peak(), "answer": fingerprint}))
