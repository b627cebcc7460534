"""Losses and certainty on anyone's arrays: drawn vocabularies, layouts, masks, types, and JAX's transformations."""

import inspect

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ckl_jax import advantage_shaping, advantages, ratio_losses, token_weights, truncation
from ckl_jax.advantages import gae
from ckl_jax.certainty import certainty
from ckl_jax.errors import ConfigError
from ckl_jax.losses import (
    adapted_coefficient,
    entropy,
    exact_kl,
    kl_estimate,
    masked_mean,
    prioritized_kl,
    token_log_probs,
)

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


LOGITS_2x3x5 = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.float32)
OF_2x3 = jnp.array([[0.2, 0.5, 0.9], [0.4, 0.7, 0.1]])
ALL_2x3 = jnp.ones((2, 3), bool)
TOKENS_2x3 = jnp.array([[0, 1, 2], [3, 4, 0]])


def weighed(word, beta=2.0, share=0.5, weak=0.1):
    tokens = token_weights.Tokens(OF_2x3, OF_2x3, ALL_2x3, ALL_2x3, ALL_2x3)
    settings = token_weights.Settings(beta, share, weak, jax.random.key(0))
    return token_weights.weigh(token_weights.index_of(word), tokens, settings)


OF_A_NUMBER = {
    "prioritized, beta": (2.0, lambda p: token_weights.prioritized(OF_2x3, p, ALL_2x3)),
    "threshold, share": (0.5, lambda p: token_weights.threshold(OF_2x3, ALL_2x3, p)),
    "archer, share": (0.5, lambda p: token_weights.archer(OF_2x3, ALL_2x3, p, 0.1)),
    "archer, weak": (0.1, lambda p: token_weights.archer(OF_2x3, ALL_2x3, 0.5, p)),
    "floored, weak": (0.1, lambda p: token_weights.floored(OF_2x3, 2.0, ALL_2x3, p)),
    "weigh, beta": (2.0, lambda p: weighed("prioritized", beta=p)),
    "weigh, share": (0.5, lambda p: weighed("archer", share=p)),
    "weigh, weak": (0.1, lambda p: weighed("floored", weak=p)),
    "clipped_policy_loss, clip": (
        0.2,
        lambda p: ratio_losses.clipped_policy_loss(OF_2x3, 0 * OF_2x3, OF_2x3, ALL_2x3, p),
    ),
    "clipped_policy_loss, clips": (
        0.2,
        lambda p: ratio_losses.clipped_policy_loss(OF_2x3, 0 * OF_2x3, OF_2x3, ALL_2x3, (p, p)),
    ),
    "open_gate, clip": (0.2, lambda p: ratio_losses.open_gate(OF_2x3, 0 * OF_2x3, OF_2x3, ALL_2x3, p)),
    "entropy_clip, clip": (0.2, lambda p: ratio_losses.entropy_clip(OF_2x3, p, 1.0)[0]),
    "entropy_clip, alpha": (0.5, lambda p: ratio_losses.entropy_clip(OF_2x3, 0.2, p)[1]),
    "redistributed, beta": (
        0.5,
        lambda p: ratio_losses.redistributed(OF_2x3, OF_2x3, OF_2x3, 0 * OF_2x3, ALL_2x3, 0.2, p),
    ),
    "truncated_importance, limit": (
        1.5,
        lambda p: ratio_losses.truncated_importance(OF_2x3, 0 * OF_2x3, ALL_2x3, p),
    ),
    "top_entropy, share": (0.5, lambda p: advantage_shaping.top_entropy(OF_2x3, OF_2x3, ALL_2x3, p)),
    "entropy_bonus, scale": (0.5, lambda p: advantage_shaping.entropy_bonus(OF_2x3, OF_2x3, ALL_2x3, p, 2.0)),
    "entropy_bonus, kappa": (2.0, lambda p: advantage_shaping.entropy_bonus(OF_2x3, OF_2x3, ALL_2x3, 0.4, p)),
    "gtpo, share": (0.5, lambda p: advantage_shaping.gtpo(jnp.array([1.0, 0.0]), OF_2x3, ALL_2x3, 2, p)),
    "signed_entropy, pivot": (0.5, lambda p: advantage_shaping.signed_entropy(OF_2x3, ALL_2x3, p)),
    "unlikely, share": (0.5, lambda p: advantage_shaping.unlikely(OF_2x3 - 0.3, OF_2x3, ALL_2x3, p)),
    "nucleus, share": (0.6, lambda p: truncation.nucleus(LOGITS_2x3x5, p)),
    "nucleus, temperature": (2.0, lambda p: truncation.nucleus(LOGITS_2x3x5, 0.6, p)),
    "entropy_within, temperature": (2.0, lambda p: truncation.entropy_within(LOGITS_2x3x5, LOGITS_2x3x5 > 0, p)),
    "proxy_log_probs, min_p": (0.1, lambda p: truncation.proxy_log_probs(LOGITS_2x3x5, TOKENS_2x3, p)),
    "proxy_log_probs, temperature": (2.0, lambda p: truncation.proxy_log_probs(LOGITS_2x3x5, TOKENS_2x3, 0.1, p)),
    "gae, discount": (0.9, lambda p: gae(OF_2x3, OF_2x3, ALL_2x3, p, 0.8)),
    "gae, lambda": (0.8, lambda p: gae(OF_2x3, OF_2x3, ALL_2x3, 0.9, p)),
    "certainty, temperature": (2.0, lambda p: certainty(LOGITS_2x3x5, temperature=p)),
    "entropy, temperature": (2.0, lambda p: entropy(LOGITS_2x3x5, p)),
    "exact_kl, temperature": (2.0, lambda p: exact_kl(LOGITS_2x3x5, -LOGITS_2x3x5, p)),
    "token_log_probs, temperature": (2.0, lambda p: token_log_probs(LOGITS_2x3x5, TOKENS_2x3, p)),
    "prioritized_kl, beta": (2.0, lambda p: prioritized_kl(OF_2x3, OF_2x3, p, ALL_2x3)),
    "adapted_coefficient, target": (0.1, lambda p: adapted_coefficient(jnp.float32(2), jnp.float32(0.11), p, 0.1)),
    "adapted_coefficient, gain": (0.5, lambda p: adapted_coefficient(jnp.float32(2), jnp.float32(0.11), 0.1, p)),
}


