"""A machine that is taken away: SIGTERM is held until the work has reached a step that it can go on from."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ckl_jax.runtime import hosts

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the same command goes on; ``tpu_scripts/supervise.sh`` starts it again."""

HOSTS_ASK_EVERY = 10

_signalled = False


class PreemptedError(Exception):
    """SIGTERM came and the work so far is saved; the message is one line that says where."""


@contextlib.contextmanager
def deferred(then: Callable[[], object] = lambda: None) -> Iterator[None]:
    """While it lasts, SIGTERM ends nothing, however often it comes: ``requested`` says so, for the work to stop soon.

    Python allows signal handlers in the main thread only; in another one SIGTERM keeps doing what it did before.

    Args:
      then: called from the signal handler.

    Raises:
      PreemptedError: at the end, if the work was done before it looked again.
    """
    global _signalled
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def hold(signum: int, frame: Any) -> None:
        global _signalled
        _signalled = True
        then()

    before = signal.signal(signal.SIGTERM, hold)
    try:
        yield
    finally:
        # A handler that was not installed from Python reads as None and cannot be put back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
        signalled, _signalled = _signalled, False
    if hosts.any_host(signalled):
        raise PreemptedError("what was done is saved")


def requested(step: int = 0) -> bool:
    """Whether SIGTERM came, to this host or to another of the same job.

    Several hosts ask each other at every tenth ``step`` only, as that waits for all that was dispatched.
    """
    return hosts.any_host(_signalled) if step % HOSTS_ASK_EVERY == 0 or not hosts.several() else False
