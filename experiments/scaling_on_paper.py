"""How far does a program scale, on paper? Compiled for 1 to 256 chips of machines that are not here.

    python -m experiments.scaling_on_paper                                         # wants the extra preflight
    python -m experiments.scaling_on_paper --program finetune --out runs/finetuning_on_paper
    python -m experiments.scaling_on_paper --topologies h100:1 h100:8 h100:4x8     # wants the extra gpu
    python -m experiments.scaling_on_paper --plot-only                             # again from results.json

`ckl_jax.preflight` compiles the program for each ``--topologies`` in two layouts. One is a step of pre-training with as
many windows for every chip (``--windows``), its parameters whole on each chip or split over all (``--shard-state``).
The other is the rounds of fine-tuning between two tests, for as many runs (``--runs``) however many chips there are:
chips share the runs first and then the episodes of a minibatch, or the episodes first. Where both is the same, or a
chip is alone, one is compiled. Shown are, of one chip, how long arithmetic, memory and links are busy at least, each
alone at its full speed, and the memory that it needs. The slowest of the three bounds the program. Nothing is measured:
a real one is slower, as they wait for each other. Answers of fine-tuning count as if all went on to the limit.

Bytes over the links are those that a ring of the chips sends for each collective; links that lie far apart are not told
from near ones.

Every compilation is a process of its own and a file ``out/<topology>_<layout>.json``; an interrupted call goes on with
the same command. Seven of pre-training took 12 minutes on 2 cores that other work used.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from ckl_jax.analysis import plots
from ckl_jax.errors import ConfigError, require
from ckl_jax.fields import PositiveInt, require_fields
from ckl_jax.preflight.chips import GIB, Topology, topology
from ckl_jax.presets import finetune_preset
from ckl_jax.rl.program import make_mesh
from ckl_jax.runs.directory import RunDirectory
from ckl_jax.runtime import cli, sharding, targets
from experiments.common.figure import Results, markdown, publish

COMMAND = "experiments.scaling_on_paper"
COLORS = {"arithmetic": "#4c72b0", "memory": "#dd8452", "links": "#55a868"}


class Measured(NamedTuple):
    """What is compiled of a command, and how it is shown.

    Attributes:
      part: of the program's name.
      layouts: their titles, by the names that files have.
      unit, factor: of the times, and what makes seconds such.
      load, words, default: the option that says how much there is to compute, its words, and its value if not given.
    """

    part: str
    noun: str
    layouts: dict[str, str]
    unit: str
    factor: float
    load: str
    words: str
    default: int


PROGRAMS = {
    "pretrain": Measured(
        "step",
        "a step",
        {"whole": "parameters whole", "split": "parameters split"},
        "ms",
        1e3,
        "windows",
        "windows a chip",
        5,
    ),
    "finetune": Measured(
        "rounds",
        "rounds",
        {"runs": "runs first", "episodes": "episodes first"},
        "s",
        1.0,
        "runs",
        "runs together",
        4,
    ),
}


@dataclass(frozen=True)
class ScalingCommand:
    """A program compiled for several TPUs or GPU hosts: arithmetic, memory and links of a chip."""

    scale: Literal["small", "gpt2"] = "gpt2"
    """Preset of the model."""
    topologies: tuple[str, ...] = ("v5e:1x1", "v5e:2x4", "v5e:8x8", "v5e:16x16")
    """TPUs or GPUs, as `ckl_jax.preflight --topology` takes them."""
    windows: PositiveInt | None = None
    """Windows of a batch of pre-training for each chip; 5 if not given."""
    out: pathlib.Path = pathlib.Path("runs/scaling_on_paper")
    """Directory of the results: new, empty, or of the same command interrupted."""
    plot_only: bool = False
    """Table and figure again from results.json."""
    program: Literal["pretrain", "finetune"] = "pretrain"
    """Command that is compiled: a step of its pre-training, or its rounds between two tests."""
    runs: PositiveInt | None = None
    """Runs of fine-tuning, of all chips together; 4 if not given."""

    def __post_init__(self) -> None:
        require_fields(self)
        require(len(self.topologies) > 0, "topologies", self.topologies, "1 or more")
        for program, shown in PROGRAMS.items():
            given = getattr(self, shown.load)
            require(given is None or self.program == program, shown.load, given, f"given with --program {program} only")

    @property
    def load(self) -> int:
        """How much there is to compute."""
        shown = PROGRAMS[self.program]
        return getattr(self, shown.load) or shown.default


def chips_of(name: str) -> int:
    return math.prod(int(size) for size in name.partition(":")[2].split("x"))


def options_of(command: ScalingCommand, target: Topology) -> dict[str, list[str]]:
    """Options of the compiled command by layout; the first alone where the second one is the same."""
    chips = chips_of(target.name)
    if command.program == "pretrain":
        first = ["--batch-size", str(command.load * chips)]
        second = ["--shard-state"]
        differ = chips > 1
    else:
        config = finetune_preset(command.scale, "ours")
        rows = sharding.largest_divisor(math.gcd(config.episodes, config.minibatch_episodes), at_most=chips)
        first = ["--seeds", str(command.load)]
        second = ["--data-devices", str(rows)]
        with targets.compiling_for(target.devices):
            split = dataclasses.replace(config, data_devices=rows)
            differ = make_mesh(config, command.load).shape != make_mesh(split, command.load).shape
    names = PROGRAMS[command.program].layouts
    return dict(zip(names, [first, first + second] if differ else [first], strict=False))


def measure(command: ScalingCommand) -> Results:
    """What preflight says of every topology and layout."""
    machines = [topology(name) for name in command.topologies]  # Refuses an unknown one, and where libtpu is not.
    described = {
        "command": COMMAND,
        "program": command.program,
        "scale": command.scale,
        "topologies": [target.name for target in machines],
        PROGRAMS[command.program].load: command.load,
    }
    directory = RunDirectory(command.out, described)
    steps = []
    for target in machines:
        name = target.name
        for layout, options in options_of(command, target).items():
            path = command.out / f"{name.replace(':', '_')}_{layout}.json"
            if not path.exists():
                compiled(path, name, command.program, ["--scale", command.scale, *options])
            (program,) = json.loads(path.read_text())["programs"]
            steps.append({"topology": name, "chips": chips_of(name), "layout": layout, **program})
    directory.record_config()
    directory.close()
    return {"steps": steps, "config": described}


def compiled(path: pathlib.Path, name: str, program: str, options: list[str]) -> None:
    """Preflight's file of one program. Raises ConfigError with the last line that it said where it failed."""
    written, part = path.with_suffix(".part"), PROGRAMS[program].part
    asked = ["--topology", name, "--only", part, "--no-advice", "--json", str(written), program, *options]
    done = subprocess.run(
        [sys.executable, "-m", "ckl_jax.preflight", *asked], capture_output=True, text=True, check=False
    )
    if not written.exists():
        raise ConfigError(f"topologies: preflight failed for {name}: {(done.stderr.splitlines() or ['no word'])[-1]}")
    written.rename(path)


