"""Which models are recorded, intervened on or routed by fused code right now, for the three to know of each other."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

RECORDED: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Module of a model -> recorders of it that are inside their `with`."""
INTERVENED: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""Module of a model -> the `workbench.intervening.Intervened` in force."""
FUSED: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""Router -> the `workbench.fused_routing.Fused` that runs instead of its own code."""
