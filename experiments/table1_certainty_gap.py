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

import collections
import dataclasses
import math
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import tyro

from ckl_jax.analysis import critical
from ckl_jax.analysis.critical import Generations, Measuring
from ckl_jax.analysis.statistics import Interval, Side, mean_interval, percent, share_interval
from ckl_jax.checkpoint.store import SHIPPED_TINY, Model, fingerprint, load_model
from ckl_jax.errors import require
from ckl_jax.runtime import cli
from ckl_jax.runtime.paths import require_directory
from experiments.common.claims import HOLDS, LIES_ABOVE, NOT_COMPARABLE, OVERLAP, Claim, as_json
from experiments.common.figure import Results, markdown, publish

COMMAND = "experiments.table1_certainty_gap"
PAPER = {
    3: ((-0.33, 0.01), (0.0012, 0.0001)),
    5: ((-0.21, 0.18), (0.0002, 0.0001)),
    7: ((-0.13, 0.04), (0.0004, 0.0001)),
}
SHARES = (
    "wrong_critical_ended_wrong",
    "none_wrong_ended_right",
    "all_met_and_right_ended_right",
    "ended_wrong_had_wrong_critical",
)
SHOWN_PLACES = 5
LEAST_SHARE = 0.2
ALMOST_SURELY = 0.95
SIZES: dict[Side, str] = {
    "above": "not as in the paper",
    "below": "not as in the paper",
    "undecided": "as in the paper",
}


