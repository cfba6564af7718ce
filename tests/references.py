"""The numbers of the analyses, written from their definitions in plain Python, as public scripts compute them.

They are the oracle of tests and the opponent of `workbench bench analysis`: loops over texts, tokens and experts, on
lists. A layer is a list of texts, a text a list of tokens, a token the list of experts that it chose (shorter where
some were dropped).
"""

import math
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

Layer = Sequence[Sequence[Sequence[int]]]


def srp(layers: Sequence[tuple[Layer, int]], window: int, only: int | None = None) -> dict[str, float] | None:
    """Segment routing best performance of (layer, number of experts) pairs together, or of one expert alone.

    Counts each window anew; tries every threshold. None where there is no window or nothing is used.
    """
    found = [0] * (window + 1)
    for layer, n_experts in layers:
        for text in layer:
            for begin in range(len(text) - window + 1):
                count = [0] * n_experts
                for token in text[begin : begin + window]:
                    for expert in token:
                        count[expert] += 1
                for expert in range(n_experts):
                    if only is None or expert == only:
                        found[count[expert]] += 1
    used = sum(f * number for f, number in enumerate(found))
    if not used:
        return None
    best = {"srp": -1.0}
    for alpha in range(window + 1):
        kept = sum(found[alpha:])
        matched = sum(f * found[f] for f in range(alpha, window + 1))
        value = 2 * matched / (window * kept + used)
        if value > best["srp"]:
            best = {"srp": value, "alpha": alpha, "rho": window * kept / used}
    return best | {"rate": used / (window * sum(found))}


