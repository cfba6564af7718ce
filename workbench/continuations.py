"""Compare continuations of one prompt: where they differ, whose next-token probabilities and whose routing.

    found = side_by_side(model, "The treaty was", recipe, candidates=50, record=("weights",))
    at = first_difference(found["plain"], found["steered"])
    probability_changes(found["plain"].steps[at], found["steered"].steps[at])
    changes = routing_changes(found, [layer.n_experts for layer in model.layers])
    figure(changes)

Continuations are those of `workbench.side_by_side`, or `workbench.generation.compare`, by name: "plain", "steered",
"control". Steps are counted from 0. Up to the first difference two continuations have read the same tokens, so there
the difference of their probabilities is the work of the edit alone; after it they go on from different texts.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.routing import NO_EXPERT

if TYPE_CHECKING:
    from workbench.generation import Generated, Step


def differing(one: Generated, other: Generated) -> np.ndarray:
    """bool (steps of `other`,): where its token is not that of `one` in the same place, or `one` has none there."""
    ids = [step.token_id for step in one.steps]
    return np.array(
        [place >= len(ids) or ids[place] != step.token_id for place, step in enumerate(other.steps)], dtype=bool
    )


# -- next-token probabilities ------------------------------------------------------------------------------------------


def probability_changes(one: Step, other: Step, names: tuple[str, str] = ("plain", "steered")) -> pd.DataFrame:
    """How the probabilities of a next token differ between two steps: a row a token, the largest difference first.

    Tokens are the candidates that both steps have; `side_by_side(…, candidates=n)` gives both the n likeliest tokens of
    either, so that no other token can have changed by more than its probability, which is below those.

    Columns: token_id, token; the two names: probabilities in [0, 1] with all interventions, before any temperature;
    difference: the second minus the first; log_ratio: ln(second / first) in nats, infinite where one of them is 0, NaN
    where both are.
    """
    before = {each.token_id: each for each in one.candidates}
    after = {each.token_id: each.probability for each in other.candidates}
    shared = [each for token_id, each in before.items() if token_id in after]
    first = np.array([each.probability for each in shared], float)
    second = np.array([after[each.token_id] for each in shared], float)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log(second) - np.log(first)
    frame = pd.DataFrame(
        {
            "token_id": np.array([each.token_id for each in shared], np.int64),
            "token": pd.Series([each.token for each in shared], dtype=object),
            names[0]: first,
            names[1]: second,
            "difference": second - first,
            "log_ratio": ratio,
        }
    )
    order = np.lexsort((frame["token_id"], -frame["difference"].abs()))
    return frame.iloc[order].reset_index(drop=True)


# -- routing -----------------------------------------------------------------------------------------------------------


def routing_at(found: Mapping[str, Generated], step: int) -> pd.DataFrame:
    """The experts that the token before step `step` was given, in each continuation that has the step.

    That token is the last one of the prompt at step 0, else the one chosen in the step before; from it the step's
    probabilities follow.

    Columns, a row an expert: name, layer, rank (from 1, the model's own order), expert, weight (as the experts consumed
    it, NaN if not recorded). Empty where no routing was recorded.
    """
    rows = []
    for name, one in found.items():
        for layer, seen in enumerate((one.steps[step].routing or ()) if step < len(one.steps) else ()):
            weights = np.full(seen.experts.shape[1], np.nan) if seen.weights is None else seen.weights[-1]
            rows += [
                (name, layer, rank, int(expert), float(weight))
                for rank, (expert, weight) in enumerate(zip(seen.experts[-1], weights, strict=True), start=1)
                if expert != NO_EXPERT
            ]
    return pd.DataFrame(rows, columns=["name", "layer", "rank", "expert", "weight"])


def beside(routing: pd.DataFrame) -> pd.DataFrame:
    """`routing_at` with a row a layer, to be read: layer; for each name its experts with their weights, as in "5 0.31,
    12 0.20"; for each name but plain, changed_…: how many of its experts the plain continuation doesn't have.
    """
    names = list(dict.fromkeys(routing["name"]))
    chosen = {key: part for key, part in routing.groupby(["name", "layer"], sort=False)}
    rows = []
    for layer in sorted(routing["layer"].unique()):
        parts = {name: chosen[name, layer] for name in names if (name, layer) in chosen}
        row: dict[str, Any] = {"layer": layer}
        row |= {name: _listed(part) for name, part in parts.items()}
        if "plain" in parts:
            own = set(parts["plain"]["expert"])
            row |= {
                f"changed_{name}": len(set(part["expert"]) - own) for name, part in parts.items() if name != "plain"
            }
        rows.append(row)
    return pd.DataFrame(rows)


def _listed(part: pd.DataFrame) -> str:
    experts = zip(part["expert"], part["weight"], strict=True)
    return ", ".join(str(expert) if np.isnan(weight) else f"{expert} {weight:.2f}" for expert, weight in experts)


def routing_shares(found: Mapping[str, Generated], n_experts: Sequence[int]) -> pd.DataFrame:
    """How often each expert was used by the tokens that were generated: a row a continuation, layer and expert.

    n_experts  of each layer

    The last token of a continuation was never read, so it has no routing; nor has the prompt any part in this.

    Columns: name, layer, expert; n_tokens, tokens that were read; n_selected, those that selected the expert; share,
    n_selected of all selections in the layer, so that the shares of a layer sum to 1; weight, the expert's weights
    summed over tokens, of the layer's sum of weights. share and weight are NaN where nothing was selected or recorded.
    """
    parts = []
    for name, one in found.items():
        read = [step.routing for step in one.steps[1:] if step.routing is not None]
        for layer, size in enumerate(n_experts):
            experts = np.concatenate([np.zeros(0, np.uint16), *(each[layer].experts.ravel() for each in read)])
            known = experts != NO_EXPERT
            selected = np.bincount(experts[known].astype(np.int64), minlength=size)
            weights = np.full(size, np.nan)
            recorded = [each[layer].weights for each in read]
            if recorded and all(each is not None for each in recorded):
                values = np.concatenate([each.ravel() for each in recorded if each is not None])
                weights = np.bincount(experts[known].astype(np.int64), values[known].astype(float), minlength=size)
            parts.append(
                pd.DataFrame(
                    {
                        "name": name,
                        "layer": layer,
                        "expert": np.arange(size),
                        "n_tokens": sum(len(each[layer].experts) for each in read),
                        "n_selected": selected,
                        "share": _part(selected),
                        "weight": _part(weights),
                    }
                )
            )
    return pd.concat(parts, ignore_index=True)


def _part(values: np.ndarray) -> np.ndarray:
    total = values.sum()
    return values / total if total > 0 else np.full(len(values), np.nan)


def routing_changes(
    found: Mapping[str, Generated], n_experts: Sequence[int], *, name: str = "steered", value: str = "share"
) -> pd.DataFrame:
    """How the generated part of a continuation is routed otherwise than that of the plain one: a row an expert.

    name   the continuation; value: "share" or "weight", as `routing_shares` has them

    Columns: layer, expert, plain and the name (the values), difference: the name's minus plain's, n_plain and n_other:
    tokens that were read. NaN where a continuation has no routing.
    """
    shares = routing_shares({each: found[each] for each in ("plain", name)}, n_experts)
    plain, other = (shares[shares["name"] == each].reset_index(drop=True) for each in ("plain", name))
    return pd.DataFrame(
        {
            "layer": plain["layer"],
            "expert": plain["expert"],
            "plain": plain[value],
            name: other[value],
            "difference": other[value] - plain[value],
            "n_plain": plain["n_tokens"],
            "n_other": other["n_tokens"],
        }
    )


def figure(changes: pd.DataFrame) -> Figure:
    """The frame of `routing_changes` as a heatmap, a row a layer: red where an expert is used more, blue where less."""
    name = changes.columns[3]
    grid = changes.pivot(index="layer", columns="expert", values=["plain", name, "difference"])
    layers, experts = list(grid.index), list(grid["difference"].columns)
    difference = grid["difference"].to_numpy(float)
    result = figures.panels([""], height=min(720, max(160, 24 * len(layers))))
    hover = (
        f"layer %{{y}}, expert %{{x}}<br>plain %{{customdata[0]:.3f}}, {figures.plain(name)} %{{customdata[1]:.3f}}"
        "<br>difference %{z:+.3f}<extra></extra>"
    )
    details = np.stack([grid["plain"].to_numpy(float), grid[name].to_numpy(float)], axis=-1)
    rows = [str(layer) for layer in layers]
    result.add_trace(figures.differences(difference, experts, rows, hover=hover, details=details))
    known = np.abs(difference[np.isfinite(difference)])
    figures.difference_scale(result, "difference", float(known.max()) if len(known) else 0.0)
    result.update_yaxes(title="layer", autorange="reversed", type="category")
    result.update_xaxes(title="expert")
    return result


# -- saved -------------------------------------------------------------------------------------------------------------


def facts(one: Generated) -> dict[str, Any]:
    """What JSON says of a continuation."""
    names = ("token_id", "token", "text", "probability")
    tokens = [{name: getattr(step, name) for name in names} for step in one.steps]
    return {"text": one.text, "ended": one.ended, "touched": one.touched, "prompt": one.prompt, "tokens": tokens}


def differences(found: Mapping[str, Generated]) -> dict[str, dict[str, Any] | None]:
    """Where each continuation first differs from the plain one, and what stands there; None where there is nothing."""
    from workbench.generation import first_difference

    def token(one: Generated, at: int) -> str | None:
        return one.steps[at].token if at < len(one.steps) else None

    differ: dict[str, dict[str, Any] | None] = {}
    for name, one in found.items():
        at = first_difference(found["plain"], one) if "plain" in found else None
        differ[name] = None if at is None else {"at": at, "plain": token(found["plain"], at), "token": token(one, at)}
    return {name: one for name, one in differ.items() if name != "plain"}


def result(
    model: str,
    prompt: str,
    settings: Mapping[str, Any],
    recipe: Mapping[str, Any] | None,
    found: Mapping[str, Generated],
) -> dict[str, Any]:
    """Everything that it takes to compute continuations again, and what came out: the JSON of `workbench generate`.

    settings  max_tokens, temperature, seed, chat; recipe: as `workbench.recipe.to_json` has it
    """
    said = {"model": model, "prompt": prompt, **settings, "recipe": recipe}
    return said | {name: facts(one) for name, one in found.items()} | {"differences": differences(found)}


def command(
    model: str, prompt: str, settings: Mapping[str, Any], recipe: str | None = None, *, control: bool = False
) -> str:
    """The command line that computes the same; recipe is the name of its file.

    >>> command("demo", "It's", {"max_tokens": 8, "temperature": 0.0, "seed": 0, "chat": False}, "recipe.json")
    'workbench generate --recipe recipe.json --compare --max-tokens 8 -- demo \\'It\\'"\\'"\\'s\\''
    """
    words = ["workbench", "generate"]
    words += [] if recipe is None else ["--recipe", recipe, "--compare"]
    words += ["--control", "random"] if control else []
    words += ["--max-tokens", str(settings["max_tokens"])]
    words += ["--temperature", str(settings["temperature"])] if settings["temperature"] else []
    words += ["--seed", str(settings["seed"])] if settings["seed"] else []
    words += ["--chat"] if settings["chat"] else []
    return shlex.join([*words, "--", model, prompt])
