"""Several processes that compute as one program: one on each host of a TPU pod, or on machines with CPUs or GPUs.

All of them run the same command with the same options, and find each other by the environment:

- ``JAX_COORDINATOR_ADDRESS`` (``host:port`` of process 0, where that port is free), ``JAX_NUM_PROCESSES`` and
  ``JAX_PROCESS_ID`` (from 0), all three; or
- ``CKL_HOSTS=auto``: ``jax.distributed`` finds the others by itself, on Cloud TPU, Slurm, Kubernetes and Open MPI.
  ``tpu_scripts`` sets it.

With none of these there is one process, and nothing in this module has an effect. Process 0 alone prints and writes
files; the arrays of a checkpoint are written by all. So a run's directory must be one that all hosts share, such as a
bucket or a network file system. Each process must have as many devices as any other.

A test lets two processes on one CPU machine pre-train, fine-tune, die and resume. Real hosts are untested.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import pickle
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from ckl_jax.errors import ConfigError, require
from ckl_jax.runtime.paths import replace

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
AUTO = "CKL_HOSTS"

T = TypeVar("T")

_alone = False  # While process 0 does by itself what `of_first` gives it.


def start() -> None:
    """Joins the other processes, if the environment asks for it; to be called before anything is computed.

    From then on what processes other than 0 print goes nowhere (their errors do not), and processes that this one
    starts are none of the group.

    Others that do not come within five minutes end this process in JAX's own way: with a stack trace, and code 134.

    Raises:
      ConfigError: a variable is missing or cannot work.
      ConnectionError: the others were not found.
    """
    settings = _settings()
    if settings is None:
        return
    where = settings.get("coordinator_address", f"{AUTO}=auto")
    print(f"waiting for the other processes, {where}: up to 5 minutes", file=sys.stderr)
    for name in (ADDRESS, COUNT, INDEX, AUTO):
        os.environ.pop(name, None)
    try:
        jax.distributed.initialize(**settings)
    except ValueError as error:
        raise ConfigError(f"hosts: {where} does not say how to find the others ({_one_line(error)})") from error
    except RuntimeError as error:
        raise ConnectionError(f"hosts: the other processes were not found by {where} ({_one_line(error)})") from error
    if not is_first():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def require_one(command: str) -> None:
    """Raises ConfigError where ``JAX_NUM_PROCESSES`` names several; ``CKL_HOSTS=auto`` tells only those who join."""
    settings = _settings() or {}
    count = settings.get("num_processes", 1)
    require(count == 1, COUNT, count, f"1: {command} is for one host; on several, run its items one by one")


def _settings() -> dict[str, Any] | None:
    """The arguments of ``jax.distributed.initialize``, or None for a process on its own."""
    found = {name: os.environ.get(name, "") for name in (ADDRESS, COUNT, INDEX)}
    given = [name for name, value in found.items() if value]
    auto = os.environ.get(AUTO, "")
    if auto:
        require(auto == "auto", AUTO, auto, "auto")
        require(not given, AUTO, auto, f"only without {', '.join(given)}")
        return {}
    if not given:
        return None
    for name, value in found.items():
        require(bool(value), name, value, f"a value where {given[0]} has one")
    host, _, port = found[ADDRESS].rpartition(":")
    require(bool(host) and port.isdecimal() and 0 < int(port) < 2**16, ADDRESS, found[ADDRESS], "host:port")
    require(found[COUNT].isdecimal() and int(found[COUNT]) >= 1, COUNT, found[COUNT], "a number of at least 1")
    count = int(found[COUNT])
    allowed = f"0 to {count - 1}, below {COUNT} = {count}"
    require(found[INDEX].isdecimal() and int(found[INDEX]) < count, INDEX, found[INDEX], allowed)
    return {"coordinator_address": found[ADDRESS], "num_processes": count, "process_id": int(found[INDEX])}


def several() -> bool:
    """Whether this is one of several processes, which take part in what is called."""
    return not _alone and jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that prints and writes files."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def any_host(flag: bool) -> bool:
    """Whether ``flag`` holds on any process: the same answer on all, which must all call it."""
    return bool(np.any(multihost_utils.process_allgather(np.array(flag)))) if several() else bool(flag)


def of_first(call: Callable[[], T]) -> T:
    """What ``call()`` returns on process 0, which alone calls it; where it raises, every process does.

    All must call it, and none goes on before the call has ended. The value must be one that pickle can copy. Inside the
    call process 0 is on its own: what would be done by all together it does alone.
    """
    if not several():
        return call()
    value, error = pickle.loads(_bytes_of_first(pickle.dumps(_outcome(call) if is_first() else None)))
    if error is not None:
        raise error
    return value


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a part; process 0 writes, for all.

    What JSON does not have, NaN and infinities, becomes null.
    """
    of_first(lambda: replace(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _outcome(call: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What a call of process 0 by itself returns, or the error that every process is to raise."""
    global _alone
    _alone = True
    try:
        return call(), None
    except (ConfigError, OSError) as refused:
        return None, refused
    except Exception as failed:
        return None, RuntimeError(f"process 0 failed ({_one_line(failed)})")
    finally:
        _alone = False


def together(call: Callable[[], T]) -> T:
    """``call()`` on every process, each for itself; where one of them raises a ConfigError, all of them do."""
    refused: ConfigError | None = None
    try:
        value = call()
    except ConfigError as error:
        refused = error
    if any_host(refused is not None):
        raise refused or ConfigError("hosts: another process cannot go on, and says why")
    return value


def require_same(field: str, value: Any) -> None:
    """Raises ConfigError on every process unless all have process 0's value, as all must be given the same."""
    first = of_first(lambda: value)
    together(lambda: require(value == first, field, value, f"{first}, as process 0 has: the same on every host"))


def _bytes_of_first(data: bytes) -> bytes:
    high, low = multihost_utils.broadcast_one_to_all(np.array(divmod(len(data), 2**24), np.int32))  # It has no int64.
    size = int(high) * 2**24 + int(low)
    padded = np.zeros(max(1024, 1 << (size - 1).bit_length()), np.uint8)  # Few sizes are few programs.
    if is_first():
        padded[:size] = np.frombuffer(data, np.uint8)
    return multihost_utils.broadcast_one_to_all(padded)[:size].tobytes()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
