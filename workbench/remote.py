"""A model as nnsight has it: to run here, or on NDIF, which needs of the local one its modules but no weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from workbench.errors import InputError
from workbench.models import Model, twin


def wrapped(model: Model) -> Any:
    """nnsight's view of a copy of the modules, with the same weights: it leaves its marks on what it wraps."""
    import nnsight

    tokenizer = copy.deepcopy(model.tokenizer)  # nnsight sets its padding
    return nnsight.TransformersModel(twin(model.module), tokenizer=tokenizer, task="text-generation")


def expert_paths(model: Model) -> list[str]:
    """The module path of each layer's experts."""
    names = {id(module): name for name, module in model.module.named_modules()}
    return [names[id(layer.experts)] for layer in model.layers]


def check_key() -> None:
    """InputError if there is no API key for NDIF."""
    from nnsight.schema.config import CONFIG

    if not CONFIG.API.APIKEY:
        raise InputError("remote: NDIF takes an API key, and there is none: set NDIF_API_KEY, or leave out remote.")


def check_on_hub(model: Model) -> None:
    """InputError if NDIF can't know the model."""
    name = getattr(getattr(model.module, "config", None), "name_or_path", "")
    if not name or Path(name).exists():
        raise InputError(f"remote: NDIF runs models of the Hub, by their id; {model.name} is on this machine only.")


def check_revision(revision: str | None) -> None:
    """InputError for a revision, which NDIF would not hear of."""
    if revision is not None:
        raise InputError(f"revision {revision!r}: NDIF runs the revision that it has. Leave out --revision.")
