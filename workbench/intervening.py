"""Run a model with its routing edited: `with intervene(model, recipe): …`.

The edits are applied by hooks and replaced methods that the context manager owns and always removes; the weights of
the model are never touched, so that it is bit-identical afterwards, also after an exception. While it is in force

- a pass of `model.module` and `model.module.generate` are edited alike, padded batches and cached steps included;
- the model belongs to the thread that entered: another thread that runs it gets a RunError;
- a second `intervene` on the same model is refused: put both lists into one, whose order is then defined;
- a `Recorder` entered inside records what the experts really got. One that is active already is refused: it would
  record a part of the routing as it was before.

Leaving the block while one of the interventions touched no token at all is a RunError: a scope that matched nothing,
an expert that is never selected (Scale, Ablate at the output), or a model that wasn't run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from workbench import scope
from workbench.contrast_decoding import contrasting
from workbench.edits import Choosing, Plan, among, plan, weigh
from workbench.errors import InputError, RunError
from workbench.fitting import per_layer
from workbench.forward import reads_twice
from workbench.hooked import FUSED, INTERVENED, RECORDED
from workbench.interventions import AnyIntervention, Contrast, Intervention, OnExperts, RandomExperts, Replay
from workbench.layers import Layer, family_of
from workbench.models import Model, load, twin
from workbench.observation import unsort
from workbench.recipe import Recipe, check_model, read_recipe
from workbench.replay import Record, Recorded

_ENTERING = threading.Lock()
Given = Recipe | str | Path | AnyIntervention | Sequence[AnyIntervention]


@contextmanager
def intervene(model: Model, recipe: Given, *, idle: bool = False) -> Iterator[Intervened]:
    """Edit the routing of `model` inside the block.

    recipe  interventions, one or several in order; a Recipe, or the path of a recipe file
    idle    an intervention may touch nothing, for instance in what is left of an interrupted run

    Yields the Intervened: `touched` counts, for each intervention, the tokens times layers that it acted on so far.
    InputError on entering if the recipe doesn't fit the model (a layer, an expert, k, a family), or the model is
    intervened on already; RunError on leaving without an exception if an intervention touched nothing.
    """
    applied = Intervened(model, interventions_of(recipe, model))
    with in_force(model, applied):
        yield applied
        if not idle:
            applied.check_touched()


@contextmanager
def in_force(model: Model, applied: Intervened) -> Iterator[None]:
    """Interventions in force inside the block, which can be entered again later: so that several can take turns."""
    with _ENTERING:
        if model.module in INTERVENED:
            raise InputError("the model is being intervened on already: put both lists of interventions into one.")
        if RECORDED.get(model.module):
            raise InputError("a recorder of this model is active already: enter it inside `intervene`, to see edits.")
        INTERVENED[model.module] = applied
    try:
        place = applied.contrast
        # Made before any hook is there to be copied.
        weak = None if place is None else _copied(model)
        with ExitStack() as held:
            held.enter_context(applied.hooked())
            if weak is not None and place is not None:
                contrast: Any = applied.interventions[place]
                held.enter_context(contrasting(model, contrast, weak, intervene, partial(applied.count, place)))
            yield
    finally:
        INTERVENED.pop(model.module, None)


def _copied(model: Model) -> Model:
    """The model with modules of its own, each running the family's code."""
    copied = load(twin(model.module), tokenizer=model.tokenizer)
    for layer, own in zip(model.layers, copied.layers, strict=True):
        if layer.router in FUSED:
            del own.router.forward
    return copied


def check(model: Model, recipe: Given) -> None:
    """InputError if the recipe can't be applied to the model; nothing is run."""
    Intervened(model, interventions_of(recipe, model))


def effective_top_k(model: Model, recipe: Given) -> list[int]:
    """Most experts that a token can have at each layer under the recipe."""
    return [layer.top_k for layer in Intervened(model, interventions_of(recipe, model)).layers]


