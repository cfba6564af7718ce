"""A text that someone typed, traced at once: into a file that is gone afterwards.

    with traced(load("demo"), "All human beings are born free.") as trace:
        text = reading.read(trace, trace.sequences()["seq"])

A text longer than `max_length` is traced in consecutive pieces; each begins anew, without what stands before it.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from workbench.bundled import CONTEXT
from workbench.capture import trace as capture
from workbench.corpus import from_rows
from workbench.errors import InputError
from workbench.forward import predicts_next, reads_twice
from workbench.intervening import Given
from workbench.models import Model
from workbench.side_by_side import twins
from workbench.tracefile import Trace

LONGEST = 2048
"""Tokens of a piece where a model doesn't say how many positions it has."""
BATCH_TOKENS = 2048
"""Tokens between two looks at whether to go on: about half a second of a small model on a CPU."""


def length(model: Model) -> int:
    """Tokens of the pieces that a long text is traced in, unless someone wants another number."""
    longest = model.max_length or LONGEST
    return min(CONTEXT.get(model.name, longest), longest)


def recorded(model: Model) -> list[str]:
    """What is recorded of a typed text: everything a page shows of a token, as far as the model has it."""
    predicts = predicts_next(model) and not reads_twice(model)
    return ["ids", "weights", "entropy", "margin", *(["predictions"] if predicts else [])]


@contextmanager
def traced(
    model: Model,
    text: str,
    *,
    max_length: int | None = None,
    recipe: Given | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Trace]:
    """The trace of one text, for as long as the context lasts; its file, in a folder of its own, is deleted with it.

    max_length  tokens of a piece at most; None: `length(model)`
    recipe      interventions in force, whatever `workbench.intervene` takes
    progress    called with the tokens done and their number in all, about twice a second: what it raises ends the run
                and comes out of here, the file deleted

    The run is called "typed"; its text has the domain "typed" and no other label. Raises InputError for a text without
    a token, a model without a tokenizer, and a max_length that the model doesn't have.
    """
    if not text.strip():
        raise InputError("there is no text to trace: expected at least one word.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"character {error.start} of the text, U+{ord(text[error.start]):04X}, is half of a pair and stands for "
            "nothing: remove it."
        ) from error
    # A twin: someone else may be generating with the model, and its hooks must not see this text.
    with tempfile.TemporaryDirectory(prefix="workbench-live-") as folder, twins(model, 1) as (free,):
        yield capture(
            replace(model, module=free.module, layers=free.layers),
            from_rows([{"text": text, "domain": "typed"}], "typed"),
            Path(folder) / "typed.duckdb",
            record=recorded(model),
            run="typed",
            max_length=max_length or length(model),
            long_texts="split",
            batch_tokens=BATCH_TOKENS,
            recipe=recipe,
            progress=progress or False,
        )
