"""Runs without training: what they leave behind, with numbers that are given or made up."""

import dataclasses
import zlib

import numpy as np
from policies import policy

from ckl_jax.checkpoint.store import Model, save_model
from ckl_jax.rl.program import make_runs

TOKENS = (3, 2, 4)


def records(after, *, seed=0, tests=(0, 2), test=lambda arm, seed, step: {}, round_=lambda arm, seed, step: {}):
    """metrics.jsonl of a fine-tuning.

    Args:
      after: by arm the accuracy of each seed at the last of the ``tests``; before it is 0.2.
      seed: the first one.
      test, round_: what a record has instead of, or beside, the numbers below.
    """
    found = []
    for arm, values in after.items():
        for number, value in enumerate(values, seed):
            for step in tests:
                target = value if step == tests[-1] else 0.2
                numbers = {"test_problems": 100, "test_target": target, "test_old": 0.9}
                found.append({"step": step, "arm": arm, "seed": number, **numbers, **test(arm, number, step)})
            for step in range(1, tests[-1] + 1):
                numbers = {"success": 0.1, "kl": 0.01 * step, "kl_weight": 0.9, "loss/kl": 0.1, **commas(0.7)}
                found.append({"step": step, "arm": arm, "seed": number, **numbers, **round_(arm, number, step)})
    return sorted(found, key=lambda record: record["step"])


def commas(probability, count=1):
    """A round's critical tokens: each met ``count`` times with that probability, both numbers or arrays [3, 2, C]."""
    return {
        "critical_probability_3x2xC": _of_tokens(probability).tolist(),
        "critical_count_3x2xC": _of_tokens(count).tolist(),
    }


def _of_tokens(value):
    return np.broadcast_to(value, TOKENS) if np.ndim(value) == 0 else np.asarray(value)


def finetune(config, model, directory, arms, seeds, progress=print, certainty_from=None):
    """In the place of ``ckl_jax.finetune.finetune``: records of every arm and seed, no policies."""
    runs, _ = make_runs(config, arms, seeds)
    if not directory.metrics():
        rng = np.random.default_rng(zlib.crc32(" ".join(arms).encode()))
        after = {arm: rng.random(seeds) for arm in arms}
        tests = range(0, config.rounds + 1, config.test_every)
        directory.rewind_metrics(-1)
        directory.log(records(after, seed=config.seed, tests=tests))
        directory.log_seconds(config.rounds, 1.5)
    return runs


def pretrain(config, run, data_dir, progress):
    """In the place of ``ckl_jax.pretrain.pretrain``: a random model."""
    model = Model(config.model, config.max_digits, policy(config.model, config.max_digits))
    save_model(run.path, model, {"config": dataclasses.asdict(config)})
