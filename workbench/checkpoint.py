"""A model in memory as a checkpoint folder that plain `from_pretrained` loads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from workbench.errors import InputError, RunError
from workbench.location import local_path
from workbench.models import Model
from workbench.output import new_folder

NOTE = "experts.json"
"""File beside the weights that says which experts of which model these are."""


def check_target(model: Model, out: str | os.PathLike, overwrite: bool = False) -> None:
    """InputError, before anything slow, if a checkpoint can't be written to `out`."""
    out = local_path(out)
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists; choose another name, or replace it with --overwrite.")
    if out.exists() and Path(model.name).exists() and out.samefile(model.name):
        raise InputError(f"{out} is the model itself; choose another name.")


def save(model: Model, out: str | os.PathLike, note: dict[str, Any], *, overwrite: bool = False) -> Path:
    """Write configuration, safetensors and tokenizer, and `note` as experts.json; load it again to prove it whole.

    The folder appears under its name only when a plain from_pretrained has read back exactly these weights, with
    nothing missing and nothing left over. InputError if `out` exists and `overwrite` isn't given; RunError if what was
    written doesn't load so, or the disk is full.
    """
    check_target(model, out, overwrite)
    module: Any = model.module
    with new_folder(out, overwrite) as folder, _without_bars():
        module.save_pretrained(folder)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(folder)
        (folder / NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
        _prove(module, folder)
    return Path(out)


def _prove(module: Any, folder: Path) -> None:
    """RunError unless the folder loads plainly as exactly this module."""
    auto = transformers.AutoModelForCausalLM
    cls: Any = auto if type(module.config) in auto._model_mapping else type(module)
    loaded, gaps = cls.from_pretrained(folder, dtype="auto", use_safetensors=True, output_loading_info=True)
    left = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in gaps[kind]]
    read, meant = loaded.state_dict(), module.state_dict()
    different = [name for name in meant if name not in read or not torch.equal(read[name].cpu(), meant[name].cpu())]
    if left or different or len(read) != len(meant):
        raise RunError(
            f"the checkpoint written doesn't load as it was meant ({(left or different or ['its tensors'])[0]}), so "
            "nothing was kept: transformers doesn't save this family as it loads it."
        )


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without transformers' progress bars: two for every checkpoint."""
    shown = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.logging.enable_progress_bar()
