"""Tests of a fine-tuning's runs, the records of its rounds, and what is told of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import numpy as np

from ckl_jax.rl.evaluation import test
from ckl_jax.rl.program import Program, Run
from ckl_jax.rl.updates import AnyRunState
from ckl_jax.runs.directory import RunDirectory
from ckl_jax.runs.progress import Status


@dataclass
class Logbook:
    """Tests of all runs, their records, and what is told of them."""

    program: Program
    runs: list[Run]
    directory: RunDirectory
    progress: Callable[[str], None]
    first: int
    """Rounds that were done before this process."""
    start: float = field(default_factory=time.monotonic)

    def problems_at(self, step: int) -> int:
        config = self.program.config
        return config.final_problems if step in (0, config.rounds) else config.test_problems

    def test(self, step: int, states: AnyRunState) -> np.ndarray:
        """Accuracy of every run on the target length: float [R]. Before the first round all have the same policy."""
        count, runs = self.problems_at(step), self.runs
        policies = states.params["policy"]
        if step == 0:
            policies = jax.tree.map(lambda x: x[:1], policies)
        tested = test(self.program, policies, count)
        per_run = {name: np.broadcast_to(value, len(runs)) for name, value in tested.accuracy.items()}
        self.directory.log_samples(
            [
                {"step": step, "arm": run.arm, "seed": run.seed} | sample
                for index, run in enumerate(runs)
                if run.seed == self.program.config.seed
                for sample in tested.samples(index if step else 0)
            ]
        )
        self.directory.log(
            [
                {"step": step, "arm": run.arm, "seed": run.seed, "test_problems": count}
                | {f"test_{name}": float(value[index]) for name, value in per_run.items()}
                for index, run in enumerate(runs)
            ]
        )
        return per_run["target"]

    def write_rounds(self, done: int, metrics_RxU: Mapping[str, np.ndarray]) -> None:
        """Diagnostics of the rounds after ``done``: arrays with leading axes [R, rounds]."""
        rounds = next(iter(metrics_RxU.values())).shape[1]
        self.directory.log(
            [
                {"step": done + r + 1, "arm": run.arm, "seed": run.seed}
                | {name: values[index, r].tolist() for name, values in metrics_RxU.items()}
                for r in range(rounds)
                for index, run in enumerate(self.runs)
            ]
        )

    def tell_start(self, target_R: np.ndarray) -> None:
        accuracy, elapsed = f"{100 * target_R.mean():.1f}%", time.monotonic() - self.start
        line = f"before: {accuracy} on {self.program.digits} digits ({elapsed:.0f} s)"
        self.progress(Status(line, 0, self.program.config.rounds, accuracy, None))

    def tell(self, done: int, target_R: np.ndarray, kl_R: np.ndarray) -> None:
        rounds, elapsed = self.program.config.rounds, time.monotonic() - self.start
        left = elapsed / (done - self.first) * (rounds - done)
        accuracy, kl = _by_arm(self.runs, target_R), _by_arm(self.runs, kl_R)
        shown = ", ".join(f"{arm} {100 * value:.1f}%" for arm, value in accuracy.items())
        line = f"round {done}/{rounds}: {shown} on {self.program.digits} digits ({elapsed:.0f} s, {left:.0f} s left)"
        values = ", ".join(f"{arm} {100 * accuracy[arm]:.1f}% KL {kl[arm]:.3g}" for arm in accuracy)
        self.progress(Status(line, done, rounds, values, left))


def _by_arm(runs: list[Run], values_R: np.ndarray) -> dict[str, float]:
    arms = dict.fromkeys(run.arm for run in runs)
    return {arm: float(np.mean(values_R[[run.arm == arm for run in runs]])) for arm in arms}
