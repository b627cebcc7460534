"""Figure 2, Tables 4 and 5: how far pre-trained models add beyond the N digits that they were trained on.

    python -m experiments.figure2_pretraining
    python -m experiments.figure2_pretraining --scale gpt2                  # the paper's size, N = 7 and 9
    python -m experiments.figure2_pretraining --scale gpt2 --digits 7 9 11 13 --pretrain.model.block-size 2048 \\
        --pretrained runs/pretrained_2048 --out runs/figure2_2048

Accuracy on N, N + 1, N + 2 and N + 3 digits of models of several N, where both operands have that many digits
(*identical*) or one has and the other's length is drawn from 1 up to it (*varying*), decoded greedily: the paper does
not say how it decodes. A cell whose longest answer (plus ``extra_length``) the block cannot hold "does not fit".

The models come from the cache that experiments share (``common.models``); the missing ones are trained first. A call
that was interrupted goes on with the same command, and cells that are done are kept; ``--plot-only`` draws again.

Intervals shown are the bootstrap's over problems, as in the paper. The rules below read Wilson's score interval
instead, which keeps a width at 0% and 100% (all of 95%). They were written before any model but tiny's N = 5 was
measured (that one had 82.9% identical and 96.2% varying, 0.1% and 36.6% with a digit more). Each asks whether one
interval lies above another: *reproduced* if it does, *not reproduced* if it lies below, else *undecided*. For identical
and varying operands each:

- high at N: the accuracy at N lies above 90%.
- falls at N+1: the accuracy at N lies above that at N + 1.
- almost none at N+3: the accuracy at N + 3 lies below 1%. For N up to 9; the paper's larger models keep some.
- larger N better at N+1, N+2, N+3: the accuracy of the largest N lies above that of the smallest.
- the paper's number at N .. N+3, at the scale gpt2 and the paper's N alone: *reproduced* if the paper's interval and
  ours overlap, else *not reproduced*. At other sizes its numbers stand beside ours and are not comparable.
"""

from __future__ import annotations

import itertools
import pathlib
import sys
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import tyro
from matplotlib.figure import Figure

from ckl_jax import tasks
from ckl_jax.analysis.statistics import Interval, bootstrap_interval, percent, share_interval
from ckl_jax.checkpoint.store import Model, fingerprint
from ckl_jax.errors import require
from ckl_jax.evaluate import DRAWS, judge_cell
from ckl_jax.fields import NonNegativeInt, PositiveInt, require_fields
from ckl_jax.runs.directory import RunDirectory
from ckl_jax.runtime import cli
from ckl_jax.tasks.catalog import TaskName
from experiments.common.claims import LIES_ABOVE, LIES_BELOW, OVERLAP
from experiments.common.figure import Results, markdown, publish
from experiments.common.models import Models, colors_of, models_preset
from experiments.common.pretraining_claims import compared, figure2_claims, task_of

COMMAND = "experiments.figure2_pretraining"
BEYOND = range(4)
LENGTHS = ("N", "N+1", "N+2", "N+3")
HIGH, ALMOST_NONE, NONE_UP_TO = Interval(0.9, 0.9, 0.9), Interval(0.01, 0.01, 0.01), 9
PAPER = {
    "identical": {
        7: ((98.9, 0.7), (48.8, 3.0), (0.0, 0.0), (0.0, 0.0)),
        9: ((96.4, 0.6), (78.9, 2.4), (0.5, 0.5), (0.0, 0.0)),
        11: ((91.2, 1.3), (75.1, 2.7), (30.7, 2.4), (0.2, 0.3)),
        13: ((93.0, 1.6), (88.9, 2.1), (67.7, 3.1), (20.4, 2.4)),
    },
    "varying": {
        7: ((100.0, 0.0), (69.0, 2.4), (0.0, 0.0), (0.0, 0.0)),
        9: ((97.0, 0.6), (89.4, 1.8), (6.9, 1.3), (0.0, 0.0)),
        11: ((94.4, 1.4), (87.0, 2.1), (53.7, 3.2), (7.3, 1.6)),
        13: ((95.6, 1.4), (92.5, 1.9), (84.7, 2.4), (51.8, 3.2)),
    },
}


