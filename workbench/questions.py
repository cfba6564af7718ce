"""What a report asks of a trace: the analyses in their sections, in order, and which rows of each are worth showing."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from workbench import figures
from workbench.analysis.alignment import POOLED
from workbench.tracefile import Trace


@dataclass
class Question:
    """One analysis with its arguments.

    pick      chooses and orders the rows shown on the page, `choice` says which
    headline  whether its first finding is among those that open the report
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    heading: str = ""
    pick: Callable[[pd.DataFrame], pd.DataFrame] | None = None
    choice: str = ""
    headline: bool = False


def sections(trace: Trace, sequences: pd.DataFrame) -> list[dict[str, Any]]:
    """What the report asks, in order. What takes norms or a second run is asked only where they are."""
    ranks = Question("norm_rank", {}, "Does the router weight the largest outputs most?")
    agreement = {
        "id": "agreement",
        "title": "Agreement",
        "lead": "Does the other run of this file choose the same experts for the same tokens?",
        "questions": [Question("agreement", {}, "Layer by layer", together, ", all layers together", headline=True)],
    }
    return [
        *(labels(sequences, by, noun, strata) for by, noun, strata in LABELS),
        {
            "id": "translations",
            "title": "Translations",
            "lead": "Is one text routed alike in two languages? Lower is more alike. Dotted lines compare different "
            "texts of the same two languages: the gap below them is what shared content adds.",
            "questions": [
                Question(
                    "alignment", {}, "Divergence, layer by layer", pooled, ", the mean of all languages", headline=True
                ),
                Question("u_shape", {}, "Is the middle of the model more alike than its ends?", headline=True),
                Question("language_distance", {}, "Every two languages", together, ", all layers together"),
                Question("loss_correlation", {}, "Does divergence go with loss?"),
            ],
        },
        {
            "id": "tokens",
            "title": "Tokens",
            "lead": "What does a single token decide? Its id alone, and how sure the routers are of their choice.",
            "questions": [
                Question(
                    "vocabulary",
                    {},
                    "How far the token id alone decides",
                    favourites,
                    ", the surest ids",
                    headline=True,
                ),
                Question("uncertainty", {}, "How sure the routers are, and whether it goes with the loss"),
            ],
        },
        {
            "id": "cache",
            "title": "Consistency and cache",
            "lead": "Does a text stay with the same experts, so that a machine that can't hold them all keeps those it "
            "will need?",
            "questions": [
                Question("consistency", {}, "Local routing consistency", headline=True),
                Question("segment_cache", {}, "The cache that knows the next tokens"),
                Question(
                    "cache",
                    {},
                    "Hit rate of every policy and capacity",
                    together,
                    ", all layers together",
                    headline=True,
                ),
                Question("cache_speed", {}, "Is it worth it? Speed on assumed hardware"),
                Question("prefetch", {}, "Can the next layer's experts be told in time?"),
            ],
        },
        {
            "id": "structure",
            "title": "Structure",
            "lead": "Which experts work together, within a layer and from layer to layer?",
            "questions": [
                Question("coactivation", {}, "Pairs within a layer", clearest, ", the strongest pairs", headline=True),
                Question("partners", {}, "Partners by depth"),
                Question("affinity", {}, "From layer to layer", clearest, ", the strongest links"),
                Question("layer_links", {}, "What any layer tells about any other"),
            ],
        },
        {
            "id": "load",
            "title": "Load",
            "lead": "How evenly is the work spread over the experts of each layer, and what does that cost a server?",
            "questions": [
                Question("balance", {}, "Balance of each layer", headline=True),
                Question("load", {}, "Every expert", busiest, ", the busiest experts"),
                Question("straggler", {}, "Waiting for the busiest device"),
                Question("bandwidth", {}, "How many experts a batch touches"),
                Question(
                    "placement",
                    {"time_limit": 5.0},
                    "Does it help to place experts that follow each other?",
                    headline=True,
                ),
                Question("importance", {}, "What each expert contributes", weightiest, ", the most important"),
                *([ranks] if {"weights", "norms"} <= trace.recorded else []),
            ],
        },
        *([agreement] if len(trace.runs()) == 2 else []),
    ]


LABELS = (("lang", "language", "source"), ("domain", "domain", "lang"))
"""Columns the report compares texts by, their nouns, and the column whose values the null keeps apart."""


def labels(sequences: pd.DataFrame, by: str, noun: str, strata: str) -> dict[str, Any]:
    """The section about the values of one column."""
    within = strata if varies(sequences, by, strata) else None
    arguments = {"by": by, "within": within}
    kept = f", labels shuffled within each {figures.noun(within)}" if within else ""
    return {
        "id": f"{noun}s",
        "title": f"{noun}s".capitalize(),
        "lead": f"Does the choice of experts depend on the {noun} of a text, and which experts does each "
        f"{noun} prefer? Blocks in the heatmap are specialists; white is what all texts together do.",
        "questions": [
            Question("mutual_information", arguments, "How much, layer by layer", headline=True),
            Question("specialization", arguments, "Which experts", strongest, f", the strongest preferences{kept}"),
            Question("group_similarity", {"by": by}, f"Which {noun}s are routed alike"),
        ],
    }


def varies(sequences: pd.DataFrame, by: str, within: str) -> bool:
    """Whether some stratum holds several labels, so that labels can be shuffled inside it."""
    known = sequences[[by, within]].dropna().astype(str) if {by, within} <= set(sequences.columns) else pd.DataFrame()
    return len(known) > 0 and bool((known.groupby(within)[by].nunique() > 1).any())


def strongest(frame: pd.DataFrame) -> pd.DataFrame:
    """Significant rows, largest use relative to all groups first."""
    return frame[frame["q"] < 0.05].sort_values("relative", ascending=False)


def pooled(frame: pd.DataFrame) -> pd.DataFrame:
    """The mean of all languages."""
    return frame[frame["lang"] == POOLED]


def busiest(frame: pd.DataFrame) -> pd.DataFrame:
    """The largest shares first."""
    return frame.sort_values("share", ascending=False)


def together(frame: pd.DataFrame) -> pd.DataFrame:
    """All layers together."""
    return frame[frame["layer"].isna()]


def favourites(frame: pd.DataFrame) -> pd.DataFrame:
    """Token ids that go to one expert most surely."""
    return frame[frame["q"] < 0.05].sort_values("low", ascending=False)


def clearest(frame: pd.DataFrame) -> pd.DataFrame:
    """Significant pairs, the highest lifts first, judged by the lower end of the interval."""
    return frame[frame["q"] < 0.05].sort_values("lift_low", ascending=False)


def weightiest(frame: pd.DataFrame) -> pd.DataFrame:
    """The most important experts first, by the first score there is."""
    score = next(name.removesuffix("_rank") for name in frame.columns if name.endswith("_rank"))
    return frame.sort_values(score, ascending=False)


def least_alike(frame: pd.DataFrame) -> pd.DataFrame:
    """The overlap of every group over all layers, the smallest first."""
    return together(frame[frame["measure"] == "overlap"]).sort_values("value", kind="stable")


def most_changed(frame: pd.DataFrame) -> pd.DataFrame:
    """Experts whose share surely changed (an interval without 0), the largest changes first."""
    sure = frame[(frame["low"] > 0) | (frame["high"] < 0)]
    return sure.sort_values("difference", key=lambda values: -values.abs(), kind="stable")
