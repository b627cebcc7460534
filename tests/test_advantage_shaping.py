"""Advantages shaped by entropy, and the tokens it chooses, against hand-computed numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ckl_jax import advantage_shaping as shaping
from ckl_jax.errors import ConfigError

NAN = float("nan")
MASK = jnp.array([[True, True, True], [True, True, False]])
ENTROPY = jnp.array([[0.1, 0.9, 0.3], [0.5, 0.3, NAN]])
ADVANTAGES = jnp.array([[1.0, 1.0, 1.0], [-2.0, -2.0, NAN]])


@pytest.mark.parametrize(
    ("share", "kept"),
    [
        (0.01, [[0, 1, 0], [0, 0, 0]]),
        (0.4, [[0, 1, 0], [1, 0, 0]]),
        (0.6, [[0, 1, 1], [1, 1, 0]]),
        (1.0, [[1, 1, 1], [1, 1, 0]]),
    ],
    ids=["at least one", "two of five", "and what ties", "all"],
)
def test_top_entropy_keeps_the_advantage_of_the_most_uncertain(share, kept):
    found = shaping.top_entropy(ADVANTAGES, ENTROPY, MASK, share)
    np.testing.assert_array_equal(found, np.nan_to_num(ADVANTAGES) * np.array(kept))


def test_the_entropy_bonus_is_bounded_by_the_advantage_and_never_turns_it():
    found = shaping.entropy_bonus(ADVANTAGES.at[0, 2].set(0.0), ENTROPY, MASK, 1.0, 2.0)
    np.testing.assert_allclose(found, [[1.1, 1.5, 0.0], [-1.5, -1.7, 0.0]], atol=1e-6)


def test_gtpo_deals_the_reward_out_by_entropy_among_the_right_and_by_its_inverse_among_the_wrong():
    """Three right answers and one wrong of one token each, and of two answers that are longer by one token."""
    mask = jnp.array([[True, True], [True, False], [True, False], [True, True]])
    entropy = jnp.array([[0.1, 0.2], [0.3, NAN], [0.2, NAN], [0.5, 0.4]])
    found = shaping.gtpo(jnp.array([1.0, 1.0, 1.0, 0.0]), entropy, mask, 4, 0.5)
    reward = np.array([0.5 + 0.5 * 3 * 1 / 6, 1.0, 0.5 + 0.5 * 3 * 3 / 6, 0.5 + 0.5 * 3 * 2 / 6, -1.0, -1.0])
    expected = (reward - reward.mean()) / reward.std()
    np.testing.assert_allclose(np.asarray(found)[np.asarray(mask)], expected, rtol=1e-4)
    assert (np.asarray(found)[~np.asarray(mask)] == 0).all()


def test_gtpo_blames_the_wrong_answer_that_was_surest_and_leaves_equal_groups_alone():
    entropy = jnp.array([[0.1], [0.4], [0.3], [0.1], [0.2]] * 2)
    success = jnp.array([0.0, 0.0, 1.0, 1.0, 1.0] + [1.0] * 5)
    found = shaping.gtpo(success, entropy, jnp.ones((10, 1), bool), 5, 1.0)[:, 0]
    reward = np.array([-2 * 10 / 12.5, -2 * 2.5 / 12.5, 3 * 3 / 6, 3 * 1 / 6, 3 * 2 / 6])
    np.testing.assert_allclose(found[:5], (reward - reward.mean()) / reward.std(), rtol=1e-4)
    np.testing.assert_array_equal(found[5:], 0.0)


def test_the_unlikely_tokens_are_those_of_bad_answers_alone():
    """Of the two tokens with A < 0, log pi is -3 and -1; the least of all, -9, belongs to a good answer."""
    log_probs = jnp.array([[-9.0, -2.0, -4.0], [-1.0, -3.0, NAN]])
    found = shaping.unlikely(ADVANTAGES, log_probs, MASK, 0.01)
    np.testing.assert_array_equal(found, [[0, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(shaping.unlikely(ADVANTAGES, log_probs, MASK, 1.0), [[0, 0, 0], [1, 1, 0]])
    assert not shaping.unlikely(jnp.abs(ADVANTAGES), log_probs, MASK, 1.0).any()


def test_an_advantage_of_0_is_of_no_bad_answer():
    """However unlikely its token is."""
    found = shaping.unlikely(jnp.array([[0.0, -1.0]]), jnp.array([[-5.0, -1.0]]), jnp.ones((1, 2), bool), 0.5)
    np.testing.assert_array_equal(found, [[0, 1]])


def test_signed_entropy_is_0_at_its_quantile_1_where_the_policy_is_least_sure_and_minus_1_where_it_is_surest():
    """Logarithms of 0.01, 0.1, 1, 2 and 8 in a row; the fourth of them is that quantile."""
    entropy, mask = jnp.array([[0.01, 8.0, 1.0], [2.0, 0.1, NAN]]), MASK
    found = shaping.signed_entropy(entropy, mask, 0.75)
    span = np.log(0.01 / 2)
    np.testing.assert_allclose(found, [[-1, 1, -np.log(0.5) / span], [0, -np.log(0.05) / span, 0]], atol=1e-6)
    halved = shaping.signed_entropy(entropy, mask, 0.5)
    np.testing.assert_allclose(halved[0], [-1, 1, 0], atol=1e-6)
    np.testing.assert_allclose(halved[1, :2], [np.log(2) / np.log(8), -0.5], rtol=1e-5)
    np.testing.assert_array_equal(shaping.signed_entropy(jnp.ones((2, 3)), mask, 0.8), np.zeros((2, 3)))
    assert not shaping.signed_entropy(jnp.full((1, 2), NAN), jnp.zeros((1, 2), bool), 0.8).any()


def test_covariance_is_the_product_of_the_centered_values():
    log_probs = jnp.array([[-1.0, -2.0, -3.0], [-4.0, -5.0, NAN]])
    found = shaping.covariance(ADVANTAGES, log_probs, MASK)
    centered = np.array([[1.2, 1.2, 1.2], [-1.8, -1.8, 0.0]]) * np.array([[2.0, 1.0, 0.0], [-1.0, -2.0, 0.0]])
    np.testing.assert_allclose(found, centered, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("share", lambda x, m: shaping.top_entropy(x, x, m, 0.0)),
        ("share", lambda x, m: shaping.gtpo(x[:, 0], x, m, 2, 1.5)),
        ("group_size", lambda x, m: shaping.gtpo(x[:, 0], x, m, 4, 0.5)),
        ("entropy", lambda x, m: shaping.top_entropy(x, x, m[:, :1], 0.5)),
        ("entropy", lambda x, m: shaping.entropy_bonus(x, x[:1], m, 1.0, 2.0)),
        ("advantages", lambda x, m: shaping.covariance(x[:1], x, m)),
    ],
)
def test_shapes_and_shares_that_cannot_be_are_refused_by_name(field, call):
    with pytest.raises(ConfigError, match=f"^{field}: got"):
        call(jnp.ones((2, 3)), jnp.ones((2, 3), bool))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: shaping.top_entropy(x, ENTROPY, MASK, 0.5),
        lambda x: shaping.entropy_bonus(ADVANTAGES, x, MASK, 1.0, 2.0),
        lambda x: shaping.gtpo(jnp.array([1.0, 0.0]), x, MASK, 2, 0.5),
        lambda x: shaping.covariance(ADVANTAGES, x, MASK),
    ],
)
def test_shaped_advantages_take_no_gradient(call, debug_nans):
    gradient = jax.grad(lambda x: call(x).sum())(jnp.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]))
    np.testing.assert_array_equal(gradient, 0.0)
