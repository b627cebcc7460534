"""Whole episodes against the authors' single transitions, at equal samples and at equal displacement.

    python -m experiments.minibatches
    python -m experiments.minibatches --plot-only      # table and figure again from results.json

The authors make thousands of tiny Adam steps a round, each on a few single characters; ours are a handful of larger
steps on whole episodes, hundreds of times faster. These are two algorithms. Both fine-tune the same model here on the
same problems and as many episodes, with the same losses, each at several learning rates (``--episode-rates``,
``--transition-rates``), which decay alike. How far a run went is the Euclidean distance of its policy's parameters from
the pre-trained ones. The curve of accuracy over displacement (in logarithms) of a seed's episode runs is read at the
displacement of each of its transition runs; what lies outside the curve is not compared.

Written down before any run. Compared, for each transition rate, is transitions - episodes at the same displacement:
accuracy on N + 1 digits after the last round, common test problems, paired by seed, Student's 95% interval over seeds.
Better if the interval is above 0, worse if below, else undecided; none if fewer than two seeds can be compared.
Hypothesis: undecided, so what matters is how far the policy goes. Displacement is one number of many, the steps go
stale within a round for transitions alone (no ratio corrects that), and a short run at this size says nothing of a long
one: the old lengths and the KL are reported beside it.

Default: 2 seeds, 4 rounds of 64 episodes, 8 transitions a step: 16 steps against about 12,000. Every kind of minibatch
is a run of its own under ``out``; an interrupted call goes on with the same command.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from ckl_jax import finetune
from ckl_jax.analysis import plots
from ckl_jax.analysis.statistics import mean_interval, percent
from ckl_jax.checkpoint.shipped import shipped
from ckl_jax.checkpoint.store import Model, Params, load_model
from ckl_jax.config import FinetuneConfig
from ckl_jax.errors import require
from ckl_jax.finetune import certainty_model, describe, require_certainty_counts
from ckl_jax.presets import finetune_preset
from ckl_jax.rl import program
from ckl_jax.rl.program import make_program, make_runs
from ckl_jax.runs.directory import RunDirectory
from ckl_jax.runtime import cli
from ckl_jax.tasks.catalog import TaskName
from experiments.common import arms as arms_lib
from experiments.common import comparison
from experiments.common.figure import Results, markdown, publish, whose_certainty

COMMAND = "experiments.minibatches"
KINDS = ("episodes", "transitions")
COLORS = {"episodes": "#4c72b0", "transitions": "#dd8452"}


@dataclass(frozen=True)
class MinibatchesCommand(arms_lib.ArmsCommand):
    """Whole episodes against single transitions as minibatches, each at several learning rates."""

    out: pathlib.Path = pathlib.Path("runs/minibatches")
    """Directory of both runs: new, empty, or of the same command interrupted."""
    episode_rates: tuple[float, ...] = (7.5e-5, 1.5e-4, 3e-4, 6e-4, 1.2e-3)
    """Learning rates of the runs on whole episodes; at least 2."""
    transition_rates: tuple[float, ...] = (1e-6, 3e-6, 1e-5)
    """Learning rates of the runs on single transitions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("episode_rates", 2), ("transition_rates", 1)):
            rates = getattr(self, name)
            fits = len({f"{rate:g}" for rate in rates if 0 < rate < float("inf")}) == len(rates) >= least
            require(fits, name, rates, f"{least} or more different numbers above 0")
        for name in ("minibatch", "learning_rate"):
            value, wanted = getattr(self.config, name), getattr(FinetuneConfig(), name)
            require(value == wanted, name, value, f"{wanted}: the runs set it")
        require_certainty_counts(self)
        for kind in KINDS:
            _ = self.configured(kind)  # Refuses here what a kind cannot do.

    def configured(self, kind: str) -> FinetuneConfig:
        return dataclasses.replace(self.config, minibatch=kind)  # type: ignore[arg-type]

    def arms(self, kind: str) -> dict[str, dict[str, float]]:
        rates = {"episodes": self.episode_rates, "transitions": self.transition_rates}[kind]
        return {f"{kind}_{rate:g}": {"learning_rate": rate} for rate in sorted(rates)}


def preset(scale: str = "tiny", recipe: str = "ours", task: TaskName = "addition") -> MinibatchesCommand:
    budget: dict[str, Any] = {"rounds": 4, "episodes": 64, "test_every": 2}
    config = dataclasses.replace(finetune_preset(scale, recipe), minibatch="episodes", learning_rate=3e-4, **budget)
    return MinibatchesCommand(config, task, shipped(task, scale))


def displacement(params: Params, start: Params) -> float:
    """Euclidean distance of two trees of parameters."""
    squares = jax.tree.map(
        lambda x, y: np.square(np.asarray(x, np.float64) - np.asarray(y, np.float64)).sum(), params, start
    )
    return float(np.sqrt(sum(jax.tree.leaves(squares))))


def measure(command: MinibatchesCommand) -> Results:
    """Both kinds' runs: per arm what ``arms.summarize`` gives, the displacement of every seed, and seconds a round."""
    model, other = arms_lib.load(command), certainty_model(command)
    for kind in KINDS:
        make_program(command.configured(kind), model, other)
        make_runs(command.configured(kind), command.arms(kind), command.seeds)
    rates = {name: getattr(command, name) for name in ("episode_rates", "transition_rates")}
    described = {"command": COMMAND, **rates, **describe(command, model, other)}
    whole = RunDirectory(command.out, described)
    results: dict[str, Any] = {"arms": {}, "seconds": {}}
    for kind in KINDS:
        found = train(command, model, other, kind)
        results["arms"] |= found.pop("arms")
        results["seconds"][kind] = found.pop("seconds")
        results |= found
    whole.record_config()
    whole.close()
    return {**results, "wall_seconds": sum(results["seconds"].values()), "config": described}


