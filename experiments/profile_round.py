"""What does a round spend its time on? A trace of one, in stages.

    python -m experiments.profile_round --scale ladder
    python -m experiments.profile_round --plot-only            # table and figure again from results.json

Compiles a round of ``--seeds`` runs of fine-tuning, computes those before ``--round``, and traces that one with JAX's
profiler. The trace lies under ``out/trace``; its ``*.trace.json.gz`` opens in Perfetto, the directory in XProf.

Every operation of a compiled program has the name of the code that made it, and so of its stage (``STAGES`` in
`ckl_jax.rl.updates`): rollout, the reference's pass, advantages (reward, certainty and weights too), the update, and
the diagnostics that are written down. An operation that XLA has added has the stage of the loop around it; outside of
any stage it is "other". "Exchange" is what devices tell each other, and how long they wait for it. Seconds are added up
over the threads of the device; loops and calls count as what they run. Where the profiler has a say in how long a round
takes, ``rounds`` tells: the last one was traced, those before not.
"""

from __future__ import annotations

import gzip
import json
import pathlib
import re
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ckl_jax.analysis import plots
from ckl_jax.checkpoint.shipped import SHIPPED_TINY, shipped
from ckl_jax.checkpoint.store import load_model
from ckl_jax.config import FinetuneConfig
from ckl_jax.errors import require
from ckl_jax.fields import PositiveInt, require_fields
from ckl_jax.finetune import describe
from ckl_jax.preflight import hlo, traffic
from ckl_jax.presets import finetune_preset
from ckl_jax.rl.program import Seeds
from ckl_jax.rl.setup import set_up
from ckl_jax.rl.updates import STAGES
from ckl_jax.runs.directory import RunDirectory
from ckl_jax.runtime import cli, hosts, sharding
from ckl_jax.runtime.paths import files_below, replace
from experiments.common.figure import Results, markdown, publish

COMMAND = "experiments.profile_round"
KINDS = (*STAGES, "exchange", "other")
COLORS = dict(zip(KINDS, ("#4c72b0", "#64b5cd", "#55a868", "#dd8452", "#8172b3", "#e8cf7a", "#c9c9c9"), strict=True))
BINS = 500
"""Columns of the picture."""


@dataclass(frozen=True)
class ProfileCommand:
    """A trace of one round of fine-tuning, and its time by stage."""

    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = field(default_factory=FinetuneConfig)
    checkpoint: pathlib.Path = SHIPPED_TINY
    """Pre-trained model: a directory with params/ and model.json; default: the one that ships for the scale."""
    out: pathlib.Path = pathlib.Path("runs/profile_round")
    """Directory of trace and results: new, empty, or of the same command."""
    seeds: Seeds = 1
    """Runs that are computed together."""
    round: PositiveInt = 2
    """Which is traced; those before are computed too."""
    plot_only: bool = False
    """Table and figure again from results.json."""

    def __post_init__(self) -> None:
        require_fields(self)
        require(self.round <= self.config.rounds, "round", self.round, f"up to rounds = {self.config.rounds}")


def preset(scale: str = "tiny", recipe: str = "ours") -> ProfileCommand:
    return ProfileCommand(finetune_preset(scale, recipe), shipped(scale=scale))


class Operation(NamedTuple):
    """Of a device's thread, in seconds since the first."""

    thread: tuple[int, int]
    start: float
    duration: float
    stage: str


def measure(command: ProfileCommand) -> Results:
    """Seconds of the rounds, and of the traced one by stage and what each thread did when."""
    model = load_model(command.checkpoint)
    setup = set_up(command.config, model, {"run": {}}, command.seeds)
    described = {"command": COMMAND, "round": command.round, **describe(command, model)}
    directory = RunDirectory(command.out, described)
    states, seconds, compiled = setup.create.run(), list[float](), None
    with tempfile.TemporaryDirectory() as traced:  # The profiler writes to no bucket.
        for index in range(command.round):
            call = setup.train(states, [index])
            if compiled is None:
                compiled = call.lower().compile()
            if index == command.round - 1:
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0
                jax.profiler.start_trace(traced, profiler_options=options)
            _, _, *arrays = call.arguments  # Program and mesh are compiled in.
            start = time.monotonic()
            states, metrics = jax.block_until_ready(compiled(*arrays))
            seconds.append(time.monotonic() - start)
        jax.profiler.stop_trace()
        files = {path.relative_to(traced): path.read_bytes() for path in files_below(pathlib.Path(traced))}
    assert compiled is not None
    hosts.of_first(lambda: _keep(command.out / "trace", files))
    (events,) = (content for path, content in files.items() if path.name.endswith(".trace.json.gz"))
    done = operations(json.loads(gzip.decompress(events))["traceEvents"], stages(compiled.as_text()))
    directory.record_config()
    directory.close()
    by_stage = {stage: sum(x.duration for x in done if x.stage == stage) for stage in COLORS}
    success = sharding.to_host(metrics["success"])[:, 0].tolist()
    found = {"rounds": seconds, "by_stage": by_stage, "timeline": timeline(done), "success": success}
    return {**found, "config": described}


