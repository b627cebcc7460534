"""RL fine-tuning of a checkpoint, one or several runs (arms x seeds) as one program.

    python -m ckl_jax.finetune --checkpoint runs/tiny --out runs/finetuned

**What it writes.** All numbers go to metrics.jsonl. At every test two answers of each arm with their rewards go to
samples.jsonl. The checkpoints lie under checkpoints/, and each run's policy under `<arm>/seed_<seed>`.

**Going on.** A call that was interrupted goes on from its last checkpoint with the same command and ends with the same
bits. Options that change the speed alone may be others then (``--rollout-batch``, ``--runs-at-once``,
``--data-devices``, ...), and so may those of logging. A finished run takes more ``--rounds`` if its learning rate does
not decay (``--no-learning-rate-decay``). A second process in the same directory is refused; in a bucket it is not.

**Exit codes**, of this command and of all others:

| code | meaning |
|---|---|
| 0 | it has finished |
| 1 | a file cannot be written or read, or a device does not start; one line names it |
| 2 | an option, environment variable or file cannot work; one line names it and what is allowed |
| 3 | a loss or parameter is not finite; the line names run, round and term |
| 8 | of `ckl_jax.preflight` alone: a program does not fit the device |
| 75 | SIGTERM came, the work is saved, and the same command goes on |
| 130 | ctrl-C |
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import jax
import tyro

from ckl_jax.checkpoint.shipped import SHIPPED_TINY, shipped
from ckl_jax.checkpoint.store import Model, identity, is_saved, load_model, save_model
from ckl_jax.config import FinetuneConfig
from ckl_jax.errors import naming, require
from ckl_jax.fields import require_fields
from ckl_jax.presets import finetune_preset
from ckl_jax.rl.program import Arms, Run, Seeds, make_mesh, make_program, make_runs
from ckl_jax.rl.setup import set_up
from ckl_jax.runs.directory import RESUMABLE, RunDirectory
from ckl_jax.runs.logbook import Logbook
from ckl_jax.runs.logs import LogOptions
from ckl_jax.runs.progress import display
from ckl_jax.runtime import cli, finite, preemption, sharding
from ckl_jax.runtime.paths import AnyPath


def run(
    path: AnyPath,
    described: Mapping[str, Any],
    config: FinetuneConfig,
    model: Model,
    arms: Arms,
    seeds: int,
    logs: LogOptions,
    title: str = "",
    certainty_from: Model | None = None,
) -> RunDirectory:
    """Trains what is missing of all arms x seeds in a directory of their own; that directory, closed, to be read.

    Args:
      described: its config.json.
      title: shown before the progress.
      certainty_from: another model whose certainty weighs the KL.

    Raises:
      ConfigError: what ``make_program``, ``make_runs``, ``make_mesh`` and ``RunDirectory`` refuse; nothing is touched.
    """
    make_program(config, model, certainty_from)  # What these refuse is refused before the directory is made.
    make_mesh(config, len(make_runs(config, arms, seeds)[0]))
    with contextlib.closing(RunDirectory(path, described, logs)) as directory, display(logs.quiet) as progress:
        if title:
            progress(title)
        finetune(config, model, directory, arms, seeds, progress, certainty_from)
    return directory


@preemption.deferred()
def finetune(
    config: FinetuneConfig,
    model: Model,
    directory: RunDirectory,
    arms: Arms,
    seeds: int,
    progress: Callable[[str], None] = print,
    certainty_from: Model | None = None,
) -> list[Run]:
    """Trains all arms x seeds, logging every round and test, and saves every run's policy.

    The records of metrics.jsonl have ``step`` (rounds done), ``arm``, ``seed`` and either a round's diagnostics or
    ``test_target`` / ``test_old``; samples.jsonl gets two answers of each arm's first seed at every test. Policies go
    to ``<arm>/seed_<k>/`` as checkpoints like the pre-trained one.

    Raises:
      ConfigError: a run that had begun has no checkpoint left.
      PreemptedError: SIGTERM came, and the rounds up to the next test are done and saved.
      NotFiniteError: a metric or parameter is not finite; nothing of those rounds is logged or saved.
      OSError: a file cannot be written. All four leave what was saved before.
    """
    setup = set_up(config, model, arms, seeds, certainty_from)
    program, runs = setup.program, setup.runs
    if idle := sharding.idle(setup.create.mesh, f"{len(runs)} runs of episodes {config.episodes} each"):
        progress(idle)
    restored = directory.restore(setup.states)
    done, states = restored or (0, setup.create.run())
    logbook = Logbook(program, runs, directory, progress, done)
    again = directory.rewind_metrics(
        done if restored else -1,
        recorded=done if restored else None,
        tested=logbook.problems_at(done) if restored else None,
    )
    if again:  # The run was to end here until now, so it was tested on more problems.
        logbook.test(done, states)
    if not restored:
        logbook.tell_start(logbook.test(0, states))
        directory.checkpoints.save(0, states)
        directory.log_seconds(0, time.monotonic() - logbook.start)
    trained = done < config.rounds
    while done < config.rounds:
        if preemption.requested():
            raise preemption.PreemptedError(f"round {done}/{config.rounds} is saved in {directory.path}")
        chunk_start = time.monotonic()
        states, metrics = setup.train(states, range(done, done + config.test_every)).run()
        metrics = sharding.to_host(metrics)
        names = [run.name for run in runs]
        finite.require_metrics("round", done, names, metrics)
        finite.require_state("round", done + config.test_every, names, states, by_run=True)
        logbook.write_rounds(done, metrics)
        done += config.test_every
        target = logbook.test(done, states)
        directory.checkpoints.save(done, states)
        directory.log_seconds(done, time.monotonic() - chunk_start)
        logbook.tell(done, target, metrics["kl"][:, -1])
    for index, run in enumerate(runs):
        made_by = {"run": run.name, "config": dataclasses.asdict(config), "overrides": dict(arms[run.arm])}
        path = directory.path / run.name
        if trained or not is_saved(
            path, made_by, RESUMABLE.same_numbers
        ):  # Saved again, its files would have other names.
            policy = sharding.to_host(jax.tree.map(lambda x, index=index: x[index], states.params["policy"]))
            save_model(path, model._replace(config=program.model, params=policy), made_by)
    return runs


@dataclass(frozen=True)
class FinetuneCommand:
    """RL fine-tuning with the prioritized KL penalty (beta 0: the standard one)."""

    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = field(default_factory=FinetuneConfig)
    checkpoint: pathlib.Path = SHIPPED_TINY
    """Pre-trained model: a directory with params/ and model.json; default: the one that ships for the scale."""
    out: pathlib.Path = pathlib.Path("runs/finetuned")
    """Directory of the run: new, empty, or of the same command interrupted."""
    seeds: Seeds = 1
    """Runs with seeds seed, seed + 1, ..."""
    logs: Annotated[LogOptions, tyro.conf.arg(name="")] = field(default_factory=LogOptions)
    certainty_checkpoint: pathlib.Path | None = None
    """Another pre-trained model of the task: the KL is weighted by its certainty J and entropy instead of the
    reference's. Does it matter whose certainty it is?"""

    def __post_init__(self) -> None:
        require_fields(self)
        require_certainty_counts(self)


