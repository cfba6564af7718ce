"""From a trace to a recipe: the experts that one set of tokens uses oftener than another, and what to do with them.

    table, recipe = find(wb.Trace("demo.duckdb"), "risk_difference", group="lang=de", edit="ablate", top=10)

The sets are filters (`workbench.analysis.filters`); without `versus` the other set is every other token. A method gives
each expert of each layer a **score**, with a 95% interval over texts (low, high), a two-sided **p** over texts, and
**q**, the false-discovery rate (Benjamini–Hochberg) over the layers × experts asked about:

- **risk_difference**: activations of the expert / tokens of the group, minus the same of the other set (SteerMoE,
  Fayyaz et al. 2025); `workbench.analysis.contrast`.
- **npmi**: how much "the token is of the group" and "the token uses the expert" go together, −1 to 1 (RICE, Wang et al.
  2025, around tokens such as `text~<think>`); `workbench.analysis.contrast`.
- **rate_difference**: the risk difference of a task (`group`) against general text (`versus`) inside a language,
  English unless asked otherwise (Bandarkar et al. 2025); `workbench.analysis.task_experts`. Of several languages the
  score is that of the one with the smallest difference, 0 where the signs differ, and p the largest: an expert is a
  task expert of all of them only if it is one of each.
- **importance**: a score of `workbench.analysis.importance` at the tokens of the group (all tokens without one), minus
  that of the other set where `versus` is given; without it there is nothing to test, and p and q are missing.

**Chosen** are experts with q up to `fdr` (where there is a q) and a score above `threshold` (above 0 without one); of
these the `per_layer` highest of each layer, and of these the `top` highest over all layers; the ten highest over all
layers if neither of the three is given. On the side of `versus` the same holds of −score.

With side="both", the experts of the other side get the opposite edit: forced where the group's are ablated or
forbidden, forbidden where they are forced (SteerMoE steers so), and a bias or factor of the same size the other way.

The recipe's source holds the trace, the run, the method and every option, so that
`find(Trace(source["trace"], source["run"]), source["method"], **source["options"])` makes it again, and the chosen
experts with their scores.
"""

import math
import platform
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from workbench.analysis.contrast import contrast
from workbench.analysis.filters import quoted
from workbench.analysis.importance import decisive, importance, possible
from workbench.analysis.importance_difference import importance_difference
from workbench.analysis.resampling import q_values
from workbench.analysis.task_experts import task_experts
from workbench.errors import InputError, RunError, not_negative
from workbench.interventions import Ablate, Bias, Forbid, Force, OnExperts, Scale
from workbench.recipe import Recipe, of_trace
from workbench.tracefile import Trace

METHODS = ("risk_difference", "npmi", "rate_difference", "importance")
SIDES = ("group", "versus", "both")
EDITS = ("ablate", "forbid", "force", "bias", "scale")
REST = "rest"
"""As `versus`: every token that isn't of the group."""
TOP = 10
"""Experts chosen if nothing is said about their number."""
STRENGTH = {"bias": 0.5, "scale": 64.0}
"""In standard deviations of the logits (Bandarkar et al. 2025), and as a factor (RICE)."""
DIRECTION = {("group",): ("above", ""), ("versus",): ("below", "-"), ("group", "versus"): ("beyond", "±")}
"""Where scores of the sides lie, for an error: a word, and the sign of the threshold."""
NAMED = 3
"""Best candidates named when nothing is found."""
SIZES = ("n_experts", "n_tokens", "n_tokens_versus", "n_texts", "n_texts_versus")
COLUMNS = ("layer", "expert", "score", "low", "high", "p", "q", "value", "value_versus", *SIZES)


