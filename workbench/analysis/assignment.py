"""Experts to devices: the placement that costs least for counted traffic, by mixed-integer programming (HiGHS).

The cost of a placement is the share of transitions that cross devices plus `balance` times the mean over layers of
(busiest device / mean device − 1). Every device holds E/devices experts of every layer.

Two ways, both solved by HiGHS through `scipy.optimize.milp`:

- **whole**: all layers in one program. x[l, e, d] = 1 puts expert e of layer l on device d; y[l, i, j, d] in [0, 1]
  says that i and j, neighbours in depth, are both there. Since a device holds E'/D experts j, Σ_j y[i, j, d] =
  (E'/D) · x[i, d], and likewise Σ_i y = (E/D) · x[j, d]: these equalities alone make y exact at whole x, and their
  linear relaxation gives the lower bound.
- **sweeps**: one layer at a time while its neighbours stay, down and up the layers until nothing improves, from the
  contiguous placement and three random ones, as far as the time goes. The program of a layer is first solved without
  whole numbers; the experts that this leaves undecided, and those that another device would suit nearly as well, 16 at
  least, are then placed in whole numbers. It ends where no step improves, not always at the best placement.

The cheaper of the two is returned with the bound that the whole program proved.
"""

import ctypes
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from workbench.errors import InputError

MOST_TERMS = 400_000
"""Terms y of the whole program: with more, its relaxation alone would take the time, and only sweeps are tried."""
FEW_TERMS = 2_000
"""With so few, the whole program is likely to be solved, and is tried first."""
PROVED = 1e-5
"""Relative gap at which a placement counts as the best."""
CLOSE = 1e-3
"""Relative gap at which the program of one layer counts as solved."""
UNDECIDED = 16
"""Experts of a layer that are placed in whole numbers, at least."""
N_STARTS = 4
"""Placements that sweeps start from."""
PATIENCE = 1.0
"""Seconds for one layer, at most."""
BETTER = 1e-9
"""Costs differ when they differ by more than this."""


@dataclass(frozen=True)
class Traffic:
    """What a placement is judged by.

    load   float64 (E,) a layer: assignments of each expert
    moves  float64 (E, E') a pair of adjacent layers: tokens that chose i in the one and j in the next
    """

    load: list[np.ndarray]
    moves: list[np.ndarray]

    @property
    def n_experts(self) -> list[int]:
        return [len(load) for load in self.load]


@dataclass(frozen=True)
class Solution:
    """A placement: devices int64 (E,) a layer; its cost; what no placement costs less than (NaN if nothing was proved);
    how it was found, "whole" or "sweeps"."""

    devices: list[np.ndarray]
    cost: float
    bound: float
    how: str

    @property
    def gap(self) -> float:
        """Part of the cost that could at most be saved still: 0 is proved to be the best."""
        return (self.cost - self.bound) / self.cost if self.cost > BETTER else self.cost - self.bound


def check(n_experts: list[int], devices: int, balance: float, time_limit: float) -> None:
    """Refuse what can't be placed."""
    if devices < 1:
        raise InputError(f"devices is {devices}; expected a whole number of at least 1.")
    for layer, size in enumerate(n_experts):
        if size % devices:
            fitting = [n for n in range(2, size + 1) if all(other % n == 0 for other in n_experts)]
            raise InputError(
                f"layer {layer} has {size} experts, which {devices} devices can't share equally; "
                + (f"choose from {', '.join(map(str, fitting))} devices." if fitting else "no number of devices can.")
            )
    if not (balance >= 0 and np.isfinite(balance)):
        raise InputError(f"balance is {balance}; expected a number of at least 0: what a unit of imbalance costs.")
    if not time_limit > 0:
        raise InputError(f"time_limit is {time_limit}; expected seconds, more than 0.")


