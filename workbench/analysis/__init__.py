"""Questions put to a trace: one file a question, each a pure function from a `Trace` to a tidy table.

Each file `<name>.py` holds the function `<name>(trace, …) -> DataFrame`, beside it `figure(frame) -> plotly Figure`
and `findings(frame) -> list of sentences`, and its docstring defines every number (the report prints it).
Here the names are the functions.

Every table carries sample sizes and an uncertainty from resampling texts, never tokens: see `resampling`.
"""

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

import pandas as pd
from plotly.graph_objects import Figure

from workbench.analysis.alignment import alignment
from workbench.analysis.balance import balance
from workbench.analysis.load import load
from workbench.analysis.mutual_information import mutual_information
from workbench.analysis.specialization import specialization
from workbench.analysis.u_shape import u_shape
from workbench.errors import InputError

NAMES = ("load", "balance", "specialization", "mutual_information", "alignment", "u_shape")
"""What `workbench analyze` offers, in this order."""

__all__ = [
    "alignment", "arguments", "balance", "file", "find", "load", "mutual_information", "specialization", "u_shape",
]  # fmt: skip


def find(name: str) -> tuple[Callable[..., pd.DataFrame], Callable[[pd.DataFrame], Figure]]:
    """An analysis and its figure. InputError lists the analyses there are."""
    module = file(name)
    return getattr(module, module.__name__.rpartition(".")[2]), module.figure


def file(name: str) -> ModuleType:
    """The file of an analysis, for its `findings` and its docstring."""
    name = name.replace("-", "_")
    if name not in NAMES:
        raise InputError(f"there is no analysis {name!r}; choose from {', '.join(NAMES)}.")
    return import_module(f"workbench.analysis.{name}")


def arguments(ask: Callable[..., pd.DataFrame], options: Mapping[str, str]) -> dict[str, Any]:
    """Options as text, from a command line, as arguments of an analysis; the type of each default decides."""
    known = {name: one.default for name, one in inspect.signature(ask).parameters.items() if name != "trace"}
    result: dict[str, Any] = {}
    for option, text in options.items():
        if option not in known:
            raise InputError(f"{ask.__name__} has no option {option!r}; it has {', '.join(known)}.")
        kind = str if known[option] is None else type(known[option])
        try:
            result[option] = kind(text)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise InputError(f"{option} is {text!r}; expected {expected}, as in {option}={known[option]}.") from None
    return result
