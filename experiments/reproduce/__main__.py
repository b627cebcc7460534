"""Every figure and table of the paper for one scale, and a page that compares them with the paper's.

    python -m experiments.reproduce
    python -m experiments.reproduce --scale small --checkpoint runs/small_N7 --out runs/reproduce_small
    python -m experiments.reproduce --items figure4 table1 --seeds 10
    python -m experiments.reproduce --report-only                   # the page again from what is on disk

Each item is a process of its own, so one that fails loses nothing but what reads it: its error is on the page and the
exit code is 1. Called again with the same options, it skips the items that are done and goes on with the others, each
of which resumes where it stopped. An item is done when it ended well with the same command, checkpoint and inputs.
SIGTERM goes on to the running item, which saves what it has, and then ends this process too, with exit code 75.

Each item writes to ``out/<item>``, its output also to ``out/logs/<item>.log``; ``out/reproduce.json`` notes what was
run and ``out/report.html`` is written anew after every item. Figures 5 and 7 read the run of figure 4, figures 2 and 3
share the models that are pre-trained on the way.
"""

from __future__ import annotations

import hashlib
import pathlib
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckl_jax.checkpoint import description
from ckl_jax.checkpoint.shipped import located, shipped
from ckl_jax.checkpoint.store import read_description
from ckl_jax.config import Scale
from ckl_jax.errors import ConfigError, require
from ckl_jax.fields import require_fields
from ckl_jax.rl.program import Seeds
from ckl_jax.runs.records import read_json
from ckl_jax.runtime import cli, hosts
from ckl_jax.runtime.paths import replace, require_directory, resolved
from ckl_jax.tasks.columns import ADDITION
from ckl_jax.tasks.task import Task
from experiments.reproduce import page
from experiments.reproduce.child import run_process

ABOUT = "about"  # Of reproduce.json, beside the items.


@dataclass(frozen=True)
class ReproduceCommand:
    """Runs every figure and table for a scale, resumable, and writes one page that compares them with the paper."""

    scale: Scale = "tiny"
    """Preset of models and budgets."""
    checkpoint: pathlib.Path | None = None
    """Pre-trained model that all but figures 2 and 3 use, a directory with params/ and model.json; default: the one
    that ships for the scale."""
    out: pathlib.Path = pathlib.Path("runs/reproduce")
    """Directory of everything: new, or of an earlier call."""
    items: tuple[str, ...] = ()
    """Which items to run; default: all."""
    seeds: Seeds = 2
    """Seeds of every arm of the figures that fine-tune."""
    options: tuple[str, ...] = ()
    """More options of single items, behind one --options: --options "figure4: --rounds 4" "figure6: --betas 10 500"."""
    report_only: bool = False
    """Write the page from what is on disk and run nothing."""

    def __post_init__(self) -> None:
        require_fields(self)
        for option, given in (("items", self.items), ("options", tuple(self.more))):
            unknown = sorted(set(given) - {item.name for item in ITEMS})
            require(not unknown, option, unknown, " | ".join(item.name for item in ITEMS))
        require_directory(self.out, "out")
        made = f"a directory that python -m ckl_jax.pretrain --scale {self.scale} wrote"
        ships = self.scale in ("tiny", "ladder")
        require(ships or self.checkpoint is not None or self.report_only, "checkpoint", None, made)

    @property
    def starts_from(self) -> pathlib.Path | None:
        """The pre-trained model, where it is not every item's own default."""
        return shipped(scale="ladder") if self.checkpoint is None and self.scale == "ladder" else self.checkpoint

    @property
    def more(self) -> dict[str, list[str]]:
        """The words of ``options`` by item."""
        found: dict[str, list[str]] = {}
        for text in self.options:
            name, _, words = text.partition(":")
            try:
                found.setdefault(name.strip(), []).extend(shlex.split(words))
            except ValueError as error:
                allowed = f"allowed is what a shell can split ({error})"
                raise ConfigError(f"options: got {self.options}, {allowed}") from error
        return found


