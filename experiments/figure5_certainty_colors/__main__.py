"""Figure 5: generated scratchpads, every character coloured by the pre-trained model's certainty, critical ones boxed.

    python -m experiments.figure5_certainty_colors
    python -m experiments.figure5_certainty_colors --finetuned runs/figure4/prioritized/seed_0     # before and after RL
    python -m experiments.figure5_certainty_colors --plot-only                                # from results.json

Writes figure5.html (one file, no network: point at a character for certainty, entropy, probabilities and the five
likeliest characters), figure5.png, figure5.svg and results.json. The policy before and after RL answers the same
problems of N + 1 digits with the same sampling noise at temperature 1; shown are the first right and the first wrong
answers of each policy in the order of the problems, so none is picked by hand. The colour is the pre-trained model's
certainty J on both policies' answers: what the prioritized KL weighs its tokens by.

The figure's message is that colour finds the critical tokens. Verdict, by a rule fixed before the first run: of the
pre-trained model's answers with a recorded critical token, the least certain character is one in more than half
(*holds* if the lower end of Wilson's 95% interval is above one half, *fails* if the upper end is below, else
*undecided*). Expect 20 seconds on 2 CPU cores for the tiny checkpoint, compiling included.
"""

from __future__ import annotations

import dataclasses
import pathlib
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import tyro

from ckl_jax.analysis import critical
from ckl_jax.analysis.critical import Generations, Measuring
from ckl_jax.analysis.statistics import Interval, mean_interval, percent, share_interval
from ckl_jax.checkpoint.shipped import SHIPPED_TINY
from ckl_jax.checkpoint.store import fingerprint, kind, load_model
from ckl_jax.errors import naming, require
from ckl_jax.fields import PositiveInt, require_fields
from ckl_jax.runtime import cli
from ckl_jax.runtime.paths import require_directory
from ckl_jax.tasks import problems as problems_lib
from experiments.common.claims import HOLDS, LIES_ABOVE, Claim, as_json
from experiments.common.figure import Results, markdown, publish
from experiments.figure5_certainty_colors.shown import draw, page, section, stored

COMMAND = "experiments.figure5_certainty_colors"


@dataclass(frozen=True)
class Figure5Command:
    """Figure 5: scratchpads coloured by the pre-trained model's certainty, before and after RL."""

    checkpoint: pathlib.Path = SHIPPED_TINY
    """Pre-trained model: a directory with params/ and model.json; default: the tiny one that ships with the package."""
    finetuned: pathlib.Path | None = None
    """Policy after RL from that model, a directory of the same kind; default: only the pre-trained model is shown."""
    out: pathlib.Path = pathlib.Path("runs/figure5")
    """Directory that the page, the pictures and results.json are written to, over older ones."""
    generations: PositiveInt = 100
    """Answers sampled per policy."""
    examples: PositiveInt = 2
    """Right and wrong answers shown per policy, at most; the picture has one of each."""
    sampling: Annotated[Measuring, tyro.conf.arg(name="")] = field(default_factory=Measuring)
    plot_only: bool = False
    """Page, pictures and table again from results.json, without the models."""

    def __post_init__(self) -> None:
        require_fields(self)
        require_directory(self.out, "out")


def summarize(found: Generations) -> dict[str, Any]:
    """Certainty at critical and other characters per answer, and how often the least certain character is critical."""
    critical_BxT = found.critical_BxT
    sure_BxT = np.where(found.mask_BxT, found.certainty_BxT.astype(np.float64), np.inf)
    least_B = sure_BxT.argmin(axis=1)
    hits = int(critical_BxT[np.arange(len(least_B)), least_B].sum())
    count = int(critical_BxT.any(axis=1).sum())
    at_critical, at_others = (
        critical.mean_where(found.certainty_BxT, selected)
        for selected in (critical_BxT, found.mask_BxT & ~critical_BxT)
    )
    right = np.take_along_axis(found.at_critical(found.probabilities_BxTxV), found.right_Bx3x2xC[..., None], axis=4)
    recorded = found.recorded_Bx3x2xC
    return {
        "generations": len(least_B),
        "right": share_interval(int(found.reward_B.sum()), len(least_B)),
        "certainty_at_critical": mean_interval(at_critical[np.isfinite(at_critical)]),
        "certainty_at_others": mean_interval(at_others[np.isfinite(at_others)]),
        "probability_of_right_at_critical": float(right[recorded].mean()) if recorded.any() else None,
        "least_certain_is_critical": share_interval(hits, count),
        "answers_with_critical": count,
        "critical_share_of_characters": float(critical_BxT.sum() / found.mask_BxT.sum()),
    }