@pytest.mark.parametrize("name", OF_A_NUMBER)
def test_a_number_may_be_an_argument_of_jit(name):
    """Then its value is unknown while checks are made."""
    value, call = OF_A_NUMBER[name]
    np.testing.assert_allclose(jax.jit(call)(value), call(value), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OF_A_NUMBER)
@pytest.mark.parametrize("kind", [np.float64, np.float32, jnp.float64, jnp.float32])
def test_a_number_of_64_bits_makes_no_result_of_64_bits(name, kind):
    value, call = OF_A_NUMBER[name]
    expected = call(value)
    with jax.enable_x64(True):
        found = call(kind(value))
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_the_numbers_of_all_formulas_are_in_that_list():
    """A parameter that is annotated as a float, or as one number for each side."""
    modules = (token_weights, ratio_losses, advantage_shaping, truncation, advantages)
    own = [f for m in modules for f in vars(m).values() if inspect.isfunction(f) and f.__module__ == m.__name__]
    listed = {name.split(", ")[0] for name in OF_A_NUMBER}
    numbers = {f.__name__ for f in own for p in inspect.signature(f).parameters.values() if "float" in p.annotation}
    # These hand a number on to one that is there.
    handing_on = {"matched", "shuffled", "renormalized", "inverted", "critical_held", "overlong_held"}
    assert {n for n in numbers if not n.startswith("_")} - handing_on - {"top_share", "lowest_share"} <= listed


def test_a_clip_may_be_a_list_of_two_and_of_no_other_length():
    def loss(clip):
        return ratio_losses.clipped_policy_loss(OF_2x3, 0 * OF_2x3, OF_2x3, ALL_2x3, clip)

    assert loss([0.1, 0.3]) == loss((0.1, 0.3)) != loss(0.1)
    for clip in ([0.1], (0.1, 0.2, 0.3), [], "wide", [0.1, "wide"]):
        with pytest.raises(ConfigError, match=r"^clip: got"):
            loss(clip)


EMPTY = {
    "standardized": lambda x, m: advantages.standardized(x, m),
    "KL to go": lambda x, m: advantages.kl_to_go(x, m),
    "future KL": lambda x, m: advantages.future_kl(x, x, m),
    "gae": lambda x, m: gae(x, x, m, 1.0, 1.0),
    "leave one out": lambda x, m: advantages.leave_one_out(x.reshape(-1), 2),
    "in group": lambda x, m: advantages.standardized_in_group(x.reshape(-1), 2),
    "zero centered": lambda x, m: advantages.zero_centered(x.reshape(-1), x.reshape(-1), 2),
    "signed entropy": lambda x, m: advantage_shaping.signed_entropy(x, m, 0.5),
    "top entropy": lambda x, m: advantage_shaping.top_entropy(x, x, m, 0.5),
    "covariance": lambda x, m: advantage_shaping.covariance(x, x, m),
    "gtpo": lambda x, m: advantage_shaping.gtpo(jnp.ones(len(x)), x, m, 2, 0.5),
    "threshold": lambda x, m: token_weights.threshold(x, m, 0.5),
    "archer": lambda x, m: token_weights.archer(x, m, 0.5, 0.1),
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_a_round_without_tokens_is_refused_by_name(name, shape):
    with pytest.raises(ConfigError, match=r"^(mask|values|rewards): got \(.*, allowed is at least one episode and one"):
        EMPTY[name](jnp.ones(shape), jnp.ones(shape, bool))
