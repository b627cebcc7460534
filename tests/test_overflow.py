"""Losses whose numbers do not fit into float32: what padding and weights of 0 take out, and what the run then says."""

import dataclasses
import itertools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ckl_jax import losses, overflow, ratio_losses, token_weights
from ckl_jax.certainty import certainty
from ckl_jax.checkpoint.store import Model
from ckl_jax.config import FinetuneConfig
from ckl_jax.errors import ConfigError
from ckl_jax.rl import objective
from ckl_jax.rl.assessment import Episodes
from ckl_jax.rl.minibatches import Indices, cut
from ckl_jax.rl.program import Hyper, make_program
from ckl_jax.rl.updates import init_run
from ckl_jax.rollout.trajectory import Trajectory

INF, NAN = float("inf"), float("nan")
KINDS = ("k1", "k2", "k3")
MASK = jnp.array([True, True])
# Every log-ratio: its k3 overflows, its ratio does, neither but both are far, and no number at all.
FAR = (-90.0, -200.0, 90.0, 200.0, INF, -INF)


def penalty(kind, weigh):
    def loss(log_probs, weights):
        return weigh(losses.kl_estimate(log_probs, jnp.zeros(2), kind, MASK), weights)

    return loss


def off_policy(kind):
    def loss(log_probs, weights):
        kl = losses.kl_estimate(log_probs, jnp.zeros(2), kind, MASK)
        return losses.weighted_kl(ratio_losses.off_policy_kl(kl, kind, log_probs, jnp.zeros(2), MASK), weights, MASK)

    return loss


def exact(log_probs, weights):
    """The second token is impossible for a reference that the policy leaves; the gradient is that in its logit."""
    first = jnp.stack([log_probs, jnp.zeros(2)], axis=1).clip(-200, 200)
    reference = jnp.where((jnp.abs(log_probs) > 10)[:, None], jnp.array([[0.0, -INF]]), jnp.array([[0.3, 0.0]]))
    return losses.weighted_kl(losses.exact_kl(first, reference, mask=MASK), weights, MASK)


WEIGHTED = {
    **{f"{k}, certainty": penalty(k, lambda kl, w: losses.prioritized_kl(kl, w, 150.0, MASK)) for k in KINDS},
    **{f"{k}, weights": penalty(k, lambda kl, w: losses.weighted_kl(kl, w, MASK)) for k in KINDS},
    **{f"{k}, coefficient": penalty(k, lambda kl, w: overflow.product(w[0], kl[0]) + kl[1]) for k in KINDS},
    **{f"{k}, off-policy": off_policy(k) for k in KINDS},
    "exact": exact,
    "policy gradient": lambda x, w: losses.policy_gradient_loss(x, w, MASK),
    "clipped": lambda x, w: ratio_losses.clipped_policy_loss(x, jnp.zeros(2), w, MASK, 0.2),
    "KL-Cov": lambda x, w: ratio_losses.kl_cov(x, jnp.zeros(2), w > 0, MASK),
}


@pytest.mark.parametrize("scale", [1.0, 2.0**15])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", WEIGHTED)
def test_a_token_of_weight_0_counts_0_in_value_and_gradient_whatever_its_kl(name, jit, scale):
    weights = jnp.array([0.0, 1.0])
    call = jax.value_and_grad(lambda x, w: scale * WEIGHTED[name](x, w))
    call = jax.jit(call) if jit else call
    value, gradient = call(jnp.array([0.5, 0.25]), weights)
    chex.assert_tree_all_finite((value, gradient))
    assert gradient[0] == 0
    for far in FAR:
        found = call(jnp.array([far, 0.25]), weights)
        chex.assert_trees_all_equal(found, (value, gradient))


