"""The loss terms against numbers worked out by hand, exact enumeration, and a plain loop."""

import functools

import chex
import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from absl.testing import parameterized

from ckl_jax import losses
from ckl_jax.advantages import future_kl, gae, kl_to_go, standardized
from ckl_jax.certainty import certainty
from ckl_jax.errors import ConfigError

INF, NAN = float("inf"), float("nan")


@pytest.fixture
def debug_nans():
    with jax.debug_nans(True):
        yield


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


P_2x4 = jnp.array([[0.5, 0.25, 0.125, 0.125], [0.1, 0.7, 0.15, 0.05]])


def test_the_likeliest_tokens_by_number_and_by_probability():
    logits = jnp.log(P_2x4)
    np.testing.assert_array_equal(losses.top_tokens(logits, 2), [[1, 1, 0, 0], [0, 1, 1, 0]])
    np.testing.assert_array_equal(losses.top_tokens(logits, 3), [[1, 1, 1, 1], [1, 1, 1, 0]])
    np.testing.assert_array_equal(losses.nucleus(logits, 0.4), [[1, 0, 0, 0], [0, 1, 0, 0]])
    np.testing.assert_array_equal(losses.nucleus(logits, 0.6), [[1, 1, 0, 0], [0, 1, 0, 0]])
    np.testing.assert_array_equal(losses.nucleus(logits, 0.9), [[1, 1, 1, 1], [1, 1, 1, 0]])
    np.testing.assert_array_equal(losses.nucleus(logits, 1.0), np.ones((2, 4)))
    # At temperature 2 the second distribution is 0.179, 0.474, 0.220 and 0.127.
    np.testing.assert_array_equal(losses.nucleus(logits, 0.6, 2.0)[1], [0, 1, 1, 0])
    for call in (lambda: losses.top_tokens(logits, 5), lambda: losses.top_tokens(logits, 0)):
        with pytest.raises(ConfigError, match=r"^count: got"):
            call()
    for share in (0.0, 1.5):
        with pytest.raises(ConfigError, match=r"^share: got"):
            losses.nucleus(logits, share)


def test_the_entropy_within_a_set_is_scaled_to_the_range_of_all_and_moves_no_token_outside(debug_nans):
    """Of 2/3 and 1/3: 0.636514 nats, times log 4 / log 2; of 1/2, 1/4, 1/8 and 1/8 all of 1.213008; of one token 0."""
    logits = jnp.log(P_2x4)
    inside = jnp.array([[True, True, False, False], [False, True, False, False]])
    np.testing.assert_allclose(losses.entropy_within(logits, inside), [2 * 0.636514, 0.0], atol=1e-5)
    found = losses.entropy_within(logits, jnp.ones((2, 4), bool))
    np.testing.assert_allclose(found, losses.entropy(logits), rtol=1e-6)
    np.testing.assert_allclose(found[0], 1.213008, rtol=1e-6)
    gradient = jax.grad(lambda x: losses.entropy_within(x, inside).sum())(logits)
    # -2 p (log p + H) of p = 2/3 and 1/3.
    np.testing.assert_allclose(gradient[0], [-0.308065, 0.308065, 0.0, 0.0], atol=1e-5)
    np.testing.assert_array_equal(gradient[1], np.zeros(4))
    uniform = losses.entropy_within(jnp.zeros((1, 4)), inside[:1])
    np.testing.assert_allclose(uniform, np.log(4), rtol=1e-6)


def test_k3_is_accurate_and_positive_where_the_policy_has_hardly_moved():
    log_ratio = jnp.array([1e-5, -1e-4, 1e-3])
    found = losses.kl_estimate(log_ratio, jnp.zeros(3), "k3")
    np.testing.assert_allclose(found, [5e-11, 5.000167e-9, 4.998334e-7], rtol=0.03)


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
        ("clip", lambda x, y: losses.clipped_policy_loss(x, x, x, x > 0, 0.0)),
        ("old_log_probs", lambda x, y: losses.clipped_policy_loss(x, y, x, x > 0, 0.2)),
        ("old_log_probs", lambda x, y: losses.off_policy_kl(x, "k1", x, y)),
        ("old_log_probs", lambda x, y: losses.kl_cov(x, y, x > 0, x > 0)),
    ],
)
def test_what_cannot_work_is_refused_by_name(field, call):
    with pytest.raises(ConfigError, match=f"^{field}: got"):
        call(jnp.ones((2, 3)), jnp.ones((2, 2)))


