"""Fused attention, emulated, against the definition in float32: values, gradients, dropout, and what it refuses."""

import dataclasses
import re
import subprocess
import sys
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ckl_jax.attention import fused, plain
from ckl_jax.attention.kernel import Settings, keeps
from ckl_jax.config import ModelConfig
from ckl_jax.errors import ConfigError
from ckl_jax.model import GPT2, forward, fuses_attention
from ckl_jax.runtime import sharding, targets

HIGHEST = jax.lax.Precision.HIGHEST
SHAPES = [  # Batch, positions, heads, width of a head.
    (2, 256, 2, 64),
    (1, 200, 4, 64),
    (2, 512, 1, 128),
    (1, 130, 8, 32),
    (1, 384, 1, 256),
]


def drawn(batch, num_positions, num_heads, head_width, dtype=jnp.float32):
    rng = np.random.default_rng(num_positions)
    width = num_heads * head_width
    qkv = jnp.asarray(rng.normal(size=(batch, num_positions, 3 * width)), dtype)
    segments = jnp.asarray(np.sort(rng.integers(0, 4, (batch, num_positions)), axis=1), jnp.int32)
    seeds = jnp.asarray(rng.integers(-(2**31), 2**31, (batch, num_heads)), jnp.int32)
    d_out = jnp.asarray(rng.normal(size=(batch, num_positions, width)), dtype)
    return qkv, segments, seeds, d_out


