"""What runs wrote, read back: results.json, metrics.jsonl, and single numbers of their records."""

from __future__ import annotations

import itertools
import json
import pathlib
import platform
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from ckl_jax.errors import ConfigError, require
from ckl_jax.runtime.paths import AnyPath, require_directory, resolved


def read_json(path: pathlib.Path, field: str) -> Any:
    """What a command wrote. Raises ConfigError, under the name of the option ``field``, if it is damaged."""
    return parse(path, field, json.loads)


def read_results(path: pathlib.Path, field: str) -> Any:
    """A results.json, where what is null in a list of numbers is read as NaN. Raises as ``read_json``.

    ``config`` is as it stands, and of ``intervals`` one may be missing.
    """
    return _with_nan(read_json(path, field))


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _restored(name, item) for name, item in value.items()}
    if isinstance(value, list):
        return [float("nan") if item is None else _with_nan(item) for item in value]
    return value


def _restored(name: str, value: Any) -> Any:
    if name == "config":
        return value
    if name == "intervals" and isinstance(value, list):
        return [None if item is None else _with_nan(item) for item in value]
    return _with_nan(value)


def read_metrics(path: pathlib.Path, field: str) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl that is only read. Raises ConfigError like ``read_json``."""
    return parse(path, field, _records)


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


def whole_records(text: str) -> list[dict[str, Any]]:
    """The records of a run that is going on: the last line may be half, and steps never go back."""
    records = _records(text[: text.rfind("\n") + 1])
    for number, (before, after) in enumerate(itertools.pairwise(records), 2):
        if after["step"] < before["step"]:
            raise ValueError(f"line {number}: step {after['step']} after step {before['step']}")
    return records


def parse(path: pathlib.Path, field: str, parse: Callable[[str], Any]) -> Any:
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
    results = read_results(path, "out")
    config = results.get("config") if isinstance(results, dict) else None
    same = isinstance(config, dict) and config.get("command") == command
    require(same, "out", str(directory), f"a directory without another command's results.json (here: {command})")
    return results