def test_beta_zero_is_the_standard_kl_penalty_even_where_certainty_is_zero():
    kl, mask = jnp.array([[0.5, 3.0], [2.0, 7.0]]), jnp.array([[True, True], [True, False]])
    found = losses.prioritized_kl(kl, jnp.array([[0.0, 1.0], [0.3, 0.2]]), 0, mask)
    chex.assert_trees_all_equal(found, losses.masked_mean(kl, mask))


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


POLICY_4x3 = np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5], [0.7, 0.1, 0.2]])
"""Next-token distributions of a two-token policy: at the start, then after each first token."""
REFERENCE_4x3 = np.array([[0.2, 0.5, 0.3], [0.3, 0.3, 0.4], [0.6, 0.2, 0.2], [0.1, 0.8, 0.1]])
CERTAINTY_4 = np.array([0.9, 0.2, 0.5, 0.7])
VISITATION_4 = np.array([1.0, 0.5, 0.3, 0.2])


def reverse_kl_gradient(policy, reference):
    log_ratio = np.log(policy / reference)
    return policy * (log_ratio - (policy * log_ratio).sum(-1, keepdims=True))


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


OLD_POLICY_4x3 = np.array([[0.3, 0.3, 0.4], [0.5, 0.25, 0.25], [0.2, 0.6, 0.2], [0.1, 0.3, 0.6]])


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_with_the_ratio_every_estimate_has_the_gradient_of_the_kl_on_an_older_policys_tokens(kind, debug_nans):
    tokens_3x4 = jnp.arange(3)[:, None] * jnp.ones((1, 4), int)
    states_4 = jnp.arange(4)
    old_4x3 = jnp.log(jnp.asarray(OLD_POLICY_4x3))

    def loss(logits_4x3):
        """Per state, the expectation over the older policy's token."""

        def of_token(tokens_4):
            log_probs_4, ref_4, old_4 = (
                losses.token_log_probs(x[states_4], tokens_4)
                for x in (logits_4x3, jnp.log(jnp.asarray(REFERENCE_4x3)), old_4x3)
            )
            kl_4 = losses.kl_estimate(log_probs_4, ref_4, kind)
            return jnp.exp(old_4) * losses.off_policy_kl(kl_4, kind, log_probs_4, old_4)

        return jax.vmap(of_token)(tokens_3x4).sum()

    found = jax.grad(loss)(jnp.log(jnp.asarray(POLICY_4x3)))
    np.testing.assert_allclose(found, reverse_kl_gradient(POLICY_4x3, REFERENCE_4x3), atol=1e-6)


def test_the_clipped_loss_stops_where_the_ratio_has_gone_far_enough_in_the_advantages_direction():
    """Ratios 1, 1.5, 0.5, 1.5, 0.5 with clip 0.2; the last token is outside the mask."""
    log_probs = jnp.log(jnp.array([1.0, 1.5, 0.5, 1.5, 0.5, 9.0]))
    advantages, mask = jnp.array([2.0, 2.0, 2.0, -2.0, -2.0, 5.0]), jnp.arange(6) < 5
    loss = functools.partial(
        losses.clipped_policy_loss, old_log_probs=jnp.zeros(6), advantages=advantages, mask=mask, clip=0.2
    )
    value, gradient = jax.value_and_grad(loss)(log_probs)
    np.testing.assert_allclose(value, -(2.0 + 2.4 + 1.0 - 3.0 - 1.6) / 5, rtol=1e-6)
    np.testing.assert_allclose(gradient, [-0.4, 0.0, -0.2, 0.6, 0.0, 0.0], atol=1e-6)


