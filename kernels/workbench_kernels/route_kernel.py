"""The Triton kernel of `route`, where what it computes is written down; a program holds whole rows in registers.

Experts are chosen by k maxima over int64 keys, each of a rank and, below it, of the expert's place: one reduction finds
the best and breaks ties. bfloat16 and float16 are turned into float32 as they are read.
"""

from __future__ import annotations

from dataclasses import dataclass

from workbench_kernels.jit import jit, tl

WIDEST = 4096
"""Most experts for the kernel, whose program holds a token's whole row in registers."""


@dataclass(frozen=True)
class Tile:
    """How much a program does: tokens of about `logits` logits in all, one at least, with a warp for every `a_warp`."""

    logits: int
    a_warp: int

    def tokens(self, n_experts: int) -> int:
        return max(1, self.logits // padded(n_experts))

    def warps(self, n_experts: int) -> int:
        return max(1, self.tokens(n_experts) * padded(n_experts) // self.a_warp)


TILES = (Tile(256, 512), Tile(512, 512), Tile(1024, 256), Tile(2048, 512))
"""The first is the default: up to 512 experts a program is one warp, so that its reductions need no barrier."""


def padded(n: int) -> int:
    """The power of two that holds n."""
    return 1 << (n - 1).bit_length()


@jit
def row_start(row, stride):
    """Where a row begins, in int64: tokens × experts may exceed 2^31."""
    return row.to(tl.int64) * stride


@jit
def _key(value, place, WIDTH: tl.constexpr):
    """int64 that orders float32 values, and of equal ones the lower place as the larger key."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)  # -0 is 0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | (WIDTH - 1 - place).to(tl.int64)


@jit
def _key_place(key, WIDTH: tl.constexpr):
    return WIDTH - 1 - (key & 0xFFFFFFFF).to(tl.int32)


@jit
def _key_value(key):
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def _softplus(z):
    """ln(1 + e^z), above 20 z; by its series where 1 + e^z would lose what e^z is."""
    u = tl.exp(tl.minimum(z, 20.0))
    series = u * (1 - u * (1 / 2 - u * (1 / 3 - u * (1 / 4 - u * (1 / 5 - u * (1 / 6 - u / 7))))))
    return tl.where(z > 20, z, tl.where(u < 0.1, series, tl.log(1 + u)))


@jit
def _score(z, SCORING: tl.constexpr):
    """Sigmoid, or the root of softplus."""
    if SCORING == "sigmoid":
        return 1 / (1 + tl.exp(-z))
    else:
        return tl.sqrt(_softplus(z))


@jit
def _log_score(z, SCORING: tl.constexpr):
    if SCORING == "softmax":
        return z
    elif SCORING == "sigmoid":
        return tl.minimum(z, 0.0) - tl.log(1 + tl.exp(-tl.abs(z)))
    else:
        return 0.5 * tl.where(z < -20, z, tl.log(_softplus(tl.maximum(z, -30.0))))


@jit
def route_kernel(
    logits, correction, add, forced, masked, rows,
    ids, weights, entropy, log_partition, margin,
    compact_ids, compact_weights, compact_scale,
    T, stride, scale, epsilon, at_least,
    E: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_PLACES: tl.constexpr, KEPT: tl.constexpr, GROUP_BEST: tl.constexpr,
    OUTSIDE: tl.constexpr, SCORING: tl.constexpr, BY_LOGITS: tl.constexpr, RENORMALISE: tl.constexpr,
    ROUNDED: tl.constexpr, ROUNDED_RANKS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """A program routes TOKENS tokens, the rows of their logits in registers."""
    TAKEN: tl.constexpr = -(2**63)  # type: ignore[assignment]  # the key of what can't be chosen any more
    LARGE: tl.constexpr = 2.0**124  # type: ignore[assignment]  # the rank of forced experts in a group: a sum of finite
    half = logits.dtype.element_ty
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    real = token < T
    expert = tl.arange(0, WIDTH)[None, :]
    exists = expert < E
    start = row_start(token, stride)[:, None]
    z = tl.load(logits + start + expert, mask=real[:, None] & exists, other=-float("inf")).to(tl.float32)

    within = real[:, None]
    if rows is not None:
        within = (tl.load(rows + token, mask=real, other=0) != 0)[:, None]
    first = tl.zeros([TOKENS, WIDTH], tl.int1)
    never = tl.zeros([TOKENS, WIDTH], tl.int1)
    if add is not None:
        added = tl.load(add + expert, mask=exists, other=0.0).to(tl.float32)
        z = tl.where(within, (z + added).to(half).to(tl.float32), z)
        never = within & (added == -float("inf"))
    if masked is not None:
        never = never | (within & (tl.load(masked + expert, mask=exists, other=0) != 0))
    if forced is not None:
        first = within & (tl.load(forced + expert, mask=exists, other=0) != 0)
        never = never & ~first

    # p, and from it what is said of the whole distribution
    log_score = _log_score(z, SCORING)
    top = tl.max(log_score, 1)
    unnormalised = tl.exp(log_score - top[:, None])
    total = tl.sum(unnormalised, 1)
    log_total = tl.log(total)
    p = unnormalised / total[:, None]
    terms = tl.where(p == 0, 0.0, p * (log_score - top[:, None] - log_total[:, None]))
    tl.store(entropy + token, 0.0 - tl.sum(terms, 1), mask=real)
    tl.store(log_partition + token, top + log_total, mask=real)

    # what is ranked
    if BY_LOGITS:
        base = z
    else:
        base = p if SCORING == "softmax" else _score(z, SCORING)
        if ROUNDED:
            base = base.to(half).to(tl.float32)
    ranks = base
    if correction is not None:
        ranks = base + tl.load(correction + expert, mask=exists, other=0.0).to(tl.float32)
        if ROUNDED_RANKS:
            ranks = ranks.to(half).to(tl.float32)
    if GROUPS > 1:
        group = expert // (E // GROUPS)
        group_place = tl.arange(0, GROUP_PLACES)[None, :]
        group_ranks = tl.full([TOKENS, GROUP_PLACES], -float("inf"), tl.float32)
        seen = tl.where(first, LARGE, tl.where(never, -LARGE, ranks))
        for g in range(GROUPS):
            mine = tl.where(exists & (group == g), seen, -float("inf"))
            best = tl.max(mine, 1)
            if GROUP_BEST == 2:
                where = tl.min(tl.where(mine == best[:, None], expert, WIDTH), 1)
                best += tl.max(tl.where(expert == where[:, None], -float("inf"), mine), 1)
            if ROUNDED_RANKS:
                best = best.to(half).to(tl.float32)
            group_ranks = tl.where(group_place == g, best[:, None], group_ranks)
        group_keys = tl.where(group_place < GROUPS, _key(group_ranks, group_place, GROUP_PLACES), TAKEN)
        inside = tl.zeros([TOKENS, WIDTH], tl.int1)
        for _ in range(KEPT):
            kept = _key_place(tl.max(group_keys, 1), GROUP_PLACES)[:, None]
            inside = inside | (group == kept)
            group_keys = tl.where(group_place == kept, TAKEN, group_keys)
        limited = tl.where(inside, ranks, OUTSIDE)
        if add is not None or masked is not None or forced is not None:
            choosable = exists & (first | (inside & ~never))
            short = tl.sum(choosable.to(tl.int32), 1) < K
            span = tl.max(tl.where(exists, ranks, -float("inf")), 1) - tl.min(tl.where(exists, ranks, float("inf")), 1)
            filled = ranks - 2 * (span + 1)[:, None]
            limited = tl.where(~inside & short[:, None], filled, limited)
        ranks = limited
    ranks = tl.where(first, float("inf"), tl.where(never, -float("inf"), ranks))

    # the k best, lowest id first among equals
    keys = tl.where(exists, _key(ranks, expert, WIDTH), TAKEN)
    place = tl.arange(0, PLACES)[None, :]
    chosen = tl.zeros([TOKENS, PLACES], tl.int32)
    weight = tl.zeros([TOKENS, PLACES], tl.float32)
    last = tl.full([TOKENS], TAKEN, tl.int64)
    for i in range(K):
        last = tl.max(keys, 1)
        best = _key_place(last, WIDTH)[:, None]
        chosen = tl.where(place == i, best, chosen)
        weight = tl.where(place == i, tl.sum(tl.where(expert == best, base, 0.0), 1)[:, None], weight)
        keys = tl.where(expert == best, TAKEN, keys)
    gap = tl.full([TOKENS], float("nan"), tl.float32)
    if K < E:
        gap = _key_value(last) - _key_value(tl.max(keys, 1))
        gap = tl.where(tl.abs(gap) < float("inf"), gap, float("nan"))
    tl.store(margin + token, gap, mask=real)

    used = place < K
    if BY_LOGITS:
        if SCORING == "softmax":
            weight = tl.where(used, weight, -float("inf"))
            weight = tl.exp(weight - tl.max(weight, 1)[:, None])
            weight = weight / tl.sum(weight, 1)[:, None]
        else:
            weight = _score(weight, SCORING)
    if RENORMALISE:
        together = tl.sum(tl.where(used, weight, 0.0), 1)
        weight = weight / (tl.maximum(together, at_least) + epsilon)[:, None]
    weight = (weight * scale).to(weights.dtype.element_ty)
    at = row_start(token, K)[:, None] + place
    stored = real[:, None] & used
    tl.store(ids + at, chosen.to(tl.int64), mask=stored)
    tl.store(weights + at, weight, mask=stored)
    if compact_ids is not None:
        weight = tl.where(used, weight.to(tl.float32), 0.0)
        largest = tl.max(weight, 1).to(tl.int32, bitcast=True)
        # The next power of two: the exponent, and one more where there are bits below it.
        power = ((largest + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        power = tl.maximum(power, 1.0)
        # Adding 1.5 · 2^23 leaves no bits for a fraction: to the nearest, halves to even, as torch.round does.
        counts = weight / power[:, None] * 65535.0 + 12582912.0 - 12582912.0
        tl.store(compact_ids + at, chosen.to(compact_ids.dtype.element_ty), mask=stored)
        tl.store(compact_weights + at, counts.to(tl.int32).to(tl.uint16), mask=stored)
        tl.store(compact_scale + token, power, mask=real)