@pytest.mark.parametrize("scale", [1.0, 2.0**15])
@pytest.mark.parametrize("banned", [-1e9, -200.0, -INF])
def test_a_token_that_the_reference_bans_and_the_policy_never_takes_counts_0_at_any_scale(banned, scale):
    logits, reference = jnp.array([[0.5, 0.0, banned]]), jnp.array([[0.0, 0.0, -INF]])
    found = jax.value_and_grad(lambda x: scale * losses.exact_kl(x, reference).sum())(logits)
    shorter = jax.value_and_grad(lambda x: scale * losses.exact_kl(x, reference[:, :2]).sum())(logits[:, :2])
    np.testing.assert_allclose(found[0], shorter[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], jnp.pad(shorter[1], ((0, 0), (0, 1))), rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.0**15])
@pytest.mark.parametrize("kind", KINDS)
def test_a_ratio_that_overflows_where_the_policies_agree_has_a_finite_gradient_at_any_scale(kind, scale):
    reference, old = jnp.array([-1.0, -1.2]), jnp.array([-100.0, -1.0])

    def loss(log_probs):
        kl = losses.kl_estimate(log_probs, reference, kind, MASK)
        return scale * losses.masked_mean(ratio_losses.off_policy_kl(kl, kind, log_probs, old, MASK), MASK)

    assert np.isfinite(jax.grad(loss)(jnp.full(2, -1.0))).all()


# Tokens that policy and reference alike exclude: the log-ratio of two infinities is no number.
EXCLUDED = jnp.array([-INF, 0.0])
OF_EXCLUDED = {
    **{k: lambda x, w, k=k: losses.weighted_kl(losses.kl_estimate(x, EXCLUDED, k), w, MASK) for k in KINDS},
    "clipped": lambda x, w: ratio_losses.clipped_policy_loss(x, EXCLUDED, w, MASK, 0.2),
    "policy gradient": lambda x, w: losses.policy_gradient_loss(x, w, MASK),
}


@pytest.mark.parametrize("name", OF_EXCLUDED)
def test_a_token_of_weight_0_that_both_policies_exclude_counts_0_and_without_a_weight_it_shows(name):
    of_logits = lambda x, w: OF_EXCLUDED[name](losses.token_log_probs(x, jnp.array([0, 1])), w)  # noqa: E731
    logits = jnp.array([[-INF, 0.0, 0.0], [0.0, 0.5, 0.0]])
    value, gradient = jax.value_and_grad(of_logits)(logits, jnp.array([0.0, 1.0]))
    allowed = of_logits(logits.at[0].set(0.0), jnp.array([0.0, 1.0]))
    assert value == allowed
    assert not gradient[0].any()
    assert np.isfinite(gradient).all()
    assert np.abs(gradient[1]).max() > 0
    assert not np.isfinite(of_logits(logits, jnp.ones(2)))


@pytest.mark.parametrize("value", [*FAR, NAN])
def test_weights_of_0_take_out_any_kl_that_is_given(value):
    kl, weights = jnp.array([value, 2.0]), jnp.array([0.0, 1.0])
    for loss in (lambda x: losses.weighted_kl(x, weights, MASK), lambda x: losses.prioritized_kl(x, weights, 9, MASK)):
        chex.assert_trees_all_equal(jax.value_and_grad(loss)(kl), (jnp.float32(1), jnp.array([0.0, 0.5])))


@pytest.mark.parametrize(("kind", "log_ratio"), [("k3", -90.0), ("k3", -INF), ("k2", -INF), ("k1", INF), ("k2", 1e30)])
def test_what_overflows_with_a_weight_is_infinite(kind, log_ratio):
    found = losses.weighted_kl(losses.kl_estimate(jnp.array([log_ratio, 0.0]), jnp.zeros(2), kind), jnp.ones(2), MASK)
    assert found == INF