@dataclass(frozen=True)
class Figure2Command:
    """Figure 2: accuracy of pre-trained models on N to N + 3 digits, for several N."""

    models: Annotated[Models, tyro.conf.arg(name="")] = field(default_factory=Models)
    out: pathlib.Path = pathlib.Path("runs/figure2")
    """Directory of the results: new, empty, or of the same command interrupted."""
    problems: PositiveInt = 1000
    """Problems per cell."""
    seed: NonNegativeInt = 0
    """Of the problems."""
    extra_length: NonNegativeInt = tasks.EXTRA_LENGTH
    """Characters that an answer may be longer than the longest right one."""
    plot_only: bool = False
    """Table and figure again from results.json."""

    def __post_init__(self) -> None:
        require_fields(self)
        beyond = max(self.models.digits) + max(BEYOND)
        require(beyond <= tasks.MAX_DIGITS, "digits", self.models.digits, f"up to {tasks.MAX_DIGITS - max(BEYOND)}")


def preset(scale: str = "tiny", pretrain_task: TaskName = "addition") -> Figure2Command:
    extra_length = tasks.EXTRA_LENGTH if scale == "tiny" else 40
    return Figure2Command(models_preset(scale, pretrain_task), extra_length=extra_length)


def measure_cell(command: Figure2Command, model: Model, operands: str, digits: int) -> dict[str, Any]:
    """One cell: how many problems are solved, with both intervals, or that the block is too short for it."""
    cell = {"max_pretrain_digits": model.max_pretrain_digits, "operands": operands, "digits": digits}
    longest, block = model.task.longest_episode(digits, command.extra_length), model.config.block_size
    if longest > block:
        return cell | {"fits": False, "characters": longest, "block_size": block}
    settings: dict[str, Any] = {"seed": command.seed, "extra_length": command.extra_length}
    solved = judge_cell(model, operands, digits, command.problems, **settings)
    return cell | {
        "fits": True,
        "problems": len(solved),
        "solved": int(solved.sum()),
        "accuracy": (float(solved.mean()), *bootstrap_interval(solved)),
        "score_interval": share_interval(int(solved.sum()), len(solved)),
    }


def verdicts(cells: list[dict[str, Any]], scale: str, task: str = "addition") -> list[dict[str, Any]]:
    """The module's rules on all cells: claim, operands, N (or the two compared), verdict, the intervals that decide.

    The paper's numbers are of additions at its own scale, and compared with these alone.
    """
    found = []

    def add(claim: str, operands: str, digits: list[int], one: Any, other: Any, rule=LIES_ABOVE) -> None:
        said = {"claim": claim, "operands": operands, "max_pretrain_digits": digits}
        verdict = rule[Interval(*one).side(other)] if one and other else "does not fit"
        found.append(said | {"verdict": verdict, "intervals": (one, other)})

    by_cell = {(c["operands"], c["max_pretrain_digits"], c["digits"]): c.get("score_interval") for c in cells}
    bases = sorted({cell["max_pretrain_digits"] for cell in cells})
    for operands in DRAWS:
        for base in bases:
            at = [by_cell[operands, base, base + k] for k in BEYOND]
            add("high at N", operands, [base], at[0], HIGH)
            add("falls at N+1", operands, [base], at[0], at[1])
            if base <= NONE_UP_TO:
                add("almost none at N+3", operands, [base], at[3], ALMOST_NONE, LIES_BELOW)
            if scale == "gpt2" and task == "addition" and base in PAPER[operands]:
                for k, (mean, half) in enumerate(PAPER[operands][base]):
                    bounds = Interval(mean / 100, (mean - half) / 100, (mean + half) / 100)
                    theirs = bounds if half else share_interval(round(10 * mean), 1000)  # Theirs has no width there.
                    add(f"the paper's number at {LENGTHS[k]}", operands, [base], at[k], theirs, OVERLAP)
        low, high = bases[0], bases[-1]
        for k in BEYOND[1:] if low < high else ():
            compared = by_cell[operands, high, high + k], by_cell[operands, low, low + k]
            add(f"larger N better at {LENGTHS[k]}", operands, [high, low], *compared)
    return found