def expected(qkv, segments, seeds, num_heads, rate):
    """The definition, with dropout's choice from ``keeps``."""
    batch, num_positions, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = qkv.reshape(batch, num_positions, 3, num_heads, -1).transpose(2, 0, 3, 1, 4)
    scores = jnp.einsum("bhtk,bhsk->bhts", q, k, precision=HIGHEST) * (width // num_heads) ** -0.5
    at = jnp.arange(num_positions)
    allowed = (at[:, None] >= at[None])[None] & (segments[:, :, None] == segments[:, None, :])
    weights = jax.nn.softmax(jnp.where(allowed[:, None], scores, -jnp.inf))
    kept = jax.vmap(jax.vmap(lambda seed: keeps(seed, at[:, None], at[None], rate)))(seeds)
    weights = jnp.where(kept, weights / (1 - rate), 0.0)
    out = jnp.einsum("bhts,bhsk->bhtk", weights, v, precision=HIGHEST)
    return out.transpose(0, 2, 1, 3).reshape(batch, num_positions, width)


def with_gradient(function, qkv, d_out):
    out, pull = jax.vjp(function, qkv)
    return out, pull(d_out)[0]


@pytest.mark.parametrize("device", fused.KERNELS)
@pytest.mark.parametrize(("shape", "rate"), [(SHAPES[0], 0.0), *((shape, 0.3) for shape in SHAPES)])
def test_values_and_gradients_are_those_of_the_definition(shape, rate, device):
    qkv, segments, seeds, d_out = drawn(*shape)
    settings = Settings(shape[2], rate, HIGHEST, device, interpret=True)
    found = with_gradient(lambda x: fused.attention(x, segments, seeds, settings), qkv, d_out)
    chex.assert_trees_all_close(
        found, with_gradient(lambda x: expected(x, segments, seeds, shape[2], rate), qkv, d_out), atol=1e-5
    )


@pytest.mark.parametrize("device", fused.KERNELS)
def test_in_bfloat16_only_rounding_differs(device):
    shape = SHAPES[0]
    qkv, segments, seeds, d_out = drawn(*shape, dtype=jnp.bfloat16)
    settings = Settings(shape[2], 0.1, jax.lax.Precision.DEFAULT, device, interpret=True)
    found = with_gradient(lambda x: fused.attention(x, segments, seeds, settings), qkv, d_out)
    assert all(x.dtype == jnp.bfloat16 for x in found)
    exact = with_gradient(
        lambda x: expected(x, segments, seeds, shape[2], 0.1), *(x.astype(jnp.float32) for x in (qkv, d_out))
    )
    for mine, theirs in zip(found, exact, strict=True):
        assert jnp.linalg.norm(mine.astype(jnp.float32) - theirs) < 0.01 * jnp.linalg.norm(theirs)


@pytest.mark.parametrize("cached", [False, True])
def test_plain_attention_in_bfloat16_is_as_exact_as_a_kernel(cached):
    """Its scores are float32: in bfloat16 those of about 9 would be off by up to 0.03, and weights by 3%."""
    shape = batch, num_positions, num_heads, _ = SHAPES[0]
    qkv, segments, seeds, _ = drawn(*shape)
    spread = jnp.repeat(jnp.array([[[3.0, 3.0, 1.0]]]), qkv.shape[2] // 3, axis=2)
    qkv, segments = (qkv * spread).astype(jnp.bfloat16), jnp.zeros_like(segments)
    exact = expected(qkv.astype(jnp.float32), segments, seeds, num_heads, 0.0)

    def error(out):
        assert out.dtype == jnp.bfloat16
        return jnp.sqrt(jnp.mean(jnp.square(out.astype(jnp.float32) - exact)))

    q, k, v = qkv.reshape(batch, num_positions, 3, num_heads, -1).transpose(2, 0, 3, 1, 4)
    q, config = q * q.shape[-1] ** -0.5, ModelConfig(dtype="bfloat16", precision="default")
    if cached:
        mask = jnp.broadcast_to(jnp.tri(num_positions, dtype=bool), (batch, num_positions, num_positions))
        out = plain.cached(q, k, v, mask, lambda x: x, config)
    else:
        out = plain.causal(q, k, v, segments, lambda x: x, config)
    settings = Settings(num_heads, 0.0, jax.lax.Precision.DEFAULT, interpret=True)
    of_kernel = error(fused.attention(qkv, segments, seeds, settings))
    assert error(out.transpose(0, 2, 1, 3).reshape(exact.shape)) < 1.2 * of_kernel


@pytest.mark.parametrize("device", fused.KERNELS)
def test_runs_that_are_mapped_are_those_alone(device):
    shape = SHAPES[1]
    qkv, segments, seeds, d_out = (jnp.stack([x, x[:, ::-1]]) for x in drawn(*shape))
    segments = jnp.sort(segments, axis=-1)
    settings = Settings(shape[2], 0.3, HIGHEST, device, interpret=True)

    def both(qkv, segments, seeds, d_out):
        return with_gradient(lambda x: fused.attention(x, segments, seeds, settings), qkv, d_out)

    mapped = jax.vmap(both)(qkv, segments, seeds, d_out)
    for run in range(2):
        alone = both(qkv[run], segments[run], seeds[run], d_out[run])
        chex.assert_trees_all_close(jax.tree.map(lambda x, run=run: x[run], mapped), alone, atol=1e-6)


def test_what_is_kept_is_a_share_independent_of_neighbours_and_of_other_seeds():
    at = jnp.arange(1024)
    first, second = (np.asarray(keeps(jnp.int32(seed), at[:, None], at[None], 0.2)) for seed in (7, 8))
    error = (0.2 * 0.8) ** 0.5
    assert abs(first.mean() - 0.8) < 5 * error / 1024
    for axis in (0, 1):  # Means of rows and of columns scatter as those of independent draws do.
        assert first.mean(axis=axis).std() == pytest.approx(error / 1024**0.5, rel=0.1)
    for other in (second, np.roll(first, 1, axis=0), np.roll(first, 1, axis=1), first.T):
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 5 / 1024


CONFIG = ModelConfig(num_layers=1, num_heads=2, width=128, block_size=64, layers="scanned")


@pytest.mark.parametrize("layers", ["scanned", "unrolled"])
def test_the_model_computes_the_same_with_either_attention(layers):
    by_xla = dataclasses.replace(CONFIG, attention="plain", layers=layers)
    params = GPT2(by_xla).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    tokens = jax.random.randint(jax.random.key(1), (2, 40), 0, by_xla.vocab_size)
    segments = jnp.arange(40)[None] // jnp.array([[16], [40]])

    def loss(params, config):
        out = forward(config, params, tokens, segments_BxT=segments, num_outputs=30)
        return jnp.square(out.logits_BxTxV).mean(), out.logits_BxTxV

    one, other = (
        jax.value_and_grad(loss, has_aux=True)(params, config)
        for config in (by_xla, dataclasses.replace(by_xla, attention="fused"))
    )
    chex.assert_trees_all_close(one, other, rtol=1e-4, atol=1e-5)


def test_dropout_follows_the_key_and_leaves_the_mean():
    config = dataclasses.replace(CONFIG, attention="fused", dropout=0.5)
    params = GPT2(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    tokens = jnp.zeros((1, 8), jnp.int32)

    def logits(key):
        return forward(config, params, tokens, deterministic=False, rngs={"dropout": key}).logits_BxTxV

    keys = jax.random.split(jax.random.key(3), 2)
    chex.assert_trees_all_equal(logits(keys[0]), logits(keys[0]))
    assert jnp.abs(logits(keys[0]) - logits(keys[1])).max() > 1e-3


@pytest.mark.parametrize("batch", [8, 3])
def test_devices_compute_the_same(batch):
    """Each its own rows and without a word between them, or where these are not shared evenly all."""
    qkv, segments, seeds, d_out = drawn(batch, 128, 2, 64)
    settings = Settings(2, 0.3, HIGHEST, interpret=True)

    @jax.jit
    def both(qkv, segments, seeds, d_out):
        rows = qkv, segments, seeds, d_out
        rows = sharding.share_rows(rows) if batch == 8 else rows

        def shared(qkv):
            return sharding.by_device(lambda *x: fused.attention(*x, settings), qkv, *rows[1:3])

        return with_gradient(shared, rows[0], rows[3])

    alone = both(qkv, segments, seeds, d_out)
    with jax.set_mesh(sharding.make_mesh(1, 8)):
        together = both.lower(qkv, segments, seeds, d_out).compile()
        chex.assert_trees_all_close(together(qkv, segments, seeds, d_out), alone, atol=1e-6)
    assert batch == 3 or not re.findall(r"replica_groups=\{\{\d+,", together.as_text())


@pytest.mark.parametrize("device", fused.KERNELS)
def test_a_tpu_or_gpu_fuses_what_fits_and_a_cpu_nothing(monkeypatch, device):
    low = dataclasses.replace(CONFIG, dtype="bfloat16", precision="default")
    assert not fuses_attention(low)
    monkeypatch.setattr(targets, "devices", lambda: [types.SimpleNamespace(platform=device, compute_capability="9.0")])
    assert fuses_attention(low)
    assert fuses_attention(CONFIG)
    assert not fuses_attention(dataclasses.replace(low, attention="plain"))
    wide = ({"num_heads": 2, "width": 512}, {"num_heads": 1, "width": 384}, {"num_heads": 1, "width": 768})
    for odd in ({"width": 96}, {"num_heads": 8}, {"block_size": 1025}, {"precision": "high"}, *wide):
        assert not fuses_attention(dataclasses.replace(low, **odd))


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [(["8.0"], True), (["10.0", "12.0"], True), (["7.5"], False), (["9.0", "7.0"], False), (["gfx942"], False)],
)
def test_a_gpu_older_than_ampere_or_of_amd_has_plain_attention(monkeypatch, capabilities, expected):
    devices = [types.SimpleNamespace(platform="gpu", compute_capability=word) for word in capabilities]
    monkeypatch.setattr(targets, "devices", lambda: devices)
    assert fuses_attention(dataclasses.replace(CONFIG, dtype="bfloat16", precision="default")) == expected


def test_attention_on_a_gpu_is_plain_where_jax_has_no_triton():
    script = "import sys; sys.modules['jax.experimental.pallas.triton'] = None\n"
    script += "from ckl_jax.attention import fused; print(*fused.KERNELS)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["tpu"]


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("attention", {"width": 96}),
        ("attention", {"num_heads": 8}),
        ("attention", {"num_heads": 1, "width": 192}),
        ("attention", {"block_size": 1025}),
        ("attention", {"precision": "high"}),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_by_name(field, changes):
    with pytest.raises(ConfigError, match=rf"^{field}: got"):
        dataclasses.replace(CONFIG, attention="fused", **changes)
