"""Figure 6: beta, the exponent of the prioritized KL penalty, over orders of magnitude, N -> N + 1 digits.

    python -m experiments.figure6_beta_sweep
    python -m experiments.figure6_beta_sweep --seeds 10 --betas 10 150 500 1000 10000

Top: accuracy on N + 1 digits against RL episodes, each round's new problems, mean over seeds, a line per beta. Below:
accuracy after training, and the mean weight J^beta that a token's KL has, both against beta. All arms, the standard KL
(beta 0) among them, share problems, noise and budget. An interrupted run goes on with the same command.

A larger beta also lowers the total KL pressure, so three numbers stand beside each arm, means over all rounds: J^beta,
the exact KL of the collecting policy to the pre-trained one, and the weighted KL term of the loss (alpha included).
They say how much pressure an arm had; whether that alone explains its accuracy takes controls, which are not here.

The paper (9 seeds): 10 to 500 slightly better than standard, best at 500, decline from 1000, collapse at 10000. Rules,
written down before the first run, for the accuracy after training, differences paired by seed, Student's 95% intervals
over seeds: *reproduced* if the interval is above 0, *not reproduced* if below, else *undecided*, of

- slightly better: the mean over the betas from 10 to 500, minus standard;
- best at 500: 500 minus the other arm (standard included) with the highest mean. That arm is picked for being high,
  which makes *reproduced* harder to reach and *not reproduced* easier;
- decline from 1000: 500 minus 1000;
- collapse at 10000: standard minus 10000.

Each beta's own difference to standard is in the table (above, below or undecided by its interval), with no correction
for there being several. A claim about a beta that was not swept is left out, and so is the best one where none below
500 or none above it was. Two seeds took 15 minutes on 2 CPU cores at the tiny scale, beside other jobs.
"""

from __future__ import annotations

import pathlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from ckl_jax.analysis import plots
from ckl_jax.analysis.statistics import Interval, mean_interval, mean_intervals, percent
from ckl_jax.config import FinetuneConfig
from ckl_jax.errors import require
from ckl_jax.fields import PositiveFloat
from ckl_jax.runtime import cli
from experiments.common import arms as arms_lib
from experiments.common import comparison
from experiments.common.claims import LIES_ABOVE, Claim, as_json
from experiments.common.figure import Results, markdown, whose_certainty

COMMAND = "experiments.figure6_beta_sweep"
STANDARD, STANDARD_COLOR = "standard", "0.25"
PRESSURES = {"kl_weight": "kl_weight", "kl": "kl", "kl_loss": "loss/kl"}
RULE = "{}, final accuracy paired by seed: reproduced if Student's 95% interval is above 0, not reproduced if below"


@dataclass(frozen=True)
class Figure6Command(arms_lib.ArmsCommand):
    """Figure 6: the prioritized KL penalty over beta, and the standard one, over several seeds."""

    out: pathlib.Path = pathlib.Path("runs/figure6")
    """Directory of the run: new, empty, or of the same command interrupted."""
    betas: tuple[PositiveFloat, ...] = (10.0, 150.0, 500.0, 1000.0, 10000.0)
    """Exponents of the certainty J, one arm each; the standard arm has 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        distinct = len({arm_name(beta) for beta in self.betas}) == len(self.betas) > 0
        require(distinct, "betas", self.betas, "1 or more numbers that differ in 6 digits")
        default = FinetuneConfig.beta
        require(self.config.beta == default, "beta", self.config.beta, f"{default:g}: here --betas names them")
        require(self.config.kl_coefficient > 0, "kl_coefficient", self.config.kl_coefficient, "above 0")
        place = self.config.kl_in
        require(place == "loss", "kl_in", place, "loss: the figure draws the KL as a term of it")
        word = self.config.kl_weights
        require(word == "prioritized", "kl_weights", word, "prioritized, with beta 0 the standard KL")


preset = Figure6Command.preset


def arm_name(beta: float) -> str:
    return f"beta_{beta:g}" if beta else STANDARD


def summarize(run: arms_lib.Run) -> Results:
    """Per-seed curves, the KL pressure, and differences to the standard arm, means with 95% intervals, and claims.

    Raises:
      ConfigError: the config names no betas.
    """
    betas = sorted(run.config.get("betas", ()))
    require(len(betas) > 0, "out", betas, f"a run of {COMMAND}")
    names = [arm_name(beta) for beta in (0.0, *betas)]
    of_rounds = {name: (lambda record, key=key: record[key]) for name, key in PRESSURES.items()}
    results = arms_lib.summarize(run, names, of_rounds)
    for arm, values in results["arms"].items():
        values["pressure"] = {name: mean_interval(np.mean(values[name], axis=1)) for name in PRESSURES}
        pair = comparison.pair(results, arm, STANDARD)
        values |= {f"{name}_minus_standard": pair[name] for name in ("target", "old")}
        values["against_standard"] = values["target_minus_standard"].side()
    results["betas"] = betas
    return results | {"claims": as_json(claims(results, run))}


def claims(results: Results, run: arms_lib.Run) -> list[Claim]:
    """What the paper says of Figure 6 about the betas that were swept, by the rules of this module's docstring."""
    betas = results["betas"]
    final = {beta: arms_lib.after(results, arm_name(beta)) for beta in (0.0, *betas)}
    seeds = plots.counted(len(results["seeds"]), "seed")
    found = []

    def add(claim: str, paper: str, what: str, paired: np.ndarray) -> None:
        difference = mean_interval(paired).within(-1, 1)
        here = f"{what}: {percent(difference, '+')} points ({run.setting}, {seeds})"
        found.append(Claim(claim, paper, here, (difference,), LIES_ABOVE[difference.side()], RULE.format(what)))

    moderate = [beta for beta in betas if 10 <= beta <= 500]
    if moderate:
        named = f"mean over beta {', '.join(f'{beta:g}' for beta in moderate)} minus standard"
        paired = np.mean([final[beta] for beta in moderate], axis=0) - final[0.0]
        add("Beta from 10 to 500 is slightly better than the standard KL", "slightly better, 9 seeds", named, paired)
    if 500.0 in betas and betas[0] < 500 < betas[-1]:
        rival = max((beta for beta in final if beta != 500.0), key=lambda beta: final[beta].mean())
        named = f"beta 500 minus the best other arm ({f'beta {rival:g}' if rival else STANDARD})"
        add("Beta 500 is the best", "best at 500", named, final[500.0] - final[rival])
    if 500.0 in betas and 1000.0 in betas:
        paired = final[500.0] - final[1000.0]
        add("Accuracy declines from beta 1000 on", "decline from 1000", "beta 500 minus beta 1000", paired)
    if 10000.0 in betas:
        paired = final[0.0] - final[10000.0]
        add("Training collapses at beta 10000", "collapse at 10000", "standard minus beta 10000", paired)
    return found


