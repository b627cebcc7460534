"""Tests of a fine-tuning program's runs on common problems: accuracy, and the first answers as samples."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ckl_jax.rl.program import TEST_SEED, Program
from ckl_jax.rollout.generation import generate
from ckl_jax.rollout.trajectory import Sampling
from ckl_jax.runtime import sharding
from ckl_jax.runtime.sharding import map_runs
from ckl_jax.runtime.targets import Call
from ckl_jax.tasks import alphabet
from ckl_jax.tasks import problems as problems_lib
from ckl_jax.tasks.problems import Problems
from ckl_jax.tasks.task import Problem, Task

SAMPLES = 2


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def _answers(program: Program, mesh: Mesh, policies: Any, problems: Problems, max_length: int) -> tuple[Any, Any]:
    """Answers [R, B, T] of all runs to the same problems, same noise at the test temperature, and rewards [R, B]."""
    config = program.config

    def run_test(problems, axis_name, params):
        def roll_out(whole, problems):
            params, key = whole
            trajectory = generate(
                program.model,
                params,
                problems,
                key,
                Sampling(max_length, config.test_temperature),
                how=config.rollout,
                batch=config.rollout_batch,
                axis_name=axis_name,
            ).trajectory
            return trajectory.answers_BxT, trajectory.reward_B

        return sharding.over_rows(roll_out, (params, jax.random.key(TEST_SEED)), problems)

    def on_device(problems, policies):
        return map_runs(config.runs_at_once, functools.partial(run_test, problems), policies)

    return sharding.over_runs(mesh, on_device, problems, policies)


class Tested(NamedTuple):
    """What R runs did at a test.

    Attributes:
      task: what was tested.
      accuracy: ``target`` and ``old``: float [R].
      problems: the first few of the target length, S.
      answers_RxSxT: their answers.
      rewards_RxS: 1 for a right one, else 0.
    """

    task: Task
    accuracy: dict[str, np.ndarray]
    problems: list[Problem]
    answers_RxSxT: np.ndarray
    rewards_RxS: np.ndarray

    def samples(self, row: int) -> list[dict[str, Any]]:
        """A run's answers as text, each with its problem and reward."""
        texts = [alphabet.decode(answer_T, beyond=alphabet.UNKNOWN) for answer_T in self.answers_RxSxT[row]]
        return [
            {
                "sample": index,
                "problem": f"{problem.a}{self.task.operator}{problem.b}",
                "answer": texts[index].partition(alphabet.PAD)[0],
                "reward": float(self.rewards_RxS[row, index]),
            }
            for index, problem in enumerate(self.problems)
        ]


def problem_sets(program: Program, count: int) -> dict[str, tuple[list[Problem], int]]:
    """The problems of a test and their digits: ``count`` of the ``target`` length, and some of the ``old`` lengths.

    Those of a shorter test are the first ones of a longer test.
    """
    base, config = program.max_pretrain_digits, program.config
    rng = np.random.default_rng(TEST_SEED)
    most = max(count, config.test_problems, config.final_problems)
    target = program.task.rl_problems(rng, most, program.digits, base)
    old = program.task.short_problems(rng, config.old_problems, base)
    return {"target": (target[:count], program.digits), "old": (old[:count], base)}


def answer_calls(program: Program, policies: Any, drawn: Sequence[Problem], digits: int) -> Iterator[tuple[Call, int]]:
    """Yields, for each group of problems, the call that answers them and the number of its rows that are problems."""
    packed = problems_lib.pack(program.task, drawn, digits, program.max_pretrain_digits)
    length = program.task.max_answer_length(digits, program.config.extra_length)
    num_runs = jax.tree.leaves(policies)[0].shape[0]
    # Groups of one size: the short tests on the way and the long ones at the ends are one compiled program.
    for start in range(0, len(drawn), program.config.test_problems):
        group = problems_lib.rows(packed, start, program.config.test_problems)
        rows, filled = len(group.episodes_B), sharding.filled_up(group)
        mesh = sharding.make_mesh(num_runs, len(filled.episodes_B))
        shardings = sharding.state_shardings(mesh, policies, program.config.shard_state, sharding.RUN_AXIS)
        policies = sharding.put(policies, shardings)
        yield Call(_answers, mesh, (program, mesh, policies, filled, length)), rows


def test(program: Program, policies: Any, count: int) -> Tested:
    """Accuracy of every run on ``count`` common problems of the target length, and on some of the old lengths.

    Args:
      policies: parameters with a leading axis of runs R.
    """
    sets = problem_sets(program, count)
    rewards, first = dict[str, np.ndarray](), dict[str, np.ndarray]()
    for name, (drawn, digits) in sets.items():
        found = []
        for call, rows in answer_calls(program, policies, drawn, digits):
            answers_RxBxT, rewards_RxB = sharding.to_host(call.run())
            found.append(rewards_RxB[:, :rows])
            first.setdefault(name, answers_RxBxT[:, : min(rows, SAMPLES)])
        rewards[name] = np.concatenate(found, axis=1)
    accuracy = {name: rewards_RxB.mean(axis=1, dtype=np.float64) for name, rewards_RxB in rewards.items()}
    problems = sets["target"][0][: first["target"].shape[1]]
    return Tested(program.task, accuracy, problems, first["target"], rewards["target"])