def find(
    trace: Trace,
    method: str,
    *,
    group: str | None = None,
    versus: str | None = None,
    score: str | None = None,
    languages: Sequence[str] = ("en",),
    by: str = "lang",
    layers: Sequence[int] | None = None,
    top: int | None = None,
    per_layer: int | None = None,
    threshold: float | None = None,
    fdr: float = 0.05,
    side: str = "group",
    edit: str = "ablate",
    level: str | None = None,
    strength: float | None = None,
    scope: str = "all",
    n_resamples: int = 1000,
    n_permutations: int = 1000,
    seed: int = 0,
) -> tuple[pd.DataFrame, Recipe]:
    """Score the experts of a trace, choose some, and make a recipe that edits them.

    method     one of METHODS
    group      filter of the tokens asked about; only importance does without
    versus     filter of the tokens compared with; "rest": all others, which is also what None means, but for importance
    score      for importance: which; None: the first there is of easy_ep, weighted_norm, reap, …
    languages  for rate_difference: in which an expert must be a task expert; by: the column that holds them
    layers     only these; None: all
    top, per_layer, threshold, fdr   see the top of the file; with fdr=1 everything passes
    side       "group": experts of the group; "versus": of the other set; "both": both, with opposite edits
    edit       "ablate", "forbid", "force", "bias" or "scale" (`workbench.interventions`)
    level      of ablate: logits, selection, output; of force: logits, selection; None: logits
    strength   of bias, in standard deviations of a token's logits, 0.5 by default; factor of scale, 64 by default
    scope      the tokens at which the edit acts (`workbench.interventions`)
    n_resamples      of texts, for the intervals
    n_permutations   with 0 nothing is tested, and p and q are missing

    Returns the table of `scores` with the columns chosen (bool) and side ("group", "versus", "" for those not chosen),
    and the recipe, one intervention a layer and side. InputError for what can't be asked, or an edit that no router
    could follow: more experts forced in a layer than it selects, fewer than k + 1 left. RunError if no expert is
    chosen.
    """
    if method == "importance":
        score = score or decisive(possible(trace, None))
    options = {name: value for name, value in locals().items() if name not in ("trace", "method")}
    check_choice(top, per_layer, threshold, fdr, side)
    make, make_opposite = makers(edit, level, strength, side)
    check_scope(scope)
    if side != "group" and method == "importance" and versus is None:
        raise InputError(f'side is {side!r}, but importance without versus has one side: give versus (or "rest").')
    table = scores(
        trace, method, group=group, versus=versus, score=score, languages=languages, by=by, layers=layers,
        n_resamples=n_resamples, n_permutations=n_permutations, seed=seed,
    )  # fmt: skip
    sides = ("group", "versus") if side == "both" else (side,)
    table["side"] = ""
    for one in sides:
        table.loc[chosen(table, one, top, per_layer, threshold, fdr), "side"] = one
    table.insert(len(table.columns) - 1, "chosen", table["side"] != "")
    if not table["chosen"].any():
        raise RunError(nothing(table, method, sides, threshold, fdr, n_permutations))
    made = []
    picked = table[table["chosen"]]
    for layer, one in product(picked["layer"].unique().tolist(), sides):
        experts = picked.loc[(picked["layer"] == layer) & (picked["side"] == one), "expert"].tolist()
        if experts:
            maker = make_opposite if side == "both" and one == "versus" else make
            made.append(maker(layer=layer, experts=experts, scope=scope))
            check_size(trace, layer, made[-1])
    return table, Recipe(tuple(made), of_trace(trace), source(trace, method, options, table))


