"""GPT-2 in Flax Linen.

Tensor names carry their shape: B batch, T new positions, S cached positions, H heads, K width per head, D width,
V vocabulary. Parameter names are GPT-2's own (``wte``, ``h_0/c_attn``, ...).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from ckl_jax.attention import fused, plain
from ckl_jax.attention.cache import Cache, LayerCache, append, append_to_layer
from ckl_jax.attention.kernel import Settings
from ckl_jax.config import ModelConfig
from ckl_jax.runtime import sharding, targets

LAYER_NORM_EPSILON = 1e-5
EMBEDDING_STDDEV = 0.02
STACKED = "layers"


class Output(NamedTuple):
    """``logits_BxTxV`` and ``hidden_BxTxD`` (after the final layer norm) in float32, and the extended cache.

    T is ``num_outputs`` where that was asked for.
    """

    logits_BxTxV: jax.Array
    hidden_BxTxD: jax.Array
    cache: Cache | None


def scans_layers(config: ModelConfig) -> bool:
    """Whether one layer is compiled and looped over."""
    return config.layers == "scanned" or (config.layers == "auto" and targets.platform() == "tpu")


def fuses_attention(config: ModelConfig) -> bool:
    """Whether causal attention is one kernel; on a CPU that is emulated."""
    return config.attention == "fused" or (
        config.attention == "auto" and fused.is_there() and config.can_fuse_attention
    )


def init_cache(config: ModelConfig, batch: int, slots: int) -> Cache:
    """An empty cache for ``batch`` rows of up to ``slots`` positions."""
    shape = (batch, config.num_heads, slots, config.width // config.num_heads)
    shapes = [(config.num_layers, *shape)] if scans_layers(config) else [shape] * config.num_layers
    layers = tuple(jnp.zeros(shape, config.dtype) for shape in shapes)
    return Cache(layers, layers, jnp.zeros((batch, slots), jnp.int32), jnp.zeros((), jnp.int32))


def _starts(cache: Cache, batch: int) -> jax.Array:
    return jnp.broadcast_to(cache.length, (batch,))


class Block(nn.Module):
    """A pre-LN transformer layer on rows flattened to [B * T, D], which keeps XLA's CPU backward in fast layouts.

    It returns the last ``num_outputs`` positions of each row.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTxD, segments_BxT, layer_cache, mask_BxTxS, deterministic, num_outputs):
        config = self.config
        batch, num_positions = segments_BxT.shape
        scale = 0.02 / (2 * config.num_layers) ** 0.5

        def dense(features, name, stddev=0.02):
            return nn.Dense(
                features,
                use_bias=config.use_bias,
                dtype=config.dtype,
                precision=config.precision,
                kernel_init=nn.initializers.normal(stddev),
                name=name,
            )

        def dropout(x):
            return nn.Dropout(config.dropout)(x, deterministic=deterministic)

        h_BTxD = _layer_norm(config, "ln_1")(x_BTxD)
        qkv_BTx3D = dense(3 * config.width, "c_attn")(h_BTxD)
        if layer_cache is None and fuses_attention(config):
            rate = 0.0 if deterministic else config.dropout
            key = self.make_rng("dropout") if rate else None
            attended_BxTxD = _fused(config, rate, qkv_BTx3D.reshape(batch, num_positions, -1), segments_BxT, key)
            attended_BTxD = attended_BxTxD[:, num_positions - num_outputs :].reshape(-1, config.width)
        else:
            heads = (batch, num_positions, 3, config.num_heads, config.width // config.num_heads)
            q_BxHxTxK, k_BxHxTxK, v_BxHxTxK = qkv_BTx3D.reshape(heads).transpose(2, 0, 3, 1, 4)
            q_BxHxTxK = q_BxHxTxK[:, :, num_positions - num_outputs :] * (config.width // config.num_heads) ** -0.5
            if layer_cache is None:
                attend: Callable[..., jax.Array]
                attend = functools.partial(plain.causal, segments_BxT=segments_BxT, dropout=dropout, config=config)
                if scans_layers(config):  # Scores are computed again instead of kept: they are most of what would be.
                    attend = jax.checkpoint(attend, prevent_cse=False)
                attended = attend(q_BxHxTxK, k_BxHxTxK, v_BxHxTxK)
            else:
                all_keys, keys = append_to_layer(layer_cache.keys, k_BxHxTxK, layer_cache)
                all_values, values = append_to_layer(layer_cache.values, v_BxHxTxK, layer_cache)
                layer_cache = layer_cache._replace(keys=all_keys, values=all_values)
                mask_BxTxS = mask_BxTxS[:, num_positions - num_outputs :]
                attended = plain.cached(q_BxHxTxK, keys, values, mask_BxTxS, dropout, config)
            attended_BTxD = attended.transpose(0, 2, 1, 3).reshape(batch * num_outputs, config.width)
        x_BxTxD = x_BTxD.reshape(batch, num_positions, config.width)[:, num_positions - num_outputs :]
        x_BTxD = x_BxTxD.reshape(batch * num_outputs, config.width)
        x_BTxD = x_BTxD + dropout(dense(config.width, "c_proj", scale)(attended_BTxD))
        h_BTxD = _layer_norm(config, "ln_2")(x_BTxD)
        gelu: Callable[[jax.Array], jax.Array]
        gelu = functools.partial(nn.gelu, approximate=config.activation == "gelu_tanh")
        if scans_layers(config):  # Keeps its input for the backward pass, and not all that it computes of it.
            gelu = jax.checkpoint(gelu, prevent_cse=False)
        h_BTx4D = gelu(dense(4 * config.width, "c_fc")(h_BTxD))
        x_BTxD = x_BTxD + dropout(dense(config.width, "mlp_c_proj", scale)(h_BTx4D))
        return x_BTxD, layer_cache


def _fused(config: ModelConfig, rate: float, qkv_BxTx3D: jax.Array, segments_BxT: jax.Array, key: Any) -> jax.Array:
    """The kernel's attention [B, T, D], every device on its own rows."""
    shape = qkv_BxTx3D.shape[0], config.num_heads
    seeds_BxH = jnp.zeros(shape, jnp.int32)
    if key is not None:
        seeds_BxH = jax.lax.bitcast_convert_type(jax.random.bits(key, shape), jnp.int32)
    device, precision = targets.platform(), jax.lax.Precision[config.precision.upper()]
    emulated = device not in fused.KERNELS
    settings = Settings(config.num_heads, rate, precision, "tpu" if emulated else device, emulated)
    rows = qkv_BxTx3D, segments_BxT, seeds_BxH
    return cast(jax.Array, sharding.by_device(lambda *rows: fused.attention(*rows, settings), *rows))


def _layer_norm(config: ModelConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(LAYER_NORM_EPSILON, use_bias=config.use_bias, dtype=config.dtype, name=name)


class GPT2(nn.Module):
    """The language model. One ``__call__`` serves training (``cache=None``) and decoding.

    Args of ``__call__``:
      tokens_BxT: integers in 0..V-1.
      positions_BxT: absolute positions, each row its own; default 0..T-1, with a cache from its length on.
      segments_BxT: attention stays inside equal segments (documents, or padding against text); default all 0.
      cache: what the T new positions are appended to; ``cache.length + T`` must not exceed its slots.
      deterministic: False applies dropout and needs a "dropout" rng.
      num_outputs: how many of each row's last positions are wanted, at most T; default all. Of the others the last
        layer then computes keys and values alone, unless layers are scanned.

    Returns: ``Output``.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, tokens_BxT, positions_BxT=None, segments_BxT=None, cache=None, deterministic=True, num_outputs=None
    ):
        config = self.config
        batch, num_positions = tokens_BxT.shape
        if num_outputs is None:
            num_outputs = num_positions
        if positions_BxT is None:
            start_B = jnp.zeros(batch, jnp.int32) if cache is None else _starts(cache, batch)
            positions_BxT = start_B[:, None] + jnp.arange(num_positions)[None]
        if segments_BxT is None:
            segments_BxT = jnp.zeros(tokens_BxT.shape, jnp.int32)

        def embed(rows, name):
            init = nn.initializers.normal(EMBEDDING_STDDEV)
            return nn.Embed(rows, config.width, dtype=config.dtype, embedding_init=init, name=name)

        wte = embed(config.vocab_size, "wte")
        x_BxTxD = wte(tokens_BxT) + embed(config.block_size, "wpe")(positions_BxT)
        x_BTxD = x_BxTxD.reshape(batch * num_positions, config.width)
        x_BTxD = nn.Dropout(config.dropout)(x_BTxD, deterministic=deterministic)

        mask_BxTxS = None
        if cache is not None:
            slots = jnp.arange(cache.segments_BxS.shape[1])
            segments_BxS = append(cache.segments_BxS[:, None, :, None], segments_BxT[:, None, :, None], cache.length)
            segments_BxS = segments_BxS[:, 0, :, 0]
            causal_BxTxS = (
                slots[None, None] <= (_starts(cache, batch)[:, None] + jnp.arange(num_positions)[None])[..., None]
            )
            mask_BxTxS = causal_BxTxS & (segments_BxT[:, :, None] == segments_BxS[:, None, :])
        layers = self._scanned if scans_layers(config) and not self.is_initializing() else self._unrolled
        x_BTxD, cache = layers(x_BTxD, segments_BxT, cache, mask_BxTxS, deterministic, num_outputs)
        if cache is not None:
            cache = cache._replace(segments_BxS=segments_BxS, length=cache.length + num_positions)

        hidden_BTxD = _layer_norm(config, "ln_f")(x_BTxD).astype(jnp.float32)
        logits_BTxV = jnp.dot(hidden_BTxD, wte.embedding.T, precision=config.precision)
        shape = (batch, num_outputs, -1)
        return Output(logits_BTxV.reshape(shape), hidden_BTxD.reshape(shape), cache)

    def _unrolled(self, x_BTxD, segments_BxT, cache, mask_BxTxS, deterministic, num_outputs):
        num_layers, num_positions = self.config.num_layers, segments_BxT.shape[1]
        block = nn.remat(Block, static_argnums=(5, 6)) if self.config.remat else Block
        keys, values = [], []
        for index in range(num_layers):
            layer_cache = None
            if cache is not None:
                layer_cache = LayerCache(cache.keys_BxHxSxK[index], cache.values_BxHxSxK[index], cache.length, None)
            wanted = num_outputs if index == num_layers - 1 else num_positions
            x_BTxD, layer_cache = block(self.config, name=f"h_{index}")(
                x_BTxD, segments_BxT, layer_cache, mask_BxTxS, deterministic, wanted
            )
            if layer_cache is not None:
                keys.append(layer_cache.keys)
                values.append(layer_cache.values)
        return x_BTxD, cache if cache is None else cache._replace(keys_BxHxSxK=(*keys,), values_BxHxSxK=(*values,))

    def _scanned(self, x_BTxD, segments_BxT, cache, mask_BxTxS, deterministic, num_outputs):
        """A loop over the layers, whose parameters are stacked for it; all positions go through the last one too."""
        config, (batch, num_positions) = self.config, segments_BxT.shape
        stacked = with_stacked_layers(config, {"params": self.variables["params"]})["params"][STACKED]
        drops = not deterministic and config.dropout > 0
        keys = jax.random.split(self.make_rng("dropout"), config.num_layers) if drops else None
        block = Block(config, parent=None)
        start = None
        if cache is not None:
            keys_and_values = cache.keys_BxHxSxK[0], cache.values_BxHxSxK[0]
            start = LayerCache(*keys_and_values, length=cache.length, layer=jnp.zeros((), jnp.int32))

        def through(carry, of_layer):
            x_BTxD, before = carry
            params, index, key = of_layer
            layer_cache = None if before is None else before._replace(layer=index)
            rest = segments_BxT, layer_cache, mask_BxTxS, deterministic, num_positions
            rngs = {} if key is None else {"dropout": key}
            return block.apply({"params": params}, x_BTxD, *rest, rngs=rngs), None

        through = jax.checkpoint(through, prevent_cse=False) if config.remat else through
        xs = stacked, jnp.arange(config.num_layers), keys
        (x_BTxD, end), _ = jax.lax.scan(through, (x_BTxD, start), xs)
        x_BxTxD = x_BTxD.reshape(batch, num_positions, -1)[:, num_positions - num_outputs :]
        if end is not None:
            cache = cache._replace(keys_BxHxSxK=(end.keys,), values_BxHxSxK=(end.values,))
        return x_BxTxD.reshape(batch * num_outputs, -1), cache


def with_stacked_layers(config: ModelConfig, params: Any) -> Any:
    """``params`` for a loop that calls ``forward``, which would stack its layers at every turn where they are scanned.

    XLA for GPUs leaves that inside of the loop. Where layers are not scanned, or are stacked, they are as they were.
    """
    tree = params["params"]
    if not scans_layers(config) or STACKED in tree:
        return params
    names = [f"h_{index}" for index in range(config.num_layers)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tree[name] for name in names))
    return {"params": {name: leaf for name, leaf in tree.items() if name not in names} | {STACKED: stacked}}


def forward(config: ModelConfig, params: Any, tokens_BxT: jax.Array, *inputs: Any, **options: Any) -> Output:
    """``GPT2(config)`` applied; arguments as its ``__call__``."""
    return cast(Output, GPT2(config).apply(params, tokens_BxT, *inputs, **options))


def param_shapes(config: ModelConfig) -> Any:
    """Shapes and types of the parameters, as ``jax.eval_shape`` gives them: no array is made."""
    return jax.eval_shape(lambda: GPT2(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))


def num_parameters(params: Any) -> int:
    """How many numbers a tree of parameters, or of their shapes, has."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
