"""Critical tokens found without knowing the task, and how many of the known ones are among them.

    python -m experiments.critical_token_discovery
    python -m experiments.critical_token_discovery --checkpoint runs/figure4/prioritized/seed_0 --digits 7

Section 3.3 of the paper calls a token critical that the model is unsure of and that decides the answer. Both can be
measured with nothing but the model, prompts and rewards. The rules were fixed before the run that is published, which
has seed 1. A run with seed 0 had come before, on right answers alone: it called 11 types critical, none of them known,
but left out the states in which the model errs, and is why ``open`` was put in the place of *right*.

- *Candidates*: of each sampled answer the ``candidates`` characters with the lowest certainty gap (J at the character
  minus the mean J of the answer's others), as far as it is below minus ``least_gap``.
- *Open*: where an earlier character has spoiled the answer, no other one changes anything, and most answers of a weak
  model are spoiled somewhere. The answer up to the candidate is completed ``first_completions`` times from the model's
  own character and as often from the runner-up, the likeliest other one. Only if one of them ends right the candidate
  is open and counts; the character with more successes is called the better one (the own one if equal).
- *Drop*: what forcing the other character costs. An open answer is completed ``completions`` times more from either,
  with noise of its own that both branches share; the drop is the success of the better character minus that of the
  other. As these completions have not chosen what is compared, it is not flattered by chance: between equally good
  characters it is 0 on average. Where the model is mostly wrong, its own character is the worse one.
- *Type*: the place in the text: line, word of the line, character of the word. An answer has each place once, so the
  drops of a type come from different problems; Student's 95% interval is over them. A type is *critical* if
  ``least_answers`` or more drops were measured, their mean is ``least_drop`` or more and the interval is above 0; *not
  critical* if the interval ends below ``least_drop``; else *undecided*; with fewer drops, *too few*. No correction is
  made for the number of types.
- *Control*: ``controls`` other characters of each answer, picked at random, are tried the same way: in a task where any
  slip is fatal they decide too, and only certainty tells critical tokens from them.

Only then the task is asked. *Known* tokens are those of the paper. Precision: of the critical types, the share that is
known. (The runs that were published had it of their open candidates, which is shown too. But whether a candidate is
known is a matter of its type, so six of one type say what one says.) Recall: of all known tokens that the answers came
to, the share that is an open candidate of such a type. Intervals of shares are Wilson's, of 95%, and take types, or for
recall tokens of one answer, as independent. Verdicts: *holds* if the interval is above one half, *fails* if below, else
*undecided*. Types are named by what stands there. The cost of a
type is the success that its worse characters lose per answer: the sum of their probability times the drop over its
candidates, over all answers.

Expect 4 minutes on 2 CPU cores for the tiny checkpoint; it is not resumed but run again. Of that model's candidates a
fifth is open, so that few types get enough drops: more ``answers`` judge more types, at 3 seconds each.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import tyro
from matplotlib.figure import Figure

from ckl_jax import tasks
from ckl_jax.analysis import critical, discovery, plots
from ckl_jax.analysis.critical import Generations, Measuring
from ckl_jax.analysis.discovery import Rule
from ckl_jax.analysis.statistics import percent, share_interval
from ckl_jax.checkpoint.shipped import SHIPPED_TINY
from ckl_jax.checkpoint.store import Model, fingerprint, load_model
from ckl_jax.errors import require
from ckl_jax.evaluate import judge
from ckl_jax.fields import PositiveInt, require_fields
from ckl_jax.runtime import cli
from ckl_jax.tasks import problems as problems_lib
from experiments.common.figure import Results, markdown, publish

COMMAND = "experiments.critical_token_discovery"
BRANCHES = ("own", "runner_up")
COUNTS = {
    "open candidates": "candidates",
    "own is better": "own_is_better",
    "of them known": "known_candidates",
    "known tokens": "known_tokens",
}
KNOWN, OTHER, CONTROL = plots.COLORS["prioritized"], plots.COLORS["standard"], plots.SOFT


@dataclass(frozen=True)
class DiscoveryCommand:
    """Finds a model's critical tokens without knowing the task, and compares them with the known ones."""

    checkpoint: pathlib.Path = SHIPPED_TINY
    """Model: a directory with params/ and model.json; default: the tiny one that ships with the package."""
    digits: int | None = None
    """Digits of the longer operand; default: one more than the model was pre-trained on."""
    out: pathlib.Path = pathlib.Path("runs/discovery")
    """Directory of results.json, discovery.png and discovery.svg; an earlier call's are replaced."""
    answers: PositiveInt = 70
    """Answers sampled and looked at."""
    rule: Annotated[Rule, tyro.conf.arg(name="")] = field(default_factory=Rule)
    sampling: Annotated[Measuring, tyro.conf.arg(name="")] = field(default_factory=Measuring)
    plot_only: bool = False
    """Tables and figure again from results.json."""

    def __post_init__(self) -> None:
        require_fields(self)
        digits, most = self.digits, tasks.MAX_DIGITS
        require(digits is None or 1 <= digits <= most, "digits", digits, f"1..{most}, or None")


