"""What the tests of the commands share; the fixture `workbench` is in conftest.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Result:
    code: int
    out: str
    err: str


Command = Callable[..., Result]


def refused(result: Result, *parts: str) -> None:
    """Exit code 2 and one line that has each of the parts."""
    assert result.code == 2, result
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    for part in parts:
        assert part in result.err, result.err
