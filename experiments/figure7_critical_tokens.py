"""Figure 7: the probability of the right character at six critical tokens during RL, both KL penalties.

    python -m experiments.figure7_critical_tokens
    python -m experiments.figure7_critical_tokens --run experiments/results/tiny/figure4 --out runs/figure7

One panel for the last comma of each operand's list in scratchpad steps 1, 2 and 3: before digit N + 1 (N and N - 1 in
the shorter lists of later steps), or before digit N + 2 if the run trained on N + 2 digits. It reads a finished run of
``experiments.figure4_prioritized_kl`` and trains nothing.

What is averaged: within a round, all episodes that came to the token with that operand's lists copied rightly so far;
over seeds, each seed counts the same however many episodes that were, because a seed is what is drawn independently
and a policy that miscopies more records fewer tokens. Where a seed recorded none it is left out of that point.

What is compared: the value of the last round (the policy before its last update), prioritized minus standard of the
same seed, its mean over seeds and Student's 95% interval. The verdict per token, with no correction for there being
six: reproduced if the interval is above 0, not reproduced if it is below 0, else undecided.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ckl_jax.analysis import plots
from ckl_jax.analysis.statistics import Interval, mean_interval, mean_intervals, percent
from ckl_jax.errors import ConfigError, require
from ckl_jax.runs.records import by_run, critical_probability, read_json, read_metrics
from ckl_jax.runtime import cli, reading
from ckl_jax.tasks.catalog import task_named
from experiments.common.claims import LIES_ABOVE, Claim, as_json
from experiments.common.comparison import last_comma
from experiments.common.figure import Results, markdown, of_task, publish, whose_certainty

COMMAND = "experiments.figure7_critical_tokens"
ARMS = ("standard", "prioritized")
FINISHED_RUN = "a finished run of: python -m experiments.figure4_prioritized_kl"


@dataclass(frozen=True)
class Figure7Command:
    """Figure 7: the right character's probability at six critical tokens during RL, from a run of figure 4."""

    run: pathlib.Path = pathlib.Path("runs/figure4")
    """Directory of a finished run of experiments.figure4_prioritized_kl."""
    out: pathlib.Path | None = None
    """Directory of results.json, figure7.png and figure7.svg; default: figure7 inside the run's."""
    plot_only: bool = False
    """Table, claims and figure again from results.json."""

    @property
    def directory(self) -> pathlib.Path:
        return self.run / "figure7" if self.out is None else self.out


def summarize(config: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """Curves per seed, their means and intervals, final values, paired differences and verdicts of the six tokens.

    Args:
      config: the run's config.json.
      records: of its metrics.jsonl.

    Raises:
      ConfigError: not every round of every seed of both arms is there.
    """
    try:
        settings = config["config"]
        episodes, rounds, first = (int(settings[name]) for name in ("episodes", "rounds", "seed"))
        comma = last_comma(int(settings["extra_digits"]))
        count, task = int(config["seeds"]), task_named(config.get("task", "addition"), "run")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"run: config.json is not figure 4's ({error!r}); allowed is {FINISHED_RUN}") from error
    needed = len(ARMS) * count * rounds
    enough = needed <= len(records)
    require(enough, "run", f"{needed - len(records)} or more of {needed} rounds missing", FINISHED_RUN)
    seeds, steps = list(range(first, first + count)), range(1, rounds + 1)
    found = by_run(records, "critical_count_3x2xC")
    wanted = list(itertools.product(ARMS, seeds, steps))
    missing = sum(key not in found for key in wanted)
    require(not missing, "run", f"{missing} of {len(wanted)} rounds missing", FINISHED_RUN)
    by_arm = {arm: [[found[arm, seed, step] for step in steps] for seed in seeds] for arm in ARMS}
    return {
        "seeds": seeds,
        "episodes": [episodes * (step - 1) for step in steps],
        "task": task.name,
        "tokens": [
            summarize_comma(by_arm, step, operand, comma) for step in (1, 2, 3) for operand in task.long_operands
        ],
    }


def summarize_comma(
    by_arm: Mapping[str, list[list[dict[str, Any]]]], step: int, operand: int, comma: int
) -> dict[str, Any]:
    """One token of ``summarize``, from each arm's records [seeds][rounds]; ``comma``: as ``last_comma`` gives it."""
    arms: dict[str, Any] = {}
    for arm, of_seeds in by_arm.items():
        curves = [[critical_probability(record, step, operand, comma) for record in row] for row in of_seeds]
        mean, low, high = (part.tolist() for part in mean_intervals(np.array(curves)))
        arms[arm] = {
            "curves": curves,
            "counts": [[r["critical_count_3x2xC"][step - 1][operand - 1][comma] for r in row] for row in of_seeds],
            "mean": mean,
            "low": low,
            "high": high,
            "before": (mean[0], low[0], high[0]),
            "final": (mean[-1], low[-1], high[-1]),
        }
    prioritized, standard = (np.array(arms[arm]["curves"])[:, -1] for arm in ("prioritized", "standard"))
    paired = (prioritized - standard)[~np.isnan(prioritized - standard)]
    difference = mean_interval(paired).within(-1, 1)
    return {
        "step": step,
        "operand": operand,
        "arms": arms,
        "final_difference": difference,
        "pairs": len(paired),
        "verdict": LIES_ABOVE[difference.side()],
    }


