"""The loss terms against numbers worked out by hand, exact enumeration, and a plain loop."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from absl.testing import parameterized
from policies import POLICY_4x3, REFERENCE_4x3, reverse_kl_gradient

from ckl_jax import losses
from ckl_jax.errors import ConfigError

INF = float("inf")


@pytest.mark.usefixtures("debug_nans")
class HandComputedLossesTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(
        ("k1", [0.693147, -0.693147, 0.0]),
        ("k2", [0.240227, 0.240227, 0.0]),
        ("k3", [0.193147, 0.306853, 0.0]),
    )
    def test_kl_estimates_of_a_token_twice_half_and_equally_as_likely(self, kind, expected):
        log_probs, ref_log_probs = jnp.log(jnp.array([[0.5, 0.25, 0.125], [0.25, 0.5, 0.125]]))
        found = self.variant(lambda p, q: losses.kl_estimate(p, q, kind))(log_probs, ref_log_probs)
        np.testing.assert_allclose(found, expected, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(([4.0, 2.0, 2.0], [1.0, 1.0, 2.0], 1.0), ([4.0, 1.0, 1.0], [1.0, 1.0, 4.0], 2.0))
    def test_exact_kl_is_a_quarter_of_log_two(self, weights, ref_weights, temperature):
        logits, ref_logits = jnp.log(jnp.array([weights, ref_weights]))
        found = self.variant(losses.exact_kl)(logits, ref_logits, temperature)
        np.testing.assert_allclose(found, 0.173287, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(
        (2.0, [True, True, True], 0.666667),
        (2.0, [True, True, False], 1.0),
        (1.0, [True, False, True], 1.0),
        (0.0, [True, True, True], 2.333333),
        (150.0, [True, True, True], 0.333333),
        (2.0, [False, False, False], 0.0),
    )
    def test_prioritized_kl_is_divided_by_the_number_of_tokens(self, beta, mask, expected):
        kl, sure = jnp.array([4.0, 1.0, 2.0]), jnp.array([0.5, 1.0, 0.0])
        found = self.variant(losses.prioritized_kl)(kl, sure, beta, jnp.array(mask))
        np.testing.assert_allclose(found, expected, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_token_log_probs_and_entropy_of_a_batch(self):
        logits, tokens = jnp.log(jnp.array([[2.0, 1.0, 1.0], [1.0, 4.0, 3.0]])), jnp.array([0, 2])
        np.testing.assert_allclose(self.variant(losses.token_log_probs)(logits, tokens), [-0.693147, -0.980829], 1e-5)
        np.testing.assert_allclose(self.variant(losses.entropy)(logits), [1.039721, 0.974315], 1e-5)
        np.testing.assert_allclose(self.variant(losses.token_log_probs)(2 * logits, tokens, 2.0)[0], -0.693147, 1e-5)
        np.testing.assert_allclose(self.variant(losses.entropy)(2 * logits, 2.0)[0], 1.039721, 1e-5)


def test_clamped_log_probs_have_a_floor_and_a_ceiling_of_float32s_epsilon_and_no_gradient_beyond(debug_nans):
    """-15.942385 is the logarithm of 2^-23; the last is a probability of 1, which is as near as float32 can be."""
    value, gradient = jax.vmap(jax.value_and_grad(losses.clamped))(jnp.array([-200.0, -16.0, -15.9, -1.0, 0.0]))
    np.testing.assert_allclose(value, [-15.942385, -15.942385, -15.9, -1.0, -1.192093e-7], rtol=1e-6)
    np.testing.assert_array_equal(gradient, [0.0, 0.0, 1.0, 1.0, 0.0])
    assert losses.clamped(jnp.array(-INF)) == losses.clamped(jnp.array(-16.0))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_clamped_log_probs_and_their_k2_are_those_of_a_torch_categorical_of_probabilities(temperature):
    """Tokens that are sure, likely, rare, below the floor and impossible, for the policy and for the reference."""
    logits = np.array([[60.0, 0, -3], [1, 0, 2], [0, -14, 2], [0, -33, 1], [0, -120, 1]], np.float32) * temperature
    ref_logits, tokens = logits[::-1].copy(), np.array([0, 0, 1, 1, 1])
    policy, reference = torch.tensor(logits, requires_grad=True), torch.tensor(ref_logits)
    of_policy, of_reference = (
        torch.distributions.Categorical(probs=torch.softmax(x / temperature, -1)).log_prob(torch.tensor(tokens))
        for x in (policy, reference)
    )
    k2 = 0.5 * (of_reference - of_policy) ** 2
    k2.sum().backward()

    def loss(logits):
        log_probs, ref = (losses.token_log_probs(x, tokens, temperature, clamp=True) for x in (logits, ref_logits))
        kl = losses.kl_estimate(log_probs, ref, "k2")
        return kl.sum(), (log_probs, ref, kl)

    (_, found), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logits))
    for ours, theirs in zip(found, (of_policy, of_reference, k2), strict=True):
        np.testing.assert_allclose(ours, theirs.detach(), rtol=2e-5)
    np.testing.assert_allclose(gradient, policy.grad, rtol=2e-5, atol=1e-6)
    assert not gradient[3:].any()


def test_k3_is_accurate_and_positive_where_the_policy_has_hardly_moved():
    magnitudes = np.logspace(-8, 0, 400)
    log_ratio = jnp.asarray(np.concatenate([-magnitudes, magnitudes]), jnp.float32)
    exact = [math.fsum((-d) ** n / math.factorial(n) for n in range(2, 20)) for d in np.asarray(log_ratio, np.float64)]
    np.testing.assert_allclose(losses.kl_estimate(log_ratio, jnp.zeros_like(log_ratio), "k3"), exact, rtol=5e-5)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimates_are_float32_and_give_the_reference_no_gradient(kind):
    log_probs, ref_log_probs = jnp.array([-1.0, -2.0], jnp.bfloat16), jnp.array([-2.0, -1.0], jnp.bfloat16)
    chex.assert_type(losses.kl_estimate(log_probs, ref_log_probs, kind), jnp.float32)
    gradient = jax.grad(lambda q: losses.kl_estimate(log_probs, q, kind).sum())(ref_log_probs)
    chex.assert_trees_all_equal(gradient, jnp.zeros(2, jnp.bfloat16))


def test_exact_kl_is_zero_for_equal_logits_and_gives_the_reference_no_gradient():
    logits = jnp.array([[0.3, -1.0, 2.0], [5.0, 0.0, -INF]])
    chex.assert_trees_all_equal(losses.exact_kl(logits, logits), jnp.zeros(2))
    gradient = jax.grad(losses.exact_kl, argnums=1)(logits[0], logits[0, ::-1])
    chex.assert_trees_all_equal(gradient, jnp.zeros(3))


@pytest.mark.parametrize(
    ("policy", "reference", "expected"),
    [
        ([0.5, 0.5, 0.0], [0.25, 0.25, 0.5], 0.693147),
        ([0.5, 0.5, 0.0], [0.25, 0.75, 0.0], 0.143841),
        ([0.5, 0.25, 0.25], [0.5, 0.5, 0.0], INF),
    ],
)
def test_exact_kl_handles_impossible_tokens(policy, reference, expected):
    found = losses.exact_kl(jnp.log(jnp.array(policy)), jnp.log(jnp.array(reference)))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("distance", [1e-4, 1e-2])
def test_exact_kl_near_0_has_the_error_that_it_says_and_a_sound_gradient(distance):
    """Against float64, at KLs of 5e-9 and 5e-5 over 50,257 tokens."""
    rng = np.random.default_rng(0)
    logits = (3 * rng.normal(size=(4, 50_257))).astype(np.float32)
    reference = (logits + distance * rng.normal(size=logits.shape)).astype(np.float32)
    log_p, log_q = (np.asarray(x, np.float64) for x in (logits, reference))
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (log_p, log_q))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    gradient = np.exp(log_p) * (log_p - log_q - kl[:, None])
    assert 0.3 < kl.mean() / (0.5 * distance**2) < 1.5
    np.testing.assert_allclose(losses.exact_kl(jnp.asarray(logits), jnp.asarray(reference)), kl, rtol=0, atol=5e-7)
    found = jax.grad(lambda x: losses.exact_kl(x, jnp.asarray(reference)).sum())(jnp.asarray(logits))
    assert np.linalg.norm(found - gradient) < 0.01 * np.linalg.norm(gradient)


def test_exact_kl_has_a_finite_gradient_where_the_policy_excludes_a_token():
    logits, ref_logits = jnp.log(jnp.array([[0.75, 0.25, 0.0], [0.25, 0.25, 0.5]]))
    np.testing.assert_allclose(jax.grad(losses.exact_kl)(logits, ref_logits), [0.205990, -0.205990, 0.0], atol=1e-6)


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("kind", lambda x, y: losses.kl_estimate(x, x, "k4")),
        ("ref_log_probs", lambda x, y: losses.kl_estimate(x, y)),
        ("ref_logits", lambda x, y: losses.exact_kl(x, y)),
        ("beta", lambda x, y: losses.prioritized_kl(x, x, -0.5, x > 0)),
        ("certainty", lambda x, y: losses.prioritized_kl(x, y, 1.0, x > 0)),
        ("mask", lambda x, y: losses.masked_mean(x, y > 0)),
        ("mask", lambda x, y: losses.prioritized_kl(x, x, 1.0, y > 0)),
        ("mask", lambda x, y: losses.exact_kl(x, x, 1.0, y > 0)),
        ("mask", lambda x, y: losses.kl_estimate(x, x, "k2", y > 0)),
        ("weights", lambda x, y: losses.weighted_kl(x, y, x > 0)),
    ],
)
def test_what_cannot_work_is_refused_by_name(field, call):
    with pytest.raises(ConfigError, match=f"^{field}: got"):
        call(jnp.ones((2, 3)), jnp.ones((2, 2)))


def test_beta_zero_is_the_standard_kl_penalty_even_where_certainty_is_zero():
    kl, mask = jnp.array([[0.5, 3.0], [2.0, 7.0]]), jnp.array([[True, True], [True, False]])
    found = losses.prioritized_kl(kl, jnp.array([[0.0, 1.0], [0.3, 0.2]]), 0, mask)
    chex.assert_trees_all_equal(found, losses.masked_mean(kl, mask))


def test_the_mean_over_no_token_is_zero_with_zero_gradient(debug_nans):
    value_and_grad = jax.value_and_grad(losses.masked_mean)(jnp.array([1.0, 2.0]), jnp.array([False, False]))
    chex.assert_trees_all_equal(value_and_grad, (jnp.float32(0), jnp.zeros(2)))


@pytest.mark.parametrize(
    "loss",
    [lambda x, y, m: losses.prioritized_kl(x, y, 2.0, m), losses.policy_gradient_loss, losses.value_loss],
    ids=["certainty", "advantages", "returns"],
)
def test_targets_and_weights_take_no_gradient(loss, debug_nans):
    mask = jnp.array([True, True, False])
    gradient = jax.grad(loss, argnums=1)(jnp.array([1.0, 2.0, 3.0]), jnp.array([0.5, 0.9, 0.0]), mask)
    chex.assert_trees_all_equal(gradient, jnp.zeros(3))


CERTAINTY_4 = np.array([0.9, 0.2, 0.5, 0.7])
VISITATION_4 = np.array([1.0, 0.5, 0.3, 0.2])


def forward_kl_gradient(policy, reference):
    return policy - reference


def expected_gradient(kind, beta):
    """Gradient by the logits [4, 3] of the penalty summed over both tokens, averaged over all nine sequences."""
    tokens_9x2 = jnp.array([(first, second) for first in range(3) for second in range(3)])
    states_9x2 = jnp.stack([jnp.zeros(9, int), 1 + tokens_9x2[:, 0]], axis=1)
    ref_log_probs_9x2 = losses.token_log_probs(jnp.log(jnp.asarray(REFERENCE_4x3))[states_9x2], tokens_9x2)
    certainty_9x2 = jnp.asarray(CERTAINTY_4)[states_9x2]

    def loss(logits_4x3):
        log_probs_9x2 = losses.token_log_probs(logits_4x3[states_9x2], tokens_9x2)
        kl_9x2 = losses.kl_estimate(log_probs_9x2, ref_log_probs_9x2, kind)
        mean_of = jax.vmap(losses.prioritized_kl, in_axes=(0, 0, None, 0))
        penalty_9 = 2 * mean_of(kl_9x2, certainty_9x2, beta, jnp.ones((9, 2), bool))
        return (jax.lax.stop_gradient(jnp.exp(log_probs_9x2.sum(axis=1))) * penalty_9).sum()

    return jax.grad(loss)(jnp.log(jnp.asarray(POLICY_4x3)))


@pytest.mark.parametrize("beta", [0.0, 3.0], ids=["unweighted", "weighted"])
@pytest.mark.parametrize(
    ("kind", "gradient_of"),
    [("k1", lambda p, q: 0.0 * p), ("k2", reverse_kl_gradient), ("k3", forward_kl_gradient)],
    ids=["k1 has none", "k2 has that of the reverse KL", "k3 has that of the forward KL"],
)
def test_expected_gradient_of_each_estimate_state_by_state(kind, gradient_of, beta, debug_nans):
    weights_4x1 = (VISITATION_4 * CERTAINTY_4**beta)[:, None]
    expected_4x3 = weights_4x1 * gradient_of(POLICY_4x3, REFERENCE_4x3)
    np.testing.assert_allclose(expected_gradient(kind, beta), expected_4x3, atol=1e-6)


@pytest.mark.parametrize(("kl", "factor"), [(0.02, 1.0), (0.022, 1.01), (5.0, 1.02), (0.0, 0.98), (0.019, 0.995)])
def test_the_adapted_coefficient_follows_the_kl_and_never_by_more_than_a_fifth_of_the_gain(kl, factor):
    np.testing.assert_allclose(losses.adapted_coefficient(jnp.float32(5.0), kl, 0.02, 0.1), 5.0 * factor, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 3.0], ids=["unweighted", "weighted"])
def test_exact_kl_has_the_expected_gradient_of_k2(beta, debug_nans):
    def loss(logits_4x3):
        kl_4 = losses.exact_kl(logits_4x3, jnp.log(jnp.asarray(REFERENCE_4x3)))
        return 4 * losses.prioritized_kl(kl_4 * VISITATION_4, jnp.asarray(CERTAINTY_4), beta, jnp.ones(4, bool))

    gradient_4x3 = jax.grad(loss)(jnp.log(jnp.asarray(POLICY_4x3)))
    np.testing.assert_allclose(gradient_4x3, expected_gradient("k2", beta), atol=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_at_the_start_the_ratio_is_one_and_every_estimate_zero(kind, debug_nans):
    logits, tokens = jnp.array([[0.3, -1.0, 2.0], [0.0, 4.0, 1.0]]), jnp.array([2, 0])
    log_probs = losses.token_log_probs(logits, tokens)
    chex.assert_trees_all_equal(jnp.exp(losses.kl_estimate(log_probs, log_probs, "k1")), jnp.ones(2))
    chex.assert_trees_all_equal(losses.kl_estimate(log_probs, log_probs, kind), jnp.zeros(2))


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_at_the_start_the_penalty_of_sampled_tokens_has_no_gradient(kind, debug_nans):
    ref_logits, tokens = jnp.array([[0.3, -1.0, 2.0], [0.0, 4.0, 1.0]]), jnp.array([2, 0])

    def loss(logits):
        kl = losses.kl_estimate(*(losses.token_log_probs(x, tokens) for x in (logits, ref_logits)), kind)
        return losses.prioritized_kl(kl, jnp.array([0.9, 0.5]), 1.0, jnp.array([True, True]))

    chex.assert_trees_all_equal(jax.grad(loss)(ref_logits), jnp.zeros((2, 3)))


def test_weighted_kl_is_the_mean_of_weight_times_kl_without_gradient_for_the_weights():
    kl, weights, mask = jnp.array([4.0, 1.0, 9.0]), jnp.array([0.5, 3.0, 7.0]), jnp.array([True, True, False])
    value, gradients = jax.value_and_grad(losses.weighted_kl, argnums=(0, 1))(kl, weights, mask)
    assert value == 2.5
    chex.assert_trees_all_close(gradients, (jnp.array([0.25, 1.5, 0.0]), jnp.zeros(3)))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int64, np.uint32])
def test_tokens_of_any_integer_type_name_the_same_token_or_none(dtype):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 300)), jnp.float32)
    tokens = np.array([0, 17, 100], dtype)
    expected = jax.nn.log_softmax(logits)[jnp.arange(3), jnp.array([0, 17, 100])]
    for array in (tokens, jnp.asarray(tokens)):
        np.testing.assert_allclose(losses.token_log_probs(logits, array), expected, rtol=1e-6)
    unknown = np.iinfo(dtype).min if np.iinfo(dtype).min < 0 else np.iinfo(dtype).max
    if dtype != np.uint8:  # All of its numbers are tokens here.
        assert np.isnan(losses.token_log_probs(logits, np.array([unknown, 0, 0], dtype))[0])


def test_a_token_beyond_32_bits_is_none_of_the_vocabulary():
    found = losses.token_log_probs(jnp.zeros((2, 3)), np.array([2**32 + 1, 1]))
    np.testing.assert_array_equal(np.isnan(found), [True, False])
