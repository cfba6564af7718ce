"""Edits of a model's routing, as data: what `workbench.intervene` applies and a recipe file holds.

    [Ablate(layer=3, experts=[5]), Bias(layer=range(2, 5), experts=[1, 7], strength=0.5, scope="phase=prompt")]

A router is edited in four stages. An intervention belongs to one or two of them; within a stage the order is that of
the list, and where two say different things of one expert, the later wins.

1. **Logits**, as the router's own linear layer gives them: Remix, Delta, Bias, then Ablate, Forbid and Force with
   level="logits", each kind in the order of the list.
2. **Selection**, in the family's own top-k (groups included): SetTopK and TopP say how many; Ablate, Forbid and Force
   of either level which can't and which must be among them; Replay replaces the whole choice.
3. **Weights** on their way into the experts: TopP cuts, Replay may restore recorded ones, then Scale and Ablate with
   level="output".
4. **Next-token logits** of the model: Contrast.

Between the stages runs the family's own code, so gating, groups, normalisation and scaling are its own.

**layer** is a number, several, or None for every layer. **scope** says which tokens: "all", or conditions joined by
` & `, written as the filters of `workbench.analysis.filters`: `phase=prompt`, `phase=generated`, `position=4-15`,
`token=" the"`, `token~[0-9]`, and `text~<think>`, which means a token where a match in the text so far, that token
included, ends in it; `text~(?s)<think>.*` means everything from the match on. A scope never looks ahead, so that a
text is edited alike in one pass and in cached generation.

Values that no model could have (a negative k, an expert named twice) are refused here with InputError; what doesn't
fit a model is refused by `workbench.intervene`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from workbench.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Layers = int | Sequence[int] | None
"""A layer, several, or None for all."""


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """What every edit of routing has: where it acts. Not an intervention by itself."""

    layer: Layers = None
    scope: str = "all"

    def __post_init__(self) -> None:
        if self.layer is not None and not isinstance(self.layer, int):
            object.__setattr__(self, "layer", _whole(self.layer, "layer"))


@dataclass(frozen=True, kw_only=True)
class OnExperts(Intervention):
    """An edit of named experts; experts are ids from 0. Not an intervention by itself."""

    experts: Sequence[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "experts", _whole(self.experts, "experts"))


@dataclass(frozen=True, kw_only=True)
class Ablate(OnExperts):
    """Take experts away.

    level        "logits": the router's logit sinks, so the scores of the others are computed without the expert, and it
                 can't be selected; "selection": only the selection leaves it out, scores stay; in both the next best
                 expert takes its place. "output": selected as ever, but with weight 0, and nothing takes its place
    renormalise  with "output": scale a token's other weights so that their sum stays

    At least k + 1 experts must be left to select from. In a family that limits a token to some groups of experts, the
    choice of groups is its own; where these have fewer than k experts left, the best of the others fill up.
    """

    level: Literal["logits", "selection", "output"] = "logits"
    renormalise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of(self.level, ("logits", "selection", "output"), "Ablate: level")
        if self.renormalise and self.level != "output":
            raise InputError(f'Ablate: renormalise goes with level="output", not with {self.level!r}.')


@dataclass(frozen=True, kw_only=True)
class Force(OnExperts):
    """Select experts whatever the router thinks (SteerMoE, Fayyaz et al. 2025, section 3: activation).

    level   "logits": their logit becomes the largest plus `margin`, so that their weight is large, too; "selection":
            they are selected with the weight that their own score gives
    margin  in the unit of the logits

    The paper sets log-softmax scores; for softmax routers that is the same, and other routers have no such scores. At
    most k experts can be forced in a layer.
    """

    level: Literal["logits", "selection"] = "logits"
    margin: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of(self.level, ("logits", "selection"), "Force: level")
        _finite(self.margin, "Force: margin")


@dataclass(frozen=True, kw_only=True)
class Forbid(OnExperts):
    """Never select experts, though they still have a score (SteerMoE, section 3: deactivation).

    Their logit becomes the smallest minus `margin`, and the selection leaves them out. Unlike Ablate, which computes
    scores as if they weren't there.
    """

    margin: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        _finite(self.margin, "Forbid: margin")


@dataclass(frozen=True, kw_only=True)
class Bias(OnExperts):
    """Make experts more or less likely: strength · std is added to their logits.

    unit  "std": the standard deviation (n in the denominator) of the token's logits, as in "Multilingual Routing in
          Mixture-of-Experts" (Bandarkar et al. 2025), where |strength| <= 1; "logits": strength is added as it is
    """

    strength: float
    unit: Literal["std", "logits"] = "std"

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of(self.unit, ("std", "logits"), "Bias: unit")
        _finite(self.strength, "Bias: strength")


@dataclass(frozen=True, kw_only=True)
class Scale(OnExperts):
    """Multiply the weight of experts where they are selected (RICE, Wang et al. 2025: factor 64 for two experts)."""

    factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _finite(self.factor, "Scale: factor") >= 0:
            raise InputError(f"Scale: factor is {self.factor}; expected 0 or more.")


@dataclass(frozen=True, kw_only=True)
class SetTopK(Intervention):
    """Select another number of experts a token.

    k      how many
    first  rank of the first of them, from 1: SetTopK(k=1, first=2) selects only the second best, the weak routing of
           "Unchosen Experts Can Contribute Too" (SCMoE, Shi et al. 2024)
    """

    k: int
    first: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("k", "first"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"SetTopK: {name} is {getattr(self, name)!r}; expected a whole number from 1.")


@dataclass(frozen=True, kw_only=True)
class TopP(Intervention):
    """As many experts as together reach probability p ("Harder Tasks Need More Experts", Huang et al. 2024, section 2).

    p        in (0, 1]
    at_most  no more than this many; None: all

    A token keeps the first of its selected experts whose summed router probabilities reach p, at least one. Kept
    weights keep the sum of the family's k weights where the family normalises them, else they stay as they are.
    """

    p: float
    at_most: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < _finite(self.p, "TopP: p") <= 1:
            raise InputError(f"TopP: p is {self.p}; expected a probability above 0, at most 1.")
        if self.at_most is not None and (not isinstance(self.at_most, int) or self.at_most < 1):
            raise InputError(f"TopP: at_most is {self.at_most!r}; expected a whole number from 1, or none.")


@dataclass(frozen=True, kw_only=True)
class Delta(Intervention):
    """Add a vector to the router's logits ("Rewiring Experts on the Fly", Su et al. 2025); see `workbench.rewiring`.

    values    (E,) float: one an expert; a tensor may require gradients
    strength  the vector is multiplied by it
    """

    values: Sequence[float] | Tensor
    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "values", _vector(self.values, "Delta: values"))
        _finite(self.strength, "Delta: strength")


@dataclass(frozen=True, kw_only=True)
class Remix(Intervention):
    """Move the router's probabilities towards others (C3PO, Li et al. 2025); see `workbench.remixing`.

    p_new = alpha · p + (1 - alpha) · target, over all experts, from which the logits are made again.

    target  (E,) float >= 0, normalised here to sum 1; a tensor may require gradients
    alpha   in [0, 1]
    """

    target: Sequence[float] | Tensor
    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "target", _vector(self.target, "Remix: target"))
        if not 0 <= _finite(self.alpha, "Remix: alpha") <= 1:
            raise InputError(f"Remix: alpha is {self.alpha}; expected a number from 0 to 1.")
        if isinstance(self.target, tuple) and (min(self.target) < 0 or sum(self.target) <= 0):
            raise InputError("Remix: target has a negative number or only zeros; expected probabilities.")


@dataclass(frozen=True, kw_only=True)
class Replay(Intervention):
    """Select what another run selected for the same tokens (R3, Ma et al. 2025, arXiv 2510.11370).

    trace    the file; run: which of its runs, None for the last that finished
    weights  "own": from the model's own scores of the recorded experts, g_i = I_i exp(s_i) / sum_j I_j exp(s_j) for a
             softmax router, as R3 has it; "recorded": those of the trace, too

    Texts are found by their token ids: each row of a batch must be, or begin like, a text of the run.
    """

    trace: str
    run: str | None = None
    weights: Literal["own", "recorded"] = "own"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "trace", str(self.trace))
        _one_of(self.weights, ("own", "recorded"), "Replay: weights")


@dataclass(frozen=True, kw_only=True)
class RandomExperts:
    """The control for every claim about experts: the same edit of as many experts drawn at random from the layer.

    edit  an intervention that names experts (or a Delta or Remix, whose vector is permuted)
    seed  draws, for each layer, a permutation of its experts; edits with the same seed share it

    All experts can be drawn, those of the edit included.
    """

    edit: Intervention
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.edit, OnExperts | Delta | Remix):
            raise InputError(
                f"RandomExperts: {type(self.edit).__name__} names no experts that could be drawn at random."
            )


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Next-token logits against those of the same model with weaker routing (SCMoE, Shi et al. 2024, section 2).

    z = (1 + beta) · z_strong - beta · z_weak where z_strong >= ln alpha + max z_strong; other tokens can't follow.

    weak   edits of the weak pass, which the strong one doesn't have; by default rank-2 routing
    """

    weak: Sequence[Intervention] = field(default_factory=lambda: (SetTopK(k=1, first=2),))
    alpha: float = 0.1
    beta: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "weak", tuple(self.weak))
        if not 0 <= _finite(self.alpha, "Contrast: alpha") <= 1:
            raise InputError(f"Contrast: alpha is {self.alpha}; expected a number from 0 to 1.")
        if _finite(self.beta, "Contrast: beta") < 0:
            raise InputError(f"Contrast: beta is {self.beta}; expected 0 or more.")
        if not self.weak:
            raise InputError("Contrast: weak is empty; expected at least one edit of the weak pass.")


