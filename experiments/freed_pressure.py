"""Where does J^beta take the KL off, and where do answers go wrong? By the part of the scratchpad, and by beta.

    python -m experiments.freed_pressure --checkpoint N5
    python -m experiments.freed_pressure --checkpoint N5 --certainty-checkpoint tiny
    python -m experiments.freed_pressure --plot-only            # table and figure again from results.json

The pre-trained model answers problems of N + 1 digits, as at the start of RL. A token's KL keeps the weight J^beta,
so 1 - J^beta of it is freed. Shown is which share of all that is freed lies at the known critical tokens, at the other
places where a number has come to N digits or more (``overlong``), and in each remaining part of the scratchpad. Beside
it is the share of the answers with a wrong result whose first character that is not as in the right text stands there,
and the mean of J^beta against beta, of all tokens and of the critical ones.

Shares of what is freed are ratios of sums over all answers, with the bootstrap's 95% interval over answers; shares of
the answers have Wilson's. Nothing is decided by a rule: the table describes a model. It takes 14 seconds on 2 CPU
cores.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.figure import Figure

from ckl_jax.analysis import critical, plots
from ckl_jax.analysis.critical import Generations, Measuring
from ckl_jax.analysis.discovery import part
from ckl_jax.analysis.statistics import bootstrap_ratio, percent, share_interval
from ckl_jax.checkpoint.shipped import SHIPPED_TINY
from ckl_jax.checkpoint.store import fingerprint, load_model
from ckl_jax.errors import require
from ckl_jax.fields import PositiveFloat, PositiveInt, require_fields
from ckl_jax.finetune import certainty_model
from ckl_jax.runtime import cli
from ckl_jax.runtime.paths import require_directory
from ckl_jax.tasks import problems as problems_lib
from experiments.common.figure import Results, markdown, publish, whose_certainty

COMMAND = "experiments.freed_pressure"
CRITICAL = "known critical tokens"
OVERLONG = "from the N-th digit on"


@dataclass(frozen=True)
class FreedPressureCommand:
    """Which tokens of a pre-trained model's answers J^beta frees of the KL."""

    checkpoint: pathlib.Path = SHIPPED_TINY
    """Pre-trained model: a directory with params/ and model.json, or the name of one that ships."""
    out: pathlib.Path = pathlib.Path("runs/freed_pressure")
    """Directory that results.json and the figure are written to, over older ones."""
    answers: PositiveInt = 300
    """Answers that are sampled."""
    beta: PositiveFloat = 150.0
    """Of the table."""
    betas: tuple[float, ...] = (1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 1e5, 1e6)
    """Of the curve."""
    sampling: Annotated[Measuring, tyro.conf.arg(name="")] = field(default_factory=Measuring)
    plot_only: bool = False
    """Table and figure again from results.json."""
    certainty_checkpoint: pathlib.Path | None = None
    """Another pre-trained model of the same N, task and vocabulary, whose J it is."""

    def __post_init__(self) -> None:
        require_fields(self)
        above = len(self.betas) > 0 and all(0 < beta < float("inf") for beta in self.betas)
        require(above, "betas", self.betas, "1 or more numbers above 0")
        require_directory(self.out, "out")


def measure(command: FreedPressureCommand) -> Results:
    """Shares of tokens and of what is freed by part, and the mean weight by beta."""
    model, other = load_model(command.checkpoint), certainty_model(command)
    base = model.max_pretrain_digits
    rng = problems_lib.measured_on(command.sampling.seed, base + 1)
    problems = model.task.rl_problems(rng, command.answers, base + 1, base)
    answers = critical.sample(model, problems, base + 1, command.sampling, other, named="certainty_checkpoint")
    config = {"command": COMMAND, **asdict(command), "checkpoint": fingerprint(model.params)}
    config["certainty_checkpoint"] = None if other is None else fingerprint(other.params)
    for name in ("out", "plot_only"):
        del config[name]
    parts = parts_of(answers, base)
    right = [model.task.answer_text(problem) for problem in problems]
    found = {
        "parts": by_part(answers, parts, command.beta),
        "first_wrong": first_wrong(answers, parts, right),
        "curve": curve(answers, command.betas),
    }
    return {"digits": base + 1, "tokens": int(answers.mask_BxT.sum()), **found, "config": config}


def kept(answers: Generations, beta: float) -> np.ndarray:
    """J^beta, float64 [B, T]."""
    return np.clip(answers.certainty_BxT.astype(np.float64), 0, 1) ** beta


def kind_of(text: str, place: critical.Place) -> str:
    """The part of the scratchpad at a place, of whichever step."""
    return re.sub(r"^step \d+ |(?<=result digit) \d+$", "", part(text, place))


def parts_of(answers: Generations, max_pretrain_digits: int) -> np.ndarray:
    """Of each character the name of its part, "" after the end: [B, T]."""
    found = np.full(answers.mask_BxT.shape, "", object)
    for row in range(len(found)):
        text = answers.text(row)
        found[row, : len(text)] = [kind_of(text, place) for place in critical.places(text)]
    overlong_BxT = np.asarray(problems_lib.overlong_mask(jnp.asarray(answers.answers_BxT), max_pretrain_digits))
    found[overlong_BxT & answers.mask_BxT] = OVERLONG
    found[answers.critical_BxT] = CRITICAL
    return found


