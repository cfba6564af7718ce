"""How alike the versions of one text are routed: translations found by segment_id, their routing, its divergence.

What alignment, u_shape, language_distance and loss_correlation share. See alignment for the definitions.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import xlogy

from workbench.analysis.counting import column, experts_of
from workbench.analysis.resampling import draws
from workbench.errors import InputError
from workbench.routing import NO_EXPERT
from workbench.tracefile import Trace

MEASURES = {"divergence": "divergence", "frequency_divergence": "frequency divergence"}
UNDEFINED = 1e-6
"""Denominators below this (nats) are rounding: both distributions are uniform."""
POOLED = "all"
"""Name of the row that averages over the languages, each with equal weight."""


@dataclass(frozen=True)
class Aligned:
    """Which sequences are translations of each other.

    languages   sorted; the reference, where there is one, comes first
    cell        int (n_sequences,)         (text, language) pair of each sequence, -1 where it plays no part
    cells       int (n_texts, n_languages) number of that pair; -1 where the text isn't in the language
    source      int (n_texts,)             texts are shuffled within it
    n_tokens    (n_sequences,)             weight of a sequence in its pair
    """

    languages: list[str]
    cell: np.ndarray
    cells: np.ndarray
    source: np.ndarray
    n_tokens: np.ndarray


def choose_measure(trace: Trace, measure: str | None) -> str:
    """The measure asked for, or the best the trace allows."""
    recorded = "profiles" in trace.recorded
    if measure is None:
        return "divergence" if recorded else "frequency_divergence"
    if measure not in MEASURES:
        raise InputError(f"measure is {measure!r}; expected one of {', '.join(MEASURES)}.")
    if measure == "divergence" and not recorded:
        raise InputError(
            f"run {trace.run} holds no router probabilities; use measure='frequency_divergence', or trace again with "
            "--record ids,weights,profiles."
        )
    return measure


def align(trace: Trace, by: str = "lang", reference: str | None = None) -> Aligned:
    """Find the texts that exist in several languages; with a reference, those that exist in it and in another.

    `by` is the column that tells the versions apart. InputError if no text has two.
    """
    sequences = trace.sequences()
    lang = column(sequences, by)
    column(sequences, "segment_id")
    part = pd.DataFrame({"segment": sequences["segment_id"], "lang": lang, "source": sequences["source"]})
    part = part[part["segment"].notna() & part["lang"].notna()].astype({"lang": str})
    usable = part.groupby("segment")["lang"].transform("nunique").gt(1)
    if reference is not None:
        if reference not in set(part["lang"]):
            found = ", ".join(sorted(set(part["lang"])))
            raise InputError(f"no text has {by} {reference!r}; this trace has {found}. Choose one as the reference.")
        usable &= part["segment"].isin(part.loc[part["lang"] == reference, "segment"])
    part = part[usable]
    if part.empty:
        twice = f"with two different {by}" if reference is None else f"both with {by} {reference!r} and with another"
        raise InputError(
            f"no segment_id occurs {twice}: this corpus isn't parallel. Give translations of one text the same "
            "segment_id and trace again."
        )
    languages = sorted(set(part["lang"]), key=lambda label: (label != reference, label))
    text, segments = pd.factorize(part["segment"])
    language = pd.Index(languages).get_indexer(pd.Index(part["lang"]))
    pairs, cell_of_part = np.unique(text * len(languages) + language, return_inverse=True)
    cells = np.full(len(segments) * len(languages), -1)
    cells[pairs] = np.arange(len(pairs))
    cell = np.full(len(sequences), -1)
    cell[part.index.to_numpy()] = cell_of_part
    return Aligned(
        languages=languages,
        cell=cell,
        cells=cells.reshape(len(segments), -1),
        source=pd.factorize(part.groupby(text)["source"].first())[0],
        n_tokens=np.bincount(trace.sequence_index(), minlength=len(sequences)),
    )


def text_profiles(trace: Trace, layer: int, aligned: Aligned, measure: str) -> np.ndarray:
    """q of each (text, language) pair: float64 (n_pairs, n_experts), rows sum to 1, NaN where there was nothing."""
    n_experts = experts_of(trace, layer)
    n_pairs = int(aligned.cell.max()) + 1
    used = aligned.cell >= 0
    total = np.zeros((n_pairs, n_experts))
    if measure == "divergence":
        profiles = trace.profiles(layer)[used] * aligned.n_tokens[used, None]
        known = np.isfinite(profiles).all(axis=1)
        np.add.at(total, aligned.cell[used][known], profiles[known])
    else:
        experts = trace.experts(layer)
        cell = aligned.cell[trace.sequence_index()]
        for rank in range(experts.shape[1]):
            chosen = (cell >= 0) & (experts[:, rank] != NO_EXPERT)
            flat = cell[chosen] * n_experts + experts[chosen, rank]
            total += np.bincount(flat, minlength=total.size).reshape(total.shape)
    mass = total.sum(axis=1, keepdims=True)
    return np.divide(total, mass, out=np.full(total.shape, np.nan), where=mass > 0)


def divergences(q: np.ndarray, cells: np.ndarray, partners: list[np.ndarray] | None = None) -> np.ndarray:
    """Divergence of each text from its reference: (n_texts, n_languages - 1), NaN where there is none.

    q as in `text_profiles`; cells (n_texts, n_languages) as in `Aligned`, the reference in the first column.
    With `partners`, each int (n_texts,), text i of every language is compared with the reference of text partner[i]
    (-1: with nothing), and the result is the mean over the partners.
    """
    entropies = -xlogy(q, q).sum(axis=1)
    other = cells[:, 1:]
    text, language = np.nonzero(other >= 0)
    pair = other[text, language]
    turns = []
    for partner in [np.arange(len(cells))] if partners is None else partners:
        reference = np.where(partner[text] >= 0, cells[partner[text], 0], -1)
        known = reference >= 0
        reference = reference[known]
        values = np.full(other.shape, np.nan)
        values[text[known], language[known]] = normalised_divergence(
            q[reference], q[pair[known]], entropies[reference], entropies[pair[known]]
        )
        turns.append(values)
    return average(np.stack(turns))


def normalised_divergence(p: np.ndarray, q: np.ndarray, entropy_p: np.ndarray, entropy_q: np.ndarray) -> np.ndarray:
    """JSD(p, q) / (log E − ½(H(p) + H(q))) over the last axis, in [0, 1]; NaN where both are uniform or E is 1."""
    half = 0.5 * (entropy_p + entropy_q)
    middle = 0.5 * (p + q)
    jsd = -xlogy(middle, middle).sum(axis=-1) - half
    room = np.log(p.shape[-1]) - half
    defined = room > UNDEFINED
    return np.divide(jsd, room, out=np.full(jsd.shape, np.nan), where=defined).clip(0, 1)


def average(values: np.ndarray) -> np.ndarray:
    """Mean over axis 0 of what is not NaN; NaN where nothing is."""
    known = np.isfinite(values)
    number = known.sum(axis=0)
    total = np.where(known, values, 0).sum(axis=0)
    return np.divide(total, number, out=np.full(number.shape, np.nan), where=number > 0)


def means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means over texts, then over languages: (n_resamples, n_languages + 1), the last column all languages."""
    known = np.isfinite(values)
    total = weights @ np.where(known, values, 0).astype(np.float64)
    number = weights @ known.astype(np.float64)
    each = np.divide(total, number, out=np.full(total.shape, np.nan), where=number > 0)
    return np.column_stack([each, average(each.T)])


def resample(values: np.ndarray, n_resamples: int, seed: int) -> np.ndarray:
    """`means` of bootstrap resamples of texts; all languages of a text are drawn together."""
    chunks = [means(values, weights) for weights in draws(len(values), n_resamples, seed)]
    return np.concatenate(chunks) if chunks else np.empty((0, values.shape[1] + 1))


def per_language(aligned: Aligned, weights: np.ndarray) -> np.ndarray:
    """Sum of sequence weights in each language: (n_languages,)."""
    used = aligned.cell >= 0
    of_pair = np.bincount(aligned.cell[used], weights[used])
    return np.where(aligned.cells >= 0, of_pair[aligned.cells], 0).sum(axis=0)