KINDS = (Ablate, Force, Forbid, Bias, Scale, SetTopK, TopP, Delta, Remix, Replay, RandomExperts, Contrast)
"""Every intervention there is."""
AnyIntervention = Intervention | RandomExperts | Contrast


def control(interventions: Iterable[AnyIntervention], seed: int) -> tuple[AnyIntervention, ...]:
    """The same edits of as many random experts: each edit that names experts, or has a vector over them, as
    RandomExperts of one seed; the others as they are. InputError if there is none that could be drawn at random.
    """
    drawn = (Ablate, Force, Forbid, Bias, Scale, Delta, Remix)
    found = tuple(interventions)
    if not any(isinstance(one, drawn) for one in found):
        raise InputError("none of the interventions names experts, so there is no control of random experts.")
    return tuple(RandomExperts(edit=one, seed=seed) if isinstance(one, drawn) else one for one in found)


def _whole(numbers: Any, name: str) -> tuple[int, ...]:
    """Different whole numbers from 0, at least one."""
    found = tuple(numbers) if isinstance(numbers, Iterable) and not isinstance(numbers, str) else (numbers,)
    if not found:
        raise InputError(f"{name} is empty; expected at least one number.")
    try:
        whole = tuple(int(number) for number in found if int(number) == number and not isinstance(number, bool | str))
    except (TypeError, ValueError, OverflowError):
        whole = ()
    if len(whole) < len(found):
        raise InputError(f"{name} is {numbers!r}; expected whole numbers.")
    if len(set(whole)) < len(whole):
        twice = next(number for number in whole if whole.count(number) > 1)
        raise InputError(f"{name} has {twice} twice.")
    return whole


def _one_of(value: Any, known: tuple[str, ...], name: str) -> None:
    if value not in known:
        raise InputError(f"{name} is {value!r}; expected {', '.join(known)}.")


def _finite(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise InputError(f"{name} is {value!r}; expected a number.")
    return value


def _vector(values: Any, name: str) -> Any:
    """A tuple of finite floats, or the tensor that was given."""
    if hasattr(values, "requires_grad"):
        return values
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputError(f"{name} is {values!r}; expected a number for each expert.")
    return tuple(float(_finite(value.item() if hasattr(value, "item") else value, name)) for value in values)
