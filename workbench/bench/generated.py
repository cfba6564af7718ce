"""Routing made up for benchmarks: with locality, two languages and two domains, the same for the same seed.

A text has a language and a domain, which tilt the loads of each layer, and favourite experts of its own; a token keeps
each expert of the token before it with some probability and draws the others from its text's loads. With these
settings SRP is 0.68, 0.51, 0.45 and 0.44 for windows of 4, 16, 64 and 256 tokens: about as published for OLMoE.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
from numba import njit

from workbench.errors import InputError

LANGUAGES, DOMAINS = ("en", "de"), ("code", "fiction")
KEPT = 0.36
"""Probability that a token keeps an expert of the token before it."""
FAVOURITES, FAVOUR = 8, 6.0
"""Experts that each text favours in a layer, and how many times."""
SLOTS = 1024
"""Places of the table that experts are drawn from."""


class Generated:
    """Stands in for `workbench.Trace` where only ids are read: the ids of a layer are made when they are asked for.

    All texts have `length` tokens. `seconds` and `cpu_seconds` count the time spent on making ids, by the clock and of
    processors.
    """

    run = "generated"
    recorded = frozenset({"ids"})

    def __init__(
        self,
        n_tokens: int,
        *,
        n_layers: int = 16,
        n_experts: int = 64,
        top_k: int = 8,
        length: int = 500,
        seed: int = 0,
    ):
        self.n_sequences = max(1, n_tokens // length)
        self.n_tokens = self.n_sequences * length
        self.length, self.seed = length, seed
        self.layers = pd.DataFrame(
            {"layer": range(n_layers), "name": [f"layers.{i}" for i in range(n_layers)], "n_experts": n_experts,
             "top_k": top_k, "n_shared": 0}
        )  # fmt: skip
        self.seconds = self.cpu_seconds = 0.0

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    def sequences(self) -> pd.DataFrame:
        """seq, n_prompt, n_tokens, lang, domain, source, segment_id (none)."""
        seq = np.arange(self.n_sequences)
        return pd.DataFrame(
            {
                "seq": seq,
                "n_prompt": self.length,
                "n_tokens": self.length,
                "lang": np.array(LANGUAGES)[seq % 2],
                "domain": np.array(DOMAINS)[seq // 2 % 2],
                "source": "generated",
                "segment_id": None,
            }
        )

    def sequence_index(self) -> np.ndarray:
        """int32 (n_tokens,): the sequence of each token."""
        return np.repeat(np.arange(self.n_sequences, dtype=np.int32), self.length)

    def token_ids(self) -> np.ndarray:
        """int32 (n_tokens,): ids of a vocabulary of 50,000, some far more common than others (Zipf)."""
        random = np.random.default_rng(self.seed)
        return np.minimum(random.zipf(1.2, self.n_tokens), 50_000).astype(np.int32) - 1

    def tokens(self) -> pd.DataFrame:
        """seq, pos, token_id, phase (all "prompt"), nll (unknown), as `Trace.tokens`."""
        return pd.DataFrame(
            {
                "seq": self.sequence_index(),
                "pos": np.tile(np.arange(self.length, dtype=np.int32), self.n_sequences),
                "token_id": self.token_ids(),
                "phase": pd.Categorical(["prompt"]).repeat(self.n_tokens),
                "nll": np.full(self.n_tokens, np.nan, np.float32),
            }
        )

    def experts(self, layer: int) -> np.ndarray:
        """uint16 (n_tokens, top_k)."""
        if not 0 <= layer < self.n_layers:
            raise InputError(f"layer {layer}: there are layers 0 to {self.n_layers - 1}.")
        started = time.perf_counter(), time.process_time()
        n_experts, k = int(self.layers["n_experts"][layer]), int(self.layers["top_k"][layer])
        random = np.random.default_rng([self.seed, layer])
        loads = np.exp(0.5 * random.normal(size=n_experts) + 0.7 * random.normal(size=(4, n_experts)))
        group = (np.arange(self.n_sequences) % 4).astype(np.int64)
        out = np.empty((self.n_sequences, self.length, k), np.uint16)
        half = self.n_sequences // 2
        seed = np.uint64(random.integers(1 << 62))
        with ThreadPoolExecutor(2) as pool:
            parts = (slice(0, half), slice(half, None))
            first = (0, half)
            list(pool.map(lambda part, at: fill(out[part], group[part], loads, seed, at), parts, first))
        self.seconds += time.perf_counter() - started[0]
        self.cpu_seconds += time.process_time() - started[1]
        return out.reshape(self.n_tokens, k)


@njit(cache=True, nogil=True)
def draw(state: np.ndarray) -> float:
    """The next number in [0, 1) of the generator splitmix64 (Steele et al. 2014), whose state is one uint64."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return float((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


@njit(cache=True, nogil=True)
def fill(out: np.ndarray, group: np.ndarray, loads: np.ndarray, seed: np.uint64, first: int) -> None:
    """Choose the experts of texts: out uint16 (n_texts, length, k), loads (n_groups, E); text 0 is number `first`."""
    n_texts, length, k = out.shape
    n_experts = loads.shape[1]
    state = np.zeros(1, np.uint64)
    weight, table = np.empty(n_experts), np.empty(SLOTS, np.uint16)
    taken = np.full(n_experts, -1, np.int64)  # the token that last took each expert
    for text in range(n_texts):
        state[0] = seed + np.uint64(first + text) * np.uint64(0xD1342543DE82EF95)
        weight[:] = loads[group[text]]
        for _ in range(FAVOURITES):
            weight[int(draw(state) * n_experts)] *= FAVOUR
        total, done, slot = weight.sum(), 0.0, 0
        for expert in range(n_experts):
            done += weight[expert]
            while slot < SLOTS and slot < done / total * SLOTS:
                table[slot] = expert
                slot += 1
        while slot < SLOTS:
            table[slot] = n_experts - 1
            slot += 1
        for token in range(length):
            stamp = text * length + token
            for rank in range(k):
                chosen = out[text, token - 1, rank] if token else np.uint16(0)
                kept = token > 0 and draw(state) < KEPT and taken[chosen] != stamp
                tries = 0
                while not kept:
                    chosen = table[int(draw(state) * SLOTS)] if tries < 32 else np.uint16(draw(state) * n_experts)
                    kept = taken[chosen] != stamp
                    tries += 1
                taken[chosen] = stamp
                out[text, token, rank] = chosen
