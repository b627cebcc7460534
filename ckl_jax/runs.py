"""A run's directory: config.json, metrics.jsonl, results.json and checkpoints/ of one configuration, never of two.

Several processes (``hosts``) share it: process 0 reads and writes its files, for all.
"""

from __future__ import annotations

import json
import pathlib
import platform
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from ckl_jax import hosts
from ckl_jax.checkpoint import StateCheckpoints, write_json
from ckl_jax.config import ConfigError, require
from ckl_jax.paths import append, resolved


class RunDirectory:
    """Opens or resumes ``path`` for ``config``.

    Raises:
      ConfigError: the directory holds another run's config, or files but no config; nothing is touched.
    """

    def __init__(self, path: pathlib.Path, config: Mapping[str, Any]):
        self.path = resolved(path)
        self.metrics_path = self.path / "metrics.jsonl"
        hosts.of_first(lambda: self._open(config))
        self.checkpoints = StateCheckpoints(self.path / "checkpoints")

    def _open(self, config: Mapping[str, Any]) -> None:
        self._check(json.loads(json.dumps(config)))
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "config.json").exists():
            write_json(self.path / "config.json", config)

    def _check(self, config: Any) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"out: got {self.path}, a file; allowed is a directory that is new, empty or of this run")
        existing = self.path / "config.json"
        if existing.exists():
            differing = sorted(_differences(read_json(existing, "out"), config))
            if differing:
                raise ConfigError(
                    f"out: {self.path} holds a run with another config (differing: {', '.join(differing)}); "
                    "allowed is a directory that is new, empty or of this run"
                )
        elif self.path.exists() and any(file.suffix != ".tmp" for file in self.path.iterdir()):
            raise ConfigError(
                f"out: {self.path} holds files but no config.json; "
                "allowed is a directory that is new, empty or of this run"
            )

    def rewind_metrics(self, step: int) -> None:
        """Drops metric lines after ``step`` (they will be computed again) and a half-written last line."""
        if not hosts.is_first() or not self.metrics_path.exists():
            return
        lines = self.metrics_path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        temporary = self.metrics_path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self.metrics_path)

    def log(self, records: list[dict[str, Any]]) -> None:
        """Appends records, each with a ``step``, to metrics.jsonl."""
        self._append(self.metrics_path, records)

    def log_seconds(self, step: int, seconds: float) -> None:
        """Notes what reaching ``step`` took, beside the metrics, which are the same for every resumption."""
        self._append(self.path / "seconds.jsonl", [{"step": step, "seconds": seconds}])

    def _append(self, path: pathlib.Path, records: list[dict[str, Any]]) -> None:
        if hosts.is_first():
            append(path, "".join(json.dumps(record) + "\n" for record in records))

    def seconds(self) -> float:
        """Wall seconds of the run so far, those of interrupted attempts included."""
        return sum(record["seconds"] for record in self._records(self.path / "seconds.jsonl"))

    def metrics(self) -> list[dict[str, Any]]:
        """All records so far."""
        return self._records(self.metrics_path)

    def _records(self, path: pathlib.Path) -> list[dict[str, Any]]:
        def read() -> list[dict[str, Any]]:
            return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

        return hosts.of_first(read)


def read_json(path: pathlib.Path, field: str) -> Any:
    """What a command wrote. Raises ConfigError, under the name of the option ``field``, if it is damaged."""
    return _parse(path, field, json.loads)


def read_metrics(path: pathlib.Path, field: str) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl that is only read. Raises ConfigError like ``read_json``."""
    return _parse(path, field, lambda text: [json.loads(line) for line in text.splitlines()])


def _parse(path: pathlib.Path, field: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text())
    except ValueError as error:
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


def earlier_results(directory: pathlib.Path, command: str) -> dict[str, Any] | None:
    """results.json of an earlier call of ``command``, None where there is none yet.

    Raises:
      ConfigError: ``directory`` is a file or holds a results.json that is damaged or of another command.
    """
    is_file = directory.exists() and not directory.is_dir()
    require(not is_file, "out", str(directory), "a directory")
    path = directory / "results.json"
    if not path.exists():
        return None
    results = read_json(path, "out")
    config = results.get("config") if isinstance(results, dict) else None
    same = isinstance(config, dict) and config.get("command") == command
    require(same, "out", str(directory), f"a directory without another command's results.json (here: {command})")
    return results


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = old.keys() | new.keys()
        return [
            found
            for key in keys
            for found in _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if old == new else [name or "config"]
