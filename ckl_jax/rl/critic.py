"""The critic: the value of the state before each token, the baseline of an advantage."""

import functools
from typing import Any, cast

import jax
from flax import linen as nn


class ValueHead(nn.Module):
    """An MLP D -> 128 -> 128 -> 1 with ReLU on the trunk's last hidden state (authors' code).

    The last layer starts at zero: a random critic would be a worse baseline than none.
    """

    features: int = 128

    @nn.compact
    def __call__(self, hidden_BxTxD):
        x = hidden_BxTxD
        dense = functools.partial(nn.Dense, precision="highest")
        for name in ("fc_1", "fc_2"):
            x = nn.relu(dense(self.features, name=name)(x))
        return dense(1, kernel_init=nn.initializers.zeros, name="out")(x)[..., 0]


def values(params: Any, hidden_BxTxD: jax.Array) -> jax.Array:
    """The critic's value of the state before each token: float32 [B, T]."""
    return cast(jax.Array, ValueHead().apply(params, hidden_BxTxD))
