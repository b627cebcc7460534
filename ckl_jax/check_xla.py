"""Compares what XLA computes on this machine's CPU with its default fusions and with the safe flag of ``xla_cpu``.

    python -m ckl_jax.check_xla
    python -m ckl_jax.check_xla --stages pretraining rollout

First three patterns that jaxlib has computed wrongly, against NumPy; then the programs of this package, with the
shipped tiny model at its real shapes. Exit code 1: a pattern is wrong with the safe flag too, or a program differs.

When we ran it, no program of the tiny scale differed beyond rounding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from ckl_jax import next_character
from ckl_jax.checkpoint.shipped import SHIPPED_TINY
from ckl_jax.checkpoint.store import Model, load_model
from ckl_jax.config import FinetuneConfig
from ckl_jax.datasets.stream import token_stream
from ckl_jax.errors import require
from ckl_jax.fields import AtLeast, require_fields
from ckl_jax.presets import finetune_preset, pretrain_preset
from ckl_jax.rl.evaluation import test
from ckl_jax.rl.program import draw_problems, draw_rounds, make_program, make_runs
from ckl_jax.rl.updates import init_run, train_rounds
from ckl_jax.rollout import generation
from ckl_jax.rollout.trajectory import Sampling
from ckl_jax.runtime import cli, sharding, xla_cpu
from ckl_jax.runtime.processes import Process, on_all

Stage = Literal[
    "pretraining", "rollout", "speculative", "test", "a2c", "reinforce", "ppo", "grpo", "rloo", "transitions", "vmapped"
]
ROUNDS: dict[str, dict[str, Any]] = {
    "a2c": {},
    "reinforce": {"algorithm": "reinforce"},
    "ppo": {"algorithm": "ppo", "epochs": 2, "kl": "k2"},
    "grpo": {"algorithm": "grpo", "group_size": 8, "kl": "k3"},
    "rloo": {"algorithm": "rloo", "group_size": 8, "kl": "k1", "kl_in": "reward"},
    "transitions": {"minibatch": "transitions", "episodes": 4, "minibatch_episodes": 4, "diagnostic_episodes": 2},
    "vmapped": {"runs_at_once": 2},
}
TOLERANCE = 1e-2
"""Greatest `difference` that counts as none: far above rounding, far below what a wrong reduction does."""


def rows() -> tuple[jax.Array, np.ndarray]:
    """Squared lengths of 32,769 vectors (jax issue 39103): wrong in a row in jaxlib 0.10.2."""
    index_N = np.arange(32_769, dtype=np.float32)
    vectors_Nx3 = np.stack([index_N, 0 * index_N, 0 * index_N], axis=1)
    lengths_N = jax.jit(jax.vmap(lambda vector: jnp.sum((jnp.eye(3) @ vector) ** 2)))(vectors_Nx3)
    return lengths_N, np.square(index_N)


def products() -> tuple[jax.Array, np.ndarray]:
    """Sums of a matrix times its product with a constant: 1e28 times too great in 0.10.2, NaN in 0.12.0.1."""
    matrices_5xNxN = np.random.default_rng(0).random((5, 60, 60)).astype(np.float32)

    def total(matrices_5xNxN, constant):
        return jnp.sum(jnp.matmul(matrices_5xNxN, jnp.broadcast_to(constant, (5, 60, 60))) * matrices_5xNxN, (1, 2))

    exact_5xNxN = matrices_5xNxN.astype(np.float64)
    expected = (np.matmul(exact_5xNxN, np.full((5, 60, 60), 0.5)) * exact_5xNxN).sum((1, 2))
    return jax.jit(total)(matrices_5xNxN, np.float32(0.5)), expected


def seven_axes() -> tuple[jax.Array, np.ndarray]:
    """A sum of products over one of seven axes (jax issue 40412): ends the process in jaxlib 0.10.2."""
    a, b = np.random.default_rng(0).random((2, 3, 1, 2, 2, 8, 8, 8)).astype(np.float32)
    return jax.jit(lambda a, b: jnp.sum(a * b, axis=3))(a, b), (a * b).sum(axis=3)


PATTERNS: tuple[Callable[[], tuple[jax.Array, np.ndarray]], ...] = (rows, products, seven_axes)


def is_right(pattern: int) -> bool:
    """Whether this process computes a pattern rightly."""
    got, expected = PATTERNS[pattern]()
    return bool(np.allclose(got, expected, rtol=1e-3))


def shortened(model: Model) -> Model:
    """Its first layer, and N = 1: programs of the same widths that are compiled and run sooner."""
    kept = {name: leaf for name, leaf in model.params["params"].items() if name == "h_0" or not name.startswith("h_")}
    return model._replace(
        config=dataclasses.replace(model.config, num_layers=1), params={"params": kept}, max_pretrain_digits=1
    )


def values_of(stage: str, episodes: int, quick: bool) -> dict[str, np.ndarray]:
    """What a program gives here: metrics of updates, or characters and their log-probabilities.

    Args:
      episodes: of a round, a rollout or a test; a round of transitions has fewer.
      quick: with the ``shortened`` model.
    """
    model = load_model(SHIPPED_TINY)
    if quick:
        model = shortened(model)
    if stage == "pretraining":
        return pretraining(model)
    config = dataclasses.replace(finetune_preset("tiny", "ours"), episodes=episodes, final_problems=episodes)
    if stage in ROUNDS:
        return round_of(dataclasses.replace(config, **ROUNDS[stage]), model)
    program = make_program(config, model)
    if stage == "test":
        return test(program, jax.tree.map(lambda x: x[None], model.params), episodes).accuracy
    generate = functools.partial(
        generation.generate,
        program.model,
        key=jax.random.key(0),
        sampling=Sampling(program.max_length, config.temperature),
        how="plain" if stage == "rollout" else "speculative",
        batch=config.rollout_batch,
    )
    problems = draw_problems(program, 0, 0)
    trajectory = jax.jit(lambda params, problems: generate(params, problems).trajectory)(model.params, problems)
    return {"answers": trajectory.answers_BxT, "log_probs": trajectory.log_probs_BxT, "reward": trajectory.reward_B}


def pretraining(model: Model, steps: int = 3) -> dict[str, np.ndarray]:
    """The metrics of every step, on 500 documents."""
    digits, task, rng = model.max_pretrain_digits, model.task, np.random.default_rng(0)
    config = dataclasses.replace(pretrain_preset("tiny"), max_digits=digits, model=model.config)
    drawn = task.varying_problems(rng, 500, digits)
    stream = jax.tree.map(jnp.asarray, token_stream(task.prompt_text(p) + task.answer_text(p) for p in drawn))
    state = jax.jit(lambda: next_character.init_state(config))()
    found = []
    with jax.set_mesh(next_character.make_mesh(config)):
        for _ in range(steps):
            state, metrics = next_character.train_step(config, state, stream)
            found.append(jax.device_get(metrics))
    return {name: np.array([step[name] for step in found]) for name in found[0]}


def round_of(config: FinetuneConfig, model: Model) -> dict[str, np.ndarray]:
    """The metrics of a round of a policy near the reference, whose KL has a gradient; nearly without steps, for Adam
    makes whole steps of gradients that are rounding alone."""
    config = dataclasses.replace(config, learning_rate=1e-8, value_learning_rate=1e-8)
    rng = np.random.default_rng(0)
    policy = jax.tree.map(lambda x: (x * rng.normal(1, 0.02, x.shape)).astype(np.float32), model.params)
    program = make_program(config, model)
    runs, hypers = make_runs(config, {"standard": {"beta": 0.0}, "prioritized": {}}, 1)
    mesh = sharding.make_mesh(len(runs), config.episodes, run_devices=1, data_devices=1)
    states = jax.jit(jax.vmap(lambda hyper: init_run(program, policy, hyper)))(hypers)
    problems = draw_rounds(program, runs, [0])
    _, metrics = train_rounds(program, mesh, model.params, states, hypers, problems)
    return sharding.to_host(metrics)


def difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> tuple[float, str]:
    """The greatest difference of two stages' values, and where it is.

    It is relative to the greatest value of its kind, such as all of ``loss/...``: a term may cancel to rounding alone.
    """
    values = {name: np.abs(np.stack([a[name], b[name]]).astype(np.float64)).max() for name in a}
    kinds = {name: name.partition("/")[0] for name in a}
    found = []
    for name in a:
        scale = max(values[other] for other in a if kinds[other] == kinds[name])
        gap = np.abs(np.subtract(a[name], b[name], dtype=np.float64)).max() / max(scale, 1e-6)
        found.append((float(gap) if np.isfinite(gap) else np.inf, name))
    return max(found)


@dataclass(frozen=True)
class CheckXlaCommand:
    """Checks that XLA's fusions on CPU change nothing in the programs of this package."""

    stages: tuple[Stage, ...] = get_args(Stage)
    """Programs to compare. The rounds are named by their algorithm, or by `transitions` and `vmapped` (two runs)."""
    episodes: Annotated[int, AtLeast(16)] = 128
    """Answers of a rollout, a test, or a round (4 of transitions)."""
    quick: bool = False
    """The same widths, but a model of one layer and short texts."""

    def __post_init__(self) -> None:
        require_fields(self)
        minibatch = finetune_preset("tiny", "ours").minibatch_episodes
        whole = self.episodes % minibatch == 0
        require(whole, "episodes", self.episodes, f"a multiple of the minibatches' {minibatch} episodes")


def main(command: CheckXlaCommand) -> None:
    processes = [Process(flag) for flag in ("", xla_cpu.SAFE_FLAG)]
    print(f"jaxlib {jaxlib.__version__}: XLA's default on CPU | with {xla_cpu.SAFE_FLAG}")
    failed = False
    for index, pattern in enumerate(PATTERNS):
        verdicts = on_all(processes, is_right, index)
        words = [{None: "CRASHES", False: "WRONG", True: "right"}[verdict] for verdict in verdicts]
        failed |= verdicts[1] is not True
        print(f"{pattern.__name__:12s} {words[0]} | {words[1]}", flush=True)
    print("greatest difference of the two, relative to the greatest value of its kind")
    for stage in command.stages:
        values = on_all(processes, values_of, stage, command.episodes, command.quick)
        gap, where = (np.inf, "a process died") if None in values else difference(*values)
        failed |= gap > TOLERANCE
        print(f"{stage:12s} {gap:.1e} ({where}){'' if gap <= TOLERANCE else ': DIFFERS'}", flush=True)
    for process in processes:
        process.close()
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    cli.run(main, CheckXlaCommand)
