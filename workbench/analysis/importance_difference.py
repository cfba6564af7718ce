"""Which experts matter more to one set of tokens than to another: a score of `importance`, of the one minus the other.

- **difference** = S of the group − S of the other set, in the unit of S. NaN where S is a mean over the tokens that
  chose the expert (output_norm, reap) and no token of one of the sets did.
- **p**: two-sided, over texts, as in `contrast`: every S is a ratio of two sums over tokens, as a rate is.
- **q**: false-discovery rate (Benjamini–Hochberg) over all layers × experts of the table.

The intervals cover 95% of bootstrap resamples of texts; a sequence's translations and pieces are one text.
"""

import numpy as np
import pandas as pd

from workbench.analysis import rates
from workbench.analysis.contrast import EVERYTHING_ELSE, two_sets
from workbench.analysis.counting import sum_by
from workbench.analysis.filters import mask
from workbench.analysis.importance import expert_sums, fraction, possible
from workbench.analysis.resampling import bootstrap_sums, q_values, text_interval
from workbench.analysis.token_means import ratio
from workbench.tracefile import Trace


def importance_difference(
    trace: Trace,
    *,
    group: str,
    score: str,
    versus: str | None = None,
    n_resamples: int = 1000,
    n_permutations: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """A score of every expert at the tokens of `group` and of `versus`, and the difference.

    group, versus  filters of tokens (see workbench.analysis.filters); versus None: all others
    score          one of workbench.analysis.importance.NEEDS

    Returns one row a layer × expert: group, versus, layer, expert; value, value_versus; difference with low, high; p,
    q; n_experts; n_tokens, n_tokens_versus, n_texts, n_texts_versus. NaN: intervals where a set is a single text, p
    where chance can't move the difference. InputError if a filter is wrong, the sets share a token, or the trace lacks
    what the score needs.
    """
    possible(trace, (score,))
    first = mask(trace, group)
    cells = two_sets(trace, first, ~first if versus is None else mask(trace, versus), group, versus or EVERYTHING_ELSE)
    tables = []
    for layer in range(trace.n_layers):
        over, under = fraction(score, expert_sums(trace, layer, cells, [score]))
        n_experts = over.shape[1]
        rows = np.hstack([over, under])
        value = ratio(*np.split(sum_by(rows, cells.group, 2), [n_experts], axis=1))
        drawn = bootstrap_sums(rows, cells.text, cells.group, 2, n_resamples, seed)
        drawn = ratio(drawn[..., :n_experts], drawn[..., n_experts:])
        low, high = text_interval(drawn[:, 0] - drawn[:, 1], cells.n_texts.min())
        # In units of the overall score, so that what counts as rounding doesn't depend on the model's norms.
        unit = ratio(over.sum(axis=0), under.sum(axis=0))
        scaled = over / np.where(unit > 0, unit, 1)
        difference = value[0] - value[1]
        known = np.isfinite(difference)
        tables.append(
            pd.DataFrame(
                {
                    "group": group,
                    "versus": versus or EVERYTHING_ELSE,
                    "layer": layer,
                    "expert": np.arange(n_experts),
                    "value": value[0],
                    "value_versus": value[1],
                    "difference": difference,
                    "low": np.where(known, low, np.nan),
                    "high": np.where(known, high, np.nan),
                    "p": rates.chance(scaled, under, cells.group, cells.text, n_permutations, seed),
                    "n_experts": n_experts,
                    "n_tokens": cells.n_tokens[0],
                    "n_tokens_versus": cells.n_tokens[1],
                    "n_texts": cells.n_texts[0],
                    "n_texts_versus": cells.n_texts[1],
                }
            )
        )
    frame = pd.concat(tables, ignore_index=True)
    frame.insert(frame.columns.get_loc("p") + 1, "q", q_values(frame["p"].to_numpy()))
    return frame
