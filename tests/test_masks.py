"""What stands outside the mask changes no loss, advantage or gradient; low precision is computed in float32."""

import functools

import chex
import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ckl_jax import losses, ratio_losses, truncation
from ckl_jax.advantages import future_kl, gae, kl_to_go, standardized
from ckl_jax.certainty import certainty

INF, NAN = float("inf"), float("nan")
TOKENS_3x4 = jnp.array([[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 0, 1]])
WITH_MASK = {
    "k1": lambda x, y, m: losses.kl_estimate(x[..., 0], y[..., 0], "k1", m),
    "k2": lambda x, y, m: losses.kl_estimate(x[..., 0], y[..., 0], "k2", m),
    "k3": lambda x, y, m: losses.kl_estimate(x[..., 0], y[..., 0], "k3", m),
    "exact": lambda x, y, m: losses.exact_kl(x, y, 2.0, m),
    "entropy": lambda x, y, m: losses.entropy(x, 2.0, m),
    "entropy of the top": lambda x, y, m: truncation.entropy_within(x, truncation.top_tokens(x, 2), 2.0, m),
    "entropy of the nucleus": lambda x, y, m: truncation.entropy_within(x, truncation.nucleus(x, 0.9), 2.0, m),
    "log-probs": lambda x, y, m: losses.token_log_probs(x, TOKENS_3x4, 2.0, m),
    "k2 of logits": lambda x, y, m: losses.kl_estimate(
        losses.token_log_probs(x, TOKENS_3x4, 2.0, m), losses.token_log_probs(y, TOKENS_3x4, 2.0, m), "k2", m
    ),
}
OF_PER_TOKEN_VALUES = {
    "prioritized": lambda x, y, z, m: losses.prioritized_kl(x, y, 2.0, m),
    "weighted": lambda x, y, z, m: losses.weighted_kl(x, y, m),
    "policy gradient": lambda x, y, z, m: losses.policy_gradient_loss(x, y, m),
    "value": lambda x, y, z, m: losses.value_loss(x, y, m),
    "clipped": lambda x, y, z, m: ratio_losses.clipped_policy_loss(x.clip(-1, 1), y.clip(-1, 1), z, m, 0.2),
    "Lp-Reg": lambda x, y, z, m: truncation.lp_reg(x.clip(-1, 1), y.clip(-1, 1), z > 0, m),
    "KL-Cov": lambda x, y, z, m: ratio_losses.kl_cov(x, y, z > 0, m),
    "off-policy k1": lambda x, y, z, m: ratio_losses.off_policy_kl(z, "k1", x.clip(-1, 1), y.clip(-1, 1), m).sum(),
    "importance": lambda x, y, z, m: losses.policy_gradient_loss(
        z, ratio_losses.truncated_importance(x.clip(-1, 1), y.clip(-1, 1), m, 2.0), m
    ),
    "gae": lambda x, y, z, m: (gae(x, y, jnp.cumprod(m, axis=1), 0.9, 0.8) * z.clip(-1, 1)).sum(),
    "KL to go": lambda x, y, z, m: (kl_to_go(x, m) * z.clip(-1, 1)).sum(),
    "future KL": lambda x, y, z, m: (future_kl(x, y, m) * z.clip(-1, 1)).sum(),
    "standardized": lambda x, y, z, m: (standardized(x, m) * z.clip(-1, 1)).sum(),
}


@functools.partial(jax.jit, static_argnums=0)
def _of_logits(name, logits, ref_logits, mask):
    """Per-token values, their prioritized mean and its gradient."""

    def total(logits):
        values = WITH_MASK[name](logits, ref_logits, mask)
        sure = certainty(ref_logits)
        return losses.prioritized_kl(values, sure, 1.0, mask) + losses.masked_mean(values, mask), values

    return jax.value_and_grad(total, has_aux=True)(logits)


@functools.partial(jax.jit, static_argnums=0)
def _of_values(name, first, second, third, mask):
    return jax.value_and_grad(OF_PER_TOKEN_VALUES[name])(first, second, third, mask)


def finite(*shape):
    return arrays.arrays(np.float32, shape, elements=st.floats(-20, 20, width=32))


GARBAGE_3x4 = arrays.arrays(np.float32, (3, 4), elements=st.sampled_from([INF, -INF, NAN, 3e38, 0.0]))
MASK_3x4 = arrays.arrays(np.bool_, (3, 4))
PROPERTY = hypothesis.settings(deadline=None, max_examples=25)


