"""Every public name says what it takes and returns: shapes, dtypes, units, errors, source."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import typer

import workbench as wb
import workbench_kernels
import workbench_probes
from workbench import analysis, interventions
from workbench.cli import app
from workbench.models import Layer, Model
from workbench_kernels import expert_weights, experts, route, tallies

CLASSES: list[type] = [
    wb.Trace, Model, Layer, wb.Recipe, route.Gating, route.Record, route.Routed, expert_weights.ExpertWeights,
]  # fmt: skip
INTERVENTIONS: list[type] = [getattr(wb, name) for name in wb._INTERVENTIONS]
EXCEPTIONS: list[type] = [wb.InputError, wb.RunError]
PROBES = {name: getattr(workbench_probes, name) for name in workbench_probes.__all__}
METRICS = {name: getattr(analysis, name) for name in analysis.NAMES}
KERNELS = {
    "route": route.route, "experts": experts.experts, "reference": experts.reference, "tally": tallies.tally,
    "read": expert_weights.read,
}  # fmt: skip
"""What the library calls, and what it must agree with."""

SELF_EXPLAINING = {
    "self", "trace", "model", "frame", "path", "out", "layer", "layers", "seed", "overwrite", "progress", "run", "name",
}  # fmt: skip
"""Parameters that mean the same in every function: a trace, a model, the table that a function returned, a file to
read, a file to write, one layer (0-based) or several (None: all), the seed of all draws, whether an existing file is
replaced, whether progress is shown, which run of a file, and what is looked up. Flags (bool) and choices (Literal) say
what they do by name. What all analyses share is said once, in `workbench.analysis`, and what all interventions share in
`workbench.interventions`."""

ARRAY = re.compile(r"ndarray|Tensor|Matrix")
SHAPE = re.compile(r"\(\s*\w[^()]*(,[^()]*)?\)|scalar|scalars")
DTYPE = re.compile(r"u?int(8|16|32|64)?\b|float(16|32|64)?\b|bool(ean)?\b|dtype|uint16|whole numbers|numbers")
SOURCE = re.compile(r"\b(19|20)\d\d\b|\barXiv\b|\bOurs\b|\bours\b|\bour own\b", re.I)
UNIT = re.compile(
    r"\bnats?\b|\bbits?\b|\bseconds?\b|\bbytes?\b|\bGB\b|\bshares?\b|\bratios?\b|\bcounts?\b|\bfractions?\b|\btokens?\b|"
    r"\bcorrelations?\b|\bprobabilit|\bnumber of\b|\bper cent\b|%|\btimes\b|0 to 1|−1 to 1|\bin 0\b|\b1\b|\brates?\b",
)
"""What numbers of a table are in. Many are shares or ratios: they say so."""


def functions() -> Iterator[tuple[str, Callable]]:
    """Every public function and method by its full name."""
    for name in wb.__all__:
        one = getattr(wb, name)
        if inspect.isfunction(one):
            yield f"workbench.{name}", one
    for name in analysis.__all__:
        yield f"analysis.{name}", getattr(analysis, name)
    for name in METRICS:
        for part in ("figure", "findings"):
            yield f"analysis.{name}.{part}", getattr(analysis.file(name), part)
    for name, one in PROBES.items():
        yield f"probes.{name}", one
        for part in ("figure", "findings"):
            yield f"probes.{name}.{part}", getattr(inspect.getmodule(one), part)
    for name, one in KERNELS.items():
        yield f"kernels.{name}", one
    for owner in (*CLASSES, *INTERVENTIONS):
        for name, one in vars(owner).items():
            if name.startswith("_"):
                continue
            plain = one.fget if isinstance(one, property) else getattr(one, "__func__", one)
            if inspect.isfunction(plain):
                yield f"{owner.__name__}.{name}", plain


FUNCTIONS = dict(functions())


def said(one: object) -> str:
    return inspect.getdoc(one) or ""


def names_of(text: str, name: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", text) is not None


def is_flag(parameter: inspect.Parameter) -> bool:
    """Whether its name and its annotation (bool, Literal) say all."""
    return str(parameter.annotation).startswith(("bool", "Literal", "typing.Literal", "<class 'bool'>"))


def test_there_is_something_to_check():
    assert len(FUNCTIONS) > 150 and {"workbench.trace", "Trace.experts", "analysis.cache.figure"} <= set(FUNCTIONS)
    assert set(workbench_probes.__all__) == set(PROBES) and len(METRICS) == len(analysis.NAMES)


def test_everything_has_a_docstring():
    missing = [name for name, one in FUNCTIONS.items() if not said(one)]
    missing += [owner.__name__ for owner in (*CLASSES, *INTERVENTIONS, *EXCEPTIONS) if not own_docstring(owner)]
    missing += [module.__name__ for module in (wb, analysis, workbench_probes, workbench_kernels) if not module.__doc__]
    assert not missing, "\n" + "\n".join(missing)


def own_docstring(owner: type) -> bool:
    """Whether a class says more than the signature that a dataclass is given."""
    return bool(owner.__doc__) and not owner.__doc__.startswith(f"{owner.__name__}(")


def test_every_parameter_is_named():
    missing = []
    for name, one in FUNCTIONS.items():
        module = getattr(inspect.getmodule(one), "__doc__", "") or ""
        whole = said(one) + (module + (analysis.__doc__ or "") if name.startswith("analysis.") else "")
        for parameter in inspect.signature(one).parameters.values():
            if parameter.name in SELF_EXPLAINING or is_flag(parameter) or name.endswith((".figure", ".findings")):
                continue
            if not names_of(whole, parameter.name):
                missing.append(f"{name}: {parameter.name}")
    assert not missing, "\n" + "\n".join(missing)


def test_every_field_is_named():
    missing = [
        f"{owner.__name__}.{field.name}"
        for owner in (*CLASSES, *INTERVENTIONS)
        if dataclasses.is_dataclass(owner)
        for field in dataclasses.fields(owner)
        if not field.name.startswith("_")
        and not names_of(said(owner) + (interventions.__doc__ or "" if owner in INTERVENTIONS else ""), field.name)
    ]
    assert not missing, "\n" + "\n".join(missing)


def test_arrays_have_a_shape_and_a_dtype():
    missing = []
    for name, one in FUNCTIONS.items():
        annotations = {key: str(value) for key, value in inspect.get_annotations(one).items()}
        if any(ARRAY.search(value) for value in annotations.values()):
            missing += [f"{name}: shape"] * (not SHAPE.search(said(one)))
            missing += [f"{name}: dtype"] * (not DTYPE.search(said(one)))
    assert not missing, "\n" + "\n".join(missing)


def raises_input_error(one: Callable) -> bool:
    """Whether the function's own lines raise one."""
    return re.search(r"raise InputError", inspect.getsource(one)) is not None


