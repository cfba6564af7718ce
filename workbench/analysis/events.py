"""What a cache of experts is asked for, and when: a trace as a stream of events.

An **event** is a set of distinct experts that are needed at once. What makes one is a choice, and never silent:

- `phase="decode"`: every token is an event, whether the trace has it as prompt or as generated text.
- `phase="prefill"`: the tokens of a chunk of a text are one event (`chunk` tokens; None: the whole text).
- `phase="recorded"`: prompts (and templates) in chunks, generated tokens one by one.
- `batch=B`: B consecutive texts of the trace advance in lockstep; an event is the union over them at one place.

A **run** is what follows without a break: a text, or a batch of texts. A **unit** is what is resampled: the texts (see
`counting`), or blocks of texts, drawn at random, where there are more than `MOST_UNITS`; with batches, the batches.

`plan` works that out once for all layers; `events` and `joint_events` fill in the experts.
"""

from dataclasses import dataclass

import numpy as np
from numba import njit

from workbench.analysis.counting import experts_of, text_codes
from workbench.errors import InputError
from workbench.routing import NO_EXPERT
from workbench.tracefile import Trace

PHASES = ("decode", "prefill", "recorded")
MOST_UNITS = 256
"""More texts than this are resampled in random blocks, so that a table of counts stays small."""