@dataclass(frozen=True)
class Table1Command:
    """Table 1: how much less certain pre-trained models are of critical tokens, and whether those decide the answer."""

    checkpoints: tuple[pathlib.Path, ...] = (SHIPPED_TINY,)
    """Pre-trained models, a row each: directories with params/ and model.json; default: the tiny one that ships."""
    out: pathlib.Path = pathlib.Path("runs/table1")
    """Directory that results.json is written to, over an older one."""
    generations: int = 50
    """Answers per model that Delta J is averaged over."""
    criterion_generations: int = 1000
    """Answers per model that criterion 1 is counted on; the first of them are those of Delta J."""
    sampling: Annotated[Measuring, tyro.conf.arg(name="")] = field(default_factory=Measuring)
    plot_only: bool = False
    """Tables and verdicts again from results.json, without the models."""

    def __post_init__(self) -> None:
        require(len(self.checkpoints) > 0, "checkpoints", self.checkpoints, "1 or more directories")
        for name in ("generations", "criterion_generations"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require_directory(self.out, "out")


def _interval(values: np.ndarray) -> Interval:
    return mean_interval(values[np.isfinite(values)])


def delta_j(generations: Generations) -> dict[str, Any]:
    """The row of Table 1: each quantity as (mean, low, high) over answers, and the per-answer values behind it."""
    mask_BxT, recorded = generations.mask_BxT, generations.recorded_Bx3x2xC
    gaps_BxT = critical.certainty_gaps(generations.certainty_BxT, mask_BxT)
    at_critical = np.where(recorded, generations.at_critical(gaps_BxT), np.nan)
    critical_B = critical.mean_where(gaps_BxT, generations.critical_BxT)
    others_BxT = np.where(generations.critical_BxT, np.nan, gaps_BxT)
    lowest_B = np.where(np.isnan(others_BxT), np.inf, others_BxT).min(axis=1)
    common = by_place(generations, others_BxT)
    kinds = [f"n+{slot // 2 + 1}_{('comma', 'digit')[slot % 2]}" for slot in range(at_critical.shape[3])]
    return {
        "critical": _interval(critical_B),
        "noncritical_minimum": _interval(common[0][1] if common else np.zeros(0)),
        "places": len(common),
        "lowest_places": [{**place, "delta_j": _interval(values)} for place, values in common[:SHOWN_PLACES]],
        "noncritical_minimum_of_each_answer": _interval(lowest_B),
        "noncritical_mean": _interval(critical.mean_where(others_BxT, mask_BxT)),
        "mean_certainty": _interval(critical.mean_where(generations.certainty_BxT, mask_BxT)),
        "by_kind": {
            f"step {step + 1}, operand {operand + 1}, {kind}": {
                "delta_j": _interval(at_critical[:, step, operand, slot]),
                "answers": int(recorded[:, step, operand, slot].sum()),
            }
            for step in range(at_critical.shape[1])
            for operand in range(2)
            for slot, kind in enumerate(kinds)
        },
        "per_answer": {
            "critical": _or_none(critical_B),
            "noncritical_lowest": _or_none(lowest_B),
            "recorded": recorded.sum(axis=(1, 2, 3)).tolist(),
            "reward": generations.reward_B.astype(int).tolist(),
        },
    }


def _or_none(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def by_place(generations: Generations, values_BxT: np.ndarray) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Every place that enough answers reach with the finite values [B, T] there, the lowest mean first."""
    found: dict[critical.Place, list[float]] = collections.defaultdict(list)
    written: dict[critical.Place, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for row, values_T in enumerate(values_BxT):
        text = generations.text(row)
        for place, character, value in zip(critical.places(text), text, values_T, strict=False):
            if np.isfinite(value):
                found[place].append(float(value))
                written[place][character] += 1
    least = max(2, math.ceil(LEAST_SHARE * len(values_BxT)))
    common = [
        (
            {
                "line": line,
                "word": word,
                "character": character,
                "mostly": written[line, word, character].most_common(1)[0][0],
                "answers": len(values),
            },
            np.array(values),
        )
        for (line, word, character), values in found.items()
        if len(values) >= least
    ]
    return sorted(common, key=lambda pair: pair[1].mean())


def criterion_1(generations: Generations) -> dict[str, Any]:
    """Counts and (share, low, high): how answers with a wrong critical token, with none, and with all right ended."""
    wrong_B = generations.wrong_critical_B
    recorded_B = generations.recorded_Bx3x2xC.sum(axis=(1, 2, 3))
    ended_right_B = generations.reward_B > 0
    has_wrong_B = wrong_B > 0
    all_right_B = ~has_wrong_B & (recorded_B == generations.expected_B)

    def share(ended_B: np.ndarray, among_B: np.ndarray) -> dict[str, Any]:
        hits, count = int((ended_B & among_B).sum()), int(among_B.sum())
        return {"count": count, "ended_so": hits, "share": share_interval(hits, count)}

    return {
        "generations": len(wrong_B),
        "right": share(ended_right_B, np.ones(len(wrong_B), bool)),
        "wrong_critical_ended_wrong": share(~ended_right_B, has_wrong_B),
        "none_wrong_ended_right": share(ended_right_B, ~has_wrong_B),
        "all_met_and_right_ended_right": share(ended_right_B, all_right_B),
        "ended_wrong_had_wrong_critical": share(has_wrong_B, ~ended_right_B),
    }


def sides(gap: dict[str, Any], criterion: dict[str, Any], max_pretrain_digits: int) -> dict[str, Side]:
    """What the rules of this module's docstring compare, with the side that the claims are on above."""
    critical = Interval(*gap["critical"])
    found: dict[str, Side] = {
        "gap": Interval(*gap["noncritical_minimum"]).side(critical),
        "wrong_critical_token_decides": Interval(*criterion["wrong_critical_ended_wrong"]["share"]).side(ALMOST_SURELY),
    }
    if max_pretrain_digits in PAPER and math.isfinite(critical.low):
        mean, half = PAPER[max_pretrain_digits][0]
        found["size"] = critical.side((mean, mean - half, mean + half))
    return found


def verdicts(found: dict[str, Side]) -> dict[str, str]:
    """The words for ``sides``."""
    return {name: (SIZES if name == "size" else HOLDS)[side] for name, side in found.items()}


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Both criteria and the gap's size for every model, by the rules of this module's docstring."""
    return [claim for row in rows for claim in _claims(row)]


def _claims(row: dict[str, Any]) -> list[Claim]:
    base, gap = row["max_pretrain_digits"], row["delta_j"]
    critical, others = gap["critical"], gap["noncritical_minimum"]
    found = sides(gap, row["criterion_1"], base)
    share = row["criterion_1"]["wrong_critical_ended_wrong"]
    paper = [f"{mean:g} ± {half:g}" for mean, half in PAPER.get(base, ())]
    return [
        Claim(
            f"N = {base}: critical tokens are less certain than all others (Delta J, criterion 2)",
            f"{paper[0]} against {paper[1]} at the least certain others" if paper else "no model of this N",
            f"{_cell(critical)} against {_cell(others)} ({row['generations']} answers)",
            (critical, others),
            LIES_ABOVE[found["gap"]],
            "95% intervals over answers: reproduced if that of the critical tokens lies below that of the non-critical "
            "minimum, not reproduced if above, else undecided",
        ),
        Claim(
            f"N = {base}: how much less certain (Delta J at critical tokens)",
            paper[0] if paper else "no model of this N",
            f"{_cell(critical)} ({row['generations']} answers)",
            (critical,),
            OVERLAP[found["size"]] if "size" in found else NOT_COMPARABLE,
            "reproduced if our 95% interval and the paper's at the same N overlap, else not reproduced; not comparable "
            "where the paper has no such N",
        ),
        Claim(
            f"N = {base}: a wrong critical token makes the answer wrong (criterion 1)",
            "almost surely, no number",
            f"{share['ended_so']} of {share['count']} wrong: {percent(share['share'])}%",
            (share["share"],),
            LIES_ABOVE[found["wrong_critical_token_decides"]],
            "share of the answers with a wrong critical token that end wrong, Wilson's 95% interval: reproduced if its "
            "lower end is 95% or more, not reproduced if its upper end is below, else undecided",
        ),
    ]


def _cell(interval: Sequence[float]) -> str:
    return Interval(*interval).text(".4f")


def text(results: Results) -> str:
    """Table 1 beside the paper's, the kinds of critical tokens, and criterion 1, as Markdown."""
    rows = results["models"]
    return "\n\n".join(
        [
            "Delta J, mean over answers with 95% interval",
            markdown(
                ["N", "critical", "non-critical (minimum)", "paper: critical", "paper: non-critical", "gap", "size"],
                [_gap_cells(row) for row in rows],
            ),
            markdown(["N", "tokens", "Delta J", "answers"], [cells for row in rows for cells in _kind_cells(row)]),
            "Criterion 1, % with 95% interval",
            markdown(
                ["N", "answers", "right", *(name.replace("_", " ") for name in SHARES), "wrong token decides"],
                [_criterion_cells(row) for row in rows],
            ),
            f"{results['wall_seconds']:.0f} s",
        ]
    )


def _gap_cells(row: dict[str, Any]) -> list[str]:
    base, gap, said = row["max_pretrain_digits"], row["delta_j"], row["verdicts"]
    paper = [f"{mean:g} ± {half:g}" for mean, half in PAPER.get(base, ())] or ["-", "-"]
    ours = [_cell(gap[name]) for name in ("critical", "noncritical_minimum")]
    return [str(base), *ours, *paper, said["gap"], said.get("size", "-")]


def _kind_cells(row: dict[str, Any]) -> list[list[str]]:
    base, gap = str(row["max_pretrain_digits"]), row["delta_j"]
    found = list(gap["by_kind"].items())
    for place in gap["lowest_places"]:
        where = f"line {place['line']}, word {place['word']}, character {place['character']}"
        found.append((f"non-critical, {where}, mostly {place['mostly']!r}", place))
    for name in ("noncritical_minimum_of_each_answer", "noncritical_mean"):
        found.append((name.replace("_", " "), {"delta_j": gap[name], "answers": row["generations"]}))
    return [[base, kind, _cell(values["delta_j"]), str(values["answers"])] for kind, values in found]


def _criterion_cells(row: dict[str, Any]) -> list[str]:
    found = row["criterion_1"]
    shares = [f"{found[n]['ended_so']} of {found[n]['count']}: {percent(found[n]['share'])}" for n in SHARES]
    start = [str(row["max_pretrain_digits"]), str(found["generations"]), percent(found["right"]["share"])]
    return [*start, *shares, row["verdicts"]["wrong_critical_token_decides"]]


def _row(command: Table1Command, model: Model) -> dict[str, Any]:
    base = model.max_pretrain_digits
    count = max(command.generations, command.criterion_generations)
    rng = np.random.default_rng([command.sampling.seed, base])
    problems = model.task.rl_problems(rng, count, base + 1, base)
    generations = critical.sample(model, problems, base + 1, command.sampling)
    gap = delta_j(generations.first(command.generations))
    criterion = criterion_1(generations.first(command.criterion_generations))
    return {
        "max_pretrain_digits": base,
        "checkpoint": fingerprint(model.params),
        "generations": command.generations,
        "problems": [f"{problem.a}{model.task.operator}{problem.b}" for problem in problems[: command.generations]],
        "delta_j": gap,
        "criterion_1": criterion,
    }


def measure(command: Table1Command) -> Results:
    """A row per model, with config."""
    models = [load_model(path) for path in command.checkpoints]
    for model in models:
        critical.require_room(model, model.max_pretrain_digits + 1, command.sampling.extra_length)
    rows = [_row(command, model) for model in models]
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
        return verdicts(sides(row["delta_j"], row["criterion_1"], row["max_pretrain_digits"]))

    models = [row | {"verdicts": said(row)} for row in results["models"]]
    return {"models": models, "claims": as_json(claims(models))}


def main(command: Table1Command) -> None:
    publish(command, COMMAND, "table1", measure, text, judge=judge)


if __name__ == "__main__":
    cli.run(main, Table1Command)
