"""The two ways a command can fail: the input was wrong (exit code 2) or the run was (exit code 1).

Every message says the value, what was expected, and what to do.
"""


class InputError(ValueError):
    """What the user asked for can't be done as asked; nothing was changed."""


class RunError(RuntimeError):
    """A run that began correctly could not finish; what it had committed is kept."""


def not_negative(**numbers: int) -> None:
    """InputError for the first number below 0: a seed, or how often to draw."""
    for name, number in numbers.items():
        if number < 0:
            raise InputError(f"{name} is {number}; expected 0 or more.")
