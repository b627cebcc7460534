"""SIGTERM is held while work goes on, seen by it, and never lost."""

import dataclasses
import os
import signal
import sys
import threading

import pytest

from ckl_jax.errors import ConfigError
from ckl_jax.runtime import cli, finite
from ckl_jax.runtime.preemption import PreemptedError, deferred, requested


@pytest.fixture(autouse=True)
def _handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) == before
    assert not requested()


def test_a_signal_is_held_seen_and_raised_at_the_end_if_the_work_did_not_stop():
    called = []

    @deferred(lambda: called.append("then"))
    def work():
        assert not requested()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert requested()

    with pytest.raises(PreemptedError):
        work()
    assert called == ["then", "then"]


def test_without_a_signal_nothing_happens_and_a_later_one_is_not_held():
    before = []
    previous = signal.signal(signal.SIGTERM, lambda *_: before.append("told"))
    with deferred():
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, previous)
    assert before == ["told"]


def test_what_the_work_raises_itself_is_what_ends_it():
    @deferred()
    def work():
        os.kill(os.getpid(), signal.SIGTERM)
        raise PreemptedError("step 3")

    with pytest.raises(PreemptedError, match="step 3"):
        work()


def test_a_decorated_function_holds_the_signal_in_every_call():
    @deferred()
    def work(signalled):
        if signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        return requested()

    for _ in range(2):
        with pytest.raises(PreemptedError):
            work(True)
        assert work(False) is False


def test_work_inside_held_work_passes_the_request_on():
    went_on = []

    @deferred()
    def work():
        with deferred():
            os.kill(os.getpid(), signal.SIGTERM)
        went_on.append(True)

    with pytest.raises(PreemptedError):
        work()
    assert not went_on


def test_interruption_by_the_keyboard_is_not_held():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # A job in the background ignores it.
    try:
        with pytest.raises(KeyboardInterrupt), deferred():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_work_without_a_handler():
    found = []

    def work():
        with deferred():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


@dataclasses.dataclass(frozen=True)
class Command:
    """A command without options."""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("beta: no"), 2, "error: beta: no"),
        (
            PreemptedError("step 3 is saved"),
            75,
            "stopped by SIGTERM: step 3 is saved; the same command goes on from there",
        ),
        (finite.NotFiniteError("round 3 of a: kl is nan"), 3, "error: round 3 of a: kl is nan"),
        (OSError(28, "No space left on device", "out/x"), 1, "error: out/x: No space left on device"),
        (OSError("odd"), 1, "error: odd"),
    ],
)
def test_a_command_that_is_stopped_says_why_in_one_line_and_by_its_code(monkeypatch, capsys, error, code, line):
    def main(command):
        raise error

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit) as stop:
        cli.run(main, Command)
    assert stop.value.code == code
    assert capsys.readouterr().err == line + "\n"
