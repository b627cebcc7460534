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
from dataclasses import dataclass, field
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.axes import Axes

from ckl_jax import cli, plots
from ckl_jax.checkpoint import SHIPPED_TINY, load_model, write_json
from ckl_jax.config import require
from ckl_jax.finetune import describe, finetune, make_runs, make_task
from ckl_jax.finetune_config import FinetuneConfig, finetune_preset
from ckl_jax.runs import RunDirectory, by_run, critical_probability, machine
from ckl_jax.statistics import mean_interval, percent

COMMA, SECOND_OPERAND = 0, 2
PRIORITIZING = ("prioritized", "renormalized")
SAME_WEIGHTS = ("standard", "prioritized", "matched", "shuffled", "renormalized")
PALETTE = ("#55a868", "#c44e52", "#8172b3", "#8c8c8c", "#64b5cd", "#937860", "#da8bc3", "#ccb974")


@dataclass(frozen=True)
class ControlsCommand:
    """The prioritized KL against its controls: less pressure, other tokens, smaller coefficients, no KL."""

    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = field(default_factory=FinetuneConfig)
    checkpoint: pathlib.Path = SHIPPED_TINY
    """Pre-trained model: a directory with params/ and model.json; default: the tiny one that ships with the package."""
    out: pathlib.Path = pathlib.Path("runs/controls")
    """Directory of the run: new, empty, or of the same command interrupted."""
    seeds: int = 2
    """Seeds per arm."""
    grid: tuple[float, ...] = (0.1, 0.3)
    """Smaller coefficients of the standard KL, as shares of `kl_coefficient`."""
    plot_only: bool = False
    """Table and figure again from the metrics of a finished run."""

    def __post_init__(self) -> None:
        config = self.config
        require(config.beta > 0, "beta", config.beta, "above 0")
        require(config.kl_coefficient > 0, "kl_coefficient", config.kl_coefficient, "above 0, the arm no_kl has 0")
        prioritized = config.kl_weights == "prioritized"
        require(prioritized, "kl_weights", config.kl_weights, "prioritized, the other arms have the others")
        shares = len({f"{share:g}" for share in self.grid if 0 < share < 1}) == len(self.grid)
        require(shares, "grid", self.grid, "different numbers between 0 and 1, both excluded")


def preset(scale: str = "tiny", recipe: str = "ours") -> ControlsCommand:
    return ControlsCommand(finetune_preset(scale, recipe))


def arms(command: ControlsCommand) -> dict[str, dict[str, Any]]:
    uniform: dict[str, Any] = {"kl_weights": "uniform"}
    alpha = command.config.kl_coefficient
    smaller = {f"standard_{share:g}x": uniform | {"kl_coefficient": share * alpha} for share in sorted(command.grid)}
    words = {word: {"kl_weights": word} for word in SAME_WEIGHTS[1:]}
    return {"standard": uniform, **words, **smaller, "no_kl": uniform | {"kl_coefficient": 0.0}}


