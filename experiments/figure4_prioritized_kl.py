"""Figure 4: the prioritized against the standard KL penalty, N -> N + 1 digits.

    python -m experiments.figure4_prioritized_kl
    python -m experiments.figure4_prioritized_kl --seeds 10     # narrower intervals in five times the time

Top: accuracy on N + 1 digits against RL episodes, on each round's new problems (lines) and on the common test problems
(points). Bottom: probability of the right character at the two critical
commas of operand 2 in steps 1 and 2, on the policy's own generations. Both arms share problems, noise and budget; they
differ in beta alone (0 against 150). An interrupted run goes on with the same command; ``--plot-only`` draws again.
"""

from __future__ import annotations

import pathlib
from dataclasses import dataclass, field
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import tyro

from ckl_jax import cli, plots
from ckl_jax.checkpoint import SHIPPED_TINY, load_model, write_json
from ckl_jax.config import FinetuneConfig, finetune_preset, require
from ckl_jax.finetune import describe, finetune, make_runs, make_task
from ckl_jax.runs import RunDirectory, by_run, critical_probability, machine
from ckl_jax.statistics import mean_interval, percent

COMMA, SECOND_OPERAND = 0, 2


@dataclass(frozen=True)
class Figure4Command:
    """Figure 4: prioritized against standard KL penalty over several seeds."""

    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = field(default_factory=FinetuneConfig)
    checkpoint: pathlib.Path = SHIPPED_TINY
    """Pre-trained model: a directory with params/ and model.json; default: the tiny one that ships with the package."""
    out: pathlib.Path = pathlib.Path("runs/figure4")
    """Directory of the run: new, empty, or of the same command interrupted."""
    seeds: int = 2
    """Seeds per arm."""
    plot_only: bool = False
    """Table and figure again from the metrics of a finished run."""

    def __post_init__(self) -> None:
        require(self.config.beta > 0, "beta", self.config.beta, "above 0, the standard arm has 0")


def preset(scale: str = "tiny", recipe: str = "ours") -> Figure4Command:
    return Figure4Command(finetune_preset(scale, recipe))


def arms(config: FinetuneConfig) -> dict[str, dict[str, float]]:
    return {"standard": {"beta": 0.0}, "prioritized": {"beta": config.beta}}


