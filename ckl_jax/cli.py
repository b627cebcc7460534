"""Command lines from the config dataclasses: presets by --scale and --recipe, errors as one line and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import tyro

from ckl_jax import finite, hosts, paths, preemption, xla_cpu
from ckl_jax.config import ConfigError

_PATHS = tyro.constructors.ConstructorRegistry()


@_PATHS.primitive_rule
def _path_or_bucket(
    kind: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    if kind.type is not pathlib.Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: paths.parse(words[0]),
        is_instance=lambda value: isinstance(value, pathlib.PurePath),
        str_from_instance=lambda path: [str(path)],
    )


def parse(config_type: Any, preset: Callable[..., Any] | None, arguments: Sequence[str]) -> Any:
    """A ``config_type`` from arguments; ``preset(scale, ...)`` gives the defaults that they override.

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
            finder.add_argument(f"--{name}", default=parameter.default)
        named, _ = finder.parse_known_args(arguments)
        default = preset(**vars(named))
    flags = (tyro.conf.FlagConversionOff,)
    return tyro.cli(config_type, default=default, args=list(arguments), config=flags, registry=_PATHS)


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


def _use_all_cores() -> None:
    """One device per core where JAX has no accelerator, so that runs are computed side by side.

    XLA gets twice as many threads (it reads NPROC): with one a device, pre-training on two devices stood still in its
    first all-reduce until XLA aborted, as if the thread that waited there was one that the other device needed. Where
    JAX has computed something already (in a notebook, say), its devices stay what they are.
    """
    devices = int(os.environ.get("JAX_NUM_CPU_DEVICES") or os.cpu_count() or 1)
    os.environ.setdefault("NPROC", str(2 * devices))
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", devices)


def _keep_compiled_programs() -> None:
    """Starting again skips the compilation. JAX's own variable JAX_COMPILATION_CACHE_DIR names another directory."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(base) / "ckl_jax" / "compiled"))


def run(
    main: Callable[[Any], None],
    config_type: Any,
    preset: Callable[..., Any] | None = None,
    *,
    joins_hosts: bool = True,
) -> None:
    """Parses the process's arguments and runs ``main``; what stops it is one line and an exit code.

    2: a ConfigError. 3: a loss or parameter is not finite. 75: stopped by SIGTERM, to go on with the same command. 1: a
    file cannot be written or read.

    Args:
      joins_hosts: become one of several processes where the environment says so (``hosts.start``).
    """
    xla_cpu.keep_freed_memory()
    xla_cpu.avoid_wrong_fusions()
    _use_all_cores()
    _keep_compiled_programs()
    try:
        command = parse(config_type, preset, sys.argv[1:])
        if joins_hosts:
            hosts.start()
        main(command)
    except ConfigError as error:
        _stop(f"error: {error}", 2)
    except finite.NotFiniteError as error:
        _stop(f"error: {error}", finite.EXIT_CODE)
    except preemption.PreemptedError as stop:
        _stop(f"stopped by SIGTERM: {stop}; the same command goes on from there", preemption.EXIT_CODE)
    except OSError as error:
        _stop(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}", 1)


def _stop(line: str, code: int) -> None:
    print(line, file=sys.stderr)
    sys.exit(code)
