"""Fixtures of several test files."""

import sys

import pytest
from commandline import Command, Result


@pytest.fixture
def workbench(capsys, monkeypatch) -> Command:
    """`workbench …` in this process, as `python -m workbench` calls it: an exception that it doesn't expect fails."""
    from workbench.__main__ import main

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["workbench", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Result(int(ended.value.code or 0), out, err)

    return run