def verdict(summary: dict[str, Any]) -> str:
    """Holds, fails or undecided: is the least certain character critical in more than half of the answers?"""
    return HOLDS[Interval(*summary["least_certain_is_critical"]).side(0.5)]


def claims(policies: dict[str, Any]) -> list[Claim]:
    """The figure's message, by the rule of this module's docstring."""
    summary = policies["Before RL"]
    share = Interval(*summary["least_certain_is_critical"])
    return [
        Claim(
            "Colour alone finds the critical tokens",
            "drawn for single answers, no numbers",
            f"the least certain character is a critical one in {percent(share)}% of the "
            f"{summary['answers_with_critical']} answers with a critical token",
            (share,),
            LIES_ABOVE[share.side(0.5)],
            "share of the pre-trained model's answers with a critical token whose least certain character is one: "
            "reproduced if Wilson's 95% interval lies above one half, not reproduced if below, else undecided",
        )
    ]


def text(results: Results) -> str:
    """A line per policy, as Markdown, and the verdict."""
    header = ["policy", "right, %", "J at critical", "J at others", "p(right) at critical", "least certain critical, %"]
    rows = []
    for name, found in results["policies"].items():
        probability = found["probability_of_right_at_critical"]
        cells = [
            name,
            percent(found["right"]),
            Interval(*found["certainty_at_critical"]).text(".4f"),
            Interval(*found["certainty_at_others"]).text(".4f"),
            "none" if probability is None else f"{probability:.3f}",
            percent(found["least_certain_is_critical"]),
        ]
        rows.append(cells)
    said = f"colour finds the critical tokens, before RL: {results['verdict']}"
    return f"{markdown(header, rows)}\n{said}\n{results['wall_seconds']:.0f} s"


def measure(command: Figure5Command) -> Results:
    """Both policies' answers: what is counted on all of them, and the first right and wrong ones as they are shown."""
    reference = load_model(command.checkpoint)
    digits = reference.max_pretrain_digits + 1
    critical.require_room(reference, digits, command.sampling.extra_length)
    policies = {"Before RL": reference}
    if command.finetuned is not None:
        with naming("finetuned", instead_of="checkpoint"):
            policies["After RL"] = load_model(command.finetuned)
        same = kind(policies["After RL"]) == kind(reference)
        require(same, "finetuned", str(command.finetuned), "a policy of the checkpoint's shape, N and task")
    rng = problems_lib.measured_on(command.sampling.seed, digits)
    problems = reference.task.rl_problems(rng, command.generations, digits, digits - 1)
    summaries: dict[str, Any] = {}
    for name, policy in policies.items():
        other = None if policy is reference else reference
        found = critical.sample(policy, problems, digits, command.sampling, other)
        part = section(name, reference.task, found, problems, command.examples)
        shown = [stored(pad) for pad in part.scratchpads]
        told = {"checkpoint": fingerprint(policy.params), "note": part.note}
        summaries[name] = {**told, **summarize(found), "shown": shown}
    config = {"command": COMMAND, **dataclasses.asdict(command)}
    for name in ("checkpoint", "finetuned", "out", "plot_only"):
        del config[name]
    return {
        "max_pretrain_digits": digits - 1,
        "policies": summaries,
        "seeds": [command.sampling.seed],
        "config": config,
    }


def judge(results: Results) -> Results:
    policies = results["policies"]
    return {"verdict": verdict(policies["Before RL"]), "claims": as_json(claims(policies))}


def main(command: Figure5Command) -> None:
    publish(command, COMMAND, "figure5", measure, text, draw, judge=judge, page=page)


if __name__ == "__main__":
    cli.run(main, Figure5Command)
