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

_INTERVENTIONS = (
    "Ablate", "Bias", "Contrast", "Delta", "Forbid", "Force", "RandomExperts", "Remix", "Replay", "Scale", "SetTopK",
    "TopP",
)  # fmt: skip
_HOME = {
    "load": "workbench.models",
    "trace": "workbench.capture",
    "Trace": "workbench.tracefile",
    "from_arrays": "workbench.arrays",
    "intervene": "workbench.intervening",
    "find": "workbench.finding",
    "evaluate": "workbench.evaluation",
    "generate": "workbench.generation",
    "compare": "workbench.generation",
    **dict.fromkeys(_INTERVENTIONS, "workbench.interventions"),
    **dict.fromkeys(("Recipe", "read_recipe", "write_recipe"), "workbench.recipe"),
    "InputError": "workbench.errors",
    "RunError": "workbench.errors",
}

if TYPE_CHECKING:
    from workbench import analysis as analysis
    from workbench.arrays import from_arrays as from_arrays
    from workbench.capture import trace as trace
    from workbench.errors import InputError as InputError
    from workbench.errors import RunError as RunError
    from workbench.evaluation import evaluate as evaluate
    from workbench.finding import find as find
    from workbench.generation import compare as compare
    from workbench.generation import generate as generate
    from workbench.intervening import intervene as intervene
    from workbench.interventions import Ablate as Ablate
    from workbench.interventions import Bias as Bias
    from workbench.interventions import Contrast as Contrast
    from workbench.interventions import Delta as Delta
    from workbench.interventions import Forbid as Forbid
    from workbench.interventions import Force as Force
    from workbench.interventions import RandomExperts as RandomExperts
    from workbench.interventions import Remix as Remix
    from workbench.interventions import Replay as Replay
    from workbench.interventions import Scale as Scale
    from workbench.interventions import SetTopK as SetTopK
    from workbench.interventions import TopP as TopP
    from workbench.models import load as load
    from workbench.recipe import Recipe as Recipe
    from workbench.recipe import read_recipe as read_recipe
    from workbench.recipe import write_recipe as write_recipe
    from workbench.tracefile import Trace as Trace

__all__ = [
    "Ablate", "Bias", "Contrast", "Delta", "Forbid", "Force", "InputError", "RandomExperts", "Recipe", "Remix",
    "Replay", "RunError", "Scale", "SetTopK", "TopP", "Trace", "analysis", "compare", "evaluate", "find",
    "from_arrays", "generate", "intervene", "load", "read_recipe", "trace", "write_recipe",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "analysis":
        return import_module("workbench.analysis")
    if name not in _HOME:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
