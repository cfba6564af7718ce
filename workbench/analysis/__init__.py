"""Questions put to a trace: one file a question, each a pure function from a `Trace` to a tidy table.

Each file `<name>.py` holds the function `<name>(trace, …) -> DataFrame`, beside it `figure(frame) -> plotly Figure`
and `findings(frame) -> list of sentences`, and its docstring defines every number (the report prints it).
Here the names are the functions.

Every table carries sample sizes and an uncertainty from resampling texts, never tokens: see `resampling`.

Some arguments mean the same everywhere: n_resamples, resamples of texts for the intervals (0: none, NaN);
n_permutations, shuffles of the labels over texts for the null and p (0: none, NaN); seed, of everything drawn. All
functions refuse what they can't answer with an InputError that says what was given, what was expected, what to do.
"""

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pandas as pd
from plotly.graph_objects import Figure

from workbench.analysis.affinity import affinity
from workbench.analysis.agreement import agreement
from workbench.analysis.alignment import alignment
from workbench.analysis.balance import balance
from workbench.analysis.bandwidth import bandwidth
from workbench.analysis.cache import cache
from workbench.analysis.cache_speed import cache_speed
from workbench.analysis.coactivation import coactivation
from workbench.analysis.consistency import consistency
from workbench.analysis.contrast import contrast
from workbench.analysis.expert_changes import expert_changes
from workbench.analysis.expert_map import expert_map
from workbench.analysis.expert_values import expert_values
from workbench.analysis.gate_regression import gate_regression
from workbench.analysis.group_similarity import group_similarity
from workbench.analysis.importance import importance
from workbench.analysis.language_distance import language_distance
from workbench.analysis.layer_links import layer_links
from workbench.analysis.load import load
from workbench.analysis.loss_correlation import loss_correlation
from workbench.analysis.mutual_information import mutual_information
from workbench.analysis.norm_rank import norm_rank
from workbench.analysis.partners import partners
from workbench.analysis.permutation import permutation
from workbench.analysis.placement import placement
from workbench.analysis.prefetch import prefetch
from workbench.analysis.segment_cache import segment_cache
from workbench.analysis.sensitivity import sensitivity
from workbench.analysis.similar_experts import similar_experts
from workbench.analysis.similarity import similarity
from workbench.analysis.specialization import specialization
from workbench.analysis.straggler import straggler
from workbench.analysis.task_experts import task_experts
from workbench.analysis.token_changes import token_changes
from workbench.analysis.u_shape import u_shape
from workbench.analysis.uncertainty import uncertainty
from workbench.analysis.vocabulary import vocabulary
from workbench.errors import InputError

NAMES = (
    "load", "balance", "expert_values", "straggler", "bandwidth", "specialization", "mutual_information",
    "vocabulary", "contrast", "group_similarity", "alignment", "u_shape", "language_distance", "loss_correlation",
    "task_experts", "consistency", "segment_cache", "cache", "cache_speed", "prefetch", "coactivation", "partners",
    "affinity", "similar_experts", "layer_links", "placement", "agreement", "expert_changes", "token_changes",
    "uncertainty", "importance", "norm_rank", "sensitivity", "similarity", "gate_regression", "expert_map",
    "permutation",
)  # fmt: skip
"""What `workbench analyze` offers, in this order."""

__all__ = [
    "affinity", "agreement", "alignment", "arguments", "balance", "bandwidth", "cache", "cache_speed", "coactivation",
    "consistency", "contrast", "expert_changes", "expert_map", "expert_values", "figure", "file", "find", "findings",
    "gate_regression", "group_similarity", "importance", "language_distance", "layer_links", "load",
    "loss_correlation", "mutual_information", "norm_rank", "partners", "permutation", "placement", "prefetch",
    "question", "segment_cache", "sensitivity", "similar_experts", "similarity", "specialization", "straggler",
    "subject", "task_experts", "token_changes", "u_shape", "uncertainty", "vocabulary",
]  # fmt: skip


def find(name: str) -> tuple[Callable[..., pd.DataFrame], Callable[[pd.DataFrame], Figure]]:
    """An analysis (trace or model → table) and its figure (table → figure). InputError lists the analyses there are."""
    module = file(name)
    return getattr(module, module.__name__.rpartition(".")[2]), module.figure


def file(name: str) -> ModuleType:
    """The file of an analysis, for its `findings` and its docstring. InputError lists the analyses there are."""
    name = name.replace("-", "_")
    if name not in NAMES:
        raise InputError(f"there is no analysis {name!r}; choose from {', '.join(NAMES)}.")
    return import_module(f"workbench.analysis.{name}")


def figure(name: str, frame: pd.DataFrame) -> Figure:
    """The figure of an analysis. name: of the analysis; frame: its table. InputError lists the analyses there are."""
    return file(name).figure(frame)


def findings(name: str, frame: pd.DataFrame) -> list[str]:
    """What a table says, a sentence each. name: of the analysis; frame: its table. InputError as `figure`."""
    return file(name).findings(frame)


def question(name: str) -> str:
    """What an analysis asks, in a line."""
    return (file(name).__doc__ or "").strip().partition("\n")[0]


def subject(ask: Callable[..., pd.DataFrame]) -> str:
    """What an analysis looks at: "trace", or "model" where it takes the weights or runs the model itself.

    ask  the function, as from `find`
    """
    return next(iter(inspect.signature(ask).parameters))


def arguments(ask: Callable[..., pd.DataFrame], options: Mapping[str, str]) -> dict[str, Any]:
    """Options as text, from a command line, as arguments of an analysis; its type hints decide.

    ask      the function, as from `find`
    options  name → text. A tuple is written with commas, as in `windows=4,16`; a flag as true or false.

    InputError for a name that the analysis hasn't, and a text that isn't of the type.
    """
    hints = get_type_hints(ask)
    known = list(inspect.signature(ask).parameters)[1:]
    result: dict[str, Any] = {}
    for option, text in options.items():
        if option not in known:
            raise InputError(f"{ask.__name__} has no option {option!r}; it has {', '.join(known)}.")
        result[option] = value(option, text, hints[option])
    return result


EXPECTED = {int: "a whole number", float: "a number", bool: "true or false"}


def value(option: str, text: str, hint: Any) -> Any:
    """An option's text as what its type hint says; a union takes the first member that can be made of text."""
    if get_origin(hint) in (Union, UnionType):
        members = [member for member in get_args(hint) if member is not type(None)]
        known = [member for member in members if member in EXPECTED or member is str or get_origin(member) is tuple]
        hint = known[0] if known else str
    if get_origin(hint) is tuple:
        return tuple(value(option, part.strip(), get_args(hint)[0]) for part in text.split(",") if part.strip())
    if hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        if hint in (int, float):
            return hint(text)
    except ValueError:
        pass
    if hint in EXPECTED:
        raise InputError(f"{option} is {text!r}; expected {EXPECTED[hint]}.")
    return text
