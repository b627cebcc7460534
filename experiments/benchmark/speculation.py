"""What speculation gains, by policy: characters a window accepts, seconds, and whether the characters are the same."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ckl_jax.checkpoint.store import Model, load_model
from ckl_jax.rollout import drafts
from ckl_jax.rollout.generation import generate
from ckl_jax.rollout.speculative import speculative_rollout
from ckl_jax.rollout.trajectory import Sampling, gumbel_noise, score
from ckl_jax.tasks import problems as problems_lib
from ckl_jax.tasks.columns import ADDITION
from ckl_jax.tasks.problems import Problems
from experiments.benchmark.timing import alternate, speedup, spread, timed
from experiments.benchmark.workload import (
    PLAIN_BATCH,
    Plan,
    Progress,
    Section,
    tiny_config,
    tiny_model,
    unending_model,
)


def first_draft(lists_Bx2xJ: jax.Array, answers_BxT: jax.Array, known_B: jax.Array, window: int) -> jax.Array:
    """A drafter that never drafts again: the right answer, whatever the episode has written."""
    length = answers_BxT.shape[1] + window
    right_BxL = drafts.draft(ADDITION, lists_Bx2xJ, answers_BxT, jnp.zeros_like(known_B), length)
    return jnp.take_along_axis(right_BxL, known_B[:, None] + jnp.arange(window)[None], axis=1)


def _near_ties(model: Model, problems: Problems, key: jax.Array, temperature: float, plain, verified) -> dict[str, Any]:
    """How many episodes differ, and the widest gap between the two best perturbed logits where they begin to."""
    differs_BxT = np.asarray(plain.trajectory.answers_BxT != verified.trajectory.answers_BxT)
    rows = np.flatnonzero(differs_BxT.any(axis=1))
    if len(rows) == 0:
        return {"differing": 0, "widest_gap": None}
    few = jax.tree.map(lambda x: x[rows], plain.trajectory)
    steps = jnp.broadcast_to(jnp.arange(differs_BxT.shape[1])[None], few.answers_BxT.shape)
    noise = gumbel_noise(key, jnp.asarray(problems.episodes_B)[rows], steps, model.config.vocab_size)
    best = np.sort(np.asarray(score(model.config, model.params, few)[0] / temperature + noise), axis=2)[..., -2:]
    gaps = (best[..., 1] - best[..., 0])[np.arange(len(rows)), differs_BxT[rows].argmax(axis=1)]
    return {"differing": len(rows), "widest_gap": float(gaps.max())}


def _measure(plan: Plan, model: Model, digits: int, temperature: float, episodes: int) -> dict[str, Any]:
    rng = np.random.default_rng([digits, episodes])
    drawn = ADDITION.varying_problems(rng, episodes, digits)
    problems = jax.tree.map(jnp.asarray, problems_lib.pack(ADDITION, drawn, digits, model.max_pretrain_digits))
    sampling = Sampling(ADDITION.max_answer_length(digits, tiny_config(plan).extra_length), temperature)
    scored: dict[str, Any] = {"sampling": sampling, "with_scores": True}
    key = jax.random.key(0)
    ways: dict[str, dict[str, Any]] = {
        "plain": {"how": "plain", "batch": PLAIN_BATCH},
        "speculative": {"how": "speculative"},
        "auto": {"how": "auto"},
    }
    calls = {
        name: functools.partial(jax.jit(functools.partial(generate, model.config, **way, **scored)), model.params)
        for name, way in ways.items()
    }
    seconds = alternate({name: timed(call, problems, key) for name, call in calls.items()}, plan.repeats)
    plain, verified = calls["plain"](problems, key), calls["speculative"](problems, key)
    once = jax.jit(functools.partial(speculative_rollout, model.config, drafter=first_draft, **scored))
    characters = int(verified.trajectory.mask_BxT.sum())
    prompts = int(problems.prompt_lengths_B.sum())
    without = once(model.params, problems, key)
    return {
        "episodes": episodes,
        "digits": digits,
        "temperature": temperature,
        "accuracy": float(plain.trajectory.reward_B.mean()),
        "characters": characters,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "speedup": {name: speedup(seconds["plain"], seconds[name]) for name in ("speculative", "auto")},
        "gave_up": not bool(calls["auto"](problems, key).windows),
        "characters_per_window": (characters + prompts) / int(verified.windows),
        "characters_per_window_without_redrafting": (characters + prompts) / int(without.windows),
        **_near_ties(model, problems, key, temperature, plain, verified),
    }


def speculation(plan: Plan, progress: Progress) -> dict[str, Any]:
    """Speculative against plain rollout, scores included, over policies of different accuracy.

    The tiny model on lengths that it knows and does not know, at several temperatures; the same with random weights;
    and the named fine-tuned checkpoints. ``without_redrafting``: every draft is the right answer.
    """
    model = tiny_model(plan)
    known = model.max_pretrain_digits
    cases = [("pre-trained", model, known + more, temperature) for more, temperature in plan.speculation]
    cases.append(("random weights", unending_model(plan, "tiny")._replace(max_pretrain_digits=known), known, 1.0))
    for path, _ in plan.policies:
        cases.append((f"fine-tuned ({path})", load_model(pathlib.Path(path)), known + 1, 1.0))
    found = {}
    for name, policy, digits, temperature in cases:
        title = f"{name}, {digits} digits, temperature {temperature:g}"
        found[title] = _measure(plan, policy, digits, temperature, plan.speculation_episodes)
        progress(f"speculation, {title}: {found[title]['speedup']['speculative']}")
        jax.clear_caches()
    return found


SECTIONS: dict[str, Section] = {"speculation": speculation}
