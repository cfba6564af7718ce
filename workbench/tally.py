"""Count choices while a model runs, on its device: what `--counts-by` keeps instead of rows a token.

Nothing of a token leaves the device: each batch adds to tables of pairs that stay there, and brings back how often its
texts (or groups of texts) chose each expert. See `workbench.counts` for what is counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench import counts
from workbench.analysis.counting import as_label, text_codes
from workbench.analysis.pairs import MOST_CELLS as one_table
from workbench.analysis.pairs import drawn_blocks
from workbench.counts import Counts, Loads
from workbench.errors import InputError, RunError
from workbench.forward import Pass
from workbench.schema import PHASES
from workbench.tokenization import Sequence
from workbench.tracefile import Trace
from workbench_kernels.tallies import tally

MOST_CELLS = 1 << 27
"""Numbers in the tables of all blocks and layers together (1 GB): very many experts leave fewer blocks."""
MOST_GROUPS = 4096
"""More groups of texts than this are a mistake, such as grouping by an id."""
SECONDS = 60.0
"""Between two writes: each replaces the tables of pairs."""
ROW_BYTES = 64 << 20
"""Rows of texts that are held before they are written."""


class Texts:
    """What has to be known of all texts before the first is counted: who belongs together.

    group  columns whose values make a group of texts; none: each text is counted by itself
    """

    def __init__(self, group: Iterable[str] = ()):
        self.group = list(dict.fromkeys(group))
        self.labels: list[int] = []  # of each sequence, a place in `known`
        self.known: dict[tuple[str | None, ...], int] = {}
        self._segments: list[str | None] = []

    def note(self, found: Iterable[Sequence]) -> Iterator[Sequence]:
        """The same sequences, remembered. InputError for too many groups."""
        for sequence in found:
            self._segments.append(sequence.segment_id)
            key = tuple(as_label(_value(sequence, name)) for name in self.group)
            self.labels.append(self.known.setdefault(key, len(self.known)))
            if len(self.known) > MOST_GROUPS:
                raise InputError(
                    f"the texts have more than {MOST_GROUPS:,} different values of {', '.join(self.group)}: count by "
                    "columns with fewer, or each text by itself: --counts-by seq."
                )
            yield sequence

    def blocks(self, layers: list[dict[str, Any]]) -> np.ndarray:
        """uint16 (n_sequences,): the block of each; as many as the tables of `layers` leave room for."""
        for at, name in enumerate(self.group):
            if all(key[at] is None for key in self.known):
                raise InputError(f"no text has a {name!r}: count by a column of the corpus, such as lang or domain.")
        largest = max(row["n_experts"] for row in layers) ** 2
        n_cells = sum((a + 1) * (b + 1) for a, b in _sizes(layers).values())
        text = text_codes(pd.DataFrame({"segment_id": pd.Series(self._segments, dtype=object)}))
        # As many blocks as the analyses would draw, which hold one table at a time, unless all together need more room.
        needed = max(largest, n_cells * one_table // MOST_CELLS)
        return drawn_blocks(text, needed).of_token.astype(np.uint16)


def _value(sequence: Sequence, name: str) -> Any:
    return getattr(sequence, name) if name in ("lang", "domain", "source") else sequence.metadata.get(name)


def _sizes(layers: list[dict[str, Any]]) -> dict[tuple[int, int], tuple[int, int]]:
    """Numbers of experts of each layer with itself, and with the next."""
    n = [row["n_experts"] for row in layers]
    within = {(at, at): (n[at], n[at]) for at in range(len(n))}
    return within | {(at, at + 1): (n[at], n[at + 1]) for at in range(len(n) - 1)}


class Tally:
    """Counts of a run: `add` a pass after the other, and `take` what is to be written.

    layers  the rows of the table `layers`; device: where the model is; texts: all of the run
    """

    def __init__(self, layers: list[dict[str, Any]], device: torch.device | str, texts: Texts):
        self.layers, self.texts = layers, texts
        self.block = texts.blocks(layers)
        self.n_blocks = int(self.block.max(initial=0)) + 1
        self._pairs = {
            pair: torch.zeros(self.n_blocks, a + 1, b + 1, dtype=torch.int64, device=device)
            for pair, (a, b) in _sizes(layers).items()
        }
        self._totals: dict[tuple[int, int], int] = {}  # label and block of a group -> its place in the totals
        self._first: list[int] = []  # sequence that stands for each group
        self._sums: list[np.ndarray] | None = None  # of all groups, as in `_loads`
        self._clear()

    def _clear(self) -> None:
        self._sequences: list[dict[str, Any]] = []
        self._rows: list[tuple[np.ndarray, np.ndarray, list[np.ndarray]]] = []  # seq, phase, `_loads`
        self._bytes = 0
        self._since = time.monotonic()
        self.whole = True
        """Whether every pass so far has been counted in all tables, or in none."""

    def restore(self, trace: Trace) -> None:
        """Go on from what the file holds of the run."""
        for (layer, other), table in self._pairs.items():
            table.copy_(torch.from_numpy(counts.pairs(trace, layer, other)))
        if self.texts.group:
            rows = counts.rows(trace)
            self._first = rows["seq"].tolist()
            keys = [(self.texts.labels[seq], int(self.block[seq])) for seq in self._first]
            self._totals = {key: place for place, key in enumerate(keys)}
            layers = range(len(self.layers))
            self._sums = [read(trace, layer) for read in (counts.loads, counts.load_sizes) for layer in layers]

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        return self._bytes >= ROW_BYTES or time.monotonic() - self._since >= SECONDS

    def add(self, ran: Pass) -> None:
        """Count a pass."""
        sequences = ran.sequences()
        self.whole = False
        place = np.repeat(np.arange(len(sequences)), ran.lengths)  # the sequence of each token
        key = place * len(PHASES) + (0 if self.texts.group else ran.phase.astype(np.int64))
        keys, row = np.unique(key, return_inverse=True)
        seq = np.array([one["seq"] for one in sequences], np.int32)
        loads = self._loads(ran, _spread(row, ran.kept), len(keys))
        self._pair(ran, _spread(self.block[seq][place].astype(np.int64), ran.kept))
        of_row = seq[keys // len(PHASES)]
        if self.texts.group:
            self._sum(of_row, loads)
        else:
            self._rows.append((of_row, (keys % len(PHASES)).astype(np.int8), loads))
            self._bytes += sum(table.nbytes for table in loads)
        self._sequences += sequences
        self.whole = True

    def _loads(self, ran: Pass, row: Tensor, n_rows: int) -> list[np.ndarray]:
        """int64 (n_rows, E) of each layer: how often each expert was chosen; then (n_rows, k + 1) of each: tokens that
        chose 0, 1, … k."""
        choices, sizes = [], []
        for layer, seen in zip(self.layers, ran.observed, strict=True):
            ids = seen.experts.flatten(0, 1)
            size = (ids >= 0).sum(dim=1, keepdim=True)
            choices.append(tally(ids, layer["n_experts"], group=row, n_groups=n_rows)[:, :-1])
            sizes.append(tally(size, layer["top_k"] + 1, group=row, n_groups=n_rows)[:, :-1])
        tables = [*choices, *sizes]
        flat = torch.cat([table.reshape(-1) for table in tables]).cpu().numpy()  # one copy from the device
        ends = np.cumsum([table.numel() for table in tables])[:-1]
        found = [part.reshape(n_rows, -1) for part in np.split(flat, ends)]
        for layer, chosen, size in zip(self.layers, found, found[len(self.layers) :], strict=False):
            if (chosen.sum(axis=1) != size @ np.arange(size.shape[1])).any():
                raise RunError(
                    f"layer {layer['layer']} ({layer['name']}) gave a token an expert beyond its "
                    f"{layer['n_experts']}, or more than {layer['top_k']}"
                )
        return found

    def _pair(self, ran: Pass, block: Tensor) -> None:
        ids = [seen.experts.flatten(0, 1) for seen in ran.observed]
        for (layer, other), table in self._pairs.items():
            n_experts, n_other = self.layers[layer]["n_experts"], self.layers[other]["n_experts"]
            tally(
                ids[layer], n_experts, other=ids[other], n_other=n_other, group=block, n_groups=self.n_blocks, out=table
            )

    def _sum(self, seq: np.ndarray, loads: list[np.ndarray]) -> None:
        """Add the rows of sequences to the totals of their groups."""
        for one in seq.tolist():
            key = self.texts.labels[one], int(self.block[one])
            if key not in self._totals:
                self._totals[key] = len(self._first)
                self._first.append(one)
        place = [self._totals[self.texts.labels[one], int(self.block[one])] for one in seq.tolist()]
        n = len(self._first)
        sums = self._sums or [np.zeros((0, table.shape[1]), np.int64) for table in loads]
        self._sums = [np.pad(table, ((0, n - len(table)), (0, 0))) if len(table) < n else table for table in sums]
        for table, more in zip(self._sums, loads, strict=True):
            np.add.at(table, place, more)

    def take(self) -> Counts | None:
        """What is to be written; None if there is nothing new. What it holds doesn't change any more."""
        if not self._sequences:
            return None
        if self.texts.group:
            seq, phase = np.array(self._first, np.int32), np.full(len(self._first), -1, np.int8)
            tables = [table.copy() for table in self._sums or ()]
        else:
            seq, phase = (np.concatenate([row[at] for row in self._rows]) for at in (0, 1))
            tables = [np.concatenate(parts) for parts in zip(*(row[2] for row in self._rows), strict=True)]
        n = len(self.layers)
        found = Counts(
            sequences=self._sequences,
            loads=Loads(seq, phase, self.block[seq], tables[:n], tables[n:]),
            pairs={pair: table.to("cpu", copy=True).numpy() for pair, table in self._pairs.items()},
            grouped=bool(self.texts.group),
        )
        self._clear()
        return found


def _spread(values: np.ndarray, kept: Tensor) -> Tensor:
    """int64 (B · S,): the value of each token, -1 where there is padding."""
    out = torch.full(kept.shape, -1, dtype=torch.int64, device=kept.device)
    out[kept] = torch.from_numpy(values).to(kept.device)
    return out.flatten()
