"""Compiles every program of a command for a TPU or GPUs that are not here: does it fit, and how fast can it be?

    python -m ckl_jax.preflight --topology v5e:2x4 pretrain --scale gpt2
    python -m ckl_jax.preflight --topology v5e:2x4 finetune --scale gpt2 --seeds 20 --runs-at-once 4
    python -m ckl_jax.preflight --topology h100:1 finetune --scale gpt2 --seeds 20

What stands behind ``pretrain``, ``finetune`` or ``evaluate`` are that command's own options. Nothing is computed, no
dataset is needed and no accelerator, only its compiler: the extra ``preflight`` (libtpu), or ``gpu`` for GPUs, where
XLA would try several kernels and keeps to its defaults here. For every program there are a device's memory, its matrix
products and traffic, and the shortest time that arithmetic, memory or links allow, whichever is longest. Where loops
end early by data, they count with all their turns (marked ``<=``). Answers count as decoded step by step up to the
limit: a loop over drafts, whose turns nothing bounds, counts once, so ``--rollout speculative`` says too little.

A program that does not fit is tried again with what makes it smaller, until something does. Exit code 8 says that one
did not fit; any other but 0, that this command itself failed.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
import sys
from dataclasses import dataclass
from typing import Any

import jax

from ckl_jax.errors import ConfigError, require
from ckl_jax.fields import require_fields
from ckl_jax.preflight.chips import GIB, Chip, topology
from ckl_jax.preflight.programs import COMMANDS
from ckl_jax.preflight.verdict import EXIT_CODE, Verdict, judged
from ckl_jax.runtime import cli, targets

COLUMNS = ("program", "memory", "temporary", "TFLOP", "GB moved", "GB sent", "at least", "of peak", "compiled in")


@dataclass(frozen=True)
class PreflightCommand:
    """Compiles every program of `pretrain`, `finetune` or `evaluate`, which is named last, for a TPU or for GPUs."""

    topology: str = "v5e:2x4"
    """TPU: v4, v5e, v5p or v6e with the shape of its chips, or Google Cloud's type, such as v5litepod-8. GPUs: h100 or
    h200 with their number on one host, or hosts x GPUs, such as h100:2x8."""
    json: pathlib.Path | None = None
    """File that gets the numbers too."""
    only: str = ""
    """Compile only the programs with this in their names, such as `step`, `rounds`, `test` or `evaluation`."""
    advice: bool = True
    """Try what would make a program smaller that does not fit."""

    def __post_init__(self) -> None:
        require_fields(self)
        if self.json is not None:
            there = self.json.parent.is_dir() and not self.json.is_dir()
            require(there, "json", str(self.json), "a file in a directory that is there")


def main(name: str, arguments: list[str], command: PreflightCommand) -> None:
    known = " | ".join(COMMANDS)
    require(name in COMMANDS, "command", name or None, f"{known}, with its own options behind it")
    jax.config.update("jax_enable_compilation_cache", False)
    planned = COMMANDS[name]
    target = topology(command.topology)
    with targets.compiling_for(target.devices):
        options = cli.parse(planned.options, planned.preset, arguments)
        print(f"{target.name}: {len(target.devices)} devices, {target.hosts} hosts, {target.chip.memory / GIB:.2f} GiB")
        verdicts, advice = [], dict[str, list[str]]()
        print(_line(COLUMNS), flush=True)
        for index, program in enumerate(planned.programs(options)):
            if command.only not in program.name:
                continue
            verdicts.append(judged(program, target.chip))
            print(_line(_cells(verdicts[-1], target.chip)), flush=True)
            if not verdicts[-1].fits and command.advice:
                advice[program.name] = _tried(planned, options, index, target.chip)
    for verdict in verdicts:
        used = math.prod(verdict.mesh.values())
        if used < len(target.devices):
            print(f"{verdict.name}: only {used} of {len(target.devices)} devices compute.")
    require(len(verdicts) > 0, "only", command.only, f"a part of the name of a program of {name}")
    for too_large, tried in advice.items():
        print(f"{too_large} does not fit. " + ("; ".join(tried) or "No option makes it smaller") + ".")
    if command.json is not None:
        found = {
            "command": [name, *arguments],
            "topology": target.name,
            "devices": len(target.devices),
            "chip": target.chip._asdict(),
            "versions": {"jax": jax.__version__},
            "programs": [_as_json(verdict, target.chip) for verdict in verdicts],
            "advice": advice,
        }
        command.json.write_text(json.dumps(found, indent=1) + "\n")
    if not all(verdict.fits for verdict in verdicts):
        sys.exit(EXIT_CODE)


def _tried(planned: Any, options: Any, index: int, chip: Chip) -> list[str]:
    found = []
    for option, smaller in planned.smaller(options):
        try:
            verdict = judged(list(planned.programs(smaller))[index], chip)
        except ConfigError as error:  # The devices cannot share it so.
            found.append(f"With {option} it is not possible ({error})")
            continue
        word = "fits" if verdict.fits else "does not fit either"
        found.append(f"With {option} it {word} ({_gib(verdict.needed)})")
        if verdict.fits:
            break
    return found


def _gib(size: float | None) -> str:
    return "?" if size is None else f"{size / GIB:.2f} GiB"


def _cells(verdict: Verdict, chip: Chip) -> tuple[str, ...]:
    fits = _gib(verdict.needed) + ("" if verdict.fits else " TOO MUCH")
    seconds = f"{verdict.compile_seconds:.0f} s"
    if verdict.cost is None:
        return (verdict.name, fits, "", "", "", "", "", "", seconds)
    cost, most = verdict.cost, "<=" if verdict.cost.guessed else ""
    times = verdict.seconds(chip)
    longest = max(times, key=lambda kind: times[kind])
    return (
        verdict.name,
        fits,
        _gib(verdict.memory["temporary"]),
        f"{most}{cost.flops / 1e12:.3g}",
        f"{most}{cost.bytes / 1e9:.3g}",
        f"{most}{sum(cost.collectives.values()) / 1e9:.3g}",
        f"{most}{1e3 * times[longest]:.3g} ms ({longest})",
        f"{verdict.share_of_peak(chip):.0%}",
        seconds,
    )


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def _as_json(verdict: Verdict, chip: Chip) -> dict[str, Any]:
    cost = None if verdict.cost is None else verdict.cost._asdict()
    numbers = {"seconds": verdict.seconds(chip), "share_of_peak": verdict.share_of_peak(chip)}
    return verdict._asdict() | {"cost": cost} | numbers


def split(arguments: list[str]) -> tuple[list[str], str, list[str]]:
    """Our own arguments, the command's name (or ""), and its arguments."""
    index = next((place for place, word in enumerate(arguments) if word in COMMANDS), len(arguments))
    return arguments[:index], next(iter(arguments[index:]), ""), arguments[index + 1 :]


if __name__ == "__main__":
    own, named, rest = split(sys.argv[1:])
    sys.argv[1:] = own
    cli.run(functools.partial(main, named, rest), PreflightCommand, joins_hosts=False)
