"""Runs over devices: every device computes its own runs, and none waits for another."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ckl_jax.config import require
from ckl_jax.rollout import largest_divisor

RUN_AXIS = "run"
ALL, BY_RUN = PartitionSpec(), PartitionSpec(RUN_AXIS)


def runs_mesh(num_runs: int, num_devices: int | None = None) -> Mesh:
    """A mesh with the axis ``run`` over as many devices as share the runs evenly.

    Args:
      num_devices: how many; default: the largest divisor of ``num_runs`` that there are devices for.

    Raises:
      ConfigError: ``num_devices`` are not there or do not share the runs evenly.
    """
    devices = jax.devices()
    if num_devices is None:
        num_devices = largest_divisor(num_runs, at_most=len(devices))
    fits = 1 <= num_devices <= len(devices) and num_runs % num_devices == 0
    require(fits, "num_devices", num_devices, f"a divisor of {num_runs} runs, at most {len(devices)} devices")
    return Mesh(np.array(devices[:num_devices]), (RUN_AXIS,))


def by_run(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays with a leading axis of runs."""
    return NamedSharding(mesh, BY_RUN)


def everywhere(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that every device has whole."""
    return NamedSharding(mesh, ALL)
