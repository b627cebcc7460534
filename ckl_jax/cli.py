"""Command lines from the config dataclasses: presets by --scale and --recipe, errors as one line and exit code 2."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from ckl_jax.config import ConfigError


def parse(config_type: Any, preset: Callable[..., Any] | None, arguments: Sequence[str]) -> Any:
    """A ``config_type`` from arguments; ``preset(scale, ...)`` gives the defaults that they override.

    Raises:
      ConfigError: a value that cannot work. SystemExit(2): unknown options; SystemExit(0): ``--help``.
    """
    default = None
    if preset is not None:
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parameters = inspect.signature(preset).parameters
        for name, parameter in parameters.items():
            finder.add_argument(f"--{name}", default=parameter.default)
        named, _ = finder.parse_known_args(arguments)
        default = preset(**vars(named))
    return tyro.cli(config_type, default=default, args=list(arguments), config=(tyro.conf.FlagConversionOff,))


def run(main: Callable[[Any], None], config_type: Any, preset: Callable[..., Any] | None = None) -> None:
    """Parses the process's arguments and runs ``main``; a ConfigError ends as one line and exit code 2."""
    try:
        main(parse(config_type, preset, sys.argv[1:]))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
