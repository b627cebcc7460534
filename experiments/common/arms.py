"""What the figures that compare arms of one RL program share: their options, the run, and its summary per arm."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
import tyro
from matplotlib.figure import Figure

from ckl_jax import finetune
from ckl_jax.analysis.statistics import mean_interval
from ckl_jax.checkpoint.shipped import SHIPPED_TINY, shipped
from ckl_jax.checkpoint.store import Model, identity, load_model
from ckl_jax.config import FinetuneConfig
from ckl_jax.errors import ConfigError, require
from ckl_jax.fields import require_fields
from ckl_jax.finetune import certainty_model, describe
from ckl_jax.presets import finetune_preset
from ckl_jax.rl.program import MOST_SEEDS, Arms, Seeds
from ckl_jax.runs.logs import LogOptions
from ckl_jax.runs.records import by_run, earlier_results, read_json, read_metrics
from ckl_jax.runtime import reading
from ckl_jax.tasks.catalog import TaskName
from ckl_jax.tasks.columns import ADDITION
from ckl_jax.tasks.task import Task
from experiments.common import figure
from experiments.common.figure import Results


@dataclass(frozen=True)
class ArmsCommand:
    """Arms of one fine-tuning program over several seeds."""

    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = field(default_factory=FinetuneConfig)
    task: TaskName = "addition"
    """What the pre-trained model calculates."""
    checkpoint: pathlib.Path = SHIPPED_TINY
    """Pre-trained model: a directory with params/ and model.json; default: the one that ships for the task
    and scale."""
    out: pathlib.Path = pathlib.Path("runs/arms")
    """Directory of the run: new, empty, or of the same command interrupted."""
    seeds: Seeds = 2
    """Seeds per arm."""
    plot_only: bool = False
    """Table, claims and figure again from a finished run's config.json, metrics.jsonl and results.json, whatever the
    other options say; the checkpoint must be the run's."""
    logs: Annotated[LogOptions, tyro.conf.arg(name="")] = field(default_factory=LogOptions)
    certainty_checkpoint: pathlib.Path | None = None
    """Another pre-trained model of the task, whose certainty weighs the KL in every arm."""

    def __post_init__(self) -> None:
        require_fields(self)

    @classmethod
    def preset(cls, scale: str = "tiny", recipe: str = "ours", task: TaskName = "addition") -> Self:
        """The command of a scale, a recipe and a task, from the model that ships for them."""
        return cls(finetune_preset(scale, recipe), task, shipped(task, scale))


class Run(NamedTuple):
    """A finished run.

    Attributes:
      config: its config.json.
      records: of its metrics.jsonl.
      made: device, platform and wall seconds.
      digits: length that it was fine-tuned on.
      task: of the model.
    """

    config: dict[str, Any]
    records: list[dict[str, Any]]
    made: dict[str, Any]
    digits: int
    task: Task = ADDITION

    @property
    def lengths(self) -> str:
        """From which N to how many digits, in words."""
        return f"{self.digits - self.config['config']['extra_digits']} to {self.digits} digits"

    @property
    def setting(self) -> str:
        """What a claim of the paper was looked at on: the task, the lengths, and whose certainty it was."""
        return f"{self.task.name}, {self.lengths}{figure.whose_certainty(self.config)}"

    @property
    def seeds(self) -> list[int]:
        first = self.config["config"]["seed"]
        return list(range(first, first + self.config["seeds"]))


def load(command: ArmsCommand) -> Model:
    """The command's pre-trained model; raises ConfigError if it is of another task."""
    model = load_model(command.checkpoint)
    require(model.task.name == command.task, "task", command.task, f"{model.task.name}, the checkpoint's")
    return model


def publish(
    command: ArmsCommand,
    module: str,
    name: str,
    arms: Arms,
    results: Callable[[Run], Results],
    text: Callable[[Results, Run], str],
    draw: Callable[[Results, Run], Figure],
    **described: Any,
) -> None:
    """Trains what is missing, or with ``plot_only`` reads a finished run, and presents its results.

    Args:
      module: the command's name, as after ``python -m``.
      results: what is computed from the run's records; its config, device and wall seconds are added.
      name, text, draw: as in ``figure.present``.
      described: as in ``run_arms``.

    Raises:
      ConfigError: what ``run_arms`` refuses.
    """
    run = run_arms(command, module, arms, **described)
    figure.present(
        command.out,
        name,
        lambda: results(run) | {"config": run.config, **run.made},
        lambda found: text(found, run),
        lambda found: draw(found, run),
        read=command.out if command.plot_only else None,
    )


