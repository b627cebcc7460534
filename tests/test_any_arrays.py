"""Losses and certainty on anyone's arrays: drawn vocabularies, layouts, masks, types, and JAX's transformations."""

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ckl_jax import ratio_losses, token_weights
from ckl_jax.certainty import certainty
from ckl_jax.errors import ConfigError
from ckl_jax.losses import entropy, exact_kl, kl_estimate, masked_mean, prioritized_kl, token_log_probs

SETTINGS = hypothesis.settings(deadline=None, max_examples=20, derandomize=True)
SHAPES = (((3,), 2), ((2, 3), 5), ((2, 1, 2), 41))
TYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


@st.composite
def batches(draw, shapes=SHAPES):
    """Policy's and reference's logits [..., V], tokens [...] and mask [...] of one layout and vocabulary."""
    layout, vocabulary = draw(st.sampled_from(shapes))
    numbers = st.floats(-20, 20, width=32)
    logits, reference = (draw(arrays.arrays(np.float32, (*layout, vocabulary), elements=numbers)) for _ in range(2))
    tokens = draw(arrays.arrays(np.int32, layout, elements=st.integers(0, vocabulary - 1)))
    return logits, reference, tokens, draw(arrays.arrays(bool, layout))


def sampled_penalty(logits, reference, tokens, mask):
    log_probs, ref_log_probs = (token_log_probs(x, tokens, mask=mask) for x in (logits, reference))
    kl = kl_estimate(log_probs, ref_log_probs, mask=mask)
    return prioritized_kl(kl, certainty(reference), 3.0, mask)


def exact_penalty(logits, reference, tokens, mask):
    return prioritized_kl(exact_kl(logits, reference, mask=mask), certainty(reference), 3.0, mask)


def entropy_bonus(logits, reference, tokens, mask):
    return masked_mean(entropy(logits, mask=mask), mask)


LOSSES = (sampled_penalty, exact_penalty, entropy_bonus)
by_loss = pytest.mark.parametrize("loss", LOSSES)
GRADIENT = {loss: jax.grad(loss) for loss in LOSSES}
JITTED = {loss: jax.jit(jax.value_and_grad(loss)) for loss in LOSSES}
MAPPED = {loss: jax.jit(jax.vmap(jax.value_and_grad(loss))) for loss in LOSSES}


def close(x, y):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def naive(logits):
    """Log-probabilities in float64."""
    logits = np.asarray(logits, np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


@SETTINGS
@hypothesis.given(batches())
def test_the_penalty_is_that_of_its_formula_token_by_token(batch):
    logits, reference, tokens, mask = batch
    total, vocabulary = 0.0, logits.shape[-1]
    for index in zip(*np.nonzero(mask), strict=True):
        p, q = naive(logits[index]), naive(reference[index])
        sure = 1 + (np.exp(q) * q).sum() / np.log(vocabulary)
        total += np.clip(sure, 0, 1) ** 3 * (p[tokens[index]] - q[tokens[index]]) ** 2 / 2
    np.testing.assert_allclose(sampled_penalty(*batch), total / max(mask.sum(), 1), rtol=1e-3, atol=1e-4)


@SETTINGS
@hypothesis.given(batches())
def test_certainty_is_between_0_and_1_and_does_not_see_the_order_of_tokens_or_a_shift(batch):
    logits, *_ = batch
    found = certainty(logits)
    assert found.shape == logits.shape[:-1]
    assert found.dtype == jnp.float32
    assert ((found >= 0) & (found <= 1)).all()
    close(certainty(logits[..., ::-1]), found)
    close(certainty(logits + 3.0), found)


@by_loss
@SETTINGS
@hypothesis.given(batches(), st.sampled_from(TYPES))
def test_low_precision_logits_give_what_the_same_numbers_give_in_float32(loss, batch, kind):
    rounded = [jnp.asarray(x).astype(kind) for x in batch[:2]]
    value, gradient = JITTED[loss](*rounded, *batch[2:])
    assert value.dtype == jnp.float32
    expected = JITTED[loss](*(x.astype(jnp.float32) for x in rounded), *batch[2:])[0]
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-12)
    assert gradient.dtype == kind
    assert np.isfinite(np.asarray(gradient, np.float32)).all()


@by_loss
@SETTINGS
@hypothesis.given(batches())
def test_jit_changes_nothing(loss, batch):
    value, gradient = JITTED[loss](*batch)
    close(value, loss(*batch))
    close(gradient, GRADIENT[loss](*batch))


@by_loss
@SETTINGS
@hypothesis.given(batches(SHAPES[1:]))
def test_vmap_is_a_loop_over_rows(loss, batch):
    values, gradients = MAPPED[loss](*batch)
    for row, value, gradient in zip(zip(*batch, strict=True), values, gradients, strict=True):
        expected_value, expected_gradient = JITTED[loss](*row)
        close(value, expected_value)
        close(gradient, expected_gradient)


@by_loss
@SETTINGS
@hypothesis.given(batches(), st.sampled_from([np.inf, -np.inf, np.nan]))
def test_what_is_not_finite_outside_the_mask_reaches_neither_value_nor_gradient(loss, batch, garbage):
    logits, reference, tokens, mask = batch
    spoiled = [np.where(mask[..., None], x, np.float32(garbage)) for x in (logits, reference)]
    padded = np.where(mask, tokens, -100)
    value, gradient = JITTED[loss](*spoiled, padded, mask)
    expected_value, expected_gradient = JITTED[loss](*batch)
    close(value, expected_value)
    close(gradient, expected_gradient)
    assert not np.asarray(gradient)[~mask].any()


@by_loss
@SETTINGS
@hypothesis.given(batches(), st.data())
def test_the_layout_of_the_tokens_does_not_matter(loss, batch, data):
    count, vocabulary = batch[3].size, batch[0].shape[-1]
    order = np.array(data.draw(st.permutations(range(count))))
    flat = [x.reshape(count, vocabulary)[order] for x in batch[:2]] + [x.reshape(count)[order] for x in batch[2:]]
    close(JITTED[loss](*flat)[0], JITTED[loss](*batch)[0])


def test_checks_of_known_numbers_are_made_inside_jit_too():
    """There even a known array becomes an unknown one as soon as JAX computes with it."""
    x_1x2, mask_1x2 = jnp.ones((1, 2)), jnp.ones((1, 2), bool)
    tokens = token_weights.Tokens(x_1x2, x_1x2, mask_1x2, mask_1x2, mask_1x2)
    settings = token_weights.Settings(1.0, 0.5, 0.5, jax.random.key(0))

    def clip(number):
        return ratio_losses.clipped_policy_loss(x_1x2, x_1x2, x_1x2, mask_1x2, number)

    known, unknown, above, below = jnp.int32(1), jnp.int32(99), jnp.float32(0.2), jnp.float32(-0.2)
    assert jax.jit(lambda: token_weights.weigh(known, tokens, settings))().tolist() == [[1, 1]]
    assert jax.jit(lambda: clip(above))() == -1
    with pytest.raises(ConfigError, match=r"^index: got"):
        jax.jit(lambda: token_weights.weigh(unknown, tokens, settings))()
    with pytest.raises(ConfigError, match=r"^clip: got"):
        jax.jit(lambda: clip(below))()
