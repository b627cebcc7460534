"""Figures with matplotlib: they read results and never train."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ckl_jax.statistics import mean_intervals

FEW_SEEDS = 4
COLORS = {"standard": "#4c72b0", "prioritized": "#dd8452"}


def curves(
    axes: Axes, x: np.ndarray, by_arm: Mapping[str, np.ndarray], *, scale: float = 1.0, label: str = "{arm}"
) -> None:
    """Mean over seeds: ``by_arm`` has arrays [seeds, len(x)], NaN where unmeasured.

    Around it is the 95% interval as a band; with fewer than ``FEW_SEEDS``, where that says nothing, each seed's line.
    """
    for arm, values in by_arm.items():
        mean, low, high = (scale * part for part in mean_intervals(values))
        (line,) = axes.plot(x, mean, label=label.format(arm=arm), color=COLORS.get(arm), linewidth=2)
        if len(values) < FEW_SEEDS:
            axes.plot(x, scale * values.T, color=line.get_color(), alpha=0.4, linewidth=0.8)
        else:
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def points(
    axes: Axes, x: np.ndarray, by_arm: Mapping[str, np.ndarray], *, scale: float = 1.0, label: str = "{arm}"
) -> None:
    """Mean over seeds at few x, with the 95% interval as a bar or, with few seeds, a small point for each."""
    for arm, values in by_arm.items():
        mean, low, high = (scale * part for part in mean_intervals(values))
        few = len(values) < FEW_SEEDS
        errors = None if few else [mean - low, high - mean]
        style: dict[str, Any] = {"fmt": "o", "markersize": 8, "capsize": 4, "markeredgecolor": "white"}
        axes.errorbar(x, mean, errors, color=COLORS.get(arm), label=label.format(arm=arm), **style)
        if few:
            axes.plot(x, scale * values.T, ".", color=COLORS.get(arm), markersize=4)


def save(figure: Figure, directory: pathlib.Path, name: str) -> None:
    """Writes ``name.png`` and ``name.svg`` and closes the figure."""
    for suffix in ("png", "svg"):
        figure.savefig(directory / f"{name}.{suffix}", dpi=150, bbox_inches="tight")
    plt.close(figure)
