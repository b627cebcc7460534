"""Arms against a common control, paired by seed: the differences, their verdicts, and both in words and in a panel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ckl_jax.analysis import plots
from ckl_jax.analysis.statistics import Side, holm, mean_interval, paired_p, percent
from ckl_jax.runs.records import critical_probability
from ckl_jax.tasks.task import Task
from experiments.common import arms as arms_lib
from experiments.common.figure import Results, markdown

JUDGED: dict[Side, str] = {"above": "better", "below": "worse", "undecided": "undecided"}
"""A pair's verdict from its difference."""
SAID = {"better": "better than", "worse": "worse than", "undecided": "not told apart from"}


def last_comma(extra_digits: int) -> int:
    """Where a record's critical tokens have the comma before the last digit of a list of that many more than N."""
    return 2 * (extra_digits - 1)


def critical_comma(task: Task, extra_digits: int, step: int = 1) -> Callable[[Mapping[str, Any]], float]:
    """Probability of the right character at a step's critical comma of the last operand that can have one (operand 2,
    in multiplication 1), as a function of a round's record."""
    return lambda record: critical_probability(record, step, task.long_operands[-1], last_comma(extra_digits))


def summarize(run: arms_lib.Run, arms: Iterable[str]) -> Results:
    """``arms.summarize`` with the weight of the KL and the critical comma of every round, the mean of that weight over
    the rounds, and the last KL and comma."""
    comma = critical_comma(run.task, run.config["config"]["extra_digits"])
    of_rounds = {"kl_weight": lambda record: record["kl_weight"], "comma": comma}
    results = arms_lib.summarize(run, arms, of_rounds)
    for values in results["arms"].values():
        commas = np.array(values["comma"], float)[:, -1]
        values["weight"] = mean_interval(np.mean(values["kl_weight"], axis=1))
        values["kl_after"] = mean_interval(np.array(values["kl"])[:, -1])
        values["comma_after"] = mean_interval(commas[~np.isnan(commas)]).within(0, 1)
    return results


def pair(results: Mapping[str, Any], arm: str, control: str) -> dict[str, Any]:
    """Differences of an arm and a control after the last round, paired by seed, with Student's 95% intervals.

    Args:
      results: as ``arms.summarize`` gives them.
    """

    def differences(curve: str) -> np.ndarray:
        return arms_lib.after(results, arm, curve) - arms_lib.after(results, control, curve)

    target = differences("learning_curve")
    interval = mean_interval(target).within(-1, 1)
    return {
        "arm": arm,
        "control": control,
        "target": interval,
        "old": mean_interval(differences("old_curve")).within(-1, 1),
        "differences": target.tolist(),
        "verdict": JUDGED[interval.side()],
    }


def corrected(pairs: Sequence[Mapping[str, Any]], level: float = 0.05) -> list[dict[str, Any]]:
    """Pairs of one family with p-values corrected for their number, and verdicts by these instead of the intervals."""
    p = holm([paired_p(np.array(found["differences"])) for found in pairs])
    judged = []
    for found, value in zip(pairs, p, strict=True):
        side: Side = "undecided" if not value < level else "above" if found["target"][0] > 0 else "below"
        judged.append({**found, "p_holm": value, "verdict": JUDGED[side]})
    return judged


def beats_all(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Whether one arm is better than all its controls, with their names.

    Returns:
      "yes" if it is better than every one, "no" if it is worse than one, else "undecided"; then what of which.
    """
    of_verdict = {word: [found["control"] for found in pairs if found["verdict"] == word] for word in SAID}
    word = "no" if of_verdict["worse"] else "undecided" if of_verdict["undecided"] else "yes"
    return f"{word}: " + "; ".join(f"{SAID[key]} {', '.join(names)}" for key, names in of_verdict.items() if names)


def table(pairs: Sequence[Mapping[str, Any]], digits: int) -> str:
    """A line per pair, in percentage points, as Markdown; with corrected p-values where they are."""
    rows, of_family = [], ["p (Holm)"] * any("p_holm" in found for found in pairs)
    for found in pairs:
        target, old = (percent(found[name], "+") for name in ("target", "old"))
        p = [f"{found['p_holm']:.3g}"] if of_family else []
        rows.append([f"{found['arm']} - {found['control']}", target, *p, found["verdict"], old])
    return markdown(["difference, paired", f"{digits} digits", *of_family, "", "old lengths"], rows)


def rows(
    axes: Axes, values: Sequence[np.ndarray], labels: Sequence[str], colors: Sequence[Any], least: float = -100
) -> None:
    """A row per array over seeds, in %: their mean, and its 95% interval or, with few seeds, a point for each.

    Args:
      least: what no value can be below: 0 for accuracies.
    """
    for row, (of_seeds, color) in enumerate(zip(values, colors, strict=True)):
        mean, low, high = mean_interval(of_seeds).within(least, 100)
        few = len(of_seeds) < plots.FEW_SEEDS
        error = None if few else [[mean - low], [high - mean]]
        axes.errorbar(mean, row, xerr=error, color=color, **plots.POINT)
        if few:
            axes.plot(of_seeds, np.full(len(of_seeds), row), ".", color=color, markersize=5)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(False, axis="y")


def after_panel(axes: Axes, results: Mapping[str, Any], colors: Mapping[str, Any], digits: int) -> None:
    """A row per arm: its accuracy after training."""
    arms = list(results["arms"])
    rows(axes, [100 * arms_lib.after(results, arm) for arm in arms], arms, [colors[arm] for arm in arms], 0)
    axes.set_xlabel(f"accuracy on {digits} digits after RL (%)")


def pairs_panel(axes: Axes, pairs: Sequence[Mapping[str, Any]], colors: Mapping[str, Any]) -> None:
    """A row per pair, in the color of its control."""
    labels = [f"{found['arm']} - {found['control']}" for found in pairs]
    differences = [100 * np.array(found["differences"]) for found in pairs]
    rows(axes, differences, labels, [colors[found["control"]] for found in pairs])
    axes.axvline(0, color=plots.INK, linewidth=1)
    axes.set_xlabel("difference after RL, paired by seed (points)")