def run_arms(command: ArmsCommand, name: str, arms: Arms, **described: Any) -> Run:
    """Trains what is missing of all arms x seeds; with ``plot_only`` reads what is there.

    Args:
      name: the module, as config.json names it.
      described: what determines the numbers beside the command's config, seeds and checkpoint.

    Raises:
      ConfigError: what ``finetune.run`` refuses; ``plot_only`` without a finished run.
    """
    model = load(command)
    if command.plot_only:
        return _finished(command, name, model)
    other = certainty_model(command)
    config = {"command": name, **describe(command, model, other), **described}
    settings = command.config, model, arms, command.seeds, command.logs
    earlier = earlier_results(command.out, name)
    directory = finetune.run(command.out, config, *settings, certainty_from=other)
    seconds = directory.seconds()
    made = {**figure.made_on(earlier, seconds), "wall_seconds": seconds}
    digits = model.max_pretrain_digits + command.config.extra_digits
    return Run(config, directory.metrics(), made, digits, model.task)


def _finished(command: ArmsCommand, name: str, model: Model) -> Run:
    made = earlier_results(command.out, name)
    if made is None:
        raise ConfigError(f"plot_only: got {command.out}, allowed is a finished run's directory")
    config = read_json(command.out / "config.json", "plot_only")
    with reading.only_read(command.out / "config.json", "plot_only", applies=True):
        ours = identity(model)
        same = {name: config.get(name, ours[name]) for name in ours} == ours
        require(same, "checkpoint", str(command.checkpoint), "the one that the finished run started from")
        require(config["seeds"] <= MOST_SEEDS, "seeds", config["seeds"], f"at most {MOST_SEEDS}")
        digits = model.max_pretrain_digits + config["config"]["extra_digits"]
        rounds = config["config"]["rounds"]
    records = read_metrics(command.out / "metrics.jsonl", "plot_only")
    tested = any(record["step"] == rounds and "test_target" in record for record in records)
    require(tested, "plot_only", str(command.out), f"the directory of a run that has done its {rounds} rounds")
    with reading.only_read(command.out / "results.json", "plot_only", applies=True):
        kept = {key: made[key] for key in ("device", "platform", "wall_seconds")}
    return Run(config, records, kept, digits, model.task)


def summarize(
    run: Run, arms: Iterable[str], of_rounds: Mapping[str, Callable[[dict[str, Any]], float]]
) -> dict[str, Any]:
    """Values per arm, seed and test or round, and means with 95% intervals over seeds.

    Args:
      of_rounds: curve's name -> its value in a round's record; ``collect_success`` and ``kl`` are there always.
    """
    of_rounds = {**of_rounds, "collect_success": lambda record: record["success"], "kl": lambda record: record["kl"]}
    tests = by_run(run.records, "test_target")
    rounds = by_run(run.records, "success")
    test_steps = sorted({step for _, _, step in tests})
    round_steps = sorted({step for _, _, step in rounds})
    by_arm: dict[str, Any] = {}
    for arm in arms:
        found: dict[str, Any] = {
            f"{curve}_curve": [[tests[arm, seed, step][f"test_{name}"] for step in test_steps] for seed in run.seeds]
            for name, curve in (("target", "learning"), ("old", "old"))
        }
        for name, value in of_rounds.items():
            found[name] = [[value(rounds[arm, seed, step]) for step in round_steps] for seed in run.seeds]
        for name, curve in (("target", "learning_curve"), ("old", "old_curve")):
            values = np.array(found[curve])
            found[f"{name}_before"] = mean_interval(values[:, 0]).within(0, 1)
            found[f"{name}_after"] = mean_interval(values[:, -1]).within(0, 1)
            found[f"{name}_gain"] = mean_interval(values[:, -1] - values[:, 0]).within(-1, 1)
        by_arm[arm] = found
    episodes = run.config["config"]["episodes"]
    return {
        "seeds": run.seeds,
        "test_episodes": [step * episodes for step in test_steps],
        "round_episodes": [step * episodes for step in round_steps],
        "arms": by_arm,
    }


def episodes_before(results: Mapping[str, Any]) -> np.ndarray:
    """Episodes before each round, [rounds]: its policy had learned from these."""
    return np.array(results["round_episodes"]) - results["round_episodes"][0]


def episodes_before_answers(results: Mapping[str, Any], config: Mapping[str, Any]) -> np.ndarray:
    """Episodes, [rounds], that the policy which solved each round's new problems had learned from.

    Args:
      config: with the ``staleness`` of that policy in rounds, which an older config.json does not have yet.
    """
    return np.maximum(episodes_before(results) - config.get("staleness", 0) * results["round_episodes"][0], 0)


def after(results: Mapping[str, Any], arm: str, curve: str = "learning_curve") -> np.ndarray:
    """An arm's accuracy after training, [seeds], from ``summarize``'s results."""
    return np.array(results["arms"][arm][curve])[:, -1]