def table(results: Results) -> str:
    """Our cells above the paper's, in percent, and the verdicts, as Markdown."""
    lines: list[list[str]] = []
    for operands in DRAWS:
        rows: dict[int, list[str]] = {}
        for cell in results["cells"]:
            if cell["operands"] == operands:
                rows.setdefault(cell["max_pretrain_digits"], []).append(_shown(cell))
        lines += [[operands, str(base), *cells] for base, cells in rows.items()]
        for base, numbers in PAPER[operands].items() if task_of(results) == "addition" else ():
            lines.append([f"{operands}, paper (85M)", str(base), *(f"{mean:g} ± {half:g}" for mean, half in numbers)])
    said = [[row["claim"], row["operands"], compared(row), row["verdict"]] for row in results["verdicts"]]
    cells = markdown(["operands", "N", "N digits", *LENGTHS[1:]], lines)
    return f"{cells}\n\n{markdown(['claim', 'operands', 'N', 'verdict'], said)}"


def _shown(cell: dict[str, Any]) -> str:
    return percent(cell["accuracy"]) if cell["fits"] else "does not fit"


def draw(results: Results) -> Figure:
    figure = Figure(figsize=(10, 4.6))
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    bases = sorted({cell["max_pretrain_digits"] for cell in results["cells"]})
    colors = colors_of(bases)
    for panel, operands in zip(panels, DRAWS, strict=True):
        for base in bases:
            of_base = [c for c in results["cells"] if c["max_pretrain_digits"] == base and c["operands"] == operands]
            cells = [cell for cell in of_base if cell["fits"]]
            mean, low, high = (100 * np.array([cell["accuracy"][part] for cell in cells]) for part in range(3))
            style: dict[str, Any] = {"marker": "o", "markeredgecolor": "white", "linewidth": 2}
            x = [cell["digits"] for cell in cells]
            panel.errorbar(x, mean, [mean - low, high - mean], label=f"N = {base}", color=colors[base], **style)
        panel.set(title=f"{operands} lengths", xlabel="digits")
        panel.set_xticks(range(bases[0], bases[-1] + max(BEYOND) + 1))
    panels[0].set(ylabel="greedy accuracy (%)", ylim=(-2, 102))
    title = "pre-trained on up to N digits"
    figure.legend(*panels[1].get_legend_handles_labels(), title=title, loc="outside lower center", ncols=len(bases))
    return figure


def measure(command: Figure2Command) -> Results:
    """All cells, those of an interrupted call kept, with verdicts, config and wall seconds of evaluating."""
    settings = {name: getattr(command, name) for name in ("problems", "seed", "extra_length")}
    described = {"command": COMMAND, "models": command.models.describe(), **settings}
    directory = RunDirectory(command.out, described)
    directory.rewind_metrics(sys.maxsize)  # Half-written lines alone: a cell stays.
    logged = directory.metrics()
    done = {(cell["checkpoint"], cell["operands"], cell["digits"]): cell for cell in logged}
    steps = itertools.count(len(logged) + 1)
    cells: list[dict[str, Any]] = []
    for config in command.models.configs:
        model = command.models.load(config)
        name = fingerprint(model.params)
        for digits, operands in itertools.product((config.max_digits + k for k in BEYOND), DRAWS):
            key = (name, operands, digits)
            if key not in done:
                started, step = time.monotonic(), next(steps)
                done[key] = {"step": step, "checkpoint": name, **measure_cell(command, model, operands, digits)}
                directory.log([done[key]])
                directory.log_seconds(step, time.monotonic() - started)
            cells.append(done[key])
            print(f"N = {config.max_digits}, {digits} digits, {operands}: {_shown(done[key])}", flush=True)
    return {
        "cells": cells,
        "verdicts": verdicts(cells, command.models.scale, command.models.pretrain.task),
        "paper": {operands: {str(base): row for base, row in rows.items()} for operands, rows in PAPER.items()},
        "seeds": [command.seed],
        "config": described,
        "wall_seconds": directory.seconds(),
    }


def judge(results: Results) -> Results:
    return {"claims": figure2_claims(results)}


def text(results: Results) -> str:
    return f"{table(results)}\n{results['wall_seconds']:.0f} s of evaluating"


def main(command: Figure2Command) -> None:
    publish(command, COMMAND, "figure2", measure, text, draw, judge=judge)


if __name__ == "__main__":
    cli.run(main, Figure2Command, preset)
