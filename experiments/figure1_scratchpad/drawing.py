"""The picture: every character in its cell, coloured by certainty, and the critical tokens in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.common.figure import Results

COLORMAP = "YlGnBu_r"  # Its luminance rises with J: it survives grey print and every colour blindness.
DEVIATION = "#c2410c"
VISIBLE = {"\n": "↵", " ": "␣"}
CELL_WIDTH, CELL_HEIGHT = 0.118, 0.19  # Inches.
PITCH, PITCH_WITH_NOTES = 1.4, 2.1  # Cell heights from one row to the next.
FEWEST_COLUMNS, EXTRA_COLUMNS = 72, 10


def cells(text: str, columns: int) -> list[tuple[int, int]]:
    """Row and column of each character when lines longer than ``columns`` are wrapped."""
    found = []
    row = column = 0
    for character in text:
        if column == columns:
            row, column = row + 1, 0
        found.append((row, column))
        row, column = (row + 1, 0) if character == "\n" else (row, column + 1)
    return found


def legend(results: dict[str, Any], operand: int) -> str:
    """The critical tokens of an operand as lines of fixed-width text."""
    lines = [
        f"critical tokens (boxed) of operand {operand}, up to its first miscopy",
        " no. step token      right written p(right)     J",
    ]
    for number, token in enumerate(results["critical"], 1):
        if token["operand"] == operand:
            right, written = (VISIBLE.get(token[name], token[name]) for name in ("right", "written"))
            lines.append(
                f"{number:4d} {token['step']:4d} {token['name'].replace('_', ' '):10s} {right:>5s} {written:>7s} "
                f"{token['probability']:8.3f} {token['certainty']:5.2f}"
            )
    return "\n".join(lines)


def draw(results: Results) -> Figure:
    prompt, text, deviation = results["prompt"], results["text"], results["first_deviation"]
    longest, longest_right = (max(map(len, t.split("\n"))) for t in (text, results["right_text"]))
    columns = max(FEWEST_COLUMNS, min(longest, longest_right + EXTRA_COLUMNS) + 1)
    where = cells(prompt + text, columns)
    rows = [row for row, _ in where]
    with_notes = {rows[len(prompt) + token["index"]] for token in results["critical"]}
    if deviation is not None:
        with_notes.add(rows[len(prompt) + deviation["index"]] + 1)
    pitches = [PITCH_WITH_NOTES if row in with_notes else PITCH for row in range(1, rows[-1] + 1)]
    heights = [0.0, *(-np.cumsum(pitches)).tolist()]
    corners = [(column, heights[row]) for row, column in where]
    table_lines = 2 + max(sum(t["operand"] == operand for t in results["critical"]) for operand in (1, 2))
    table_top = heights[-1] - 1.2
    top, bottom = 3.2, table_top - 0.57 * table_lines
    figure = Figure(figsize=(CELL_WIDTH * (columns + 1), CELL_HEIGHT * (top - bottom)))
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.5, columns + 0.5), ylim=(bottom, top))
    axes.set_axis_off()

    palette = ScalarMappable(Normalize(math.floor(10 * min(results["certainty"])) / 10, 1), colormaps[COLORMAP])
    _draw_characters(axes, corners, prompt + text, [palette.to_rgba(value) for value in results["certainty"]])
    for number, token in enumerate(results["critical"], 1):
        x, y = corners[len(prompt) + token["index"]]
        axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor="black", linewidth=1.8, zorder=3))
        axes.text(x + 0.5, y + 1.12, str(number), ha="center", va="bottom", fontsize=6)
    if deviation is not None:
        x, y = corners[len(prompt) + deviation["index"]]
        right = VISIBLE.get(deviation["right"], deviation["right"])
        style: dict[str, Any] = {"va": "top", "fontsize": 7, "color": DEVIATION, "weight": "bold"}
        axes.text(x + 0.5, y - 0.12, "▲", ha="center", **style)
        axes.text(x + 1.4, y - 0.12, f"first deviation, right: {right}", ha="left", **style)

    color_axes = axes.inset_axes((columns * 0.5, 0.1, columns * 0.47, 0.9), transform=axes.transData)
    bar = figure.colorbar(palette, cax=color_axes, orientation="horizontal")
    bar.ax.grid(False)
    bar.set_label("certainty J of each generated character", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    operands = prompt.split("\n")[1].replace("+", " + ")
    temperature = results["config"]["temperature"]
    how = "greedy" if temperature is None else f"sampled at temperature {temperature:g}"
    title = f"{operands}, {how}, by a model pre-trained on up to {results['max_pretrain_digits']} digits"
    axes.text(0, top - 0.3, f"{title}: {'right' if results['solved'] else 'wrong'} result", va="top", fontsize=10)
    for operand, x in ((1, 0.0), (2, columns / 2)):
        axes.text(x, table_top, legend(results, operand), va="top", fontsize=7, family="monospace")
    return figure


def _draw_characters(axes: Axes, corners: Sequence[tuple[float, float]], text: str, colors: list[Any]) -> None:
    """Characters in their cells; the last ``len(colors)``, which were generated, on those colours."""
    first = len(text) - len(colors)
    for index, ((x, y), character) in enumerate(zip(corners, text, strict=True)):
        ink = "0.5"
        if index >= first:
            red, green, blue, _ = color = colors[index - first]
            ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor=color, edgecolor=color, linewidth=0.3))
        shown = VISIBLE["\n"] if character == "\n" else character
        axes.text(
            x + 0.5, y + 0.5, shown, ha="center", va="center_baseline", fontsize=8.5, family="monospace", color=ink
        )
