"""Whether translations of one text are routed alike: entropy-normalised divergence from a reference language.

q(text, language) is the mean over a text's tokens of the full router probabilities in one layer. For a text that
exists in the reference language r (English unless asked otherwise) and in language l:

- **divergence** = JSD(q_r, q_l) / (log E − ½(H(q_r) + H(q_l))), averaged over the texts the two languages share.
  0: routed alike; 1: disjoint experts. The denominator is the largest JSD that the two entropies allow, so layers with
  sharp and with flat routers can be compared. (Bandarkar et al. 2025, Multilingual Routing in Mixture-of-Experts,
  arXiv:2510.04694; they publish no code, so the normalisation is as users of the paper cite its appendix.)
- **shuffled**: the same between *different* texts of the same source: what the two languages differ by when the
  content is not shared. **gain** = shuffled − divergence: how much closer true translations are. A gain near 0 means
  that routing here follows the language (or nothing), not the content.
- **frequency divergence**: the same with q = how often each expert was chosen, for traces without probabilities. It is
  larger, because it sees only the chosen experts and few of them in a short text; don't compare the two.

Languages that share different texts with the reference (see n_texts) were compared on different content: between
them only large differences mean anything. All intervals cover 95% of bootstrap resamples of texts. Pieces of one text
(same segment, same language) are pooled by tokens. A pair whose q are both uniform has no defined divergence and is
left out.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from scipy.special import xlogy

from workbench import figures
from workbench.analysis.counting import column, experts_of
from workbench.analysis.resampling import draws, interval
from workbench.errors import InputError
from workbench.routing import NO_EXPERT
from workbench.tracefile import Trace

MEASURES = {"divergence": "divergence", "frequency_divergence": "frequency divergence"}
UNDEFINED = 1e-6
"""Denominators below this (nats) are rounding: both distributions are uniform."""
N_SHUFFLES = 20
"""Mismatched partners averaged over for each text; the bootstrap over texts carries the uncertainty."""
POOLED = "all"
"""Name of the row that averages over the languages, each with equal weight."""


@dataclass(frozen=True)
class Aligned:
    """Which sequences are translations of each other.

    languages   all but the reference, sorted
    cell        int (n_sequences,)             (text, language) pair of each sequence, -1 where it plays no part
    cells       int (n_texts, 1 + n_languages) number of that pair, reference first; -1 where the text isn't translated
    source      int (n_texts,)                 texts are shuffled within it
    n_tokens    (n_sequences,)                 weight of a sequence in its pair
    """

    reference: str
    languages: list[str]
    cell: np.ndarray
    cells: np.ndarray
    source: np.ndarray
    n_tokens: np.ndarray


def alignment(
    trace: Trace,
    *,
    reference: str = "en",
    measure: str | None = None,
    by: str = "lang",
    n_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Divergence of each language from the reference, layer by layer, over texts that share a `segment_id`.

    reference  the language compared with
    measure    `divergence` (needs recorded profiles) or `frequency_divergence`; None takes the first that is possible
    by         column that tells the parallel versions apart: languages, or anything else (two prompts, two styles)

    Returns one row a language × layer, and the mean over languages as language "all": measure, reference, lang, layer;
    value in [0, 1] with low, high; shuffled with shuffled_low, shuffled_high; gain with gain_low, gain_high; n_texts
    compared, n_sequences, n_tokens of the language in them; n_undefined texts left out. NaN where no text is left;
    intervals NaN where there is only one; shuffled NaN where a source has a single text.
    """
    measure = choose_measure(trace, measure)
    aligned = align(trace, reference, by)
    shuffles = [mismatch(aligned.source, np.random.default_rng([seed, turn])) for turn in range(N_SHUFFLES)]
    n_sequences = per_language(aligned, np.ones(len(aligned.cell)))
    n_tokens = per_language(aligned, aligned.n_tokens)
    tables = []
    for layer in range(trace.n_layers):
        profiles = text_profiles(trace, layer, aligned, measure)
        matched = divergences(profiles, aligned.cells)
        shuffled = divergences(profiles, aligned.cells, shuffles)
        gain = shuffled - matched
        columns = {}
        for name, values in (("", matched), ("shuffled", shuffled), ("gain", gain)):
            mean = means(values, np.ones((1, len(values)), np.float32))[0]
            low, high = interval(resample(values, n_resamples, seed))
            single = np.append(np.isfinite(values).sum(axis=0), np.isfinite(values).any(axis=1).sum()) < 2
            low[single], high[single] = np.nan, np.nan
            prefix = f"{name}_" if name else ""
            columns |= {name or "value": mean, f"{prefix}low": low, f"{prefix}high": high}
        n_texts = np.isfinite(matched).sum(axis=0)
        possible = (aligned.cells[:, 1:] >= 0).sum(axis=0)
        tables.append(
            pd.DataFrame(
                {
                    "measure": measure,
                    "reference": reference,
                    "lang": [*aligned.languages, POOLED],
                    "layer": layer,
                    **columns,
                    "n_texts": np.append(n_texts, np.isfinite(matched).any(axis=1).sum()),
                    "n_sequences": np.append(n_sequences, n_sequences.sum()).astype(np.int64),
                    "n_tokens": np.append(n_tokens, n_tokens.sum()).astype(np.int64),
                    "n_undefined": np.append(possible - n_texts, (possible - n_texts).sum()),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


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
            "them recorded."
        )
    return measure


def align(trace: Trace, reference: str, by: str) -> Aligned:
    """Find the texts that exist in the reference and in at least one other language."""
    sequences = trace.sequences()
    lang = column(sequences, by)
    column(sequences, "segment_id")
    part = pd.DataFrame({"segment": sequences["segment_id"], "lang": lang, "source": sequences["source"]})
    part = part[part["segment"].notna() & part["lang"].notna()].astype({"lang": str})
    if reference not in set(part["lang"]):
        found = ", ".join(sorted(set(part["lang"])))
        raise InputError(f"no text has {by} {reference!r}; this trace has {found}. Choose one as the reference.")
    versions = part.groupby("segment")["lang"]
    usable = versions.transform("nunique").gt(1) & part["segment"].isin(part.loc[part["lang"] == reference, "segment"])
    part = part[usable]
    if part.empty:
        raise InputError(
            f"no segment_id occurs both with {by} {reference!r} and with another: this corpus isn't parallel. Give "
            "translations of one text the same segment_id and trace again."
        )
    languages = sorted(set(part["lang"]) - {reference})
    text, segments = pd.factorize(part["segment"])
    language = pd.Index([reference, *languages]).get_indexer(pd.Index(part["lang"]))
    key = text * (1 + len(languages)) + language
    pairs, cell_of_part = np.unique(key, return_inverse=True)
    cells = np.full(len(segments) * (1 + len(languages)), -1)
    cells[pairs] = np.arange(len(pairs))
    cell = np.full(len(sequences), -1)
    cell[part.index.to_numpy()] = cell_of_part
    source = pd.factorize(part.groupby(text)["source"].first())[0]
    return Aligned(
        reference=reference,
        languages=languages,
        cell=cell,
        cells=cells.reshape(len(segments), -1),
        source=source,
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
    """Divergence of each text from its reference: (n_texts, n_languages), NaN where there is none.

    With `partners`, each int (n_texts,), text i of every language is compared with the reference of text partner[i]
    (-1: with nothing), and the result is the mean over the partners.
    """
    entropies = -xlogy(q, q).sum(axis=1)
    other = cells[:, 1:]
    text, language = np.nonzero(other >= 0)
    pair = other[text, language]
    turns = []
    for partner in [np.arange(len(cells))] if partners is None else partners:
        known = partner[text] >= 0
        reference = cells[partner[text[known]], 0]
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


def mismatch(source: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """For each text another of the same source, drawn as one random cycle (no text keeps its own); -1 if alone."""
    partner = np.full(len(source), -1)
    for number in np.unique(source):
        texts = random.permutation(np.flatnonzero(source == number))
        if len(texts) > 1:
            partner[texts] = np.roll(texts, 1)
    return partner


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
    """Sum of sequence weights in each language but the reference: (n_languages,)."""
    used = aligned.cell >= 0
    of_pair = np.bincount(aligned.cell[used], weights[used])
    pair = aligned.cells[:, 1:]
    return np.where(pair >= 0, of_pair[pair], 0).sum(axis=0)


def figure(frame: pd.DataFrame) -> Figure:
    """Divergence by layer with its interval; dashed, the same between texts that are not translations.

    Few languages share a panel, a line each; more get a panel each, most alike first, beside the mean of all in grey.
    """
    measure = MEASURES[frame["measure"].iloc[0]]
    each = frame[frame["lang"] != POOLED]
    languages = list(each.groupby("lang")["value"].mean().sort_values().index)
    title = f"{measure} from {figures.plain(frame['reference'].iloc[0])}"
    if len(languages) <= figures.MOST_LINES:
        result = figures.panels([""], height=300, legend=True)
        for lang in languages:
            part = each[each["lang"] == lang]
            figures.line(
                result, part["layer"], part["value"], part["low"], part["high"], name=lang, style=figures.style(lang),
                band=len(languages) <= figures.MOST_BANDS,
            )  # fmt: skip
        pooled = frame[frame["lang"] == POOLED]
        figures.line(result, pooled["layer"], pooled["shuffled"], name="other texts (mean)", style=figures.NULL)
    else:
        titles = [figures.plain(lang) for lang in languages]
        result = figures.panels(titles, columns=6, height=80, legend=True, tight=True)
        pooled = frame[frame["lang"] == POOLED]
        for panel, lang in enumerate(languages):
            part = each[each["lang"] == lang]
            first = panel == 0
            figures.line(
                result, pooled["layer"], pooled["value"], name="mean of all languages", style=figures.CONTEXT,
                panel=panel, legend=first,
            )  # fmt: skip
            figures.line(
                result, part["layer"], part["shuffled"], name="other texts, same languages", style=figures.NULL,
                panel=panel, legend=first,
            )  # fmt: skip
            figures.line(
                result, part["layer"], part["value"], part["low"], part["high"], name="translations of one text",
                style=figures.MAIN, panel=panel, legend=first,
            )  # fmt: skip
        figures.same_range(result)
    figures.layer_axes(result, frame["layer"], sparse=len(languages) > figures.MOST_LINES)
    result.update_yaxes(rangemode="tozero")
    figures.left_title(result, title)
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """The closest and the farthest language, and what content adds, in sentences."""
    measure = MEASURES[frame["measure"].iloc[0]]
    reference = frame["reference"].iloc[0]
    by_language = frame[frame["lang"] != POOLED].groupby("lang")
    each = by_language.agg(value=("value", "mean"), n_texts=("n_texts", "max")).dropna()
    pooled = frame[frame["lang"] == POOLED]
    if each.empty:
        return [f"No pair of translations has a defined {measure}."]
    # Languages with few of the texts were compared on other content: ranking them with the rest would mislead.
    fair = each[each["n_texts"] >= each["n_texts"].max() / 2]["value"]
    among = "" if len(fair) == len(each) else f", of the {len(fair)} languages with most texts in common,"
    if len(fair) > 1:
        sentences = [
            f"Averaged over layers{among} {fair.idxmin()} is routed most like {reference} ({measure} {fair.min():.2f}) "
            f"and {fair.idxmax()} least ({fair.max():.2f}; 0 is alike, 1 disjoint)."
        ]
    else:
        sentences = [f"Averaged over layers, the {measure} of {fair.index[0]} from {reference} is {fair.iloc[0]:.2f}."]
    if pooled["gain"].notna().any():
        row = pooled.iloc[pooled["gain"].argmax()]
        clear = (pooled["gain_low"] > 0).sum()
        sentences.append(
            f"Translations are routed more alike than other texts of the same languages in {clear} of {len(pooled)} "
            f"layers, most in layer {row['layer']}: {row['value']:.2f} against {row['shuffled']:.2f}."
        )
    return sentences