@dataclass(frozen=True)
class Item:
    """A figure or table: its module, options beside ``--out``, and the items whose output it reads."""

    name: str
    title: str
    module: str
    arguments: Callable[[ReproduceCommand], list[str]]
    needs: tuple[str, ...] = ()


def _checkpoint(command: ReproduceCommand) -> list[str]:
    return [] if command.starts_from is None else ["--checkpoint", str(command.starts_from)]


def _checkpoints(command: ReproduceCommand) -> list[str]:
    return [] if command.starts_from is None else ["--checkpoints", str(command.starts_from)]


def _model(command: ReproduceCommand) -> pathlib.Path:
    return pathlib.Path(located(command.starts_from or shipped()))


def _described(command: ReproduceCommand) -> tuple[int, Task]:
    """N and task of the model."""
    _, base, task = description.model_description(_model(command) / "model.json")
    return base, task


def _one_problem(command: ReproduceCommand) -> list[str]:
    """Operands for figure 1, whose own are for the N of the model that ships."""
    base, task = _described(command)
    if command.starts_from is None:
        return []
    (problem,) = task.rl_problems(np.random.default_rng(0), 1, base + 1, base)
    return [*_checkpoint(command), "--a", str(problem.a), "--b", str(problem.b)]


def _fine_tuning(command: ReproduceCommand) -> list[str]:
    _, task = _described(command)
    return ["--scale", command.scale, "--task", task.name, *_checkpoint(command), "--seeds", str(command.seeds)]


def _levels(command: ReproduceCommand) -> list[str]:
    """Two models at the tiny scale, of which one ships: a third would be most of the hour that all items take."""
    digits = ["--digits", "3", "5"] if command.scale == "tiny" else []
    _, task = _described(command)
    made = ["--pretrain.task", task.name, "--pretrained", str(command.out / "pretrained")]
    return ["--scale", command.scale, *digits, *made]


def _from_figure4(command: ReproduceCommand) -> list[str]:
    run = command.out / "figure4"
    made = read_json(run / "config.json", "out") if (run / "config.json").exists() else {"config": {"seed": 0}}
    return [*_checkpoint(command), "--finetuned", str(run / "prioritized" / f"seed_{made['config']['seed']}")]


# In the order they run in: what is quick first, then what others read, then what pre-trains models.
ITEMS = (
    Item("figure1", "Figure 1: one scratchpad and its critical tokens", "experiments.figure1_scratchpad", _one_problem),
    Item("table1", "Table 1: certainty at critical tokens", "experiments.table1_certainty_gap", _checkpoints),
    Item("figure4", "Figure 4: prioritized against standard KL", "experiments.figure4_prioritized_kl", _fine_tuning),
    Item(
        "figure7",
        "Figure 7: critical tokens during RL",
        "experiments.figure7_critical_tokens",
        lambda command: ["--run", str(command.out / "figure4")],
        ("figure4",),
    ),
    Item(
        "figure5",
        "Figure 5: scratchpads coloured by certainty",
        "experiments.figure5_certainty_colors",
        _from_figure4,
        ("figure4",),
    ),
    Item("figure6", "Figure 6: the exponent beta", "experiments.figure6_beta_sweep", _fine_tuning),
    Item("figure2", "Figure 2: pre-trained models beyond N digits", "experiments.figure2_pretraining", _levels),
    Item(
        "figure3",
        "Figure 3: RL from several levels of pre-training",
        "experiments.figure3_pretraining_levels",
        lambda command: [*_levels(command), "--seeds", str(command.seeds)],
    ),
)


def arguments(command: ReproduceCommand, item: Item) -> list[str]:
    """What follows ``python``."""
    own = item.arguments(command)
    return ["-m", item.module, "--out", str(command.out / item.name), *own, *command.more.get(item.name, [])]