def first_wrong(answers: Generations, parts: np.ndarray, right: Sequence[str]) -> dict[str, Any]:
    """By part: share of the answers with a wrong result that leave the right text there first, with its interval."""
    wrong = [(row, text) for row, text in enumerate(right) if not answers.reward_B[row]]
    left = ((row, critical.first_deviation(answers.text(row), text)) for row, text in wrong)
    where = [parts[row, index] for row, index in left if index is not None]
    return {name: share_interval(where.count(name), len(where)) for name in sorted(set(where))}


def by_part(answers: Generations, parts: np.ndarray, beta: float) -> dict[str, Any]:
    """Of every part: share of the tokens, mean J and weight, and share of what is freed with its interval."""
    freed = np.where(answers.mask_BxT, 1 - kept(answers, beta), 0.0)
    found = {}
    for name in sorted({*parts[answers.mask_BxT]}):
        here = parts == name
        found[name] = {
            "tokens": float(here.sum() / answers.mask_BxT.sum()),
            "certainty": float(answers.certainty_BxT[here].mean()),
            "weight": float(1 - freed[here].mean()),
            "freed": bootstrap_ratio(np.where(here, freed, 0.0).sum(axis=1), freed.sum(axis=1)),
        }
    return found


def curve(answers: Generations, betas: tuple[float, ...]) -> dict[str, list[float]]:
    """Mean J^beta of all tokens and of the critical ones at each beta; NaN where the answers came to none."""
    found = {"beta": list(betas)}
    for name, where in {"all": answers.mask_BxT, "critical": answers.critical_BxT}.items():
        found[name] = [float(kept(answers, beta)[where].mean()) if where.any() else float("nan") for beta in betas]
    return found


def text(results: Results) -> str:
    """A line per part, the largest share first, and the curve."""
    beta, parts, wrong = results["config"]["beta"], results["parts"], results["first_wrong"]
    ordered = sorted(parts, key=lambda name: -parts[name]["freed"][0])
    rows = []
    for name in ordered:
        part = parts[name]
        numbers = f"{100 * part['tokens']:.1f}", f"{part['certainty']:.4f}", f"{part['weight']:.3f}"
        first = percent(wrong[name]) if name in wrong else ""
        rows.append([name, *numbers, percent(part["freed"]), first])
    freed = "% of what is freed"
    table = markdown(["characters", "% of all", "mean J", f"mean J^{beta:g}", freed, "% first wrong there"], rows)
    columns = zip(*(results["curve"][name] for name in ("beta", "all", "critical")), strict=True)
    means = markdown(["beta", "all", "critical"], [[f"{b:g}", f"{x:.3f}", f"{y:.3f}"] for b, x, y in columns])
    return f"{table}\n\n{means}\n\n{results['tokens']} characters of {results['config']['answers']} answers"


def draw(results: Results) -> Figure:
    figure = Figure(figsize=(11, 4.4))
    shares, means = figure.subplots(1, 2, width_ratios=(1.5, 1))
    parts: Mapping[str, Any] = results["parts"]
    names = sorted(parts, key=lambda name: -parts[name]["freed"][0])
    at = np.arange(len(names))
    freed = 100 * np.array([parts[name]["freed"] for name in names])
    errors = [freed[:, 0] - freed[:, 1], freed[:, 2] - freed[:, 0]]
    colors = [plots.COLORS["prioritized" if name in (CRITICAL, OVERLONG) else "standard"] for name in names]
    shares.barh(at, freed[:, 0], 0.6, xerr=errors, color=colors, label="of what J^beta takes off the KL")
    tokens = [100 * parts[name]["tokens"] for name in names]
    shares.plot(tokens, at, "D", color="white", markeredgecolor=plots.INK, markersize=6, label="of all characters")
    wrong = [100 * results["first_wrong"].get(name, (0,))[0] for name in names]
    shares.plot(wrong, at, "x", color=plots.INK, markersize=7, label="of wrong answers, first wrong there")
    shares.set_yticks(at, names)
    shares.invert_yaxis()
    shares.grid(False, axis="y")
    shares.set(xlabel="share (%)", title=f"beta = {results['config']['beta']:g}")
    shares.legend(loc="lower right")
    lines = {"all": ("all characters", "standard"), "critical": (CRITICAL, "prioritized")}
    for name, (label, arm) in lines.items():
        mean, color = results["curve"][name], plots.COLORS[arm]
        means.plot(results["curve"]["beta"], mean, "o-", color=color, label=label, markersize=4)
    means.set(xscale="log", ylim=(0, 1.02), xlabel="beta", title="mean J^beta")
    means.legend()
    title = f"answers to {results['digits']} digits before RL{whose_certainty(results['config'])}"
    figure.suptitle(title, color=plots.INK)
    return figure


def main(command: FreedPressureCommand) -> None:
    publish(command, COMMAND, "freed_pressure", measure, text, draw)


if __name__ == "__main__":
    cli.run(main, FreedPressureCommand)
