"""The two ways a command can fail: the input was wrong (exit code 2) or the run was (exit code 1).

Every message says the value, what was expected, and what to do. And Ctrl-C, which is neither.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """What the user asked for can't be done as asked; nothing was changed."""


class RunError(RuntimeError):
    """A run that began correctly could not finish; what it had committed is kept."""


def interrupted(error: BaseException | None) -> bool:
    """Whether an error is Ctrl-C, or what came of it inside DuckDB (a RuntimeError) or numba (a SystemError)."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt) or (type(error) is RuntimeError and str(error) == "Query interrupted"):
            return True
        error = error.__cause__
    return False


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C while native code works is KeyboardInterrupt, as anywhere else."""
    try:
        yield
    except Exception as error:
        if not interrupted(error):
            raise
        raise KeyboardInterrupt from error


def not_negative(**numbers: int) -> None:
    """InputError for the first number below 0: a seed, or how often to draw."""
    for name, number in numbers.items():
        if number < 0:
            raise InputError(f"{name} is {number}; expected 0 or more.")
