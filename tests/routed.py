"""Small random traces for the tests of analyses, figures and report, and the arrays they were made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from workbench.arrays import from_arrays
from workbench.routing import Routing
from workbench.store import PHASES, Writer
from workbench.tracefile import Trace
from workbench.transaction import Block


@dataclass
class Routed:
    """A trace and what it should hold: experts (n_tokens, n_layers, k), seq (n_tokens,), sequences."""

    trace: Trace
    experts: np.ndarray
    seq: np.ndarray
    sequences: pd.DataFrame


def write(
    path: Path, experts: np.ndarray, seq: Sequence[int] | np.ndarray, sequences: pd.DataFrame, n_experts: int
) -> Routed:
    """A trace of ids only."""
    trace = from_arrays(path, experts, n_experts=n_experts, seq=seq, sequences=sequences)
    return Routed(trace, np.asarray(experts), np.asarray(seq), sequences)


def choose(random: np.random.Generator, logits: np.ndarray, k: int) -> np.ndarray:
    """k distinct experts a row, likelier where the logit is higher: (n, E) -> (n, k)."""
    return np.argsort(-(logits + random.gumbel(size=logits.shape)), axis=1)[:, :k]


def random_trace(
    path: Path,
    *,
    seed: int = 0,
    n_texts: int = 8,
    languages: Sequence[str | None] = ("en", "de", None),
    n_layers: int = 2,
    n_experts: int = 6,
    k: int = 2,
    strength: float = 1.0,
    dropped: float = 0.1,
) -> Routed:
    """Texts in several languages (None: no label) with some places without an expert, as dropped tokens leave."""
    random = np.random.default_rng(seed)
    rows = [
        {"lang": lang, "segment_id": f"s{text}", "source": f"c{text % 2}", "domain": "abc"[text % 3]}
        for text in range(n_texts)
        for lang in languages
    ]
    sequences = pd.DataFrame(rows)
    lengths = random.integers(1, 12, len(rows))
    seq = np.repeat(np.arange(len(rows)), lengths)
    group = pd.factorize(sequences["lang"])[0]
    experts = np.empty((len(seq), n_layers, k), int)
    for layer in range(n_layers):
        logits = strength * random.normal(size=(group.max() + 2, n_experts))
        experts[:, layer] = choose(random, logits[group][seq], k)
    last = random.random(experts.shape[:2]) < dropped
    experts[last, -1] = -1
    everything = random.random(experts.shape[:2]) < dropped / 2
    experts[everything] = -1
    return write(path, experts, seq, sequences, n_experts)


def with_profiles(
    path: Path,
    profiles: Sequence[np.ndarray],
    sequences: pd.DataFrame,
    lengths: Sequence[int] | np.ndarray,
    *,
    experts: Sequence[np.ndarray] | None = None,
    model: str = "tiny",
    run: str = "profiles",
    vocabulary: dict[int, str] | None = None,
) -> Trace:
    """A trace with a mean router distribution a sequence and layer: profiles are (n_sequences, E), one a layer."""
    n_experts = profiles[0].shape[1]
    seq = np.repeat(np.arange(len(sequences)), lengths)
    if experts is None:
        experts = [np.nan_to_num(p, nan=0).argmax(axis=1)[seq][:, None] for p in profiles]
    rows = []
    for number, (row, length) in enumerate(zip(sequences.to_dict("records"), lengths, strict=True)):
        known = {name: row.get(name) for name in ("lang", "domain", "source", "segment_id")}
        known = {name: None if pd.isna(value) else value for name, value in known.items()}
        extra = {name: value for name, value in row.items() if name not in known}
        sizes = {"seq": number, "sha256": f"{number:064x}", "n_prompt": length, "n_tokens": length}
        rows.append({**sizes, **known, "metadata": extra})
    header = {"run": run, "model": model, "family": "test", "recorded": ["ids", "profiles"], "corpus": {"names": ["c"]}}
    layers = [
        {"name": f"layers.{i}", "n_experts": n_experts, "top_k": experts[0].shape[1], "n_shared": 0,
         "gating": "softmax, top-k", "stack": "decoder"}
        for i in range(len(profiles))
    ]  # fmt: skip
    with Writer(path, header, layers, mode="new") as writer:
        writer.add_vocabulary(vocabulary or {0: "a"})
        writer.append(
            Block(
                sequences=rows,
                tokens={
                    "seq": seq.astype(np.int32),
                    "pos": np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
                    "token_id": np.zeros(len(seq), np.int32),
                    "phase": np.full(len(seq), PHASES.index("prompt"), np.uint8),
                    "nll": np.full(len(seq), np.nan, np.float32),
                },
                routing=[Routing(experts=chosen.astype(np.uint16)) for chosen in experts],
                profiles=[p.astype(np.float32) for p in profiles],
            )
        )
    return Trace(path)
