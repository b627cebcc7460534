"""RL fine-tuning of a checkpoint, one or several runs (arms x seeds) as one program.

    python -m ckl_jax.finetune --checkpoint runs/tiny --out runs/finetuned

An interrupted call goes on from its last checkpoint with the same command and ends with the same numbers. Fields that
change the speed alone may be others then, and ``rounds`` may be more if the learning rate does not decay.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from ckl_jax import cli, finite, preemption, sharding, token_weights
from ckl_jax import problems as problems_lib
from ckl_jax.checkpoint import SHIPPED_TINY, Model, fingerprint, load_model, save_model
from ckl_jax.config import require
from ckl_jax.episodes import Hyper, Program
from ckl_jax.errors import is_integer
from ckl_jax.finetune_config import FinetuneConfig, finetune_preset
from ckl_jax.logs import LogOptions
from ckl_jax.paths import AnyPath
from ckl_jax.problems import Problems
from ckl_jax.progress import Status, display
from ckl_jax.runs import RunDirectory
from ckl_jax.testing import test
from ckl_jax.updates import RunState, init_run, train_rounds

Arms = Mapping[str, Mapping[str, Any]]
MOST_SEEDS = 1_000


class Run(NamedTuple):
    """One run of a program: an arm's name and a seed."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}/seed_{self.seed}"


def make_program(config: FinetuneConfig, model: Model) -> Program:
    """The static part of the program. Raises ConfigError if the episodes do not fit the model's block."""
    program = Program(model.config, config, model.max_pretrain_digits, model.task)
    total, block = program.task.max_prompt_length(program.digits) + program.max_length, model.config.block_size
    allowed = f"what fits the model: prompt + answer = {total} characters, block_size = {block}"
    require(total <= block, "extra_digits", config.extra_digits, allowed)
    return program


def make_mesh(config: FinetuneConfig, num_runs: int) -> Mesh:
    """Devices for the runs and for what they collect and learn from; raises ConfigError like ``sharding.make_mesh``."""
    size = config.minibatch_episodes if config.minibatch == "episodes" else config.minibatch_transitions
    return sharding.make_mesh(num_runs, math.gcd(config.episodes, size), data_devices=config.data_devices)


def make_runs(config: FinetuneConfig, arms: Arms, seeds: int) -> tuple[list[Run], Hyper]:
    """All arms x seeds and what differs between them, as arrays [runs].

    Args:
      arms: name -> overrides of ``learning_rate``, ``kl_coefficient``, ``beta`` and ``kl_weights``.

    Raises:
      ConfigError: no seed, no arm, an override of another field or of a value that the config refuses.
    """
    require(is_integer(seeds) and 1 <= seeds <= MOST_SEEDS, "seeds", seeds, f"at least 1, at most {MOST_SEEDS}")
    require(len(arms) >= 1, "arms", dict(arms), "at least one")
    traced = tuple(name for name in Hyper._fields if name != "seed")
    runs, rows = [], []
    for arm, overrides in arms.items():
        require(set(overrides) <= set(traced), f"arms.{arm}", sorted(overrides), f"overrides of {', '.join(traced)}")
        of_arm = dataclasses.replace(config, **overrides)
        for seed in range(config.seed, config.seed + seeds):
            runs.append(Run(arm, seed))
            numbers = {name: float(getattr(of_arm, name)) for name in traced if name != "kl_weights"}
            rows.append(numbers | {"seed": seed, "kl_weights": token_weights.index_of(of_arm.kl_weights)})
    types = {"seed": np.uint32, "kl_weights": np.int32}
    columns = {name: [row[name] for row in rows] for name in Hyper._fields}
    arrays: dict[str, Any] = {name: np.array(of_run, types.get(name, np.float32)) for name, of_run in columns.items()}
    return runs, Hyper(**arrays)


