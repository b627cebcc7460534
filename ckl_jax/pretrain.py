"""Next-character pre-training (paper, section 3.2; Lee et al. 2024).

    python -m ckl_jax.pretrain --scale tiny --out runs/tiny
    python -m ckl_jax.pretrain --task subtraction --out runs/tiny_subtraction

An interrupted run goes on from its last checkpoint with the same command and ends with the same numbers. Fields that
change the speed alone may be others then.
"""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from ckl_jax.checkpoint.store import Model, is_saved, save_model
from ckl_jax.config import PretrainConfig
from ckl_jax.datasets.stream import dataset_directory, load_stream
from ckl_jax.evaluate import judge
from ckl_jax.fields import require_fields
from ckl_jax.model import num_parameters
from ckl_jax.next_character import make_mesh, planned_state, train_step
from ckl_jax.presets import pretrain_preset
from ckl_jax.runs.directory import RESUMABLE, RunDirectory
from ckl_jax.runs.logs import LogOptions
from ckl_jax.runs.progress import Status, display
from ckl_jax.runtime import cli, finite, preemption, reading, sharding
from ckl_jax.runtime.paths import require_directory
from ckl_jax.tasks import Problem
from ckl_jax.tasks.catalog import TaskName, task_named


@preemption.deferred()
def pretrain(
    config: PretrainConfig,
    directory: RunDirectory,
    data_dir: pathlib.Path | None = None,
    progress: Callable[[str], None] = print,
) -> Model:
    """Trains to the last step, with checkpoints on the way, and saves the model into the run's directory.

    Raises:
      ConfigError: a run that had begun has no checkpoint left.
      PreemptedError: SIGTERM came, and the steps so far are saved.
      NotFiniteError: a loss or parameter is not finite; nothing since the last checkpoint is logged or saved.
      OSError: a file cannot be written. All four leave what was saved before.
    """
    run, task = f"seed {config.seed}", task_named(config.task)
    mesh = make_mesh(config)
    stream = load_stream(config.max_digits, config.num_documents, config.seed, data_dir=data_dir, task=config.task)
    stream = sharding.put(stream, sharding.everywhere(mesh))
    shapes, create = planned_state(config, mesh)
    done, state = directory.restore(shapes) or (0, create.run())
    history = [jax.tree.map(np.float32, metrics) for metrics in directory.checkpoints.restore_history(done) or []]
    logged = done - len(history)
    directory.rewind_metrics(done, logged or None)
    start, first, stopping = time.monotonic(), done, False
    with reading.damaged(directory.metrics_path, "out"):
        reached = any(_reaches_target(config, record) for record in directory.metrics())
    rows = f"batch_size {config.batch_size} / microbatches {config.microbatches} rows"
    if idle := sharding.idle(mesh, rows):
        progress(idle)
    while logged < config.num_steps and not stopping and not reached:
        end = min(logged + config.checkpoint_every, config.num_steps)
        with jax.set_mesh(mesh):
            while done < end and not stopping:
                state, metrics = train_step(config, state, stream)
                history.append(metrics)
                done += 1
                stopping = preemption.requested(done)
        history = jax.device_get(history)
        values = {name: np.array([metrics[name] for metrics in history]) for name in history[0]}
        finite.require_metrics("step", logged, [run], jax.tree.map(lambda x: x[None], values))
        finite.require_state("step", done, [run], state, by_run=False)
        if done < end or stopping:  # A test may compile for longer than a machine that is taken away waits.
            directory.checkpoints.save(done, state, jax.tree.map(float, history))
            continue
        logged, history = done, []
        record: dict[str, Any] = {"step": done, **{name: float(np.mean(x)) for name, x in values.items()}}
        model = Model(config.model, config.max_digits, state.tested, task)
        for digits, problems in tested_on(config).items():
            record[f"accuracy_varying_{digits}"] = float(judge(model, problems, digits).mean())
        reached = _reaches_target(config, record)
        directory.log([record])
        directory.checkpoints.save(done, state)
        stopping = not reached and done < config.num_steps and preemption.requested()
        elapsed = time.monotonic() - start
        left = elapsed / (done - first) * (config.num_steps - done) if done > first else None
        shown = ", ".join(f"{name} {value:.4g}" for name, value in record.items() if name != "step")
        ahead = "" if left is None else f", {left:.0f} s left"
        line = f"step {done}/{config.num_steps}: {shown} ({elapsed:.0f} s{ahead})"
        progress(Status(line, done, config.num_steps, shown, left))
    if stopping:
        raise preemption.PreemptedError(f"step {done}/{config.num_steps} is saved in {directory.path}")
    model = Model(config.model, config.max_digits, state.tested, task)
    made_by = {"command": "python -m ckl_jax.pretrain", "config": dataclasses.asdict(config)}
    if done > first or not is_saved(
        directory.path, made_by, RESUMABLE.same_numbers
    ):  # Saved again, its files would have other names.
        save_model(directory.path, model, made_by)
    return model


def tested_on(config: PretrainConfig) -> dict[int, list[Problem]]:
    """The problems of the evaluations on the way, by the operands' digits."""

    def drawn(digits: int) -> list[Problem]:
        rng = np.random.default_rng([config.seed, digits])
        return task_named(config.task).varying_problems(rng, config.eval_problems, digits)

    return {digits: drawn(digits) for digits in (config.max_digits, config.max_digits + 1)}


def _reaches_target(config: PretrainConfig, record: dict[str, Any]) -> bool:
    accuracy = record[f"accuracy_varying_{config.max_digits}"]
    return config.target_accuracy is not None and accuracy >= config.target_accuracy


@dataclass(frozen=True)
class PretrainCommand:
    """Next-character pre-training on scratchpads of a task."""

    config: Annotated[PretrainConfig, tyro.conf.arg(name="")] = field(default_factory=PretrainConfig)
    out: pathlib.Path = pathlib.Path("runs/pretrained")
    """Directory of the run: new, empty, or of the same command interrupted."""
    data_dir: pathlib.Path | None = None
    """Where TFDS keeps the dataset; default: TFDS's own default directory."""
    logs: Annotated[LogOptions, tyro.conf.arg(name="")] = field(default_factory=LogOptions)

    def __post_init__(self) -> None:
        require_fields(self)
        if self.data_dir is not None:
            require_directory(self.data_dir, "data_dir", may_be_read_only=True)


def preset(scale: str = "tiny", task: TaskName = "addition") -> PretrainCommand:
    return PretrainCommand(pretrain_preset(scale, task))


def main(command: PretrainCommand) -> None:
    dataset_directory(command.data_dir)  # What these refuse is refused before the run's directory is made.
    make_mesh(command.config)
    config = {"command": "pretrain", **dataclasses.asdict(command.config)}
    with (
        contextlib.closing(RunDirectory(command.out, config, command.logs)) as directory,
        display(command.logs.quiet) as progress,
    ):
        model = pretrain(command.config, directory, command.data_dir, progress)
    parameters = num_parameters(model.params)
    print(f"saved: {directory.path} ({parameters:,} parameters)")


if __name__ == "__main__":
    cli.run(main, PretrainCommand, preset)
