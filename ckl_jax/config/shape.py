"""A model's shape and arithmetic."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from ckl_jax.errors import require
from ckl_jax.fields import AtLeast, PositiveInt, require_fields
from ckl_jax.resuming import speed
from ckl_jax.tasks import alphabet

Activation = Literal["gelu_tanh", "gelu_erf"]
Dtype = Literal["float32", "bfloat16"]
Attention = Literal["auto", "plain", "fused"]
Precision = Literal["default", "high", "highest"]
MOST_WEIGHTS = 10**10


def require_vocabulary(size: int, name: str) -> None:
    """Raises a ConfigError unless a model of that many tokens knows all of ours, and no more than are kept."""
    known = alphabet.VOCAB_SIZE <= size <= alphabet.MOST_TOKENS
    require(known, name, size, f"{alphabet.VOCAB_SIZE}..{alphabet.MOST_TOKENS}")


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
    dtype: Dtype = "float32"
    """Type of the activations in pre-training; parameters, logits and losses are float32 always."""
    precision: Precision = "highest"
    """Precision of the matrix products (TF32 and bfloat16 passes on accelerators below `highest`)."""
    attention_chunk: PositiveInt = speed(256)
    """Queries per chunk of plain causal attention: each chunk reads the keys up to its own end only. Dropout draws
    other numbers with another chunk."""
    attention: Attention = speed("auto")
    """`fused`: causal attention is one kernel of a TPU or GPU, whose scores never reach main memory; on a CPU it is
    emulated, slowly. `plain`: as XLA compiles it. `auto`: fused on a TPU or GPU (NVIDIA's from Ampere on: A100, RTX 30)
    where shape and precision allow, else plain. Dropout draws other numbers in the other way. Decoding is plain."""
    layers: Literal["auto", "scanned", "unrolled"] = speed("auto")
    """`scanned`: one layer is compiled and looped over; the backward pass computes again what its GELU and plain
    attention made. `unrolled`: each is compiled. `auto`: scanned on a TPU, unrolled elsewhere, where that is faster (on
    a GPU by what is moved). Dropout draws other numbers in the other way."""
    remat: bool = speed(False)
    """Compute the activations of a layer again in the backward pass instead of keeping them: less memory, a third more
    work."""

    def __post_init__(self) -> None:
        require_fields(self)
        require(self.width % self.num_heads == 0, "width", self.width, f"a multiple of num_heads = {self.num_heads}")
        if self.attention == "fused":
            shape = f"{self.num_heads} heads of width {self.width // self.num_heads}, {self.block_size} positions"
            shape += f", precision {self.precision}"
            allowed = "plain: fused takes heads of width 32, 64 or 128, a width of 128 k, up to 1,024 positions, and "
            allowed += "precision default or highest"
            require(self.can_fuse_attention, "attention", f"fused with {shape}", allowed)
        few = self.num_weights <= MOST_WEIGHTS
        sizes = f"{self.num_weights:.3g} weights (num_layers, block_size and vocab_size count too)"
        require(few, "width", self.width, f"what makes at most {MOST_WEIGHTS:.0e} weights, not {sizes}")

    @property
    def for_any_machine(self) -> ModelConfig:
        """Without what one machine was told for speed; ``attention_chunk`` stays, which goes with the shape."""
        return dataclasses.replace(self, attention="auto", layers="auto", remat=False)

    @property
    def can_fuse_attention(self) -> bool:
        """Whether the kernel can compute it: heads fill blocks of 128 lanes, and scores the fast memory."""
        fills = self.width // self.num_heads in (32, 64, 128) and self.width % 128 == 0
        return fills and self.block_size <= 1024 and self.precision != "high"

    @property
    def num_weights(self) -> int:
        """Entries of the matrices, which are nearly all parameters."""
        return 12 * self.num_layers * self.width**2 + (self.vocab_size + self.block_size) * self.width
