"""Numbers, tables, answers in words and the figure of ``experiments.regularizers``, from its runs' records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ckl_jax.analysis import plots
from ckl_jax.analysis.statistics import percent
from ckl_jax.runs.records import by_run
from experiments.common import arms as arms_lib
from experiments.common import comparison
from experiments.common.figure import Results, markdown
from experiments.regularizers.methods import ALWAYS, BY_NAME, CONTROLS, Cell, Method

LAST_ROUNDS = 3


def screened(run: arms_lib.Run, cells: Iterable[Cell]) -> dict[str, dict[str, Any]]:
    """By cell: accuracy over the last rounds of every seed, and accuracy on the old lengths after them.

    Where the answers are of an older policy (``staleness``) it is that of the test after the last round, which is
    higher while the policy improves: 2 to 12 points in our runs of Figure 4.
    """
    rounds, tests = by_run(run.records, "success"), by_run(run.records, "test_old")
    last = run.config["config"]["rounds"]
    counted = range(max(1, last - LAST_ROUNDS + 1), last + 1)
    found = {}
    for cell in cells:
        success = [float(np.mean([rounds[cell.name, seed, step]["success"] for step in counted])) for seed in run.seeds]
        if _is_stale(cell.method):
            success = [tests[cell.name, seed, last]["test_target"] for seed in run.seeds]
        old = [tests[cell.name, seed, last]["test_old"] for seed in run.seeds]
        kl = [rounds[cell.name, seed, last]["kl"] for seed in run.seeds]
        values = {"success": success, "old": old, "kl": kl}
        found[cell.name] = {"method": cell.method.name, "share": cell.share, **values}
    return found


def _is_stale(method: Method) -> bool:
    return method.overrides.get("staleness", 0) > 0


def best_shares(screen: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Every method's best share and its mean accuracy ``success`` in the screen, the best method first."""
    best: dict[str, tuple[float, float]] = {}
    for cell in screen.values():
        reached = float(np.mean(cell["success"])), cell["share"]
        best[cell["method"]] = max(reached, best.get(cell["method"], reached))
    ordered = sorted(best.items(), key=lambda item: item[1], reverse=True)
    return {name: {"success": success, "share": share} for name, (success, share) in ordered}


def choose(best: Iterable[str], leaders: int) -> list[str]:
    """What is confirmed: those in ``ALWAYS``, and the first ``leaders`` others, of the methods from best to worst."""
    best = list(best)
    return [*(name for name in ALWAYS if name in best), *[name for name in best if name not in ALWAYS][:leaders]]


def confirmed(
    run: arms_lib.Run, cells: Iterable[Cell], chosen: Iterable[str], earlier: Mapping[str, Any]
) -> dict[str, Any]:
    """Curves and intervals by method, pairs against standard, and prioritization against its controls.

    Args:
      chosen: all methods that are confirmed, in their order.
      earlier: such results; what the run has not is taken from there.
    """
    names = {cell.name: cell.method.name for cell in cells}
    renamed = [record | {"arm": names[record["arm"]]} for record in run.records]
    results = comparison.summarize(run._replace(records=renamed), names.values())
    if not renamed:
        results |= {name: earlier[name] for name in ("test_episodes", "round_episodes")}
    results["arms"] = {name: results["arms"].get(name) or earlier["arms"][name] for name in chosen}
    against = [comparison.pair(results, name, "standard") for name in results["arms"] if name != "standard"]
    controls = [comparison.pair(results, "prioritized", name) for name in CONTROLS if name in results["arms"]]
    return {**results, "against_standard": against, "against_controls": controls}


def text(results: Results) -> str:
    """Everything as Markdown: the screen, and where it was run the confirmation with its answers."""
    parts = [screen_table(results)]
    if "confirmation" in results:
        parts += [confirmation_table(results), *answers(results["confirmation"])]
    return "\n\n".join(parts) + f"\n{results['wall_seconds']:.0f} s of fine-tuning"


def _share(results: Results, name: str) -> str:
    return f"{results['best'][name]['share']:g}x" if BY_NAME[name].strength else "-"


def screen_table(results: Results) -> str:
    """A line per method, best first: mean accuracy over the last rounds at each share."""
    grid = sorted(results["config"]["grid"])
    success = {(cell["method"], cell["share"]): np.mean(cell["success"]) for cell in results["screen"].values()}
    rows = []
    for name in results["best"]:
        shares = grid if BY_NAME[name].strength else [1.0]
        shown = [f"{100 * success[name, share]:.1f}" for share in shares] + [""] * (len(grid) - len(shares))
        at = _share(results, name) if name in results["chosen"] else ""
        tested = (
            " (tested after the last round: higher than the others' last rounds)" if _is_stale(BY_NAME[name]) else ""
        )
        rows.append([name, *shown, at, BY_NAME[name].idea + tested])
    return markdown(["method", *(f"{share:g}x" for share in grid), "confirmed at", "what it is"], rows)


