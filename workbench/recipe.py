"""Recipes: interventions in a JSON file, with the model they are for and where they came from.

    {"format": "moe-workbench recipe", "version": 1,
     "model": {"name": "demo", "family": "olmoe", "layers": [[32, 4], …]},       experts and k of each layer
     "source": {"method": "risk_difference", "trace": "demo.duckdb", …},         whatever made it says here
     "interventions": [{"kind": "Ablate", "layer": 3, "experts": [5], "scope": "all", …}]}

What a key means is said by the dataclass of that name in `workbench.interventions`; keys left out have its defaults.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import InputError
from workbench.interventions import KINDS, AnyIntervention
from workbench.output import new_file

if TYPE_CHECKING:
    from workbench.models import Model
    from workbench.tracefile import Trace

FORMAT = "moe-workbench recipe"
VERSION = 1
_KINDS = {kind.__name__: kind for kind in KINDS}
_KEYS = ("format", "version", "model", "source", "interventions")


@dataclass(frozen=True)
class Recipe:
    """Interventions, and what is known of them.

    interventions  in the order in which they act, see `workbench.interventions`
    model          {"name", "family", "layers": [[n_experts, top_k], …]} of the model that they are for; {} for any
    source         how they were found; free, JSON
    """

    interventions: tuple[AnyIntervention, ...]
    model: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)


def of_model(model: Model) -> dict[str, Any]:
    """A loaded model as a recipe names it."""
    layers = [[layer.n_experts, layer.top_k] for layer in model.layers]
    return {"name": model.name, "family": model.family, "layers": layers}


def of_trace(trace: Trace) -> dict[str, Any]:
    """The model that a run was recorded with, as a recipe names it; {} where the run doesn't say, as from arrays."""
    runs = trace.runs()
    run = runs.loc[runs["run"] == trace.run].iloc[0]
    if not isinstance(run["model"], str) or not isinstance(run["family"], str):
        return {}
    layers = trace.layers[["n_experts", "top_k"]].astype(int).to_numpy().tolist()
    return {"name": run["model"], "family": run["family"], "layers": layers}


