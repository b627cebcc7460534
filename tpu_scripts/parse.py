"""parse.py MODULE ARG...: has MODULE read its arguments, without running it.

Exit code 2: it refuses them, or one is a path that is here and will not be on another machine, or models that it trains
beside OUT would be lost with the machine.
"""

import dataclasses
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
from typing import Any

from ckl_jax.errors import ConfigError, require
from ckl_jax.runtime import cli, paths
from ckl_jax.runtime.paths import in_bucket

ROOT = pathlib.Path(__file__).resolve().parents[1]
MADE_THERE = ("out", "data_dir")

run = cli.run


def _parse_only(main: Any, *types: Any, **options: Any) -> None:
    del main
    run(_require_paths_that_travel, *types, **{**options, "joins_hosts": False})


def _require_paths_that_travel(command: Any) -> None:
    given = {_normalized(word.partition("=")[2] if word.startswith("--") else word) for word in sys.argv}
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        if field.name == "pretrained":
            require(in_bucket(value), field.name, str(value), "a path in a bucket: what is trained there is kept")
        if dataclasses.is_dataclass(value):
            _require_paths_that_travel(value)
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, pathlib.Path) and str(path) in given and field.name not in MADE_THERE and path.exists():
                allowed = "a path in a bucket, or from here one of the checkout's files: nothing else is on the machine"
                require(_travels(path), field.name, str(path), allowed)


def _normalized(word: str) -> str:
    try:
        return str(paths.parse(word))
    except ConfigError:
        return word


def _travels(path: pathlib.Path) -> bool:
    target = path.resolve()
    if path.is_absolute() or target != (ROOT / path).resolve() or not target.is_relative_to(ROOT):
        return False
    return not (_is_ignored(path) or _is_ignored(target))


def _is_ignored(path: pathlib.Path) -> bool:
    """As pack in checks.sh has it: without .git by .gitignore alone."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    with tempfile.TemporaryDirectory() as scratch:
        if not (ROOT / ".git").exists():
            subprocess.run(["git", "init", "--quiet", scratch], env=environment, check=True)
            environment |= {"GIT_DIR": f"{scratch}/.git", "GIT_WORK_TREE": str(ROOT)}
        command = ["git", "check-ignore", "-q", path]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


cli.run = _parse_only
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
