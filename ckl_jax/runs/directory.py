"""A run's directory: config.json, metrics.jsonl, samples.jsonl, results.json and checkpoints/ of one configuration.

Several processes (``hosts``) share it: process 0 reads and writes its files, for all.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import platform
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from ckl_jax.checkpoint import reading
from ckl_jax.runs import lock
from ckl_jax.runtime import hosts
from ckl_jax.checkpoint.store import StateCheckpoints, write_json
from ckl_jax.config import ModelConfig, PretrainConfig
from ckl_jax.errors import ConfigError, require
from ckl_jax.config import FinetuneConfig
from ckl_jax.runs.logs import Copy, LogOptions
from ckl_jax.runtime.paths import AnyPath, append, in_bucket, replace, require_directory, resolved
from ckl_jax.resuming import Resumable
from ckl_jax.runtime.strays import first_owned

RESUMABLE = Resumable(ModelConfig, PretrainConfig, FinetuneConfig)


class RunDirectory:
    """Opens or resumes ``path`` for ``config``, and keeps other processes out of it until ``close``.

    Nothing keeps other processes out of a bucket's directory: never start the same run twice in one.

    Args:
      logs: where else its records go, from ``rewind_metrics`` on.

    Raises:
      ConfigError: the directory holds another run's config, or other files than logs but no config, or a running
        process has it, or the records cannot go there; then nothing is touched. Or it cannot be written.
    """

    def __init__(self, path: AnyPath, config: Mapping[str, Any], logs: LogOptions | None = None):
        self.path, self._logs = resolved(path, "out"), logs or LogOptions()
        self._logs.require_possible(self.path)
        self.metrics_path, self.samples_path = self.path / "metrics.jsonl", self.path / "samples.jsonl"
        self._seconds_path = self.path / "seconds.jsonl"
        self._config, self._copies = config, list[Copy]()
        self._lock: lock.DirectoryLock | None = None
        hosts.of_first(lambda: self._open(config))
        self.checkpoints = StateCheckpoints(self.path / "checkpoints")

    def _open(self, config: Mapping[str, Any]) -> None:
        wanted = json.loads(json.dumps(config))
        try:
            self._check(wanted)
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = None if in_bucket(self.path) else lock.hold(self.path)
            self._check(wanted)  # Again: until now another process may have had the directory.
            if not (self.path / "config.json").exists():
                write_json(self.path / "config.json", config)
        except OSError as error:
            raise ConfigError(
                f"out: got {self.path}, allowed is a directory that can be written "
                f"({error.filename or self.path}: {error.strerror})"
            ) from error

    def close(self) -> None:
        """Lets other processes have the directory. What was logged can still be read."""
        self.checkpoints.close()
        while self._copies:
            self._copies.pop().close()
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
        write_json(self.path / "config.json", self._config)

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
        _rewrite(self._seconds_path, seconds)
        self._copies = self._logs.start(self.path, self._config, kept + samples)
        return again

    def log(self, records: list[dict[str, Any]]) -> None:
        """Appends records, each with a ``step``, to metrics.jsonl."""
        self._append(self.metrics_path, records)
        self._copy(records)

    def log_samples(self, records: list[dict[str, Any]]) -> None:
        """Appends sampled answers, each with a ``step``, to samples.jsonl."""
        self._append(self.samples_path, records)
        self._copy(records)

    def _copy(self, records: list[dict[str, Any]]) -> None:
        for copy, record in itertools.product(self._copies, records):
            copy.add(record)

    def log_seconds(self, step: int, seconds: float) -> None:
        """Notes what reaching ``step`` took, beside the metrics, which are the same for every resumption."""
        self._append(self._seconds_path, [{"step": step, "seconds": seconds}])

    def _append(self, path: pathlib.Path, records: list[dict[str, Any]]) -> None:
        if hosts.is_first():
            append(path, "".join(json.dumps(record) + "\n" for record in records))

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
    return _parse(path, "out", _whole_records) if path.exists() else []


def _rewrite(path: pathlib.Path, records: list[dict[str, Any]]) -> None:
    if path.exists():
        replace(path, "".join(json.dumps(record) + "\n" for record in records))


def read_json(path: pathlib.Path, field: str) -> Any:
    """What a command wrote. Raises ConfigError, under the name of the option ``field``, if it is damaged."""
    return _parse(path, field, json.loads)


def read_metrics(path: pathlib.Path, field: str) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl that is only read. Raises ConfigError like ``read_json``."""
    return _parse(path, field, _records)


def _records(text: str) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        if not isinstance(records[-1], dict) or not isinstance(records[-1].get("step"), int):
            raise ValueError(f"line {number}: no record with a step")
    return records


def _whole_records(text: str) -> list[dict[str, Any]]:
    """The records of a run that is going on: the last line may be half, and steps never go back."""
    records = _records(text[: text.rfind("\n") + 1])
    for number, (before, after) in enumerate(itertools.pairwise(records), 2):
        if after["step"] < before["step"]:
            raise ValueError(f"line {number}: step {after['step']} after step {before['step']}")
    return records


def _parse(path: pathlib.Path, field: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        allowed = f"allowed is a {path.name} as the run wrote it"
        raise ConfigError(f"{field}: {path} is damaged ({error}); {allowed}") from error


def machine() -> dict[str, str]:
    """Where a result was made: device kind and platform."""
    versions = f"python {platform.python_version()}, jax {jax.__version__}"
    return {"device": jax.devices()[0].device_kind, "platform": f"{platform.machine()}, {versions}"}


def by_run(records: Iterable[dict[str, Any]], having: str) -> dict[tuple[str, int, int], dict[str, Any]]:
    """The records that have that field, by (arm, seed, step)."""
    return {(record["arm"], record["seed"], record["step"]): record for record in records if having in record}


def critical_probability(record: Mapping[str, Any], step: int, operand: int, slot: int) -> float:
    """Probability of the right character at a critical token in a round's record, NaN where no episode came to it.

    Args:
      step: scratchpad line, from 1.
      operand: 1 or 2.
      slot: which token, as in ``Problems``.
    """
    if record["critical_count_3x2xC"][step - 1][operand - 1][slot] == 0:
        return float("nan")
    return record["critical_probability_3x2xC"][step - 1][operand - 1][slot]


def earlier_results(directory: AnyPath, command: str) -> dict[str, Any] | None:
    """results.json of an earlier call of ``command``, None where there is none yet.

    Raises:
      ConfigError: ``directory`` is a file or holds a results.json that is damaged or of another command.
    """
    require_directory(directory, "out")
    path = resolved(directory, "out") / "results.json"
    if not path.exists():
        return None
    results = read_json(path, "out")
    config = results.get("config") if isinstance(results, dict) else None
    same = isinstance(config, dict) and config.get("command") == command
    require(same, "out", str(directory), f"a directory without another command's results.json (here: {command})")
    return results