def discover(command: DiscoveryCommand, model: Model, problems: Sequence[tasks.Problem], digits: int) -> dict[str, Any]:
    """Answers to the problems, what was tried in them, and ``discovery.summarize``.

    Raises:
      ConfigError: nothing to try, or an episode does not fit into the block.
    """
    rule = command.rule
    answers = critical.sample(model, problems, digits, command.sampling)
    probes = discovery.choose(answers, rule, command.sampling.seed)
    require(len(probes) > 0, "least_gap", rule.least_gap, "low enough for a candidate (or controls above 0)")

    def complete(some: Sequence[dict[str, Any]], branch: str, times: range) -> np.ndarray:
        of_probes = [problems[probe["answer"]] for probe in some]
        given_PxT = starts(answers, some, branch)
        how: dict[str, Any] = {
            "temperature": command.sampling.temperature,
            "extra_length": command.sampling.extra_length,
        }
        rewards = []
        for time_ in times:  # The noise of the answers themselves is the seed's own.
            seed = command.sampling.seed + 1 + time_
            rewards.append(judge(model, of_probes, digits, seed=seed, given_BxT=given_PxT, **how))
            print(f"{branch}: completed {len(some)} answers, time {time_ + 1}", flush=True)
        return np.mean(rewards, axis=0)

    first = range(rule.first_completions)
    for probe, own, runner_up in zip(probes, *(complete(probes, b, first) for b in BRANCHES), strict=True):
        probe |= {"open": bool(own + runner_up > 0), "better": BRANCHES[int(runner_up > own)]}
    still_open = [probe for probe in probes if probe["open"]]
    if still_open:
        times = range(first.stop, first.stop + rule.completions)
        for branch in BRANCHES:
            for probe, success in zip(still_open, complete(still_open, branch, times), strict=True):
                probe[f"success_{branch}"] = float(success)
    texts = [answers.text(row) for row in range(len(problems))]
    marked = [(texts[row], critical.places(texts[row])[index]) for row, index in np.argwhere(answers.critical_BxT)]
    known = [(place, discovery.part(text, place)) for text, place in marked]
    return {
        "success": share_interval(int(answers.reward_B.sum()), len(problems)),
        **discovery.summarize(probes, known, len(problems), rule),
        "probes": probes,
    }


def starts(answers: Generations, probes: Sequence[dict[str, Any]], branch: str) -> np.ndarray:
    """The answers up to each probe, then its ``branch``'s character (``own`` or ``runner_up``), then -1: [P, T]."""
    given_PxT = answers.answers_BxT[[probe["answer"] for probe in probes]]
    for given_T, probe in zip(given_PxT, probes, strict=True):
        given_T[probe["index"] :] = -1
        given_T[probe["index"]] = probe[f"{branch}_token"]
    return given_PxT


