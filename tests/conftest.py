"""Suite-wide: CPU, no silent rank promotion, and models small enough to compile in seconds."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["MPLBACKEND"] = "agg"
os.environ.setdefault("NPROC", "16")  # Twice the devices, as cli does.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # Most of the suite's time is compilation.

import jax
import pytest

from ckl_jax.config import ModelConfig
from ckl_jax.runtime import xla_cpu

xla_cpu.avoid_wrong_fusions()

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "compiled"))


@pytest.fixture(scope="session")
def small_model() -> ModelConfig:
    """Two layers of width 16 with a block that holds problems of up to 3 digits."""
    return ModelConfig(num_layers=2, num_heads=2, width=16, block_size=400, attention_chunk=64)


@pytest.fixture(autouse=True, scope="module")
def _drop_compiled_programs():
    """Hundreds of programs in one process run into the system's limit on memory mappings."""
    yield
    jax.clear_caches()
