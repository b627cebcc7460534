"""The prioritized KL in google-tunix's GRPO learner: the recipe, and a small run of it.

    uv run --group tunix python -m experiments.tunix_grpo

``PrioritizedLearner`` with ``PrioritizedConfig`` stands for tunix's ``GRPOLearner`` with ``GRPOConfig``. Two functions
are added to theirs: after the rollout, the reference's logits become a certainty per token (``ckl_jax.certainty``),
which travels with the example; in the loss, tunix's own KL gives way to ``ckl_jax.losses.prioritized_kl``. With
``certainty_exponent = 0`` the loss is tunix's: a test compares value and gradient. The loss calls the policy once more
than tunix's does, on the same inputs, which XLA may compute once.

The run: a randomly initialized Qwen3 of tunix (2 layers, width 64) whose output matrix is scaled up, so that it is
surer of some characters than of others; prompts are additions; rewarded is the share of digits among 16 characters.
All runs start from the same model; both arms of a seed see the same prompts. It shows that the pieces fit, not which KL
is better: the weights also lower the total pressure, and a smaller coefficient does that too.
"""

from __future__ import annotations

import copy
import functools
import pathlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ckl_jax.certainty import certainty
from ckl_jax.fields import PositiveFloat, PositiveInt, require_fields
from ckl_jax.losses import kl_estimate, prioritized_kl
from ckl_jax.runs.records import earlier_results, machine
from ckl_jax.runtime import cli
from ckl_jax.runtime.hosts import write_json
from ckl_jax.runtime.paths import require_directory
from ckl_jax.tasks import alphabet
from ckl_jax.tasks.columns import ADDITION
from ckl_jax.tasks.task import Problem

try:
    from tunix.models.qwen3 import model as qwen3
    from tunix.rl import algo_core, common, function_registry, rl_cluster
    from tunix.rl.grpo import grpo_learner
    from tunix.rl.rollout import base_rollout
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"tunix: not installed ({error}); it comes with: uv run --group tunix python -m experiments.tunix_grpo")

COMMAND = "experiments.tunix_grpo"
BOS, EOS = alphabet.VOCAB_SIZE, alphabet.VOCAB_SIZE + 1
LAST_STEPS, OUTPUT_SCALE = 5, 6


@flax.struct.dataclass(frozen=True)
class CertainExample(grpo_learner.TrainExample):
    """What tunix's learner hands to its loss, and the reference's J of every completion token [B, T]."""

    certainty: jax.Array = flax.struct.field(kw_only=True)


@dataclass(kw_only=True)
class PrioritizedConfig(grpo_learner.GRPOConfig):
    """GRPO whose KL penalty, ``beta`` (tunix's name of the coefficient) times k2, is weighted by J^exponent.

    Of tunix's own options ``kl_loss_mode`` has no effect, as the KL is k2 always, and ``loss_agg_mode`` none on the KL,
    whose mean is over all tokens.
    """

    policy_loss_fn: str = "prioritized_grpo"
    loss_agg_mode: str = "token-mean"
    kl_loss_mode: str = "mse_kl"
    certainty_exponent: float = 150.0


class PrioritizedLearner(grpo_learner.GRPOLearner):
    """GRPO learner that measures the reference's certainty after every rollout.

    It does so for the whole rollout in one pass, without tunix's micro-batches: the logits of all its tokens have to
    fit, which those of a large vocabulary may not.
    """

    def _generate_and_compute_advantage(self, training_input: Any, mode: Any = rl_cluster.Mode.TRAIN) -> CertainExample:
        example = super()._generate_and_compute_advantage(training_input, mode)
        reference = nnx.split(self.rl_cluster.inference_worker.get_model("reference"))
        rollout = self.rl_cluster.rollout
        ids = (example.prompt_ids, example.completion_ids)
        found = _certainty(*reference, *ids, pad=rollout.pad_id(), eos=rollout.eos_id())
        return CertainExample(**vars(example), certainty=found)


@functools.partial(jax.jit, static_argnames=("pad", "eos"))
def _certainty(graph: Any, state: Any, prompts: jax.Array, completions: jax.Array, *, pad: int, eos: int) -> jax.Array:
    _, logits_BxTxV = common.compute_per_token_logps(graph, state, prompts, completions, pad, eos, return_logits=True)
    return certainty(logits_BxTxV)


@function_registry.register_policy_loss_fn("prioritized_grpo")
def prioritized_grpo(
    model: nnx.Module, example: CertainExample, algo_config: PrioritizedConfig, pad_id: int, eos_id: int, **_: Any
) -> tuple[jax.Array, dict[str, Any]]:
    """tunix's GRPO loss with the prioritized KL in the place of its own, and what it logs."""
    without_kl = copy.copy(algo_config)
    without_kl.beta = 0.0
    loss, logged = algo_core.grpo_loss_fn(model, example, without_kl, pad_id, eos_id)
    log_probs = common.compute_per_token_logps(
        *nnx.split(model),
        example.prompt_ids,
        example.completion_ids,
        pad_id,
        eos_id,
        stop_gradient=False,
        temperature=algo_config.temperature,
    )
    mask = example.completion_mask.astype(bool)
    kl = kl_estimate(log_probs, example.ref_per_token_logps, kind="k2", mask=mask)
    penalty = prioritized_kl(kl, example.certainty, algo_config.certainty_exponent, mask)
    return loss + algo_config.beta * penalty, logged | {"kl_loss": penalty}


