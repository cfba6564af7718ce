"""MoE routing workbench: record which experts every token used, and ask questions of the record.

>>> import workbench as wb
>>> model = wb.load("demo")                                     # doctest: +SKIP
>>> trace = wb.trace(model, "udhr", out="udhr.duckdb")          # doctest: +SKIP
>>> wb.analysis.specialization(trace, by="lang")                # doctest: +SKIP

Names are imported when first used, so that `import workbench` loads no torch. `workbench.trace` is a function; the
reader of its files, `Trace`, is in `workbench.tracefile`, since a module of the same name would hide the function.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "load": "workbench.models",
    "trace": "workbench.capture",
    "Trace": "workbench.tracefile",
    "from_arrays": "workbench.arrays",
    "InputError": "workbench.errors",
    "RunError": "workbench.errors",
}

if TYPE_CHECKING:
    from workbench import analysis as analysis
    from workbench.arrays import from_arrays as from_arrays
    from workbench.capture import trace as trace
    from workbench.errors import InputError as InputError
    from workbench.errors import RunError as RunError
    from workbench.models import load as load
    from workbench.tracefile import Trace as Trace

__all__ = ["InputError", "RunError", "Trace", "analysis", "from_arrays", "load", "trace"]


def __getattr__(name: str) -> Any:
    if name == "analysis":
        return import_module("workbench.analysis")
    if name not in _HOME:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