def text(results: Results) -> str:
    """A line per topology and layout."""
    shown, rows = PROGRAMS[results["config"]["program"]], []
    for step in results["steps"]:
        mesh = " x ".join(str(size) for size in step["mesh"].values())
        row = [step["topology"], str(step["chips"]), shown.layouts[step["layout"]], mesh]
        if step["cost"] is None:
            rows.append([*row, *[""] * 6, "does not fit"])
            continue
        times = step["seconds"]
        longest = max(times, key=times.get)
        sent = ", ".join(f"{kind} {size / 1e9:.2g}" for kind, size in step["cost"]["collectives"].items()) or "none"
        cells = [f"{shown.factor * times[kind]:.3g}" for kind in COLORS]
        needed = f"{step['needed'] / GIB:.2f}" + ("" if step["fits"] else ", does not fit")
        rows.append([*row, needed, *cells, longest, f"{step['share_of_peak']:.0%}", sent])
    header = [
        "topology",
        "chips",
        "layout",
        "runs x rows",
        "GiB",
        *(f"{kind}, {shown.unit}" for kind in COLORS),
        "bound",
        "of the peak",
        "GB sent",
    ]
    return markdown(header, rows)


def draw(results: Results) -> Figure:
    config = results["config"]
    shown, kinds = PROGRAMS[config["program"]], list(dict.fromkeys(n.partition(":")[0] for n in config["topologies"]))
    figure = Figure(figsize=(10, 3.8))
    panels = figure.subplots(1, len(shown.layouts), sharex=True, sharey=True)
    for panel, (layout, title) in zip(panels, shown.layouts.items(), strict=True):
        steps = [step for step in results["steps"] if step["layout"] == layout and step["cost"] is not None]
        at = np.array([config["topologies"].index(step["topology"]) for step in steps])
        for index, (kind, color) in enumerate(COLORS.items()):
            times = [shown.factor * step["seconds"][kind] for step in steps]
            panel.bar(at + 0.27 * (index - 1), times, 0.25, color=color, label=kind)
        labels = [str(chips_of(name)) if len(kinds) == 1 else name for name in config["topologies"]]
        panel.set_xticks(range(len(labels)), labels)
        panel.grid(False, axis="x")
        panel.set(xlabel="chips" if len(kinds) == 1 else None, title=title)
    if config["program"] == "finetune":  # As much work for all chips together.
        panels[0].set_yscale("log")
    name = results["steps"][0]["name"] if config["program"] == "finetune" else shown.noun
    panels[0].set_ylabel(f"busy at least ({shown.unit}, {name})")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    figure.suptitle(
        f"{shown.noun} of {config['scale']} on {' and '.join(kinds)}, {config[shown.load]} {shown.words}, on paper",
        color=plots.INK,
    )
    return figure


def main(command: ScalingCommand) -> None:
    publish(command, COMMAND, "scaling_on_paper", measure, text, draw)


if __name__ == "__main__":
    cli.run(main, ScalingCommand, joins_hosts=False)  # A device that is looked for keeps its compiler from being found.
