"""How far does a step of pre-training scale, on paper? Compiled for 1 to 256 chips of machines that are not here.

    python -m experiments.scaling_on_paper                                         # wants the extra preflight
    python -m experiments.scaling_on_paper --topologies h100:1 h100:8 h100:4x8     # wants the extra gpu
    python -m experiments.scaling_on_paper --plot-only                             # again from results.json

`ckl_jax.preflight` compiles the training step for each ``--topologies``, with as many windows for every chip
(``--windows``), and the parameters whole on each chip or split over all (``--shard-state``). Shown are, of one chip,
how long arithmetic, memory and links are busy at least, each alone at its full speed, and the memory that the step
needs. The slowest of the three bounds the step. Nothing is measured: a real step is slower, as they wait for each
other.

Bytes over the links are those of the collectives' results. An all-reduce of many chips sends up to twice as many, and
links that lie far apart are not told from near ones.

Every compilation is a process of its own and a file ``out/<topology>_<state>.json``; an interrupted call goes on with
the same command. Eight of them took 12 minutes on 2 cores that other work used.
"""

from __future__ import annotations

import json
import math
import pathlib
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

from ckl_jax.analysis import plots
from ckl_jax.errors import ConfigError, require
from ckl_jax.fields import PositiveInt, require_fields
from ckl_jax.preflight.chips import GIB, topology
from ckl_jax.runs.directory import RunDirectory
from ckl_jax.runtime import cli
from experiments.common.figure import Results, markdown, publish

COMMAND = "experiments.scaling_on_paper"
STATES = {"whole": [], "split": ["--shard-state"]}
COLORS = {"arithmetic": "#4c72b0", "memory": "#dd8452", "links": "#55a868"}


@dataclass(frozen=True)
class ScalingCommand:
    """A training step compiled for several TPUs or GPU hosts: arithmetic, memory and links of a chip."""

    scale: Literal["small", "gpt2"] = "gpt2"
    """Preset of the model."""
    topologies: tuple[str, ...] = ("v5e:1x1", "v5e:2x4", "v5e:8x8", "v5e:16x16")
    """TPUs or GPUs, as `ckl_jax.preflight --topology` takes them."""
    windows: PositiveInt = 5
    """Windows of a batch for each chip."""
    out: pathlib.Path = pathlib.Path("runs/scaling_on_paper")
    """Directory of the results: new, empty, or of the same command interrupted."""
    plot_only: bool = False
    """Table and figure again from results.json."""

    def __post_init__(self) -> None:
        require_fields(self)
        require(len(self.topologies) > 0, "topologies", self.topologies, "1 or more")


def chips_of(name: str) -> int:
    return math.prod(int(size) for size in name.partition(":")[2].split("x"))


def measure(command: ScalingCommand) -> Results:
    """What preflight says of every topology and state."""
    names = [topology(name).name for name in command.topologies]  # Refuses an unknown one, and where libtpu is not.
    described = {"command": COMMAND, "scale": command.scale, "topologies": names, "windows": command.windows}
    directory = RunDirectory(command.out, described)
    steps = []
    for name in names:
        for state, options in STATES.items():
            path = command.out / f"{name.replace(':', '_')}_{state}.json"
            if not path.exists():
                compiled(
                    path,
                    name,
                    ["--scale", command.scale, "--batch-size", str(command.windows * chips_of(name)), *options],
                )
            (program,) = json.loads(path.read_text())["programs"]
            steps.append({"topology": name, "chips": chips_of(name), "state": state, **program})
    directory.record_config()
    directory.close()
    return {"steps": steps, "config": described}


def compiled(path: pathlib.Path, name: str, options: list[str]) -> None:
    """Preflight's file of a training step. Raises ConfigError with the last line that it said where it failed."""
    part = path.with_suffix(".part")
    asked = ["--topology", name, "--only", "step", "--no-advice", "--json", str(part), "pretrain", *options]
    done = subprocess.run(
        [sys.executable, "-m", "ckl_jax.preflight", *asked], capture_output=True, text=True, check=False
    )
    if not part.exists():
        raise ConfigError(f"topologies: preflight failed for {name}: {(done.stderr.splitlines() or ['no word'])[-1]}")
    part.rename(path)


def text(results: Results) -> str:
    """A line per topology and state."""
    rows = []
    for step in results["steps"]:
        if step["cost"] is None:
            rows.append([step["topology"], str(step["chips"]), step["state"], *[""] * 6, "does not fit"])
            continue
        times = step["seconds"]
        longest = max(times, key=times.get)
        sent = ", ".join(f"{kind} {size / 1e9:.2g}" for kind, size in step["cost"]["collectives"].items()) or "none"
        cells = [f"{1e3 * times[kind]:.3g}" for kind in COLORS]
        needed = f"{step['needed'] / GIB:.2f}" + ("" if step["fits"] else ", does not fit")
        bound = longest, f"{step['share_of_peak']:.0%}", sent
        rows.append([step["topology"], str(step["chips"]), step["state"], needed, *cells, *bound])
    header = [
        "topology",
        "chips",
        "parameters",
        "GiB",
        *(f"{kind}, ms" for kind in COLORS),
        "bound",
        "of the peak",
        "GB sent",
    ]
    return markdown(header, rows)


def draw(results: Results) -> Figure:
    figure = Figure(figsize=(10, 3.8))
    panels = figure.subplots(1, len(STATES), sharey=True)
    config = results["config"]
    kinds = list(dict.fromkeys(name.partition(":")[0] for name in config["topologies"]))
    for panel, state in zip(panels, STATES, strict=True):
        steps = [step for step in results["steps"] if step["state"] == state and step["cost"] is not None]
        at = np.arange(len(steps))
        for index, (kind, color) in enumerate(COLORS.items()):
            times = [1e3 * step["seconds"][kind] for step in steps]
            panel.bar(at + 0.27 * (index - 1), times, 0.25, color=color, label=kind)
        panel.set_xticks(at, [str(step["chips"]) if len(kinds) == 1 else step["topology"] for step in steps])
        panel.grid(False, axis="x")
        panel.set(xlabel="chips" if len(kinds) == 1 else None, title=f"parameters {state}")
    panels[0].set_ylabel("busy at least (ms a step)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    where = " and ".join(kinds)
    figure.suptitle(
        f"a step of {config['scale']} on {where}, {config['windows']} windows a chip, on paper", color=plots.INK
    )
    return figure


def main(command: ScalingCommand) -> None:
    publish(command, COMMAND, "scaling_on_paper", measure, text, draw)


if __name__ == "__main__":
    cli.run(main, ScalingCommand)
