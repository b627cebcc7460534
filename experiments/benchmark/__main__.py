"""How fast it is, against what, and how near the device's limit.

    pip install '.[bench]'
    python -m experiments.benchmark --out runs/benchmark
    python -m experiments.benchmark --sections rollout,round        # some sections only
    python -m experiments.benchmark --quick                         # checks the code, measures nothing of interest

Sections: ``rollout`` (against transformers' generate), ``speculation`` (speculative against plain rollout, by policy),
``round`` (against the authors' procedure), ``pretraining`` (against a plain PyTorch step), ``scaling`` (cost of a round
against runs, episodes, length and model size), ``compile``, ``memory``, ``limit`` (share of the device's matmul and
copy rates), ``settings`` (what ``ckl_jax.runtime.xla_cpu`` does to the speed). Both sides run on the same machine,
weights, problems and threads, in turn. Every finished section is in results.json at once: an interrupted benchmark goes
on with what is missing. Last come table.md and scaling.png / scaling.svg. Run it on an otherwise idle machine: one
other job made PyTorch's step 6 to 40 times slower on 2 cores. There all sections but ``speculation`` and ``settings``
took 43 minutes and ``speculation`` 12; ``settings`` takes about 30, of which 19 were run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from typing import Any

import jax
import matplotlib

from ckl_jax.analysis import plots
from ckl_jax.checkpoint.store import fingerprint, load_model
from ckl_jax.errors import ConfigError, naming, require
from ckl_jax.fields import PositiveInt, require_fields
from ckl_jax.runtime import cli, startup
from ckl_jax.runtime.hosts import write_json
from ckl_jax.runtime.paths import replace, require_directory
from experiments.benchmark import cpu_settings, ours, report, speculation
from experiments.benchmark.workload import Section, choose_plan

SECTIONS = ("rollout", "speculation", "round", "pretraining", "scaling", "compile", "memory", "limit", "settings")
IDLE_LOAD = 0.5


@dataclass(frozen=True)
class BenchmarkCommand:
    """Speed, memory and share of the device's limit, against PyTorch where there is something to compare with."""

    out: pathlib.Path = pathlib.Path("runs/benchmark")
    """Directory of the results: new, empty, or of an earlier call with the same repeats, whose sections are kept."""
    sections: str = ",".join(SECTIONS)
    """Sections to measure, separated by commas."""
    repeats: PositiveInt | None = None
    """Pairs of measurements after the warm-up; default 3."""
    policies: tuple[pathlib.Path, ...] = ()
    """Fine-tuned checkpoints, which the section ``speculation`` measures too."""
    quick: bool = False
    """Seconds per section, on a model of width 16."""

    def __post_init__(self) -> None:
        require_fields(self)
        for name in self.names:
            require(name in SECTIONS, "sections", name, ", ".join(SECTIONS))
        require_directory(self.out, "out")

    @property
    def names(self) -> list[str]:
        return self.sections.split(",")


def _measurements(names: list[str]) -> dict[str, Section]:
    """The sections' functions. Raises ConfigError where PyTorch is needed and missing."""
    alone = ours.SECTIONS | speculation.SECTIONS | cpu_settings.SECTIONS
    if set(names) <= set(alone):
        return alone
    from experiments.benchmark import against_pytorch

    return against_pytorch.SECTIONS | alone


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = None
    with contextlib.suppress(ImportError):
        import torch

        threads = torch.get_num_threads()
    return {
        "device": jax.devices()[0].device_kind,
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cpu_count": startup.cores(),
        "torch_threads": threads,
        "python": platform.python_version(),
        **{package: _version(package) for package in ("jax", "flax", "torch", "transformers")},
    }


def _resume(path: pathlib.Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The finished sections of an earlier call. Raises ConfigError if it had other settings, machine or versions."""
    if not path.exists():
        return {}
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        same = earlier["settings"] == settings and isinstance(earlier["sections"], dict)
        here, there = environment(), earlier["environment"]
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise ConfigError(
            f"out: {path} is damaged ({error}); allowed is a results.json as a benchmark wrote it"
        ) from error
    require(same, "out", str(path.parent), f"a directory that is new or of a benchmark with {settings}")
    require(here == there, "out", f"{path.parent} of {there}", f"a directory that is new or of this machine: {here}")
    return earlier["sections"]


def main(command: BenchmarkCommand) -> None:
    measure = _measurements(command.names)
    plan = choose_plan(command.quick)
    with naming("policies", instead_of="checkpoint"):
        policies = tuple((str(path), fingerprint(load_model(path).params)) for path in command.policies)
    plan = dataclasses.replace(plan, policies=policies)
    if command.repeats is not None:
        plan = dataclasses.replace(plan, repeats=command.repeats)
    settings = json.loads(json.dumps({"plan": dataclasses.asdict(plan), "device": jax.devices()[0].device_kind}))
    path = command.out / "results.json"
    sections = _resume(path, settings)
    command.out.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    if load > IDLE_LOAD:
        print(f"warning: load average {load:.1f}; beside other jobs PyTorch's threads wait for each other", flush=True)
    for name in command.names:
        if name in sections:
            print(f"{name}: done before")
            continue
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        found = measure[name](plan, lambda line: print(f"  {line}", flush=True))
        sections[name] = {
            "seconds": time.monotonic() - start,
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", "-m", "experiments.benchmark", *sys.argv[1:]]),
            "load_average_before": load,
            "environment": environment(),
            "found": found,
        }
        write_json(path, {"settings": settings, "environment": environment(), "sections": sections})
        print(f"{name}: {sections[name]['seconds']:.0f} s", flush=True)
        jax.clear_caches()
    results = json.loads(path.read_text(encoding="utf-8"))
    replace(command.out / "table.md", report.table(results))
    if "scaling" in sections:
        with matplotlib.rc_context(plots.STYLE):
            plots.save(report.draw(results), command.out, "scaling")
    print(report.table(results))


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs the rest of a GPU's memory.
    cli.run(main, BenchmarkCommand)
