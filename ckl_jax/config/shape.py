"""A model's shape and arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ckl_jax.errors import require
from ckl_jax.fields import AtLeast, PositiveInt, require_fields
from ckl_jax.resuming import speed
from ckl_jax.tasks import alphabet

Activation = Literal["gelu_tanh", "gelu_erf"]
MOST_WEIGHTS = 10**10


@dataclass(frozen=True)
class ModelConfig:
    """GPT-2's shape."""

    num_layers: Annotated[int, AtLeast(1, 1_000)] = 12
    """Transformer blocks."""
    num_heads: PositiveInt = 12
    """Attention heads of a layer."""
    width: PositiveInt = 768
    """Of the embeddings; a multiple of num_heads."""
    block_size: PositiveInt = 1024
    """Positions the model has; prompt + answer must fit."""
    vocab_size: PositiveInt = alphabet.VOCAB_SIZE
    """Tokens that can be read and written."""
    use_bias: bool = True
    """Biases in the dense layers and layer norms (Lee et al. pre-train without)."""
    activation: Activation = "gelu_tanh"
    """GELU of the MLP: by tanh as in GPT-2, or exact by the error function as in nanoGPT since June 2023."""
    dropout: Annotated[float, AtLeast(0, 0.99)] = 0.0
    """Dropout rate in pre-training; reinforcement learning and evaluation run without."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the activations; parameters, logits and losses are float32 always."""
    precision: Literal["default", "high", "highest"] = "highest"
    """Precision of the matrix products (TF32 and bfloat16 passes on accelerators below `highest`)."""
    attention_chunk: PositiveInt = speed(256)
    """Queries per chunk of causal attention: each chunk reads the keys up to its own end only."""

    def __post_init__(self) -> None:
        require_fields(self)
        require(self.width % self.num_heads == 0, "width", self.width, f"a multiple of num_heads = {self.num_heads}")
        few = self.num_weights <= MOST_WEIGHTS
        sizes = f"{self.num_weights:.3g} weights (num_layers, block_size and vocab_size count too)"
        require(few, "width", self.width, f"what makes at most {MOST_WEIGHTS:.0e} weights, not {sizes}")

    @property
    def num_weights(self) -> int:
        """Entries of the matrices, which are nearly all parameters."""
        return 12 * self.num_layers * self.width**2 + (self.vocab_size + self.block_size) * self.width
