"""The named scales, and the named recipes of fine-tuning: what the fields of a command start from."""

from __future__ import annotations

import dataclasses
from typing import Any

from ckl_jax.config import FinetuneConfig, ModelConfig, PretrainConfig
from ckl_jax.errors import require_word
from ckl_jax.tasks.catalog import TaskName

_PAPER = {
    "episodes": 50,
    "rounds": 8,
    "test_every": 1,
    "old_problems": 20,
    "minibatch": "transitions",
    "minibatch_transitions": 8,
    "extra_length": 100,
    "temperature": 2.0,
    "test_temperature": 2.0,
    "learning_rate": 1e-6,
    "learning_rate_decay": False,
    "value_learning_rate": 1e-6,
    "gae_lambda": 0.95,
    "normalize_advantages": False,
    "kl": "k2",
}
"""What is not here is the default of FinetuneConfig, which for the losses' coefficients, beta and J is the paper's."""
_AUTHORS = _PAPER | {
    "reward_wrong": -1.0,
    "entropy_coefficient": 0.001,
    "certainty": "negentropy_max_prob",
    "certainty_temperature": 4.0,
    "clamp_log_probs": True,
}
_TINY = {"extra_length": 20, "kl_coefficient": 0.5}
_TINY_SPEED = {"rollout_batch": 16, "transition_batch": 1}
_OURS: dict[str, dict[str, Any]] = {
    "tiny": _TINY,
    "ladder": _TINY,
    "small": {"learning_rate": 3e-5},
    "gpt2": {"learning_rate": 1e-5},
}
_SPEED: dict[str, dict[str, Any]] = {
    "tiny": _TINY_SPEED,
    "ladder": _TINY_SPEED,
    "small": {"runs_at_once": 4},
    "gpt2": {"rollout_batch": 16, "episode_batch": 2},  # What fits a chip of 16 GiB, by `ckl_jax.preflight`.
}
_LOW: dict[str, Any] = {"dtype": "bfloat16", "precision": "default"}
"""Pre-training's arithmetic where it is meant for accelerators: six times fewer passes there than in float32."""


def pretrain_preset(scale: str, task: TaskName = "addition") -> PretrainConfig:
    """The pre-training of a named scale and task. Raises ConfigError for another name."""
    tiny = PretrainConfig(
        scale="tiny",
        max_digits=5,
        packing="documents",
        batch_size=16,
        num_steps=2_500,
        optimizer="muon",
        learning_rate=1e-2,
        weight_decay=0.05,
        checkpoint_every=500,
        model=ModelConfig(num_layers=3, num_heads=2, width=96, block_size=768, attention_chunk=208),
    )
    presets = {
        "tiny": tiny,
        "ladder": dataclasses.replace(
            tiny,
            scale="ladder",
            max_digits=7,
            start_share=0.25,
            final_learning_rate=0.0,
            position_init="sinusoidal",
            ema_decay=0.998,
            model=dataclasses.replace(tiny.model, block_size=1024, attention_chunk=64),
        ),
        "small": PretrainConfig(
            scale="small",
            packing="documents",
            batch_size=64,
            num_steps=10_000,
            optimizer="muon",
            learning_rate=2e-3,
            model=ModelConfig(num_layers=6, num_heads=6, width=384, block_size=1024, **_LOW),
        ),
        "gpt2": PretrainConfig(scale="gpt2", model=ModelConfig(use_bias=False, dropout=0.2, **_LOW)),
    }
    require_word(scale, "scale", presets)
    chosen = dataclasses.replace(presets[scale], task=task)
    # A times table takes longer to learn than sums.
    longer = task == "multiplication" and scale in ("tiny", "ladder")
    return dataclasses.replace(chosen, num_steps=4_000) if longer else chosen


def finetune_preset(scale: str, recipe: str) -> FinetuneConfig:
    """The fine-tuning of a named scale and recipe. Raises ConfigError for another name."""
    require_word(scale, "scale", _SPEED)
    recipes: dict[str, dict[str, Any]] = {"ours": _OURS[scale], "paper": _PAPER, "authors": _AUTHORS}
    require_word(recipe, "recipe", recipes)
    return FinetuneConfig(scale=scale, recipe=recipe, **_SPEED[scale], **recipes[recipe])  # type: ignore[arg-type]
