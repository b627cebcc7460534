"""Figure 3: RL fine-tuning on longer operands, from models pre-trained to several N.

    python -m experiments.figure3_pretraining_levels
    python -m experiments.figure3_pretraining_levels --seeds 10 --extra-digits 2       # the figure's N + 2 alone
    python -m experiments.figure3_pretraining_levels --scale gpt2                      # the paper's size, N = 7 and 9

Accuracy against RL episodes under the standard KL penalty (beta 0, alpha twice that of figure 4, as section 5.2 has
10 where section 5.3 has 5), on each round's new problems (lines) and on common test problems (points, on the way the
first of them), sampled. The paper's text says N + 1 digits and its caption N + 2: a panel for each. A run with
several seeds per N and panel lies under ``out``; all have the same budget, but not the same problems, since these
have other lengths.

The models come from the cache that experiments share (``common.models``); the missing ones are trained first. A call
that was interrupted goes on with the same command; ``--plot-only`` draws again from results.json. Targets that a
model's block cannot hold are refused before anything is trained.

The paper's claims, compared between the largest and the smallest N in each panel by rules that were written before any
run. *Reproduced* if the interval of the largest N lies above that of the smallest, *not reproduced* if it lies below,
else *undecided* (all of 95%):

- starts higher: the share of test problems solved before RL, with Wilson's interval over problems.
- ends higher: the accuracy after the last round, with Student's interval over seeds. Whether the curves have levelled
  off by then is not decided; the change between the last two tests stands beside it, if both had the same problems.

The paper's sizes (N = 7 to 13, 85M parameters) make its curves' heights not comparable at other scales.
"""

from __future__ import annotations

import dataclasses
import pathlib
from dataclasses import dataclass, field
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure

from ckl_jax import finetune as finetune_lib
from ckl_jax.analysis import plots
from ckl_jax.analysis.statistics import Interval, mean_interval, percent, share_interval
from ckl_jax.checkpoint.store import Model, identity
from ckl_jax.config import FinetuneConfig
from ckl_jax.errors import ConfigError, require
from ckl_jax.fields import require_fields
from ckl_jax.presets import finetune_preset
from ckl_jax.rl.program import Seeds, make_program, make_runs
from ckl_jax.runs.directory import RunDirectory
from ckl_jax.runs.logs import LogOptions
from ckl_jax.runtime import cli
from ckl_jax.tasks.catalog import TaskName, task_named
from experiments.common import arms as arms_lib
from experiments.common.claims import LIES_ABOVE, as_json
from experiments.common.figure import Results, markdown, publish
from experiments.common.models import Models, colors_of, models_preset
from experiments.common.pretraining_claims import compared, from_verdicts, task_of

COMMAND = "experiments.figure3_pretraining_levels"
ARM = "standard"
LEAST_TOP = 10  # Of the axis of accuracy in %: where no run solves anything, it would show negative ones alone.


def standard_kl(scale: str, recipe: str = "ours") -> FinetuneConfig:
    """A scale's fine-tuning with section 5.2's penalty; room for 11 digits in a block of 1,024 characters."""
    config = finetune_preset(scale, recipe)
    alpha, room = 2 * config.kl_coefficient, min(config.extra_length, 40)
    return dataclasses.replace(config, beta=0.0, kl_coefficient=alpha, extra_length=room)


