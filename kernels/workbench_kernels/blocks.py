"""Pairs of a token and one of its experts, as rows in blocks of one expert each: what a grouped product goes over.

    blocks = sorted_blocks(chosen, n_experts, rows=64)       # chosen int64 (T, k)
    blocks.order[blocks.first[0] : blocks.end[0]]            # up to 64 pairs t · k + r that chose blocks.expert[0]

Their number depends on shapes alone: it is what the most unfavourable choices would need, and blocks that are left over
have no rows. So a device never waits for its host to count. (Gale et al. 2022, "MegaBlocks", §5, groups the same way.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """Rows to compute, in blocks of one expert each; int64.

    order   (T · k): pairs, t · k + r, in the order of the rows
    expert  (n): of each block; first, end (n): its rows, the first and the one after the last. It may have none
    """

    order: Tensor
    expert: Tensor
    first: Tensor
    end: Tensor


def sorted_blocks(chosen: Tensor, n_experts: int, rows: int) -> Blocks:
    """Blocks of up to `rows` pairs of one expert, for chosen experts int64 (T, k), E for none.

    Their number is what the most unfavourable choices would need: no copy to the host.
    """
    found, order = torch.sort(chosen.flatten(), stable=True)
    first_row = torch.searchsorted(found, torch.arange(n_experts + 1, device=chosen.device))
    needed = (first_row.diff() + rows - 1) // rows
    after = needed.cumsum(0)  # blocks up to and with each expert's
    block = torch.arange((len(found) + min(n_experts, len(found)) * (rows - 1)) // rows, device=chosen.device)
    expert = torch.searchsorted(after, block, right=True).clamp_(max=n_experts - 1)
    first = first_row[expert] + (block - (after - needed)[expert]) * rows
    return Blocks(order, expert, first, first_row[expert + 1])


def single_blocks(chosen: Tensor, n_experts: int) -> Blocks:
    """A block a pair, unsorted; arguments as of `sorted_blocks`."""
    found = chosen.flatten()
    order = torch.arange(len(found), device=chosen.device)
    return Blocks(order, found.clamp(max=n_experts - 1), order, order + (found < n_experts))
