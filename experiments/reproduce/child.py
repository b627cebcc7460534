"""A command as a process of its own, shown, logged, and told of SIGTERM."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from typing import Any

from ckl_jax.runtime import preemption
from ckl_jax.runtime.paths import append

ERROR_LINES = 20


def run_process(name: str, words: list[str], log: pathlib.Path) -> tuple[int, str]:
    """Runs ``python words``, showing and logging every line; its exit code and, if it failed, its last lines.

    Args:
      name: put before every line that is shown.
      log: gets all lines when the process ends.

    Raises:
      PreemptedError: SIGTERM came to this process, which passed it on, or to the other alone, and that has ended.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    style: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "encoding": "utf-8",
        "errors": "replace",
    }
    style["env"] = {**os.environ, "PYTHONUNBUFFERED": "1"}
    started: list[subprocess.Popen] = []

    def pass_on() -> None:
        for process in started:
            process.terminate()

    with preemption.deferred(pass_on), subprocess.Popen([sys.executable, *words], **style) as process:
        started.append(process)
        if preemption.requested():  # Before the process was among those that are told.
            pass_on()
        try:
            for line in process.stdout or ():
                print(f"{name} | {line}", end="", flush=True)
                lines.append(line)
        except BaseException:  # This process is being stopped.
            process.terminate()
            raise
        finally:
            append(log, "".join(lines))
    if process.returncode == preemption.EXIT_CODE:
        raise preemption.PreemptedError(f"{name} saved what it has")
    return process.returncode, "" if process.returncode == 0 else "".join(lines[-ERROR_LINES:])
