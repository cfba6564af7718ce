"""Continue a prompt plainly, steered and, as a control, under edits of random experts, all in turns, token by token.

    def show(name, step):                                   # "plain", "steered", "plain", "steered", …
        print(name, step.text)

    found = side_by_side(model, "The treaty was", Ablate(layer=3, experts=[5]), control=0, on_step=show)
    found == compare(model, "The treaty was", Ablate(layer=3, experts=[5]), control=0)      # True

Each continuation runs on a **twin** of the model: modules of its own that share the weights, with hooks, caches and
random numbers of their own. So the model itself is never touched, several callers can use it at once, and what comes
out is what `workbench.generation.generate` gives by itself, bit for bit. Twins are made once and kept with the model.

One continuation computes at a time. After each round, in which everyone who hasn't ended makes one token, `on_step` is
called for each of them in the caller's thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from workbench.errors import InputError, not_negative
from workbench.generation import Generated, Step, Stopped, candidates_of, compared, generate, likeliest
from workbench.hooked import INTERVENED, RECORDED
from workbench.intervening import Given, check
from workbench.models import Model, load, twin
from workbench.recipe import Recipe

PAUSE = 0.1
"""Seconds between two calls of `on_wait`."""

_FREE: WeakKeyDictionary[nn.Module, list[Model]] = WeakKeyDictionary()
"""Module of a model -> its twins that nobody uses."""
_TAKING = threading.Lock()


def side_by_side(
    model: Model | str,
    prompt: str | list[Mapping[str, Any]],
    interventions: Given | None,
    *,
    control: int | None = None,
    candidates: int = 0,
    on_step: Callable[[str, Step], Any] | None = None,
    on_wait: Callable[[], Any] | None = None,
    **options: Any,
) -> dict[str, Generated]:
    """The prompt continued without and with interventions, in turns: "plain", "steered" and, if asked for, "control".

    interventions  as for `generate`; None: only "plain"
    control        a seed: also continue it under the same edits of random experts
    candidates     each step has the so many likeliest tokens of *every* continuation that made a token in its round, so
                   that their probabilities can be compared
    on_step        called with a name and its Step, in the caller's thread; what it raises is passed on; True stops all
    on_wait        called about ten times a second while a token is computed; likewise
    options        further arguments of `generate`: max_tokens, temperature, seed, chat, record

    Stopping takes no longer than a layer takes to compute. Where on_step or on_wait stopped it, the continuations that
    hadn't ended have what they had until then, and ended is "stopped".

    InputError and RunError as from `generate`, after all continuations were stopped; InputError also if the model is
    being recorded or intervened on by somebody else while a twin of it has to be made.
    """
    not_negative(candidates=candidates)
    recipes = compared(interventions, control)
    model = model if isinstance(model, Model) else load(model)
    for recipe in recipes.values():
        if recipe is not None:
            check(model, recipe)
    with twins(model, len(recipes)) as own, ExitStack() as held:
        players = {
            name: held.enter_context(_turns(each, prompt, recipe, candidates, options))
            for each, (name, recipe) in zip(own, recipes.items(), strict=True)
        }
        steps: dict[str, list[Step]] = {name: [] for name in players}
        try:
            while any(player.result is None for player in players.values()):
                playing = {name: player for name, player in players.items() if player.result is None}
                made = {name: player.play(on_wait) for name, player in playing.items()}
                now = {name: step for name, step in made.items() if step is not None}
                for name, step in _comparable(players, now, candidates).items():
                    steps[name].append(step)
                    if on_step is not None and on_step(name, step) is True:
                        raise Stopped
        except Stopped:
            for player in players.values():
                player.stop()
        found = {name: player.outcome() for name, player in players.items()}
    return {
        name: replace(one, steps=(*steps[name], *one.steps[len(steps[name]) :]))  # those of a round that was broken off
        for name, one in found.items()
    }


@contextmanager
def twins(model: Model, n: int) -> Iterator[list[Model]]:
    """n twins of a model that nobody else uses inside the block: made where none are free, and kept for the next.

    Making one takes some milliseconds and no memory for weights. InputError if the model is being recorded or
    intervened on while one has to be made: its hooks would be copied.
    """
    with _TAKING:
        free = _FREE.setdefault(model.module, [])
        free[:] = [one for one in free if _share(one.module, model.module)]
        taken = free[:n]
        taken += [_twin(model) for _ in range(n - len(taken))]
        del free[:n]
    try:
        yield taken
    finally:
        with _TAKING:
            free += taken


def _twin(model: Model) -> Model:
    module = twin(model.module)
    if model.module in INTERVENED or RECORDED.get(model.module):
        raise InputError(
            "the model is being recorded or intervened on, so it can't be used a second time right now: wait until "
            "that is done, or leave the block of intervene() or of the Recorder."
        )
    return replace(model, module=module, layers=load(module, tokenizer=model.tokenizer).layers)


def _share(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same tensors: not if one was moved to another device in the meantime."""
    tensors = [[*module.parameters(), *module.buffers()] for module in (one, other)]
    return len(tensors[0]) == len(tensors[1]) and all(a is b for a, b in zip(*tensors, strict=True))


