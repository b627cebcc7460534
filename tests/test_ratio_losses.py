"""Ratio losses, their clips and gates against numbers worked out by hand and exact enumeration."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from policies import POLICY_4x3, REFERENCE_4x3, reverse_kl_gradient

from ckl_jax import losses, ratio_losses
from ckl_jax.errors import ConfigError

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("clip", lambda x, y: ratio_losses.clipped_policy_loss(x, x, x, x > 0, 0.0)),
        ("clip", lambda x, y: ratio_losses.clipped_policy_loss(x, x, x, x > 0, (0.2, -jnp.ones_like(x)))),
        ("clip", lambda x, y: ratio_losses.clipped_policy_loss(x, x, x, x > 0, (jnp.zeros_like(x), 0.2))),
        ("clip", lambda x, y: ratio_losses.open_gate(x, x, x, x > 0, (0.2, jnp.full_like(x, jnp.nan)))),
        ("old_log_probs", lambda x, y: ratio_losses.clipped_policy_loss(x, y, x, x > 0, 0.2)),
        ("old_log_probs", lambda x, y: ratio_losses.off_policy_kl(x, "k1", x, y)),
        ("limit", lambda x, y: ratio_losses.truncated_importance(x, x, x > 0, 0.0)),
        ("old_log_probs", lambda x, y: ratio_losses.truncated_importance(x, y, x > 0, 2.0)),
        ("old_log_probs", lambda x, y: ratio_losses.kl_cov(x, y, x > 0, x > 0)),
    ],
)
def test_what_cannot_work_is_refused_by_name(field, call):
    with pytest.raises(ConfigError, match=f"^{field}: got"):
        call(jnp.ones((2, 3)), jnp.ones((2, 2)))


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
            return jnp.exp(old_4) * ratio_losses.off_policy_kl(kl_4, kind, log_probs_4, old_4)

        return jax.vmap(of_token)(tokens_3x4).sum()

    found = jax.grad(loss)(jnp.log(jnp.asarray(POLICY_4x3)))
    np.testing.assert_allclose(found, reverse_kl_gradient(POLICY_4x3, REFERENCE_4x3), atol=1e-6)


@pytest.mark.parametrize(("limit", "is_exact"), [(10.0, True), (1.1, False)])
def test_untruncated_importance_makes_an_older_policys_tokens_give_the_policys_gradient(limit, is_exact):
    tokens_3x4 = jnp.arange(3)[:, None] * jnp.ones((1, 4), int)
    advantages_3x4 = jnp.array([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, -1.0, 2.0], [-3.0, 0.25, 1.0, 0.0]])
    logits_4x3, old_4x3 = jnp.log(jnp.asarray(POLICY_4x3)), jnp.log(jnp.asarray(OLD_POLICY_4x3))
    everywhere = jnp.ones(4, bool)

    def loss(logits_4x3, sampler_4x3, limit):
        """The expectation over the sampler's token; it takes no gradient."""

        def of_token(tokens_4, advantages_4):
            log_probs_4, sampler_4 = (losses.token_log_probs(x, tokens_4) for x in (logits_4x3, sampler_4x3))
            factor_4 = ratio_losses.truncated_importance(log_probs_4, sampler_4, everywhere, limit)
            chance_4 = jax.lax.stop_gradient(jnp.exp(sampler_4))
            return losses.policy_gradient_loss(log_probs_4, chance_4 * factor_4 * advantages_4, everywhere)

        return jax.vmap(of_token)(tokens_3x4, advantages_3x4).sum()

    own = jax.grad(loss)(logits_4x3, logits_4x3, 10.0)
    found = jax.grad(loss)(logits_4x3, old_4x3, limit)
    assert np.allclose(found, own, atol=1e-6) == is_exact


def test_importance_is_cut_off_above_and_0_outside_the_mask():
    log_probs = jnp.log(jnp.array([0.5, 0.9, 0.1, 0.9]))
    sampled = jnp.log(jnp.array([0.5, 0.3, 0.4, NAN]))
    mask = jnp.array([True, True, True, False])
    found = ratio_losses.truncated_importance(log_probs, sampled, mask, 2.0)
    np.testing.assert_allclose(found, [1.0, 2.0, 0.25, 0.0], rtol=1e-6)
    gradient = jax.grad(lambda x: ratio_losses.truncated_importance(x, sampled, mask, 2.0).sum())(log_probs)
    np.testing.assert_array_equal(gradient, 0)


