"""Next-character prediction: the parameters, the loss of a batch of windows, and a step of the optimizer.

`ckl_jax.pretrain` takes steps until a model is trained.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ckl_jax.config import PretrainConfig
from ckl_jax.datasets.stream import TokenStream, Windows, sample_documents, sample_stream
from ckl_jax.losses import masked_mean
from ckl_jax.model import EMBEDDING_STDDEV, GPT2, forward
from ckl_jax.runtime import sharding
from ckl_jax.runtime.targets import Call
from ckl_jax.tasks.catalog import task_named


class PretrainState(NamedTuple):
    """Everything that a run needs to go on: the step, the parameters, the optimizer's state, and the average.

    ``average`` is the exponential moving average of the parameters, or None where none is kept.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    average: Any = None

    @property
    def tested(self) -> Any:
        """The parameters that are tested and saved."""
        return self.params if self.average is None else self.average


def make_optimizer(config: PretrainConfig) -> optax.GradientTransformation:
    """AdamW or Muon under a linear warm-up and a cosine decay, after clipping the global norm."""
    peak, final = config.learning_rate, config.final_learning_rate * config.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, config.warmup_steps, config.num_steps, final)
    decays = functools.partial(jax.tree.map, lambda p: p.ndim >= 2)
    if config.optimizer == "adamw":
        update = optax.adamw(schedule, b2=config.adam_beta2, weight_decay=config.weight_decay, mask=decays)
    else:
        update = optax.contrib.muon(
            schedule,
            weight_decay=config.weight_decay,
            adam_b2=config.adam_beta2,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_muon_dimensions,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _muon_dimensions(params: Any) -> Any:
    """Muon for the layers' matrices; embeddings, biases and norms get AdamW."""

    def dimensions(path, leaf):
        in_layer = leaf.ndim == 2 and any(str(getattr(key, "key", "")).startswith("h_") for key in path)
        return optax.contrib.MuonDimensionNumbers() if in_layer else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


def init_params(config: PretrainConfig) -> Any:
    """Random parameters from the config's seed; the positions' embeddings as ``position_init`` says."""
    params = GPT2(config.model).init(jax.random.key(config.seed), jnp.zeros((1, 2), jnp.int32))
    if config.position_init == "normal":
        return params
    rows = sinusoids(config.model.block_size, config.model.width)
    return {"params": {**params["params"], "wpe": {"embedding": EMBEDDING_STDDEV * rows}}}


def sinusoids(positions: int, width: int) -> jax.Array:
    """Sines and cosines of wavelengths from 2 pi to 20,000 pi, of mean square 1 (Vaswani et al. 2017, section 3.5).

    Returns: float32 [positions, width], the sines first.
    """
    frequencies = 10_000.0 ** (-jnp.arange(0, width, 2) / width)
    angles = jnp.outer(jnp.arange(positions), frequencies)
    return 2**0.5 * jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)[:, :width]


def init_state(config: PretrainConfig) -> PretrainState:
    """The state before the first step; call it under jit."""
    params = init_params(config)
    average = jax.tree.map(jnp.copy, params) if config.ema_decay else None
    return PretrainState(jnp.zeros((), jnp.int32), params, make_optimizer(config).init(params), average)


def _averaged(config: PretrainConfig, state: PretrainState, params: Any) -> Any:
    """The moving average with the parameters of one more step; it forgets the first ones early."""
    if state.average is None:
        return None
    decay = jnp.minimum(config.ema_decay, (1 + state.step) / (10 + state.step))
    return optax.incremental_update(params, state.average, 1 - decay)


def next_token_loss(config: PretrainConfig, params: Any, windows: Windows, dropout_key: jax.Array) -> jax.Array:
    """Mean of -log p(next character) over the unmasked positions, in nats."""
    logits_BxTxV = forward(
        config.model,
        params,
        windows.inputs_BxT,
        windows.positions_BxT,
        windows.segments_BxT,
        deterministic=config.model.dropout == 0,
        rngs={"dropout": dropout_key},
    ).logits_BxTxV
    logits_BxTxV = jnp.where(windows.mask_BxT[..., None], logits_BxTxV, 0.0)
    losses_BxT = optax.softmax_cross_entropy_with_integer_labels(logits_BxTxV, windows.targets_BxT)
    return masked_mean(losses_BxT, windows.mask_BxT)


def batch_gradient(config: PretrainConfig, params: Any, windows: Windows, key: jax.Array) -> tuple[jax.Array, Any]:
    """Loss and gradient of a batch: of its microbatches, each with its share of the unmasked positions."""
    gradient = jax.value_and_grad(functools.partial(next_token_loss, config))
    if config.microbatches == 1:
        return gradient(params, sharding.share_rows(windows), key)

    def add(total, of_microbatch):
        windows, key = of_microbatch
        windows = sharding.share_rows(windows)
        share = windows.mask_BxT.sum() / valid
        return jax.tree.map(lambda x, y: x + share * y, total, gradient(params, windows, key)), None

    valid, parts = jnp.maximum(windows.mask_BxT.sum(), 1), config.microbatches
    dealt = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), windows)
    start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(add, start, (dealt, jax.random.split(key, parts)))[0]


def window_length(config: PretrainConfig) -> int:
    """Characters a window predicts: the block (`stream`) or the longest document (`documents`)."""
    if config.packing == "stream":
        return config.model.block_size
    return task_named(config.task).longest_episode(config.max_digits, extra=0)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_step(config: PretrainConfig, state: PretrainState, stream: TokenStream) -> tuple[PretrainState, dict]:
    """One update. The batch is a function of (seed, step) alone, so a resumed run sees the same ones."""
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    sample_key, dropout_key = jax.random.split(key)
    window = window_length(config)
    if config.packing == "stream":
        windows = sample_stream(stream, sample_key, config.batch_size, window)
    else:
        windows = sample_documents(
            stream, sample_key, config.batch_size, window, config.model.block_size, config.start_share
        )
    whole = sharding.gathered(state.params) if config.shard_state else state.params
    loss, grads = batch_gradient(config, whole, windows, dropout_key)
    if config.shard_state:
        grads = sharding.gathered(grads)
    updates, opt_state = make_optimizer(config).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = PretrainState(state.step + 1, params, opt_state, _averaged(config, state, params))
    if config.shard_state:
        state = sharding.split_state(state)
    return state, {"loss": loss, "grad_norm": optax.tree.norm(grads)}


def planned_state(config: PretrainConfig, mesh: Mesh) -> tuple[PretrainState, Call]:
    """The shapes of the state on the mesh, and what makes the first one there."""
    return sharding.planned_state(functools.partial(init_state, config), (), mesh, config.shard_state)


def make_mesh(config: PretrainConfig) -> Mesh:
    """Devices for a batch; raises ConfigError like ``sharding.make_mesh``."""
    return sharding.make_mesh(1, config.batch_size // config.microbatches, data_devices=config.data_devices)
