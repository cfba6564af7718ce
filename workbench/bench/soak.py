"""A long run: does memory stay flat, and time in proportion to tokens? `workbench bench soak`.

Made-up routing of 4 routers that choose 2 of 16 experts goes through the real Writer, in blocks as a run's batches make
them, with tokens, weights, entropy, margin and metadata. In a process of its own, every second: tokens appended, memory
and size of the file. At its end the file is read: every sequence is there, and a layer of the last texts holds what was
written.
"""

import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.bench.generated import Generated
from workbench.bench.large import peak
from workbench.bench.made_up_trace import block, word
from workbench.store import Writer
from workbench.tracefile import Trace

N_TOKENS = 10_000_000
N_LAYERS, N_EXPERTS, TOP_K = 4, 16, 2
LENGTH, SEQUENCES = 250, 16
"""Tokens of a text, texts of a block: 4,000 tokens, about a batch of `workbench trace`."""
KEPT = 64
"""Blocks of different routing, used in turn."""
EVERY = 1.0
"""Seconds between two looks."""
WARM = 0.1
"""Part of the run that memory is compared after: until then buffers fill."""


def run(quick: bool = False, *, tokens: int | None = None, figure: Path | None = None) -> dict[str, Any]:
    """What `workbench bench soak` prints.

    tokens  how many; figure: where to draw memory and tokens over time (.svg, .png, .html)

    flat is the most memory over the most of the first tenth of the run; linear is the processor time of a token in the
    second half over that in the first, since a machine may be busy with something else.
    """
    n = tokens or (200_000 if quick else N_TOKENS)
    with tempfile.TemporaryDirectory(prefix="soak.") as folder:
        code = f"from workbench.bench.soak import measure; measure({n}, {folder!r})"
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    looks = pd.DataFrame(found.pop("looks"))
    result = {
        "bench": "soak",
        "date": datetime.now(UTC).date().isoformat(),
        "device": platform.processor() or platform.machine(),
        **found,
        **judged(looks),
    }
    if figure is not None:
        from workbench.figures import save

        save(drawn(looks), figure, overwrite=True)
    return result


def judged(looks: pd.DataFrame) -> dict[str, float]:
    """Memory and processor time of the later part over those of the earlier, from the rows of `look`."""
    last = looks.iloc[-1]
    warm = looks["tokens"] <= max(WARM * last["tokens"], looks["tokens"].iloc[0])
    half = looks.iloc[(looks["tokens"] - last["tokens"] / 2).abs().argmin()]
    first = half["cpu"] / half["tokens"]
    second = (last["cpu"] - half["cpu"]) / max(last["tokens"] - half["tokens"], 1)
    before, most = int(looks.loc[warm, "memory"].max()), int(looks["memory"].max())
    return {
        "warm_bytes": before,
        "most_bytes": most,
        "flat": round(most / before, 3),
        "linear": round(float(second / first), 3),
    }


def measure(n_tokens: int, folder: str) -> None:
    """Print what one long run shows, as JSON."""
    source = Generated(KEPT * SEQUENCES * LENGTH, n_layers=N_LAYERS, n_experts=N_EXPERTS, top_k=TOP_K, length=LENGTH)
    random = np.random.default_rng(0)
    experts = [source.experts(layer) for layer in range(N_LAYERS)]
    token_ids = source.token_ids()
    blocks = []
    for first in range(0, source.n_sequences, SEQUENCES):
        own = slice(first * LENGTH, (first + SEQUENCES) * LENGTH)
        here = block(source, first, first + SEQUENCES, token_ids[own], [ids[own] for ids in experts], random)
        blocks.append(here)
    path = Path(folder) / "soak.duckdb"
    layers = [{"name": f"layers.{i}", "n_experts": N_EXPERTS, "top_k": TOP_K} for i in range(N_LAYERS)]
    header = {"run": "soak", "model": "generated", "recorded": ["ids", "weights", "entropy", "margin"]}
    n_blocks = max(1, n_tokens // (SEQUENCES * LENGTH))
    looks, started, processor = [], time.perf_counter(), time.process_time()
    with Writer(path, header, layers) as writer:
        writer.add_vocabulary({int(token): word(int(token)) for token in np.unique(token_ids)})
        for number in range(n_blocks):
            made = blocks[number % KEPT]
            offset = (number // KEPT) * KEPT * SEQUENCES
            rows = [row | {"seq": row["seq"] + offset} for row in made.sequences]
            tokens = made.tokens | {"seq": made.tokens["seq"] + np.int32(offset)}
            writer.append(type(made)(rows, tokens, made.routing))
            now = time.perf_counter() - started
            if not looks or now - looks[-1]["seconds"] >= EVERY or number == n_blocks - 1:
                looks.append(look(now, time.process_time() - processor, (number + 1) * SEQUENCES * LENGTH, path))
    seconds, cpu = time.perf_counter() - started, time.process_time() - processor
    looks.append(look(seconds, cpu, n_blocks * SEQUENCES * LENGTH, path))
    most = peak()
    trace = Trace(path)
    last = blocks[(n_blocks - 1) % KEPT].routing[N_LAYERS - 1].experts
    if trace.n_sequences != n_blocks * SEQUENCES or not (trace.experts(N_LAYERS - 1)[-len(last) :] == last).all():
        raise AssertionError("the file isn't what was written")
    result = {
        "tokens": trace.n_tokens,
        "layers": N_LAYERS,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "tokens_per_second": round(trace.n_tokens / seconds),
        "tokens_per_cpu_second": round(trace.n_tokens / cpu),
        "peak_bytes": most,
        "file_bytes": path.stat().st_size,
    }
    print(json.dumps(result | {"looks": looks}))


def look(seconds: float, cpu: float, tokens: int, path: Path) -> dict[str, float]:
    """Where a run is after so many seconds, by the clock and of processors; bytes of its memory and of its file."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return {"seconds": round(seconds, 2), "cpu": round(cpu, 2), "tokens": tokens, "memory": int(found[1]) * 1024,
            "file": path.stat().st_size}  # fmt: skip


def drawn(looks: pd.DataFrame) -> go.Figure:
    """Memory and tokens over time, one above the other."""
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    minutes = looks["seconds"] / 60
    lines = {"memory": looks["memory"] / 2**20, "tokens": looks["tokens"] / 1e6}
    for row, (name, values) in enumerate(lines.items(), start=1):
        figure.add_trace(go.Scatter(x=minutes, y=values, mode="lines", name=name, showlegend=False), row=row, col=1)
    figure.update_yaxes(title_text="memory (MiB)", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="tokens (million)", rangemode="tozero", row=2, col=1)
    figure.update_xaxes(title_text="minutes", row=2, col=1)
    figure.update_layout(title=f"A run of {looks['tokens'].iloc[-1] / 1e6:.1f} million tokens", height=520)
    return figure


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    rows = {
        "tokens × routers": f"{result['tokens']:,} × {result['layers']}",
        "minutes (of processors)": f"{result['seconds'] / 60:.1f} ({result['cpu_seconds'] / 60:.1f})",
        "tokens a second (of processors)": f"{result['tokens_per_second']:,} ({result['tokens_per_cpu_second']:,})",
        "processor time of a token in the second half, over that in the first": f"{result['linear']}",
        "memory in the first tenth of the run, at most": f"{result['warm_bytes'] / 2**20:.0f} MiB",
        "most memory of all, over that": f"{result['flat']}",
        "file": f"{result['file_bytes'] / 1e6:.0f} MB",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([f"{result['date']}, {result['device']}.", "", "| | |", "|---|---|", *lines])
