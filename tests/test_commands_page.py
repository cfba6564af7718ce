"""`workbench app`: what is refused before a server is started, and what the server is told."""

import os
import socket
import sys

import pytest
from commandline import refused
from routed import random_trace


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return random_trace(tmp_path_factory.mktemp("page") / "t.duckdb").trace.path


@pytest.fixture
def started(monkeypatch):
    """Stands in for Streamlit's own command; its arguments and the environment that the page sees."""
    from streamlit.web import cli

    calls = []
    for name in ("TRACE", "MODEL", "DEVICE", "DTYPE"):
        monkeypatch.setenv(f"WORKBENCH_{name}", "")  # put back afterwards
        monkeypatch.delenv(f"WORKBENCH_{name}")
    monkeypatch.setattr("atexit.register", lambda *_: None)  # the command would end this process

    def main():
        calls.append((sys.argv, {name: value for name, value in os.environ.items() if name.startswith("WORKBENCH_")}))
        sys.exit(0)

    monkeypatch.setattr(cli, "main", main)
    return calls


@pytest.mark.parametrize(("port", "message"), [("0", "from 1 to 65535"), ("70000", "from 1 to 65535")])
def test_ports(workbench, started, port, message):
    refused(workbench("app", "--port", port), port, message)
    assert not started


def test_a_port_in_use(workbench, started):
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        refused(workbench("app", "--port", port), str(port), "in use")
    assert not started


def test_files_that_are_no_trace(workbench, started, tmp_path):
    refused(workbench("app", tmp_path / "none.duckdb"), "none.duckdb", "no such file")
    empty = tmp_path / "empty.duckdb"
    empty.touch()
    refused(workbench("app", empty), "empty.duckdb", "is empty")
    other = tmp_path / "other.duckdb"
    other.write_text("a,b\n1,2\n" * 1000)
    refused(workbench("app", other), "other.duckdb", "not a trace")
    refused(workbench("app", tmp_path), "is a folder")
    assert not started


def test_without_streamlit(workbench, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "streamlit" else found(name))
    refused(workbench("app"), "moe-workbench[app]")


def test_what_the_server_is_told(workbench, started, trace):
    result = workbench("app", trace, "--model", "demo", "--no-browser", "--dtype", "float32")
    assert result.code == 0
    ((arguments, environment),) = started
    assert arguments[:2] == ["streamlit", "run"] and arguments[2].endswith("main.py")
    for option in ("--server.address=localhost", "--browser.gatherUsageStats=false", "--server.headless=true"):
        assert option in arguments
    assert environment["WORKBENCH_TRACE"] == str(trace.resolve())
    assert environment["WORKBENCH_MODEL"] == "demo" and environment["WORKBENCH_DTYPE"] == "float32"


def test_without_a_trace(workbench, started):
    assert workbench("app").code == 0
    ((arguments, environment),) = started
    assert "WORKBENCH_TRACE" not in environment and "--server.headless=false" in arguments