def scores(
    trace: Trace,
    method: str,
    *,
    group: str | None = None,
    versus: str | None = None,
    score: str | None = None,
    languages: Sequence[str] = ("en",),
    by: str = "lang",
    layers: Sequence[int] | None = None,
    n_resamples: int = 1000,
    n_permutations: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """What a method says of every expert; arguments as in `find`.

    Returns one row a layer × expert: layer, expert; score with low, high; p, q; value, value_versus (what the score is
    made of: rates, activations a token, or the importance of each set); n_experts, n_tokens, n_tokens_versus, n_texts,
    n_texts_versus. NaN as in the analyses that it comes from.
    """
    if method not in METHODS:
        raise InputError(f"method is {method!r}; expected {', '.join(METHODS)}.")
    if score is not None and method != "importance":
        raise InputError(f"score is {score!r}, which only importance has; {method} has a single score.")
    if group is None and (method != "importance" or versus is not None):
        raise InputError(f"{method} asks about a set of tokens: give group, as in 'lang=de', 'token=\" the\"', text~….")
    if method != "rate_difference" and (tuple(languages) != ("en",) or by != "lang"):
        raise InputError(
            f"languages and by are for rate_difference; for {method} say it in the filters, as in lang=de."
        )
    wanted = check_layers(trace, layers)
    sampling = {"n_resamples": n_resamples, "n_permutations": n_permutations, "seed": seed}
    not_negative(**sampling)
    if method == "importance":
        found = of_importance(trace, group, versus, score or decisive(possible(trace, None)), sampling)
    elif method == "rate_difference":
        found = of_languages(trace, str(group), None if versus == REST else versus, languages, by, sampling)
    else:
        found = contrast(trace, group=group, versus=None if versus == REST else versus, **sampling)
        found = found.rename(columns={"rate": "value", "rate_versus": "value_versus"})
        if method == "npmi":
            found = found.drop(columns=["difference", "low", "high"])
            found = found.rename(columns={"npmi": "score", "npmi_low": "low", "npmi_high": "high"})
    found = found.rename(columns={"difference": "score"})
    found = found[found["layer"].isin(wanted)].reset_index(drop=True)
    found["q"] = q_values(found["p"].to_numpy(float))
    return found[list(COLUMNS)]


def of_importance(
    trace: Trace, group: str | None, versus: str | None, score: str, sampling: dict[str, int]
) -> pd.DataFrame:
    """Importance of the tokens of a set, or its difference to that of another."""
    if group is not None and versus is not None:
        versus = None if versus == REST else versus
        return importance_difference(trace, group=group, versus=versus, score=score, **sampling)
    found = importance(trace, where=group, scores=(score,), n_resamples=sampling["n_resamples"], seed=sampling["seed"])
    found = found.rename(columns={score: "score", f"{score}_low": "low", f"{score}_high": "high"})
    return found.assign(value=found["score"], value_versus=np.nan, p=np.nan, n_tokens_versus=0, n_texts_versus=0)


def of_languages(
    trace: Trace, task: str, general: str | None, languages: Sequence[str], by: str, sampling: dict[str, int]
) -> pd.DataFrame:
    """Task experts of all the languages: of each expert the row of the language in which it is least one."""
    if isinstance(languages, str) or not languages:
        raise InputError(f"languages is {languages!r}; expected one or several, as in ['en', 'de'].")
    narrowed = f"{task} & {by}={','.join(map(quoted, languages))}"
    found = task_experts(trace, task=narrowed, general=general, by=by, reference=languages[0], **sampling)
    missing = [language for language in languages if language not in set(found["lang"])]
    if missing:
        raise InputError(f"{by} {missing[0]!r} doesn't have tokens both of {task!r} and to compare with; leave it out.")
    found["size"], found["sign"] = found["difference"].abs(), np.sign(found["difference"])
    by_expert = found.groupby(["layer", "expert"])
    rows = found.loc[by_expert["size"].idxmin()].set_index(["layer", "expert"])
    rows["p"] = by_expert["p"].max()
    mixed = by_expert["sign"].nunique() > 1
    rows.loc[mixed, ["difference", "low", "high"]] = 0.0
    rows.loc[mixed, "p"] = 1.0
    names = {"rate": "value", "rate_general": "value_versus"}
    names |= {f"{name}_general": f"{name}_versus" for name in ("n_tokens", "n_texts")}
    return rows.reset_index().rename(columns=names)


def chosen(
    table: pd.DataFrame,
    side: str,
    top: int | None,
    per_layer: int | None,
    threshold: float | None,
    fdr: float,
) -> pd.Index:
    """Rows of the experts of one side, the highest scores first; equal ones in order of layer and expert."""
    found = passing(table, side, threshold, fdr)
    found = found.sort_values(ascending=False, kind="stable")
    if per_layer is not None:
        found = found[found.groupby(table["layer"].loc[found.index]).cumcount() < per_layer]
    if top is None and per_layer is None and threshold is None:
        top = TOP
    return found.index[:top]


def passing(table: pd.DataFrame, side: str, threshold: float | None, fdr: float) -> pd.Series:
    """Scores, positive for the side, of the experts that are above the threshold and significant."""
    signed = table["score"] if side == "group" else -table["score"]
    kept = signed > (threshold or 0)
    if table["q"].notna().any():
        kept &= table["q"] <= fdr
    return signed[kept]


def nothing(
    table: pd.DataFrame,
    method: str,
    sides: tuple[str, ...],
    threshold: float | None,
    fdr: float,
    n_permutations: int,
) -> str:
    """Why no expert was chosen, which come closest, and what to do about it."""
    facts, (word, sign) = table.iloc[0], DIRECTION[sides]
    signed = table["score"].abs() if sign == "±" else table["score"] * (-1 if sign == "-" else 1)
    known = signed[signed > 0].sort_values(ascending=False, kind="stable")
    significant = sum(len(passing(table, side, None, fdr)) for side in sides)
    tested = table["q"].notna().any()
    if significant:
        why = f"{significant} of {len(table)} experts pass, but for none {method} is {word} {sign}{threshold:g}"
        todo = "lower the threshold"
    elif tested:
        why = (
            f"for none of {len(table)} experts {method} is {word} 0 at a false-discovery rate of {fdr:g} "
            f"({facts['n_texts']:,} and {facts['n_texts_versus']:,} texts)"
        )
        todo = "trace more texts, ask about fewer layers or other sets, or allow more false ones (fdr)"
        known = known.loc[table["q"].loc[known.index].sort_values(kind="stable").index]
        if smallest := int((table["p"] <= 1.000001 / (n_permutations + 1)).sum()):
            enough = math.ceil(len(table) / smallest / fdr)
            todo = f"{smallest} experts have the smallest p of {n_permutations:,} permutations: take {enough:,} of them"
    else:
        why = f"for none of {len(table)} experts {method} is {word} {sign}{threshold or 0:g}"
        todo = "lower the threshold, or ask about other sets"
    best = "; ".join(
        f"layer {row.layer} expert {row.expert} ({row.score:+.3g}{f', q {row.q:.2g}' if tested else ''})"
        for row in table.loc[known.index[:NAMED]].itertuples()
    )
    return f"nothing found: {why}. {f'The best: {best}. ' if best else ''}What helps: {todo}."


def makers(
    edit: str, level: str | None, strength: float | None, side: str
) -> tuple[Callable[..., OnExperts], Callable[..., OnExperts]]:
    """What makes the edit from layer, experts and scope, and what makes its opposite."""
    if edit not in EDITS:
        raise InputError(f"edit is {edit!r}; expected {', '.join(EDITS)}.")
    if level is not None and edit not in ("ablate", "force"):
        raise InputError(f"level is {level!r}; only ablate and force have levels, not {edit}.")
    if strength is not None and edit not in STRENGTH:
        raise InputError(f"strength is {strength!r}; only bias and scale have one, not {edit}.")
    levels: dict[str, Any] = {"level": level or "logits"}
    if edit == "bias":
        size = STRENGTH[edit] if strength is None else strength
        pair = partial(Bias, strength=size), partial(Bias, strength=-size)
    elif edit == "scale":
        size = STRENGTH[edit] if strength is None else strength
        if side == "both" and size == 0:
            raise InputError("strength is 0, and a factor of 0 has no opposite; choose side group or versus.")
        pair = partial(Scale, factor=size), partial(Scale, factor=1 / size if size else size)
    elif edit == "force":
        pair = partial(Force, **levels), partial(Forbid)
    elif edit == "forbid":
        pair = partial(Forbid), partial(Force)
    else:
        if side == "both" and level == "output":
            raise InputError('ablate with level="output" has no opposite; choose side group or versus, or scale.')
        pair = partial(Ablate, **levels), partial(Force, **levels)
    pair[0](experts=[0])  # a value that can't be is refused before the analysis takes its time
    return pair


def check_choice(top: int | None, per_layer: int | None, threshold: float | None, fdr: float, side: str) -> None:
    """InputError for numbers that choose nothing or make no sense."""
    for name, number in (("top", top), ("per_layer", per_layer)):
        if number is not None and number < 1:
            raise InputError(f"{name} is {number}; expected a number of experts from 1, or none.")
    if threshold is not None and not (math.isfinite(threshold) and threshold >= 0):
        raise InputError(
            f"threshold is {threshold}; expected a score from 0 (of the other side it is meant as -score)."
        )
    if not 0 < fdr <= 1:
        raise InputError(f"fdr is {fdr}; expected a false-discovery rate above 0, at most 1.")
    if side not in SIDES:
        raise InputError(f"side is {side!r}; expected {', '.join(SIDES)}.")


def check_scope(scope: str) -> None:
    """InputError if a model couldn't know which tokens are meant."""
    if scope != "all":
        from workbench.scope import conditions  # which needs torch

        conditions(scope)


def check_layers(trace: Trace, layers: Sequence[int] | None) -> list[int]:
    """The layers asked about; InputError for one that isn't there."""
    wanted = list(range(trace.n_layers) if layers is None else layers)
    outside = [layer for layer in wanted if layer not in range(trace.n_layers)]
    if outside or not wanted:
        said = f"layer {outside[0]}" if outside else "layers is empty"
        raise InputError(f"{said}: run {trace.run!r} has layers 0 to {trace.n_layers - 1}.")
    return wanted


def check_size(trace: Trace, layer: int, edit: OnExperts) -> None:
    """InputError if a router couldn't follow: more forced than its k, or fewer than k + 1 left to select from."""
    fewer = "choose fewer in each layer (per_layer, top) or a higher threshold"
    sizes, number = trace.layers.iloc[layer], len(edit.experts)
    k, n_experts = int(sizes["top_k"]), int(sizes["n_experts"])
    if isinstance(edit, Force) and number > k:
        raise InputError(f"layer {layer}: {number} experts to force, but its router selects {k}; {fewer}.")
    if isinstance(edit, Ablate | Forbid) and n_experts - number < k + 1:
        raise InputError(
            f"layer {layer}: without {number} of its {n_experts} experts {n_experts - number} are left, and a top-{k} "
            f"router needs at least {k + 1}; {fewer}."
        )


def source(trace: Trace, method: str, options: dict[str, Any], table: pd.DataFrame) -> dict[str, Any]:
    """Everything that it takes to make a recipe again, and what was found."""
    runs = trace.runs()
    corpus = runs.loc[runs["run"] == trace.run, "corpus"].iloc[0] or {}
    for name in ("languages", "layers"):
        options[name] = None if options[name] is None else np.asarray(options[name]).tolist()
    shown = ["layer", "expert", "side", "score", "low", "high", "p", "q", "value", "value_versus"]
    found = table.loc[table["chosen"], shown].astype(object)
    facts = table.iloc[0]
    return {
        "made_by": "workbench find",
        "method": method,
        "trace": str(trace.path),
        "run": trace.run,
        "corpus": {name: corpus[name] for name in ("names", "fingerprint") if name in corpus},
        "options": options,
        "n_compared": len(table),
        **{name: int(facts[name]) for name in SIZES if name != "n_experts"},
        "experts": found.where(found.notna(), None).to_dict("records"),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("moe-workbench", "numpy", "scipy")},
        },
    }