def confirmation_table(results: Results) -> str:
    """A line per method: accuracies in percent, the exact KL in nats a token, the critical comma's probability."""
    found = results["confirmation"]
    rows = []
    pairs = {pair["arm"]: pair for pair in found["against_standard"]}
    for name, values in found["arms"].items():
        target, old, comma = (percent(values[key]) for key in ("target_after", "old_after", "comma_after"))
        paired = [percent(pairs[name]["target"], "+"), pairs[name]["verdict"]] if name in pairs else ["", ""]
        rows.append([name, _share(results, name), target, *paired, old, f"{values['kl_after'][0]:.4f}", comma])
    after = (f"{results['digits']} digits after", "minus standard, paired", "", "old lengths after")
    methods = markdown(["method", "share", *after, "last KL", "last comma"], rows)
    return f"{methods}\n\n{comparison.table(found['against_controls'], results['digits'])}"


def answers(found: dict[str, Any]) -> list[str]:
    """The questions of the module's docstring, in words computed from the intervals."""
    of_verdict = {
        word: [pair["arm"] for pair in found["against_standard"] if pair["verdict"] == word] for word in comparison.SAID
    }
    listed = "; ".join(f"{comparison.SAID[word]} it: {', '.join(of_verdict[word]) or 'none'}" for word in of_verdict)
    without = [
        f"Is a KL needed at all? Without one training is {comparison.SAID[pair['verdict']]} the standard KL "
        f"({percent(pair['target'], '+')} points)."
        for pair in found["against_standard"]
        if pair["arm"] == "no_kl"
    ]
    missing = [name for name in CONTROLS if name not in found["arms"]]
    which = f"of those that were run (not: {', '.join(missing)}) " if missing else ""
    return [
        f"Does prioritization beat its own controls? {which}{comparison.beats_all(found['against_controls'])}.",
        f"Against the standard KL, each at its own coefficient: {listed}.",
        *without,
    ]


def draw(results: Results) -> Figure:
    """The screen, and where it was run the confirmation: curves, paired differences, accuracy against KL."""
    if "confirmation" in results:
        figure = Figure(figsize=(11, 9.5))
        panels = figure.subplots(2, 2, height_ratios=(1.15, 1))
        _draw_screen(panels[0, 0], results)
        _draw_confirmation(panels[0, 1], panels[1, 0], panels[1, 1], results)
    else:
        figure = Figure(figsize=(7, 6.5))
        axes = figure.subplots()
        _draw_screen(axes, results)
    figure.suptitle(f"Regularizers in RL on {results['digits']} digits")
    return figure


def _draw_screen(axes: Axes, results: Results) -> None:
    grid = sorted(results["config"]["grid"])
    shades = dict(zip(grid, colormaps["viridis_r"](np.linspace(0.15, 0.95, len(grid))), strict=True))
    cells, row = results["screen"].values(), {name: number for number, name in enumerate(results["best"])}
    for share in grid:
        shown = [cell for cell in cells if cell["share"] == share and BY_NAME[cell["method"]].strength]
        x = [100 * np.mean(cell["success"]) for cell in shown]
        axes.plot(x, [row[c["method"]] for c in shown], "o", color=shades[share], label=f"{share:g}x", alpha=0.9)
    fixed = [cell for cell in cells if not BY_NAME[cell["method"]].strength]
    axes.plot([100 * np.mean(c["success"]) for c in fixed], [row[c["method"]] for c in fixed], "D", color=plots.INK)
    axes.set_yticks(range(len(row)), [f"{name} *" if name in results["chosen"] else name for name in row])
    axes.invert_yaxis()
    seeds, rounds = (results["config"][name] for name in ("screen_seeds", "screen_rounds"))
    title = f"screen: {plots.counted(seeds, 'seed')}, {plots.counted(rounds, 'round')} (* confirmed)"
    axes.set(xlabel="accuracy over the last rounds (%)", title=title)
    axes.legend(title="strength", loc="lower right")


def _draw_confirmation(curves: Axes, differences: Axes, frontier: Axes, results: Results) -> None:
    found = results["confirmation"]
    colors = plots.colors_of(found["arms"])
    for arm, values in found["arms"].items():
        before = arms_lib.episodes_before_answers(found, BY_NAME[arm].overrides)
        mean = 100 * np.array(values["collect_success"]).mean(axis=0)
        curves.plot(before, mean, color=colors[arm], label=arm, linewidth=2)
    title = f"confirmation: {plots.counted(len(found['seeds']), 'other seed')}"
    curves.set(xlabel="RL episodes", ylabel="accuracy on each round's new problems (%)", title=title)
    pairs = found["against_standard"]
    values = [100 * np.array(pair["differences"]) for pair in pairs]
    labels = [pair["arm"] for pair in pairs]
    comparison.rows(differences, values, labels, [colors[name] for name in labels])
    differences.axvline(0, color=plots.INK, linewidth=1)
    differences.set_xlabel("accuracy after RL minus standard's, paired by seed (points)")
    for arm in found["arms"]:
        kl = np.array(found["arms"][arm]["kl"])[:, -1]
        reached = 100 * arms_lib.after(found, arm)
        frontier.plot(kl, reached, ".", color=colors[arm], alpha=0.5, markersize=5)
        frontier.plot(
            kl.mean(), reached.mean(), "o", color=colors[arm], markersize=9, markeredgecolor="white", label=arm
        )
    frontier.set(xlabel="exact KL to the pre-trained model, last round (nats a token)", ylabel="accuracy after RL (%)")
    frontier.set_xscale("log")
    low, high = frontier.get_xlim()
    if high < 30 * low:  # Else labels in scientific notation lie on each other.
        plots.plain_ticks(frontier.xaxis)
    curves.legend(fontsize=9, loc="upper left", ncols=2)
