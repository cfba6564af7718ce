"""MoE routing workbench: record which experts every token used, and ask questions of the record.

>>> import workbench as wb
>>> model = wb.load("demo")                                     # doctest: +SKIP
>>> trace = wb.trace(model, "udhr", out="udhr.duckdb")          # doctest: +SKIP
>>> wb.analysis.specialization(trace, by="lang")                # doctest: +SKIP

Names are imported when first used, so that `import workbench` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "load": "workbench.models",
    "trace": "workbench.capture",
    "Trace": "workbench.trace",
    "from_arrays": "workbench.store",
    "report": "workbench.report",
    "export": "workbench.export",
    "validate": "workbench.validate",
    "InputError": "workbench.errors",
    "RunError": "workbench.errors",
}

if TYPE_CHECKING:
    from workbench import analysis as analysis
    from workbench.capture import trace as trace
    from workbench.errors import InputError as InputError
    from workbench.errors import RunError as RunError
    from workbench.export import export as export
    from workbench.models import load as load
    from workbench.report import report as report
    from workbench.store import from_arrays as from_arrays
    from workbench.trace import Trace as Trace
    from workbench.validate import validate as validate

__all__ = ["analysis", *_HOME]


def __getattr__(name: str) -> Any:
    if name == "analysis":
        return import_module("workbench.analysis")
    if name not in _HOME:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