def claims(results: dict[str, Any]) -> list[Claim]:
    """One per token, by the rule of this module's docstring."""
    rule = (
        "the token's probability in the last round, prioritized minus standard of the same seed: reproduced if "
        "Student's 95% interval over seeds is above 0, not reproduced if it is below, else undecided"
    )
    task = results.get("task", "addition")  # Results of before there were others do not say it.
    setting = f"{of_task(task)}{whose_certainty(results['config']['run'])}"
    found = []
    for token in results["tokens"]:
        difference = Interval(*token["final_difference"])
        final = {arm: percent(token["arms"][arm]["final"]) for arm in ARMS}
        found.append(
            Claim(
                f"RL raises step {token['step']}, operand {token['operand']}'s comma more under the prioritized KL",
                "prioritized above standard (10 seeds; numbers not printed)",
                f"{percent(difference, '+')} points: {final['prioritized']}% against {final['standard']}% "
                f"({plots.counted(token['pairs'], 'seed')}{setting})",
                (difference,),
                LIES_ABOVE[difference.side()],
                rule,
            )
        )
    return found


def text(results: Results) -> str:
    """The six tokens as a Markdown table of probabilities in percent."""
    last = (f"{arm}, last round" for arm in ARMS)
    rows = []
    for token in results["tokens"]:
        standard, prioritized = (token["arms"][arm] for arm in ARMS)
        shown = [percent(interval) for interval in (standard["before"], standard["final"], prioritized["final"])]
        difference = percent(token["final_difference"], "+")
        rows.append([f"{token['step']}, {token['operand']}", *shown, difference, token["verdict"]])
    return markdown(["comma of step, operand", "before", *last, "difference, paired", ""], rows)


def draw(results: Results) -> Figure:
    operands = sorted({token["operand"] for token in results["tokens"]})
    figure = Figure(figsize=(11, 3.2 * len(operands)))
    panels = figure.subplots(len(operands), 3, sharex=True, sharey=True, squeeze=False)
    for token in results["tokens"]:
        panel = panels[operands.index(token["operand"]), token["step"] - 1]
        by_arm = {arm: np.array(values["curves"], float) for arm, values in token["arms"].items()}
        plots.curves(panel, np.array(results["episodes"]), by_arm, label="{arm} KL")
        difference = f"{percent(token['final_difference'], '+')} points: {token['verdict']}"
        panel.set_title(f"comma of step {token['step']}, operand {token['operand']}\n{difference}", fontsize=10)
    panels[0, 0].set_ylim(top=1.01)
    for panel in panels[:, 0]:
        panel.set_ylabel("probability of the right character")
    for panel in panels[-1]:
        panel.set_xlabel("RL episodes")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    caption = (
        f"{plots.spread(len(results['seeds']))}{whose_certainty(results['config']['run'])}; below the panels' names: "
        "prioritized minus standard in the last round, paired by seed, with 95% interval"
    )
    place: dict[str, Any] = {"loc": "outside upper center", "ncols": len(ARMS)}
    figure.legend(handles, labels, title=caption, **place)
    return figure


def measure(command: Figure7Command) -> Results:
    """``summarize`` of a run's directory, with the run's config, device and wall seconds."""
    run = command.run
    complete = all((run / name).is_file() for name in ("config.json", "metrics.jsonl", "results.json"))
    require(complete, "run", str(run), f"{FINISHED_RUN} --out {run}")
    config, made = read_json(run / "config.json", "run"), read_json(run / "results.json", "run")
    records = read_metrics(run / "metrics.jsonl", "run")
    with reading.only_read(run, "run", applies=True):
        try:
            results = summarize(config, records)
        except ConfigError as error:
            raise ConfigError(f"{error} (here: {run})") from error
        kept = {name: made[name] for name in ("device", "platform", "wall_seconds")}
    metrics_sha256 = hashlib.sha256((run / "metrics.jsonl").read_bytes()).hexdigest()
    return results | {
        "config": {"command": COMMAND, "run": config, "metrics_sha256": metrics_sha256},
        **kept,
    }


def judge(results: Results) -> Results:
    return {"claims": as_json(claims(results))}


def main(command: Figure7Command) -> None:
    command = dataclasses.replace(command, out=command.out or command.run / "figure7")
    publish(command, COMMAND, "figure7", measure, text, draw, judge=judge)


if __name__ == "__main__":
    cli.run(main, Figure7Command)
