"""The sections with two sides: ours and PyTorch's, on the same weights, problems, machine and threads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ckl_jax import next_character
from ckl_jax.checkpoint.store import Model
from ckl_jax.model import num_parameters
from ckl_jax.rl.assessment import Episodes
from ckl_jax.rl.collect import collect
from ckl_jax.rl.program import make_mesh
from ckl_jax.rl.updates import train_round, update
from ckl_jax.rollout.generation import generate
from ckl_jax.rollout.trajectory import Sampling, answer_mask
from ckl_jax.runtime import sharding
from ckl_jax.runtime.sharding import everywhere, over_rows
from ckl_jax.tasks import problems as problems_lib
from ckl_jax.tasks.columns import ADDITION
from ckl_jax.tasks.problems import Problems
from experiments.benchmark import authors_round, pytorch
from experiments.benchmark.enlarge import enlarge
from experiments.benchmark.timing import alternate, on_mesh, speedup, spread, timed
from experiments.benchmark.workload import (
    PLAIN_BATCH,
    Plan,
    Progress,
    Round,
    Section,
    first_round,
    model_config,
    pretrain_config,
    text_stream,
    tiny_config,
    tiny_model,
)

MINIBATCH = 8
"""Transitions per Adam step, in the authors' procedure and in our transition mode."""
LARGE_VALUE_BATCH = 256
"""tianshou's default of prefixes per value pass, which the authors replace by their minibatch size."""


def _compare_rollouts(model: Model, problems: Problems, max_length: int, batch: int, repeats: int) -> dict[str, Any]:
    episodes = len(problems.episodes_B)
    mesh = sharding.make_mesh(1, episodes)
    whole = jax.device_put((model.params, jax.random.key(0)), everywhere(mesh))
    theirs = pytorch.to_transformers(model.config, model.params)
    ways: dict[str, Any] = {"ours": {"how": "plain", "batch": batch}, "speculative": {"how": "auto"}}

    def answers(way: dict[str, Any]) -> Callable[[], jax.Array]:
        def roll_out(whole, problems):
            return generate(model.config, whole[0], problems, whole[1], Sampling(max_length), **way).trajectory

        compiled = jax.jit(functools.partial(over_rows, roll_out))

        def call() -> jax.Array:
            with jax.set_mesh(mesh):
                return compiled(whole, problems).answers_BxT

        return call

    calls: dict[str, Callable[[], Any]] = {name: answers(way) for name, way in ways.items()}
    calls["transformers"] = lambda: pytorch.generate(theirs, problems, max_length, 1.0, seed=0)
    characters = {name: int(answer_mask(jnp.asarray(call())).sum()) for name, call in calls.items()}
    sides = {name: timed(call) for name, call in calls.items()}
    seconds = alternate(sides, repeats)
    return {
        "parameters": num_parameters(model.params),
        "episodes": episodes,
        "max_length": max_length,
        "seconds": seconds,
        "characters": characters,
        "episodes_per_second": {name: spread([episodes / s for s in seconds[name]]) for name in sides},
        "characters_per_second": {name: spread([characters[name] / s for s in seconds[name]]) for name in sides},
        "speedup": {name: speedup(seconds["transformers"], seconds[name]) for name in sides if name != "transformers"},
    }


def rollout(plan: Plan, progress: Progress) -> dict[str, Any]:
    """Generation: ours, step by step and speculative, against transformers' cached ``generate``, all one batch.

    The trained tiny model samples episodes at temperature 1 until they end. No trained model of the larger sizes
    exists: there the tiny one's weights stand inside a model of that size (``enlarge``), which writes the same at its
    cost.
    """
    found = {}
    for scale, digits, episodes in plan.rollouts:
        model = tiny_model(plan)
        if scale != "tiny":
            model = enlarge(model, model_config(plan, scale))
        rng = np.random.default_rng(0)
        drawn = ADDITION.varying_problems(rng, episodes, digits)
        packed = jax.tree.map(jnp.asarray, problems_lib.pack(ADDITION, drawn, digits, model.max_pretrain_digits))
        length = ADDITION.max_answer_length(digits, tiny_config(plan).extra_length)
        title = f"{scale}, {digits} digits"
        found[title] = {"digits": digits} | _compare_rollouts(model, packed, length, PLAIN_BATCH, plan.repeats)
        progress(f"rollout, {title}: {found[title]['speedup']}")
        jax.clear_caches()
    return found


def _collect(first: Round) -> Episodes:
    """The episodes that ``train_round`` collects, with its own key."""
    round_key = jax.random.fold_in(jax.random.key(first.hyper.seed), first.state.round + 1)
    rollout_key, _, weights_key = jax.random.split(round_key, 3)
    run = jax.jit(lambda p, r, problems, keys: collect(first.program, p, r, first.hyper, problems, keys, None)[0])
    return run(first.state.params, first.reference, first.problems, (rollout_key, weights_key))


