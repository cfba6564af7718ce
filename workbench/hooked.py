"""Which models are being recorded and which intervened on right now, for the two to know of each other."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

RECORDED: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Module of a model -> recorders of it that are inside their `with`."""
INTERVENED: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""Module of a model -> the `workbench.intervening.Intervened` in force."""
