"""The TPUs and GPUs that programs can be compiled for without one: TPUs by the names of libtpu's topologies."""

import importlib.util
import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from ckl_jax.errors import ConfigError, require

GIB = 2**30
OF_A_GPU = 0.75
"""The part of a GPU's memory that JAX takes by default."""


class Chip(NamedTuple):
    """What a device of JAX has, as Google Cloud's pages on the TPU versions and NVIDIA's data sheets (SXM) say.

    Attributes:
      memory: bytes of HBM that programs may use: as libtpu 0.0.52 says where they use more; of a GPU ``OF_A_GPU``.
      flops: bfloat16 operations a second, at most.
      bandwidth: bytes a second of HBM.
      links: bytes a second that it sends to other chips, over all its links together.
      passes: by precision, how many products of bfloat16 numbers take as long as one of float32 numbers.
    """

    memory: float
    flops: float
    bandwidth: float
    links: float
    passes: Mapping[str, float]


TPU_PASSES = {"default": 1, "high": 3, "highest": 6}
HOPPER_FLOPS = 989.4e12
# Tensor cores have half that speed for TF32, which XLA takes unless the precision is the highest; float32 has none.
HOPPER_PASSES = {"default": 2, "high": 2, "highest": HOPPER_FLOPS / 66.9e12}
CHIPS = {
    "v4": Chip(30.75 * GIB, 275e12, 1228e9, 300e9, TPU_PASSES),
    "v5e": Chip(15.75 * GIB, 197e12, 819e9, 200e9, TPU_PASSES),
    "v5p": Chip(95.73 * GIB, 459e12, 2765e9, 600e9, TPU_PASSES),
    "v6e": Chip(31.24 * GIB, 918e12, 1640e9, 400e9, TPU_PASSES),
    "h100": Chip(OF_A_GPU * 84_942_979_072, HOPPER_FLOPS, 3352e9, 450e9, HOPPER_PASSES),
    "h200": Chip(OF_A_GPU * 151_397_597_184, HOPPER_FLOPS, 4800e9, 450e9, HOPPER_PASSES),
}
GPUS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200 141GB HBM3e"}
FLAT = ("v5e", "v6e")  # Their topologies have two numbers, and their types count chips; those of the others cores.
FLAT_SHAPES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SOLID_SHAPES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")
EXAMPLES = "v5e:2x4, v6e:2x2, v5p:2x2x1, v4:2x2x1, h100:8 (one host) or h100:2x8 (two)"
HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  l2_cache_size: 52428800
  memory_bandwidth: {bandwidth:.0f}
  device_memory_size: {memory:.0f}
}}
platform_name: "CUDA"
runtime_version {{ major: 12 minor: 9 }}
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
"""What XLA's compiler asks of an H100 or H200 (a GpuTargetConfigProto; the numbers are in openxla/xla's specs)."""


def accelerator_type(name: str) -> str:
    """Google Cloud's type of a topology: ``v5litepod-8`` of ``v5e:2x4``."""
    kind, _, sizes = name.partition(":")
    number = math.prod(int(size) for size in sizes.split("x")) * (1 if kind in FLAT else 2)
    return f"{'v5litepod' if kind == 'v5e' else kind}-{number}"


ACCELERATOR_TYPES = {
    accelerator_type(f"{kind}:{shape}"): f"{kind}:{shape}"
    for kind in CHIPS
    if kind not in GPUS
    for shape in (FLAT_SHAPES if kind in FLAT else SOLID_SHAPES)
}
"""The topologies of Google Cloud's types, in their usual shapes."""


class Topology(NamedTuple):
    """A TPU or GPU hosts by name, the chip, and the devices that stand for it."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]

    @property
    def hosts(self) -> int:
        return len({device.process_index for device in self.devices})


def topology(name: str) -> Topology:
    """The TPU of a name such as ``v5e:2x4``, or of a type such as ``v5litepod-8``; the GPUs of one such as ``h100:8``.

    Raises:
      ConfigError: an unknown chip, a shape that there is not, or a compiler that is not installed.
    """
    name = ACCELERATOR_TYPES.get(name, name)
    kind, _, sizes = name.partition(":")
    shape = tuple(int(size) for size in sizes.split("x")) if re.fullmatch(r"[1-9]\d?(x[1-9]\d?)*", sizes) else ()
    axes = (1, 2) if kind in GPUS else (2,) if kind in FLAT else (3,)
    right = kind in CHIPS and len(shape) in axes
    require(right, "topology", name, f"a chip of {', '.join(CHIPS)} with its shape, such as {EXAMPLES}")
    return _gpus(name, kind, shape) if kind in GPUS else _tpu(name, kind, shape)


def _gpus(name: str, kind: str, shape: tuple[int, ...]) -> Topology:
    _require_compiler("jax_cuda12_plugin", "gpu", name)
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # It asks the driver, which is not here.
    chip = CHIPS[kind]
    target = HOPPER.format(bandwidth=chip.bandwidth, memory=chip.memory / OF_A_GPU, name=GPUS[kind])
    shape = (1, *shape) if len(shape) == 2 else (1, 1, *shape)
    sizes = "x".join(str(size) for size in shape)
    try:
        found = topologies.get_topology_desc(platform="cuda", target_config=target, topology=sizes)
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:  # The plugin is of another jaxlib, say.
        raise _refused(name, "with a jax_cuda12_plugin that fits jaxlib", error) from error
    return Topology(name, chip, tuple(found.devices))


def _refused(name: str, allowed: str, error: Exception) -> ConfigError:
    return ConfigError(f"topology: got {name!r}, allowed is {allowed} ({' '.join(str(error).split())})")


def _require_compiler(module: str, extra: str, name: str) -> None:
    found = importlib.util.find_spec(module) is not None
    require(found, "topology", name, f"given with pip install '.[{extra}]'")


def _tpu(name: str, kind: str, shape: tuple[int, ...]) -> Topology:
    _require_compiler("libtpu", "preflight", name)
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
        raise _refused(name, f"what libtpu knows, such as {EXAMPLES}", error) from error
    return Topology(name, CHIPS[kind], tuple(found.devices))