def round_(plan: Plan, progress: Progress) -> dict[str, Any]:
    """A whole round of ours against the authors' procedure on the same episodes, of which a share is timed.

    Episode mode is the tiny preset with the paper's k2, its diagnostics included. Transition mode makes the authors'
    updates: minibatches of 8 single transitions. It and the authors' procedure are timed in part and scaled up.
    """
    model, config = tiny_model(plan), tiny_config(plan, kl="k2")
    first = first_round(model, config)
    run = jax.jit(functools.partial(train_round, first.program))
    mesh = make_mesh(config, 1)
    arguments = jax.device_put((first.reference, first.state, first.hyper, first.problems), everywhere(mesh))
    episodes = _collect(first)
    transitions = authors_round.to_transitions(episodes)
    networks = authors_round.make_round(model.config, config, first.state.params, first.reference)
    theirs: list[dict[str, Any]] = []

    def authors() -> float:
        share, seed = plan.authors_share, len(theirs)
        theirs.append(authors_round.time_round(networks, transitions, batch=MINIBATCH, share=share, seed=seed))
        return theirs[-1]["total"]

    measure = _transition_mode(plan, first, episodes)
    stages: list[dict[str, float]] = []

    def our_transitions() -> float:
        stages.append(measure())
        return sum(stages[-1].values())

    sides = {"episodes": on_mesh(mesh, timed(run, *arguments)), "authors": authors, "transitions": our_transitions}
    seconds = alternate(sides, plan.repeats)
    progress("round: " + ", ".join(f"{name} {spread(values)['median']:.3g} s" for name, values in seconds.items()))
    large = authors_round.time_round(
        networks, transitions, batch=MINIBATCH, value_batch=LARGE_VALUE_BATCH, value_batches=3, share=0.0
    )
    return {
        "episodes": config.episodes,
        "transitions": len(transitions.end_N),
        "seconds": seconds,
        "authors_stages": theirs[1:],
        "transition_mode_stages": stages[1:],
        "authors_values_in_large_batches": large["seconds"]["values"],
        "large_value_batch": large["value_batch"],
        "share_of_updates_timed": plan.authors_share,
        "speedup": {name: speedup(seconds["authors"], seconds[name]) for name in sides if name != "authors"},
    }


def _transition_mode(plan: Plan, first: Round, episodes: Episodes) -> Callable[[], dict[str, float]]:
    """Measures the seconds of a collect, and of a round's updates in transition mode: a share of them, scaled up.

    The share is the program itself with most transitions masked out at random, so that fewer updates are left.
    """
    config = dataclasses.replace(first.program.config, minibatch="transitions", minibatch_transitions=MINIBATCH)
    program = first.program._replace(config=config)
    mask_BxT = np.asarray(episodes.trajectory.mask_BxT)
    kept = MINIBATCH * max(1, round(plan.authors_share * mask_BxT.sum() / MINIBATCH))
    chosen = np.random.default_rng(0).choice(np.flatnonzero(mask_BxT), kept, replace=False)
    few_BxT = np.zeros(mask_BxT.size, bool)
    few_BxT[chosen] = True
    trajectory = episodes.trajectory._replace(mask_BxT=jnp.asarray(few_BxT.reshape(mask_BxT.shape)))
    few = episodes._replace(trajectory=trajectory)
    run = jax.jit(functools.partial(update, program))
    collecting = jax.jit(lambda p, r, problems, key: collect(program, p, r, first.hyper, problems, (key, key), None))

    mesh = make_mesh(config, 1)
    arguments = (first.reference, first.state, first.hyper, first.problems, few, jax.random.key(0))
    reference, state, hyper, problems, few, key = jax.device_put(arguments, everywhere(mesh))
    scale = float(mask_BxT.sum() / kept)
    updating = on_mesh(mesh, timed(run, hyper, state, few, key))
    gathering = on_mesh(mesh, timed(collecting, state.params, reference, problems, key))
    return lambda: {"collect": gathering(), "updates": scale * updating()}


def _compare_pretraining(plan: Plan, scale: str, batch: int, steps: int) -> dict[str, Any]:
    config = pretrain_config(plan, scale, batch)
    stream = text_stream(config.max_digits)
    mesh = next_character.make_mesh(config)
    tokens_N, on_device = np.asarray(stream.tokens_N), jax.device_put(stream, everywhere(mesh))
    state = jax.jit(functools.partial(next_character.init_state, config), out_shardings=everywhere(mesh))()
    parameters = num_parameters(state.params)
    model = pytorch.GPT.from_params(config.model, state.params)
    optimizer = pytorch.make_adamw(config, model)
    window, rng = config.model.block_size, np.random.default_rng(0)

    def ours() -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = next_character.train_step(config, state, on_device)
        jax.block_until_ready(metrics)

    def theirs() -> None:
        for _ in range(steps):
            offsets_B = rng.integers(0, len(tokens_N) - window, batch)
            text_BxT = tokens_N[offsets_B[:, None] + np.arange(window + 1)]
            pytorch.pretrain_step(model, optimizer, (text_BxT[:, :-1], text_BxT[:, 1:]), config.clip_norm)

    seconds = alternate({"ours": on_mesh(mesh, timed(ours)), "pytorch": timed(theirs)}, plan.repeats)
    characters = batch * window * steps
    return {
        "parameters": parameters,
        "batch": batch,
        "window": window,
        "steps": steps,
        "seconds": seconds,
        "characters_per_second": {name: spread([characters / s for s in v]) for name, v in seconds.items()},
        "speedup": {"ours": speedup(seconds["pytorch"], seconds["ours"])},
    }


def pretraining(plan: Plan, progress: Progress) -> dict[str, Any]:
    """Training steps on windows of the block, AdamW and no dropout on both sides: characters per second."""
    found = {}
    for scale, batch, steps in plan.pretraining:
        found[scale] = _compare_pretraining(plan, scale, batch, steps)
        progress(f"pretraining, {scale}: {found[scale]['speedup']['ours']}")
        jax.clear_caches()
    return found


SECTIONS: dict[str, Section] = {"rollout": rollout, "round": round_, "pretraining": pretraining}
