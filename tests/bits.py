"""The bits of what the package computes, as a hash for every array, to compare commits that should compute the same.

    python -m tests.bits > before.txt       # at one commit, then at the other one
    diff before.txt after.txt

Twenty steps of pre-training; a rollout, a speculative one and a test; a round of every algorithm, minibatch mode and KL
weight; and the accuracies that ``ckl_jax.evaluate`` prints.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from typing import Any, get_args

import numpy as np

from ckl_jax import check_xla, evaluate
from ckl_jax.checkpoint import load_model
from ckl_jax.token_weights import KLWeights

EPISODES, PROBLEMS, STEPS = 16, 20, 20
OTHER_KL_WEIGHTS = get_args(KLWeights)[1:]  # The rounds of the algorithms have the first.


def show(name: str, values: dict[str, Any]) -> None:
    for key, value in sorted(values.items()):
        array = np.asarray(value)
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:16]
        print(f"{name:14s} {key:36s} {array.dtype!s:8s} {list(array.shape)!s:16s} {digest}", flush=True)


def main() -> None:
    model = load_model("tiny")
    show("pretraining", check_xla.pretraining(model, STEPS))
    for stage in check_xla.CheckXlaCommand().stages:
        if stage != "pretraining":
            show(stage, check_xla.values_of(stage, EPISODES, quick=False))
    config = dataclasses.replace(check_xla.finetune_preset("tiny", "ours"), episodes=EPISODES, diagnostic_episodes=2)
    for kl_weights in OTHER_KL_WEIGHTS:
        show(kl_weights, check_xla.round_of(dataclasses.replace(config, kl_weights=kl_weights), model))
    evaluate.main(evaluate.EvaluateCommand(problems=PROBLEMS))


if __name__ == "__main__":
    sys.exit(main())
