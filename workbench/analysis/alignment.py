"""Whether translations of one text are routed alike: entropy-normalised divergence from a reference language.

q(text, language) is the mean over a text's tokens of the full router probabilities in one layer. For a text that exists
in the reference language r (English unless asked otherwise) and in language l:

- **divergence** = JSD(q_r, q_l) / (log E − ½(H(q_r) + H(q_l))), averaged over the texts the two languages share. 0:
  routed alike; 1: disjoint, and together using all experts evenly. The denominator bounds the JSD of two distributions
  with these entropies, so that flat routers aren't taken for aligned ones; two disjoint sharp ones stay below 1, at log
  2 / (log E − their mean entropy), so values of layers with other E don't compare. (Bandarkar et al. 2025, Multilingual
  Routing in Mixture-of-Experts, arXiv:2510.04694; they publish no code, so the normalisation is as users of the paper
  cite its appendix.)
- **shuffled**: the same between *different* texts of the same source: what the two languages differ by when the content
  is not shared. **gain** = shuffled − divergence: how much closer true translations are. A gain near 0 means that
  routing here follows the language (or nothing), not the content.
- **frequency divergence**: the same with q = how often each expert was chosen, for traces without probabilities. It is
  larger, because it sees only the chosen experts and few of them in a short text; don't compare the two.

Languages that share different texts with the reference (see n_texts) were compared on different content: between them
only large differences mean anything. All intervals cover 95% of bootstrap resamples of texts. Pieces of one text (same
segment, same language) are pooled by tokens. A pair whose q are both uniform has no defined divergence and is left out.
"""

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis.parallel import (
    MEASURES,
    POOLED,
    align,
    choose_measure,
    divergences,
    means,
    per_language,
    resample,
    text_profiles,
)
from workbench.analysis.resampling import interval
from workbench.tracefile import Trace

N_SHUFFLES = 20
"""Mismatched partners averaged over for each text; the bootstrap over texts carries the uncertainty."""


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
    aligned = align(trace, by, reference)
    shuffles = [mismatch(aligned.source, np.random.default_rng([seed, turn])) for turn in range(N_SHUFFLES)]
    n_sequences = per_language(aligned, np.ones(len(aligned.cell)))[1:]
    n_tokens = per_language(aligned, aligned.n_tokens)[1:]
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
                    "lang": [*aligned.languages[1:], POOLED],
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


def mismatch(source: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """For each text another of the same source, drawn as one random cycle (no text keeps its own); -1 if alone."""
    partner = np.full(len(source), -1)
    for number in np.unique(source):
        texts = random.permutation(np.flatnonzero(source == number))
        if len(texts) > 1:
            partner[texts] = np.roll(texts, 1)
    return partner


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
            f"and {fair.idxmax()} least ({fair.max():.2f}; 0 is alike, 1 the most unlike)."
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
