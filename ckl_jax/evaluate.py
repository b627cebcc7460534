"""Accuracy per operand length with bootstrap intervals (paper, Fig. 2, Tables 4 and 5).

    python -m ckl_jax.evaluate --checkpoint runs/tiny
    python -m ckl_jax.evaluate --checkpoint runs/tiny --offsets 0 60 180

The second tells whether the model is as good everywhere in its block as at position 0, where RL starts.

It computes in the checkpoint's own arithmetic: bfloat16 for pre-trained models of ``small`` and ``gpt2``, float32 for
all others, their policies after RL included.

The problems are drawn apart from those of RL, but not from pre-training's: of 1,000 additions with varying lengths 0.5%
were in the text of N = 5 (100,000 documents), and a quarter in that of N = 3. So were 3% (N = 9), 5% (7), 10% (6),
15.5% (5) and 62% (3) of the 200 shorter problems of RL's tests: there are few short additions, and accuracy on them is
memory too.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ckl_jax import tasks
from ckl_jax.analysis.statistics import bootstrap_interval
from ckl_jax.checkpoint.shipped import SHIPPED_TINY
from ckl_jax.checkpoint.store import Model, load_model
from ckl_jax.checks import MOST_SEED
from ckl_jax.config import ModelConfig
from ckl_jax.errors import is_integer, require, require_word
from ckl_jax.fields import NonNegativeInt, PositiveFloat, PositiveInt, require_fields
from ckl_jax.rollout.generation import generate
from ckl_jax.rollout.trajectory import Sampling, require_possible
from ckl_jax.runtime import cli, sharding
from ckl_jax.runtime.targets import Call
from ckl_jax.tasks import problems as problems_lib
from ckl_jax.tasks.problems import Problems
from ckl_jax.tasks.task import Task

BATCH = 200
DRAWS = {"identical": Task.identical_problems, "varying": Task.varying_problems}


@functools.partial(jax.jit, static_argnums=0, static_argnames=("max_length", "greedy"))
def _rewards(config: ModelConfig, params: Any, problems: Problems, given, key, *, max_length, temperature, greedy):
    def roll_out(whole, rows):
        params, key, temperature = whole
        problems, given_BxT = rows
        sampling = Sampling(max_length, temperature, greedy, given_BxT)
        return generate(config, params, problems, key, sampling).trajectory.reward_B

    return sharding.over_rows(roll_out, (params, key, temperature), (problems, given))


def judge(
    model: Model,
    problems: Sequence[tasks.Problem],
    digits: int,
    *,
    temperature: float | None = None,
    seed: int = 0,
    extra_length: int = tasks.EXTRA_LENGTH,
    given_BxT: np.ndarray | None = None,
) -> np.ndarray:
    """1 for each problem of up to ``digits`` digits that the model solves, else 0: float64 [B].

    Args:
      temperature: of sampling; None takes the likeliest character.
      extra_length: characters that an answer may be longer than the longest right one.
      given_BxT: how the answers start, as in ``rollout``; default: with nothing.
    """
    require(is_integer(extra_length) and extra_length >= 0, "extra_length", extra_length, "0 or more")
    sampling = sampled_at(temperature, model.task.max_answer_length(digits, extra_length))
    calls = judge_calls(model, problems, digits, sampling._replace(given_BxT=given_BxT), seed)
    found = [(call.run(), count) for call, count in calls]
    return np.concatenate([sharding.to_host(rewards)[:count] for rewards, count in found]).astype(np.float64)


def sampled_at(temperature: float | None, max_length: int) -> Sampling:
    """Answers of up to ``max_length`` characters at a temperature, or of the likeliest ones."""
    return Sampling(max_length, 1.0 if temperature is None else temperature, greedy=temperature is None)


def judge_calls(
    model: Model, problems: Sequence[tasks.Problem], digits: int, sampling: Sampling, seed: int = 0
) -> Iterator[tuple[Call, int]]:
    """Yields, for each group of problems, the call that judges them and the number of its rows that are problems."""
    packed = problems_lib.pack(model.task, problems, digits, model.max_pretrain_digits)
    require(is_integer(seed) and 0 <= seed <= MOST_SEED, "seed", seed, f"0..{MOST_SEED}")
    require_possible(model.config, packed, sampling)
    max_length, temperature, greedy, given_BxT = sampling
    for start in range(0, len(problems), BATCH):
        group = problems_lib.rows(packed, start, BATCH), None if given_BxT is None else given_BxT[start : start + BATCH]
        count = len(group[0].episodes_B)
        group = sharding.filled_up(group)
        mesh = sharding.make_mesh(1, len(group[0].episodes_B))
        params = sharding.put(model.params, sharding.everywhere(mesh))
        options = {"max_length": max_length, "temperature": temperature, "greedy": greedy}
        yield Call(_rewards, mesh, (model.config, params, *group, jax.random.key(seed)), options), count


def judge_cell(
    model: Model,
    operands: str,
    digits: int,
    count: int,
    *,
    temperature: float | None = None,
    seed: int = 0,
    extra_length: int = tasks.EXTRA_LENGTH,
) -> np.ndarray:
    """``judge`` of one cell of Tables 4 and 5, on problems that depend on ``seed``, ``operands`` and ``digits`` alone.

    Args:
      operands: ``identical`` (both of ``digits`` digits) or ``varying`` (one may be shorter).
      count: problems.
    """
    require_word(operands, "operands", DRAWS)
    problems = DRAWS[operands](model.task, problems_lib.measured_on(seed, digits), count, digits)
    return judge(model, problems, digits, temperature=temperature, seed=seed, extra_length=extra_length)


def moved(model: Model, offset: int) -> Model:
    """The model with its block's first ``offset`` positions left out, so that problems start at the next one.

    Raises:
      ConfigError: no position is left.
    """
    require(is_integer(offset) and 0 <= offset < model.config.block_size, "offsets", offset, "a position of the block")
    tables = model.params["params"]
    positions = {"embedding": tables["wpe"]["embedding"][offset:]}
    config = dataclasses.replace(model.config, block_size=model.config.block_size - offset)
    return model._replace(config=config, params={"params": {**tables, "wpe": positions}})


@dataclass(frozen=True)
class EvaluateCommand:
    """Accuracy of a checkpoint on N to N+3 digits, identical and varying operand lengths."""

    checkpoint: pathlib.Path = SHIPPED_TINY
    """Directory with params/ and model.json; default: the tiny checkpoint that ships with the package."""
    problems: PositiveInt = 1000
    """Problems per cell."""
    temperature: PositiveFloat | None = None
    """Sampling temperature; None: the likeliest character (greedy)."""
    seed: NonNegativeInt = 0
    """Of the problems and of sampling."""
    offsets: tuple[NonNegativeInt, ...] = (0,)
    """Positions of the block at which problems start, as in RL at 0; several: the mean over them of each problem."""
    extra_length: NonNegativeInt = tasks.EXTRA_LENGTH
    """Characters that an answer may be longer than the longest right one; fewer where a block is short."""

    def __post_init__(self) -> None:
        require_fields(self)
        require(len(self.offsets) > 0, "offsets", self.offsets, "1 or more positions")


def lengths(model: Model) -> range:
    """N to N + 3 digits, as far as problems go."""
    return range(model.max_pretrain_digits, min(model.max_pretrain_digits + 3, tasks.MAX_DIGITS) + 1)


def main(command: EvaluateCommand) -> None:
    model = load_model(command.checkpoint)
    base, block_size = model.max_pretrain_digits, model.config.block_size
    models = [moved(model, offset) for offset in command.offsets]
    how: dict[str, Any] = {name: getattr(command, name) for name in ("temperature", "seed", "extra_length")}
    shown = f"{command.problems} problems per cell, accuracy in % with 95% bootstrap interval"
    print(f"{model.task.name}, N = {base}, {shown}")
    if 2 not in model.task.long_operands:
        print("the second operand has one digit: identical and varying lengths are the same draw, with other problems")
    print(f"{'digits':>8} {'identical':>24} {'varying':>24}")
    for digits in lengths(model):
        length = model.task.longest_episode(digits, command.extra_length) + max(command.offsets)
        if length > block_size:
            room = block_size - length + command.extra_length
            possible = f", at most --extra-length {room}" if room >= 0 else ""
            print(f"{digits:>8}  not possible: up to {length} positions, block_size = {block_size}{possible}")
            continue
        cells = []
        for operands in DRAWS:
            solved = [judge_cell(each, operands, digits, command.problems, **how) for each in models]
            share = np.mean(solved, axis=0)
            low, high = bootstrap_interval(share)
            cells.append(f"{100 * share.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        print(f"{digits:>8} {cells[0]:>24} {cells[1]:>24}", flush=True)


if __name__ == "__main__":
    cli.run(main, EvaluateCommand)
