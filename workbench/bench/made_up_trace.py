"""A trace file of made-up routing, for measuring what reads one: as large as asked, the same for the same seed.

The ids are those of `Generated`: with locality, two languages, two domains. Sequences 2i and 2i + 1 are one text in two
languages (segment_id), so that alignment has something to compare. Weights, entropy, margin and loss are random numbers
of a plausible size; tokens are words made of syllables, some far more common than others.
"""

from pathlib import Path

import numpy as np

from workbench.bench.generated import Generated
from workbench.routing import Routing
from workbench.store import PHASES, Writer
from workbench.tracefile import Trace
from workbench.transaction import Block

TOPICS = ("weather", "cooking", "law", "music", "sailing", "medicine", "history")
SYLLABLES = (
    "ba", "be", "con", "da", "der", "en", "for", "ga", "gen", "hi", "in", "ka", "ko", "la", "li", "lu", "ma", "mi",
    "na", "ni", "no", "on", "pa", "per", "ra", "re", "ri", "ro", "sa", "schaft", "se", "si", "sol", "ta", "te", "ti",
    "to", "tra", "ung", "ver", "vi", "wa", "ü", "ß", "é",
)  # fmt: skip
OTHERS = (".", ",", "\n", " the", " die", " of", " und", "(", ")", "<b>", " العربية", " 数据", " 🙂", "\u200b")
"""Tokens that aren't words, or are hard to show."""
SEQUENCES = 32
"""Of a block that is written at a time."""


def made_up_trace(path: Path, n_tokens: int = 1_000_000, *, n_layers: int = 16, length: int = 500) -> Trace:
    """Write the trace: n_layers routers that choose 8 of 64 experts, in sequences of `length` tokens."""
    source = Generated(n_tokens, n_layers=n_layers, length=length)
    random = np.random.default_rng(source.seed)
    experts = [source.experts(layer) for layer in range(n_layers)]
    token_ids = source.token_ids()
    layers = [
        {"name": f"layers.{layer}", "n_experts": 64, "top_k": 8, "n_shared": 0, "gating": "softmax, top-k",
         "stack": "decoder"}
        for layer in range(n_layers)
    ]  # fmt: skip
    run = {
        "run": "made-up", "model": "generated", "family": "olmoe", "dtype": "bfloat16", "engine": "made up",
        "recorded": ["ids", "weights", "entropy", "margin", "profiles"],
        "corpus": {"names": ["made-up"], "tokens": source.n_tokens, "sequences": source.n_sequences},
    }  # fmt: skip
    with Writer(path, run, layers) as writer:
        writer.add_vocabulary({int(token): word(int(token)) for token in np.unique(token_ids)})
        for first in range(0, source.n_sequences, SEQUENCES):
            last = min(first + SEQUENCES, source.n_sequences)
            part = slice(first * length, last * length)
            writer.append(block(source, first, last, token_ids[part], [ids[part] for ids in experts], random))
    return Trace(path)


def block(
    source: Generated,
    first: int,
    last: int,
    token_ids: np.ndarray,
    experts: list[np.ndarray],
    random: np.random.Generator,
) -> Block:
    """Sequences `first` to `last`, with what isn't in `source` drawn at random."""
    n_texts, length = last - first, source.length
    n_tokens = n_texts * length
    labels = source.sequences().iloc[first:last]
    rows = [
        {"seq": seq, "n_prompt": length, "n_tokens": length, "lang": lang, "domain": domain,
         "source": "made-up", "segment_id": f"text.{seq // 2}", "sha256": f"{seq:064x}",
         "metadata": {"topic": TOPICS[seq // 2 % len(TOPICS)]}}
        for seq, lang, domain in labels[["seq", "lang", "domain"]].to_numpy().tolist()
    ]  # fmt: skip
    pos = np.tile(np.arange(length, dtype=np.int32), n_texts)
    nll = random.exponential(3, n_tokens).astype(np.float32)
    nll[pos == 0] = np.nan  # nothing precedes it
    routing, profiles = [], []
    for ids in experts:
        shares = np.sort(random.gamma(1, 1, ids.shape).astype(np.float32), axis=1)[:, ::-1]
        routing.append(
            Routing(
                ids,
                shares / (1.2 * shares.sum(axis=1, keepdims=True)),
                entropy=np.clip(random.normal(3, 0.3, n_tokens), 0, 4.15).astype(np.float32),
                margin=random.exponential(0.02, n_tokens).astype(np.float32),
            )
        )
        text = np.repeat(np.arange(n_texts), length * ids.shape[1])
        counts = np.bincount(text * 64 + ids.ravel().astype(np.int64), minlength=n_texts * 64).reshape(n_texts, 64)
        profiles.append((counts / counts.sum(axis=1, keepdims=True)).astype(np.float32))
    tokens = {
        "seq": np.repeat(np.arange(first, last, dtype=np.int32), length),
        "pos": pos,
        "token_id": token_ids,
        "phase": np.full(n_tokens, PHASES.index("prompt"), np.uint8),
        "nll": nll,
    }
    return Block(rows, tokens, routing, profiles=profiles)


def word(token_id: int) -> str:
    """The text of a token: one of OTHERS, or a word with a space in front; the more common, the shorter."""
    if token_id < len(OTHERS):
        return OTHERS[token_id]
    parts, rest = [], token_id
    while rest:
        rest, at = divmod(rest, len(SYLLABLES))
        parts.append(SYLLABLES[at])
    return " " + "".join(parts)
