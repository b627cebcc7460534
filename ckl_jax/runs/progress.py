"""How far a run is: a bar where standard output is a terminal, else lines.

The bar shows accuracy, KL and the time left. ``--quiet`` leaves the end and the errors alone.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator

from rich import progress as bars
from rich.console import Console
from rich.text import Text


class Status(str):
    """A line about how far a run is, with what a display shows instead.

    Attributes:
      done, total: steps or rounds.
      values: accuracy and the like, as a short text.
      left: seconds, None where nothing is known yet.
    """

    def __new__(cls, line: str, done: int, total: int, values: str, left: float | None) -> Status:
        status = super().__new__(cls, line)
        status.done, status.total, status.values, status.left = done, total, values, left
        return status

    done: int
    total: int
    values: str
    left: float | None


class _TimeLeft(bars.ProgressColumn):
    def render(self, task: bars.Task) -> Text:
        end = task.fields["end"]
        return Text("" if end is None else f"{max(0, end - time.monotonic()):.0f} s left")


@contextlib.contextmanager
def display(quiet: bool) -> Iterator[Callable[[str], None]]:
    """What takes a run's lines: a bar as long as the context lives; ``print`` where no terminal is; or nothing."""
    if quiet:
        yield lambda line: None
    elif not (sys.stdout.isatty() and Console().is_interactive):
        yield functools.partial(print, flush=True)
    else:
        values = bars.TextColumn("{task.description}", markup=False)
        with bars.Progress(
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            values,
            bars.TimeElapsedColumn(),
            _TimeLeft(),
            refresh_per_second=2,
        ) as bar:
            task = bar.add_task("starting", total=None, end=None)

            def show(line: str) -> None:
                if not isinstance(line, Status):
                    bar.print(line)
                    return
                end = None if line.left is None else time.monotonic() + line.left
                bar.update(task, completed=line.done, total=line.total, description=line.values, end=end, refresh=True)

            yield show
