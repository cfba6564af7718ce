"""Hits of a cache of experts at every capacity in one pass, for any policy that ranks experts.

`replay(events, policy)` is the simulator; `hits_by_capacity` reads its counts. What it rests on (Mattson et al. 1970,
*Evaluation techniques for storage hierarchies*): when a policy is an order of the experts that doesn't depend on the
capacity, a cache of C experts is always part of one of C+1. One stack of experts then holds the contents of the caches
of all capacities, the first C being those of capacity C, and an expert found at depth d is a hit for every C ≥ d.

After an event that needs the set R, a cache of capacity C holds

- with **forced admission**: R, and of what it held else the best C − |R|. Undefined where C < |R|.
- with **bypass**: the best C of what it held and R: an expert can be used without being kept.

Which experts are best is the **policy**:

- `lru`: the last used.
- `lfu`: the most used so far; ties: the last used. Counts persist when an expert is evicted. (A policy that forgets
  them then depends on the capacity, and isn't among these.)
- `aged-lfu`: the same with counts that halve every `half_life` tokens.
- `window`: the most used in the last `span` tokens, this one included; ties: the last used.
- `lookahead`: the most used in the `span` tokens that begin with this one; ties: the last used. It looks into the
  future: no real cache can. It is the rule of SCH (see `segment_cache`).
- `belady`: the one needed soonest. With forced admission no policy with forced admission has more hits; with bypass
  no policy at all has (Belady 1966, Mattson et al. 1970).

The experts of one event count as used in its order (rank order), the last as the last used. (In `aged-lfu` the later of
two weighs 2⁻³² more, which settles ties.)

How an event is served is the **access** mode:

- `token`: all its experts at once: none of them is evicted for another one.
- `single`: one by one, each looked up when its turn comes, when another may have evicted it.
- `snapshot`: all are looked up at once, then admitted one by one, when one may evict another. Public code that replays
  traces does this (moe-lrc); where C is near |R| it differs from `token`.
"""

from dataclasses import dataclass

import numpy as np
from numba import njit

from workbench.analysis.events import Events
from workbench.errors import InputError

POLICIES = ("lru", "lfu", "aged-lfu", "window", "lookahead", "belady")
ACCESS = ("token", "single", "snapshot")
ADMISSION = ("forced", "bypass")
COLD = ("miss", "free", "excluded")

LRU, LFU, AGED, WINDOW, LOOKAHEAD, BELADY = range(6)
TOKEN, SINGLE, SNAPSHOT = range(3)
SHIFT = 34
"""A priority is a count above this bit and the time of the last use below: 17 billion accesses, 500 million uses."""
HAIR = 2.0**-32
"""What a later expert of the same event weighs more in `aged-lfu`, relatively."""
FOREMOST = np.iinfo(np.int64).max
HEAVY = 2.0**400
"""Weight of one use at which the counts of `aged-lfu` are scaled down."""


@dataclass(frozen=True)
class Counts:
    """What a replay counted, by unit of resampling.

    depth      int64 (n_units, E)  accesses found at each depth of the stack: hits at capacities above it (0-based)
    cold       int64 (n_units, E)  first touches, by how many experts had been touched before
    undefined  capacities from 1 to this one are undefined (forced admission of an event that doesn't fit)
    """

    depth: np.ndarray
    cold: np.ndarray
    undefined: int

    @property
    def accesses(self) -> np.ndarray:
        """int64 (n_units,)"""
        return self.depth.sum(axis=1) + self.cold.sum(axis=1)