def summarize(command: Figure4Command, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Per-seed values, means with 95% intervals over seeds, and paired differences, from metrics.jsonl's records."""
    config = command.config
    names = list(arms(config))
    seeds = list(range(config.seed, config.seed + command.seeds))
    tests = by_run(records, "test_target")
    rounds = by_run(records, "success")
    test_steps = sorted({step for _, _, step in tests})
    round_steps = sorted({step for _, _, step in rounds})

    def critical(arm: str, seed: int, step: int, line: int) -> float:
        return critical_probability(rounds[arm, seed, step], line, SECOND_OPERAND, COMMA)

    by_arm: dict[str, Any] = {}
    for arm in names:
        by_arm[arm] = {
            "learning_curve": [[tests[arm, seed, step]["test_target"] for step in test_steps] for seed in seeds],
            "old_curve": [[tests[arm, seed, step]["test_old"] for step in test_steps] for seed in seeds],
            "critical_comma_step1": [[critical(arm, seed, step, 1) for step in round_steps] for seed in seeds],
            "critical_comma_step2": [[critical(arm, seed, step, 2) for step in round_steps] for seed in seeds],
            "collect_success": [[rounds[arm, seed, step]["success"] for step in round_steps] for seed in seeds],
            "kl": [[rounds[arm, seed, step]["kl"] for step in round_steps] for seed in seeds],
        }
        for name, curve in (("target", "learning_curve"), ("old", "old_curve")):
            values = np.array(by_arm[arm][curve])
            by_arm[arm][f"{name}_before"] = mean_interval(values[:, 0])
            by_arm[arm][f"{name}_after"] = mean_interval(values[:, -1])
            by_arm[arm][f"{name}_gain"] = mean_interval(values[:, -1] - values[:, 0])
    after = {arm: np.array(by_arm[arm]["learning_curve"])[:, -1] for arm in names}
    old = {arm: np.array(by_arm[arm]["old_curve"])[:, -1] for arm in names}
    return {
        "seeds": seeds,
        "test_episodes": [step * config.episodes for step in test_steps],
        "round_episodes": [step * config.episodes for step in round_steps],
        "arms": by_arm,
        "paired_difference": {
            "target": mean_interval(after["prioritized"] - after["standard"]),
            "old": mean_interval(old["prioritized"] - old["standard"]),
        },
    }


def table(results: dict[str, Any], digits: int) -> str:
    """The summary as a Markdown table, in percent."""
    lines = [
        f"| arm | {digits} digits before | {digits} digits after | gain | old lengths before | old lengths after |",
        "|---|---|---|---|---|---|",
    ]
    for arm, values in results["arms"].items():
        columns = ("target_before", "target_after", "target_gain", "old_before", "old_after")
        before, after, gain, old_before, old_after = (values[name] for name in columns)
        lines.append(
            f"| {arm} | {100 * before[0]:.1f} | {percent(after)} | {percent(gain, '+')} "
            f"| {100 * old_before[0]:.1f} | {percent(old_after)} |"
        )
    target, old = (percent(results["paired_difference"][name], "+") for name in ("target", "old"))
    lines.append(f"| prioritized - standard, paired | | {target} | | | {old} |")
    return "\n".join(lines)


def draw(results: dict[str, Any], digits: int, directory: pathlib.Path) -> None:
    figure = plt.figure(figsize=(9, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[1.25, 1])
    top = figure.add_subplot(grid[0, :])
    collected = {arm: np.array(values["collect_success"]) for arm, values in results["arms"].items()}
    tested = {arm: np.array(values["learning_curve"]) for arm, values in results["arms"].items()}
    before = np.array(results["round_episodes"]) - results["round_episodes"][0]
    plots.curves(top, before, collected, scale=100, label="{arm}, each round's new problems")
    plots.points(top, np.array(results["test_episodes"]), tested, scale=100, label="{arm}, test problems")
    top.set(xlabel="RL episodes", ylabel=f"accuracy on {digits} digits (%)", ylim=(0, 1.25 * top.get_ylim()[1]))
    top.set_title(f"N = {digits - 1} to {digits} digits, {len(results['seeds'])} seeds")
    top.legend(frameon=False, loc="upper left", ncols=2)
    for line, column in ((1, 0), (2, 1)):
        panel = figure.add_subplot(grid[1, column])
        by_arm = {arm: np.array(v[f"critical_comma_step{line}"], float) for arm, v in results["arms"].items()}
        plots.curves(panel, before, by_arm)
        panel.set(xlabel="RL episodes", ylabel="probability of the right character", ylim=(0, 1.02))
        panel.set_title(f"critical comma, step {line}, operand 2")
    plots.save(figure, directory, "figure4")


def main(command: Figure4Command) -> None:
    config = command.config
    model = load_model(command.checkpoint)
    make_task(config, model)
    make_runs(config, arms(config), command.seeds)
    described = {"command": "experiments.figure4_prioritized_kl", **describe(command, model)}
    if command.plot_only:
        require((command.out / "results.json").exists(), "plot_only", str(command.out), "a finished run's directory")
    directory = RunDirectory(command.out, described)
    if not command.plot_only:
        finetune(config, model, directory, arms(config), command.seeds)
    results = summarize(command, directory.metrics())
    results |= {"config": described, **machine(), "wall_seconds": directory.seconds()}
    digits = model.max_pretrain_digits + config.extra_digits
    write_json(directory.path / "results.json", results)
    draw(results, digits, directory.path)
    print(table(results, digits))
    print(f"{results['wall_seconds']:.0f} s; results.json, figure4.png and figure4.svg in {directory.path}")


if __name__ == "__main__":
    cli.run(main, Figure4Command, preset)
