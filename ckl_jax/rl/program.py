"""What is to be computed: the static part of a program, its runs (arms x seeds), their mesh and their problems."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ckl_jax import token_weights
from ckl_jax.checkpoint.store import Model
from ckl_jax.config import FinetuneConfig, ModelConfig
from ckl_jax.errors import is_integer, require
from ckl_jax.fields import AtLeast
from ckl_jax.runtime import sharding
from ckl_jax.tasks import problems as problems_lib
from ckl_jax.tasks.problems import Problems
from ckl_jax.tasks.task import MAX_DIGITS, Task

Arms = Mapping[str, Mapping[str, Any]]
MOST_SEEDS = 1_000
TEST_SEED = 10**6
"""Draws the problems and the noise of the tests: no run has it."""
Seeds = Annotated[int, AtLeast(1, MOST_SEEDS)]


class Program(NamedTuple):
    """The static part of a program: hashable, so that it is compiled once.

    ``certainty_model`` is the shape of another model whose certainty weighs the KL, if it is not the reference's.
    """

    model: ModelConfig
    config: FinetuneConfig
    max_pretrain_digits: int
    task: Task
    certainty_model: ModelConfig | None = None

    @property
    def digits(self) -> int:
        return self.max_pretrain_digits + self.config.extra_digits

    @property
    def max_length(self) -> int:
        return self.task.max_answer_length(self.digits, self.config.extra_length)


class Hyper(NamedTuple):
    """What may differ between runs of one program; scalars, or arrays [runs]. ``kl_weights`` is the word's index."""

    seed: jax.Array
    learning_rate: jax.Array
    kl_coefficient: jax.Array
    beta: jax.Array
    kl_weights: jax.Array


class Run(NamedTuple):
    """One run of a program: an arm's name and a seed."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}/seed_{self.seed}"


def make_program(config: FinetuneConfig, model: Model, certainty_from: Model | None = None) -> Program:
    """The static part of the program.

    Args:
      certainty_from: another model whose certainty weighs the KL; default: the reference's own.

    Raises:
      ConfigError: the episodes do not fit a model's block, or have fewer transitions than one minibatch; the task has
        no drafts for a speculative rollout; or the other model is of another task.
    """
    names = ("dtype", "precision", "attention", "attention_chunk", "remat")
    arithmetic = {name: value for name in names if (value := getattr(config, name)) is not None}
    in_rl = dataclasses.replace(model.config, **arithmetic)
    other = None if certainty_from is None else dataclasses.replace(certainty_from.config, **arithmetic)
    program = Program(in_rl, config, model.max_pretrain_digits, model.task, other)
    drafted, undrafted = model.task.has_drafts, f"auto or plain: {model.task.name} has no drafts"
    require(drafted or config.rollout != "speculative", "rollout", config.rollout, undrafted)
    possible = f"at most {MAX_DIGITS - model.max_pretrain_digits}: problems have up to {MAX_DIGITS} digits"
    require(program.digits <= MAX_DIGITS, "extra_digits", config.extra_digits, possible)
    total, block = program.task.longest_episode(program.digits, config.extra_length), model.config.block_size
    allowed = f"what fits the model: prompt + answer = {total} characters, block_size = {block}"
    require(total <= block, "extra_digits", config.extra_digits, allowed)
    most, size = config.episodes * program.max_length, config.minibatch_transitions
    allowed = f"at most episodes * the longest answer = {most}"
    require(size <= most or config.minibatch != "transitions", "minibatch_transitions", size, allowed)
    if certainty_from is not None:
        theirs = certainty_from.task.name
        require(theirs == model.task.name, "certainty_checkpoint", theirs, f"a model of {model.task.name}")
        known, sampled = certainty_from.config.vocab_size, model.config.vocab_size
        of_policy = f"a model with the policy's vocabulary, {sampled}"
        require(known == sampled, "certainty_checkpoint", f"a vocabulary of {known}", of_policy)
        block = certainty_from.config.block_size
        allowed = f"a model with a block_size of prompt + answer = {total} or more"
        require(total <= block, "certainty_checkpoint", f"block_size {block}", allowed)
    return program


def make_mesh(config: FinetuneConfig, num_runs: int) -> Mesh:
    """Devices for the runs and for what they collect and learn from; raises ConfigError like ``sharding.make_mesh``."""
    size = config.minibatch_episodes if config.minibatch == "episodes" else config.minibatch_transitions
    return sharding.make_mesh(num_runs, math.gcd(config.episodes, size), data_devices=config.data_devices)


def make_runs(config: FinetuneConfig, arms: Arms, seeds: int) -> tuple[list[Run], Hyper]:
    """All arms x seeds and what differs between them, as arrays [runs].

    Args:
      arms: name -> overrides of ``learning_rate``, ``kl_coefficient``, ``beta`` and ``kl_weights``.

    Raises:
      ConfigError: no seed, one that draws the tests' problems, no arm, an override of another field or of a value that
        the config refuses.
    """
    require(is_integer(seeds) and 1 <= seeds <= MOST_SEEDS, "seeds", seeds, f"at least 1, at most {MOST_SEEDS}")
    drawn = range(config.seed, config.seed + seeds)
    apart = f"a range without {TEST_SEED}, whose problems are those of the tests"
    require(TEST_SEED not in drawn, "seed", f"{config.seed} for {seeds} runs", apart)
    require(len(arms) >= 1, "arms", dict(arms), "at least one")
    traced = tuple(name for name in Hyper._fields if name != "seed")
    runs, hypers = list[Run](), list[Hyper]()
    for arm, overrides in arms.items():
        require(set(overrides) <= set(traced), f"arms.{arm}", sorted(overrides), f"overrides of {', '.join(traced)}")
        of_arm = dataclasses.replace(config, **overrides)
        for seed in drawn:
            runs.append(Run(arm, seed))
            numbers = (np.float32(getattr(of_arm, name)) for name in ("learning_rate", "kl_coefficient", "beta"))
            word = np.int32(token_weights.index_of(of_arm.kl_weights))
            hypers.append(Hyper._make((np.uint32(seed), *numbers, word)))
    return runs, _stack(hypers)


def draw_rounds(program: Program, runs: Sequence[Run], rounds: Sequence[int]) -> Problems:
    """The problems of several rounds of all runs: arrays with leading axes [R, rounds]."""
    return _stack([_stack([draw_problems(program, run.seed, index) for index in rounds]) for run in runs])


def _stack(items: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *items)


def draw_problems(program: Program, seed: int, round_index: int) -> Problems:
    """The problems of one round, each as often as it is answered: the same for all arms of a seed."""
    rng, group = np.random.default_rng([seed, round_index]), program.config.group_size
    drawn = program.task.rl_problems(rng, program.config.episodes // group, program.digits, program.max_pretrain_digits)
    repeated = [problem for problem in drawn for _ in range(group)]
    return problems_lib.pack(program.task, repeated, program.digits, program.max_pretrain_digits)
