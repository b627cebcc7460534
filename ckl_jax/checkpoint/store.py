"""Orbax checkpoints: the whole train state while a run goes on, parameters alone when it is done.

A SHA-256 manifest is written beside every checkpoint after it is complete and verified before it is read, because
damaged array files load without an error otherwise. A checkpoint without a manifest counts as unfinished. Files that
nothing reads (``strays``) are in no manifest.
Several processes save and restore together: each writes and reads its own parts, process 0 the manifests.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from ckl_jax.checkpoint import description, shipped
from ckl_jax.config import ModelConfig
from ckl_jax.errors import ConfigError, require
from ckl_jax.model import param_shapes
from ckl_jax.runtime import hosts, reading
from ckl_jax.runtime.paths import AnyPath, files_below, replace, require_directory, resolved, writing
from ckl_jax.runtime.strays import is_unread
from ckl_jax.tasks.columns import ADDITION
from ckl_jax.tasks.task import Task

Params = Any
HISTORY_NAME = "history.json"


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a part; process 0 writes, for all."""
    hosts.of_first(lambda: replace(path, json.dumps(value, indent=2) + "\n"))


def _manifest(directory: pathlib.Path) -> dict[str, str]:
    files = sorted(files_below(directory))
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _manifest_path(directory: pathlib.Path) -> pathlib.Path:
    return directory.parent / f"{directory.name}.sha256.json"


def _verify(directory: pathlib.Path) -> None:
    listed = reading.read_object(_manifest_path(directory), "checkpoint")
    expected = {name: digest for name, digest in listed.items() if not any(map(is_unread, name.split("/")))}
    reading.require_plain(directory, "checkpoint")
    found = _manifest(directory)
    damaged = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if damaged:
        raise ConfigError(f"checkpoint: {directory} is damaged, these files differ from the manifest: {damaged[:3]}")


class StateCheckpoints:
    """Numbered checkpoints of a train state under ``directory``; the newest two are kept.

    What an earlier process left half-written is removed, so one process at a time may have the directory. What has no
    manifest stays until a complete one is read or written.
    """

    def __init__(self, directory: AnyPath):
        self.directory = resolved(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=False, cleanup_tmp_directories=True)
        with reading.damaged(self.directory, "checkpoint"):  # It reads the newest one's metadata.
            self.manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, state: Any, history: Any = None) -> None:
        """Writes a checkpoint and its manifest; returns when both are on disk.

        Args:
          history: what is to be restored beside the state, as JSON.

        Raises:
          OSError: a file cannot be written, and earlier checkpoints are kept.
        """
        path = self.directory / str(step)
        with writing(path):
            if hosts.of_first(path.exists):
                self.manager.delete(step)
            self.manager.save(step, args=ocp.args.StandardSave(state), force=True)
            self.manager.wait_until_finished()
        hosts.of_first(lambda: self._finish(path, history))
        self._remove_unfinished()

    def _finish(self, path: pathlib.Path, history: Any) -> None:
        if history is not None:
            write_json(path / HISTORY_NAME, history)
        write_json(_manifest_path(path), _manifest(path))
        kept = {str(kept_step) for kept_step in self.manager.all_steps()}
        for stale in self.directory.glob("[0-9]*.sha256.json"):
            if stale.name.split(".")[0] not in kept:
                stale.unlink()

    def restore_latest(self, abstract_state: Any) -> tuple[int, Any] | None:
        """The newest complete checkpoint as (step, state), or None.

        Args:
          abstract_state: shapes, types and shardings, as ``jax.eval_shape`` gives them.

        Raises:
          ConfigError: a file differs from the manifest, or the checkpoint has other shapes than the config says.
        """
        step = hosts.of_first(self._newest)
        if step is None:
            return None
        path = self.directory / str(step)
        with reading.damaged(path, "checkpoint"), ocp.StandardCheckpointer() as reader:
            stored = _flat(_metadata(reader, path / "default"))
            wanted = _flat(ocp.tree.serialize_tree(abstract_state, keep_empty_nodes=True))
            _require_same(path, _shapes(stored), _shapes(wanted), "this run")
            state = self.manager.restore(step, args=ocp.args.StandardRestore(abstract_state))
        self._remove_unfinished()
        return step, state

    def _newest(self) -> int | None:
        """The newest step with a manifest, verified."""
        newest = max(set(self.manager.all_steps()) - self._unfinished(), default=None)
        if newest is not None:
            _verify(self.directory / str(newest))
        return newest

    def unfinished(self) -> set[int]:
        """The steps without a manifest: a process died before it wrote one, or it was not copied."""
        return hosts.of_first(self._unfinished)

    def _unfinished(self) -> set[int]:
        return {step for step in self.manager.all_steps() if not _manifest_path(self.directory / str(step)).exists()}

    def _remove_unfinished(self) -> None:
        """One that stayed would count among those that are kept, in a complete one's place."""
        for step in sorted(self.unfinished()):
            self.manager.delete(step)

    def restore_history(self, step: int) -> Any:
        """The ``history`` that a checkpoint was saved with, or None; verified when its state was restored."""
        path = self.directory / str(step) / HISTORY_NAME
        return hosts.of_first(lambda: json.loads(path.read_text(encoding="utf-8")) if path.exists() else None)

    def close(self) -> None:
        self.manager.close()


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
        write_json(_manifest_path(path), _manifest(path))
        write_json(directory / "model.json", described)

    hosts.of_first(describe)


def is_saved(directory: AnyPath, made_by: dict[str, Any]) -> bool:
    """Whether a directory has a complete and undamaged model that ``save_model`` wrote with the same ``made_by``."""
    directory = resolved(directory)

    def found() -> bool:
        try:
            read_description(directory)
        except ConfigError:
            return False
        return reading.read_object(directory / "model.json", "checkpoint").get("made_by") == made_by

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
        stored = _shapes(_metadata(checkpointer, path))
        few = config.num_layers <= len(stored)
        require(
            few, "checkpoint", f"num_layers = {config.num_layers} in model.json", f"at most {len(stored)}, the arrays"
        )
        wanted = param_shapes(config)
        _require_same(directory, stored, _shapes(wanted), "model.json")
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
    complete = all(file.exists() for file in (path, _manifest_path(params), params))
    made = "a directory with params/, params.sha256.json and model.json, as python -m ckl_jax.pretrain writes it"
    made += f", or the name of a model that ships: {' | '.join(shipped.names())}"
    require(complete, "checkpoint", str(directory), made)
    config, max_pretrain_digits, task = description.model_description(path)
    _verify(params)
    description.require_filled(params, config)
    return config, max_pretrain_digits, task


def _require_same(directory: pathlib.Path, stored: dict[str, Any], wanted: dict[str, Any], of: str) -> None:
    for name in sorted(stored.keys() | wanted.keys()):
        found, expected = stored.get(name), wanted.get(name)
        if found != expected:
            raise ConfigError(f"checkpoint: {directory} has {found} for {name}, allowed is {expected} ({of})")


def _metadata(reader: ocp.StandardCheckpointer, path: pathlib.Path) -> Any:
    found = reader.metadata(path).item_metadata
    require(found is not None, "checkpoint", str(path), "the arrays of Orbax as save wrote them, with their metadata")
    return found.tree


def _flat(tree: Any) -> dict[str, Any]:
    return {".".join(map(str, key)): leaf for key, leaf in ocp.tree.to_flat_dict(tree).items()}


def _shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type by name. Orbax casts to what is asked for, so a difference has to be found before."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(key): (tuple(leaf.shape), str(leaf.dtype)) for key, leaf in leaves}
