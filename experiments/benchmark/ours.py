"""The sections with one side: what a round costs, what starting costs, memory, and the share of the device's limit."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ckl_jax.checkpoint.store import Model
from ckl_jax.config import FinetuneConfig
from ckl_jax.model import forward, init_cache, num_parameters
from ckl_jax.next_character import init_state, train_step
from ckl_jax.rl.collect import collect
from ckl_jax.rl.objective import loss_terms
from ckl_jax.rl.program import draw_rounds, make_program, make_runs
from ckl_jax.rl.updates import init_run, train_round, train_rounds, update
from ckl_jax.rollout.decoding import CACHE_BLOCK, rollout
from ckl_jax.rollout.trajectory import Sampling, score
from ckl_jax.runtime.sharding import make_mesh
from experiments.benchmark.timing import alternate, seconds_of, spread, timed
from experiments.benchmark.workload import (
    Plan,
    Progress,
    Section,
    first_round,
    pretrain_config,
    text_stream,
    tiny_config,
    tiny_model,
    unending_model,
)

ROOT = pathlib.Path(__file__).parents[2]


def _round_seconds(model: Model, config: FinetuneConfig, repeats: int) -> dict[str, float]:
    first = first_round(model, config)
    run = jax.jit(functools.partial(train_round, first.program))
    side = timed(run, first.reference, first.state, first.hyper, first.problems)
    return spread(alternate({"ours": side}, repeats)["ours"])


def _runs_seconds(model: Model, config: FinetuneConfig, count: int, repeats: int) -> dict[str, float]:
    """Seconds of one round of ``count`` runs side by side in one program."""
    program = make_program(config, model)
    runs, hypers = make_runs(config, {"run": {}}, count)
    create = jax.jit(jax.vmap(functools.partial(init_run, program), in_axes=(None, 0)))
    problems = jax.tree.map(jnp.asarray, draw_rounds(program, runs, [0]))
    one_device = make_mesh(count, 1, run_devices=1)

    def side() -> float:
        states = jax.block_until_ready(create(model.params, hypers))
        return seconds_of(train_rounds, program, one_device, model.params, states, hypers, problems)

    return spread(alternate({"ours": side}, repeats)["ours"])


def scaling(plan: Plan, progress: Progress) -> dict[str, Any]:
    """Seconds of a round of the tiny scale against runs in one program, episodes, target digits, and model size.

    The model sizes have random weights whose episodes all run to the length limit, the costliest case.
    """
    model = tiny_model(plan)
    found: dict[str, Any] = {"runs": {}, "episodes": {}, "digits": {}, "parameters": {}}
    found["runs_episodes"], found["digits_episodes"] = plan.runs_episodes, plan.digits_episodes
    found["parameters_episodes"] = plan.sizes_episodes

    def add(axis: str, value: int, seconds: dict[str, float]) -> None:
        found[axis][str(value)] = seconds
        progress(f"scaling, {axis} {value}: {seconds['median']:.3g} s")
        jax.clear_caches()

    for count in plan.runs:
        config = tiny_config(plan, episodes=plan.runs_episodes, runs_at_once=count)
        add("runs", count, _runs_seconds(model, config, count, plan.repeats))
    for episodes in plan.episodes:
        add("episodes", episodes, _round_seconds(model, tiny_config(plan, episodes=episodes), plan.repeats))
    for digits in plan.pretrain_digits:
        config = tiny_config(plan, episodes=plan.digits_episodes)
        add("digits", digits + 1, _round_seconds(model._replace(max_pretrain_digits=digits), config, plan.repeats))
    for scale in plan.sizes:
        large = unending_model(plan, scale)
        seconds = _round_seconds(large, tiny_config(plan, episodes=plan.sizes_episodes), plan.repeats)
        add("parameters", num_parameters(large.params), seconds)
    return found


def _in_process(plan: Plan, work: str, cache: str | None) -> dict[str, Any]:
    """Runs ``process`` and adds the seconds from its start to the end of the first round or step."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if cache is not None:
        environment |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [
        sys.executable,
        "-m",
        "experiments.benchmark.process",
        "--work",
        work,
        "--quick" if plan.quick else "--no-quick",
    ]
    start = time.time()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} ended with {done.returncode}: {done.stderr[-2000:]}")
    measured = json.loads(done.stdout.splitlines()[-1])
    return measured | {"from_start_seconds": measured.pop("first_done_at") - start}


def compile_(plan: Plan, progress: Progress) -> dict[str, Any]:
    """Compilation of a round and a pre-training step with an empty and a filled persistent cache, and time to the end
    of the first one from the start of a new process."""
    found: dict[str, Any] = {}
    for work in ("round", "pretraining"):
        attempts: dict[str, list[dict[str, Any]]] = {"cold": [], "cached": []}
        for _ in range(plan.repeats):
            with tempfile.TemporaryDirectory() as cache:
                for name, kept in attempts.items():
                    kept.append(_in_process(plan, work, cache))
                    progress(f"compile, {work}, {name}: {kept[-1]['compile_seconds']:.1f} s")
        columns = ("compile_seconds", "from_start_seconds", "first_seconds", "second_seconds")
        found[work] = {n: {c: spread([a[c] for a in kept]) for c in columns} for n, kept in attempts.items()}
    return found


def memory(plan: Plan, progress: Progress) -> dict[str, Any]:
    """Peak memory in bytes of a process that does a round, or pre-training steps; of the device's where it has its own.

    ``imports`` is a process that only imports what the others do.
    """
    found = {work: _in_process(plan, work, None) for work in ("imports", "round", "pretraining")}
    progress(f"memory: {[(name, value['peak_bytes']) for name, value in found.items()]}")
    return {n: {key: v[key] for key in ("peak_bytes", "device_peak_bytes")} for n, v in found.items()}


