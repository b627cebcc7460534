"""A run's directory: config.json, metrics.jsonl, results.json and checkpoints/ of one configuration, never of two."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from ckl_jax.checkpoint import StateCheckpoints, write_json
from ckl_jax.config import ConfigError


class RunDirectory:
    """Opens or resumes ``path`` for ``config``.

    Raises:
      ConfigError: the directory holds another run's config, or files but no config; nothing is touched.
    """

    def __init__(self, path: pathlib.Path, config: Mapping[str, Any]):
        self.path = path.resolve()
        self._check(json.loads(json.dumps(config)))
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "config.json").exists():
            write_json(self.path / "config.json", config)
        self.metrics_path = self.path / "metrics.jsonl"
        self.checkpoints = StateCheckpoints(self.path / "checkpoints")

    def _check(self, config: Any) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"out: got {self.path}, a file; allowed is a directory that is new, empty or of this run")
        existing = self.path / "config.json"
        if existing.exists():
            differing = sorted(_differences(_read_config(existing), config))
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
        if not self.metrics_path.exists():
            return
        lines = self.metrics_path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        temporary = self.metrics_path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self.metrics_path)

    def log(self, records: list[dict[str, Any]]) -> None:
        """Appends records, each with a ``step``, to metrics.jsonl."""
        with self.metrics_path.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def log_seconds(self, step: int, seconds: float) -> None:
        """Notes what reaching ``step`` took, beside the metrics, which are the same for every resumption."""
        with (self.path / "seconds.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "seconds": seconds}) + "\n")

    def seconds(self) -> float:
        """Wall seconds of the run so far, those of interrupted attempts included."""
        path = self.path / "seconds.jsonl"
        return sum(json.loads(line)["seconds"] for line in path.read_text().splitlines()) if path.exists() else 0.0

    def metrics(self) -> list[dict[str, Any]]:
        """All records so far."""
        if not self.metrics_path.exists():
            return []
        return [json.loads(line) for line in self.metrics_path.read_text().splitlines()]


def _read_config(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"out: {path} is damaged ({error}); allowed is a config.json as the run wrote it") from error


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = old.keys() | new.keys()
        return [
            found
            for key in keys
            for found in _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if old == new else [name or "config"]