def write_recipe(recipe: Recipe, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a recipe as JSON. InputError if the file exists and isn't to be overwritten."""
    with new_file(path, overwrite) as temporary:
        Path(temporary).write_text(json.dumps(to_json(recipe), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe file. InputError names what is wrong in it, and where."""
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: can't be read ({error.strerror or error}); expected a recipe, a JSON file."
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); expected a recipe, as `workbench find` writes it.") from error
    try:
        return from_json(found)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def as_recipe(given: Recipe | str | Path | AnyIntervention | Iterable[AnyIntervention]) -> Recipe:
    """A recipe of whatever names one: itself, its file, or one or several interventions, which may be of any model."""
    if isinstance(given, str | Path):
        return read_recipe(given)
    if isinstance(given, Recipe):
        return given
    return Recipe((given,) if isinstance(given, KINDS) else tuple(given))  # type: ignore[arg-type]


def described(one: AnyIntervention) -> str:
    """An intervention in a line, without what is as by default: Ablate(layer=3, experts=[5])."""
    parts = [f"{name}={_shown(getattr(one, name), value)}" for name, value in _given(one).items()]
    return f"{type(one).__name__}({', '.join(parts)})"


def brief(one: AnyIntervention) -> dict[str, Any]:
    """An intervention as values that JSON has, without what is as by default, which `from_json` fills in again."""
    return {"kind": type(one).__name__, **_given(one)}


def _given(one: AnyIntervention) -> dict[str, Any]:
    """What isn't as by default, as values that JSON has."""
    found = {}
    for item in dataclasses.fields(one):
        value = _plain(getattr(one, item.name))
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        if default is dataclasses.MISSING or value != _plain(default):
            found[item.name] = value
    return found


def _shown(value: Any, plain: Any) -> str:
    if dataclasses.is_dataclass(value):
        return described(value)  # type: ignore[arg-type]
    if isinstance(plain, list) and plain and isinstance(plain[0], dict):
        return f"[{', '.join(map(described, value))}]"
    return f"[{len(plain)} numbers]" if isinstance(plain, list) and len(plain) > 12 else repr(plain)


def to_json(recipe: Recipe) -> dict[str, Any]:
    """A recipe as values that JSON has. Tensors become lists of numbers."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": dict(recipe.model),
        "source": dict(recipe.source),
        "interventions": [_plain(intervention) for intervention in recipe.interventions],
    }


def from_json(found: Any) -> Recipe:
    """A recipe from JSON values. InputError for an unknown key, kind, format or version, or a value that can't be."""
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InputError(
            f'not a recipe; expected {{"format": "{FORMAT}", "version": {VERSION}, "interventions": […]}}.'
        )
    if found.get("version") != VERSION:
        raise InputError(f"version is {found.get('version')!r}; this version of the workbench reads {VERSION}.")
    _known(found, _KEYS, "a recipe")
    model, source = (_mapping(found.get(name, {}), name) for name in ("model", "source"))
    if model and not _is_model(model):
        raise InputError(
            'model: expected "name", "family" and "layers", a list of [experts, k], or none of them for any model.'
        )
    return Recipe(_interventions(found.get("interventions"), "interventions"), model, source)


def check_model(recipe: Recipe, model: Model | Mapping[str, Any]) -> None:
    """InputError if the recipe is for another model than this, loaded or as `of_model` names it.

    Expert numbers mean nothing in another model. Folders and Hub ids of one model are told apart by their last part
    only, so that a checkpoint may move.
    """
    if not recipe.model:
        return
    here = model if isinstance(model, Mapping) else of_model(model)
    same_name = Path(str(recipe.model["name"])).name == Path(here["name"]).name
    same_layers = [list(layer) for layer in recipe.model["layers"]] == here["layers"]
    if same_name and same_layers and recipe.model["family"] == here["family"]:
        return
    raise InputError(
        f"the recipe is for {_described(recipe.model)}, this is {_described(here)}: expert numbers mean nothing in "
        "another model. Find experts in a trace of this one; or, if the two share their experts (a renamed or "
        'fine-tuned checkpoint), take "model" out of the recipe.'
    )


def _is_model(model: Mapping[str, Any]) -> bool:
    named = isinstance(model.get("name"), str) and isinstance(model.get("family"), str)
    layers = model.get("layers")
    return (
        named
        and isinstance(layers, list)
        and all(
            isinstance(layer, list) and len(layer) == 2 and all(isinstance(n, int) for n in layer) for layer in layers
        )
    )


def _described(model: Mapping[str, Any]) -> str:
    sizes = sorted({f"top-{k} of {n}" for n, k in model["layers"]})
    return f"{model['name']} ({model['family']}, {len(model['layers'])} layers, {' and '.join(sizes)})"


def _plain(value: Any) -> Any:
    """An intervention, or what is in one, as values that JSON has."""
    if dataclasses.is_dataclass(value):
        fields = {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    if hasattr(value, "tolist"):
        return value.detach().tolist() if hasattr(value, "detach") else value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list | tuple | range) else value


def _interventions(found: Any, where: str) -> tuple[AnyIntervention, ...]:
    if not isinstance(found, list) or not found:
        raise InputError(f"{where} is {found!r}; expected a list of at least one intervention.")
    return tuple(_intervention(item, f"{where}[{place}]") for place, item in enumerate(found))


def _intervention(found: Any, where: str) -> AnyIntervention:
    given = _mapping(found, where)
    kind = _KINDS.get(given.pop("kind", None))
    if kind is None:
        raise InputError(f"{where}: kind is {found.get('kind')!r}; expected {', '.join(_KINDS)}.")
    known = {item.name: item for item in dataclasses.fields(kind)}
    _known(given, known, f"{where} ({kind.__name__})")
    if kind is _KINDS["RandomExperts"] and "edit" in given:
        given["edit"] = _intervention(given["edit"], f"{where}.edit")
    if kind is _KINDS["Contrast"] and "weak" in given:
        given["weak"] = _interventions(given["weak"], f"{where}.weak")
    required = [
        name
        for name, item in known.items()
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING and name not in given
    ]
    if required:
        raise InputError(f"{where} ({kind.__name__}): {', '.join(required)} is missing.")
    if not isinstance(given.get("scope", "all"), str):
        raise InputError(f"{where}: scope is {given['scope']!r}; expected text, as in 'phase=prompt'.")
    try:
        return kind(**given)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where} ({kind.__name__}): {error}.") from error


def _mapping(found: Any, where: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise InputError(f"{where} is {found!r}; expected an object with keys.")
    return dict(found)


def _known(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    unknown = [key for key in given if key not in set(known)]
    if unknown:
        raise InputError(f"{where} has no key {unknown[0]!r}; it has {', '.join(known)}.")