def identity(command: ReproduceCommand, item: Item) -> dict[str, Any]:
    """What makes an item's result the one wanted: its command and the content of what it reads."""
    reads = {f"out/{name}": command.out / name / "results.json" for name in item.needs}
    reads["checkpoint"] = _model(command) / "params.sha256.json"
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in reads.items() if path.exists()}
    return {"command": shlex.join(["python", *arguments(command, item)]), "reads": digests}


def _about(command: ReproduceCommand) -> dict[str, str]:
    """What all items of a directory share."""
    _, _, task = read_description(resolved(_model(command), "checkpoint"))
    manifest = hashlib.sha256((_model(command) / "params.sha256.json").read_bytes()).hexdigest()
    return {"scale": command.scale, "task": task.name, "model": manifest}


def run_item(command: ReproduceCommand, item: Item, notes: dict[str, Any]) -> None:
    """Runs an item unless it is done, and notes what came of it under its name in ``notes``."""
    lacking = [
        name
        for name in item.needs
        if not (command.out / name / "results.json").exists() or notes.get(name, {}).get("error")
    ]
    wanted = identity(command, item)
    done = notes.get(item.name, {})
    finished = (command.out / item.name / "results.json").exists()
    if finished and not lacking and not done.get("error") and {key: done.get(key) for key in wanted} == wanted:
        print(f"{item.name}: done before", flush=True)
        return
    started = time.monotonic()
    if lacking:
        error = f"It reads the results of {', '.join(lacking)}, which are not there or of a call that failed."
    else:
        print(f"{item.name}: {wanted['command']}", flush=True)
        code, output = run_process(item.name, arguments(command, item), command.out / "logs" / f"{item.name}.log")
        error = f"exit code {code}\n{output}" if code else ""
    seconds = time.monotonic() - started
    notes[item.name] = {**wanted, "error": error, "seconds": seconds}
    print(f"{item.name}: {'failed' if error else 'done'} after {page.duration(seconds)}", flush=True)


def write_report(command: ReproduceCommand, notes: dict[str, Any]) -> list[page.Card]:
    """Writes report.html from what is on disk; its cards."""
    cards = []
    for item in sorted(ITEMS, key=lambda item: item.name):
        typed, error = (notes.get(item.name, {}).get(key, "") for key in ("command", "error"))
        cards.append(page.read_card(item.name, item.title, command.out / item.name, typed, error))
    of = notes.get(ABOUT, {"scale": command.scale, "task": ADDITION.name})
    title = f"“Ignore the KL Penalty!” in JAX: every figure and table at the {of['scale']} scale, {of['task']}"
    text = page.page(title, cards)
    replace(command.out / "report.html", text)
    return cards


def main(command: ReproduceCommand) -> None:
    hosts.require_one("reproduce")
    path = command.out / "reproduce.json"
    notes = read_json(path, "out") if path.exists() else {}
    earlier = isinstance(notes, dict) and all(isinstance(note, dict) for note in notes.values())
    require(earlier, "out", str(path), "a directory of an earlier call")
    chosen = [item for item in ITEMS if not command.items or item.name in command.items]
    if command.report_only:
        require(command.out.is_dir(), "out", str(command.out), "a directory of results")
    else:
        about = _about(command)
        for name, value in about.items():
            theirs = notes.get(ABOUT, about)[name]
            option = "checkpoint" if name in ("model", "task") else name
            require(theirs == value, option, value, f"{theirs}, that of the earlier call in {command.out}")
        notes[ABOUT] = about
        command.out.mkdir(parents=True, exist_ok=True)
        for item in chosen:
            run_item(command, item, notes)
            hosts.write_json(path, notes)
            write_report(command, notes)
    cards = write_report(command, notes)
    for card in cards:
        verdicts = ", ".join(f"{count} {name}" for name, count in card.verdicts.items())
        print(f"{card.name}: {verdicts}")
    print(f"report.html in {command.out}")
    wanted = {item.name for item in chosen}
    if any(card.error for card in cards if card.name in wanted):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, ReproduceCommand, joins_hosts=False)  # Its items do.
