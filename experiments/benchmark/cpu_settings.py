"""What the settings of ``ckl_jax.runtime.xla_cpu`` do to the speed: processes with and without them, in turn."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ckl_jax import next_character
from ckl_jax.presets import pretrain_preset
from ckl_jax.rl.setup import set_up
from ckl_jax.runtime import startup, xla_cpu
from experiments.benchmark.timing import speedup, spread
from experiments.benchmark.workload import (
    Plan,
    Progress,
    Section,
    choose_plan,
    pretrain_config,
    text_stream,
    tiny_config,
    tiny_model,
)

ROOT = pathlib.Path(__file__).parents[2]
KEEP, AVOID = "xla_cpu.keep_freed_memory(); ", "xla_cpu.avoid_wrong_fusions(); "
VARIANTS = {
    "none": ("", ""),
    "huge pages": (xla_cpu.HUGE_PAGES, KEEP),
    "huge pages, no wrong fusions": (xla_cpu.HUGE_PAGES, KEEP + AVOID),
}
"""GLIBC_TUNABLES, and calls before JAX is imported; the last one is what commands do. A process that is not started by
``python -m`` makes none of its own."""


def _pretraining(plan: Plan, seconds: list[float]) -> None:
    config = pretrain_config(plan, "tiny", 1) if plan.quick else pretrain_preset("tiny")
    stream = jax.tree.map(jnp.asarray, text_stream(config.max_digits))
    with jax.set_mesh(next_character.make_mesh(config)):
        state = jax.jit(functools.partial(next_character.init_state, config))()
        for _ in range(plan.settings_steps + 3):
            start = time.perf_counter()
            state, _ = jax.block_until_ready(next_character.train_step(config, state, stream))
            seconds.append(time.perf_counter() - start)
    del seconds[:3]  # Of compilation, and of memory that is asked for the first time.


def _rounds(plan: Plan, seconds: list[float], **overrides: Any) -> None:
    """Rounds of both arms of Figure 4."""
    model, config = tiny_model(plan), tiny_config(plan, **overrides)
    setup = set_up(config, model, {"standard": {"beta": 0.0}, "prioritized": {}}, 1)
    states = setup.create.run()
    for _ in range(plan.settings_rounds + 1):
        call = setup.train(states, [0])
        start = time.perf_counter()
        states, _ = jax.block_until_ready(call.run())
        seconds.append(time.perf_counter() - start)
    del seconds[:1]


WORKS: dict[str, Callable[[Plan, list[float]], None]] = {
    "pretraining": _pretraining,
    "round": _rounds,
    "transitions": functools.partial(_rounds, minibatch="transitions", episodes=4),
}


def measure(work: str, quick: bool) -> None:
    """Prints median seconds of a step or round, and page faults, as one line of JSON."""
    startup.use_all_cores()
    seconds: list[float] = []
    WORKS[work](choose_plan(quick), seconds)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"seconds": statistics.median(seconds), "page_faults": usage.ru_minflt, "system": usage.ru_stime}))


def _in_process(plan: Plan, work: str, tunables: str, calls: str) -> dict[str, Any]:
    code = f"from ckl_jax.runtime import xla_cpu; {calls}from experiments.benchmark import cpu_settings; "
    code += f"cpu_settings.measure({work!r}, {plan.quick})"
    environment = os.environ | {"XLA_FLAGS": xla_cpu.flags_without_fusions(), xla_cpu.TUNABLES: tunables}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # A loaded program may run at another speed than a compiled one.
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{code} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def settings(plan: Plan, progress: Progress) -> dict[str, Any]:
    """Seconds of a step or round with each variant of the settings, and how many times faster than with none."""
    found: dict[str, Any] = {}
    for work in plan.settings_works:
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
        for name, variant in [*VARIANTS.items()] * plan.repeats:
            measured[name].append(_in_process(plan, work, *variant))
            progress(f"settings, {work}, {name}: {measured[name][-1]}")
        seconds = {name: [one["seconds"] for one in all_] for name, all_ in measured.items()}
        found[work] = {
            name: {
                "seconds": spread(seconds[name]),
                "speedup": speedup(seconds["none"], seconds[name]),
                "page_faults": spread([one["page_faults"] for one in measured[name]]),
            }
            for name in VARIANTS
        }
    return found


SECTIONS: dict[str, Section] = {"settings": settings}
