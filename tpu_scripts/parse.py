"""parse.py MODULE ARG...: has MODULE read its arguments, without running it. Exit code 2: it refuses them."""

import runpy
import sys
from typing import Any

from ckl_jax.runtime import cli

run = cli.run


def _parse_only(main: Any, *types: Any, **options: Any) -> None:
    del main
    run(lambda command: None, *types, **{**options, "joins_hosts": False})


cli.run = _parse_only
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
