"""The devices that programs are made for: JAX's own, or, while they are only compiled, those of a machine elsewhere.

A command says what it computes as ``Call``s, so that `ckl_jax.preflight` compiles the very same without computing it.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

_elsewhere: contextvars.ContextVar[tuple[Any, ...]] = contextvars.ContextVar("elsewhere", default=())


@contextlib.contextmanager
def compiling_for(devices: Sequence[Any]) -> Iterator[None]:
    """Inside, programs are made for ``devices`` of ``jax.experimental.topologies``, which can compute nothing here."""
    token = _elsewhere.set(tuple(devices))
    try:
        yield
    finally:
        _elsewhere.reset(token)


def only_compiling() -> bool:
    """Whether the devices are elsewhere."""
    return bool(_elsewhere.get())


def devices() -> Sequence[Any]:
    """All devices of all processes."""
    return _elsewhere.get() or jax.devices()


def platform() -> str:
    """``cpu``, ``gpu`` or ``tpu``."""
    return str(devices()[0].platform)


def several_processes() -> bool:
    """Whether the devices belong to more than one process."""
    return len({device.process_index for device in devices()}) > 1


class Call(NamedTuple):
    """A compiled function of JAX with its arguments, and the mesh that is set meanwhile."""

    function: Any
    mesh: Mesh
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = {}

    def run(self) -> Any:
        return self._within_mesh(self.function)

    def lower(self) -> Any:
        """``jax.stages.Lowered``; only the shapes of the arguments matter."""
        return self._within_mesh(self.function.lower)

    def _within_mesh(self, call: Callable[..., Any]) -> Any:
        with jax.set_mesh(self.mesh):
            return call(*self.arguments, **self.options)