def test_the_clipped_loss_stops_where_the_ratio_has_gone_far_enough_in_the_advantages_direction():
    """Ratios 1, 1.5, 0.5, 1.5, 0.5 with clip 0.2; the last token is outside the mask."""
    log_probs = jnp.log(jnp.array([1.0, 1.5, 0.5, 1.5, 0.5, 9.0]))
    advantages, mask = jnp.array([2.0, 2.0, 2.0, -2.0, -2.0, 5.0]), jnp.arange(6) < 5
    loss = functools.partial(
        ratio_losses.clipped_policy_loss, old_log_probs=jnp.zeros(6), advantages=advantages, mask=mask, clip=0.2
    )
    value, gradient = jax.value_and_grad(loss)(log_probs)
    np.testing.assert_allclose(value, -(2.0 + 2.4 + 1.0 - 3.0 - 1.6) / 5, rtol=1e-6)
    np.testing.assert_allclose(gradient, [-0.4, 0.0, -0.2, 0.6, 0.0, 0.0], atol=1e-6)


def test_the_gate_is_open_where_the_clipped_loss_has_a_gradient():
    """Ratios 1.5, 1.1, 0.5 and 0.9 with advantages of both signs; then an advantage of 0, and a token outside."""
    log_probs = jnp.log(jnp.array([1.5, 1.1, 0.5, 0.9, 1.5, 1.1, 0.5, 0.9, 9.0, 1.0]))
    advantages, mask = jnp.array([2.0] * 4 + [-2.0] * 4 + [0.0, 1.0]), jnp.arange(10) < 9
    arguments = {"old_log_probs": jnp.zeros(10), "advantages": advantages, "mask": mask, "clip": 0.2}
    found = ratio_losses.open_gate(log_probs, **arguments)
    np.testing.assert_array_equal(found, [False, True, True, True, True, True, False, True, True, False])
    gradient = jax.grad(lambda x: ratio_losses.clipped_policy_loss(x, **arguments))(log_probs)
    np.testing.assert_array_equal(found[:8], gradient[:8] != 0)
    free = jnp.arange(10) == 6
    np.testing.assert_array_equal(ratio_losses.open_gate(log_probs, **arguments, free=free), found | free)
    garbage = {"advantages": jnp.where(mask, advantages, NAN), "old_log_probs": jnp.where(mask, 0.0, INF)}
    chex.assert_trees_all_equal(ratio_losses.open_gate(log_probs, **(arguments | garbage)), found)


def test_the_gate_of_a_bad_token_closes_at_the_clip_below():
    """A ratio of 0.75 lies between 1 - 0.3 and 1 - 0.2."""
    log_probs, old, bad, mask = jnp.log(jnp.array([0.75])), jnp.zeros(1), -jnp.ones(1), jnp.ones(1, bool)
    assert ratio_losses.open_gate(log_probs, old, bad, mask, (0.3, 0.2)).all()
    assert not ratio_losses.open_gate(log_probs, old, bad, mask, (0.2, 0.3)).any()


def test_at_the_rollouts_policy_the_clipped_loss_has_the_policy_gradient():
    log_probs, advantages = jnp.array([-0.5, -2.0]), jnp.array([1.5, -0.5])
    mask = jnp.array([True, True])
    clipped = jax.grad(ratio_losses.clipped_policy_loss)(log_probs, log_probs, advantages, mask, 0.2)
    chex.assert_trees_all_close(clipped, jax.grad(losses.policy_gradient_loss)(log_probs, advantages, mask))


