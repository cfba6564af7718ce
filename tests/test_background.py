"""Analyses in processes of their own: the same tables, and nothing left behind."""

import signal
import subprocess
import sys
import time

import cloudpickle
import pandas as pd
import psutil
import pytest
from routed import random_trace

from workbench import analysis, background, slicing
from workbench.background import Asked, Workers, answer
from workbench.errors import InputError, RunError


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return random_trace(tmp_path_factory.mktemp("background") / "t.duckdb", n_texts=12).trace


@pytest.fixture(scope="module")
def workers():
    found = Workers(1)
    yield found
    found.close()


def asked(trace, name, *arguments, **rest):
    return Asked(name, arguments, str(trace.path), trace.run, trace.n_tokens, **rest)


def test_the_table_is_that_of_the_analysis(trace, workers):
    found = workers.ask(asked(trace, "load", ("by", "lang"), ("n_resamples", 50)), trace.n_layers)
    pd.testing.assert_frame_equal(found.table(), analysis.load(trace, by="lang", n_resamples=50))
    assert found.done and not found.cancelled and found.progress == (2, 2)


def test_where_modules_are_pickled_by_value(trace):
    """As nnsight has it done in the whole process once something was sent away."""
    cloudpickle.register_pickle_by_value(background)
    found = Workers(1)
    try:
        answered = found.ask(asked(trace, "load", ("n_resamples", 0)), trace.n_layers)
        pd.testing.assert_frame_equal(answered.table(), analysis.load(trace, n_resamples=0))
        assert answered.progress == (2, 2)
    finally:
        found.close()
        cloudpickle.unregister_pickle_by_value(background)


def test_slices_and_samples_come_first(trace, workers):
    question = asked(trace, "load", ("n_resamples", 0), where="lang=de", sample=30)
    wanted = analysis.load(slicing.sample(slicing.where(trace, "lang=de"), 30), n_resamples=0)
    pd.testing.assert_frame_equal(workers.ask(question).table(), wanted)
    pd.testing.assert_frame_equal(answer(question), wanted)


def test_the_same_question_is_answered_once(trace, workers):
    question = asked(trace, "load", ("n_resamples", 0))
    first = workers.ask(question)
    assert workers.ask(asked(trace, "load", ("n_resamples", 0))) is first is workers.known(question)
    assert workers.ask(asked(trace, "load", ("n_resamples", 1))) is not first
    assert workers.known(asked(trace, "load", ("n_resamples", 2))) is None


def test_its_errors_are_raised_here(trace, workers):
    with pytest.raises(InputError, match="nothing called"):
        workers.ask(asked(trace, "load", where="nothing=1")).table()
    with pytest.raises(InputError):
        workers.ask(asked(trace, "load", ("by", "nothing"))).table()


def test_cancelling_stops_it_and_the_next_is_answered(trace, workers):
    slow = workers.ask(asked(trace, "load", ("n_resamples", 20_000_000)))
    assert not slow.wait(0.2)
    slow.cancel()
    assert slow.wait(30) and slow.cancelled
    with pytest.raises(RunError, match="cancelled"):
        slow.table()
    assert len(workers.ask(asked(trace, "balance", ("n_resamples", 0))).table())
    again = workers.ask(slow.asked)
    assert again is not slow
    again.cancel()


def test_a_question_that_is_left_is_not_waited_for(trace, workers):
    running, left = (workers.ask(asked(trace, "load", ("n_resamples", 30_000_000 + n))) for n in range(2))
    last = workers.ask(asked(trace, "balance", ("n_resamples", 1)))
    while not running.future.running():
        time.sleep(0.01)
    for one in (running, left, last):
        workers.leave(one.asked)
    assert not running.done and workers.known(running.asked) is running
    assert workers.known(left.asked) is workers.known(last.asked) is None
    assert left.progress == (0, 0)
    again = workers.ask(last.asked)
    running.cancel()
    assert len(again.table())
    with pytest.raises(RunError, match="cancelled"):  # it was not answered
        left.table()
    workers.leave(again.asked)
    assert workers.known(again.asked) is again
    workers.leave(left.asked)


def test_a_process_that_dies_is_an_error_and_asking_again_begins_anew(trace, workers):
    slow = workers.ask(asked(trace, "load", ("n_resamples", 20_000_001)))
    assert not slow.wait(1)
    for process in psutil.Process().children(recursive=True):
        if "pebble" in " ".join(process.cmdline()):
            process.send_signal(signal.SIGKILL)
    with pytest.raises(RunError, match="ended its process"):
        slow.table()
    again = workers.ask(slow.asked)
    assert again is not slow
    again.cancel()


def test_old_answers_are_forgotten(trace, monkeypatch):
    monkeypatch.setattr("workbench.background.KEPT_BYTES", 1)
    found = Workers(1)
    try:
        first = found.ask(asked(trace, "load", ("n_resamples", 0)))
        first.table()
        found.ask(asked(trace, "balance", ("n_resamples", 0))).table()
        assert found.known(first.asked) is None
    finally:
        found.close()


ORPHANS = """
import sys, time
from workbench.background import Workers
workers = Workers(1)
workers.warm()
time.sleep(1)
print("ready", flush=True)
time.sleep(100)
"""


def test_workers_end_with_the_process_they_work_for():
    with subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as main:
        assert main.stdout is not None and main.stdout.readline() == b"ready\n"
        children = psutil.Process(main.pid).children(recursive=True)
        assert any("pebble" in " ".join(child.cmdline()) for child in children)
        main.kill()
    end = time.monotonic() + 30
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
        assert time.monotonic() < end, "workers outlive their parent"
        time.sleep(0.2)