def text(results: Results) -> str:
    """Types with enough candidates or known tokens, precision and recall, as Markdown."""
    types = []
    for kind in results["types"]:
        if kind["verdict"] != "too few" or kind["known_tokens"]:
            counts = [str(kind[name]) for name in COUNTS.values()]
            measured = [f"{kind['gap']:.3f}", percent(kind["drop"], "+")] if kind["candidates"] else ["-", "-"]
            types.append([kind["name"], *counts, *measured, f"{100 * kind['cost']:.1f}", kind["verdict"]])
    shares = [
        [name.replace("_", " "), percent(results[name]), results["verdicts"].get(name, "")]
        for name in (
            "precision",
            "precision_of_candidates",
            "recall",
            "known_that_are_open_candidates",
            "success",
            "drop_of_controls",
        )
    ]
    tables = [
        markdown(["type", *COUNTS, "mean gap", "drop", "cost", ""], types),
        markdown(["", "%", "most of them?"], shares),
    ]
    found, known = results["types_critical"], results["types_critical_and_known"]
    said = f"{found} critical types, {known} of them known; {results['types_known']} types are known"
    return "\n\n".join([*tables, f"{said}\n{results['wall_seconds']:.0f} s"])


def draw(results: Results) -> Figure:
    bars = [kind for kind in reversed(results["types"]) if kind["verdict"] != "too few"]
    figure = Figure(figsize=(11, max(4.5, 0.4 * len(bars))))
    (left, right) = figure.subplots(1, 2)
    probes = [probe for probe in results["probes"] if probe["open"]]
    groups = (
        ("random other character", CONTROL, [p for p in probes if not p["candidate"]]),
        ("candidate, not known", OTHER, [p for p in probes if p["candidate"] and not p["known"]]),
        ("candidate, known critical token", KNOWN, [p for p in probes if p["candidate"] and p["known"]]),
    )
    rng = np.random.default_rng(0)
    for label, color, some in groups:
        jitter_P = rng.uniform(-1.5, 1.5, len(some))  # Rates of few completions lie on top of each other.
        drops_P = 100 * discovery.drops(some) + jitter_P
        marks: dict[str, Any] = {"s": 40, "marker": "D"} if color == KNOWN else {"s": 18, "alpha": 0.6}
        left.scatter([p["gap"] for p in some], drops_P, color=color, linewidth=0, label=label, **marks)
    left.set(xlabel="certainty gap ΔJ", ylabel="drop in success, points")
    figure.legend(loc="outside upper left", ncols=len(groups))
    for height, kind in enumerate(bars):
        mean, low, high = (100 * value for value in kind["drop"])
        color = KNOWN if discovery.is_known(kind) else OTHER
        style = {"color": color, "alpha": 1.0 if kind["verdict"] == "critical" else 0.4, "ecolor": plots.INK}
        right.barh(height, mean, xerr=[[mean - low], [high - mean]], capsize=2, **style)
    names = [f"{kind['name']}\n{kind['verdict']}, {kind['candidates']} candidates" for kind in bars]
    right.set_yticks(range(len(bars)), names, fontsize=9)
    found, known = results["types_critical"], results["types_critical_and_known"]
    title = f"types judged; critical (strong colour): {found}, of them known: {known}"
    right.set(xlabel="drop in success, points, mean and 95% interval", ylim=(-0.6, max(len(bars), 5) - 0.4))
    right.set_title(title, fontsize=10)
    return figure


def measure(command: DiscoveryCommand) -> Results:
    """What a model's characters decide, and the config."""
    model = load_model(command.checkpoint)
    base = model.max_pretrain_digits
    digits = base + 1 if command.digits is None else command.digits
    critical.require_room(model, digits, command.sampling.extra_length)
    rng = problems_lib.measured_on(command.sampling.seed, digits)
    longer = digits > base
    draw_problems = model.task.rl_problems if longer else model.task.varying_problems
    problems = draw_problems(rng, command.answers, digits, *([base] if longer else []))
    config = {"command": COMMAND, **dataclasses.asdict(command), "digits": digits, "max_pretrain_digits": base}
    for name in ("checkpoint", "out", "plot_only"):
        del config[name]
    config["checkpoint"] = fingerprint(model.params)
    return {**discover(command, model, problems, digits), "config": config}


def main(command: DiscoveryCommand) -> None:
    publish(command, COMMAND, "discovery", measure, text, draw)


if __name__ == "__main__":
    cli.run(main, DiscoveryCommand)
