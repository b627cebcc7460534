"""Figures with matplotlib: they read results and never train."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, PowerNorm, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullLocator

from ckl_jax.analysis import report
from ckl_jax.analysis.report import Character, Scratchpad
from ckl_jax.analysis.statistics import mean_intervals
from ckl_jax.runtime import hosts
from ckl_jax.runtime.paths import AnyPath, replace, resolved

STYLE: Any = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "errorbar.capsize": 4,
    "figure.constrained_layout.use": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
"""matplotlib's parameters for our pictures: draw inside ``matplotlib.rc_context(STYLE)``, which changes no others."""
FEW_SEEDS = 4
OTHERS = ("#009e73", "#c06090", "#7a4a1e", "#56b4e9", "#8c8c8c", "#a08c00", "#1b1c1f", "#b0a8d8")
"""For arms that ``COLORS`` does not have; dark and light, so that they differ for colour-blind readers too."""
POINT: dict[str, Any] = {"fmt": "o", "markersize": 8, "markeredgecolor": "white"}
COLORS = {"standard": "#4c72b0", "prioritized": "#dd8452"}
INK, SOFT, RIGHT, WRONG = "#1b1c1f", "#9a9da3", "#167a48", "#c8232c"
SHADES = LinearSegmentedColormap.from_list("unsure", ["#ffffff", "#9cc4f7", "#3f8cf0"])
FONT_SIZE, LINE_HEIGHT = 7.5, 1.75
ADVANCE = 1233 / 2048  # of DejaVu Sans Mono, in its size
GAP, HEAD, FOOT = 0.25, 0.62, 0.75
WRAP = 100


def curves(
    axes: Axes,
    x: np.ndarray,
    by_arm: Mapping[str, np.ndarray],
    *,
    scale: float = 1.0,
    label: str = "{arm}",
    colors: Mapping[str, Any] = COLORS,
) -> None:
    """Mean over seeds: ``by_arm`` has shares [seeds, len(x)], 0 to 1 and NaN where unmeasured.

    Around it is the 95% interval as a band; with fewer than ``FEW_SEEDS``, where that says nothing, each seed's line.
    """
    for arm, values in by_arm.items():
        mean, low, high = (scale * part for part in mean_intervals(values))
        (line,) = axes.plot(x, mean, label=label.format(arm=arm), color=colors.get(arm), linewidth=2)
        if len(values) < FEW_SEEDS:
            axes.plot(x, scale * values.T, color=line.get_color(), alpha=0.4, linewidth=0.8)
        else:
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.18, linewidth=0)


def points(
    axes: Axes,
    x: np.ndarray,
    by_arm: Mapping[str, np.ndarray],
    *,
    scale: float = 1.0,
    label: str = "{arm}",
    colors: Mapping[str, Any] = COLORS,
) -> None:
    """Mean over seeds of shares at few x, with the 95% interval as a bar or, with few seeds, a small point for each."""
    for arm, values in by_arm.items():
        mean, low, high = (scale * part for part in mean_intervals(values))
        few = len(values) < FEW_SEEDS
        errors = None if few else [mean - low, high - mean]
        axes.errorbar(x, mean, errors, color=colors.get(arm), label=label.format(arm=arm), **POINT)
        if few:
            axes.plot(x, scale * values.T, ".", color=colors.get(arm), markersize=4)


def colors_of(arms: Iterable[str]) -> dict[str, str]:
    """A color for every arm: its own in ``COLORS``, or the next of ``OTHERS``; after the last these again, darker."""
    turns = (np.array([to_rgb(color) for color in OTHERS]) * 0.6**turn for turn in itertools.count())
    others = (to_hex(color) for turn in turns for color in turn)
    return {arm: COLORS.get(arm) or next(others) for arm in arms}


def counted(number: int, noun: str) -> str:
    """``1 seed``, ``10 seeds``."""
    return f"{number} {noun}{'s' * (number != 1)}"


def spread(seeds: int) -> str:
    """How curves and points of so many seeds are drawn, for a title."""
    return f"mean of {counted(seeds, 'seed')} " + ("and each seed" if seeds < FEW_SEEDS else "with 95% interval")