def test_functions_that_refuse_input_say_so():
    missing = [
        name
        for name, one in FUNCTIONS.items()
        if not name.endswith((".figure", ".findings")) and raises_input_error(one) and "InputError" not in said(one)
    ]
    assert not missing, "\n" + "\n".join(missing)


def test_analyses_name_their_source_and_units():
    missing = []
    for name, one in METRICS.items():
        whole = (analysis.file(name).__doc__ or "") + said(one)
        missing += [f"{name}: source"] * (not SOURCE.search(whole)) + [f"{name}: unit"] * (not UNIT.search(whole))
    assert not missing, "\n" + "\n".join(missing)


def test_tables_say_their_columns():
    """A function that returns a table says what a row is, and an interval's ends if it has any."""
    missing = []
    for name, one in FUNCTIONS.items():
        if "DataFrame" in str(inspect.get_annotations(one).get("return", "")):
            missing += [name] * (not re.search(r"\brows?\b|column|table|frame", said(one), re.I))
    assert not missing, "\n" + "\n".join(missing)


SLOW = ("placement",)
"""Analyses that take a minute on the smallest trace."""


def test_every_column_is_named(demo_trace: Path):
    """What analyses return of a trace, as far as they can be asked without further arguments."""
    trace, missing, asked = wb.Trace(demo_trace), [], 0
    for name, ask in METRICS.items():
        if analysis.subject(ask) != "trace" or name in SLOW:
            continue
        few = {key: 2 for key in ("n_resamples", "n_permutations") if key in inspect.signature(ask).parameters}
        try:
            table = ask(trace, **few)
        except wb.InputError:  # needs another run, a task, norms, …
            continue
        asked += 1
        whole = (analysis.file(name).__doc__ or "") + said(ask)
        for column in table.columns:
            base = re.sub(r"_(low|high|rank)$", "", column)
            known = names_of(whole, column) or (base != column and names_of(whole, base) and "with" in whole)
            missing += [] if known else [f"{name}: {column}"]
    assert asked >= 20
    assert not missing, "\n" + "\n".join(missing)


def commands() -> dict[str, Callable]:
    return {(one.name or one.callback.__name__): one.callback for one in app.registered_commands if one.callback}


def test_commands_and_options_have_help():
    missing = []
    for name, one in commands().items():
        missing += [name] * (not said(one))
        for parameter, hint in typing.get_type_hints(one, include_extras=True).items():
            if parameter == "return":
                continue
            info = [part for part in getattr(hint, "__metadata__", ()) if isinstance(part, typer.models.ParameterInfo)]
            missing += [f"{name} {parameter}"] * (not info or not info[0].help)
    assert not missing, "\n" + "\n".join(missing)
