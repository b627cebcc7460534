"""Suite-wide: CPU, no silent rank promotion, and models small enough to compile in seconds."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

from ckl_jax.config import ModelConfig

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def small_model() -> ModelConfig:
    """Two layers of width 16 with a block that holds problems of up to 3 digits."""
    return ModelConfig(num_layers=2, num_heads=2, width=16, block_size=400, attention_chunk=64)
