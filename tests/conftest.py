"""Suite-wide: CPU, no silent rank promotion, and models small enough to compile in seconds."""

import dataclasses
import gc
import logging
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["MPLBACKEND"] = "agg"
os.environ.setdefault("NPROC", "16")  # Twice the devices, as cli does.
# Compiled programs, the small ones too, are shared by the test processes and the commands that they start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{pathlib.Path(__file__).parents[1]}/.pytest_cache/compiled")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest

from ckl_jax.config import ModelConfig
from ckl_jax.runtime import xla_cpu

FLAGS = {
    # Most of the suite's time is compilation, of which these leave a fifth: no optimization, the older emitters of
    # kernels, and one module of LLVM's for each program.
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": 1,
    # Eight devices on a loaded machine may wait long for each other.
    "xla_cpu_collective_call_terminate_timeout_seconds": 1200,
}
known = [f"--{name}={value}" for name, value in FLAGS.items() if xla_cpu.is_known(name)]
os.environ.setdefault("XLA_FLAGS", " ".join(known))
xla_cpu.avoid_wrong_fusions()

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

# What a damaged checkpoint leaves behind in Orbax is logged whenever garbage is collected. That parses code to print a
# traceback, and before CPython 3.11.8 a parse that was going on then fails.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)

MAPPINGS = 5_000  # Of memory; Linux allows a process 65,530, and those of its programs take some 100 kB each.


def pytest_collection_finish():
    """The thousands of tests live to the end, and every full collection would look at them and at the libraries."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture(scope="session")
def small_model() -> ModelConfig:
    """A layer of width 16 with a block that holds problems of up to 3 digits, and attention in several chunks."""
    return ModelConfig(num_layers=1, num_heads=2, width=16, block_size=400, attention_chunk=160)


@pytest.fixture(scope="session")
def two_layers(small_model) -> ModelConfig:
    """The same where what is passed from layer to layer matters."""
    return dataclasses.replace(small_model, num_layers=2)


@pytest.fixture
def debug_nans():
    """Raises where a computation makes a NaN."""
    with jax.debug_nans(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def _drop_compiled_programs():
    """Thousands of programs in one process run into the system's limit on memory mappings."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > MAPPINGS:
        jax.clear_caches()