def test_the_gate_is_open_where_the_clipped_loss_has_a_gradient():
    """Ratios 1.5, 1.1, 0.5 and 0.9 with advantages of both signs; then an advantage of 0, and a token outside."""
    log_probs = jnp.log(jnp.array([1.5, 1.1, 0.5, 0.9, 1.5, 1.1, 0.5, 0.9, 9.0, 1.0]))
    advantages, mask = jnp.array([2.0] * 4 + [-2.0] * 4 + [0.0, 1.0]), jnp.arange(10) < 9
    arguments = {"old_log_probs": jnp.zeros(10), "advantages": advantages, "mask": mask, "clip": 0.2}
    found = losses.open_gate(log_probs, **arguments)
    np.testing.assert_array_equal(found, [False, True, True, True, True, True, False, True, True, False])
    gradient = jax.grad(lambda x: losses.clipped_policy_loss(x, **arguments))(log_probs)
    np.testing.assert_array_equal(found[:8], gradient[:8] != 0)
    garbage = {"advantages": jnp.where(mask, advantages, NAN), "old_log_probs": jnp.where(mask, 0.0, INF)}
    chex.assert_trees_all_equal(losses.open_gate(log_probs, **(arguments | garbage)), found)


def test_at_the_rollouts_policy_the_clipped_loss_has_the_policy_gradient():
    log_probs, advantages = jnp.array([-0.5, -2.0]), jnp.array([1.5, -0.5])
    mask = jnp.array([True, True])
    clipped = jax.grad(losses.clipped_policy_loss)(log_probs, log_probs, advantages, mask, 0.2)
    chex.assert_trees_all_close(clipped, jax.grad(losses.policy_gradient_loss)(log_probs, advantages, mask))


def test_kl_cov_is_the_distance_to_the_rollouts_policy_on_the_chosen_tokens():
    log_probs, old = jnp.array([-1.0, -2.0, -3.0, -4.0]), jnp.array([-1.5, -1.0, -9.0, 0.0])
    chosen, mask = jnp.array([True, True, False, True]), jnp.array([True, True, True, False])
    value, gradient = jax.value_and_grad(losses.kl_cov)(log_probs, old, chosen, mask)
    np.testing.assert_allclose(value, (0.5 + 1.0) / 3)
    np.testing.assert_allclose(gradient, [1 / 3, -1 / 3, 0.0, 0.0], rtol=1e-6)


def test_lp_reg_pulls_an_unlikely_token_to_its_probability_without_noise_and_leaves_noise_alone(debug_nans):
    """Of 0.6, 0.3, 0.09 and 0.01 the last is noise below 0.02 * 0.6. The others have 0.99 together."""
    logits = jnp.log(jnp.array([[0.6, 0.3, 0.09, 0.01]] * 4))
    tokens, mask = jnp.array([2, 3, 0, 2]), jnp.array([True, True, True, False])
    proxy = losses.proxy_log_probs(logits, tokens, 0.02, mask=mask)
    np.testing.assert_allclose(jnp.exp(proxy), [1 / 11, 0.0, 0.6 / 0.99, 1.0], rtol=1e-5)
    np.testing.assert_allclose(losses.proxy_log_probs(2 * logits, tokens, 0.02, 2.0, mask), proxy, rtol=1e-5)
    log_probs = losses.token_log_probs(logits, tokens, mask=mask)
    pulled = jnp.array([True, False, False, True])
    value, gradient = jax.value_and_grad(losses.lp_reg)(log_probs, proxy, pulled, mask)
    np.testing.assert_allclose(value, (1 / 0.99 - 1 + np.log(0.99)) / 3, rtol=1e-2)
    np.testing.assert_allclose(gradient, [(1 - 1 / 0.99) / 3, 0.0, 0.0, 0.0], rtol=1e-4)
    assert not jax.grad(lambda x: losses.proxy_log_probs(x, tokens, 0.02, mask=mask)[0])(logits).any()
    with pytest.raises(ConfigError, match=r"^min_p: got"):
        losses.proxy_log_probs(logits, tokens, 0.0)


def test_a_free_token_is_not_clipped():
    log_probs, mask = jnp.log(jnp.array([0.5, 0.5])), jnp.array([True, True])
    loss = functools.partial(losses.clipped_policy_loss, free=jnp.array([True, False]))
    value, gradient = jax.value_and_grad(loss)(log_probs, jnp.zeros(2), jnp.array([-2.0, -2.0]), mask, 0.2)
    np.testing.assert_allclose(value, (1.0 + 1.6) / 2, rtol=1e-6)
    np.testing.assert_allclose(gradient, [0.5, 0.0], rtol=1e-6)


