"""How families make gate weights of the selected experts: what happens to them when a token keeps only some."""

from __future__ import annotations

from workbench.layers import Layer, family_of

SUMS: dict[str, str] = {
    "diffusion_gemma": "scales each weight by a factor of its expert",
    "gemma4": "scales each weight by a factor of its expert",
    "inkling": "normalises weights together with those of its shared experts",
    "openai_privacy_filter": "divides weights by the k of its configuration",
}
"""Family -> why the weights of some of the selected experts don't follow from those of all of them."""


def normalises(layer: Layer) -> bool:
    """Whether the family's weights of any k experts have the same sum."""
    return "renormalised" in layer.gating or "top-k, softmax" in layer.gating


def uncut(layer: Layer) -> str:
    """Why the weights of some of the selected experts don't follow from those of all; empty where they do."""
    if getattr(layer.block, "moe_normalize_expert_weights", 1) not in (None, 1):
        return "normalises weights by another norm than their sum"
    return SUMS.get(family_of(layer.router), "")