def plain_ticks(axis: Axis) -> None:
    """Numbers at 1, 2 and 5 times the powers of ten of a logarithmic axis that spans few of them."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def save(figure: Figure, directory: AnyPath, name: str) -> None:
    """Writes ``name.png`` and ``name.svg``; process 0 writes, for all."""

    def write() -> None:
        for suffix in ("png", "svg"):
            drawn = io.BytesIO()
            figure.savefig(drawn, format=suffix, dpi=150, bbox_inches="tight")
            replace(resolved(directory) / f"{name}.{suffix}", drawn.getvalue())

    hosts.of_first(write)


def scratchpads(rows: Sequence[tuple[str, Sequence[Scratchpad]]]) -> Figure:
    """A row of scratchpads per name, every character coloured by its certainty, critical ones boxed."""
    pads = [pad for _, row in rows for pad in row]
    columns = max(len(line) for pad in pads for line in _lines(pad)) + 1
    line_inch, panel = LINE_HEIGHT * FONT_SIZE / 72, columns * ADVANCE * FONT_SIZE / 72
    heights = [max(len(_lines(pad)) for pad in row) for _, row in rows]
    across = max(len(row) for _, row in rows)
    width = across * panel + (across - 1) * GAP
    height = sum(HEAD + lines * line_inch for lines in heights) + FOOT
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("none")

    def place(left: float, bottom: float, wide: float, high: float) -> Axes:
        return figure.add_axes((left / width, bottom / height, wide / width, high / height))

    top = height
    for (name, row), lines in zip(rows, heights, strict=True):
        figure.text(0, (top - 0.2) / height, name, fontsize=10, fontweight="bold", va="center")
        top -= HEAD + lines * line_inch
        for column, pad in enumerate(row):
            axes = place(column * (panel + GAP), top, panel, lines * line_inch)
            axes.set(xlim=(0, columns), ylim=(lines, 0))
            axes.axis("off")
            answer, color = ("right", RIGHT) if pad.right else ("wrong", WRONG)
            axes.set_title(f"{pad.title}, {answer}", fontsize=8, loc="left", color=color, pad=3)
            for number, line in enumerate(_lines(pad)):
                for position, character in enumerate(line):
                    _draw_character(axes, character, position, number)
    bar = place(0.1, 0.3, 2.6, 0.1)
    ticks = (0, 0.01, 0.1, 0.25, 0.5, 1)
    scale = figure.colorbar(ScalarMappable(PowerNorm(0.5, 0, 1), SHADES), bar, orientation="horizontal", ticks=ticks)
    bar.grid(False)
    scale.ax.set_xticklabels([f"{1 - tick:g}" for tick in ticks], fontsize=6.5)
    bar.set_title("certainty J of the pre-trained model", fontsize=7.5, loc="left", pad=3)
    legend = "boxed: critical token\nred: first character that is not as in the right answer"
    figure.text(3.0 / width, 0.36 / height, legend, fontsize=7.5, va="center")
    return figure


def _lines(pad: Scratchpad) -> list[list[Character]]:
    lines: list[list[Character]] = [[]]
    for character in pad.characters:
        lines[-1].append(character)
        if character.character == "\n" or len(lines[-1]) == WRAP:
            lines.append([])
    return [line for line in lines if line]


def _draw_character(axes: Axes, character: Character, column: int, row: int) -> None:
    def box(bottom: float, height: float, **style: Any) -> None:
        axes.add_patch(Rectangle((column, row + bottom), 1, height, **style))

    shade = report.shade(character.certainty)
    if shade:
        box(0.06, 0.88, facecolor=SHADES(shade / 100), linewidth=0)
    if character.critical:
        box(0.06, 0.88, facecolor="none", edgecolor=INK, linewidth=0.9, zorder=3)
    if character.deviates:
        box(0.84, 0.14, facecolor=WRONG, linewidth=0, zorder=4)
    if character.character != " ":
        newline = character.character == "\n"
        style: dict[str, Any] = {"family": "DejaVu Sans Mono", "fontsize": FONT_SIZE, "ha": "center", "va": "baseline"}
        style["color"] = WRONG if character.deviates else SOFT if newline else INK
        style["fontweight"] = "bold" if character.deviates else "normal"
        axes.text(column + 0.5, row + 0.7, "↵" if newline else character.character, **style)
