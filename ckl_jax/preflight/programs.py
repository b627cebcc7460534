"""The programs of a command, as calls that can be lowered: the same code makes them that the command runs."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from ckl_jax import evaluate, finetune, pretrain
from ckl_jax.checkpoint.shipped import shipped
from ckl_jax.checkpoint.store import Model, load_model
from ckl_jax.datasets.stream import TokenStream
from ckl_jax.evaluate import EvaluateCommand
from ckl_jax.finetune import FinetuneCommand, certainty_model
from ckl_jax.model import param_shapes
from ckl_jax.next_character import make_mesh, planned_state, train_step
from ckl_jax.presets import pretrain_preset
from ckl_jax.pretrain import PretrainCommand
from ckl_jax.rl import evaluation
from ckl_jax.rl.setup import set_up
from ckl_jax.rollout.trajectory import Sampling
from ckl_jax.runtime import sharding
from ckl_jax.runtime.targets import Call
from ckl_jax.tasks.catalog import task_named

AnyCommand = TypeVar("AnyCommand", PretrainCommand, FinetuneCommand)


class Planned(NamedTuple):
    """A program of a command.

    Attributes:
      beside: bytes a device that the command keeps there meanwhile, and that the program does not read.
    """

    name: str
    call: Call
    beside: int = 0


class Command(NamedTuple):
    """A command that can be planned: its options' type and presets, its programs, and what would make them smaller."""

    options: Any
    preset: Callable[..., Any] | None
    programs: Callable[[Any], Iterator[Planned]]
    smaller: Callable[[Any], Iterator[tuple[str, Any]]]


def _bytes(shapes: Any) -> int:
    """Bytes on one device."""
    leaves = jax.tree.leaves(shapes)
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves)


def of_pretraining(command: PretrainCommand) -> Iterator[Planned]:
    config = command.config
    mesh, task = make_mesh(config), task_named(config.task)
    state, create = planned_state(config, mesh)
    yield Planned("first state", create)
    characters = config.num_documents * task.longest_episode(config.max_digits, extra=0)  # At most.
    tokens_N = jax.ShapeDtypeStruct((characters,), np.uint8)
    starts_E = jax.ShapeDtypeStruct((config.num_documents,), np.int32)
    stream = sharding.put((tokens_N, starts_E), sharding.everywhere(mesh))
    yield Planned("training step", Call(train_step, mesh, (config, state, TokenStream(*stream))))
    model = Model(config.model, config.max_digits, state.tested, task)
    shared = 0 if config.shard_state else _bytes(state.tested)  # Parameters that are split are gathered for a test.
    beside = _bytes(state) - shared + _bytes(stream)
    for digits, problems in pretrain.tested_on(config).items():
        sampling = evaluate.sampled_at(None, task.max_answer_length(digits))
        yield Planned(f"evaluation, {digits} digits", _evaluation(model, problems, digits, sampling), beside)


def _evaluation(model: Model, problems: Any, digits: int, sampling: Sampling) -> Call:
    first, _ = next(evaluate.judge_calls(model, problems, digits, sampling))
    return first


def of_evaluation(command: EvaluateCommand) -> Iterator[Planned]:
    model, extra = load_model(command.checkpoint), command.extra_length
    moved = {offset: _without_numbers(evaluate.moved(model, offset)) for offset in command.offsets}
    for digits in evaluate.lengths(model):
        if model.task.longest_episode(digits, extra) + max(moved) <= model.config.block_size:
            problems = model.task.varying_problems(np.random.default_rng(0), command.problems, digits)
            sampling = evaluate.sampled_at(command.temperature, model.task.max_answer_length(digits, extra))
            for offset, each in moved.items():
                name = f"evaluation, {digits} digits" + (f" from position {offset}" if len(moved) > 1 else "")
                yield Planned(name, _evaluation(each, problems, digits, sampling))


def of_finetuning(command: FinetuneCommand) -> Iterator[Planned]:
    config, lent = command.config, certainty_model(command)
    other = None if lent is None else _without_numbers(lent)
    setup = set_up(config, _model(command), {"run": {}}, command.seeds, other)
    yield Planned("first states", setup.create)
    rounds = setup.train(setup.states, range(config.test_every))
    yield Planned(f"{config.test_every} rounds of {len(setup.runs)} runs", rounds)
    policies = setup.states.params["policy"]
    beside = _bytes(setup.states) - _bytes(policies) + _bytes((setup.ref_params, setup.certainty_params))
    for name, (drawn, digits) in evaluation.problem_sets(setup.program, config.test_problems).items():
        first, _ = next(evaluation.answer_calls(setup.program, policies, drawn, digits))
        yield Planned(f"test on {name} lengths", first, beside)


def _model(command: FinetuneCommand) -> Model:
    """The shape of the checkpoint; of the scale's pre-training where none was named and none of that scale ships."""
    scale = command.config.scale
    if scale in ("tiny", "ladder") or command.checkpoint != shipped(scale=scale):
        return _without_numbers(load_model(command.checkpoint))
    config = pretrain_preset(scale)
    return Model(config.model, config.max_digits, param_shapes(config.model), task_named(config.task))


def _without_numbers(model: Model) -> Model:
    return model._replace(params=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.params))


def _with(command: AnyCommand, **changes: Any) -> AnyCommand:
    """The command with another config."""
    return dataclasses.replace(command, config=dataclasses.replace(command.config, **changes))


def _smaller_pretraining(command: PretrainCommand) -> Iterator[tuple[str, PretrainCommand]]:
    config, with_ = command.config, functools.partial(_with, command)
    if not config.shard_state:
        yield "--shard-state", with_(shard_state=True)
    for parts in (2, 4, 8):
        if config.microbatches == 1 and config.batch_size % parts == 0:
            yield f"--microbatches {parts}", with_(microbatches=parts)
    again = dataclasses.replace(config.model, remat=True)
    if not config.model.remat:
        yield "--model.remat", with_(model=again)
    each = config.batch_size
    yield f"--shard-state --model.remat --microbatches {each}", with_(shard_state=True, model=again, microbatches=each)


def _smaller_finetuning(command: FinetuneCommand) -> Iterator[tuple[str, FinetuneCommand]]:
    config, with_ = command.config, functools.partial(_with, command)
    if config.runs_at_once > 1:
        yield "--runs-at-once 1", with_(runs_at_once=1)
    if config.minibatch == "episodes":
        yield "--episode-batch 1", with_(episode_batch=1)
    if config.rollout_batch > 16:
        yield "--rollout-batch 16", with_(rollout_batch=16)
    if not config.remat:
        yield "--remat", with_(remat=True)
    if not config.shard_state:
        yield "--shard-state", with_(shard_state=True)
    every = {"runs_at_once": 1, "rollout_batch": 16, "remat": True, "shard_state": True, "episode_batch": 1}
    words = "--runs-at-once 1 --rollout-batch 16 --remat --shard-state --episode-batch 1"
    yield words, with_(**every)


COMMANDS = {
    "pretrain": Command(PretrainCommand, pretrain.preset, of_pretraining, _smaller_pretraining),
    "finetune": Command(FinetuneCommand, finetune.preset, of_finetuning, _smaller_finetuning),
    "evaluate": Command(EvaluateCommand, None, of_evaluation, lambda command: iter(())),
}