def _cost(call: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()) -> np.ndarray:
    """(FLOPs, bytes) of a function by XLA's cost analysis; arguments may be shapes."""
    lowered = jax.jit(call, donate_argnums=donate).lower(*arguments)
    written, compiled = lowered.cost_analysis() or {}, lowered.compile().cost_analysis() or {}
    return np.array([written.get("flops", 0.0), compiled.get("bytes accessed", 0.0)])


def _rates(plan: Plan) -> dict[str, float]:
    """FLOP/s of float32 matrix products (the best of several sizes) and bytes/s of a copy, read and written."""
    product = jax.jit(functools.partial(jnp.dot, precision="highest"))
    rates = []
    for size in plan.matmul_sizes:
        matrix = jax.random.normal(jax.random.key(0), (size, size))
        rates.append(2 * size**3 / min(alternate({"ours": timed(product, matrix, matrix)}, 5)["ours"]))
    array = jnp.zeros(plan.copy_bytes // 4)
    copied = 2 * array.nbytes / min(alternate({"ours": timed(jax.jit(lambda x: x + 1), array)}, 5)["ours"])
    return {"flops_per_second": max(rates), "bytes_per_second": copied}


def _decoding(prompt: int, total: int, lengths_B: np.ndarray, group: int) -> Iterator[tuple[int, int]]:
    """(slots of the cache, steps decoded with that many) of every group of a rollout."""
    for longest in lengths_B.reshape(-1, group).max(axis=1):
        done, slots = 0, min(total, -(-(prompt + 1) // CACHE_BLOCK) * CACHE_BLOCK)
        while done < longest:
            steps = min(longest, slots - prompt) - done
            yield slots, int(steps)
            done, slots = done + steps, min(total, slots + CACHE_BLOCK)


def limit(plan: Plan, progress: Progress) -> dict[str, Any]:
    """Each stage's FLOPs and bytes over the device's measured rates, as shares of the seconds it took.

    XLA's cost analysis counts the body of a loop once, so a rollout is its prefill and one decoding step for each size
    of the cache, times the steps that were run; an update is one minibatch's gradient times their number (Adam's own
    arithmetic is left out). Bytes are those that the compiled operations touch: what the processor's caches hold
    between them costs less than a copy, so that this share can pass 1.
    """
    model, config = tiny_model(plan), tiny_config(plan)
    first = first_round(model, config)
    program, params = first.program, first.state.params
    key = jax.random.key(0)
    generate = jax.jit(
        functools.partial(rollout, model.config, sampling=Sampling(program.max_length), batch=config.rollout_batch)
    )
    trajectory = generate(params["policy"], first.problems, key)
    num_prompt, total = first.problems.prompts_BxP.shape[1], trajectory.tokens_BxL.shape[1]
    group = min(config.rollout_batch, config.episodes)

    def extend(params: Any, tokens: jax.Array, cache: Any) -> Any:
        return forward(model.config, params, tokens, None, jnp.ones_like(tokens), cache)[::2]

    @functools.cache
    def extend_cost(count: int, slots: int) -> np.ndarray:
        cache = jax.eval_shape(lambda: init_cache(model.config, group, slots))
        return _cost(extend, params["policy"], jax.ShapeDtypeStruct((group, count), jnp.int32), cache, donate=(2,))

    lengths_B = np.asarray(trajectory.mask_BxT.sum(axis=1))
    parts = list(_decoding(num_prompt, total, lengths_B, group))
    decoding = sum(steps * extend_cost(1, slots) for slots, steps in parts)
    prefill = config.episodes // group * extend_cost(num_prompt, parts[0][0])

    episodes = jax.jit(lambda p, r, problems: collect(program, p, r, first.hyper, problems, (key, key), None)[0])(
        params, first.reference, first.problems
    )
    batch = jax.tree.map(lambda x: x[: config.minibatch_episodes], episodes)

    def gradient(params: Any, batch: Any) -> Any:
        return jax.grad(lambda p: sum(loss_terms(program, first.hyper, p, batch).values()))(params)

    pretraining = pretrain_config(plan, "tiny", plan.pretraining[0][1])
    stream = jax.tree.map(jnp.asarray, text_stream(pretraining.max_digits))
    state = jax.jit(functools.partial(init_state, pretraining))()
    step = jax.jit(functools.partial(train_step, pretraining))
    updates = config.epochs * config.episodes // config.minibatch_episodes
    scored = jax.jit(functools.partial(score, model.config))
    renew = jax.jit(functools.partial(update, program))
    stages = {
        "rollout": (decoding + prefill, timed(generate, params["policy"], first.problems, key)),
        "score": (_cost(scored, params["policy"], trajectory), timed(scored, params["policy"], trajectory)),
        "update": (updates * _cost(gradient, params, batch), timed(renew, first.hyper, first.state, episodes, key)),
        "pretraining": (_cost(step, state, stream), timed(step, state, stream)),
    }
    rates = _rates(plan)
    seconds = alternate({name: side for name, (_, side) in stages.items()}, plan.repeats)
    found: dict[str, Any] = {"rates": rates, "decoding_steps": sum(steps for _, steps in parts)}
    for name, (cost, _) in stages.items():
        taken = spread(seconds[name])
        flops, touched = (float(x) for x in cost)
        found[name] = {
            "seconds": taken,
            "flops": flops,
            "bytes": touched,
            "flops_share": flops / rates["flops_per_second"] / taken["median"],
            "bytes_share": touched / rates["bytes_per_second"] / taken["median"],
        }
        progress(f"limit, {name}: {found[name]}")
    return found


SECTIONS: dict[str, Section] = {"scaling": scaling, "compile": compile_, "memory": memory, "limit": limit}
