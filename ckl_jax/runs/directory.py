"""A run's directory: config.json, metrics.jsonl, samples.jsonl, results.json and checkpoints/ of one configuration.

Several processes (``hosts``) share it: process 0 reads and writes its files, for all.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from ckl_jax.checkpoint.states import StateCheckpoints
from ckl_jax.config import FinetuneConfig, ModelConfig, PretrainConfig
from ckl_jax.errors import ConfigError, require
from ckl_jax.resuming import Resumable, unequal
from ckl_jax.runs import lock
from ckl_jax.runs.logs import Copies, LogOptions
from ckl_jax.runs.records import parse, read_json, read_metrics, whole_records
from ckl_jax.runtime import hosts, reading
from ckl_jax.runtime.paths import AnyPath, append, in_bucket, replace, require_directory, resolved
from ckl_jax.runtime.strays import first_owned

LATER = frozenset({"model", "certainty_model"})  # Of ``identity``, since runs note them.
RESUMABLE = Resumable(ModelConfig, PretrainConfig, FinetuneConfig, later=LATER)


class RunDirectory:
    """Opens or resumes ``path`` for ``config``, and keeps other processes out of it until ``close``.

    Nothing keeps other processes out of a bucket's directory: never start the same run twice in one.

    Args:
      logs: where else its records go, from ``rewind_metrics`` on.

    Raises:
      ConfigError: the directory holds another run's config, or other files than logs but no config, or a running
        process has it, or the records cannot go there, or the processes have different configs; then nothing is
        touched. Or it cannot be written.
    """

    def __init__(self, path: AnyPath, config: Mapping[str, Any], logs: LogOptions | None = None):
        self.path, self._logs = resolved(path, "out"), logs or LogOptions()
        self._logs.require_possible(self.path)
        self.metrics_path, self.samples_path = self.path / "metrics.jsonl", self.path / "samples.jsonl"
        self._seconds_path = self.path / "seconds.jsonl"
        self._config, self._copies = config, Copies()
        self._lock: lock.DirectoryLock | None = None
        first = hosts.of_first(lambda: dict(config))
        hosts.together(lambda: self._require_of_first(first))
        hosts.of_first(lambda: self._open(config))
        self.checkpoints = StateCheckpoints(self.path / "checkpoints")

    def _require_of_first(self, first: Mapping[str, Any]) -> None:
        named = ", ".join(unequal(first, self._config))
        require(not named, "out", f"{named} unlike those of process 0", "the same options and checkpoint on every host")

    def _open(self, config: Mapping[str, Any]) -> None:
        wanted = json.loads(json.dumps(config))
        try:
            self._check(wanted)
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = None if in_bucket(self.path) else lock.hold(self.path)
            self._check(wanted)  # Again: until now another process may have had the directory.
            if not (self.path / "config.json").exists():
                hosts.write_json(self.path / "config.json", config)
        except OSError as error:
            raise ConfigError(
                f"out: got {self.path}, allowed is a directory that can be written "
                f"({error.filename or self.path}: {error.strerror})"
            ) from error

    def close(self) -> None:
        """Lets other processes have the directory. What was logged can still be read."""
        self.checkpoints.close()
        self._copies.close()
        self._lock = None

    def _check(self, config: Any) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"out: got {self.path}, a file; allowed is a directory that is new, empty or of this run")
        require_directory(self.path, "out")
        existing = self.path / "config.json"
        if existing.exists():
            RESUMABLE.require(read_json(existing, "out"), config, str(self.path))
            return
        found = first_owned(self.path) if self.path.exists() else None
        if found is not None:
            raise ConfigError(
                f"out: {self.path} holds {found.relative_to(self.path)} but no config.json; "
                "allowed is a directory that is new, empty but for logs, or of this run"
            )

    def record_config(self) -> None:
        """Writes this call's config, of which speed or end may be others than those of the run so far."""
        hosts.write_json(self.path / "config.json", self._config)

    def restore(self, abstract_state: Any) -> tuple[int, Any] | None:
        """The newest checkpoint, as ``StateCheckpoints.restore_latest``; None for a run that has yet to come to one,
        which then begins anew.

        Raises:
          ConfigError: also where the run had come beyond its first checkpoint and none is left, or none with its
            manifest. Its records would all be dropped, and what they took be paid for again. Nothing is touched.
        """
        restored = self.checkpoints.restore_latest(abstract_state)
        if restored is not None:
            return restored
        steps = {record["step"] for record in hosts.of_first(lambda: _logged(self.metrics_path))}
        unfinished = self.checkpoints.unfinished()
        if unfinished and len(steps | unfinished) > 1:
            missing = ", ".join(f"{step}.sha256.json" for step in sorted(unfinished))
            raise ConfigError(
                f"out: {self.checkpoints.directory} has no {missing}, without which no checkpoint can be verified; "
                "allowed is a directory with the manifests of its checkpoints (copy them there too), or another one"
            )
        if len(steps) > 1:
            raise ConfigError(
                f"out: {self.path} has records up to step {max(steps)} and no checkpoint to go on from; "
                "allowed is a directory with its checkpoints, or another one"
            )
        self.checkpoints.remove_unfinished()  # Beside what this attempt saves it would look like a lost manifest.
        return None

    def rewind_metrics(self, step: int, recorded: int | None = None, tested: int | None = None) -> bool:
        """Drops metrics and samples after ``step`` (they will be computed again) and half-written last lines.

        Args:
          recorded: the step that the last line kept must be of.
          tested: how many problems the tests at ``step`` must have had. Those of a run that was to end there have more;
            they are dropped too, with that step's samples.

        Returns:
          whether ``step`` is to be tested again.

        Raises:
          ConfigError: a line is no record, steps go back, or the last line kept is of another step than ``recorded``;
            nothing is dropped. Or ``logs`` cannot start.
        """
        again = hosts.of_first(lambda: self._rewind(step, recorded, tested))
        self.record_config()
        return again

    def _rewind(self, step: int, recorded: int | None, tested: int | None) -> bool:
        metrics, samples, seconds = map(_logged, (self.metrics_path, self.samples_path, self._seconds_path))
        kept, samples = ([record for record in found if record["step"] <= step] for found in (metrics, samples))
        with reading.damaged(self._seconds_path, "out"):
            _ = _sum_of_seconds(seconds)
        last = kept[-1]["step"] if kept else None
        if recorded is not None and last != recorded:
            raise ConfigError(
                f"out: {self.metrics_path} is damaged (it ends at step {last}); "
                f"allowed is one with step {recorded}, as the checkpoint has"
            )
        counts = {record["test_problems"] for record in kept if record["step"] == step and "test_problems" in record}
        again = tested is not None and counts != {tested}
        if again:
            kept = [record for record in kept if record["step"] < step or "test_problems" not in record]
            samples = [record for record in samples if record["step"] < step]
        _rewrite(self.metrics_path, kept)
        _rewrite(self.samples_path, samples)
        _rewrite(self._seconds_path, [record | {"step": min(record["step"], step)} for record in seconds])
        self._copies = self._logs.start(self.path, self._config, kept + samples)
        return again

    def log(self, records: list[dict[str, Any]]) -> None:
        """Appends records, each with a ``step``, to metrics.jsonl."""
        hosts.of_first(lambda: self._record(self.metrics_path, records))

    def log_samples(self, records: list[dict[str, Any]]) -> None:
        """Appends sampled answers, each with a ``step``, to samples.jsonl."""
        hosts.of_first(lambda: self._record(self.samples_path, records))

    def _record(self, path: pathlib.Path, records: list[dict[str, Any]]) -> None:
        append(path, _lines(records))
        for record in records:
            self._copies.add(record)

    def log_seconds(self, step: int, seconds: float) -> None:
        """Notes what reaching ``step`` took, beside the metrics, which are the same for every resumption."""
        hosts.of_first(lambda: append(self._seconds_path, _lines([{"step": step, "seconds": seconds}])))

    def seconds(self) -> float:
        """Wall seconds of the run so far, those of interrupted attempts included."""
        return _sum_of_seconds(_of_first(self._seconds_path))

    def metrics(self) -> list[dict[str, Any]]:
        """All records so far. Raises ConfigError like ``read_json``."""
        return _of_first(self.metrics_path)


def _of_first(path: pathlib.Path) -> list[dict[str, Any]]:
    return hosts.of_first(lambda: read_metrics(path, "out") if path.exists() else [])


def _sum_of_seconds(records: list[dict[str, Any]]) -> float:
    return sum((record["seconds"] for record in records), 0.0)


def _logged(path: pathlib.Path) -> list[dict[str, Any]]:
    return parse(path, "out", whole_records) if path.exists() else []


def _rewrite(path: pathlib.Path, records: list[dict[str, Any]]) -> None:
    if path.exists():
        replace(path, _lines(records))


def _lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