def about_generation(interventions: Iterable[AnyIntervention]) -> AnyIntervention | None:
    """The first intervention that touches generated tokens only, so that nothing comes of it where none are made."""
    for one in interventions:
        edit = one.edit if isinstance(one, RandomExperts) else one
        if isinstance(edit, Contrast) or scope.generated_only(edit.scope):
            return one
    return None


def interventions_of(recipe: Given, model: Model | None = None) -> tuple[AnyIntervention, ...]:
    """The interventions of whatever names them; with a model, InputError if the recipe is for another one."""
    if isinstance(recipe, str | Path):
        recipe = read_recipe(recipe)
    if isinstance(recipe, Recipe):
        if model is not None:
            check_model(recipe, model)
        return recipe.interventions
    found = tuple(recipe) if isinstance(recipe, Iterable) else (recipe,)
    for one in found:
        if not isinstance(one, Intervention | RandomExperts | Contrast) or type(one) in (Intervention, OnExperts):
            raise InputError(f"{one!r} is no intervention; see `workbench.interventions` for those there are.")
    if not found:
        raise InputError("no interventions: give at least one.")
    return found


def check_touched(interventions: Sequence[AnyIntervention], touched: Sequence[int]) -> None:
    """RunError if one of the interventions touched nothing."""
    idle = [one for one, count in zip(interventions, touched, strict=True) if not count]
    if idle:
        raise RunError(
            f"{len(idle)} of {len(interventions)} interventions touched nothing, the first of them "
            f"{idle[0]}: no token was in its scope, or no token in it selected the experts."
        )