def draw_problems(program: Program, seed: int, round_index: int) -> Problems:
    """The problems of one round, each as often as it is answered: the same for all arms of a seed."""
    rng, group = np.random.default_rng([seed, round_index]), program.config.group_size
    drawn = program.task.rl_problems(rng, program.config.episodes // group, program.digits, program.max_pretrain_digits)
    repeated = [problem for problem in drawn for _ in range(group)]
    return problems_lib.pack(program.task, repeated, program.digits, program.max_pretrain_digits)


def _stack(items: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *items)


@preemption.deferred()
def finetune(
    config: FinetuneConfig,
    model: Model,
    directory: RunDirectory,
    arms: Arms,
    seeds: int,
    progress: Callable[[str], None] = print,
) -> list[Run]:
    """Trains all arms x seeds, logging every round and test, and saves every run's policy.

    The records of metrics.jsonl have ``step`` (rounds done), ``arm``, ``seed`` and either a round's diagnostics or
    ``test_target`` / ``test_old``; samples.jsonl gets two answers of each arm's first seed at every test. Policies go
    to ``<arm>/seed_<k>/`` as checkpoints like the pre-trained one.

    Raises:
      PreemptedError: SIGTERM came, and the rounds up to the next test are done and saved.
      NotFiniteError: a metric or parameter is not finite; nothing of those rounds is logged or saved.
      OSError: a file cannot be written. All three leave what was saved before.
    """
    program = make_program(config, model)
    runs, hypers = make_runs(config, arms, seeds)
    mesh = make_mesh(config, len(runs))
    hypers = sharding.put(hypers, sharding.by_run(mesh))
    ref_params = sharding.put(model.params, sharding.everywhere(mesh))
    create = jax.vmap(functools.partial(init_run, program), in_axes=(None, 0))
    abstract = jax.eval_shape(create, ref_params, hypers)
    shardings = sharding.state_shardings(mesh, abstract, config.shard_state, sharding.RUN_AXIS)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    restored = directory.checkpoints.restore_latest(abstract)
    done, states = restored or (0, jax.jit(create, out_shardings=shardings)(ref_params, hypers))

    def problems_at(step: int) -> int:
        return config.final_problems if step in (0, config.rounds) else config.test_problems

    again = directory.rewind_metrics(
        done if restored else -1,
        recorded=done if restored else None,
        tested=problems_at(done) if restored else None,
    )
    start, first = time.monotonic(), done

    def run_test(step: int, states: RunState) -> np.ndarray:
        count = problems_at(step)
        policies = states.params["policy"]
        if step == 0:
            policies = jax.tree.map(lambda x: x[:1], policies)
        tested = test(program, policies, count)
        per_run = {name: np.broadcast_to(value, len(runs)) for name, value in tested.accuracy.items()}
        directory.log_samples(
            [
                {"step": step, "arm": run.arm, "seed": run.seed} | sample
                for index, run in enumerate(runs)
                if run.seed == config.seed
                for sample in tested.samples(index if step else 0)
            ]
        )
        directory.log(
            [
                {"step": step, "arm": run.arm, "seed": run.seed, "test_problems": count}
                | {f"test_{name}": float(value[index]) for name, value in per_run.items()}
                for index, run in enumerate(runs)
            ]
        )
        return per_run["target"]

    if again:  # Until now the run was to end here.
        run_test(done, states)
    if not restored:
        target = run_test(0, states)
        line = f"before: {100 * target.mean():.1f}% on {program.digits} digits ({time.monotonic() - start:.0f} s)"
        progress(Status(line, 0, config.rounds, f"{100 * target.mean():.1f}%", None))
        directory.checkpoints.save(0, states)
        directory.log_seconds(0, time.monotonic() - start)
    while done < config.rounds:
        if preemption.requested():
            raise preemption.PreemptedError(f"round {done}/{config.rounds} is saved in {directory.path}")
        chunk_start = time.monotonic()
        rounds = range(done, done + config.test_every)
        problems = _stack([_stack([draw_problems(program, run.seed, r) for r in rounds]) for run in runs])
        problems = sharding.put(problems, sharding.by_run(mesh))
        states, metrics = train_rounds(program, mesh, ref_params, states, hypers, problems)
        metrics = sharding.to_host(metrics)
        names = [run.name for run in runs]
        finite.require_metrics("round", done, names, metrics)
        finite.require_state("round", done + config.test_every, names, states, by_run=True)
        directory.log(_round_records(runs, done, metrics))
        done += config.test_every
        target = run_test(done, states)
        directory.checkpoints.save(done, states)
        directory.log_seconds(done, time.monotonic() - chunk_start)
        elapsed = time.monotonic() - start
        left = elapsed / (done - first) * (config.rounds - done)
        accuracy, kl = (_by_arm(runs, values) for values in (target, metrics["kl"][:, -1]))
        shown = ", ".join(f"{arm} {100 * value:.1f}%" for arm, value in accuracy.items())
        line = f"round {done}/{config.rounds}: {shown} on {program.digits} digits ({elapsed:.0f} s, {left:.0f} s left)"
        values = ", ".join(f"{arm} {100 * accuracy[arm]:.1f}% KL {kl[arm]:.3g}" for arm in accuracy)
        progress(Status(line, done, config.rounds, values, left))
    for index, run in enumerate(runs):
        policy = sharding.to_host(jax.tree.map(lambda x, index=index: x[index], states.params["policy"]))
        made_by = {"run": run.name, "config": dataclasses.asdict(config), "overrides": dict(arms[run.arm])}
        save_model(directory.path / run.name, model._replace(params=policy), made_by)
    return runs


def run(
    path: AnyPath,
    described: Mapping[str, Any],
    config: FinetuneConfig,
    model: Model,
    arms: Arms,
    seeds: int,
    logs: LogOptions,
    title: str = "",
) -> RunDirectory:
    """Trains what is missing of all arms x seeds in a directory of their own; that directory, closed, to be read.

    Args:
      described: its config.json.
      title: shown before the progress.

    Raises:
      ConfigError: what ``make_program``, ``make_runs`` and ``RunDirectory`` refuse; nothing is touched.
    """
    make_program(config, model)
    make_runs(config, arms, seeds)
    with contextlib.closing(RunDirectory(path, described, logs)) as directory, display(logs.quiet) as progress:
        if title:
            progress(title)
        finetune(config, model, directory, arms, seeds, progress)
    return directory


def _by_arm(runs: list[Run], values_R: np.ndarray) -> dict[str, float]:
    arms = dict.fromkeys(run.arm for run in runs)
    return {arm: float(np.mean(values_R[[run.arm == arm for run in runs]])) for arm in arms}


def _round_records(runs: list[Run], done: int, metrics: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    rounds = next(iter(metrics.values())).shape[1]
    return [
        {"step": done + r + 1, "arm": run.arm, "seed": run.seed}
        | {name: values[index, r].tolist() for name, values in metrics.items()}
        for r in range(rounds)
        for index, run in enumerate(runs)
    ]


@dataclass(frozen=True)
class FinetuneCommand:
    """RL fine-tuning of a checkpoint with the prioritized KL penalty (beta 0: the standard one)."""

    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = field(default_factory=FinetuneConfig)
    checkpoint: pathlib.Path = SHIPPED_TINY
    """Pre-trained model: a directory with params/ and model.json; default: the tiny one that ships with the package."""
    out: pathlib.Path = pathlib.Path("runs/finetuned")
    """Directory of the run: new, empty, or of the same command interrupted."""
    seeds: int = 1
    """Runs with seeds seed, seed + 1, ..."""
    logs: Annotated[LogOptions, tyro.conf.arg(name="")] = field(default_factory=LogOptions)


def preset(scale: str = "tiny", recipe: str = "ours") -> FinetuneCommand:
    return FinetuneCommand(finetune_preset(scale, recipe))


def main(command: FinetuneCommand) -> None:
    model, arms = load_model(command.checkpoint), {"run": dict[str, Any]()}
    described = {"command": "finetune", **describe(command, model)}
    directory = run(command.out, described, command.config, model, arms, command.seeds, command.logs)
    runs, _ = make_runs(command.config, arms, command.seeds)
    print(f"saved: {', '.join(str(directory.path / run.name) for run in runs)}")


def describe(command: Any, model: Model) -> dict[str, Any]:
    """What determines a fine-tuning command's numbers: its config, its seeds, the checkpoint's task and parameters."""
    return {
        "config": dataclasses.asdict(command.config),
        "seeds": command.seeds,
        "task": model.task.name,
        "checkpoint": fingerprint(model.params),
    }


if __name__ == "__main__":
    cli.run(main, FinetuneCommand, preset)
