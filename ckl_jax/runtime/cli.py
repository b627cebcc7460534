"""Command lines from the config dataclasses: presets by --scale and --recipe, errors as one line and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import io
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tyro

from ckl_jax.errors import ConfigError, require
from ckl_jax.runtime import finite, hosts, options, preemption, startup, xla_cpu


def parse(config_type: Any, preset: Callable[..., Any] | None, arguments: Sequence[str]) -> Any:
    """A ``config_type`` from arguments; ``preset(scale, ...)`` gives the defaults that they override.

    Its parameters are options: ``finetune_recipe`` is ``--finetune.recipe``.

    Raises:
      ConfigError: an unknown option or a value that cannot work. SystemExit(0): ``--help``.
    """
    with _errors_as_one_line():
        return _parse(config_type, preset, arguments)


def _parse(config_type: Any, preset: Callable[..., Any] | None, arguments: Sequence[str]) -> Any:
    default = None
    if preset is not None:
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parameters = inspect.signature(preset).parameters
        for name, parameter in parameters.items():
            finder.add_argument(f"--{name.replace('_', '.')}", dest=name, default=parameter.default)
        named, _ = finder.parse_known_args(arguments)
        default = preset(**vars(named))
    module = sys.modules["__main__"].__spec__
    return tyro.cli(
        config_type,
        prog=f"python -m {module.name.removesuffix('.__main__')}" if module else None,
        default=default,
        args=_as_flags(arguments, _switches(config_type)),
        registry=options.RULES,
    )


def _switches(config_type: Any, prefix: str = "--") -> dict[str, bool]:
    """The options of bool fields, those of nested dataclasses too, and whether each may also be None."""
    found: dict[str, bool] = {}
    for name, kind in typing.get_type_hints(config_type, include_extras=True).items():
        unnamed = options.is_unnamed(kind)
        kind = typing.get_args(kind)[0] if hasattr(kind, "__metadata__") else kind
        option = prefix if unnamed else prefix + name.replace("_", "-")
        if dataclasses.is_dataclass(kind):
            found |= _switches(kind, option if unnamed else option + ".")
        elif kind in (bool, bool | None):
            found[option] = kind is not bool
    return found


def _as_flags(arguments: Sequence[str], switches: Mapping[str, bool]) -> list[str]:
    """``--quiet True`` becomes ``--quiet``, ``--quiet False`` ``--no-quiet``: recorded commands have them so."""
    flags: list[str] = []
    words = list(arguments)
    while words:
        option, equals, value = words[0].partition("=")
        option = option.replace("_", "-")
        positive = re.sub(r"^--(.*\.)?no-", r"--\1", option)
        if positive not in switches:
            flags.append(words.pop(0))
            continue
        del words[0]
        if option != positive:
            value = f"={value}" if equals else "False"
        elif not equals:
            value = words.pop(0) if words and not words[0].startswith("-") else "True"
        negative = re.sub(r"^--(.*\.)?", r"--\1no-", positive)
        known = ("True", "False", "None") if switches[positive] else ("True", "False")
        require(value in known, positive, value, f"{positive} or {negative}" + " or None" * switches[positive])
        flags += [positive, value] if switches[positive] else [positive if value == "True" else negative]
    return flags


@contextlib.contextmanager
def _errors_as_one_line() -> Iterator[None]:
    """Turns what a parser prints before it exits, boxes included, into a ConfigError."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        frame = r"\x1b\[[0-9;]*m|\A[^\n]*\n\s*-+\s*$|^usage:.*|^\s*[╭╰].*|^[\s│]*[─-]+[\s│]*$"
        text = re.sub(frame, " ", printed.getvalue(), flags=re.MULTILINE).replace("│", " ")
        line = re.split(" For full helptext| Argument helptext:", " ".join(text.split()))[0]
        foreign = r"^(Error parsing )?(\w+(Command|Config): )?|no type matching .* <class 'pathlib.Path'>: "
        raise ConfigError(_as_raised(re.sub(foreign, "", line), stop)) from None


def _as_raised(line: str, error: BaseException | None) -> str:
    """The line with what the ConfigError behind ``error`` says, whose long words a parser has broken in two."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    said = "" if error is None else str(error)
    broken = r"\s*".join(map(re.escape, said.replace(" ", "")))
    return re.sub(broken, lambda found: said, line) if said else line


def run(
    main: Callable[[Any], None],
    config_type: Any,
    preset: Callable[..., Any] | None = None,
    *,
    joins_hosts: bool = True,
) -> None:
    """Parses the process's arguments and runs ``main``; what stops it is one line and an exit code.

    2: a ConfigError. 3: a loss or parameter is not finite. 75: stopped by SIGTERM, to go on with the same command. 1: a
    file cannot be written or read, or a device does not start.

    Args:
      joins_hosts: become one of several processes where the environment says so (``hosts.start``).
    """
    xla_cpu.avoid_wrong_fusions()
    xla_cpu.wait_for_other_devices()
    try:
        try:
            startup.use_all_cores()
            command = parse(config_type, preset, sys.argv[1:])
            startup.require_same_numbers()
            note = startup.keep_compiled_programs()
            if joins_hosts:
                hosts.start()
                startup.require_devices()
            main(command)
            if note:
                print(note, file=sys.stderr)
        finally:
            sys.stdout.flush()
    except ConfigError as error:
        _stop(f"error: {error}", 2)
    except finite.NotFiniteError as error:
        _stop(f"error: {error}", finite.EXIT_CODE)
    except preemption.PreemptedError as stop:
        _stop(f"stopped by SIGTERM: {stop}; the same command goes on from there", preemption.EXIT_CODE)
    except KeyboardInterrupt:
        _stop("interrupted", 130)
    except BrokenPipeError as error:
        _drop_output()
        if isinstance(error.__context__, SystemExit):  # The end of a help text that somebody has read enough of.
            raise error.__context__ from None
        _stop("error: nobody reads the standard output any more", 1)
    except OSError as error:
        _stop(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}", 1)


def _drop_output() -> None:
    """What is still to be written goes nowhere, and fails no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stop(line: str, code: int) -> None:
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
    print(line, file=sys.stderr)
    sys.exit(code)
