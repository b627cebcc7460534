"""Table 1 and section 3.3: critical tokens are those a pre-trained model is unsure of, and they decide the answer.

    python -m experiments.table1_certainty_gap
    python -m experiments.table1_certainty_gap --checkpoints runs/n3 runs/n5 runs/n7        # one row each
    python -m experiments.table1_certainty_gap --certainty negentropy_max_prob --certainty-temperature 4   # authors' J

Each checkpoint answers RL problems of N + 1 digits, sampled at temperature 1. Delta J is the certainty J of the
pre-trained model at a token minus the mean certainty of the other tokens of that answer.

*Critical*: the mean over the critical tokens recorded in an answer (the comma and the digit, of both operands, in steps
1 to 3, as far as that operand was copied rightly), then the mean over answers. The single kinds are listed below it.

*Non-critical (minimum)*: the paper gives a minimum of something "averaged over 50 generations" and does not say over
what. Here: Delta J is averaged over the answers at each place of the scratchpad's grammar (line, word of the line,
character of the word; recorded critical tokens left out; places that a fifth of the answers reach), and the lowest of
these means is given. Its interval is that of the place found, so it leaves out that it was chosen for being low. Two
other readings stand beside it: each answer's lowest Delta J, averaged over answers; and the mean of all non-critical
tokens.

Intervals are Student's over answers, for shares Wilson's, all of 95%. Verdicts, with rules fixed before the first run:

- criterion 2, the gap: *holds* if the interval of the critical tokens lies below that of the non-critical minimum,
  *fails* if it lies above, else *undecided*.
- criterion 1, "if it is wrong, the final answer is almost surely wrong": *holds* if, of the answers with a wrong
  critical token, the share that ended wrong has its lower end at 95% or more, *fails* if its upper end is below, else
  *undecided*. How many answers without one ended right is reported beside it; the paper claims nothing of it.
- the gap's size: *as in the paper* if the intervals of both overlap at the same N.

Expect a minute on 2 CPU cores for the tiny checkpoint, half of it compiling.
"""

from __future__ import annotations

import dataclasses
import pathlib
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from ckl_jax.analysis import critical
from ckl_jax.analysis.critical import Measuring
from ckl_jax.checkpoint.shipped import SHIPPED_TINY
from ckl_jax.checkpoint.store import Model, fingerprint, load_model
from ckl_jax.errors import naming, require
from ckl_jax.fields import PositiveInt, require_fields
from ckl_jax.runtime import cli
from ckl_jax.runtime.paths import require_directory
from ckl_jax.tasks import problems as problems_lib
from experiments.common.claims import as_json
from experiments.common.figure import Results, publish
from experiments.table1_certainty_gap.counting import criterion_1, delta_j
from experiments.table1_certainty_gap.tables import text
from experiments.table1_certainty_gap.verdicts import PAPER, claims, sides, verdicts

COMMAND = "experiments.table1_certainty_gap"


@dataclass(frozen=True)
class Table1Command:
    """Table 1: how much less certain pre-trained models are of critical tokens, and whether those decide the answer."""

    checkpoints: tuple[pathlib.Path, ...] = (SHIPPED_TINY,)
    """Pre-trained models, a row each: directories with params/ and model.json; default: the tiny one that ships."""
    out: pathlib.Path = pathlib.Path("runs/table1")
    """Directory that results.json is written to, over an older one."""
    generations: PositiveInt = 50
    """Answers per model that Delta J is averaged over."""
    criterion_generations: PositiveInt = 1000
    """Answers per model that criterion 1 is counted on; the first of them are those of Delta J."""
    sampling: Annotated[Measuring, tyro.conf.arg(name="")] = field(default_factory=Measuring)
    plot_only: bool = False
    """Tables and verdicts again from results.json, without the models."""

    def __post_init__(self) -> None:
        require_fields(self)
        require(len(self.checkpoints) > 0, "checkpoints", self.checkpoints, "1 or more directories")
        require_directory(self.out, "out")


def _row(command: Table1Command, model: Model, name: str) -> dict[str, Any]:
    base = model.max_pretrain_digits
    count = max(command.generations, command.criterion_generations)
    rng = problems_lib.measured_on(command.sampling.seed, base + 1)
    problems = model.task.rl_problems(rng, count, base + 1, base)
    generations = critical.sample(model, problems, base + 1, command.sampling)
    gap = delta_j(generations.first(command.generations))
    criterion = criterion_1(generations.first(command.criterion_generations))
    return {
        "max_pretrain_digits": base,
        "checkpoint": fingerprint(model.params),
        "task": model.task.name,
        "name": name,
        "generations": command.generations,
        "problems": [f"{problem.a}{model.task.operator}{problem.b}" for problem in problems[: command.generations]],
        "delta_j": gap,
        "criterion_1": criterion,
    }


def measure(command: Table1Command) -> Results:
    """A row per model, with config."""
    with naming("checkpoints", instead_of="checkpoint"):
        models = [load_model(path) for path in command.checkpoints]
    for model in models:
        critical.require_room(model, model.max_pretrain_digits + 1, command.sampling.extra_length)
    rows = [_row(command, model, path.name) for model, path in zip(models, command.checkpoints, strict=True)]
    config = {"command": COMMAND, **dataclasses.asdict(command)}
    for name in ("checkpoints", "out", "plot_only"):
        del config[name]
    return {
        "models": rows,
        "definition": "non-critical minimum: lowest mean over answers of all places that a fifth of the answers reach",
        "paper": {str(base): values for base, values in PAPER.items()},
        "seeds": [command.sampling.seed],
        "config": config,
    }


def judge(results: Results) -> Results:
    """Every model's verdicts, and the claims."""

    def said(row: dict[str, Any]) -> dict[str, str]:
        return verdicts(sides(row))

    models = [row | {"verdicts": said(row)} for row in results["models"]]
    return {"models": models, "claims": as_json(claims(models))}


def main(command: Table1Command) -> None:
    publish(command, COMMAND, "table1", measure, text, judge=judge)


if __name__ == "__main__":
    cli.run(main, Table1Command)
