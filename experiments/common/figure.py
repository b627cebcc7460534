"""From numbers to results.json, a picture and printed tables: the same way for every figure and table."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from ckl_jax.analysis import plots
from ckl_jax.errors import ConfigError
from ckl_jax.runs.records import earlier_results, machine
from ckl_jax.runtime import hosts, reading
from ckl_jax.runtime.paths import replace

Results = dict[str, Any]


def publish(
    command: Any,
    module: str,
    name: str,
    measure: Callable[[Any], Results],
    text: Callable[[Results], str],
    draw: Callable[[Results], Figure] | None = None,
    *,
    judge: Callable[[Results], Results] | None = None,
    page: Callable[[Results], str] | None = None,
) -> None:
    """Measures, or with ``plot_only`` reads results.json, and presents the results.

    Args:
      command: has ``out`` and ``plot_only``.
      module: the command's name, as after ``python -m``.
      measure: the numbers. Device, platform and wall seconds are added where it gives none.
      judge: what follows from the numbers by the experiment's rules: claims and verdicts.
      name, text, draw, page: as in ``present``.

    Raises:
      ConfigError: ``out`` has another command's results.json, or with ``plot_only`` none or a damaged one.
    """
    path = command.out / "results.json"
    found = earlier_results(command.out, module)
    if not command.plot_only:
        started = time.monotonic()
        measured = measure(command)
        seconds = measured.get("wall_seconds", time.monotonic() - started)
        found = {**made_on(found, seconds), **measured, "wall_seconds": seconds}
        command.out.mkdir(parents=True, exist_ok=True)
        hosts.write_json(path, found)  # Now: what fails from here on can be repeated with plot_only.
    elif found is None:
        raise ConfigError(f"plot_only: got {command.out}, allowed is a directory with an earlier call's results.json")
    numbers = found
    read = path if command.plot_only else None
    present(command.out, name, lambda: numbers | (judge(numbers) if judge else {}), text, draw, page=page, read=read)


def made_on(earlier: Mapping[str, Any] | None, seconds: float) -> dict[str, str]:
    """The device and platform of a result that took so many seconds: an earlier call's if it had computed all of it."""
    if earlier is not None and earlier.get("wall_seconds") == seconds:
        return {name: earlier[name] for name in ("device", "platform") if name in earlier}
    return machine()


def present(
    out: pathlib.Path,
    name: str,
    results: Callable[[], Results],
    text: Callable[[Results], str],
    draw: Callable[[Results], Figure] | None = None,
    *,
    page: Callable[[Results], str] | None = None,
    read: pathlib.Path | None = None,
) -> None:
    """Writes results.json, ``name``.png, .svg and .html to ``out`` and prints a text; all or nothing.

    Args:
      text: what is printed: tables, answers, seconds.
      draw: the picture.
      page: an HTML document.
      read: what the results were read from; None if they were made just now.

    Raises:
      ConfigError: something goes wrong over what was read.
    """
    with reading.only_read(read or out, "plot_only", applies=read is not None):
        found = results()
        shown = text(found)
        with matplotlib.rc_context(plots.STYLE):
            picture = draw(found) if draw else None
        document = page(found) if page else None
    hosts.write_json(out / "results.json", found)
    files = ["results.json"]
    if document is not None:
        files.append(f"{name}.html")
        hosts.of_first(lambda: replace(out / files[-1], document))
    if picture is not None:
        files += [f"{name}.png", f"{name}.svg"]
        plots.save(picture, out, name)
    print(f"{shown}\n{', '.join(files)} in {out}")


def whose_certainty(config: Mapping[str, Any]) -> str:
    """What a title adds if the J of a run's config.json is not that of the model that was trained."""
    return ", J of another model" if config.get("certainty_checkpoint") else ""


def of_task(name: str) -> str:
    """What a claim adds if the task is not the paper's."""
    return "" if name == "addition" else f", {name}"


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    header = list(header)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])
