"""Random whole sequences, written as a file or as a folder of parts, and everything that a trace holds."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from workbench import connection, parts, schema
from workbench.routing import Routing
from workbench.store import Writer
from workbench.tracefile import Trace
from workbench.transaction import Block

N_LAYERS, N_EXPERTS, K = 3, 8, 2
RUN = {
    "run": "made", "model": "m", "family": "f", "engine": "e", "dtype": "float32", "recipe": {"edits": []},
    "recorded": ["ids", "weights", "entropy", "profiles"], "corpus": {"names": ["c"]}, "versions": {"python": "3"},
}  # fmt: skip
LAYERS = [
    {"name": f"layers.{layer}", "n_experts": N_EXPERTS, "top_k": K, "n_shared": 0, "gating": "softmax"}
    for layer in range(N_LAYERS)
]
VOCABULARY = {token: f"t{token}" for token in range(20)}


def make_block(seqs: Iterable[int], *, seed: int = 0) -> Block:
    """Sequences of 2 to 9 tokens, in three languages; each depends on its number and the seed alone."""
    rows: list[dict[str, Any]] = []
    tokens: list[dict[str, np.ndarray]] = []
    layers: list[list[Routing]] = [[] for _ in LAYERS]
    profiles: list[list[np.ndarray]] = [[] for _ in LAYERS]
    for seq in seqs:
        random = np.random.default_rng([seed, seq])
        n = int(random.integers(2, 10))
        lang = ("de", "en", None)[int(random.integers(3))]
        rows.append(
            {"seq": seq, "sha256": f"{seq:064x}", "n_prompt": n, "n_tokens": n, "lang": lang, "segment_id": f"s{seq}",
             "metadata": {"row": seq}}
        )  # fmt: skip
        tokens.append(
            {
                "seq": np.full(n, seq, np.int32),
                "pos": np.arange(n, dtype=np.int32),
                "token_id": random.integers(0, 20, n).astype(np.int32),
                "phase": np.ones(n, np.uint8),
                "nll": np.where(np.arange(n) > 0, random.random(n), np.nan).astype(np.float32),
            }
        )
        for layer in range(N_LAYERS):
            experts = np.argsort(random.random((n, N_EXPERTS)), axis=1)[:, :K].astype(np.uint16)
            entropy = random.random(n).astype(np.float32)
            layers[layer].append(Routing(experts, random.random((n, K), np.float32), entropy=entropy))
            profiles[layer].append(np.full(N_EXPERTS, 1 / N_EXPERTS, np.float32))
    routing = [
        Routing(*(np.concatenate([getattr(one, name) for one in layer]) for name in ("experts", "weights", "entropy")))
        for layer in layers
    ]
    joined = {name: np.concatenate([one[name] for one in tokens]) for name in tokens[0]}
    return Block(rows, joined, routing, [np.stack(one) for one in profiles])


def write_file(path: os.PathLike, groups: Iterable[Iterable[int]], *, run: dict[str, Any] = RUN, **more) -> Trace:
    with Writer(path, run, LAYERS, **more) as writer:
        writer.add_vocabulary(VOCABULARY)
        for seqs in groups:
            writer.append(make_block(seqs))
    return Trace(path, run["run"])


def write_part(folder: str | os.PathLike, part: str, seqs: Iterable[int], run: str | None = None) -> None:
    gathered = parts.transaction(folder, run)
    gathered.name(VOCABULARY, set())
    gathered.add(make_block(seqs))
    parts.write(folder, part, gathered)


def write_folder(
    folder: str | os.PathLike, groups: Iterable[Iterable[int]], *, run: dict[str, Any] = RUN, mode: str = "new"
) -> Trace:
    parts.begin(folder, run, LAYERS, mode=mode)
    for number, seqs in enumerate(groups):
        write_part(folder, f"{run['run']}-{number:06}", seqs)
    parts.finish(folder, run["run"])
    return Trace(folder, run["run"])


def rows_of(path: str | os.PathLike, *, times: bool = False) -> dict[str, list[str]]:
    """Every row of every table as text, sorted; `times` says whether to look at the clock's, too."""
    left_out = "" if times else "EXCLUDE (started, finished)"
    with connection.reading(path) as con:
        return {
            table: sorted(
                str(row)
                for row in con.execute(f"SELECT * {left_out if table == 'runs' else ''} FROM {table}").fetchall()
            )
            for table in schema.TABLES
        }
