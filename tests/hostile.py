"""What a refusal has to be: one line, before anything compiles, with every file as it was."""

import contextlib
import dataclasses
import importlib
import os
import pathlib
import pickle
import re
import resource
import stat
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ckl_jax.checkpoint.store import Model, save_model
from ckl_jax.config import ModelConfig
from ckl_jax.fields import kinds
from ckl_jax.model import GPT2
from ckl_jax.runtime import cli
from ckl_jax.runtime.options import is_unnamed

CANARY = "unpickled"
TYPES = {
    "ckl_jax.pretrain": "PretrainCommand",
    "ckl_jax.finetune": "FinetuneCommand",
    "ckl_jax.evaluate": "EvaluateCommand",
    "ckl_jax.convert": "ConvertCommand",
    "ckl_jax.models": "ModelsCommand",
    "ckl_jax.check_xla": "CheckXlaCommand",
    "ckl_jax.preflight": "PreflightCommand",
    "experiments.figure1_scratchpad": "Figure1Command",
    "experiments.figure2_pretraining": "Figure2Command",
    "experiments.figure3_pretraining_levels": "Figure3Command",
    "experiments.figure4_prioritized_kl": "Figure4Command",
    "experiments.figure5_certainty_colors": "Figure5Command",
    "experiments.figure6_beta_sweep": "Figure6Command",
    "experiments.figure7_critical_tokens": "Figure7Command",
    "experiments.table1_certainty_gap": "Table1Command",
    "experiments.critical_token_discovery": "DiscoveryCommand",
    "experiments.controls": "ControlsCommand",
    "experiments.spared_tokens": "SparedTokensCommand",
    "experiments.minibatches": "MinibatchesCommand",
    "experiments.regularizers": "RegularizersCommand",
    "experiments.reproduce": "ReproduceCommand",
    "experiments.benchmark": "BenchmarkCommand",
    "experiments.scaling_on_paper": "ScalingCommand",
    "experiments.profile_round": "ProfileCommand",
    "experiments.freed_pressure": "FreedPressureCommand",
}
_refusing: list[bool] = []


class CompiledError(BaseException):
    """Something was compiled although the input should have been refused: what was asked for is not to go on."""


def _stop_compilation(event, _, **__):
    if _refusing and "backend_compile" in event:
        raise CompiledError(event)


jax.monitoring.register_event_duration_secs_listener(_stop_compilation)


class Canary:
    """Whoever unpickles it makes a file of that name in the working directory."""

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(CANARY),)


PICKLE = pickle.dumps(Canary())


def snapshot(directory):
    """Every file below a directory with its content; links are not followed, pipes and devices not read."""
    found = {}
    for root, directories, files in os.walk(directory):
        for path in (pathlib.Path(root, name) for name in (*directories, *files)):
            mode = path.lstat().st_mode
            small = stat.S_ISREG(mode) and path.stat().st_size < 2**20
            content = path.read_bytes() if small else os.readlink(path) if stat.S_ISLNK(mode) else None
            found[str(path.relative_to(directory))] = (stat.S_IFMT(mode), path.lstat().st_size, content)
    return found


@contextlib.contextmanager
def no_file_above(size):
    """What a full disk is to writers that are not ours, without one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def refusal(directory):
    """Asserts that the block leaves a directory as it was, compiles nothing and unpickles nothing."""
    before = snapshot(directory)
    _refusing.append(True)
    try:
        yield
    finally:
        _refusing.pop()
    assert snapshot(directory) == before
    assert not pathlib.Path(CANARY).exists()


def saved_model(directory):
    """A directory with a random model of one layer for operands of 1 digit, made without compiling."""
    config = ModelConfig(num_layers=1, num_heads=1, width=4, block_size=200)
    abstract = jax.eval_shape(lambda: GPT2(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), abstract)
    save_model(directory, Model(config, 1, params), {})
    return directory


def command_of(name):
    """The module that ``python -m name`` runs, the type of its options, and its preset or None."""
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    return module, getattr(module, TYPES[name]), getattr(module, "preset", None)


def options_of(config_type, prefix="--"):
    """Every option of a command, with its type: those of a part with a name of its own are ``--part.option``."""
    for name, kind in kinds(config_type).items():
        option = prefix if is_unnamed(kind) else prefix + name.replace("_", "-")
        plain = getattr(kind, "__origin__", kind)
        if dataclasses.is_dataclass(plain):
            yield from options_of(plain, option if is_unnamed(kind) else option + ".")
        else:
            yield option, kind


def refused_command(here, capsys, monkeypatch, name, arguments, expected):
    """Asserts that a command ends with 2 and one line on standard error, and is a ``refusal``."""
    module, config_type, preset = command_of(name)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with refusal(here), pytest.raises(SystemExit) as stop:
        cli.run(module.main, config_type, preset)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert re.fullmatch(rf"error: {expected}\n", printed.err), printed.err
