"""parse.py [--here | --adopt] MODULE ARG...: has MODULE read its arguments, without running it.

Of experiments.reproduce its items read theirs too. Exit code 2: they are refused, or one is a path that will not be on
another machine, or models that it trains beside OUT would be lost with the machine.

--here: the command is for this machine, whatever its paths. --adopt: it may go on already, on a machine that has more
than what is copied to a new one, so what it reads may lie anywhere.
"""

import dataclasses
import functools
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from ckl_jax.checkpoint import shipped
from ckl_jax.errors import ConfigError, require
from ckl_jax.runtime import cli, paths
from ckl_jax.runtime.paths import in_bucket

ROOT = pathlib.Path(__file__).resolve().parents[1]
MADE_THERE = ("out", "data_dir")

run = cli.run
del sys.argv[0]
place = sys.argv.pop(0) if sys.argv[0] in ("--here", "--adopt") else ""
module = sys.argv[0]


def _parse_only(main: Any, *types: Any, **options: Any) -> None:
    del main
    run(_check, *types, **{**options, "joins_hosts": False})


def _check(command: Any) -> None:
    reads_defaults = not (getattr(command, "plot_only", False) or getattr(command, "report_only", False))
    _require_paths_that_travel(command, sys.argv, defaults=reads_defaults)
    if module == "experiments.reproduce" and reads_defaults:
        _require_items(command, sys.modules["__main__"])


def _require_items(command: Any, reproduce: Any) -> None:
    """Each item reads what it would get. A model that is not here, or not yet, has the tiny one in its place."""
    model = command.starts_from
    if model is not None and (in_bucket(model) or not (pathlib.Path(shipped.located(model)) / "model.json").exists()):
        command = dataclasses.replace(command, checkpoint=shipped.SHIPPED_TINY)
    if in_bucket(command.out):  # Figure 5 would look there.
        command = dataclasses.replace(command, out=pathlib.Path("runs/reproduce"))
    for item in reproduce.ITEMS:
        if command.items and item.name not in command.items:
            continue
        words, own = reproduce.arguments(command, item)[2:], command.more.get(item.name, [])
        cli.run = functools.partial(_require_item, words, own)
        try:
            runpy.run_module(item.module, run_name="__main__", alter_sys=True)
        except ConfigError as error:
            raise ConfigError(f"{item.name}: {error}") from error


def _require_item(
    words: list[str], own: list[str], main: Any, config_type: Any, preset: Any = None, **options: Any
) -> None:
    """In the place of ``cli.run``, while the item's module is there: its types are read by their names."""
    del main, options
    _require_paths_that_travel(cli.parse(config_type, preset, words), own, defaults=False)


def _require_paths_that_travel(command: Any, words: Sequence[str], *, defaults: bool) -> None:
    """Raises a ConfigError for a path that will not be there: one of ``words`` or, with ``defaults``, any."""
    if place == "--here":
        return
    given = {_normalized(word.partition("=")[2] if word.startswith("--") else word) for word in words}
    ships = " | ".join(shipped.names())
    allowed = f"a path in a bucket, a model that ships ({ships}), or from here one of the checkout's files"
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        if dataclasses.is_dataclass(value):
            _require_paths_that_travel(value, words, defaults=defaults)
        for path in value if isinstance(value, tuple) else (value,):
            is_given = str(path) in given
            if not isinstance(path, pathlib.Path) or field.name in MADE_THERE or not (is_given or defaults):
                continue
            if field.name == "pretrained":
                require(in_bucket(path), field.name, str(path), "a path in a bucket: what is trained there is kept")
            elif place != "--adopt":
                travels = _travels(path) or (not is_given and _ships(path))
                require(travels, field.name, str(path), f"{allowed}: nothing else is on the machine")


def _normalized(word: str) -> str:
    try:
        return str(paths.parse(word))
    except ConfigError:
        return word


def _ships(path: pathlib.Path) -> bool:
    return path.is_relative_to(shipped.PRETRAINED) and path.exists()


def _travels(path: pathlib.Path) -> bool:
    """In a bucket, the name of a model that ships, or of the files that are copied, wherever this is called from."""
    if in_bucket(path) or shipped.located(path) != path:
        return True
    target = (ROOT / path).resolve()
    is_other = path.exists() and path.resolve() != target
    if path.is_absolute() or is_other or not target.exists() or not target.is_relative_to(ROOT):
        return False
    return not (_is_ignored(path) or _is_ignored(target))


def _is_ignored(path: pathlib.Path) -> bool:
    """As pack in checks.sh has it: without .git by .gitignore alone."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    with tempfile.TemporaryDirectory() as scratch:
        if not (ROOT / ".git").exists():
            subprocess.run(["git", "init", "--quiet", scratch], env=environment, check=True)
            environment |= {"GIT_DIR": f"{scratch}/.git", "GIT_WORK_TREE": str(ROOT)}
        command = ["git", "check-ignore", "-q", str(path)]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


cli.run = _parse_only
runpy.run_module(module, run_name="__main__", alter_sys=True)
