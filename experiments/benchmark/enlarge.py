"""A small trained model inside a large one: its characters at the large one's cost."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from ckl_jax.checkpoint.store import Model
from ckl_jax.config import ModelConfig
from ckl_jax.errors import require


def enlarge(model: Model, config: ModelConfig) -> Model:
    """A model of the shape of ``config`` with the logits of ``model``, up to rounding.

    The residual stream is ``model``'s, repeated: layer norms then see the same mean and variance. New heads, hidden
    units and layers are zero. Where no large model has been trained, this one writes scratchpads like a trained one.

    Raises:
      ConfigError: ``config`` is not a multiple of the model's width or smaller in anything else.
    """
    small = model.config
    config = dataclasses.replace(config, use_bias=small.use_bias, activation=small.activation, dropout=0.0)
    copies, remainder = divmod(config.width, small.width)
    require(copies >= 1 and not remainder, "width", config.width, f"a multiple of {small.width}")
    small_head, head = small.width // small.num_heads, config.width // config.num_heads
    require(head >= small_head, "width", config.width, f"{config.num_heads} heads of {small_head} or more")
    for name in ("num_layers", "num_heads", "block_size"):
        require(getattr(config, name) >= getattr(small, name), name, getattr(config, name), "the model's or more")

    def repeated(x):
        return np.tile(x, (*[1] * (x.ndim - 1), copies))

    def padded(x, shape):
        return np.pad(x, [(0, new - old) for old, new in zip(x.shape, shape, strict=True)])

    def spread(kernel):
        """A kernel that reads the mean of the copies."""
        return np.tile(kernel, (copies, *[1] * (kernel.ndim - 1))) / copies

    def norm(of):
        return {name: repeated(np.asarray(value)) for name, value in of.items()}

    def attention_in(of):
        new = {}
        for name, value in of.items():
            heads = np.asarray(value).reshape(*value.shape[:-1], 3, small.num_heads, small_head)
            heads = heads * np.array([(head / small_head) ** 0.5, 1, 1])[:, None, None]
            heads = spread(heads) if name == "kernel" else heads
            shape = (*heads.shape[:-3], 3, config.num_heads, head)
            new[name] = padded(heads, shape).reshape(*shape[:-3], 3 * config.width)
        return new

    def attention_out(of):
        kernel = np.asarray(of["kernel"]).reshape(small.num_heads, small_head, small.width)
        kernel = padded(repeated(kernel), (config.num_heads, head, config.width)).reshape(config.width, config.width)
        return {"kernel": kernel} | {name: repeated(np.asarray(of[name])) for name in of if name == "bias"}

    def hidden_in(of):
        kernel = padded(spread(np.asarray(of["kernel"])), (config.width, 4 * config.width))
        return {"kernel": kernel} | {n: padded(np.asarray(of[n]), (4 * config.width,)) for n in of if n == "bias"}

    def hidden_out(of):
        kernel = padded(repeated(np.asarray(of["kernel"])), (4 * config.width, config.width))
        return {"kernel": kernel} | {name: repeated(np.asarray(of[name])) for name in of if name == "bias"}

    parts = {
        "ln_1": norm,
        "c_attn": attention_in,
        "c_proj": attention_out,
        "ln_2": norm,
        "c_fc": hidden_in,
        "mlp_c_proj": hidden_out,
    }
    old = model.params["params"]
    positions = repeated(np.asarray(old["wpe"]["embedding"]))
    new: dict[str, Any] = {
        "wte": {"embedding": repeated(np.asarray(old["wte"]["embedding"]))},
        "wpe": {"embedding": padded(positions, (config.block_size, config.width))},
        "ln_f": {name: repeated(np.asarray(value)) / copies for name, value in old["ln_f"].items()},
    }
    for index in range(config.num_layers):
        source = old[f"h_{min(index, small.num_layers - 1)}"]
        layer = {name: part(source[name]) for name, part in parts.items()}
        if index >= small.num_layers:
            for name in ("c_proj", "mlp_c_proj"):
                layer[name] = {leaf: np.zeros_like(value) for leaf, value in layer[name].items()}
        new[f"h_{index}"] = layer
    params = _float32({"params": new})
    return Model(config, model.max_pretrain_digits, params)


def _float32(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _float32(value) for name, value in tree.items()}
    return jnp.asarray(tree, jnp.float32)