def _keep(directory: pathlib.Path, files: Mapping[pathlib.Path, bytes]) -> None:
    for path, content in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        replace(directory / path, content)


def stages(text: str) -> dict[str, str]:
    """The stage of every operation of a compiled program that runs no others, by its name."""
    computations, entry = hlo.parsed(text)
    found: dict[str, str] = {}

    def walk(name: str, outer: str) -> None:
        for instruction in computations[name].values():
            made_by = re.search(r'op_name="([^"]*)"', instruction.attributes)
            parts = made_by.group(1).split("/") if made_by else []
            stage = next((part for part in parts if part in STAGES), outer)
            called = instruction.called() if instruction.opcode != "fusion" else {}
            for names in called.values():
                for inside in names:
                    walk(inside, stage)
            if not called:
                exchanges = instruction.opcode.removesuffix("-start").removesuffix("-done") in traffic.SENT
                found[instruction.name] = "exchange" if exchanges else stage

    walk(entry, "other")
    return found


def operations(events: Iterable[Mapping[str, Any]], stage_of: Mapping[str, str]) -> list[Operation]:
    """Those of a trace that ``stage_of`` knows, in their order."""
    named = [(event, event.get("args", {}).get("hlo_op")) for event in events if event.get("ph") == "X"]
    known = [(event, stage_of[name]) for event, name in named if name in stage_of]
    first = min((event["ts"] for event, _ in known), default=0.0)
    found = [
        Operation((event["pid"], event["tid"]), 1e-6 * (event["ts"] - first), 1e-6 * event["dur"], stage)
        for event, stage in known
    ]
    return sorted(found)


def timeline(done: Sequence[Operation]) -> dict[str, Any]:
    """What each thread does in every one of ``BINS`` parts of the time: the stage that fills most of it, or "".

    Threads that do less than 1% of all are left out.
    """
    width = max((x.start + x.duration for x in done), default=0.0) / BINS
    rows = []
    for thread in sorted({x.thread for x in done}):
        of_thread = [x for x in done if x.thread == thread]
        if sum(x.duration for x in of_thread) < 0.01 * sum(x.duration for x in done):
            continue
        filled = np.zeros((len(COLORS) + 1, BINS))
        filled[-1] = width / 2  # Nothing wins where half of the time or more is idle.
        for x in of_thread:
            for part in range(int(x.start / width), min(int((x.start + x.duration) / width), BINS - 1) + 1):
                inside = min(x.start + x.duration, (part + 1) * width) - max(x.start, part * width)
                filled[list(COLORS).index(x.stage), part] += inside
        rows.append([[*COLORS, ""][index] for index in filled.argmax(axis=0)])
    return {"width": width, "threads": rows}


def text(results: Results) -> str:
    """Seconds and share of every stage."""
    total = sum(results["by_stage"].values()) or 1.0
    rows = [[stage, f"{value:.2f}", f"{value / total:.0%}"] for stage, value in results["by_stage"].items()]
    seconds = ", ".join(f"{value:.1f}" for value in results["rounds"])
    return f"{markdown(['stage', 's', 'share'], rows)}\n\nrounds, of which the last was traced: {seconds} s"


def draw(results: Results) -> Figure:
    threads, width = results["timeline"]["threads"], results["timeline"]["width"]
    figure = Figure(figsize=(10, 1.8 + 0.35 * len(threads)))
    axes = figure.subplots()
    for row, of_thread in enumerate(threads):
        for stage, color in COLORS.items():
            bars = [(index * width, width) for index, name in enumerate(of_thread) if name == stage]
            axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=color, linewidth=0)
    axes.set_yticks(range(len(threads)), [f"thread {row + 1}" for row in range(len(threads))])
    axes.set(xlim=(0, BINS * width), xlabel="seconds since the round began")
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    handles = [Patch(color=color, label=stage) for stage, color in COLORS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    config = results["config"]["config"]
    runs = plots.counted(results["config"]["seeds"], "run")
    figure.suptitle(f"a round of {runs} of {config['episodes']} episodes, scale {config['scale']}", color=plots.INK)
    return figure


def main(command: ProfileCommand) -> None:
    publish(command, COMMAND, "profile_round", measure, text, draw)


if __name__ == "__main__":
    cli.run(main, ProfileCommand, preset)
