"""Figure 4: the prioritized against the standard KL penalty, N -> N + 1 digits.

    python -m experiments.figure4_prioritized_kl
    python -m experiments.figure4_prioritized_kl --seeds 10     # narrower intervals in five times the time
    python -m experiments.figure4_prioritized_kl --task subtraction    # or multiplication, which is by one digit

Top: accuracy on N + 1 digits against RL episodes, on each round's new problems (lines) and on the common test problems
(points). Bottom: probability of the right character at the two critical commas of operand 2 (in multiplication, whose
second operand is one digit, 1) in steps 1 and 2, on the policy's own generations. Both arms share problems, noise and
budget; they differ in beta alone (0 against 150). An interrupted run goes on with the same command; ``--plot-only``
draws again.
"""

from __future__ import annotations

import pathlib
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from ckl_jax.analysis import plots
from ckl_jax.analysis.statistics import percent
from ckl_jax.config import FinetuneConfig
from ckl_jax.errors import require
from ckl_jax.runtime import cli
from experiments.common import arms as arms_lib
from experiments.common import comparison
from experiments.common.claims import LIES_ABOVE, Claim, as_json
from experiments.common.figure import Results, markdown, whose_certainty

COMMAND = "experiments.figure4_prioritized_kl"


@dataclass(frozen=True)
class Figure4Command(arms_lib.ArmsCommand):
    """Figure 4: prioritized against standard KL penalty over several seeds."""

    out: pathlib.Path = pathlib.Path("runs/figure4")
    """Directory of the run: new, empty, or of the same command interrupted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.config.kl_coefficient > 0, "kl_coefficient", self.config.kl_coefficient, "above 0")
        require(self.config.beta > 0, "beta", self.config.beta, "above 0, the standard arm has 0")
        word = self.config.kl_weights
        require(word == "prioritized", "kl_weights", word, "prioritized: others are arms of experiments.regularizers")


preset = Figure4Command.preset


def arms(config: FinetuneConfig) -> dict[str, dict[str, float]]:
    return {"standard": {"beta": 0.0}, "prioritized": {"beta": config.beta}}


def summarize(run: arms_lib.Run) -> Results:
    """Per-seed values, means with 95% intervals over seeds, paired differences, and the claim."""
    extra = run.config["config"]["extra_digits"]
    lines = {f"critical_comma_step{line}": comparison.critical_comma(run.task, extra, line) for line in (1, 2)}
    results = arms_lib.summarize(run, ("standard", "prioritized"), lines)
    pair = comparison.pair(results, "prioritized", "standard")
    results["paired_difference"] = {name: pair[name] for name in ("target", "old")}
    return results | {"claims": as_json(claims(results, run))}


def claims(results: Results, run: arms_lib.Run) -> list[Claim]:
    difference = results["paired_difference"]["target"]
    return [
        Claim(
            f"After training the prioritized KL solves more problems of {run.digits} digits than the standard KL",
            "prioritized above standard (7 to 8 digits, 10 seeds; numbers not printed)",
            f"{percent(difference, '+')} points ({run.setting}, {plots.counted(len(results['seeds']), 'seed')})",
            (difference,),
            LIES_ABOVE[difference.side()],
            "final accuracy, prioritized minus standard of the same seed: reproduced if Student's 95% interval over "
            "seeds is above 0, not reproduced if it is below, else undecided",
        )
    ]


def text(results: Results, run: arms_lib.Run) -> str:
    """The summary as a Markdown table, in percent, and how long the run took."""
    target = f"{run.digits} digits"
    header = ["arm", f"{target} before", f"{target} after", "gain", "old lengths before", "old lengths after"]
    rows = []
    for arm, values in results["arms"].items():
        before, old_before = (f"{100 * values[name][0]:.1f}" for name in ("target_before", "old_before"))
        after, old_after = (percent(values[name]) for name in ("target_after", "old_after"))
        rows.append([arm, before, after, percent(values["target_gain"], "+"), old_before, old_after])
    paired, old = (percent(results["paired_difference"][name], "+") for name in ("target", "old"))
    rows.append(["prioritized - standard, paired", "", paired, "", "", old])
    return f"{markdown(header, rows)}\n{results['wall_seconds']:.0f} s"


def draw(results: Results, run: arms_lib.Run) -> Figure:
    digits, operand = run.digits, run.task.long_operands[-1]
    figure = Figure(figsize=(9, 7.5))
    grid = figure.add_gridspec(2, 2, height_ratios=[1.25, 1])
    top = figure.add_subplot(grid[0, :])
    collected = {arm: np.array(values["collect_success"]) for arm, values in results["arms"].items()}
    tested = {arm: np.array(values["learning_curve"]) for arm, values in results["arms"].items()}
    before = arms_lib.episodes_before(results)
    answered = arms_lib.episodes_before_answers(results, run.config["config"])
    plots.curves(top, answered, collected, scale=100, label="{arm}, each round's new problems")
    plots.points(top, np.array(results["test_episodes"]), tested, scale=100, label="{arm}, test problems")
    top.set(xlabel="RL episodes", ylabel=f"accuracy on {digits} digits (%)", ylim=(0, 1.25 * top.get_ylim()[1]))
    start = f"{run.task.name}, from N = {run.lengths}{whose_certainty(run.config)}"
    top.set_title(f"{start}, {plots.spread(len(results['seeds']))}")
    top.legend(loc="upper left", ncols=2)
    for line, column in ((1, 0), (2, 1)):
        panel = figure.add_subplot(grid[1, column])
        by_arm = {arm: np.array(v[f"critical_comma_step{line}"], float) for arm, v in results["arms"].items()}
        plots.curves(panel, before, by_arm)
        panel.set(xlabel="RL episodes", ylabel="probability of the right character", ylim=(0, 1.02))
        panel.set_title(f"critical comma, step {line}, operand {operand}")
    return figure


def main(command: Figure4Command) -> None:
    arms_lib.publish(command, COMMAND, "figure4", arms(command.config), summarize, text, draw)


if __name__ == "__main__":
    cli.run(main, Figure4Command, preset)