class _Turns:
    """A generation in a thread of its own, which computes only while it is its turn.

    result  its outcome, once it has ended
    p       float32 (vocabulary,): the probabilities of its last step
    """

    def __init__(self, model: Model, prompt: Any, recipe: Recipe | None, candidates: int, options: Any) -> None:
        self.model = model
        self.p = torch.empty(0)
        self.result: Generated | BaseException | None = None
        self._step: Step | None = None
        self._go, self._made = threading.Semaphore(0), threading.Semaphore(0)
        self._stopping = False
        options = options | {"candidates": self._likeliest if candidates else 0, "on_step": self._told}
        self._n = candidates
        self._thread = threading.Thread(target=self._run, args=(prompt, recipe, options), daemon=True)
        self._thread.start()

    def play(self, on_wait: Callable[[], Any] | None) -> Step | None:
        """The next step; None if there is none, and then a result. Raises what the generation raised."""
        self._step = None
        self._go.release()
        while not self._made.acquire(timeout=PAUSE):
            if on_wait is not None and on_wait() is True:
                raise Stopped
        if isinstance(self.result, BaseException):
            raise self.result
        return self._step

    def stop(self) -> None:
        """Ask it to end."""
        self._stopping = True
        self._go.release()

    def outcome(self) -> Generated:
        """What came out; waits until the thread has ended."""
        self._thread.join()
        if not isinstance(self.result, Generated):
            raise self.result or RuntimeError("the generation has no result")
        return self.result

    def close(self) -> None:
        self.stop()
        self._thread.join()

    def _run(self, prompt: Any, recipe: Recipe | None, options: dict[str, Any]) -> None:
        self._go.acquire()

        def leave(_module: nn.Module, _args: Any) -> None:  # a function: a twin of the twin, as of Contrast, shares it
            if self._stopping:
                raise Stopped

        handles = [layer.block.register_forward_pre_hook(leave) for layer in self.model.layers]
        try:
            self.result = generate(self.model, prompt, recipe, **options)
        except BaseException as error:  # raised again in the caller's thread
            self.result = error
        finally:
            for handle in handles:
                handle.remove()
            self._made.release()

    def _likeliest(self, p: Tensor) -> Tensor:
        self.p = p
        return likeliest(p, self._n)

    def _told(self, step: Step) -> bool:
        self._step = step
        self._made.release()
        self._go.acquire()
        return self._stopping


@contextmanager
def _turns(*given: Any) -> Iterator[_Turns]:
    """Turns whose thread has ended after the block."""
    player = _Turns(*given)
    try:
        yield player
    finally:
        player.close()


def _comparable(players: dict[str, _Turns], steps: dict[str, Step], n: int) -> dict[str, Step]:
    """The steps of a round with the likeliest tokens of all of them, each by its own probabilities."""
    if not n or not steps:
        return steps
    ids = torch.cat([likeliest(players[name].p, n) for name in steps]).unique()

    def with_all(name: str, step: Step) -> Step:
        p = players[name].p
        order = p[ids].argsort(descending=True, stable=True)
        return replace(step, candidates=candidates_of(players[name].model, p, ids[order]))

    return {name: with_all(name, step) for name, step in steps.items()}