def text(results: Results, run: arms_lib.Run) -> str:
    """An arm per line, as Markdown: KL pressure as means over rounds, accuracies in percent. Then the claims."""
    accuracies = (f"{run.digits} digits after", "minus standard, paired", "old lengths after", "against standard")
    rows = []
    for arm, values in results["arms"].items():
        pressure = [Interval(*values["pressure"][name]).text(".3g") for name in PRESSURES]
        difference = "" if arm == STANDARD else percent(values["target_minus_standard"], "+")
        accuracy = [percent(values["target_after"]), difference, percent(values["old_after"])]
        said = "" if arm == STANDARD else values["against_standard"]
        rows.append([arm.replace("_", " "), *pressure, *accuracy, said])
    table = markdown(["arm", "J^beta", "KL, nats", "weighted KL loss", *accuracies], rows)
    claimed = [f"{claim['claim']}: {claim['verdict']} ({claim['here']})" for claim in results["claims"]]
    return "\n".join([table, *claimed, f"{results['wall_seconds']:.0f} s"])


def draw(results: Results, run: arms_lib.Run) -> Figure:
    digits, betas = run.digits, results["betas"]
    shades = colormaps["plasma_r"](np.linspace(0.12, 0.95, len(betas)))
    colors: dict[str, Any] = {STANDARD: STANDARD_COLOR} | dict(zip(map(arm_name, betas), shades, strict=True))
    figure = Figure(figsize=(9, 7.5))
    grid = figure.add_gridspec(2, 2, height_ratios=[1.25, 1])
    top, left, right = (figure.add_subplot(place) for place in (grid[0, :], grid[1, 0], grid[1, 1]))
    before = arms_lib.episodes_before_answers(results, run.config["config"])
    labels = {STANDARD: STANDARD} | {arm_name(beta): f"beta {beta:,.12g}" for beta in betas}
    for arm, values in results["arms"].items():
        mean, _, _ = mean_intervals(np.array(values["collect_success"]))
        style: dict[str, Any] = {"linewidth": 2.5, "linestyle": "--"} if arm == STANDARD else {"linewidth": 2}
        top.plot(before, 100 * mean, color=colors[arm], label=labels[arm], **style)
    top.set(xlabel="RL episodes", ylabel=f"accuracy on {digits} digits (%)", ylim=(0, None))
    start = f"from N = {run.lengths}{whose_certainty(run.config)}"
    top.set_title(f"{start}, mean over {plots.counted(len(results['seeds']), 'seed')}")
    top.legend(loc="upper left", ncols=2)

    standard = results["arms"][STANDARD]
    final = arms_lib.after(results, STANDARD)
    mean, low, high = standard["target_after"]
    if len(final) < plots.FEW_SEEDS:
        low, high = final.min(), final.max()
    left.axhline(100 * mean, color=STANDARD_COLOR, linestyle="--", label=STANDARD)
    left.axhspan(100 * low, 100 * high, color=STANDARD_COLOR, alpha=0.12, linewidth=0)
    left.axhline(100 * standard["target_before"][0], color=STANDARD_COLOR, linestyle=":", label="before training")
    right.axhline(1, color=STANDARD_COLOR, linestyle="--", label=STANDARD)
    for beta in betas:
        arm = arm_name(beta)
        values = results["arms"][arm]
        final, weights = arms_lib.after(results, arm), np.mean(values["kl_weight"], axis=1)
        for panel, measured, scale in ((left, final, 100), (right, weights, 1)):
            by_arm = {arm: measured[:, None]}
            plots.points(panel, np.array([beta]), by_arm, scale=scale, label="_{arm}", colors=colors)
    for panel in (left, right):
        panel.set(xscale="log", xlabel="beta", ylim=(0, None))
        panel.set_ylim(top=1.15 * panel.get_ylim()[1])
        panel.legend(fontsize=8, loc="upper right", ncols=2)
    left.set_ylabel(f"accuracy on {digits} digits (%)")
    right.set_ylabel("weight of a token's KL")
    right.set_title("mean of J^beta over all rounds", fontsize=10)
    left.set_title(f"tests after training, {plots.spread(len(final))}", fontsize=10)
    return figure


def main(command: Figure6Command) -> None:
    betas = sorted(command.betas)
    arms = {arm_name(beta): {"beta": beta} for beta in (0.0, *betas)}
    arms_lib.publish(command, COMMAND, "figure6", arms, summarize, text, draw, betas=betas)


if __name__ == "__main__":
    cli.run(main, Figure6Command, preset)