@dataclass(frozen=True)
class Figure3Command:
    """Figure 3: RL learning curves on N + 1 and N + 2 digits for models of several N, under the standard KL."""

    models: Annotated[Models, tyro.conf.arg(name="")] = field(default_factory=Models)
    finetune: FinetuneConfig = field(default_factory=lambda: standard_kl("tiny"))
    """Its extra_digits is not given, as it is each of extra_digits."""
    extra_digits: tuple[int, ...] = (1, 2)
    """Target lengths beyond N, a panel each."""
    out: pathlib.Path = pathlib.Path("runs/figure3")
    """Directory of the results and of a run per N and target: new, empty, or of the same command interrupted."""
    seeds: Seeds = 2
    """Seeds per N and target."""
    plot_only: bool = False
    """Table and figure again from results.json."""

    def __post_init__(self) -> None:
        require_fields(self)
        possible = self.extra_digits in ((1,), (2,), (1, 2))
        require(possible, "extra_digits", self.extra_digits, "1, 2, or 1 2")
        scale = self.models.scale
        require(self.finetune.scale == scale, "finetune.scale", self.finetune.scale, f"scale = {scale}")
        ungiven, given = FinetuneConfig.extra_digits, self.finetune.extra_digits
        require(given == ungiven, "finetune.extra_digits", given, f"none ({ungiven}): extra_digits has the targets")
        require(self.finetune.beta == 0, "finetune.beta", self.finetune.beta, "0, the standard KL penalty")
        alpha = self.finetune.kl_coefficient
        require(alpha > 0, "finetune.kl_coefficient", alpha, "above 0")
        word = self.finetune.kl_weights
        require(word == "prioritized", "finetune.kl_weights", word, "prioritized, with beta 0 the standard KL")
        for config in self.models.configs:
            for extra in self.extra_digits:
                self.check(Model(config.model, config.max_digits, None, task_named(config.task)), extra)

    def target(self, extra: int) -> FinetuneConfig:
        """The fine-tuning on N + ``extra`` digits."""
        return dataclasses.replace(self.finetune, extra_digits=extra)

    def check(self, model: Model, extra: int) -> None:
        """Raises ConfigError, naming N, where the model's block is too short or the seeds are not possible."""
        try:
            make_program(self.target(extra), model)
        except ConfigError as error:
            raise ConfigError(f"digits: N = {model.max_pretrain_digits} does not fit: {error}") from error
        make_runs(self.target(extra), {ARM: {}}, self.seeds)


def preset(scale: str = "tiny", finetune_recipe: str = "ours", pretrain_task: TaskName = "addition") -> Figure3Command:
    return Figure3Command(models_preset(scale, pretrain_task), standard_kl(scale, finetune_recipe))


