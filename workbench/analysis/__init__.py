"""Questions put to a trace: one file a question, each a pure function from a `Trace` to a tidy table.

Each file `<name>.py` holds the function `<name>(trace, …) -> DataFrame`, beside it `figure(frame) -> plotly Figure`
and `findings(frame) -> list of sentences`, and its docstring defines every number (the report prints it).
Here the names are the functions; `importlib.import_module("workbench.analysis.<name>")` is the file.

Every table carries sample sizes and an uncertainty from resampling texts, never tokens: see `resampling`.
"""

from workbench.analysis.alignment import alignment, u_shape
from workbench.analysis.balance import balance
from workbench.analysis.information import information
from workbench.analysis.load import load
from workbench.analysis.specialization import specialization

NAMES = ("load", "balance", "specialization", "information", "alignment")
"""What `workbench analyze` offers and the report shows, in this order."""

__all__ = ["NAMES", "alignment", "balance", "information", "load", "specialization", "u_shape"]