def replay(
    events: Events,
    policy: str,
    *,
    access: str = "token",
    admission: str = "forced",
    keep: bool = True,
    span: int = 64,
    half_life: float = 64.0,
) -> Counts:
    """Send a stream of events through caches of all capacities at once.

    policy, access, admission  see above
    keep       False: the cache, and what the policy remembers, is emptied before every run (text or batch)
    span       tokens that `window` and `lookahead` look at, >= 1
    half_life  tokens after which a use counts half in `aged-lfu`, > 0
    """
    check(policy, POLICIES, "policy")
    check(access, ACCESS, "access")
    check(admission, ADMISSION, "admission")
    if span < 1 or not half_life > 0:
        raise InputError(f"a window of {span} and a half-life of {half_life}: expected at least 1, and above 0.")
    n = max(events.n_experts, 1)
    depth, cold = np.zeros((events.n_units, n), np.int64), np.zeros((events.n_units, n), np.int64)
    number, bypass = POLICIES.index(policy), admission == "bypass"
    following = np.empty(len(events.experts) if number == BELADY else 0, smallest(len(events.experts) + n))
    next_use(events.experts[: len(following)], n, following)
    _replay(
        events.offsets, events.experts, events.runs, events.unit, n, number, ACCESS.index(access), bypass, keep,
        span * events.per_token, 1 / (half_life * events.per_token), following, depth, cold,
    )  # fmt: skip
    fits = bypass or access != "token"
    return Counts(depth, cold, 0 if fits else max(events.largest - 1, 0))


def resident(events: Events, order: np.ndarray) -> Counts:
    """The same counts for a cache that is filled beforehand and never changes: with the first C of `order` (E,)."""
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return Counts(uses(events)[:, order], np.zeros((events.n_units, len(order)), np.int64), 0)


def uses(events: Events) -> np.ndarray:
    """How often each unit needs each expert: int64 (n_units, E)."""
    n = max(events.n_experts, 1)
    ends = events.offsets[events.runs]
    total = np.zeros((events.n_units, n), np.int64)
    _count(events.experts, ends, events.unit, total)
    return total


def hits_by_capacity(counts: Counts, cold: str = "miss") -> tuple[np.ndarray, np.ndarray]:
    """Hits at capacities 1 to E, and accesses: float64 (n_units, E), NaN where undefined, and (n_units,).

    cold  `miss`: a first touch is a miss, like any other load. `free`: a first touch is a hit as long as the cache
          isn't full (moe-lrc counts so: such a load evicts nothing). `excluded`: first touches are left out of both.
    """
    check(cold, COLD, "cold")
    hits = counts.depth.cumsum(axis=1).astype(float)
    accesses = counts.accesses
    if cold == "free":
        hits += counts.cold.cumsum(axis=1)
    elif cold == "excluded":
        accesses = counts.depth.sum(axis=1)
    hits[:, : counts.undefined] = np.nan
    return hits, accesses


def smallest(n: int) -> type:
    """The smaller type of index that reaches n."""
    return np.int32 if n < 2**31 else np.int64


def check(value: str, known: tuple[str, ...], name: str) -> None:
    """Refuse a value that isn't one of those known."""
    if value not in known:
        raise InputError(f"{name} is {value!r}; expected one of {', '.join(known)}.")


@njit(cache=True, nogil=True)
def next_use(experts, n_experts, following):
    """Fill in where each access's expert is accessed next: after the end where never again, no two at one place."""
    n = len(experts)
    upcoming = n + np.arange(n_experts)
    for at in range(n - 1, -1, -1):
        following[at] = upcoming[experts[at]]
        upcoming[experts[at]] = at


@njit(cache=True, nogil=True)
def _count(experts, ends, unit, total):
    for run in range(len(unit)):
        for at in range(ends[run], ends[run + 1]):
            total[unit[run], experts[at]] += 1