def summarize(config: FinetuneConfig, base: int, seeds: int, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Per-seed curves and intervals of one run (N = ``base`` and one target), from metrics.jsonl's records."""
    digits = base + config.extra_digits
    run = arms_lib.Run({"config": dataclasses.asdict(config), "seeds": seeds}, records, {}, digits)
    found = arms_lib.summarize(run, [ARM], {})
    values = found.pop("arms")[ARM]
    target = np.array(values["learning_curve"])
    problems = {record["step"]: record["test_problems"] for record in records if "test_problems" in record}
    *_, earlier, last = sorted(problems)
    changes = target[:, -1] - target[:, -2] if problems[earlier] == problems[last] else np.array([])
    return found | {
        "max_pretrain_digits": base,
        "extra_digits": config.extra_digits,
        "digits": digits,
        **{name: values[name] for name in ("learning_curve", "old_curve", "collect_success", "kl", "old_after")},
        "before": share_interval(round(target[0, 0] * problems[0]), problems[0]),
        "after": values["target_after"],
        "gain": values["target_gain"],
        "last_change": mean_interval(changes).within(-1, 1),
        "old_before": values["old_curve"][0][0],
    }


def verdicts(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The module's rules: the largest against the smallest N of each panel, with the intervals that decide."""
    found = []
    for extra in sorted({run["extra_digits"] for run in runs}):
        panel = sorted((r for r in runs if r["extra_digits"] == extra), key=lambda r: r["max_pretrain_digits"])
        low, high = panel[0], panel[-1]
        for claim, name in (("starts higher", "before"), ("ends higher", "after")) if low is not high else ():
            found.append(
                {
                    "claim": f"larger N {claim} on N+{extra}",
                    "max_pretrain_digits": [high["max_pretrain_digits"], low["max_pretrain_digits"]],
                    "verdict": LIES_ABOVE[Interval(*high[name]).side(low[name])],
                    "intervals": (high[name], low[name]),
                }
            )
    return found


def table(results: Results) -> str:
    """Accuracies in percent and the verdicts, as Markdown."""
    rows = [
        [
            str(run["max_pretrain_digits"]),
            str(run["digits"]),
            *(percent(run[name]) for name in ("before", "after")),
            *(percent(run[name], "+") for name in ("gain", "last_change")),
            f"{100 * run['old_before']:.1f}",
            percent(run["old_after"]),
        ]
        for run in results["runs"]
    ]
    said = [[row["claim"], compared(row), row["verdict"]] for row in results["verdicts"]]
    changes = ("before", "after", "gain", "since the test before", "old lengths before", "old lengths after")
    return f"{markdown(['N', 'digits', *changes], rows)}\n\n{markdown(['claim', 'N', 'verdict'], said)}"


def draw(results: Results) -> Figure:
    runs = results["runs"]
    extras = sorted({run["extra_digits"] for run in runs})
    colors = colors_of(sorted({run["max_pretrain_digits"] for run in runs}))
    size = (5.2 * len(extras), 4.4)
    figure = Figure(figsize=size)
    panels = figure.subplots(1, len(extras), sharey=True, squeeze=False)
    for panel, extra in zip(panels[0], extras, strict=True):
        for run in (run for run in runs if run["extra_digits"] == extra):
            name = f"N = {run['max_pretrain_digits']}"
            of_name = {name: colors[run["max_pretrain_digits"]]}
            before = arms_lib.episodes_before_answers(run, results["config"]["finetune"])
            plots.curves(panel, before, {name: np.array(run["collect_success"])}, scale=100, colors=of_name)
            tested = {name: np.array(run["learning_curve"])}
            plots.points(panel, np.array(run["test_episodes"]), tested, scale=100, label="_", colors=of_name)
        panel.set(xlabel="RL episodes", title=f"N to N + {extra} digits")
    panels[0, 0].set(ylabel="accuracy on the longer operands (%)")
    panels[0, 0].set_ylim(-1, max(panels[0, 0].get_ylim()[1], LEAST_TOP))
    panels[0, -1].legend(title=f"standard KL, {plots.counted(len(runs[0]['seeds']), 'seed')}")
    return figure


def measure(command: Figure3Command) -> Results:
    """All runs with their verdicts, config and wall seconds of the fine-tuning."""
    settings = {"finetune": dataclasses.asdict(command.finetune), "extra_digits": list(command.extra_digits)}
    described = {"command": COMMAND, "models": command.models.describe(), "seeds": command.seeds, **settings}
    whole = RunDirectory(command.out, described)
    runs = []
    for config in command.models.configs:
        model = command.models.load(config)
        for extra in command.extra_digits:
            jax.clear_caches()  # Of all programs together the memory maps would exceed what Linux allows a process.
            runs.append(run_target(command, model, extra))
    whole.record_config()
    whole.close()
    return {
        "runs": runs,
        "verdicts": verdicts(runs),
        "seeds": runs[0]["seeds"],
        "config": described,
        "wall_seconds": sum(run["wall_seconds"] for run in runs),
    }


def run_target(command: Figure3Command, model: Model, extra: int) -> dict[str, Any]:
    """One model's fine-tuning on N + ``extra`` digits, all seeds, in its own directory; its summary."""
    base, config, named = model.max_pretrain_digits, command.target(extra), identity(model)
    settings = {"config": dataclasses.asdict(config), "seeds": command.seeds, **named}
    path, described = command.out / f"N{base}_plus{extra}", {"command": COMMAND, **settings}
    title = f"N = {base}, {base + extra} digits, {plots.counted(command.seeds, 'seed')}: {path}"
    directory = finetune_lib.run(path, described, config, model, {ARM: {}}, command.seeds, LogOptions(), title)
    found = summarize(config, base, command.seeds, directory.metrics())
    return found | {"checkpoint": named["checkpoint"], "wall_seconds": directory.seconds()}


def judge(results: Results) -> Results:
    return {"claims": as_json(from_verdicts(results["verdicts"], task_of(results)))}


def text(results: Results) -> str:
    return f"{table(results)}\n{results['wall_seconds']:.0f} s of fine-tuning"


def main(command: Figure3Command) -> None:
    publish(command, COMMAND, "figure3", measure, text, draw, judge=judge)


if __name__ == "__main__":
    cli.run(main, Figure3Command, preset)
