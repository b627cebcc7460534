"""parse.py MODULE ARG...: what MODULE says to its arguments, and no more: it is not run. Code 2 where it refuses them."""

import runpy
import sys
from typing import Any

from ckl_jax import cli

run = cli.run


def _parse_only(main: Any, *types: Any, **options: Any) -> None:
    del main
    run(lambda command: None, *types, **{**options, "joins_hosts": False})


cli.run = _parse_only
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