def srp_in_torch(experts: Any, length: int, n_experts: int, windows: Sequence[int]) -> list[float]:
    """The same for one layer, vectorised with torch as well as possible: for texts of equal length.

    experts  int64 tensor (n_tokens, k)
    """
    import torch

    used = torch.zeros(experts.shape[0], n_experts, dtype=torch.int32)
    used.scatter_(1, experts, 1)
    total = torch.zeros(experts.shape[0] // length, length + 1, n_experts, dtype=torch.int32)
    torch.cumsum(used.view(-1, length, n_experts), dim=1, out=total[:, 1:])
    values = []
    for window in windows:
        count = total[:, window:] - total[:, :-window]
        found = torch.bincount(count.flatten(), minlength=window + 1).double()
        matched = (found * torch.arange(window + 1)).flip(0).cumsum(0).flip(0)
        kept = found.flip(0).cumsum(0).flip(0)
        values.append(float((2 * matched / (window * kept + matched[0])).max()))
    return values


def shares(layer: Layer, n_experts: int) -> list[float]:
    """Share of a layer's assignments that each expert takes."""
    count = Counter()
    for text in layer:
        for token in text:
            count.update(token)
    total = sum(count.values())
    return [count[expert] / total for expert in range(n_experts)]


def shares_by_group(layer: Layer, groups: Sequence[str], n_experts: int) -> dict[str, list[float]]:
    """Share of each group's assignments that each expert takes; `groups` has the group of each text."""
    count: dict[str, Counter] = {group: Counter() for group in sorted(set(groups))}
    for text, group in zip(layer, groups, strict=True):
        for token in text:
            for expert in token:
                count[group][expert] += 1
    total = {group: sum(found.values()) for group, found in count.items()}
    return {group: [found[expert] / total[group] for expert in range(n_experts)] for group, found in count.items()}


def mutual_information(layer: Layer, groups: Sequence[str], n_experts: int) -> float:
    """Nats between the group of a text and an expert that its tokens choose."""
    joint: Counter = Counter()
    for text, group in zip(layer, groups, strict=True):
        for token in text:
            for expert in token:
                joint[group, expert] += 1
    total = sum(joint.values())
    by_group, by_expert = Counter(), Counter()
    for (group, expert), number in joint.items():
        by_group[group] += number
        by_expert[expert] += number
    return sum(
        number / total * math.log(number * total / (by_group[group] * by_expert[expert]))
        for (group, expert), number in joint.items()
    )


def together(layer: Layer, n_experts: int) -> list[list[float]]:
    """P(j | i): the part of the tokens of expert i that chose expert j too, over all pairs of a token's experts."""
    alone, both = [0] * n_experts, [[0] * n_experts for _ in range(n_experts)]
    for text in layer:
        for token in text:
            for i in token:
                alone[i] += 1
                for j in token:
                    if i != j:
                        both[i][j] += 1
    return [[both[i][j] / alone[i] if alone[i] else math.nan for j in range(n_experts)] for i in range(n_experts)]


def onward(layer: Layer, following: Layer, n_experts: int) -> list[list[float]]:
    """P(j | i): the part of the tokens of expert i of a layer that chose expert j of the following one."""
    alone, both = [0] * n_experts, [[0] * n_experts for _ in range(n_experts)]
    for text, text_after in zip(layer, following, strict=True):
        for token, token_after in zip(text, text_after, strict=True):
            for i in token:
                alone[i] += 1
                for j in token_after:
                    both[i][j] += 1
    return [[both[i][j] / alone[i] if alone[i] else math.nan for j in range(n_experts)] for i in range(n_experts)]


def favourites(layer: Layer, token_ids: Sequence[Sequence[int]], minimum: int) -> dict[int, float]:
    """For each token id that occurs often enough the largest part of its tokens that put one expert first."""
    count: dict[int, Counter] = defaultdict(Counter)
    number: Counter = Counter()
    for text, ids in zip(layer, token_ids, strict=True):
        for token, token_id in zip(text, ids, strict=True):
            number[token_id] += 1
            if token:
                count[token_id][token[0]] += 1
    return {
        token_id: max(count[token_id].values()) / sum(count[token_id].values())
        for token_id in sorted(number)
        if number[token_id] >= minimum and count[token_id]
    }


def hit_rate(layer: Layer, capacity: int, policy: str, span: int = 64, half_life: float = 64.0) -> float:
    """Hits of a cache of one layer that lives on from text to text; first touches are misses.

    All experts of a token are needed at once: what a token needs is loaded, then the worst of the others are evicted.
    policy  lru, lfu, aged-lfu, window, lookahead or belady
    """
    tokens = [token for text in layer for token in text]
    uses: dict[int, list[int]] = defaultdict(list)
    for at, token in enumerate(tokens):
        for expert in token:
            uses[expert].append(at)
    held: set[int] = set()
    last: dict[int, tuple[int, int]] = {}
    count: Counter = Counter()
    weight: dict[int, float] = defaultdict(float)
    hits = 0
    for at, token in enumerate(tokens):
        hits += sum(expert in held for expert in token)
        for rank, expert in enumerate(token):
            last[expert] = at, rank
            count[expert] += 1
            weight[expert] += 2 ** (at / half_life)

        def worth(expert: int, at: int = at) -> tuple:
            if policy == "lru":
                return last[expert]
            if policy == "lfu":
                return count[expert], last[expert]
            if policy == "aged-lfu":
                return weight[expert], last[expert]
            if policy == "window":
                return bisect_right(uses[expert], at) - bisect_right(uses[expert], at - span), last[expert]
            if policy == "lookahead":
                return bisect_left(uses[expert], at + span) - bisect_right(uses[expert], at), last[expert]
            following = bisect_right(uses[expert], at)
            return -(uses[expert][following] if following < len(uses[expert]) else len(tokens)), last[expert]

        others = sorted(held - set(token), key=worth, reverse=True)
        held = set(token) | set(others[: capacity - len(token)])
    return hits / sum(len(token) for token in tokens)


def segment_hit_rates(layer: Layer, capacity: int, window: int) -> tuple[float, float]:
    """Segment cache best hit rate, with first touches of a cache that isn't full as hits and with all as misses.

    Every text begins with an empty cache. Hits are judged by the cache as a token finds it; then its experts are loaded
    one after the other, and each evicts the one used least in the `window` tokens that begin with this one.
    """
    found = [segment_hits(text, capacity, window) for text in layer]
    hits, free, accesses = (sum(column) for column in zip(*found, strict=True))
    return (hits + free) / accesses, hits / accesses


def segment_hits(text: Sequence[Sequence[int]], capacity: int, window: int) -> tuple[int, int, int]:
    """Hits of a text, first touches while the cache isn't full, and accesses."""
    hits = free = accesses = 0
    uses: dict[int, list[int]] = defaultdict(list)
    for at, token in enumerate(text):
        for expert in token:
            uses[expert].append(at)
    held: set[int] = set()
    last: dict[int, tuple[int, int]] = {}

    def worth(expert: int) -> tuple:
        begin = bisect_left(uses[expert], now + (last[expert][0] == now))  # what is served has had its turn
        return bisect_left(uses[expert], now + window) - begin, last[expert]

    for now, token in enumerate(text):
        accesses += len(token)
        hits += sum(expert in held for expert in token)
        for rank, expert in enumerate(token):
            free += expert not in last and len(last) < capacity
            last[expert] = now, rank
            if expert not in held:
                if len(held) >= capacity:
                    held.remove(min(held, key=worth))
                held.add(expert)
    return hits, free, accesses
