"""Does prioritization beat its own controls? Figure 4's comparison, with what else could explain its gain.

    python -m experiments.controls
    python -m experiments.controls --seeds 10     # two seeds decide nothing

J^beta lowers the KL's total pressure, makes it uneven, and lowers it on chosen tokens. Each arm keeps some of that:

| arm | weight of a token's KL | its pressure | it answers |
|---|---|---|---|
| standard | 1 | 1 | the paper's comparison |
| prioritized | J^beta | mean J^beta | - |
| matched | the round's mean of J^beta | mean J^beta | is it only less pressure? |
| shuffled | J^beta, permuted over the round's tokens | mean J^beta | or that and unevenness, on any tokens? |
| renormalized | J^beta over its mean | 1 | does the choice of tokens help at full pressure? |
| standard_0.1x, ... | 1, the coefficient times ``--grid`` | the share | is it only a coefficient that was too large? |
| no_kl | 0 | 0 | is any KL needed here? |

All arms are one program: the same problems, first episodes and budget. Four times Figure 4's runs, so about 22
minutes on 2 CPU cores (extrapolated, not timed). Settings were chosen on the prioritized arm more often than on the
standard one (results/tiny/figure4/tries.md); the grid makes up for that in the coefficient alone.

Written down before any run. Hypotheses: (1) prioritized ends above standard, as in Figure 4's published run. (2) If
less pressure explains that, then matched, no_kl or a smaller coefficient reach it too. (3) If the choice of tokens
matters, shuffled stays below prioritized, and renormalized ends above standard. What was known: in Figure 4's run the
mean J^150 of a round was 0.91 to 0.95 (over seeds), so matched and standard differ little.

What is compared: accuracy on N + 1 digits after the last round, on common test problems, paired by seed; the mean
difference over seeds with Student's 95% interval. A pair's verdict: better if the interval is above 0, worse if below,
else undecided. The answer: yes if prioritized is better than every arm but renormalized (which prioritizes too); no if
it is worse than one of them; else undecided. A yes needs every interval, so it needs no correction for their number; a
single pair's verdict, and a no, have none. All else that is reported decides nothing: the old lengths, the mean weight
(over the rounds), and of the last round (its episodes, the policy before its last update) the exact KL to the
pre-trained model and the probability of the critical comma of step 1 / operand 2.

An interrupted run goes on with the same command; ``--plot-only`` makes table and figure again from its metrics.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ckl_jax.analysis import plots
from ckl_jax.analysis.statistics import percent
from ckl_jax.config import FinetuneConfig
from ckl_jax.errors import require
from ckl_jax.runtime import cli
from experiments.common import arms as arms_lib
from experiments.common import comparison
from experiments.common.figure import Results, markdown, whose_certainty

COMMAND = "experiments.controls"
PRIORITIZING = ("prioritized", "renormalized")
SAME_WEIGHTS = ("standard", "prioritized", "matched", "shuffled", "renormalized")


@dataclass(frozen=True)
class ControlsCommand(arms_lib.ArmsCommand):
    """The prioritized KL against its controls: less pressure, other tokens, smaller coefficients, no KL."""

    out: pathlib.Path = pathlib.Path("runs/controls")
    """Directory of the run: new, empty, or of the same command interrupted."""
    grid: tuple[float, ...] = (0.1, 0.3)
    """Smaller coefficients of the standard KL, as shares of `kl_coefficient`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        config = self.config
        require(config.beta > 0, "beta", config.beta, "above 0")
        require(config.kl_coefficient > 0, "kl_coefficient", config.kl_coefficient, "above 0, the arm no_kl has 0")
        require(config.kl_target is None, "kl_target", config.kl_target, "None, as the arm no_kl has no coefficient")
        prioritized = config.kl_weights == "prioritized"
        require(prioritized, "kl_weights", config.kl_weights, "prioritized, the other arms have the others")
        shares = len({f"{share:g}" for share in self.grid if 0 < share < 1}) == len(self.grid)
        require(shares, "grid", self.grid, "different numbers between 0 and 1, both excluded")


preset = ControlsCommand.preset


