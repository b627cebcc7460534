"""What ``compile`` and ``memory`` start as a process of its own: one kind of work, done twice, and what it cost.

python -m experiments.benchmark.process --work round
"""

from __future__ import annotations

import functools
import json
import pathlib
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ckl_jax.next_character import init_state, train_step
from ckl_jax.rl.updates import train_round
from ckl_jax.runtime import cli
from experiments.benchmark.timing import seconds_of
from experiments.benchmark.workload import (
    Plan,
    choose_plan,
    first_round,
    pretrain_config,
    text_stream,
    tiny_config,
    tiny_model,
)


@dataclass(frozen=True)
class ProcessCommand:
    """Does one kind of work twice and prints its costs as one line of JSON."""

    work: Literal["imports", "round", "pretraining"] = "round"
    quick: bool = False


def _prepare(plan: Plan, work: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    if work == "round":
        first = first_round(tiny_model(plan), tiny_config(plan))
        return functools.partial(train_round, first.program), first[1:]
    config = pretrain_config(plan, "tiny", plan.pretraining[0][1])
    stream = jax.tree.map(jnp.asarray, text_stream(config.max_digits))
    state = jax.jit(functools.partial(init_state, config))()
    return functools.partial(train_step, config), (state, stream)


def peak_bytes() -> int:
    """Peak resident memory of this process, by Linux's own count: getrusage's starts with that of the parent."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return 1024 * int(
            next(
                line.split()[1] for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")
            )
        )
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(command: ProcessCommand) -> None:
    measured: dict[str, Any] = {}
    if command.work == "imports":
        jax.block_until_ready(jnp.zeros(1))
    else:
        call, arguments = _prepare(choose_plan(command.quick), command.work)
        start = time.perf_counter()
        compiled = jax.jit(call).lower(*arguments).compile()
        measured["compile_seconds"] = time.perf_counter() - start
        measured["first_seconds"] = seconds_of(compiled, *arguments)
    measured["first_done_at"] = time.time()
    if command.work != "imports":
        measured["second_seconds"] = seconds_of(compiled, *arguments)
    stats = jax.devices()[0].memory_stats() or {}
    print(json.dumps(measured | {"peak_bytes": peak_bytes(), "device_peak_bytes": stats.get("peak_bytes_in_use")}))


if __name__ == "__main__":
    cli.run(main, ProcessCommand)
