"""Copies of a run's records in TensorBoard and Weights & Biases.

The run's metrics.jsonl and samples.jsonl are the truth. A copy holds their numbers (not their arrays) and texts, and
whatever it lacks, because the run was killed or went on with other logging, comes from them at the next start.

``--log-to tensorboard wandb`` (either or both; extra ``logs``) makes the copies in `<out>/tensorboard` and at Weights &
Biases, which ``WANDB_MODE=offline`` keeps in `<out>/wandb`. It was tested offline alone. TensorBoard needs a local
``--out``. The commands that train have the option: pretrain, finetune, figures 4 and 6, controls, spared_tokens,
regularizers and minibatches.
"""

from __future__ import annotations

import functools
import html
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ckl_jax.errors import ConfigError, extra, require
from ckl_jax.fields import require_fields
from ckl_jax.runtime.paths import in_bucket, replace

LIBRARIES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


@dataclass(frozen=True)
class LogOptions:
    """Changes no number of a run, so one that goes on may have others."""

    log_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Copies of metrics and sampled answers (extra logs): in `<out>/tensorboard`; in `<out>/wandb` and, unless
    WANDB_MODE is offline, at Weights & Biases."""
    quiet: bool = False
    """Only the last lines and errors are printed."""

    def __post_init__(self) -> None:
        require_fields(self)
        for name in self.log_to:
            extra(LIBRARIES[name], "log_to", "logs")

    def require_possible(self, out: pathlib.Path) -> None:
        """Raises a ConfigError where a copy cannot be made of a run in that directory."""
        possible = "tensorboard" not in self.log_to or not in_bucket(out)
        require(possible, "log_to", "tensorboard", f"wandb only where out is in a bucket ({out})")

    def start(self, out: pathlib.Path, config: Mapping[str, Any], records: Iterable[dict[str, Any]]) -> Copies:
        """The copies of a run that starts or goes on with these records; ConfigError where one cannot be made."""
        copies = Copies({name: _MAKERS[name](out, config, self.quiet) for name in dict.fromkeys(self.log_to)})
        for record in sorted(records, key=lambda record: record["step"]):
            copies.add(record, again=True)
        return copies


class Copy(Protocol):
    """A copy of records; before it is given more it may lack those from the step ``lacks_from`` on."""

    lacks_from: int

    def add(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Copies:
    """All copies of a run, by name. One that fails is given up with a line that says so, and the run goes on."""

    def __init__(self, copies: Mapping[str, Copy] | None = None):
        self._copies = dict(copies or {})

    def add(self, record: Mapping[str, Any], again: bool = False) -> None:
        """To every copy; a record that is given again only to those that may lack it."""
        for name, copy in list(self._copies.items()):
            if not again or record["step"] >= copy.lacks_from:
                self._try(name, functools.partial(copy.add, record))

    def close(self) -> None:
        for name, copy in list(self._copies.items()):
            self._try(name, copy.close)
        self._copies = {}

    def _try(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # Whatever another library comes to: what was computed is not lost for it.
            del self._copies[name]
            said = " ".join(str(error).split()) or type(error).__name__
            line = f"log_to: {name} fails ({said}); the run goes on without, and its next start adds what is missing"
            print(line, file=sys.stderr)


class TensorBoard:
    """An event file for each run (arm and seed), made anew at every start and written at once."""

    def __init__(self, out: pathlib.Path, config: Mapping[str, Any], quiet: bool):
        self._out, self._files, self.lacks_from = out / "tensorboard", dict[str, Any](), 0
        for earlier in self._out.rglob("events.out.tfevents.*"):
            earlier.unlink()

    def add(self, record: Mapping[str, Any]) -> None:
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto.event_pb2 import Event

        run, contents = _contents(record)
        if run not in self._files:
            (self._out / run).mkdir(parents=True, exist_ok=True)
            self._files[run] = event_file_writer.EventsWriter(str(self._out / run / "events"))
        for name, value in contents.items():
            shown = (
                summary.scalar(name, value) if not isinstance(value, str) else summary.text(name, f"```\n{value}```")
            )
            self._files[run].write_event(Event(wall_time=time.time(), step=record["step"], summary=shown))
        self._files[run].flush()

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class WandB:
    """One run of Weights & Biases, with names like ``<arm>/seed_<k>/kl``; started again it goes on under its id.

    Steps that are computed again, which it cannot take back, it gets twice with the same numbers.
    """

    def __init__(self, out: pathlib.Path, config: Mapping[str, Any], quiet: bool):
        import wandb

        self._html, id_file = wandb.Html, out / "wandb_id"
        if not id_file.exists():
            replace(id_file, os.urandom(8).hex())
        settings = wandb.Settings(console="off")
        if quiet:
            settings.silent = True
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "ckl_jax"),
                name=out.name,
                id=id_file.read_text(encoding="utf-8"),
                resume="allow",
                dir=None if in_bucket(out) else str(out),
                config=dict(config),
                settings=settings,
            )
        except (wandb.errors.Error, RuntimeError, OSError) as error:  # Its own; no home directory.
            said = " ".join(str(error).split())
            raise ConfigError(
                f"log_to: got wandb, which cannot start ({said}); allowed is WANDB_MODE=offline, and a home directory"
            ) from error
        self._run.define_metric("*", step_metric="step")
        self.lacks_from = self._run.summary.get("step", 0) if self._run.resumed else 0

    def add(self, record: Mapping[str, Any]) -> None:
        run, contents = _contents(record)
        shown = {
            f"{run}/{name}" if run else name: self._html(f"<pre>{html.escape(value)}</pre>", inject=False)
            if isinstance(value, str)
            else value
            for name, value in contents.items()
        }
        self._run.log({"step": record["step"]} | shown)

    def close(self) -> None:
        self._run.finish()


_MAKERS: dict[str, Callable[[pathlib.Path, Mapping[str, Any], bool], Copy]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
}


def _contents(record: Mapping[str, Any]) -> tuple[str, dict[str, float | str]]:
    """The record's run, "" where there is but one, and what a copy has of it: its numbers, or a sampled answer."""
    run = f"{record['arm']}/seed_{record['seed']}" if "arm" in record else ""
    if "answer" in record:
        text = f"{record['problem']}, reward {record['reward']:g}:\n{record['answer']}"
        return run, {f"sample_{record['sample']}": text}
    numbers = {name: value for name, value in record.items() if isinstance(value, (int, float))}
    return run, {name: value for name, value in numbers.items() if name not in ("step", "seed")}
