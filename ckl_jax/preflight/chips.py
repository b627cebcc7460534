"""The TPUs that programs can be compiled for without one, by the names of libtpu's topologies."""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from ckl_jax.errors import ConfigError, require

GIB = 2**30


class Chip(NamedTuple):
    """What a device of JAX has, as Google Cloud's pages on the TPU versions say.

    Attributes:
      memory: bytes of HBM that programs may use, as libtpu 0.0.52 says where they use more.
      flops: bfloat16 operations a second, at most.
      bandwidth: bytes a second of HBM.
      links: bytes a second to other chips, all links together.
    """

    memory: float
    flops: float
    bandwidth: float
    links: float


CHIPS = {
    "v4": Chip(30.75 * GIB, 275e12, 1228e9, 300e9),
    "v5e": Chip(15.75 * GIB, 197e12, 819e9, 200e9),
    "v5p": Chip(95.73 * GIB, 459e12, 2765e9, 600e9),
    "v6e": Chip(31.24 * GIB, 918e12, 1640e9, 400e9),
}
FLAT = ("v5e", "v6e")  # Their topologies have two numbers, and their types count chips; those of the others cores.
FLAT_SHAPES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SOLID_SHAPES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")
EXAMPLES = "v5e:2x4, v6e:2x2, v5p:2x2x1 or v4:2x2x1"


def accelerator_type(name: str) -> str:
    """Google Cloud's type of a topology: ``v5litepod-8`` of ``v5e:2x4``."""
    kind, _, sizes = name.partition(":")
    number = math.prod(int(size) for size in sizes.split("x")) * (1 if kind in FLAT else 2)
    return f"{'v5litepod' if kind == 'v5e' else kind}-{number}"


ACCELERATOR_TYPES = {
    accelerator_type(f"{kind}:{shape}"): f"{kind}:{shape}"
    for kind in CHIPS
    for shape in (FLAT_SHAPES if kind in FLAT else SOLID_SHAPES)
}
"""The topologies of Google Cloud's types, in their usual shapes."""


class Topology(NamedTuple):
    """A TPU by name, its chip, and the devices that stand for it."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]

    @property
    def hosts(self) -> int:
        return len({device.process_index for device in self.devices})


def topology(name: str) -> Topology:
    """The TPU of a name such as ``v5e:2x4``, or of a type such as ``v5litepod-8``.

    Raises:
      ConfigError: an unknown chip, a shape that there is not, or no libtpu.
    """
    name = ACCELERATOR_TYPES.get(name, name)
    kind, _, sizes = name.partition(":")
    shape = tuple(int(size) for size in sizes.split("x")) if re.fullmatch(r"[1-9]\d?(x[1-9]\d?)+", sizes) else ()
    right = kind in CHIPS and len(shape) == (2 if kind in FLAT else 3)
    require(right, "topology", name, f"a chip of {', '.join(CHIPS)} with its shape, such as {EXAMPLES}")
    require(importlib.util.find_spec("libtpu") is not None, "topology", name, "given with pip install '.[preflight]'")
    # One host has up to 8 chips of the flat ones if it is alone, else 4.
    alone = kind in FLAT and shape in ((1, 1), (2, 4))
    options: dict[str, Any] = {"chips_per_host_bounds": (*shape, 1)} if alone else {}
    options |= {"chip_config_name": "megacore"} if kind == "v4" else {}  # Both cores of a chip are one device.
    os.environ.update(
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_ACCELERATOR_TYPE=accelerator_type(name),
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
    )
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        said = " ".join(str(error).split())
        raise ConfigError(
            f"topology: got {name!r}, allowed is what libtpu knows, such as {EXAMPLES} ({said})"
        ) from error
    return Topology(name, CHIPS[kind], tuple(found.devices))
