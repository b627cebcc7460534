"""Advantages against hand-computed numbers, plain loops and enumeration."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from ckl_jax import advantage_shaping, advantages, losses
from ckl_jax.advantages import gae
from ckl_jax.errors import ConfigError

NAN, INF = float("nan"), float("inf")


def gae_by_loop(rewards, values, lengths, discount, gae_lambda):
    advantages = np.zeros_like(rewards)
    for row, length in enumerate(lengths):
        for start in range(length):
            for t in range(start, length):
                next_value = values[row, t + 1] if t + 1 < length else 0.0
                delta = rewards[row, t] + discount * next_value - values[row, t]
                advantages[row, start] += (discount * gae_lambda) ** (t - start) * delta
    return advantages


@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 1.0), (0.9, 0.95), (1.0, 0.0), (0.5, 1.0), (0.0, 0.7)])
def test_gae_equals_a_plain_loop_on_ragged_episodes(discount, gae_lambda, debug_nans):
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 5, 6)).astype(np.float32)
    lengths = np.array([6, 4, 1, 0, 3])
    mask = np.arange(6) < lengths[:, None]
    found = gae(*map(jnp.asarray, (rewards, values, mask)), discount, gae_lambda)
    expected = gae_by_loop(rewards, values, lengths, discount, gae_lambda)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


class UndiscountedAdvantageTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(0.0, 9.0, INF, NAN)
    def test_it_is_the_final_reward_minus_the_value_and_zero_after_the_end(self, garbage):
        rewards = jnp.array([[0.0, 0.0, 1.0], [0.0, 1.0, garbage]])
        values = jnp.array([[0.25, 0.5, 0.875], [0.5, 0.75, garbage]])
        mask = jnp.array([[True, True, True], [True, True, False]])
        found = self.variant(lambda r, v, m: gae(r, v, m, 1.0, 1.0))(rewards, values, mask)
        np.testing.assert_allclose(found, [[0.75, 0.5, 0.125], [0.5, 0.25, 0.0]], atol=1e-6)


def test_leaving_one_out_subtracts_the_mean_of_the_groups_others():
    found = advantages.leave_one_out(jnp.array([1.0, 0.0, 0.0, 1.0, 1.0, 1.0]), 3)
    np.testing.assert_allclose(found, [1.0, -0.5, -0.5, 0.0, 0.0, 0.0], atol=1e-6)


def test_standardized_groups_have_mean_0_and_deviation_1_unless_all_are_equal():
    found = advantages.standardized_in_group(jnp.array([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]), 4)
    np.testing.assert_allclose(found, [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5), 0, 0, 0, 0], atol=1e-5)


CONSTANTS = (0.0, 0.1, 0.7, -0.3, 1 / 3, 1000.1, -1e6 / 3, 1e-30, 1e-40, 1e30, -3e38)
BLOCK = np.arange(7) < np.array([7, 5, 1, 6, 3, 2, 7, 4])[:, None]
# What is made of 8 episodes of 7 tokens: of a reward each, or of a number for every token.
OF_REWARDS = {
    f"{call.__name__}, {size}": lambda x, call=call, size=size: call(x[:, 0], size)
    for call in (advantages.leave_one_out, advantages.standardized_in_group)
    for size in (2, 4, 8)
}
OF_TOKENS = {
    "standardized": lambda x: advantages.standardized(x, jnp.asarray(BLOCK)),
    "standardized, integers": lambda x: advantages.standardized(x, jnp.asarray(BLOCK.astype(np.int32))),
    "KL to go": lambda x: jnp.where(BLOCK.sum(axis=0) > 1, advantages.kl_to_go(x[:, :1] * jnp.eye(1, 7), BLOCK), 0.0),
    "covariance": lambda x: advantage_shaping.covariance(x, -jnp.arange(56.0).reshape(8, 7), jnp.asarray(BLOCK)),
    "covariance of equal log-probabilities": lambda x: advantage_shaping.covariance(
        jnp.arange(56.0).reshape(8, 7), x, jnp.asarray(BLOCK)
    ),
    "nothing in the mask": lambda x: advantages.standardized(x, jnp.zeros((8, 7), bool)),
}


@pytest.mark.parametrize("how", ["eager", "jit", "vmap", "sharded"])
@pytest.mark.parametrize("name", OF_REWARDS | OF_TOKENS)
def test_equal_numbers_have_exactly_no_advantage(name, how):
    call = (OF_REWARDS | OF_TOKENS)[name]
    constants = CONSTANTS if how != "eager" else (0.1, 1000.1)
    arrays = jnp.stack([jnp.full((8, 7), value, jnp.float32) for value in constants])
    if how == "vmap":
        found = jax.jit(jax.vmap(call))(arrays)
    elif how == "sharded":
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        shared = jax.device_put(arrays, jax.NamedSharding(mesh, jax.P(None, "data")))
        found = jnp.stack([jax.jit(call)(x) for x in shared])
    else:
        call = jax.jit(call) if how == "jit" else call
        found = jnp.stack([call(x) for x in arrays])
    np.testing.assert_array_equal(found, 0.0)


@pytest.mark.parametrize("name", OF_REWARDS | {"zero_centered, 8": None, "standardized": None})
@pytest.mark.parametrize("scale", [1.0, -1.0, 1e-20, 1e20])
def test_what_rounding_alone_has_set_apart_has_exactly_no_advantage(name, scale):
    """0.7 and seven times 0.1, added up in float32, are neighbours: their deviation is not 0."""
    summed = np.float32(0)
    for _ in range(7):
        summed += np.float32(0.1)
    rewards = jnp.asarray(scale * np.array([0.7] * 7 + [summed], np.float32))
    assert len(np.unique(rewards)) == 2
    calls = OF_REWARDS | {
        "zero_centered, 8": lambda x: advantages.zero_centered(x[:, 0], jnp.arange(8.0), 8),
        "standardized": lambda x: advantages.standardized(x, jnp.asarray(BLOCK)),
    }
    np.testing.assert_array_equal(jax.jit(calls[name])(jnp.tile(rewards[:, None], 7)), 0.0)


UNEQUAL = {
    "right or wrong": [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0],
    "a large constant": [1000.1, 1000.2, 1000.1, 1000.1, 1000.3, 1000.1, 1000.2, 1000.1],
    "one of them": [0.1] * 7 + [0.2],
    "a millionth apart": [1.0] * 7 + [1.0 + 2**-20],
    "large": [1e30, 2e30, -1e30, 1e30, 0.0, 1e30, 1e30, 3e30],
    "negative": [-5.0, -5.5, -6.0, -5.0, -7.0, -5.0, -5.0, -5.25],
}


@pytest.mark.parametrize("name", UNEQUAL)
def test_unequal_rewards_are_those_of_float64(name):
    rewards = np.array(UNEQUAL[name], np.float32)
    groups = rewards.astype(np.float64).reshape(-1, 4)
    others = (groups.sum(axis=1, keepdims=True) - groups) / 3
    deviation = groups.std(axis=1, keepdims=True) + advantages.EPSILON
    tolerance = {"rtol": 1e-5, "atol": 1e-6 * np.abs(groups - others).max()}
    found = advantages.leave_one_out(jnp.asarray(rewards), 4)
    np.testing.assert_allclose(found, (groups - others).reshape(-1), **tolerance)
    expected = (groups - groups.mean(axis=1, keepdims=True)) / deviation
    found = advantages.standardized_in_group(jnp.asarray(rewards), 4)
    np.testing.assert_allclose(found, expected.reshape(-1), rtol=1e-5, atol=1e-6)
    mask = np.array([[True, True, True, False], [True, True, True, True]])
    valid = groups.reshape(2, 4)[mask]
    found = advantages.standardized(jnp.where(mask, rewards.reshape(2, 4), NAN), jnp.asarray(mask))
    expected = (valid - valid.mean()) / (valid.std() + advantages.EPSILON)
    np.testing.assert_allclose(np.asarray(found)[mask], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("call", [advantages.leave_one_out, advantages.standardized_in_group])
@pytest.mark.parametrize("group_size", [0, 1, 4])
def test_groups_that_cannot_be_are_refused(call, group_size):
    with pytest.raises(ConfigError, match=r"^group_size: got \d, allowed is 2 or more, a divisor of the 6 episodes"):
        call(jnp.ones(6), group_size)


def test_standardized_advantages_count_the_masks_tokens_alone():
    mask = jnp.array([[True, True, False], [True, False, False]])
    found = advantages.standardized(jnp.array([[1.0, 2.0, 99.0], [3.0, 99.0, 99.0]]), mask)
    np.testing.assert_allclose(found, [[-(1.5**0.5), 0.0, 0.0], [1.5**0.5, 0.0, 0.0]], atol=1e-6)


def test_kl_to_go_sums_what_follows_and_subtracts_the_others_mean():
    kl = jnp.array([[1.0, 2.0, 4.0], [3.0, 1.0, NAN], [5.0, NAN, NAN]])
    mask = jnp.array([[True, True, True], [True, True, False], [True, False, False]])
    found = advantages.kl_to_go(kl, mask)
    np.testing.assert_allclose(found, [[7 - 4.5, 6 - 1, 4], [4 - 6, 1 - 6, 0], [5 - 5.5, 0, 0]], atol=1e-6)


def test_future_kl_is_a_tokens_own_kl_and_the_later_ones_of_all_after_it():
    kl = jnp.array([[1.0, 2.0, 4.0], [3.0, 1.0, NAN], [5.0, NAN, NAN]])
    later = jnp.array([[99.0, 0.5, 0.25], [99.0, 8.0, NAN], [99.0, NAN, NAN]])
    mask = jnp.array([[True, True, True], [True, True, False], [True, False, False]])
    found = advantages.future_kl(kl, later, mask)
    np.testing.assert_allclose(found, [[1.75, 2.25, 4], [3 + 8, 1, 0], [5, 0, 0]], atol=1e-6)


FIRST_3 = jnp.log(jnp.array([0.5, 0.3, 0.2]))
SECOND_3x3 = jnp.log(jnp.array([[0.1, 0.6, 0.3], [0.25, 0.25, 0.5], [0.7, 0.1, 0.2]]))
REF_FIRST_3 = jnp.log(jnp.array([0.2, 0.5, 0.3]))
REF_SECOND_3x3 = jnp.log(jnp.array([[0.3, 0.3, 0.4], [0.6, 0.2, 0.2], [0.1, 0.8, 0.1]]))
ANSWERS_9x2 = np.array(list(itertools.product(range(3), repeat=2)))


def sequence_log_probs(logits):
    """Of both tokens of the nine answers of a two-token policy: [9, 2]."""
    first_3, second_3x3 = (jax.nn.log_softmax(x) for x in logits)
    return jnp.stack([first_3[ANSWERS_9x2[:, 0]], second_3x3[ANSWERS_9x2[:, 0], ANSWERS_9x2[:, 1]]], axis=1)


def expected_policy_gradient(logits, advantages_of):
    """The gradient of the policy loss summed over tokens and halved, over all 81 pairs of answers by probability."""
    pairs_81x2 = jnp.array(list(itertools.product(range(9), repeat=2)))
    probability_9 = jnp.exp(sequence_log_probs(logits).sum(axis=1))
    weight_81 = jax.lax.stop_gradient(probability_9[pairs_81x2].prod(axis=1))

    def loss(logits):
        log_probs_9x2 = sequence_log_probs(logits)

        def of_pair(pair):
            chosen = log_probs_9x2[pair]
            return 2 * losses.policy_gradient_loss(chosen, advantages_of(pair, chosen), jnp.ones((2, 2), bool))

        return (weight_81 * jax.vmap(of_pair)(pairs_81x2)).sum()

    return jax.grad(loss)(logits)


def test_kl_to_go_has_the_gradient_of_the_kl_between_whole_answers(debug_nans):
    ref_9x2 = sequence_log_probs((REF_FIRST_3, REF_SECOND_3x3))

    def total_kl(logits):
        log_probs_9 = sequence_log_probs(logits).sum(axis=1)
        return (jnp.exp(log_probs_9) * (log_probs_9 - ref_9x2.sum(axis=1))).sum()

    def less_kl(pair, log_probs_2x2):
        k1_2x2 = losses.kl_estimate(log_probs_2x2, ref_9x2[pair], "k1")
        return -advantages.kl_to_go(k1_2x2, jnp.ones((2, 2), bool))

    logits = (FIRST_3, SECOND_3x3)
    chex.assert_trees_all_close(expected_policy_gradient(logits, less_kl), jax.grad(total_kl)(logits), atol=1e-6)


def test_zero_centered_advantages_are_at_most_1_and_lose_what_an_answers_kl_is_above_its_groups():
    """Rewards of mean 0.25, penalties of mean 0.4. Then equal rewards, and a penalty that outweighs."""
    rewards = jnp.array([1.0, 0.0, 0.0, 0.0] + [1.0] * 4 + [-1.0, 1.0, 1.0, -1.0])
    penalties = jnp.array([0.8, 0.2, 0.2, 0.4, 9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 8.0])
    found = advantages.zero_centered(rewards, penalties, 4)
    mixed = [1 - 0.4, -1 / 3 + 0.2, -1 / 3 + 0.2, -1 / 3]
    np.testing.assert_allclose(found, [*mixed, 0, 0, 0, 0, -1 + 2, 1 + 2, 1 + 2, -1 - 6], atol=1e-6)
    np.testing.assert_allclose(found.reshape(3, 4).sum(axis=1), 0.0, atol=1e-6)
    np.testing.assert_array_equal(found[4:8], np.zeros(4))
    gradients = jax.grad(lambda r, d: advantages.zero_centered(r, d, 4)[0], argnums=(0, 1))(rewards, penalties)
    chex.assert_trees_all_equal(gradients, (jnp.zeros(12), jnp.zeros(12)))


WEIGHTS_4 = jnp.array([0.9, 0.2, 0.5, 0.7])
"""Of a KL before the first token, and before the second after each first one."""


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_future_kl_has_the_gradient_of_the_weighted_kl_with_each_tokens_effect_on_later_states(kind, debug_nans):
    ref_9x2 = sequence_log_probs((REF_FIRST_3, REF_SECOND_3x3))
    weights_9x2 = jnp.stack([jnp.full(9, WEIGHTS_4[0]), WEIGHTS_4[1 + ANSWERS_9x2[:, 0]]], axis=1)

    def total_kl(logits):
        log_probs_9x2 = sequence_log_probs(logits)
        return (jnp.exp(log_probs_9x2.sum(axis=1)) * (weights_9x2 * (log_probs_9x2 - ref_9x2)).sum(axis=1)).sum()

    def less_kl(pair, log_probs_2x2):
        kl, later = (weights_9x2[pair] * losses.kl_estimate(log_probs_2x2, ref_9x2[pair], k) for k in ("k1", kind))
        return -advantages.future_kl(kl, later, jnp.ones((2, 2), bool))

    logits = (FIRST_3, SECOND_3x3)
    chex.assert_trees_all_close(expected_policy_gradient(logits, less_kl), jax.grad(total_kl)(logits), atol=1e-6)


def test_leaving_one_out_has_the_gradient_of_the_expected_reward(debug_nans):
    rewards_9 = jnp.array([1.0, 0.0, 0.0, 0.0, 3.0, 1.0, 0.0, 0.0, 1.0])

    def of_reward(pair, log_probs_2x2):
        return jnp.broadcast_to(advantages.leave_one_out(rewards_9[pair], 2)[:, None], (2, 2))

    def less_reward(logits):
        return -(jnp.exp(sequence_log_probs(logits).sum(axis=1)) * rewards_9).sum()

    logits = (FIRST_3, SECOND_3x3)
    chex.assert_trees_all_close(expected_policy_gradient(logits, of_reward), jax.grad(less_reward)(logits), atol=1e-6)


MASK = jnp.array([[True, True, True], [True, True, False]])


@pytest.mark.parametrize(
    "call",
    [
        lambda x: advantages.kl_to_go(x, MASK),
        lambda x: advantages.future_kl(x, x, MASK),
        lambda x: advantages.leave_one_out(x[:, 0], 2),
    ],
)
def test_advantages_take_no_gradient(call, debug_nans):
    gradient = jax.grad(lambda x: call(x).sum())(jnp.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]))
    np.testing.assert_array_equal(gradient, 0.0)
