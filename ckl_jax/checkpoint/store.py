"""A model on disk: its parameters by Orbax, and beside them what it is.

Several processes save and load together: each writes and reads its own parts, process 0 what lies beside them.
"""

import dataclasses
import hashlib
import json
import operator
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from ckl_jax.checkpoint import arrays, description, manifest, shipped
from ckl_jax.config import ModelConfig
from ckl_jax.errors import ConfigError, require
from ckl_jax.model import param_shapes
from ckl_jax.runtime import hosts, reading
from ckl_jax.runtime.paths import AnyPath, require_directory, resolved, writing
from ckl_jax.tasks.columns import ADDITION
from ckl_jax.tasks.task import Task

Params = Any


class Model(NamedTuple):
    """A language model as a directory holds it: its shape, N (digits it was pre-trained on), parameters and task."""

    config: ModelConfig
    max_pretrain_digits: int
    params: Params
    task: Task = ADDITION


def save_model(directory: AnyPath, model: Model, made_by: dict[str, Any]) -> None:
    """Writes ``directory/params``, its manifest and ``model.json``, which comes last, replacing what is there.

    Its config is written ``for_any_machine``.

    Args:
      made_by: what a reader needs to make it again: command, seed, config.

    Raises:
      OSError: a file cannot be written.
    """
    directory = resolved(directory)
    description.require_digits(model.max_pretrain_digits)
    require_directory(directory, "directory")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "params"
    hosts.of_first(lambda: (directory / "model.json").unlink(missing_ok=True))
    with writing(path), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, model.params, force=True)
    described = {
        "task": model.task.name,
        "max_pretrain_digits": model.max_pretrain_digits,
        "model": dataclasses.asdict(model.config.for_any_machine),
        "made_by": made_by,
    }

    def describe() -> None:
        # Orbax asks for this file in a bucket, where models may be copied; its own would hold the directory's path.
        (path / "commit_success.txt").write_text("complete\n", encoding="utf-8")
        manifest.write(path)
        hosts.write_json(directory / "model.json", described)

    hosts.of_first(describe)


def is_saved(directory: AnyPath, made_by: dict[str, Any], same: Callable[[Any, Any], bool] = operator.eq) -> bool:
    """Whether a directory has a complete and undamaged model that ``save_model`` wrote with the same ``made_by``.

    Args:
      same: whether two of them are, the one that was written first.
    """
    directory = resolved(directory)

    def found() -> bool:
        try:
            read_description(directory)
        except ConfigError:
            return False
        before = reading.read_object(directory / "model.json", "checkpoint").get("made_by")
        return same(before, json.loads(json.dumps(made_by)))

    return hosts.of_first(found)


def load_model(directory: AnyPath) -> Model:
    """Reads what ``save_model`` wrote, or a model that ships, by its name.

    Raises:
      ConfigError: missing, damaged, parameters of other names, shapes or types than model.json says, or NaN in them; or
        several processes read different ones.
    """
    directory = resolved(shipped.located(directory), "checkpoint")
    path = directory / "params"
    config, max_pretrain_digits, task = hosts.together(lambda: read_description(directory))
    with reading.damaged(path, "checkpoint"), ocp.StandardCheckpointer() as checkpointer:
        stored = arrays.shapes(arrays.metadata(checkpointer, path))
        few = config.num_layers <= len(stored)
        require(
            few, "checkpoint", f"num_layers = {config.num_layers} in model.json", f"at most {len(stored)}, the arrays"
        )
        wanted = param_shapes(config)
        arrays.require_same(directory, stored, arrays.shapes(wanted), "model.json")
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # Not where they were saved from.
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), wanted)
        params = checkpointer.restore(path, wanted)
    for name, leaf in jax.tree_util.tree_leaves_with_path(params):
        finite = bool(np.isfinite(np.asarray(leaf)).all())
        named = f"{directory} with NaN or infinity in {jax.tree_util.keystr(name)}"
        require(finite, "checkpoint", named, "finite parameters")
    if hosts.several():
        hosts.require_same("checkpoint", fingerprint(params))
    return Model(config, max_pretrain_digits, params, task)


def identity(model: Model) -> dict[str, Any]:
    """What names a model in a config.json: its parameters, and what decides beside them what it computes and learns."""
    return {"checkpoint": fingerprint(model.params), "model": _beside_parameters(model)}


def kind(model: Model) -> dict[str, Any]:
    """What every policy that is trained from a model has in common with it, in whatever arithmetic, fast or slow."""
    shapes = jax.tree.map(np.shape, model.params)
    return {"task": model.task.name, "shapes": shapes, **_beside_parameters(model)}


def _beside_parameters(model: Model) -> dict[str, Any]:
    of_config = {name: getattr(model.config, name) for name in ("num_heads", "activation")}
    return {"max_pretrain_digits": model.max_pretrain_digits, **of_config}


def fingerprint(params: Params) -> str:
    """SHA-256 over names, shapes, types and values: names parameters by their content, wherever they lie."""
    digest = hashlib.sha256()
    for key, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(key)} {array.shape} {array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()


def read_description(directory: pathlib.Path) -> tuple[ModelConfig, int, Task]:
    """The shape of a model, its N and its task; no device is touched.

    Raises:
      ConfigError: missing or damaged files, as ``load_model``.
    """
    path, params = directory / "model.json", directory / "params"
    description.require_ours(directory)
    complete = all(file.exists() for file in (path, manifest.beside(params), params))
    made = "a directory with params/, params.sha256.json and model.json, as python -m ckl_jax.pretrain writes it"
    made += f", or the name of a model that ships: {' | '.join(shipped.names())}"
    require(complete, "checkpoint", str(directory), made)
    config, max_pretrain_digits, task = description.model_description(path)
    manifest.verify(params)
    description.require_filled(params, config)
    return config, max_pretrain_digits, task