def test_the_ratio_of_an_action_that_the_advantage_pushes_away_overflows_and_the_clipped_one_does_not():
    def loss(advantage):
        return ratio_losses.clipped_policy_loss(
            jnp.zeros(1), jnp.full(1, -200.0), jnp.full(1, advantage), MASK[:1], 0.2
        )

    assert loss(-1.0) == INF
    np.testing.assert_allclose(loss(1.0), -1.2, rtol=1e-6)
    gradient = jax.grad(ratio_losses.clipped_policy_loss)(jnp.zeros(1), jnp.full(1, -200.0), jnp.ones(1), MASK[:1], 0.2)
    assert gradient == 0


@pytest.mark.parametrize("log_ratio", [-69.0, -30.0, -3.0, -1e-3, 1e-6, 0.0, 0.5, 20.0, 300.0])
def test_finite_values_and_derivatives_are_exact(log_ratio):
    d = np.float64(np.float32(log_ratio))
    expected = {"k1": (d, 1.0), "k2": (d**2 / 2, d), "k3": (np.expm1(-d) + d, -np.expm1(-d))}
    for kind, (value, slope) in expected.items():
        found = jax.value_and_grad(lambda x, kind=kind: losses.kl_estimate(x, jnp.float32(0), kind))(jnp.float32(d))
        np.testing.assert_allclose(found, (value, slope), rtol=2e-6, atol=1e-9, err_msg=kind)
    if log_ratio < 69:
        np.testing.assert_allclose(jax.value_and_grad(overflow.exp)(jnp.float32(d)), np.exp((d, d)), rtol=2e-6)
    second = jax.grad(jax.grad(overflow.k3))(jnp.float32(d))
    np.testing.assert_allclose(second, np.exp(-d), rtol=1e-5, atol=1e-7)


def test_forward_mode_has_the_same_derivatives():
    x = jnp.array([-3.0, 0.5, 2.0])
    for function in (overflow.exp, overflow.k3, lambda x: overflow.product(x, x + 1)):
        np.testing.assert_allclose(
            jax.jacfwd(function)(x), jax.jacrev(function)(x), rtol=1e-6, err_msg=function.__class__.__name__
        )


@pytest.mark.parametrize("beta", [0.0, 1e-3, 1.0, 150.0, 1e9])
@pytest.mark.parametrize("off", [0.0, 1e-7, 1e-6])
def test_rounding_beyond_0_and_1_is_no_certainty(beta, off):
    sure = jnp.array([[1.0 + off, -off]])
    found = token_weights.prioritized(sure, beta, jnp.ones((1, 2), bool))
    np.testing.assert_array_equal(found, [[1.0, 1.0 if beta == 0 else 0.0]])


def test_weights_have_no_gradient_where_the_power_has_an_infinite_one():
    for sure, beta in itertools.product((0.0, 1.0), (0.0, 0.5, 150.0)):
        call = lambda sure, beta: token_weights.prioritized(sure, beta, jnp.ones((1, 1), bool)).sum()  # noqa: E731
        gradients = jax.grad(call, argnums=(0, 1))(jnp.full((1, 1), sure), jnp.float32(beta))
        chex.assert_trees_all_equal(gradients, (jnp.zeros((1, 1)), jnp.float32(0)))


@pytest.mark.parametrize("dtype", [bool, np.int32, np.uint8, np.float32, jnp.bfloat16])
def test_masks_of_zeros_and_ones_are_masks_of_any_type(dtype):
    mask = jnp.array([1, 0, 1]).astype(dtype)
    assert losses.masked_mean(jnp.array([1.0, NAN, 3.0]), mask) == 2.0
    assert losses.weighted_kl(jnp.array([1.0, NAN, 3.0]), jnp.ones(3), mask) == 2.0


