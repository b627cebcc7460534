"""Likely tokens, entropies over them and Lp-Reg against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ckl_jax import losses, truncation
from ckl_jax.errors import ConfigError

P_2x4 = jnp.array([[0.5, 0.25, 0.125, 0.125], [0.1, 0.7, 0.15, 0.05]])


def test_the_likeliest_tokens_by_number_and_by_probability():
    logits = jnp.log(P_2x4)
    np.testing.assert_array_equal(truncation.top_tokens(logits, 2), [[1, 1, 0, 0], [0, 1, 1, 0]])
    np.testing.assert_array_equal(truncation.top_tokens(logits, 3), [[1, 1, 1, 1], [1, 1, 1, 0]])
    np.testing.assert_array_equal(truncation.nucleus(logits, 0.4), [[1, 0, 0, 0], [0, 1, 0, 0]])
    np.testing.assert_array_equal(truncation.nucleus(logits, 0.6), [[1, 1, 0, 0], [0, 1, 0, 0]])
    np.testing.assert_array_equal(truncation.nucleus(logits, 0.9), [[1, 1, 1, 1], [1, 1, 1, 0]])
    np.testing.assert_array_equal(truncation.nucleus(logits, 1.0), np.ones((2, 4)))
    # At temperature 2 the second distribution is 0.179, 0.474, 0.220 and 0.127.
    np.testing.assert_array_equal(truncation.nucleus(logits, 0.6, 2.0)[1], [0, 1, 1, 0])
    for call in (lambda: truncation.top_tokens(logits, 5), lambda: truncation.top_tokens(logits, 0)):
        with pytest.raises(ConfigError, match=r"^count: got"):
            call()
    for share in (0.0, 1.5):
        with pytest.raises(ConfigError, match=r"^share: got"):
            truncation.nucleus(logits, share)


def test_an_impossible_token_is_none_of_the_likeliest():
    logits = jnp.array([[0.0, -jnp.inf, 1.0, -jnp.inf], [3.0, 0.0, 1.0, 2.0]])
    np.testing.assert_array_equal(truncation.top_tokens(logits, 3), [[1, 0, 1, 0], [1, 0, 1, 1]])


@pytest.mark.parametrize("choose", [lambda x: truncation.top_tokens(x, 2), lambda x: truncation.nucleus(x, 0.9)])
def test_choosing_the_tokens_is_not_differentiated(choose):
    """A derivative would be gathered beside the sorted numbers, for nothing."""
    logits = jnp.log(P_2x4)
    assert "gather" not in str(jax.make_jaxpr(lambda x, t: jax.jvp(choose, (x,), (t,)))(logits, logits))


def test_the_entropy_within_a_set_is_scaled_to_the_range_of_all_and_moves_no_token_outside(debug_nans):
    """Of 2/3 and 1/3: 0.636514 nats, times log 4 / log 2; of 1/2, 1/4, 1/8 and 1/8 all of 1.213008; of one token 0."""
    logits = jnp.log(P_2x4)
    inside = jnp.array([[True, True, False, False], [False, True, False, False]])
    np.testing.assert_allclose(truncation.entropy_within(logits, inside), [2 * 0.636514, 0.0], atol=1e-5)
    found = truncation.entropy_within(logits, jnp.ones((2, 4), bool))
    np.testing.assert_allclose(found, losses.entropy(logits), rtol=1e-6)
    np.testing.assert_allclose(found[0], 1.213008, rtol=1e-6)
    gradient = jax.grad(lambda x: truncation.entropy_within(x, inside).sum())(logits)
    # -2 p (log p + H) of p = 2/3 and 1/3.
    np.testing.assert_allclose(gradient[0], [-0.308065, 0.308065, 0.0, 0.0], atol=1e-5)
    np.testing.assert_array_equal(gradient[1], np.zeros(4))
    uniform = truncation.entropy_within(jnp.zeros((1, 4)), inside[:1])
    np.testing.assert_allclose(uniform, np.log(4), rtol=1e-6)


def test_lp_reg_pulls_an_unlikely_token_to_its_probability_without_noise_and_leaves_noise_alone(debug_nans):
    """Of 0.6, 0.3, 0.09 and 0.01 the last is noise below 0.02 * 0.6. The others have 0.99 together."""
    logits = jnp.log(jnp.array([[0.6, 0.3, 0.09, 0.01]] * 4))
    tokens, mask = jnp.array([2, 3, 0, 2]), jnp.array([True, True, True, False])
    proxy = truncation.proxy_log_probs(logits, tokens, 0.02, mask=mask)
    np.testing.assert_allclose(jnp.exp(proxy), [1 / 11, 0.0, 0.6 / 0.99, 1.0], rtol=1e-5)
    np.testing.assert_allclose(truncation.proxy_log_probs(2 * logits, tokens, 0.02, 2.0, mask), proxy, rtol=1e-5)
    log_probs = losses.token_log_probs(logits, tokens, mask=mask)
    pulled = jnp.array([True, False, False, True])
    value, gradient = jax.value_and_grad(truncation.lp_reg)(log_probs, proxy, pulled, mask)
    np.testing.assert_allclose(value, (1 / 0.99 - 1 + np.log(0.99)) / 3, rtol=1e-2)
    np.testing.assert_allclose(gradient, [(1 - 1 / 0.99) / 3, 0.0, 0.0, 0.0], rtol=1e-4)
    assert not jax.grad(lambda x: truncation.proxy_log_probs(x, tokens, 0.02, mask=mask)[0])(logits).any()
    with pytest.raises(ConfigError, match=r"^min_p: got"):
        truncation.proxy_log_probs(logits, tokens, 0.0)


def test_the_nucleus_of_the_smallest_share_is_the_likeliest_token():
    logits = jnp.array([[0.0, 1.0, 2.0], [2.0, 2.0, 0.0]])
    inside = truncation.nucleus(logits, 1e-9)
    np.testing.assert_array_equal(inside, [[False, False, True], [True, True, False]])
    np.testing.assert_allclose(truncation.entropy_within(logits, inside), [0.0, np.log(3)], rtol=1e-6, atol=1e-7)


def test_tokens_that_have_just_the_share_together_are_the_whole_nucleus():
    """Of 1/2, 1/4, 1/8 and 1/8 the first two have 3/4."""
    np.testing.assert_array_equal(truncation.nucleus(jnp.log(P_2x4[0]), 0.75), [1, 1, 0, 0])


def test_the_nucleus_of_a_large_vocabulary_has_its_tail():
    """Summed from the likeliest on, the last of 150,000 tokens would be rounded away."""
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, 150_000), jnp.float32)
    assert truncation.nucleus(logits, 1.0).all()
    p = np.exp(np.asarray(jax.nn.log_softmax(logits), np.float64))
    for share in (0.5, 0.9, 0.999):
        falling = np.sort(p)[::-1]
        expected = int((np.cumsum(falling) - falling < share).sum())
        assert abs(int(truncation.nucleus(logits, share).sum()) - expected) <= 1e-4 * expected
