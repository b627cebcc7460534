"""Processes of their own, each with other flags of XLA, which reads them once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from ckl_jax.runtime import xla_cpu


class Process:
    """A process on CPU with a given flag of XLA; another one takes its place if it dies."""

    def __init__(self, flag: str):
        flags = f"{xla_cpu.flags_without_fusions()} {flag}".strip()  # XLA takes a space alone for the name of a file.
        self._variables = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        self._pool: ProcessPoolExecutor | None = None

    def start(self, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        """Calls the function there; what is returned waits for its result, which is None where the process died."""
        with _environment(self._variables):
            self._pool = self._pool or ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            future = self._pool.submit(function, *arguments)

        def result() -> Any:
            try:
                return future.result()
            except BrokenProcessPool:
                self.close()
                return None

        return result

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def on_all(processes: list[Process], function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function returns in each, at the same time; None where a process died."""
    started = [process.start(function, *arguments) for process in processes]
    return [result() for result in started]


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