@pytest.mark.parametrize("other", [0.5, 1e-3, 2.0, -1.0, NAN])
def test_a_mask_of_other_numbers_is_refused_and_not_rounded(other):
    mask, x = jnp.array([[1.0, other]]), jnp.ones((1, 2))
    for call in (
        lambda: losses.masked_mean(x, mask),
        lambda: losses.prioritized_kl(x, x, 1.0, mask),
        lambda: losses.entropy(jnp.ones((1, 2, 3)), mask=mask),
        lambda: token_weights.uniform(mask),
        lambda: token_weights.threshold(x, mask, 0.5),
    ):
        with pytest.raises(ConfigError, match=r"^mask: got .*, allowed is booleans, or 0 and 1 alone"):
            call()


@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (2, 3)])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_temperature_and_beta_are_one_number_and_not_broadcast_over_the_vocabulary(shape, jit):
    logits, several = jnp.ones((2, 3)), jnp.ones(shape)
    wrap = jax.jit if jit else (lambda call: call)
    for name, call in (
        ("temperature", lambda t: losses.entropy(logits, t)),
        ("temperature", lambda t: losses.exact_kl(logits, logits, t)),
        ("temperature", lambda t: certainty(logits, temperature=t)),
        ("beta", lambda beta: losses.prioritized_kl(logits, logits, beta, logits > 0)),
    ):
        with pytest.raises(ConfigError, match=f"^{name}: got"):
            wrap(call)(several)


# The loss of every recipe on made-up outputs of a policy: their score is a stub that gives what it gets.
SHAPE, VOCABULARY, WIDTH = (4, 6), 41, 16
LENGTHS = np.array([6, 4, 1, 3])
PADDING = ~(np.arange(6) < LENGTHS[:, None])
HYPER = Hyper(jnp.uint32(0), jnp.float32(1e-3), jnp.float32(2.0), jnp.float32(1.0), jnp.int32(0))
ALGORITHMS = ("a2c", "reinforce", "ppo", "grpo")
# What stands on the padding: log-ratios of -200 and 200 to the reference and to the rollout, and no numbers.
GARBAGE = {
    "-200": (-200.0, 0.0),
    "200": (0.0, -200.0),
    "infinity": (INF, INF),
    "minus infinity": (-INF, -INF),
    "NaN": (NAN, NAN),
    "the reference alone": (0.0, NAN),
    "the policy alone": (NAN, 0.0),
}