def test_kl_cov_is_the_distance_to_the_rollouts_policy_on_the_chosen_tokens():
    log_probs, old = jnp.array([-1.0, -2.0, -3.0, -4.0]), jnp.array([-1.5, -1.0, -9.0, 0.0])
    chosen, mask = jnp.array([True, True, False, True]), jnp.array([True, True, True, False])
    value, gradient = jax.value_and_grad(ratio_losses.kl_cov)(log_probs, old, chosen, mask)
    np.testing.assert_allclose(value, (0.5 + 1.0) / 3)
    np.testing.assert_allclose(gradient, [1 / 3, -1 / 3, 0.0, 0.0], rtol=1e-6)


def test_kl_cov_has_no_gradient_from_rounding():
    """Two passes of one policy differ by their rounding, whose sign would be a whole gradient."""
    old, mask = jnp.log(jnp.array([0.1, 0.5, 0.9])), jnp.ones(3, bool)
    for distance, expected in ((1e-5, 0.0), (-1e-5, 0.0), (1e-3, 1 / 3), (-1e-3, -1 / 3)):
        gradient = jax.grad(ratio_losses.kl_cov)(old + distance, old, mask, mask)
        np.testing.assert_allclose(gradient, [expected] * 3, rtol=1e-6)


def test_a_free_token_is_not_clipped():
    log_probs, mask = jnp.log(jnp.array([0.5, 0.5])), jnp.array([True, True])
    loss = functools.partial(ratio_losses.clipped_policy_loss, free=jnp.array([True, False]))
    value, gradient = jax.value_and_grad(loss)(log_probs, jnp.zeros(2), jnp.array([-2.0, -2.0]), mask, 0.2)
    np.testing.assert_allclose(value, (1.0 + 1.6) / 2, rtol=1e-6)
    np.testing.assert_allclose(gradient, [0.5, 0.0], rtol=1e-6)


def test_the_clip_by_entropy_is_wider_above_for_unsure_tokens_and_below_for_sure_ones():
    h = jnp.array([0.5, -0.5, 0.0])
    below, above = ratio_losses.entropy_clip(h, 0.2, 1.0)
    np.testing.assert_allclose(below, [0.2, 0.3, 0.2], rtol=1e-6)
    np.testing.assert_allclose(above, [0.3, 0.2, 0.2], rtol=1e-6)
    log_probs, mask = jnp.log(jnp.array([1.4, 0.6, 1.1])), jnp.ones(3, bool)
    advantages = jnp.array([1.0, -1.0, 1.0])
    arguments = (log_probs, jnp.zeros(3), advantages, mask, (below, above))
    np.testing.assert_allclose(ratio_losses.clipped_policy_loss(*arguments), -(1.3 - 0.7 + 1.1) / 3, rtol=1e-6)
    np.testing.assert_array_equal(ratio_losses.open_gate(*arguments), [False, False, True])


def test_the_advantage_is_redistributed_to_unsure_tokens_that_have_moved_and_from_sure_ones_that_have_not():
    """Half the clip is 0.1: ratios of 1.2 and 1.05, each where h is 0.5, -0.5 and 0; then one outside the mask."""
    log_probs = jnp.log(jnp.array([1.2, 1.05, 1.2, 1.05, 1.2, 1.05, 1.2]))
    h = jnp.array([0.5, 0.5, -0.5, -0.5, 0.0, 0.0, NAN])
    advantages, mask = jnp.array([2.0] * 6 + [NAN]), jnp.arange(7) < 6
    call = lambda x: ratio_losses.redistributed(advantages, h, x, jnp.zeros(7), mask, 0.2, 1.0)  # noqa: E731
    np.testing.assert_allclose(call(log_probs), [3.0, 2.0, 2.0, 1.0, 2.0, 2.0, 0.0], rtol=1e-6)
    assert not jax.grad(lambda x: call(x).sum())(log_probs).any()


def test_a_ratio_below_1_has_moved_beyond_half_the_clip_too():
    """0.85 lies below 1 - 0.2 / 2: the unsure token gets 2 (1 + 0.5), the sure one keeps its 2."""
    log_probs, h = jnp.log(jnp.full(2, 0.85)), jnp.array([0.5, -0.5])
    found = ratio_losses.redistributed(jnp.full(2, 2.0), h, log_probs, jnp.zeros(2), jnp.ones(2, bool), 0.2, 1.0)
    np.testing.assert_allclose(found, [3.0, 2.0], rtol=1e-6)