def arms(config: FinetuneConfig, grid: Sequence[float]) -> dict[str, dict[str, Any]]:
    uniform: dict[str, Any] = {"kl_weights": "uniform"}
    alpha = config.kl_coefficient
    smaller = {f"standard_{share:g}x": uniform | {"kl_coefficient": share * alpha} for share in sorted(grid)}
    words = {word: {"kl_weights": word} for word in SAME_WEIGHTS[1:]}
    return {"standard": uniform, **words, **smaller, "no_kl": uniform | {"kl_coefficient": 0.0}}


def summarize(run: arms_lib.Run) -> Results:
    """Per-seed values, means with 95% intervals over seeds, pairs and the answer."""
    by_name = arms(FinetuneConfig(**run.config["config"]), run.config["grid"])
    results = comparison.summarize(run, by_name)
    for arm, values in results["arms"].items():
        values["kl_coefficient"] = by_name[arm].get("kl_coefficient", run.config["config"]["kl_coefficient"])
    pairs = [comparison.pair(results, "prioritized", arm) for arm in by_name if arm != "prioritized"]
    full = comparison.pair(results, "renormalized", "standard")
    return {**results, "pairs": [*pairs, full], "answer": answer(pairs, full)}


def answer(pairs: Sequence[Mapping[str, Any]], full: Mapping[str, Any]) -> str:
    """Does prioritization beat its own controls? In words; see the module's rule."""
    word = comparison.beats_all([found for found in pairs if found["control"] not in PRIORITIZING])
    said = comparison.SAID[full["verdict"]]
    at_full = f"renormalized is {said} standard ({percent(full['target'], '+')} points)"
    return f"Does prioritization beat its own controls? {word}. At full pressure, {at_full}."


def text(results: Results, run: arms_lib.Run) -> str:
    """Arms and pairs as Markdown tables, shares in percent, the answer and how long the run took."""
    rows = []
    for arm, values in results["arms"].items():
        target, old, comma = (percent(values[name]) for name in ("target_after", "old_after", "comma_after"))
        weight, kl = (values[name][0] for name in ("weight", "kl_after"))
        rows.append([arm, f"{values['kl_coefficient']:g}", f"{weight:.3f}", target, old, f"{kl:.4f}", comma])
    before = next(iter(results["arms"].values()))["target_before"][0]
    rows.append(["before", "", "", f"{100 * before:.1f}", "", "0", ""])
    after = (f"{run.digits} digits after", "old lengths after", "last KL", "last comma")
    tables = [
        markdown(["arm", "coefficient", "mean weight", *after], rows),
        comparison.table(results["pairs"], run.digits),
    ]
    return "\n\n".join([*tables, f"{results['answer']}\n{results['wall_seconds']:.0f} s"])


def draw(results: Results, run: arms_lib.Run) -> Figure:
    digits = run.digits
    names = list(results["arms"])
    colors = plots.colors_of(names)
    figure = Figure(figsize=(11, 8))
    panels = figure.subplots(2, 2, height_ratios=(1.2, 1))
    panels[0, 0].sharey(panels[0, 1])
    before = arms_lib.episodes_before_answers(results, run.config["config"])
    less = tuple(arm for arm in names if arm not in SAME_WEIGHTS[2:])
    success = {arm: np.array(values["collect_success"]) for arm, values in results["arms"].items()}
    titles = {"J^beta and its controls": SAME_WEIGHTS, "less KL": less}
    for panel, (title, shown) in zip(panels[0], titles.items(), strict=True):
        plots.curves(panel, before, {arm: success[arm] for arm in shown}, scale=100, colors=colors)
        panel.set(xlabel="RL episodes", title=title)
        panel.legend(loc="upper left", fontsize=9)
    panels[0, 0].set_ylabel(f"accuracy on each round's {digits}-digit problems (%)")
    panels[0, 0].set_ylim(0, 1.3 * panels[0, 0].get_ylim()[1])
    comparison.after_panel(panels[1, 0], results, colors, digits)
    comparison.pairs_panel(panels[1, 1], results["pairs"], colors)
    spread = plots.spread(len(results["seeds"]))
    figure.suptitle(f"RL on {digits} digits{whose_certainty(run.config)}, {spread}")
    return figure


def main(command: ControlsCommand) -> None:
    of_run = arms(command.config, command.grid)
    arms_lib.publish(command, COMMAND, "controls", of_run, summarize, text, draw, grid=command.grid)


if __name__ == "__main__":
    cli.run(main, ControlsCommand, preset)