@njit(cache=True, nogil=True)
def _replay(offsets, experts, runs, unit, n_experts, policy, access, bypass, keep, span, rate, following, depth, cold):
    stack = np.zeros(n_experts, np.int64)
    mark = np.zeros(n_experts, np.int64)
    renewed = np.zeros(n_experts, np.int64)
    weight = np.zeros(n_experts, np.float64)
    # A positive float64 read as an integer keeps its order, so one type of priority serves all policies.
    key = weight.view(np.int64)
    one = np.int64(1) << SHIFT
    low = one - 1
    n = 0  # experts in the stack
    origin, end = np.int64(0), runs[len(runs) - 1]
    heavy, growth = 1.0, 2.0**rate
    # Hits are counted when an expert's turn comes, unless others of its event may have moved it by then.
    beforehand = access == SNAPSHOT or (access == TOKEN and bypass)
    for run in range(len(unit)):
        if run == 0 or not keep:
            key[:] = 0
            n = 0
            heavy = 1.0
            origin = runs[run]
            if not keep:
                end = runs[run + 1]
            if policy == LOOKAHEAD:
                for at in range(offsets[origin], offsets[min(origin + span, end)]):
                    key[experts[at]] += one
        hits, colds = depth[unit[run]], cold[unit[run]]
        for event in range(runs[run], runs[run + 1]):
            first, last = offsets[event], offsets[event + 1]
            if policy == WINDOW and event - span >= origin:
                for at in range(offsets[event - span], offsets[event - span + 1]):
                    key[experts[at]] -= one
            if beforehand:
                _look_up(stack, n, experts, first, last, mark, event + 1, hits)
            begin = first
            while begin < last:
                stop = last if access == TOKEN else begin + 1
                for at in range(begin, stop):
                    expert = experts[at]
                    if policy == LRU:
                        key[expert] = at
                    elif policy == AGED:
                        weight[expert] += heavy * (1 + (at - first) * HAIR)
                    elif policy == BELADY:
                        key[expert] = -np.int64(following[at])
                    elif policy == LOOKAHEAD:
                        key[expert] = ((key[expert] & ~low) - one) | at
                    else:
                        key[expert] = ((key[expert] & ~low) + one) | at
                # Admitting a set of experts is admitting them in turn, when none of them can be evicted meanwhile.
                protected = access == TOKEN and not bypass
                if protected:
                    for at in range(begin, stop):
                        renewed[at - begin], key[experts[at]] = key[experts[at]], FOREMOST
                for at in range(begin, stop):
                    grown = _admit(stack, n, experts[at], key, bypass, hits, not beforehand)
                    if grown > n:
                        colds[n] += 1
                        n = grown
                if protected:
                    for at in range(begin, stop):
                        key[experts[at]] = renewed[at - begin]
                begin = stop
            if policy == LOOKAHEAD and event + span < end:
                for at in range(offsets[event + span], offsets[event + span + 1]):
                    key[experts[at]] += one
            if policy == AGED:
                heavy *= growth
                if heavy > HEAVY:
                    _lighten(weight, key, 1 / heavy)
                    heavy = 1.0


@njit(cache=True, nogil=True)
def _look_up(stack, n, experts, first, last, mark, stamp, hits):
    """Count the experts of an event at the depths where they are."""
    for at in range(first, last):
        mark[experts[at]] = stamp
    for place in range(n):
        hits[place] += mark[stack[place]] == stamp


@njit(cache=True, nogil=True)
def _admit(stack, n, used, key, bypass, hits, counted):
    """Bring the stack of n experts up to date after one was used, and count where it was; how many it holds then.

    In hand is what the caches of the capacities passed so far have left over: it falls to the next place of the stack,
    unless what is there is better. The walk ends where the used expert was, or at the end if it is new.
    """
    if n == 0:
        stack[0] = used
        return 1
    hand, place = used, 0
    if not bypass:
        hand, place = stack[0], 1
        stack[0] = used
        if hand == used:
            hits[0] += counted
            return n
    priority = key[hand]
    while place < n:
        expert = stack[place]
        if expert == used:
            hits[place] += counted
            stack[place] = hand
            return n
        other = key[expert]
        worse = other < priority
        stack[place] = hand if worse else expert  # without a branch: the outcome is hard to predict
        hand = expert if worse else hand
        priority = other if worse else priority
        place += 1
    stack[n] = hand
    return n + 1


@njit(cache=True, nogil=True)
def _lighten(weight, key, factor):
    """Scale all weights; what would become 0, or equal, keeps its place in the order."""
    previous = np.int64(0)
    for expert in np.argsort(weight):
        if weight[expert] > 0:
            weight[expert] *= factor
            if key[expert] <= previous:
                key[expert] = previous + 1
            previous = key[expert]
