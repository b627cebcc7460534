"""Timing two sides in turn, so that whatever else the machine does meets both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh


def seconds_of(call: Callable[..., Any], *arguments: Any) -> float:
    """Wall seconds of a call, until its arrays are there."""
    start = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    return time.perf_counter() - start


def timed(call: Callable[..., Any], *arguments: Any) -> Callable[[], float]:
    """A side for ``alternate``: calls and returns the seconds."""
    return lambda: seconds_of(call, *arguments)


def on_mesh(mesh: Mesh, side: Callable[[], float]) -> Callable[[], float]:
    """The side with its programs' rows shared by the devices of the mesh."""

    def shared() -> float:
        with jax.set_mesh(mesh):
            return side()

    return shared


def alternate(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every side: a warm-up of each (compilation), then all in turn, ``repeats`` times."""
    for side in sides.values():
        side()
    rows = [{name: side() for name, side in sides.items()} for _ in range(repeats)]
    return {name: [row[name] for row in rows] for name in sides}


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def speedup(theirs: list[float], ours: list[float]) -> dict[str, float]:
    """How many times faster ours is: the spread of their seconds over ours, pair by pair."""
    return spread([t / o for t, o in zip(theirs, ours, strict=True)])