class Characters:
    """Our characters as tunix wants a tokenizer."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(token) for token in alphabet.encode(text)]

    def decode(self, ids: Any, **_: Any) -> str:
        return alphabet.decode([token for token in np.asarray(ids) if token < BOS])

    def bos_id(self) -> int:
        return BOS

    def eos_id(self) -> int:
        return EOS

    def pad_id(self) -> int:
        return alphabet.PAD_ID


@dataclass(frozen=True)
class TunixCommand:
    """A small run of the prioritized KL in google-tunix's GRPO learner, beside the standard KL."""

    out: pathlib.Path = pathlib.Path("runs/tunix")
    """Directory of results.json, over an older one."""
    exponent: PositiveFloat = 5.0
    """Of the certainty in the prioritized arm."""
    coefficient: PositiveFloat = 0.5
    """Of the KL in both arms."""
    steps: PositiveInt = 40
    """Updates of each run."""
    prompts: PositiveInt = 8
    """Additions per step; each is answered 4 times."""
    learning_rate: PositiveFloat = 3e-4
    """Of Adam."""
    seeds: PositiveInt = 2
    """Runs of each arm."""

    def __post_init__(self) -> None:
        require_fields(self)
        require_directory(self.out, "out")


def make_model(seed: int = 0) -> qwen3.Qwen3:
    """A Qwen3 of 2 layers with random weights, its output matrix 6 times as large as initialized."""
    config = qwen3.ModelConfig(
        num_layers=2,
        vocab_size=EOS + 1,
        embed_dim=64,
        hidden_dim=256,
        num_heads=4,
        head_dim=16,
        num_kv_heads=4,
        rope_theta=10_000,
        norm_eps=1e-6,
    )
    model = qwen3.Qwen3(config, rngs=nnx.Rngs(seed))
    model.lm_head.w[...] *= OUTPUT_SCALE
    return model


def make_learner(config: PrioritizedConfig, command: TunixCommand, seed: int, rewards: list[float]) -> Any:
    """tunix's cluster and learner on one device; the reward of every step is appended to ``rewards``."""
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=16, max_prompt_length=24, kv_cache_size=64, temperature=1.0, seed=1_000 * seed
    )
    cluster = rl_cluster.RLCluster(
        actor=make_model(),
        reference=make_model(),
        tokenizer=Characters(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adam(command.learning_rate),
                eval_every_n_steps=command.steps + 1,
                max_steps=command.steps,
                mini_batch_size=command.prompts,
                rollout_micro_batch_size=command.prompts,
                compute_logps_micro_batch_size=command.prompts,
            ),
            rollout_config=rollout,
        ),
    )

    def digits(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        found = [sum(character.isdigit() for character in text) / 16 for text in completions]
        rewards.append(float(np.mean(found)))
        rollout.seed += 1  # tunix samples every step with the same key otherwise.
        return found

    return PrioritizedLearner(cluster, config, reward_fns=digits)


def additions(command: TunixCommand, seed: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    for _ in range(command.steps):
        operands = rng.integers(10, 100, (command.prompts, 2)).tolist()
        yield {"prompts": np.array([ADDITION.prompt_text(Problem(a, b)) for a, b in operands])}


def train(command: TunixCommand, exponent: float, seed: int) -> dict[str, Any]:
    """One run: rewards, and of the reference on the final policy's answers J, its weights, and the KL to it."""
    config = PrioritizedConfig(num_generations=4, beta=command.coefficient, certainty_exponent=exponent)
    rewards: list[float] = []
    started = time.perf_counter()
    learner = make_learner(config, command, seed, rewards)
    learner.train(additions(command, seed))
    seconds = time.perf_counter() - started
    prompts = [text for batch in additions(command, 1_000) for text in batch["prompts"]][: command.prompts]
    sampled = learner._generate_and_compute_advantage({"prompts": np.repeat(prompts, 4)})
    rollout = learner.rl_cluster.rollout
    log_probs = common.compute_per_token_logps(
        *nnx.split(rollout.model()), sampled.prompt_ids, sampled.completion_ids, rollout.pad_id(), rollout.eos_id()
    )
    mask = sampled.completion_mask.astype(bool)
    mean = functools.partial(jnp.mean, where=mask)
    learner.rl_cluster.close()
    return {
        "seed": seed,
        "rewards": rewards[: command.steps],
        "kl": float(mean(log_probs - sampled.ref_per_token_logps)),
        "certainty": float(mean(sampled.certainty)),
        "weight": float(mean(sampled.certainty**exponent)),
        "seconds": seconds,
    }


def main(command: TunixCommand) -> None:
    earlier_results(command.out, COMMAND)  # Refuses another's.
    arms = {"standard": 0.0, "prioritized": command.exponent}
    runs = {arm: [train(command, arms[arm], seed) for seed in range(command.seeds)] for arm in arms}
    print("| arm | seed | reward, first steps | last steps | KL, nats | J | J^exponent | s |\n" + "|---" * 8 + "|")
    for arm, of_arm in runs.items():
        for run in of_arm:
            first, last = np.mean(run["rewards"][:LAST_STEPS]), np.mean(run["rewards"][-LAST_STEPS:])
            measured = " | ".join(f"{run[name]:.3f}" for name in ("kl", "certainty", "weight"))
            print(f"| {arm} | {run['seed']} | {first:.3f} | {last:.3f} | {measured} | {run['seconds']:.0f} |")
    command.out.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(command, name) for name in command.__dataclass_fields__ if name != "out"}
    write_json(command.out / "results.json", {"arms": runs, "config": {"command": COMMAND, **settings}, **machine()})
    print(f"results.json in {command.out}")


if __name__ == "__main__":
    cli.run(main, TunixCommand)