def summarize(command: ControlsCommand, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Per-seed values, means with 95% intervals over seeds, pairs and the answer, from metrics.jsonl's records."""
    config = command.config
    names = list(arms(command))
    seeds = list(range(config.seed, config.seed + command.seeds))
    tests, rounds = by_run(records, "test_target"), by_run(records, "success")
    test_steps, round_steps = (sorted({step for _, _, step in found}) for found in (tests, rounds))
    by_arm: dict[str, Any] = {}
    for arm in names:
        of_tests = [[tests[arm, seed, step] for step in test_steps] for seed in seeds]
        of_rounds = [[rounds[arm, seed, step] for step in round_steps] for seed in seeds]
        curves = {name: [[record[f"test_{name}"] for record in row] for row in of_tests] for name in ("target", "old")}
        curves |= {name: [[r[name] for r in row] for row in of_rounds] for name in ("success", "kl", "kl_weight")}
        curves["comma"] = [[critical_probability(r, 1, SECOND_OPERAND, COMMA) for r in row] for row in of_rounds]
        commas = np.array(curves["comma"], float)[:, -1]
        by_arm[arm] = {
            "kl_coefficient": arms(command)[arm].get("kl_coefficient", config.kl_coefficient),
            "curves": curves,
            "before": float(np.mean(curves["target"], axis=0)[0]),
            **{f"{name}_after": mean_interval(np.array(curves[name])[:, -1]) for name in ("target", "old", "kl")},
            "weight": mean_interval(np.mean(curves["kl_weight"], axis=1)),
            "comma_after": mean_interval(commas[~np.isnan(commas)]),
        }
    pairs = [pair(by_arm, "prioritized", arm) for arm in names if arm != "prioritized"]
    pairs.append(pair(by_arm, "renormalized", "standard"))
    return {
        "seeds": seeds,
        "test_episodes": [step * config.episodes for step in test_steps],
        "round_episodes": [step * config.episodes for step in round_steps],
        "arms": by_arm,
        "pairs": pairs,
        "answer": answer(pairs),
    }


def pair(by_arm: Mapping[str, Any], arm: str, control: str) -> dict[str, Any]:
    """Differences of an arm and a control after the last round, paired by seed, and the verdict."""

    def differences(name: str) -> np.ndarray:
        one, other = (np.array(by_arm[of]["curves"][name])[:, -1] for of in (arm, control))
        return one - other

    found = {name: mean_interval(differences(name)) for name in ("target", "old")}
    of_seeds = differences("target").tolist()
    return {"arm": arm, "control": control, **found, "differences": of_seeds, "verdict": verdict(found["target"])}


def verdict(difference: tuple[float, float, float]) -> str:
    """What a pair's difference (mean, low, high) says; see the module's rule."""
    _, low, high = difference
    return "better" if low > 0 else "worse" if high < 0 else "undecided"


def answer(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Does prioritization beat its own controls? In words; see the module's rule."""
    of_verdict: dict[str, list[str]] = {"better": [], "worse": [], "undecided": []}
    for found in pairs:
        if found["arm"] == "prioritized" and found["control"] not in PRIORITIZING:
            of_verdict[found["verdict"]].append(found["control"])
    word = "no" if of_verdict["worse"] else "undecided" if of_verdict["undecided"] else "yes"
    said = {"better": "better than", "worse": "worse than", "undecided": "not told apart from"}
    parts = [f"{said[key]} {', '.join(of_verdict[key])}" for key in said if of_verdict[key]]
    (full,) = (found for found in pairs if found["arm"] == "renormalized")
    at_full = f"renormalized is {said[full['verdict']]} standard ({percent(full['target'], '+')} points)"
    return f"Does prioritization beat its own controls? {word}: {'; '.join(parts)}. At full pressure, {at_full}."


def table(results: dict[str, Any], digits: int) -> str:
    """Arms and pairs as Markdown tables, shares in percent, and the answer."""
    columns = f"arm | coefficient | mean weight | {digits} digits after | old lengths after | last KL | last comma"
    lines = [f"| {columns} |", "|---|---|---|---|---|---|---|"]
    for arm, values in results["arms"].items():
        target, old, comma = (percent(values[name]) for name in ("target_after", "old_after", "comma_after"))
        weight, kl = (values[name][0] for name in ("weight", "kl_after"))
        lines.append(f"| {arm} | {values['kl_coefficient']:g} | {weight:.3f} | {target} | {old} | {kl:.4f} | {comma} |")
    before = next(iter(results["arms"].values()))["before"]
    lines += [f"| before | | | {100 * before:.1f} | | 0 | |", ""]
    lines += [f"| difference, paired | {digits} digits | | old lengths |", "|---|---|---|---|"]
    for found in results["pairs"]:
        target, old = (percent(found[name], "+") for name in ("target", "old"))
        lines.append(f"| {found['arm']} - {found['control']} | {target} | {found['verdict']} | {old} |")
    return "\n".join([*lines, "", results["answer"]])


def draw(results: dict[str, Any], digits: int, directory: pathlib.Path) -> None:
    names = list(results["arms"])
    others = [arm for arm in names if arm not in plots.COLORS]
    colors = plots.COLORS | {arm: PALETTE[index % len(PALETTE)] for index, arm in enumerate(others)}
    figure, panels = plt.subplots(2, 2, figsize=(11, 8), layout="constrained", height_ratios=(1.2, 1))
    panels[0, 0].sharey(panels[0, 1])
    before = np.array(results["round_episodes"]) - results["round_episodes"][0]
    less = tuple(arm for arm in names if arm not in SAME_WEIGHTS[2:])
    success = {arm: np.array(values["curves"]["success"]) for arm, values in results["arms"].items()}
    titles = {"J^beta and its controls": SAME_WEIGHTS, "less KL": less}
    for panel, (title, shown) in zip(panels[0], titles.items(), strict=True):
        panel.set_prop_cycle(color=[colors[arm] for arm in shown if arm in others])
        plots.curves(panel, before, {arm: success[arm] for arm in shown}, scale=100)
        panel.set(xlabel="RL episodes", title=title)
        panel.legend(frameon=False, loc="upper left", fontsize=9)
    panels[0, 0].set_ylabel(f"accuracy on each round's {digits}-digit problems (%)")
    panels[0, 0].set_ylim(0, 1.3 * panels[0, 0].get_ylim()[1])
    after = {arm: 100 * np.array(results["arms"][arm]["curves"]["target"])[:, -1] for arm in names}
    _rows(panels[1, 0], list(after.values()), names, [colors[arm] for arm in names])
    panels[1, 0].set_xlabel(f"accuracy on {digits} digits after RL (%)")
    pairs = {f"{found['arm']} - {found['control']}": found for found in results["pairs"]}
    differences = [100 * np.array(found["differences"]) for found in pairs.values()]
    _rows(panels[1, 1], differences, list(pairs), [colors[found["control"]] for found in pairs.values()])
    panels[1, 1].axvline(0, color=plots.INK, linewidth=1)
    panels[1, 1].set(xlabel="difference after RL, paired by seed (points)")
    figure.suptitle(f"RL on {digits} digits, {len(results['seeds'])} seeds")
    plots.save(figure, directory, "controls")


def _rows(axes: Axes, values: Sequence[np.ndarray], labels: Sequence[str], colors: Sequence[str]) -> None:
    """A row per array over seeds: their mean, and its 95% interval or, with few seeds, a point for each."""
    for row, (of_seeds, color) in enumerate(zip(values, colors, strict=True)):
        mean, low, high = mean_interval(of_seeds)
        few = len(of_seeds) < plots.FEW_SEEDS
        error = None if few else [[mean - low], [high - mean]]
        axes.errorbar(mean, row, xerr=error, fmt="o", markersize=8, capsize=4, color=color, markeredgecolor="white")
        if few:
            axes.plot(of_seeds, np.full(len(of_seeds), row), ".", color=color, markersize=5)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    axes.spines[["top", "right"]].set_visible(False)


def main(command: ControlsCommand) -> None:
    config = command.config
    model = load_model(command.checkpoint)
    make_task(config, model)
    make_runs(config, arms(command), command.seeds)
    described = {"command": "experiments.controls", "grid": command.grid, **describe(command, model)}
    if command.plot_only:
        require((command.out / "results.json").exists(), "plot_only", str(command.out), "a finished run's directory")
    directory = RunDirectory(command.out, described)
    if not command.plot_only:
        finetune(config, model, directory, arms(command), command.seeds)
    results = summarize(command, directory.metrics())
    results |= {"config": described, **machine(), "wall_seconds": directory.seconds()}
    digits = model.max_pretrain_digits + config.extra_digits
    write_json(directory.path / "results.json", results)
    draw(results, digits, directory.path)
    print(table(results, digits))
    print(f"{results['wall_seconds']:.0f} s; results.json, controls.png and controls.svg in {directory.path}")


if __name__ == "__main__":
    cli.run(main, ControlsCommand, preset)