def test_the_clip_by_entropy_is_wider_above_for_unsure_tokens_and_below_for_sure_ones():
    h = jnp.array([0.5, -0.5, 0.0])
    below, above = losses.entropy_clip(h, 0.2, 1.0)
    np.testing.assert_allclose(below, [0.2, 0.3, 0.2], rtol=1e-6)
    np.testing.assert_allclose(above, [0.3, 0.2, 0.2], rtol=1e-6)
    log_probs, mask = jnp.log(jnp.array([1.4, 0.6, 1.1])), jnp.ones(3, bool)
    advantages = jnp.array([1.0, -1.0, 1.0])
    arguments = (log_probs, jnp.zeros(3), advantages, mask, (below, above))
    np.testing.assert_allclose(losses.clipped_policy_loss(*arguments), -(1.3 - 0.7 + 1.1) / 3, rtol=1e-6)
    np.testing.assert_array_equal(losses.open_gate(*arguments), [False, False, True])


def test_the_advantage_is_redistributed_to_unsure_tokens_that_have_moved_and_from_sure_ones_that_have_not():
    """Half the clip is 0.1: ratios of 1.2 and 1.05, each where h is 0.5, -0.5 and 0; then one outside the mask."""
    log_probs = jnp.log(jnp.array([1.2, 1.05, 1.2, 1.05, 1.2, 1.05, 1.2]))
    h = jnp.array([0.5, 0.5, -0.5, -0.5, 0.0, 0.0, NAN])
    advantages, mask = jnp.array([2.0] * 6 + [NAN]), jnp.arange(7) < 6
    call = lambda x: losses.redistributed(advantages, h, x, jnp.zeros(7), mask, 0.2, 1.0)  # noqa: E731
    np.testing.assert_allclose(call(log_probs), [3.0, 2.0, 2.0, 1.0, 2.0, 2.0, 0.0], rtol=1e-6)
    assert not jax.grad(lambda x: call(x).sum())(log_probs).any()


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


TOKENS_3x4 = jnp.array([[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 0, 1]])
WITH_MASK = {
    "k1": lambda x, y, m: losses.kl_estimate(x[..., 0], y[..., 0], "k1", m),
    "k2": lambda x, y, m: losses.kl_estimate(x[..., 0], y[..., 0], "k2", m),
    "k3": lambda x, y, m: losses.kl_estimate(x[..., 0], y[..., 0], "k3", m),
    "exact": lambda x, y, m: losses.exact_kl(x, y, 2.0, m),
    "entropy": lambda x, y, m: losses.entropy(x, 2.0, m),
    "entropy of the top": lambda x, y, m: losses.entropy_within(x, losses.top_tokens(x, 2), 2.0, m),
    "entropy of the nucleus": lambda x, y, m: losses.entropy_within(x, losses.nucleus(x, 0.9), 2.0, m),
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
    "clipped": lambda x, y, z, m: losses.clipped_policy_loss(x.clip(-1, 1), y.clip(-1, 1), z, m, 0.2),
    "Lp-Reg": lambda x, y, z, m: losses.lp_reg(x.clip(-1, 1), y.clip(-1, 1), z > 0, m),
    "KL-Cov": lambda x, y, z, m: losses.kl_cov(x, y, z > 0, m),
    "off-policy k1": lambda x, y, z, m: losses.off_policy_kl(z, "k1", x.clip(-1, 1), y.clip(-1, 1), m).sum(),
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


def test_weighted_kl_is_the_mean_of_weight_times_kl_without_gradient_for_the_weights():
    kl, weights, mask = jnp.array([4.0, 1.0, 9.0]), jnp.array([0.5, 3.0, 7.0]), jnp.array([True, True, False])
    value, gradients = jax.value_and_grad(losses.weighted_kl, argnums=(0, 1))(kl, weights, mask)
    assert value == 2.5
    chex.assert_trees_all_close(gradients, (jnp.array([0.25, 1.5, 0.0]), jnp.zeros(3)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_inputs_are_computed_in_float32(dtype):
    x, y = jnp.array([[1.0078125, -2.0, 0.5]], dtype), jnp.array([[0.33203125, 0.75, 3.0]], dtype)
    z, mask = jnp.array([[0.5, -1.5, 2.0]], dtype), jnp.array([[True, True, False]])
    for name, loss in OF_PER_TOKEN_VALUES.items():
        if name != "gae":
            found = loss(x, y, z, mask)
            chex.assert_type(found, jnp.float32)
            chex.assert_trees_all_equal(found, loss(*(value.astype(jnp.float32) for value in (x, y, z)), mask))