def contiguous(n_experts: list[int], devices: int) -> list[np.ndarray]:
    """Blocks of E/devices experts in the order of their ids, what vLLM and SGLang do unless told otherwise."""
    return [np.arange(size) // (size // devices) for size in n_experts]


def at_random(n_experts: list[int], devices: int, random: np.random.Generator) -> list[np.ndarray]:
    """Any placement with equal numbers."""
    return [random.permutation(devices_of_layer) for devices_of_layer in contiguous(n_experts, devices)]


def crossing(traffic: Traffic, placed: list[np.ndarray]) -> np.ndarray:
    """Share of the transitions to the next layer that cross devices: float64 (n_layers − 1,), NaN without any."""
    shares = [np.nan] * len(traffic.moves)
    for layer, moves in enumerate(traffic.moves):
        apart = placed[layer][:, None] != placed[layer + 1]
        if moves.sum() > 0:
            shares[layer] = float((moves * apart).sum() / moves.sum())
    return np.array(shares)


def busiest(traffic: Traffic, placed: list[np.ndarray], devices: int) -> np.ndarray:
    """Load of the busiest device over the mean device: float64 (n_layers,), NaN where there is no load."""
    result = [
        np.bincount(where, load, minlength=devices).max() * devices / load.sum() if load.sum() > 0 else np.nan
        for where, load in zip(placed, traffic.load, strict=True)
    ]
    return np.array(result)


def cost_of(traffic: Traffic, placed: list[np.ndarray], devices: int, balance: float) -> float:
    """Share of all transitions that cross devices + balance · mean over layers of (busiest / mean − 1)."""
    total = sum(moves.sum() for moves in traffic.moves)
    crossed = np.nansum(crossing(traffic, placed) * [moves.sum() for moves in traffic.moves])
    return float(crossed / max(total, 1) + balance * np.nansum(busiest(traffic, placed, devices) - 1) / len(placed))


def solve(traffic: Traffic, devices: int, *, balance: float, time_limit: float, seed: int) -> Solution:
    """The best placement found within about `time_limit` seconds; InputError if experts can't be shared equally."""
    check(traffic.n_experts, devices, balance, time_limit)
    start = contiguous(traffic.n_experts, devices)
    if devices == 1:
        return Solution(start, cost_of(traffic, start, 1, balance), cost_of(traffic, start, 1, balance), "whole")
    terms = devices * sum(moves.size for moves in traffic.moves)
    began = time.monotonic()

    def left(at_least: float) -> float:
        return max(time_limit - (time.monotonic() - began), at_least * time_limit)

    bound, exact = np.nan, None
    if terms <= FEW_TERMS:
        exact, bound = whole_solution(traffic, devices, balance, left(0) / 2)
        if exact is not None and exact.gap < PROVED:
            return exact
    best = sweeps(traffic, devices, balance, left(0.25) / (2 if FEW_TERMS < terms <= MOST_TERMS else 1), seed)
    if FEW_TERMS < terms <= MOST_TERMS:
        exact, bound = whole_solution(traffic, devices, balance, left(0.25))
    if exact is not None and exact.cost < best.cost - BETTER:
        return exact
    return Solution(best.devices, best.cost, min(bound, best.cost), "sweeps")


def whole_solution(traffic: Traffic, devices: int, balance: float, time_limit: float) -> tuple[Solution | None, float]:
    """What the whole program finds in time, and the bound it proves."""
    placed, bound = whole(traffic, devices, balance, time_limit)
    if placed is None:
        return None, bound
    cost = cost_of(traffic, placed, devices, balance)
    return Solution(placed, cost, min(bound, cost), "whole"), bound


def sweeps(traffic: Traffic, devices: int, balance: float, time_limit: float, seed: int) -> Solution:
    """Improve layer by layer, from the contiguous placement and then from random ones while time is left."""
    random = np.random.default_rng(seed)
    end = time.monotonic() + time_limit
    start = contiguous(traffic.n_experts, devices)
    best, lowest = start, cost_of(traffic, start, devices, balance)
    for _ in range(N_STARTS):
        placed, cost = descend(traffic, list(start), devices, balance, end)
        if cost < lowest - BETTER:
            best, lowest = placed, cost
        if time.monotonic() >= end:
            break
        start = at_random(traffic.n_experts, devices, random)
    return Solution(best, lowest, np.nan, "sweeps")


def descend(
    traffic: Traffic, placed: list[np.ndarray], devices: int, balance: float, end: float
) -> tuple[list[np.ndarray], float]:
    """Sweep down and up until no layer can be improved or the time is over."""
    cost = cost_of(traffic, placed, devices, balance)
    n_layers = len(placed)
    settled = 0  # layers in a row that couldn't be improved
    order = [*range(n_layers), *range(n_layers - 2, 0, -1)]  # down and up
    step = 0
    while settled < len(order) and time.monotonic() < end:
        layer = order[step % len(order)]
        step += 1
        settled += 1
        found = one_layer(traffic, placed, layer, devices, balance, min(PATIENCE, end - time.monotonic()))
        if found is None:
            continue
        changed = [*placed[:layer], found, *placed[layer + 1 :]]
        lower = cost_of(traffic, changed, devices, balance)
        if lower < cost - BETTER:
            placed, cost, settled = changed, lower, 0
    return placed, cost


def one_layer(
    traffic: Traffic, placed: list[np.ndarray], layer: int, devices: int, balance: float, time_limit: float
) -> np.ndarray | None:
    """Good devices for one layer's experts while all other layers stay: int64 (E,); None if none were found."""
    load = traffic.load[layer]
    near = np.zeros((len(load), devices))  # transitions kept on the device, for each expert on each device
    if layer > 0:
        near += traffic.moves[layer - 1].T @ np.eye(devices)[placed[layer - 1]]
    if layer + 1 < len(placed):
        near += traffic.moves[layer] @ np.eye(devices)[placed[layer + 1]]
    gain = near / max(sum(moves.sum() for moves in traffic.moves), 1)
    price = balance / len(placed) * devices / max(load.sum(), 1)  # of a unit of load on the busiest device
    room = np.full(devices, len(load) // devices)
    relaxed = place(gain, load, room, np.zeros(devices), price)
    if relaxed is None:
        return None
    parts, regret = relaxed
    where = parts.argmax(axis=1)
    regret[parts.max(axis=1) < 1 - 1e-6] = -1
    open_ = np.argsort(regret, kind="stable")[: max(UNDECIDED, int((regret < 0).sum()))]
    closed = np.setdiff1d(np.arange(len(load)), open_)
    room = room - np.bincount(where[closed], minlength=devices)
    taken = np.bincount(where[closed], load[closed], minlength=devices)
    whole_numbers = place(gain[open_], load[open_], room, taken, price, time_limit=max(time_limit, 0.01))
    if whole_numbers is None:
        return None
    where[open_] = whole_numbers[0].argmax(axis=1)
    return where


def place(
    gain: np.ndarray,
    load: np.ndarray,
    room: np.ndarray,
    taken: np.ndarray,
    price: float,
    time_limit: float | None = None,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Put n experts on devices: the most gain (n, devices), less `price` times the load of the busiest device.

    load (n,); room, taken (devices,): experts that each device still takes, load that it has already
    time_limit  seconds for whole numbers; None solves without them (experts may be split over devices)

    Returns the part of each expert on each device, (n, devices), and what the second-best device would cost, (n,),
    where it isn't solved in whole numbers; None if there is no answer in time.
    """
    n, devices = gain.shape
    cells = n * devices
    one, same = equal_numbers(n, devices)
    busy = sparse.kron(load[None], sparse.eye_array(devices))
    cost = np.append(-gain.ravel(), price)
    if time_limit is None:
        level = np.append(np.ones(n), room)
        exact = sparse.hstack([sparse.vstack([one, same]), sparse.csr_array((n + devices, 1))])
        limits = [(0, 1)] * cells + [(0, None)]
        cap = sparse.hstack([busy, -np.ones((devices, 1))])
        answer = linprog(cost, A_ub=cap, b_ub=-taken, A_eq=exact, b_eq=level, bounds=limits)
        if answer.x is None:
            return None
        parts = answer.x[:cells].reshape(n, devices)
        reduced = (answer.lower.marginals + answer.upper.marginals)[:cells].reshape(n, devices)
        reduced[np.arange(n), parts.argmax(axis=1)] = np.inf
        return parts, reduced.min(axis=1)
    rows = sparse.bmat([[one, None], [same, None], [busy, -np.ones((devices, 1))]]).tocsr()
    low = np.concatenate([np.ones(n), room, np.full(devices, -np.inf)])
    high = np.concatenate([np.ones(n), room, -taken])
    upper = np.append(np.ones(cells), np.inf)
    integral = np.append(np.ones(cells), 0)
    options = {"time_limit": time_limit, "mip_rel_gap": CLOSE, "presolve": False}
    answer = program(cost, rows, (low, high), (np.zeros(cells + 1), upper), integral, options)
    return None if answer.x is None else (answer.x[:cells].reshape(n, devices), np.zeros(n))


def program(
    cost: np.ndarray,
    rows: Any,
    within: tuple[Any, Any],
    limits: tuple[Any, Any],
    integral: np.ndarray,
    options: dict[str, Any],
) -> Any:
    """Minimise cost · x with rows · x and x between their ends, x[integral > 0] whole: scipy's answer."""
    with quiet():
        return milp(
            cost,
            constraints=LinearConstraint(rows, *within),
            integrality=integral,
            bounds=Bounds(*limits),
            options=options,
        )


def equal_numbers(n_experts: int, devices: int) -> tuple[Any, Any]:
    """Rows that sum, over x[expert, device], what each expert has, (n_experts, …), and each device, (devices, …)."""
    one = sparse.kron(sparse.eye_array(n_experts), np.ones((1, devices)))
    same = sparse.kron(np.ones((1, n_experts)), sparse.eye_array(devices))
    return one, same


@contextmanager
def quiet() -> Iterator[None]:
    """Keep HiGHS, which prints a line of its own now and then, from standard output, which may hold JSON."""
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, ValueError, AttributeError):  # there is no standard output
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
        with suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).fflush(None)  # what C has buffered, while it still leads nowhere
    finally:
        os.dup2(kept, 1)
        os.close(nowhere)
        os.close(kept)


def whole(traffic: Traffic, devices: int, balance: float, time_limit: float) -> tuple[list[np.ndarray] | None, float]:
    """All layers in one program: the placement if one was found, and the proved lower bound of the cost (or NaN)."""
    sizes = traffic.n_experts
    n_layers = len(sizes)
    n_x, n_y = [size * devices for size in sizes], [moves.size * devices for moves in traffic.moves]
    x_at, y_at = np.cumsum([0, *n_x]), sum(n_x) + np.cumsum([0, *n_y])
    width = int(y_at[-1]) + n_layers  # x, then y, then the busiest load of each layer
    total = max(sum(moves.sum() for moves in traffic.moves), 1)

    cost = np.zeros(width)
    rows: list[sparse.csr_array] = []
    low: list[np.ndarray] = []
    high: list[np.ndarray] = []

    def add(parts: dict[int, Any], least: np.ndarray, most: np.ndarray) -> None:
        placed = [sparse.coo_array(part) for part in parts.values()]
        at = [part.col + start for part, start in zip(placed, parts, strict=True)]
        entries = np.concatenate([part.data for part in placed])
        where = np.concatenate([part.row for part in placed]), np.concatenate(at)
        rows.append(sparse.csr_array((entries, where), shape=(len(least), width)))
        low.append(least)
        high.append(most)

    for layer, load in enumerate(traffic.load):
        one, same = equal_numbers(sizes[layer], devices)
        each_one, each_device = np.ones(sizes[layer]), np.full(devices, sizes[layer] / devices)
        add({int(x_at[layer]): one}, each_one, each_one)
        add({int(x_at[layer]): same}, each_device, each_device)
        busiest_at = int(y_at[-1]) + layer
        parts = {int(x_at[layer]): sparse.kron(load[None], sparse.eye_array(devices))}
        add(
            {**parts, busiest_at: sparse.coo_array(-np.ones((devices, 1)))},
            np.full(devices, -np.inf),
            np.zeros(devices),
        )
        cost[busiest_at] = balance / n_layers * devices / max(load.sum(), 1)
    for layer, moves in enumerate(traffic.moves):
        before, after = moves.shape
        y = int(y_at[layer])
        cost[y : y + n_y[layer]] = np.repeat(-moves.ravel() / total, devices)
        each = sparse.eye_array(devices)
        over_j = sparse.kron(sparse.eye_array(before), sparse.kron(np.ones((1, after)), each))
        over_i = sparse.kron(np.ones((1, before)), sparse.eye_array(after * devices))
        of_i = -(after // devices) * sparse.eye_array(before * devices)
        of_j = -(before // devices) * sparse.eye_array(after * devices)
        add({y: over_j, int(x_at[layer]): of_i}, np.zeros(before * devices), np.zeros(before * devices))
        add({y: over_i, int(x_at[layer + 1]): of_j}, np.zeros(after * devices), np.zeros(after * devices))

    upper = np.ones(width)
    upper[y_at[-1] :] = np.inf
    integral = np.zeros(width)
    integral[: y_at[0]] = 1
    lower = np.zeros(width)
    lower[0] = 1  # devices can be renamed: the first expert is on the first
    within = np.concatenate(low), np.concatenate(high)
    options = {"time_limit": time_limit, "mip_rel_gap": PROVED / 10}
    answer = program(cost, sparse.vstack(rows).tocsr(), within, (lower, upper), integral, options)
    # The constant part of the cost: all transitions cross unless kept, and a layer's mean load costs nothing.
    constant = float(sum(moves.sum() for moves in traffic.moves) > 0)
    constant -= balance * sum(load.sum() > 0 for load in traffic.load) / n_layers
    bound = np.nan if answer.mip_dual_bound is None else float(answer.mip_dual_bound) + constant
    if answer.x is None:
        return None, bound
    placed = [answer.x[x_at[layer] : x_at[layer + 1]].reshape(-1, devices).argmax(axis=1) for layer in range(n_layers)]
    return placed, bound
