"""Small random traces for the tests of analyses, figures and report, and the arrays they were made of.

`full_trace(path, experts, …)` makes a trace that holds any of weights, norms, shift, lookahead, predictions, nll, ….
"""

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


def full_trace(
    path: Path,
    experts: np.ndarray | Sequence[np.ndarray],
    *,
    n_experts: int | Sequence[int],
    seq: Sequence[int] | np.ndarray,
    sequences: pd.DataFrame,
    weights: Sequence[np.ndarray] | np.ndarray | None = None,
    norms: Sequence[np.ndarray] | np.ndarray | None = None,
    shift: Sequence[np.ndarray] | np.ndarray | None = None,
    lookahead: Sequence[np.ndarray] | np.ndarray | None = None,
    entropy: Sequence[np.ndarray] | np.ndarray | None = None,
    margin: Sequence[np.ndarray] | np.ndarray | None = None,
    logits: Sequence[np.ndarray] | np.ndarray | None = None,
    token_ids: Sequence[int] | np.ndarray | None = None,
    predictions: Sequence[int] | np.ndarray | None = None,
    nll: Sequence[float] | np.ndarray | None = None,
    phase: Sequence[int] | np.ndarray | None = None,
    vocabulary: dict[int, str] | None = None,
    model: str = "tiny",
    run: str = "full",
    mode: str = "new",
) -> Trace:
    """A trace of any arrays, for analyses that need more than ids. What is None is not recorded.

    experts      integers (n_tokens, n_layers, k), or one (n_tokens, k) a layer where k differs; -1 for none
    n_experts    E, or one a layer
    seq          (n_tokens,), never decreasing: the row of `sequences` (their columns as in `from_arrays`)
    weights, norms        as experts, floats; logits (n_tokens, E) a layer
    shift, entropy, margin  (n_tokens,) a layer
    lookahead    (n_tokens, k of the next layer) for every layer but the last (n_layers - 1 of them)
    token_ids, predictions, nll, phase   (n_tokens,); phase: codes into PHASES, default "prompt"
    An array with one entry a layer may be a list, or have the layers as axis 0; those shaped as a 3-D `experts` may
    also have them as axis 1, as it has.
    mode         "append" adds the run to a file there is
    """

    def by_layer(
        values: Sequence[np.ndarray] | np.ndarray | None, like_experts: bool = False
    ) -> list[np.ndarray] | None:
        if values is None:
            return None
        if like_experts and isinstance(values, np.ndarray) and values.ndim == 3:
            return [values[:, layer] for layer in range(values.shape[1])]
        return [np.asarray(one) for one in values]

    ids = by_layer(experts, like_experts=True)
    assert ids is not None
    n_tokens, n_layers = len(seq), len(ids)
    sizes = [int(n_experts)] * n_layers if isinstance(n_experts, int) else list(n_experts)
    given = {
        "weights": by_layer(weights, like_experts=True),
        "norms": by_layer(norms, like_experts=True),
        "shift": by_layer(shift),
        "lookahead": by_layer(lookahead),
        "entropy": by_layer(entropy),
        "margin": by_layer(margin),
        "logits": by_layer(logits),
    }

    def routing(layer: int) -> Routing:
        fields: dict[str, np.ndarray] = {}
        for name, values in given.items():
            if values is None or layer >= len(values):  # the last layer has no lookahead
                continue
            kind = np.int64 if name == "lookahead" else np.float32
            fields[name] = values[layer].astype(kind)
        if "lookahead" in fields:
            fields["lookahead"] = fields["lookahead"].astype(np.uint16)
        return Routing(experts=np.asarray(ids[layer], np.int64).astype(np.uint16), **fields)

    owner = np.asarray(seq)
    lengths = np.bincount(owner, minlength=len(sequences))
    rows = []
    for number, (row, length) in enumerate(zip(sequences.to_dict("records"), lengths.tolist(), strict=True)):
        known = {name: row.get(name) for name in ("lang", "domain", "source", "segment_id")}
        known = {name: None if pd.isna(value) else value for name, value in known.items()}
        extra = {name: value for name, value in row.items() if name not in (*known, "n_prompt")}
        prompt = int(row.get("n_prompt", length))
        sizes_of = {"seq": number, "sha256": f"{number:064x}", "n_prompt": prompt, "n_tokens": length}
        rows.append({**sizes_of, **known, "metadata": extra})
    codes = np.full(n_tokens, PHASES.index("prompt")) if phase is None else np.asarray(phase)
    texts = np.zeros(n_tokens, np.int32) if token_ids is None else np.asarray(token_ids, np.int32)
    tokens = {
        "seq": owner.astype(np.int32),
        "pos": np.concatenate([np.arange(n) for n in lengths] or [np.empty(0)]).astype(np.int32),
        "token_id": texts,
        "phase": codes.astype(np.uint8),
        "nll": np.full(n_tokens, np.nan, np.float32) if nll is None else np.asarray(nll, np.float32),
    }
    if predictions is not None:
        tokens["predicted"] = np.asarray(predictions, np.int32)
    if vocabulary is None:
        occurring = {*texts.tolist(), *tokens.get("predicted", texts).tolist()} - {-1}
        vocabulary = {token_id: f"t{token_id}" for token_id in occurring}
    recorded = ["ids", *(name for name, values in given.items() if values is not None)]
    recorded += [] if predictions is None else ["predictions"]
    header = {"run": run, "model": model, "family": "test", "recorded": recorded, "corpus": {"names": ["c"]}}
    layers = [
        {"name": f"layers.{layer}", "n_experts": sizes[layer], "top_k": ids[layer].shape[1], "n_shared": 0,
         "gating": "softmax, top-k", "stack": "decoder"}
        for layer in range(n_layers)
    ]  # fmt: skip
    with Writer(path, header, layers, mode=mode) as writer:
        writer.add_vocabulary(vocabulary)
        writer.append(Block(sequences=rows, tokens=tokens, routing=[routing(layer) for layer in range(n_layers)]))
    return Trace(path, run)


WHOLE = -1


def numbered(frame: pd.DataFrame) -> pd.DataFrame:
    """The same table with WHOLE where the layer is missing, so that rows about all layers can be looked up."""
    return frame.assign(layer=frame["layer"].astype("Int64").fillna(WHOLE).astype(int))