@dataclass(frozen=True)
class Plan:
    """Which tokens make which event, in the order of the stream: those of event i are order[bounds[i]:bounds[i+1]].

    order    int64 (n,)           tokens; None for the order of the trace
    bounds   int64 (n_events+1,)
    runs     int64 (n_runs+1,)    the events of run j are runs[j]..runs[j+1]-1
    unit     int32 (n_runs,)      what each run is resampled with, in 0..n_units-1
    tokens   int64 (n_units,)     tokens of each unit
    n_texts  texts (or batches) in all
    """

    order: np.ndarray | None
    bounds: np.ndarray
    runs: np.ndarray
    unit: np.ndarray
    tokens: np.ndarray
    n_texts: int

    @property
    def n_units(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Events:
    """A stream of events. The experts of event i are experts[offsets[i]:offsets[i+1]], all different.

    offsets    int64 (n_events+1,)
    experts    int32 (n_accesses,)  in the router's rank order, by first occurrence where several tokens are united
    runs       int64 (n_runs+1,)    the events of run j are runs[j]..runs[j+1]-1
    unit       int32 (n_runs,)      what each run is resampled with, in 0..n_units-1
    n_units, n_experts
    per_token  events that each event of the plan was cut into: the layers of a global stream, else 1
    """

    offsets: np.ndarray
    experts: np.ndarray
    runs: np.ndarray
    unit: np.ndarray
    n_units: int
    n_experts: int
    per_token: int = 1

    @property
    def largest(self) -> int:
        """The most experts that one event needs."""
        return int(np.diff(self.offsets).max(initial=0))


def plan(trace: Trace, *, phase: str = "decode", chunk: int | None = None, batch: int = 1, seed: int = 0) -> Plan:
    """Cut the tokens of a trace into events; the options are those of the module. `seed` draws the blocks of texts."""
    if phase not in PHASES:
        raise InputError(f"phase is {phase!r}; expected one of {', '.join(PHASES)}.")
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk is {chunk}; expected at least 1 token, or nothing for whole texts.")
    if batch < 1:
        raise InputError(f"batch is {batch}; expected at least 1 text.")
    of_sequence = trace.sequence_index().astype(np.int64)
    text = text_codes(trace.sequences())
    place = _places(trace, of_sequence, phase, chunk)
    if batch == 1:
        order, run_of_token, unit_of_run = None, of_sequence, text
    else:
        group = of_sequence // batch
        order = np.lexsort((place, group))
        place, run_of_token = place[order], group[order]
        unit_of_run = np.arange(-(-trace.n_sequences // batch))
    n_tokens = len(of_sequence)
    begins = np.ones(n_tokens, bool)
    begins[1:] = (np.diff(place) != 0) | (np.diff(run_of_token) != 0)
    bounds = np.append(np.flatnonzero(begins), n_tokens).astype(np.int64)
    run_of_event = run_of_token[bounds[:-1]]
    starts = np.flatnonzero(np.diff(run_of_event, prepend=-1))
    runs = np.append(starts, len(run_of_event)).astype(np.int64)
    present = unit_of_run[run_of_event[starts]] if n_tokens else np.zeros(0, np.int64)
    found, unit = np.unique(present, return_inverse=True)
    n_texts = len(found)
    if n_texts > MOST_UNITS:
        blocks = np.random.default_rng(seed).permutation(n_texts) % MOST_UNITS
        unit = blocks[unit]
    sizes = np.diff(bounds[runs])
    tokens = np.bincount(unit, weights=sizes, minlength=min(n_texts, MOST_UNITS)).astype(np.int64)
    return Plan(order, bounds, runs, unit.astype(np.int32), tokens, n_texts)


def _places(trace: Trace, of_sequence: np.ndarray, phase: str, chunk: int | None) -> np.ndarray:
    """Number of the event that each token belongs to, counted within its sequence: int64 (n_tokens,)."""
    n_tokens = len(of_sequence)
    first = np.ones(n_tokens, bool)
    first[1:] = np.diff(of_sequence) != 0
    at = np.arange(n_tokens)
    pos = at - np.maximum.accumulate(np.where(first, at, 0))
    if phase == "decode":
        return pos
    if phase == "prefill":
        return pos // chunk if chunk else np.zeros(n_tokens, np.int64)
    generated = (trace.tokens()["phase"] == "generated").to_numpy()
    begins = first | generated
    begins[1:] |= generated[:-1]
    if chunk:
        since = at - np.maximum.accumulate(np.where(begins, at, 0))
        begins |= since % chunk == 0
    number = np.cumsum(begins)
    return number - np.repeat(number[first], np.diff(np.append(np.flatnonzero(first), n_tokens)))


def events(trace: Trace, layer: int, planned: Plan) -> Events:
    """The stream of one layer: its experts are numbered as in the layer."""
    n_experts = experts_of(trace, layer)
    return _fill(trace.experts(layer), int(NO_EXPERT), planned, n_experts, 1)


def joint_events(trace: Trace, planned: Plan, *, whole_tokens: bool = False) -> Events:
    """One stream for all layers: expert e of layer l gets the number e + (experts of the layers before).

    An event is one layer of one event of the plan, layer after layer; with `whole_tokens` all layers are one event.
    Holds the experts of all layers at once: 4 bytes a token, layer and rank, twice.
    """
    sizes = [experts_of(trace, layer) for layer in range(trace.n_layers)]
    width = max((int(k) for k in trace.layers["top_k"]), default=0)
    chosen = np.full((trace.n_tokens, len(sizes), width), -1, np.int32)
    for layer in range(trace.n_layers):
        experts = trace.experts(layer)
        shifted = np.where(experts == NO_EXPERT, -1, experts.astype(np.int32) + sum(sizes[:layer]))
        chosen[:, layer, : experts.shape[1]] = shifted
    parts = 1 if whole_tokens else max(len(sizes), 1)
    return _fill(chosen.reshape(trace.n_tokens, -1), -1, planned, sum(sizes), parts)


def _fill(chosen: np.ndarray, none: int, planned: Plan, n_experts: int, parts: int) -> Events:
    order = np.zeros(0, np.int64) if planned.order is None else planned.order
    offsets, experts = _collect(chosen, none, order, planned.order is not None, planned.bounds, n_experts, parts)
    return Events(offsets, experts, planned.runs * parts, planned.unit, planned.n_units, n_experts, parts)


@njit(cache=True, nogil=True)
def _collect(chosen, none, order, ordered, bounds, n_experts, parts):
    """Distinct experts of each event. chosen (n_tokens, parts * k): each part makes an event of its own."""
    n_events = (len(bounds) - 1) * parts
    k = chosen.shape[1] // parts
    offsets = np.zeros(n_events + 1, np.int64)
    experts = np.empty(chosen.size, np.int32)
    mark = np.full(n_experts, -1, np.int64)
    n = 0
    for event in range(n_events):
        whole, part = event // parts, event % parts
        for at in range(bounds[whole], bounds[whole + 1]):
            token = order[at] if ordered else at
            for rank in range(part * k, (part + 1) * k):
                expert = np.int64(chosen[token, rank])
                if expert != none and mark[expert] != event:
                    mark[expert] = event
                    experts[n] = expert
                    n += 1
        offsets[event + 1] = n
    return offsets, experts[:n].copy()
