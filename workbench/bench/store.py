"""How fast a trace is written and read, and how large it is: `workbench bench store`."""

import platform
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from workbench import connection, schema
from workbench.routing import Routing
from workbench.store import Block, Writer
from workbench.tracefile import Trace
from workbench.transaction import to_fixed, to_float

N_LAYERS, TOP_K, N_EXPERTS = 16, 8, 64


def bench_store(n_tokens: int = 200_000, *, folder: str | Path | None = None, repeats: int = 3) -> dict[str, Any]:
    """Write and read `n_tokens` × 16 layers × top-8 of 64 experts through the real Writer and Trace.

    The routing is a softmax of Gaussian logits: weights are unequal, as those of a real router are. What is read
    back is compared with what was written before any time counts. Each time is the best of `repeats`.

    Returns million token-layers a second by the clock and by processor time (all threads; it says more on a machine
    that is busy with something else), bytes a token-layer of the table `routing` and of the
    whole file (which has the tokens too), and milliseconds to load the ids
    and weights of one layer as arrays.
    """
    blocks = _blocks(n_tokens)
    token_layers = sum(len(block.tokens["seq"]) for block in blocks) * N_LAYERS
    wall, cpu, load = [], [], []
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        for repeat in range(repeats):
            path = Path(temporary) / f"{repeat}.duckdb"
            clock, processor = time.perf_counter(), time.process_time()
            _write(path, blocks)
            wall.append(time.perf_counter() - clock)
            cpu.append(time.process_time() - processor)
            trace = Trace(path)
            for layer in (0, N_LAYERS - 1):
                clock = time.perf_counter()
                experts, weights = trace.experts(layer), trace.weights(layer)
                load.append(time.perf_counter() - clock)
                _compare(blocks, layer, experts, weights)
        size, routing = path.stat().st_size, _routing_bytes(path)
    return {
        "bench": "store",
        "date": datetime.now(UTC).date().isoformat(),
        "device": platform.processor() or platform.machine(),
        "token_layers": token_layers,
        "million_token_layers_per_s": round(token_layers / min(wall) / 1e6, 2),
        "million_token_layers_per_cpu_s": round(token_layers / min(cpu) / 1e6, 2),
        "bytes_per_token_layer": round(routing / token_layers, 2),
        "file_bytes_per_token_layer": round(size / token_layers, 2),
        "load_one_layer_ms": round(min(load) * 1e3, 1),
    }


def run(quick: bool = False) -> dict[str, Any]:
    """What `workbench bench store` prints."""
    return bench_store(10_000, repeats=1) if quick else bench_store()


def _routing_bytes(path: Path) -> int:
    """Size of the blocks that hold the table `routing`."""
    with connection.reading(path) as con:
        query = "SELECT count(DISTINCT block_id) FROM pragma_storage_info('routing')"
        return con.execute(query).fetchall()[0][0] * schema.BLOCK_SIZE


def _blocks(n_tokens: int) -> list[Block]:
    """Batches of about 4,096 tokens, in sequences of 100 to 500."""
    random = np.random.default_rng(0)
    blocks, seq, total = [], 0, 0
    while total < n_tokens:
        lengths = random.integers(100, 500, size=max(1, min(4096, n_tokens - total) // 300))
        n = int(lengths.sum())
        rows = [{"seq": seq + i, "n_prompt": int(length), "n_tokens": int(length)} for i, length in enumerate(lengths)]
        tokens = {
            "seq": np.repeat(np.arange(seq, seq + len(lengths), dtype=np.int32), lengths),
            "pos": np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
            "token_id": random.integers(0, 50_000, n).astype(np.int32),
            "phase": np.ones(n, dtype=np.uint8),
            "nll": random.exponential(3, n).astype(np.float32),
        }
        blocks.append(Block(rows, tokens, [_routing(random, n) for _ in range(N_LAYERS)]))
        seq, total = seq + len(lengths), total + n
    return blocks


def _routing(random: np.random.Generator, n: int) -> Routing:
    scores = np.exp(random.standard_normal((n, N_EXPERTS), dtype=np.float32))
    scores /= scores.sum(axis=1, keepdims=True)
    experts = np.argsort(-scores, axis=1)[:, :TOP_K]
    return Routing(experts.astype(np.uint16), np.take_along_axis(scores, experts, axis=1))


def _write(path: Path, blocks: list[Block]) -> None:
    layers = [{"name": f"layers.{i}", "n_experts": N_EXPERTS, "top_k": TOP_K} for i in range(N_LAYERS)]
    with Writer(path, {"run": "bench", "recorded": ["ids", "weights"]}, layers) as writer:
        for block in blocks:
            writer.append(block)


def _compare(blocks: list[Block], layer: int, experts: np.ndarray, weights: np.ndarray) -> None:
    written = [block.routing[layer] for block in blocks]
    fixed, scale = to_fixed(np.concatenate([routing.weights for routing in written if routing.weights is not None]))
    if not np.array_equal(experts, np.concatenate([routing.experts for routing in written])):
        raise AssertionError(f"layer {layer}: the ids read back differ from those written")
    if not np.array_equal(weights, to_float(fixed, scale[:, None])):
        raise AssertionError(f"layer {layer}: the weights read back differ from those written")
