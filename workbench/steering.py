"""A comparison that is generated in the background, to be looked at while it runs, and stopped.

running = Steering(model, "The treaty was", Ablate(layer=3, experts=[5]), control=0, max_tokens=200)
while running.running:
    print(running.found["steered"].text)         # so far
running.stop()
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from workbench.errors import InputError, RunError
from workbench.generation import Generated, Step, check_question, compared
from workbench.intervening import Given, check
from workbench.models import Model
from workbench.recipe import Recipe
from workbench.side_by_side import side_by_side


class Steering:
    """`side_by_side` in a thread of its own.

    model      name of the model; n_experts: of each of its layers. The model itself isn't kept
    prompt     as given
    recipe     what steers; None if nothing does
    control    the seed of the control's experts; None without a control
    settings   max_tokens, temperature, seed and chat as given
    error      why it broke off: InputError or RunError; None while it runs, and where it didn't
    """

    def __init__(
        self,
        model: Model,
        prompt: str,
        interventions: Given | None,
        *,
        control: int | None = None,
        candidates: int = 0,
        record: tuple[str, ...] | None = None,
        wanted: Callable[[], bool] = lambda: True,
        **settings: Any,
    ) -> None:
        """Begin.

        wanted    asked about ten times a second: whether somebody still waits for it
        settings  max_tokens, temperature, seed, chat

        InputError for what is wrong with prompt, settings, recipe or control; what goes wrong later is in `error`.
        """
        recipes = compared(interventions, control)
        check_question(model, prompt, **settings)
        for recipe in recipes.values():
            if recipe is not None:
                check(model, recipe)
        self.model, self.n_experts = model.name, [layer.n_experts for layer in model.layers]
        self.prompt, self.control, self.settings = prompt, control, settings
        self.recipe: Recipe | None = recipes.get("steered")
        self.error: InputError | RunError | None = None
        self._wanted = wanted
        self._steps: dict[str, list[Step]] = {name: [] for name in recipes}
        self._result: dict[str, Generated] | None = None
        self._stop = threading.Event()
        options = {"candidates": candidates, "record": record, **settings}
        self._thread = threading.Thread(target=self._run, args=(model, options), daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    @property
    def found(self) -> Mapping[str, Generated]:
        """The continuations by name; while it runs, what there is so far, which isn't ended and touched nothing yet."""
        if self._result is not None:
            return self._result
        return {name: _so_far(tuple(steps)) for name, steps in self._steps.items()}

    def stop(self) -> None:
        """End it; what was written is kept. Returns at once."""
        self._stop.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it has ended, or for so long; whether it has."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self, model: Model, options: dict[str, Any]) -> None:
        def keep(name: str, step: Step) -> bool:
            self._steps[name].append(step)
            return self._leave()

        try:
            self._result = side_by_side(
                model,
                self.prompt,
                self.recipe,
                control=self.control,
                on_step=keep,
                on_wait=self._leave,
                **options,
            )
        except (InputError, RunError) as error:
            self.error = error
        except Exception as error:  # nobody is there to catch it
            logging.getLogger(__name__).exception("a generation failed")
            self.error = RunError(f"the generation failed ({type(error).__name__}: {error}).")

    def _leave(self) -> bool:
        return self._stop.is_set() or not self._wanted()


def _so_far(steps: tuple[Step, ...]) -> Generated:
    return Generated((), steps, "".join(step.text for step in steps), "stopped")
