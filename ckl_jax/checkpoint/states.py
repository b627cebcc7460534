"""Orbax checkpoints of a whole train state while a run goes on, so that it can be resumed.

Several processes save and restore together: each writes and reads its own parts, process 0 what lies beside them.
"""

import json
import pathlib
from typing import Any

import orbax.checkpoint as ocp

from ckl_jax.checkpoint import arrays, manifest
from ckl_jax.runtime import hosts, reading
from ckl_jax.runtime.paths import AnyPath, resolved, writing

HISTORY_NAME = "history.json"


class StateCheckpoints:
    """Numbered checkpoints of a train state under ``directory``; the newest two are kept.

    What an earlier process left half-written is removed, so one process at a time may have the directory. What has no
    manifest stays until a complete one is read or written, or until it is told to be removed.
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
                hosts.of_first(lambda: manifest.beside(path).unlink(missing_ok=True))  # It would be of other files.
                self.manager.delete(step)
            self.manager.save(step, args=ocp.args.StandardSave(state), force=True)
            self.manager.wait_until_finished()
        hosts.of_first(lambda: self._finish(path, history))
        self.remove_unfinished()

    def _finish(self, path: pathlib.Path, history: Any) -> None:
        if history is not None:
            hosts.write_json(path / HISTORY_NAME, history)
        manifest.write(path)
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
            stored = arrays.flat(arrays.metadata(reader, path / "default"))
            wanted = arrays.flat(ocp.tree.serialize_tree(abstract_state, keep_empty_nodes=True))
            arrays.require_same(path, arrays.shapes(stored), arrays.shapes(wanted), "this run")
            state = self.manager.restore(step, args=ocp.args.StandardRestore(abstract_state))
        self.remove_unfinished()
        return step, state

    def _newest(self) -> int | None:
        """The newest step with a manifest, verified."""
        newest = max(set(self.manager.all_steps()) - self._unfinished(), default=None)
        if newest is not None:
            manifest.verify(self.directory / str(newest))
        return newest

    def unfinished(self) -> set[int]:
        """The steps without a manifest: a process died before it wrote one, or it was not copied."""
        return hosts.of_first(self._unfinished)

    def _unfinished(self) -> set[int]:
        return {step for step in self.manager.all_steps() if not manifest.beside(self.directory / str(step)).exists()}

    def remove_unfinished(self) -> None:
        """Deletes what has no manifest: it would count among those that are kept, in a complete one's place."""
        for step in sorted(self.unfinished()):
            self.manager.delete(step)

    def restore_history(self, step: int) -> Any:
        """The ``history`` that a checkpoint was saved with, or None; verified when its state was restored."""
        path = self.directory / str(step) / HISTORY_NAME
        return hosts.of_first(lambda: json.loads(path.read_text(encoding="utf-8")) if path.exists() else None)

    def close(self) -> None:
        self.manager.close()