def train(command: MinibatchesCommand, model: Model, other: Model | None, kind: str) -> dict[str, Any]:
    config, arms = command.configured(kind), command.arms(kind)
    described = {"command": COMMAND, "config": dataclasses.asdict(config), "arms": arms, "seeds": command.seeds}
    settings = config, model, arms, command.seeds, command.logs
    directory = finetune.run(command.out / kind, described, *settings, certainty_from=other)
    digits = model.max_pretrain_digits + config.extra_digits
    found = arms_lib.summarize(arms_lib.Run(described, directory.metrics(), {}, digits), arms, {})
    for arm, values in found["arms"].items():
        runs = [program.Run(arm, seed) for seed in found["seeds"]]
        policies = [load_model(directory.path / run.name).params for run in runs]
        values |= {"minibatch": kind, "displacement": [displacement(policy, model.params) for policy in policies]}
    return {**found, "digits": digits, "seconds": directory.seconds()}


def at_displacement(curve: Sequence[tuple[float, float]], where: float) -> float:
    """Accuracy of a curve of (displacement, accuracy) at another displacement; NaN outside of it.

    Linear between neighbours, in the logarithm of the displacement.
    """
    x, y = np.array(sorted(curve)).T
    return float(np.interp(np.log(where), np.log(x), y, left=np.nan, right=np.nan))


def compare(arms: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Transitions - episodes at the transition runs' displacements, for each of their rates."""
    of_kind = {kind: {arm: found for arm, found in arms.items() if found["minibatch"] == kind} for kind in KINDS}
    pairs = []
    for arm, found in of_kind["transitions"].items():
        differences = []
        for seed, (where, accuracy) in enumerate(zip(found["displacement"], _after(found), strict=True)):
            curve = [(other["displacement"][seed], _after(other)[seed]) for other in of_kind["episodes"].values()]
            differences.append(accuracy - at_displacement(curve, where))
        compared = np.array([x for x in differences if np.isfinite(x)])
        interval = mean_interval(compared).within(-1, 1) if len(compared) > 1 else None
        pairs.append(
            {
                "arm": arm,
                "seeds_compared": len(compared),
                "difference": interval,
                "verdict": comparison.JUDGED[interval.side()] if interval else "none",
            }
        )
    return pairs


def _after(found: Mapping[str, Any]) -> list[float]:
    return [curve[-1] for curve in found["learning_curve"]]


def text(results: Results) -> str:
    """Arms, pairs and seconds as Markdown."""
    rows = []
    for arm, found in results["arms"].items():
        far, kl = np.mean(found["displacement"]), np.mean(np.array(found["kl"])[:, -1])
        target, old = (percent(found[name]) for name in ("target_after", "old_after"))
        rows.append([arm, f"{far:.3f}", target, old, f"{kl:.4f}"])
    before = 100 * next(iter(results["arms"].values()))["target_before"][0]
    rows.append(["before", "0", f"{before:.1f}", "", "0"])
    compared = []
    for pair in results["pairs"]:
        shown = percent(pair["difference"], "+") if pair["difference"] else "-"
        compared.append([pair["arm"], shown, str(pair["seeds_compared"]), pair["verdict"]])
    seconds = ", ".join(f"{kind} {value:.0f} s" for kind, value in results["seconds"].items())
    after = (f"{results['digits']} digits after", "old lengths after")
    tables = [
        markdown(["arm", "displacement", *after, "last KL"], rows),
        markdown(["at the displacement of", "transitions - episodes", "seeds", ""], compared),
    ]
    return "\n\n".join([*tables, f"all runs: {seconds}"])


def draw(results: Results) -> Figure:
    figure = Figure(figsize=(10, 4))
    panels = figure.subplots(1, 2, sharex=True)
    names = {"target": f"{results['digits']} digits", "old": "the lengths of pre-training"}
    for panel, (curve, title) in zip(panels, names.items(), strict=True):
        for kind in KINDS:
            chosen = [found for found in results["arms"].values() if found["minibatch"] == kind]
            far = np.array([found["displacement"] for found in chosen])
            key = {"target": "learning_curve", "old": "old_curve"}[curve]
            accuracy = 100 * np.array([[values[-1] for values in found[key]] for found in chosen])
            panel.plot(far.mean(axis=1), accuracy.mean(axis=1), color=COLORS[kind], linewidth=2, label=kind)
            panel.plot(far, accuracy, ".", color=COLORS[kind], alpha=0.7)
        before = next(iter(results["arms"].values()))[f"{curve}_before"][0]
        panel.axhline(100 * before, color=plots.SOFT, linewidth=1, linestyle="--", label="before")
        panel.set(xscale="log", xlabel="distance from the pre-trained parameters", title=title)
        plots.plain_ticks(panel.xaxis)
    panels[0].set_ylabel("accuracy after RL (%)")
    panels[0].legend(title="minibatches of")
    borrowed = whose_certainty(results["config"])
    figure.suptitle(f"Equal samples, several learning rates{borrowed}, {plots.counted(len(results['seeds']), 'seed')}")
    return figure


def judge(results: Results) -> Results:
    return {"pairs": compare(results["arms"])}


def main(command: MinibatchesCommand) -> None:
    publish(command, COMMAND, "minibatches", measure, text, draw, judge=judge)


if __name__ == "__main__":
    cli.run(main, MinibatchesCommand, preset)