def made_up():
    """The policy's outputs and the episodes, without garbage."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    tokens = jnp.asarray(rng.integers(1, VOCABULARY, (4, 9)), jnp.int32)
    positions, segments = jnp.broadcast_to(jnp.arange(9), (4, 9)), jnp.ones((4, 9), jnp.int32)
    trajectory = Trajectory(tokens, positions, segments, draw(*SHAPE) - 3, jnp.asarray(~PADDING), jnp.ones(4))
    per_token = draw(*SHAPE), draw(*SHAPE), jnp.abs(draw(*SHAPE))
    held = jnp.asarray(rng.random(SHAPE) < 0.5)
    episodes = Episodes(trajectory, draw(*SHAPE, VOCABULARY), per_token[2], *per_token, held, ~held, per_token[2])
    return (draw(*SHAPE, VOCABULARY), draw(*SHAPE, WIDTH)), episodes


def spoiled(outputs, episodes, of_policy, of_reference):
    """The same with ``of_policy`` and ``of_reference`` on the padding: a logit of the token that stands there."""
    chosen = jax.nn.one_hot(episodes.trajectory.answers_BxT, VOCABULARY, dtype=bool)
    logits = lambda x, value: jnp.where(PADDING[..., None] & chosen, value, x)  # noqa: E731
    garbage = lambda x, value: jnp.where(PADDING.reshape(*SHAPE, *[1] * (x.ndim - 2)), value, x)  # noqa: E731
    either = of_policy if of_policy != 0 else of_reference
    trajectory = episodes.trajectory._replace(log_probs_BxT=garbage(episodes.trajectory.log_probs_BxT, of_reference))
    others = ("certainty_BxT", "advantages_BxT", "returns_BxT", "kl_weights_BxT", "signed_entropy_BxT")
    per_token = {name: garbage(getattr(episodes, name), either) for name in others}
    return (logits(outputs[0], of_policy), garbage(outputs[1], of_policy)), episodes._replace(
        trajectory=trajectory,
        ref_logits_BxTxV=logits(episodes.ref_logits_BxTxV, of_reference),
        in_kl_cov_BxT=episodes.in_kl_cov_BxT | PADDING,
        in_lp_reg_BxT=episodes.in_lp_reg_BxT | PADDING,
        **per_token,
    )


def as_transitions(outputs, episodes):
    """All tokens as transitions, and one filler for each token of the padding."""
    rows, steps = (x.reshape(-1) for x in np.indices(SHAPE))
    indices = Indices(*map(jnp.asarray, (rows, steps, np.where(PADDING.reshape(-1), 0, 3 + steps))))
    return tuple(x[rows, steps][:, None] for x in outputs), cut(episodes, indices, 9)


@pytest.mark.parametrize("minibatch", ["episodes", "transitions"])
@pytest.mark.parametrize("kl", [*KINDS, "exact"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_padding_changes_neither_loss_nor_gradient_of_any_recipe(monkeypatch, small_model, algorithm, kl, minibatch):
    monkeypatch.setattr(objective, "score", lambda model, outputs, trajectory: outputs)
    terms_of_few = {"kl_cov": 1.0, "lp_reg": 1.0}
    options = {"episodes": 4, "minibatch_episodes": 2, "group_size": 2, **terms_of_few}
    config = FinetuneConfig(algorithm=algorithm, kl=kl, **options)
    program = make_program(dataclasses.replace(config, extra_length=0), Model(small_model, 1, {}))
    value = jax.tree.map(lambda x: x + 0.1, init_run(program, {}, HYPER).params["value"])
    shape = as_transitions if minibatch == "transitions" else lambda *x: x

    @jax.jit
    def found(outputs, episodes):
        outputs, episodes = shape(outputs, episodes)
        return objective.loss_gradient(program, HYPER, {"policy": outputs, "value": value}, episodes)

    expected = gradient, terms = found(*made_up())
    chex.assert_tree_all_finite(expected)
    assert set(terms) == {"policy", "entropy", "kl", *terms_of_few} | ({"value"} if config.has_critic else set())
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient["policy"][0]))
    for name, garbage in GARBAGE.items():
        chex.assert_trees_all_equal(found(*spoiled(*made_up(), *garbage)), expected, custom_message=name)


def test_a_norm_that_overflows_leaves_those_of_the_other_terms(monkeypatch, small_model):
    """And a coefficient of 0 takes the term out."""
    monkeypatch.setattr(objective, "score", lambda model, outputs, trajectory: outputs)
    config = FinetuneConfig(episodes=4, minibatch_episodes=4, kl="k3", extra_length=0, diagnostic_episodes=4)
    program = make_program(config, Model(small_model, 1, {}))
    value = init_run(program, {}, HYPER).params["value"]
    outputs, episodes = made_up()
    first = episodes.trajectory.answers_BxT[0, 0]
    far = outputs[0].at[0, 0].set(jnp.where(jnp.arange(VOCABULARY) == first, -200.0, 0.0)), outputs[1]

    def norms(coefficient, outputs):
        hyper = HYPER._replace(kl_coefficient=jnp.float32(coefficient))
        params = {"policy": outputs, "value": value}
        terms = objective.loss_terms(program, hyper, params, episodes)
        return objective.gradient_norms(program, hyper, params, episodes) | terms

    found = jax.jit(norms)(2.0, far)
    assert {name for name, value in found.items() if not np.isfinite(value)} == {"grad_norm/kl", "kl"}
    found = jax.jit(norms)(0.0, far)
    chex.assert_tree_all_finite(found)
    assert operator.itemgetter("kl", "grad_norm/kl")(found) == (0, 0)