@pytest.mark.parametrize("name", WITH_MASK)
@PROPERTY
@hypothesis.given(st.tuples(finite(3, 4, 5), finite(3, 4, 5)), GARBAGE_3x4, MASK_3x4)
def test_logits_outside_the_mask_change_no_value_and_no_gradient(name, logits, garbage, mask):
    """Infinite ones and NaN included; without the functions' mask the gradient would be NaN."""
    clean = [np.where(mask[..., None], x, 0) for x in logits]
    dirty = [np.where(mask[..., None], x, garbage[..., None]) for x in logits]
    (_, values), gradient = found = _of_logits(name, *dirty, mask)
    chex.assert_tree_all_finite(found)
    chex.assert_trees_all_equal(found, _of_logits(name, *clean, mask))
    assert (values[~mask] == 0).all()
    assert (gradient[~mask] == 0).all()
    chex.assert_trees_all_close(values[mask], WITH_MASK[name](*logits, None)[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OF_PER_TOKEN_VALUES)
@PROPERTY
@hypothesis.given(st.tuples(finite(3, 4), finite(3, 4), finite(3, 4)), GARBAGE_3x4, MASK_3x4)
def test_values_outside_the_mask_change_no_loss_and_no_gradient(name, values, garbage, mask):
    mask = np.cumprod(mask, axis=1).astype(bool) if name == "gae" else mask
    first, second, third = values
    second = np.abs(second) / 20
    clean = _of_values(name, np.where(mask, first, 0), np.where(mask, second, 0), third, mask)
    found = _of_values(name, np.where(mask, first, garbage), np.where(mask, second, garbage), third, mask)
    chex.assert_tree_all_finite(found)
    chex.assert_trees_all_equal(found, clean)


@pytest.mark.parametrize("garbage", [INF, -INF, NAN])
def test_what_stands_outside_the_mask_has_no_influence_on_value_or_gradient(garbage):
    mask = jnp.array([True, True, False])
    first, second = jnp.array([0.5, 0.25, garbage]), jnp.array([3.0, -1.0, garbage])
    hand_computed = [
        (lambda x: losses.masked_mean(x, mask), 0.375, [0.5, 0.5, 0.0]),
        (lambda x: losses.prioritized_kl(x, second, 2.0, mask), 2.375, [4.5, 0.5, 0.0]),
        (lambda x: losses.policy_gradient_loss(x, second, mask), -0.625, [-1.5, 0.5, 0.0]),
        (lambda x: losses.value_loss(x, second, mask), 3.90625, [-2.5, 1.25, 0.0]),
    ]
    for loss, value, gradient in hand_computed:
        chex.assert_trees_all_close(jax.value_and_grad(loss)(first), (value, jnp.array(gradient)))


def test_an_infinite_logit_outside_the_mask_spoils_the_gradient_if_the_mask_comes_too_late():
    logits, mask = jnp.array([[1.0, 2.0], [INF, 0.0]]), jnp.array([True, False])
    late = jax.grad(lambda x: losses.masked_mean(losses.entropy(x), mask))(logits)
    in_time = jax.grad(lambda x: losses.masked_mean(losses.entropy(x, mask=mask), mask))(logits)
    assert jnp.isnan(late[1]).any()
    np.testing.assert_allclose(in_time, [[0.196612, -0.196612], [0.0, 0.0]], atol=1e-6)


def test_padding_of_minus_100_is_no_token():
    logits, mask = jnp.log(jnp.array([[1.0, 3.0], [1.0, 1.0]])), jnp.array([True, False])
    found = losses.token_log_probs(logits, jnp.array([0, -100]), mask=mask)
    np.testing.assert_allclose(found, [-1.386294, 0.0], atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_inputs_are_computed_in_float32(dtype):
    x, y = jnp.array([[1.0078125, -2.0, 0.5]], dtype), jnp.array([[0.33203125, 0.75, 3.0]], dtype)
    z, mask = jnp.array([[0.5, -1.5, 2.0]], dtype), jnp.array([[True, True, False]])
    for name, loss in OF_PER_TOKEN_VALUES.items():
        if name != "gae":
            found = loss(x, y, z, mask)
            chex.assert_type(found, jnp.float32)
            chex.assert_trees_all_equal(found, loss(*(value.astype(jnp.float32) for value in (x, y, z)), mask))