def preset(scale: str = "tiny", recipe: str = "ours") -> FinetuneCommand:
    return FinetuneCommand(finetune_preset(scale, recipe), shipped(scale=scale))


def main(command: FinetuneCommand) -> None:
    model, other, arms = load_model(command.checkpoint), certainty_model(command), {"run": dict[str, Any]()}
    described = {"command": "finetune", **describe(command, model, other)}
    settings = command.config, model, arms, command.seeds, command.logs
    directory = run(command.out, described, *settings, certainty_from=other)
    runs = [Run("run", command.config.seed + index) for index in range(command.seeds)]
    print(f"saved: {', '.join(str(directory.path / run.name) for run in runs)}")


def require_certainty_counts(command: Any) -> None:
    """Raises ConfigError for a ``certainty_checkpoint`` that no weight of the command's config reads."""
    other, unread = command.certainty_checkpoint, "none where no token's KL depends on it (beta, kl_weights)"
    require(other is None or command.config.reads_certainty, "certainty_checkpoint", str(other), unread)


def certainty_model(command: Any) -> Model | None:
    """The other model whose certainty weighs the KL, of a command that has such an option.

    Raises:
      ConfigError: what ``load_model`` refuses, under the name of that option.
    """
    if command.certainty_checkpoint is None:
        return None
    with naming("certainty_checkpoint", instead_of="checkpoint"):
        return load_model(command.certainty_checkpoint)


def describe(command: Any, model: Model, certainty_from: Model | None = None) -> dict[str, Any]:
    """What determines a fine-tuning command's numbers: its config, its seeds, the task, and the models' parameters."""
    described = {
        "config": dataclasses.asdict(command.config),
        "seeds": command.seeds,
        "task": model.task.name,
        **identity(model),
    }
    if certainty_from is not None:
        described |= {f"certainty_{name}": value for name, value in identity(certainty_from).items()}
    return described


if __name__ == "__main__":
    cli.run(main, FinetuneCommand, preset)