class Intervened:
    """Interventions in force on a model; made by `intervene`.

    interventions, contrast: all of them, and the place of the Contrast among them, if there is one
    layers   the model's layers, with the top_k that tokens can have at most under the interventions
    zeroed   indices of the layers where a weight of 0 means that the token doesn't have the expert
    touched  tokens × layers that each intervention acted on so far
    """

    def __init__(self, model: Model, interventions: Sequence[AnyIntervention]) -> None:
        self._model = model
        self.interventions = tuple(interventions)
        placed = per_layer(model, interventions)
        self._plans = {index: plan(model.layers[index], [edit for edit, _ in edits]) for index, edits in placed.items()}
        self._edits = [edit for edits in placed.values() for edit, _ in edits]
        self._place = {id(edit): place for edits in placed.values() for edit, place in edits}
        self._counts: list[Tensor | int] = [0] * len(self.interventions)
        records = {place: Record(one, model) for place, one in enumerate(interventions) if isinstance(one, Replay)}
        self._records = {id(edit): records[self._place[id(edit)]] for edit in self._edits if isinstance(edit, Replay)}
        places = (place for place, one in enumerate(interventions) if isinstance(one, Contrast))
        self.contrast = next(places, None)
        self._thread = 0
        self._prompt: int | None = None  # places of the prompt, inside generate
        self._padding: Tensor | None = None  # its attention mask
        self._given: dict[str, Any] = {}  # what the model itself was called with
        self._passes: dict[int, scope.Pass] = {}  # by owner: the pass that runs, or ran last
        self._read: WeakKeyDictionary[Any, dict[int, scope.Pass]] = WeakKeyDictionary()  # cache -> its last, by owner
        self._modes: dict[int, Choosing] = {}  # by layer: the last run of its router
        tops = {index: one.top_k for index, one in self._plans.items()}
        self.layers = tuple(replace(layer, top_k=tops.get(layer.index, layer.top_k)) for layer in model.layers)
        self.zeroed = frozenset(index for index, one in self._plans.items() if one.zeroes)

    @property
    def touched(self) -> list[int]:
        return [int(count) for count in self._counts]

    def count(self, place: int, tokens: Tensor | int) -> None:
        """Add to what an intervention touched; a tensor is only read when somebody asks."""
        self._counts[place] = self._counts[place] + tokens

    def check_touched(self) -> None:
        """RunError if an intervention touched nothing."""
        if not self._passes and not all(self.touched):
            raise RunError("the interventions touched nothing: the model wasn't run inside the block.")
        check_touched(self.interventions, self.touched)

    # -- hooks -------------------------------------------------------------------------------------------------------

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Every hook in place; the model belongs to the thread that entered."""
        self._thread = threading.get_ident()
        module = self._model.module
        with ExitStack() as held:
            owners = {id(self._model.layers[index].owner): self._model.layers[index].owner for index in self._plans}
            held.callback(module.register_forward_pre_hook(self._called, with_kwargs=True, prepend=True).remove)
            held.callback(module.register_forward_hook(self._returned, always_call=True).remove)
            for owner in owners.values():
                held.callback(owner.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True).remove)
                held.callback(owner.register_forward_hook(self._ended, with_kwargs=True).remove)
            if callable(getattr(module, "generate", None)):
                held.enter_context(replaced(module, "generate", self._generate))
            for index, one in self._plans.items():
                layer = self._model.layers[index]
                if one.logits or one.selects:
                    selector, method = layer.selector
                    held.enter_context(replaced(selector, method, partial(self._route, one, True)))
                    if selector is not layer.router:  # the router only makes the logits, its block selects
                        held.enter_context(replaced(layer.router, "forward", partial(self._route, one, False)))
                if one.weights or one.cuts or one.replay is not None:
                    held.callback(self._weighing(one))
            yield

    def _called(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._given = {"input_ids": args[0]} | kwargs if args else kwargs

    def _returned(self, _module: nn.Module, _args: Any, _out: Any) -> None:
        self._given = {}

    def _begin(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A stack starts: its inputs say which tokens come, and what came before them."""
        self._check_thread()
        given = ({"input_ids": args[0]} if args else {}) | kwargs
        found = (given.get(name) for name in ("input_ids", "inputs_embeds", "hidden_states"))
        first = next((x for x in (*found, *args) if isinstance(x, Tensor) and x.dim() >= 2), None)
        if first is None:
            raise RunError(f"{type(owner).__name__} was called without token ids or embeddings.")
        rows, new = first.shape[:2]
        decoder = any(layer.owner is owner and layer.stack == "decoder" for layer in self._model.layers)
        encoded = decoder and reads_twice(self._model)
        prefix = "decoder_" if encoded else ""
        ids = given.get("input_ids")
        of_model = self._given.get(f"{prefix}input_ids")
        if ids is None and isinstance(of_model, Tensor) and of_model.shape == (rows, new):
            ids = of_model
        cache = given.get("past_key_values")
        masks = (given.get("attention_mask"), self._given.get(f"{prefix}attention_mask"))
        mask = next((found for found in masks if _is_mask(found, rows)), None)
        past = _past(cache, mask, new)
        if mask is None and self._padding is not None and not encoded:  # a static cache: the mask has other dimensions
            mask = self._padding.repeat_interleave(rows // len(self._padding), 0)
            mask = nn.functional.pad(mask, (0, past + new - mask.shape[1]), value=1)
        real = torch.ones(rows, past + new, dtype=torch.bool, device=first.device)
        if mask is not None and mask.shape[1] == past + new:
            real = mask.bool().to(first.device)
        earlier = self._read.get(cache, {}).get(id(owner)) if cache is not None and past else None
        so_far = ids
        if past and ids is not None:
            known = None if earlier is None else earlier.ids
            so_far = None if known is None or known.shape[1] < past else torch.cat([known[:, :past], ids], 1)
        if self._prompt is None or not decoder:
            prompt = (earlier.prompt if earlier is not None else past) if past else new
        else:
            prompt = 0 if encoded else self._prompt
        self._passes[id(owner)] = scope.Pass((rows, new), past, prompt, ids, so_far, real)

    def _ended(self, owner: nn.Module, _args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """A stack has run: what its cache holds is known for the next pass with it."""
        for cache in (kwargs.get("past_key_values"), getattr(out, "past_key_values", None)):
            if cache is not None and not isinstance(cache, tuple):
                self._read.setdefault(cache, {})[id(owner)] = self._passes[id(owner)]

    def _check_thread(self) -> None:
        if threading.get_ident() != self._thread:
            raise RunError(
                "another thread runs a model that is being intervened on: run it in the thread that entered "
                "`intervene`, or load it twice."
            )

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._check_thread()
        given = next((x for x in (kwargs.get("input_ids"), kwargs.get("inputs"), *args) if isinstance(x, Tensor)), None)
        embedded = kwargs.get("inputs_embeds")
        places = given.shape[1] if given is not None else embedded.shape[1] if embedded is not None else 1
        configs = [x for x in (kwargs.get("generation_config"), *args) if hasattr(x, "num_beams")]
        configs.append(self._model.module.generation_config)
        beams = kwargs.get("num_beams") or getattr(configs[0], "num_beams", None) or 1
        followed = any("text" in edit.scope or isinstance(edit, Replay) for edit in self._edits)
        if beams > 1 and (followed or self.contrast is not None):
            raise InputError(f"num_beams is {beams}: scopes of text, Replay and Contrast follow one text, not beams.")
        mask = kwargs.get("attention_mask")
        self._prompt, self._padding = places, mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        try:
            return original(*args, **kwargs)
        finally:
            self._prompt = self._padding = None

    def _route(self, one: Plan, selecting: bool, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The router, or the method of its block that selects, edited: by fused code if it can, or watched."""
        if INTERVENED.get(self._model.module) is not self:  # put back by something that was left in the wrong order
            return original(*args, **kwargs)
        now, layer = self._now(one.layer), one.layer
        fused = FUSED.get(layer.router)
        if fused is not None and fused.takes(one):
            out = fused.edited(one, partial(self._where, now), *args, **kwargs)
        else:
            out = self._watched(one, selecting, now, original if fused is None else fused.own, *args, **kwargs)
        if not selecting:
            return out
        if layer.index not in now.counted:
            now.counted.add(layer.index)
            replay = () if one.replay is None else (one.replay,)
            edits = (*one.logits, *one.choice, *one.counts, *one.top_p, *replay)
            for edit in {id(edit): edit for edit in edits}.values():
                self.count(self._place[id(edit)], self._size(now, edit.scope))
        return out

    def _watched(
        self, one: Plan, selecting: bool, now: scope.Pass, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The family's own code, edited by what it calls."""
        layer = one.layer
        mode = Choosing(one, partial(self._where, now), partial(self._recorded, now, layer))
        with ExitStack() as held:
            if one.uniform is not None and family_of(layer.router) == "inkling":
                held.enter_context(_sized(layer, mode))
            held.enter_context(mode)
            out = original(*args, **kwargs)
        if selecting and layer.selector[0] is not layer.router:
            mode.logits = self._modes[layer.index].logits
        self._modes[layer.index] = mode
        if selecting and ((one.selects and not mode.selected) or (one.logits and mode.logits is None)):
            raise RunError(f"{layer.name} routes in a way that can't be seen (fused kernels?), so it can't be edited.")
        return out

    def _weighing(self, one: Plan) -> Callable[[], None]:
        """Hook the place where a layout hands weights to its experts; returns what removes the hook."""
        layer, layout = one.layer, one.layer.family.layout
        if layout == "dense":
            return layer.router.register_forward_hook(partial(self._dense, one), prepend=True).remove
        if layout == "sorted":
            return layer.router.register_forward_hook(partial(self._sorted, one), prepend=True).remove
        hook = partial(self._consumed, one)
        return layer.experts.register_forward_pre_hook(hook, with_kwargs=True, prepend=True).remove

    def _weighed(self, one: Plan, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and weights (T, k) after the third stage, and what it touched counted."""
        now = self._now(one.layer)
        where = partial(self._where, now)
        mode = self._modes.get(one.layer.index)
        for edit in one.weights:
            used = among(ids, edit.experts).any(-1)
            within = where(edit.scope)
            used = used & (within if within is not None else now.real[:, now.past :].flatten())
            self.count(self._place[id(edit)], used.sum())
        recorded = partial(self._recorded, now, one.layer)
        return weigh(one, ids, weights, None if mode is None else mode.logits, where, recorded)

    def _consumed(self, one: Plan, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names, values = list(kwargs), [*args, *kwargs.values()]
        ids, weights = values[1], values[2]
        if one.layer.family.layout == "one-hot":
            mask = ids.reshape(-1, one.layer.n_experts)
            chosen = torch.where(mask.any(-1), mask.long().argmax(-1), -1).unsqueeze(-1)
            _, new = self._weighed(one, chosen, weights.reshape(-1, 1))
            values[2] = new.view(weights.shape)
        else:
            new_ids, new = self._weighed(one, ids.reshape(-1, ids.shape[-1]), weights.reshape(-1, weights.shape[-1]))
            values[1], values[2] = (x.reshape(*old.shape[:-1], -1) for x, old in ((new_ids, ids), (new, weights)))
        return tuple(values[: len(args)]), dict(zip(names, values[len(args) :], strict=True))

    def _dense(self, one: Plan, _module: nn.Module, _args: Any, out: Any) -> Any:
        n_selected = max(1, int((out[0] != 0).sum(-1).max()))
        weights, ids = out[0].topk(n_selected, dim=-1)
        ids, new = self._weighed(one, ids, weights)
        return (torch.zeros_like(out[0]).scatter(-1, ids, new), *out[1:])

    def _sorted(self, one: Plan, _module: nn.Module, _args: Any, out: Any) -> Any:
        order, weights, sizes, k = out[0], out[2], out[3], one.layer.top_k
        experts = torch.arange(len(sizes), device=order.device)
        ids = experts.repeat_interleave(torch.tensor(sizes, device=order.device))
        _, new = self._weighed(one, unsort(order, ids).view(-1, k), unsort(order, weights).view(-1, k))
        return (*out[:2], new.flatten()[order], *out[3:])

    # -- what the hooks ask ------------------------------------------------------------------------------------------

    def _now(self, layer: Layer) -> scope.Pass:
        now = self._passes.get(id(layer.owner))
        if now is None:
            raise RunError(f"{layer.name} ran outside of its model: run the model itself while it is intervened on.")
        return now

    def _where(self, now: scope.Pass, text: str) -> Tensor | None:
        return scope.where(text, now, self._model.tokenizer)

    def _size(self, now: scope.Pass, text: str) -> Tensor:
        within = self._where(now, text)
        return now.real[:, now.past :].sum() if within is None else within.sum()

    def _recorded(self, now: scope.Pass, layer: Layer, replay: Replay) -> Recorded:
        return self._records[id(replay)].of(now, layer, self._where(now, replay.scope))


@contextmanager
def replaced(owner: Any, name: str, new: Callable[..., Any]) -> Iterator[None]:
    """The method `name` of an object is new(original, …) inside the block."""
    original, had_own = getattr(owner, name), name in vars(owner)
    setattr(owner, name, lambda *args, **kwargs: new(original, *args, **kwargs))
    try:
        yield
    finally:
        if had_own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


@contextmanager
def _sized(layer: Layer, mode: Choosing) -> Iterator[None]:
    """The router's own top_k, by which this family cuts its weights, is that of the interventions."""
    owner: Any = layer.selector[0]
    had = vars(owner).get("top_k")
    if had is not None:
        owner.top_k = mode.ranks(had)[1]
    try:
        yield
    finally:
        if had is not None:
            owner.top_k = had


def _is_mask(found: Any, rows: int) -> bool:
    return isinstance(found, Tensor) and found.dim() == 2 and found.shape[0] == rows


def _past(cache: Any, mask: Tensor | None, new: int) -> int:
    """Places before this pass: a mask of the whole length says it best, since not every cache counts."""
    if cache is None:
        return 0
    if mask is not None and mask.shape[1] > new:
        return mask.shape[1] - new
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
