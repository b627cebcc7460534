"""Every algorithm, KL and shaping of the advantage: one real update of each, and which combinations are refused."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from policies import TWO, untrained

from ckl_jax import losses, token_weights, truncation
from ckl_jax.checkpoint.store import Model
from ckl_jax.config import FinetuneConfig
from ckl_jax.errors import ConfigError
from ckl_jax.presets import finetune_preset
from ckl_jax.rl import assessment, objective
from ckl_jax.rl.assessment import Episodes, assessed, corrected
from ckl_jax.rl.objective import loss_gradient, loss_terms, term_names
from ckl_jax.rl.program import Hyper, Program, draw_problems, make_program, make_runs
from ckl_jax.rl.updates import init_run, train_rounds, update
from ckl_jax.rollout.trajectory import Trajectory, score
from ckl_jax.runtime import finite
from ckl_jax.runtime.sharding import make_mesh
from ckl_jax.tasks.columns import ADDITION
from experiments.regularizers.methods import BY_NAME

CONFIG = FinetuneConfig(
    episodes=8,
    minibatch_episodes=4,
    minibatch_transitions=16,
    extra_length=0,
    rounds=2,
    test_every=1,
    learning_rate=1e-3,
    kl_coefficient=2.0,
    beta=1.0,
    diagnostic_episodes=2,
    entropy_quantile=0.3,
    kl_cov_share=0.3,
    lp_reg_share=0.3,
    normalize_advantages=False,
    rollout="plain",
)
HYPER = Hyper(jnp.uint32(0), jnp.float32(1e-3), jnp.float32(2.0), jnp.float32(1.0), jnp.int32(0))
UNIFORM = HYPER._replace(kl_weights=jnp.int32(token_weights.index_of("uniform")))
PAIRS = {"group_size": 2}
ALONE = {"episodes": 1, "minibatch_episodes": 1, "diagnostic_episodes": 1}
ONE_UPDATE = {"minibatch_episodes": 8}
OPTIONS = {
    "reinforce": {"algorithm": "reinforce", "normalize_advantages": True},
    "rloo": {"algorithm": "rloo", **PAIRS},
    "grpo": {"algorithm": "grpo", **PAIRS, "epochs": 2},
    "ppo": {"algorithm": "ppo", "epochs": 2, "clip": 0.05},
    "ppo, k1": {"algorithm": "ppo", "kl": "k1"},
    "ppo, k2": {"algorithm": "ppo", "kl": "k2"},
    "ppo, k3": {"algorithm": "ppo", "kl": "k3"},
    "a2c, k3": {"kl": "k3"},
    "a2c, k3, transitions": {"kl": "k3", "minibatch": "transitions"},
    "grpo, gtpo": {"algorithm": "grpo", **PAIRS, "advantage_shaping": "gtpo"},
    "rloo, gtpo": {"algorithm": "rloo", **PAIRS, "advantage_shaping": "gtpo"},
    "top_entropy": {"advantage_shaping": "top_entropy"},
    "entropy_bonus": {"advantage_shaping": "entropy_bonus"},
    "KL-Cov": {"kl_cov": 1.0},
    "grpo, KL-Cov": {"algorithm": "grpo", **PAIRS, "kl_cov": 1.0},
    "KL in the reward": {"kl_in": "reward", "kl": "k1"},
    "rloo, KL in the reward": {"algorithm": "rloo", **PAIRS, "kl_in": "reward", "kl": "k1"},
    "a2c, k1, corrected": {"kl": "k1", "kl_correction": "ratio"},
    "rloo, k3, corrected": {"algorithm": "rloo", **PAIRS, "kl": "k3", "kl_correction": "ratio"},
    "ppo, gate": {"algorithm": "ppo", "epochs": 2, "clip": 0.01, "kl_gate": "clip"},
    "grpo, k3, gate": {"algorithm": "grpo", **PAIRS, "epochs": 2, "kl": "k3", "kl_gate": "clip"},
    "ppo, transitions, gate": {"algorithm": "ppo", "minibatch": "transitions", "kl_gate": "clip"},
    "clamped log-probs": {"clamp_log_probs": True, "kl": "k2"},
    "KL in the advantage": {"kl_in": "advantage", "kl": "k1"},
    "grpo, k3 in the advantage": {"algorithm": "grpo", **PAIRS, "kl_in": "advantage", "kl": "k3"},
    "entropy of the top": {"entropy_over": "top", "entropy_top": 3},
    "entropy of the nucleus": {"entropy_over": "nucleus", "entropy_nucleus": 0.5},
    "grpo, KL of the episode": {"algorithm": "grpo", **PAIRS, "kl_in": "episode"},
    "rloo, KL of the episode": {"algorithm": "rloo", **PAIRS, "kl_in": "episode", "normalize_advantages": True},
    "ppo, by entropy": {"algorithm": "ppo", "epochs": 2, "clip_by": "entropy"},
    "grpo, by entropy": {"algorithm": "grpo", **PAIRS, "clip_by": "entropy", "kl_gate": "clip", "lp_reg": 1.0},
    "ppo, transitions, by entropy": {"algorithm": "ppo", "minibatch": "transitions", "clip_by": "entropy"},
    "Lp-Reg": {"lp_reg": 1.0},
    "grpo, Lp-Reg": {"algorithm": "grpo", **PAIRS, "epochs": 2, "clip": 0.01, "lp_reg": 1.0},
    "grpo, transitions, Lp-Reg": {"algorithm": "grpo", **PAIRS, "minibatch": "transitions", "lp_reg": 1.0},
    "grpo, transitions": {"algorithm": "grpo", **PAIRS, "minibatch": "transitions", "kl": "k2"},
    "ppo, transitions, KL-Cov": {"algorithm": "ppo", "minibatch": "transitions", "kl_cov": 1.0},
}


@pytest.fixture(scope="module")
def model(small_model):
    return Model(small_model, 1, untrained(small_model, contrast=10))


@pytest.fixture(scope="module")
def moved(model):
    """A state whose policy has left the reference and whose critic has opinions."""
    state = init_run(make_program(CONFIG, model), model.params, HYPER)
    policy = jax.tree.map(jnp.copy, state.params["policy"])
    policy["params"]["wpe"]["embedding"] += 0.1 * jax.random.normal(jax.random.key(1), (400, 16))
    value = jax.tree.map(lambda x: x + 0.1, state.params["value"])
    return state._replace(params={"policy": policy, "value": value})


@pytest.fixture(scope="module")
def answers(model, moved):
    """Eight hand-made episodes, every other right: the trajectory, its critical tokens, the policy's and the
    reference's logits, values."""
    rng = np.random.default_rng(0)
    tokens_BxL = jnp.asarray(rng.integers(0, 41, (8, 20)), jnp.int32)
    lengths_B = np.array([12, 5, 9, 13, 3, 8, 13, 6])
    mask_BxT = jnp.asarray(np.arange(13) < lengths_B[:, None])
    positions_BxL = jnp.broadcast_to(jnp.arange(20), (8, 20))
    right_B = jnp.asarray([1.0, 0.0] * 4)
    blank = Trajectory(tokens_BxL, positions_BxL, jnp.ones((8, 20), jnp.int32), jnp.zeros((8, 13)), mask_BxT, right_B)
    logits, ref_logits = (score(model.config, p, blank)[0] for p in (moved.params["policy"], model.params))
    log_probs_BxT = losses.token_log_probs(logits, blank.answers_BxT, mask=mask_BxT)
    values_BxT = jnp.asarray(rng.normal(size=(8, 13)), jnp.float32)
    places = tuple(jnp.asarray(rng.random((2, 8, 13)) < 0.2))
    return blank._replace(log_probs_BxT=log_probs_BxT), places, logits, ref_logits, values_BxT


@functools.partial(jax.jit, static_argnums=0)
def _assessed(config, answers, hyper=HYPER):
    trajectory, places, logits, ref_logits, values_BxT = answers
    return assessed(
        config,
        trajectory,
        hyper,
        jax.random.key(4),
        logits_BxTxV=logits,
        ref_logits_BxTxV=ref_logits,
        sure_logits_BxTxV=ref_logits,
        values_BxT=values_BxT,
        critical_BxT=places[0],
        overlong_BxT=places[1],
    )


@functools.partial(jax.jit, static_argnums=0)
def _terms(program, params, episodes):
    return loss_terms(program, HYPER, params, episodes)


@functools.partial(jax.jit, static_argnums=0)
def _updated(program, state, episodes):
    return update(program, HYPER, state, episodes, jax.random.key(3))


def _spoiled(episodes, garbage):
    """With ``garbage`` on the padding: for the reference a logit of the token that stands there."""
    mask_BxT, answers_BxT = episodes.trajectory.mask_BxT, episodes.trajectory.answers_BxT
    chosen_BxTxV = jax.nn.one_hot(answers_BxT, 41, dtype=bool) & ~mask_BxT[..., None]
    of_tokens = {
        name: jnp.where(mask_BxT, getattr(episodes, name), garbage)
        for name in ("certainty_BxT", "advantages_BxT", "returns_BxT", "kl_weights_BxT", "signed_entropy_BxT")
    }
    old_log_probs_BxT = jnp.where(mask_BxT, episodes.trajectory.log_probs_BxT, garbage)
    return episodes._replace(
        trajectory=episodes.trajectory._replace(log_probs_BxT=old_log_probs_BxT),
        ref_logits_BxTxV=jnp.where(chosen_BxTxV, garbage, episodes.ref_logits_BxTxV),
        **of_tokens,
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_a_real_update_of_every_option_moves_the_policy_and_is_finite(model, moved, answers, name):
    config = dataclasses.replace(CONFIG, **OPTIONS[name])
    program = make_program(config, model)
    episodes = _assessed(config, answers)
    plain = _assessed(CONFIG, answers)
    mask = np.asarray(episodes.trajectory.mask_BxT)
    assert (np.asarray(episodes.advantages_BxT)[~mask] == 0).all()
    credited = {"algorithm", "advantage_shaping", "kl_in"} & OPTIONS[name].keys() and "ppo" not in name
    same = np.allclose(episodes.advantages_BxT, plain.advantages_BxT)
    assert same != bool(credited)
    state, metrics = _updated(program, moved, episodes)
    chex.assert_tree_all_finite((state, metrics))
    for garbage in (np.nan, np.inf, -200.0, 200.0):
        chex.assert_trees_all_equal(_updated(program, moved, _spoiled(episodes, garbage)), (state, metrics))
    assert {key for key in metrics if key.startswith("loss/")} == {f"loss/{term}" for term in term_names(config)}
    change = jax.tree.map(lambda new, old: new - old, state.params, moved.params)
    assert optax.tree.norm(change["policy"]) > 1e-3
    assert (optax.tree.norm(change["value"]) > 1e-3) == config.has_critic
    if config.lp_reg > 0:
        assert metrics["loss/lp_reg"] > 0
    if config.kl_cov > 0:  # The second minibatch starts where the first has left the rollout's policy.
        assert metrics["loss/kl_cov"] > 0


def _first_token(values_BxT, value):
    return values_BxT.at[5, 0].set(value)


BLOWN_UP = {
    # A ratio of e^200 whose advantage pushes it further, and one of an estimate of the KL.
    "loss/policy": lambda hyper, e, old: (
        hyper._replace(kl_coefficient=jnp.float32(0)),
        old(-200.0)._replace(advantages_BxT=_first_token(e.advantages_BxT, -1.0)),
    ),
    "loss/kl": lambda hyper, e, old: (
        hyper,
        old(-200.0)._replace(advantages_BxT=_first_token(e.advantages_BxT, 1.0)),
    ),
    "loss/value": lambda hyper, e, old: (hyper, e._replace(returns_BxT=_first_token(e.returns_BxT, 1e30))),
    # The loss still fits into float32, the square of its gradient does not.
    "grad_norm": lambda hyper, e, old: (hyper, e._replace(advantages_BxT=_first_token(e.advantages_BxT, 1e38))),
    "param_norm": lambda hyper, e, old: (hyper._replace(learning_rate=jnp.float32(1e30)), e),
}


@pytest.mark.parametrize("minibatch", ["episodes", "transitions"])
def test_what_is_not_finite_first_is_named_and_not_what_it_spoils(model, moved, answers, minibatch):
    """By the next minibatch everything is NaN."""
    config = dataclasses.replace(CONFIG, algorithm="ppo", kl="k2", epochs=2, minibatch=minibatch, adam_epsilon=1e-30)
    program, plain = make_program(config, model), _assessed(config, answers)
    log_probs_BxT = plain.trajectory.log_probs_BxT

    def old(log_ratio):
        of_first = _first_token(log_probs_BxT, log_probs_BxT[5, 0] + log_ratio)
        return plain._replace(trajectory=plain.trajectory._replace(log_probs_BxT=of_first))

    updated = jax.jit(lambda hyper, episodes: update(program, hyper, moved, episodes, jax.random.key(3))[1])
    finite.require_metrics("round", 0, ["run"], jax.tree.map(lambda x: x[None, None], updated(HYPER, plain)))
    for name, blow_up in BLOWN_UP.items():
        metrics = updated(*blow_up(HYPER, plain, old))
        with pytest.raises(finite.NotFiniteError, match=f"^round 1 of run: {name} is "):
            finite.require_metrics("round", 0, ["run"], jax.tree.map(lambda x: x[None, None], metrics))


def test_right_answers_gain_and_wrong_ones_lose_without_a_critic(answers):
    for name in ("reinforce", "rloo", "grpo", "grpo, gtpo"):
        config = dataclasses.replace(CONFIG, **OPTIONS[name])
        episodes = _assessed(config, answers)
        total_B = episodes.advantages_BxT.sum(axis=1)
        assert (np.sign(total_B) == [1, -1] * 4).all(), name
        returns = np.where(episodes.trajectory.mask_BxT, np.array([1.0, 0.0] * 4)[:, None], 0.0)
        np.testing.assert_array_equal(episodes.returns_BxT, returns)


def test_the_kl_in_the_reward_is_not_rescaled_by_normalized_advantages(answers):
    """Its share of the advantage is alpha times the weighted KL to go, whatever the rewards' spread is."""
    change = {"kl_in": "reward", "kl": "k1"}
    for normalize in (True, False):
        config = dataclasses.replace(CONFIG, normalize_advantages=normalize)
        without = _assessed(config, answers)
        found = _assessed(dataclasses.replace(config, **change), answers)
        difference = found.advantages_BxT - without.advantages_BxT
        trajectory, _, _, ref_logits, _ = answers
        ref_log_probs = losses.token_log_probs(ref_logits, trajectory.answers_BxT)
        k1 = np.where(trajectory.mask_BxT, trajectory.log_probs_BxT - ref_log_probs, 0.0)
        to_go = np.cumsum((found.kl_weights_BxT * k1)[:, ::-1], axis=1)[:, ::-1]
        mask = np.asarray(trajectory.mask_BxT)
        centered = np.zeros_like(to_go)
        for b, t in np.argwhere(mask):
            others = [to_go[c, t] for c in range(8) if c != b and mask[c, t]]
            centered[b, t] = to_go[b, t] - (np.mean(others) if others else 0.0)
        np.testing.assert_allclose(difference, -2.0 * centered, atol=1e-4)


@pytest.mark.parametrize("algorithm", ["a2c", "ppo"])
def test_the_advantage_with_a_critic_is_gae_of_a_reward_at_the_last_token(answers, algorithm):
    """By a plain loop from every token's end backwards; then less its mean and over its deviation over all tokens."""
    rewards = {"reward_right": 2.0, "reward_wrong": -1.0}
    config = dataclasses.replace(CONFIG, algorithm=algorithm, discount=0.9, gae_lambda=0.8, **rewards)
    trajectory, *_, values_BxT = answers
    mask_BxT, values_BxT = np.asarray(trajectory.mask_BxT), np.asarray(values_BxT, np.float64)
    expected_BxT = np.zeros(mask_BxT.shape)
    for b, length in enumerate(mask_BxT.sum(axis=1)):
        ahead, following = 0.0, 0.0
        for t in reversed(range(length)):
            reward = 0.0 if t < length - 1 else (2.0 if b % 2 == 0 else -1.0)
            ahead = reward + 0.9 * following - values_BxT[b, t] + 0.9 * 0.8 * ahead
            expected_BxT[b, t], following = ahead, values_BxT[b, t]
    found = _assessed(config, answers)
    np.testing.assert_allclose(found.advantages_BxT, expected_BxT, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.returns_BxT[mask_BxT], (expected_BxT + values_BxT)[mask_BxT], rtol=1e-4, atol=1e-5)
    of_mask = expected_BxT[mask_BxT]
    normalized = _assessed(dataclasses.replace(config, normalize_advantages=True), answers)
    standard = (of_mask - of_mask.mean()) / of_mask.std()
    np.testing.assert_allclose(normalized.advantages_BxT[mask_BxT], standard, rtol=1e-3, atol=1e-4)


def test_clamped_log_probs_bound_every_loss_of_a_token_that_the_reference_excludes(model, moved, answers):
    """Every token of the answers has a log-prob of about -100 for the reference, hence -15.942385."""
    trajectory, critical, logits, ref_logits, values = answers
    ref_logits -= 100.0 * jax.nn.one_hot(trajectory.answers_BxT, 41)
    excluded, mask = (trajectory, critical, logits, ref_logits, values), np.asarray(trajectory.mask_BxT)
    floored = trajectory.log_probs_BxT + 15.942385

    def kl_of(**options):
        config = dataclasses.replace(CONFIG, kl="k2", **options)
        return _terms(make_program(config, model), moved.params, _assessed(config, excluded, UNIFORM))["kl"]

    expected = 2.0 * np.mean(0.5 * np.square(floored)[mask])
    np.testing.assert_allclose(kl_of(clamp_log_probs=True), expected, rtol=1e-4)
    assert kl_of() > 20 * expected
    reward = dataclasses.replace(CONFIG, kl="k1", kl_in="reward", clamp_log_probs=True)
    found = np.asarray(_assessed(reward, excluded).advantages_BxT)
    assert np.abs(found).max() < 2.0 * 13 * 16
    rare = (trajectory._replace(log_probs_BxT=trajectory.log_probs_BxT - 50.0), *excluded[1:])
    old_log_probs = _assessed(reward, rare).trajectory.log_probs_BxT
    np.testing.assert_allclose(old_log_probs[mask], -15.942385, rtol=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k3"])
@pytest.mark.parametrize("weights", ["uniform", "prioritized"])
def test_the_kl_in_the_advantage_is_the_weighted_log_ratio_of_a_token_and_the_kl_of_all_after_it(
    answers, kind, weights
):
    """By a plain loop; the normalization of the outcome's advantage does not rescale it."""
    trajectory, _, _, ref_logits, _ = answers
    hyper = UNIFORM if weights == "uniform" else HYPER
    config = dataclasses.replace(CONFIG, normalize_advantages=True)
    without = _assessed(config, answers, hyper)
    found = _assessed(dataclasses.replace(config, kl_in="advantage", kl=kind), answers, hyper)
    mask, w = np.asarray(trajectory.mask_BxT), np.asarray(found.kl_weights_BxT)
    k1 = np.asarray(trajectory.log_probs_BxT - losses.token_log_probs(ref_logits, trajectory.answers_BxT))
    later = k1 if kind == "k1" else np.exp(-k1) - 1 + k1
    expected = np.zeros_like(k1)
    for b, t in np.argwhere(mask):
        end = mask[b].sum()
        expected[b, t] = -2.0 * (w[b, t] * k1[b, t] + (w[b, t + 1 : end] * later[b, t + 1 : end]).sum())
    np.testing.assert_allclose(found.advantages_BxT - without.advantages_BxT, expected, rtol=1e-4, atol=1e-5)
    assert (w[mask] < 1).any() == (weights == "prioritized")


def test_the_kl_of_an_episode_is_its_mean_weighted_exact_kl_against_the_other_answers(answers):
    """By a plain loop over pairs, of which the first answer is right and the second wrong."""
    trajectory, _, logits, ref_logits, _ = answers
    config = dataclasses.replace(CONFIG, algorithm="grpo", group_size=2, kl_in="episode")
    found = _assessed(config, answers)
    mask, w = np.asarray(trajectory.mask_BxT), np.asarray(found.kl_weights_BxT)
    p, q = (np.asarray(jax.nn.log_softmax(x), np.float64) for x in (logits, ref_logits))
    kl = (w * (np.exp(p) * (p - q)).sum(axis=-1) * mask).sum(axis=1) / mask.sum(axis=1)
    for first in range(0, 8, 2):
        more = 2.0 * (kl[first] - kl[first + 1]) / 2
        for row, expected in ((first, 1 - more), (first + 1, -1 + more)):
            np.testing.assert_allclose(found.advantages_BxT[row], np.where(mask[row], expected, 0.0), rtol=1e-4)
    assert "kl" not in term_names(config)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_a_corrected_estimate_is_multiplied_by_the_ratio_as_with_ppo(model, moved, answers, kind):
    """The rollout's policy gave every token half the probability that the updated one gives it: a ratio of 2."""
    trajectory, *rest = answers
    half = (trajectory._replace(log_probs_BxT=trajectory.log_probs_BxT - jnp.log(2.0)), *rest)

    def kl_of(**options):
        config = dataclasses.replace(CONFIG, kl=kind, **options)
        return _terms(make_program(config, model), moved.params, _assessed(config, half))["kl"]

    np.testing.assert_allclose(kl_of(kl_correction="ratio"), 2 * kl_of(), rtol=1e-5)
    np.testing.assert_allclose(kl_of(kl_correction="ratio"), kl_of(algorithm="ppo"), rtol=1e-6)
    np.testing.assert_allclose(kl_of(kl_correction="ratio", algorithm="ppo"), kl_of(algorithm="ppo"), rtol=1e-6)


def test_the_entropy_bonus_is_over_the_characters_that_its_words_name(model, moved, answers):
    trajectory, _, logits, _, _ = answers
    temperature, mask = 2.0, trajectory.mask_BxT

    def loss(**options):
        config = dataclasses.replace(CONFIG, entropy_coefficient=1.0, temperature=temperature, **options)
        return _terms(make_program(config, model), moved.params, _assessed(config, answers))["entropy"]

    sets = {
        "top": (truncation.top_tokens(logits, 3), {"entropy_top": 3}),
        "nucleus": (truncation.nucleus(logits, 0.5, temperature), {"entropy_nucleus": 0.5}),
    }
    for word, (inside, options) in sets.items():
        expected = -losses.masked_mean(truncation.entropy_within(logits, inside, temperature), mask)
        np.testing.assert_allclose(loss(entropy_over=word, **options), expected, rtol=1e-5)
    np.testing.assert_allclose(loss(entropy_over="nucleus", entropy_nucleus=1.0), loss(), rtol=1e-5)


@pytest.mark.parametrize("kl", ["exact", "k2"])
def test_a_gated_kl_leaves_out_the_tokens_whose_policy_gradient_the_clip_stops(model, moved, answers, kl):
    """The ratio is 2 everywhere: beyond the clip for the tokens of positive advantage."""
    trajectory, *rest = answers
    half = (trajectory._replace(log_probs_BxT=trajectory.log_probs_BxT - jnp.log(2.0)), *rest)
    config = dataclasses.replace(CONFIG, algorithm="ppo", kl=kl)
    episodes = _assessed(config, half)
    left_BxT = np.where(episodes.advantages_BxT > 0, 0.0, episodes.kl_weights_BxT)
    by_hand = _terms(make_program(config, model), moved.params, episodes._replace(kl_weights_BxT=jnp.asarray(left_BxT)))
    gated = _terms(make_program(dataclasses.replace(config, kl_gate="clip"), model), moved.params, episodes)
    plain = _terms(make_program(config, model), moved.params, episodes)
    np.testing.assert_allclose(gated["kl"], by_hand["kl"], rtol=1e-6)
    assert 0 < gated["kl"] < 0.9 * plain["kl"]
    assert gated["policy"] == plain["policy"]


def test_a_gated_kl_keeps_the_tokens_that_lp_reg_keeps_from_the_clip(model, moved, answers):
    """The ratio is a half everywhere: beyond the clip for the tokens of negative advantage."""
    trajectory, *rest = answers
    twice = (trajectory._replace(log_probs_BxT=trajectory.log_probs_BxT + jnp.log(2.0)), *rest)
    config = dataclasses.replace(CONFIG, algorithm="ppo", lp_reg=1.0, lp_reg_share=1.0, lp_reg_min_p=0.5)
    episodes = _assessed(config, twice)
    log_probs_BxT = losses.token_log_probs(answers[2], trajectory.answers_BxT, mask=trajectory.mask_BxT)
    proxy_BxT = truncation.proxy_log_probs(answers[2], trajectory.answers_BxT, 0.5, mask=trajectory.mask_BxT)
    stopped_BxT = (episodes.advantages_BxT < 0) & trajectory.mask_BxT
    pulled_BxT = stopped_BxT & (log_probs_BxT < proxy_BxT)
    assert 0 < pulled_BxT.sum() < stopped_BxT.sum()
    left_BxT = jnp.where(stopped_BxT & ~pulled_BxT, 0.0, episodes.kl_weights_BxT)
    by_hand = _terms(make_program(config, model), moved.params, episodes._replace(kl_weights_BxT=left_BxT))
    gated = _terms(make_program(dataclasses.replace(config, kl_gate="clip"), model), moved.params, episodes)
    np.testing.assert_allclose(gated["kl"], by_hand["kl"], rtol=1e-5)


def test_lp_reg_keeps_from_the_clip_all_that_is_no_noise_also_where_next_to_nothing_is(model, moved, answers):
    """Less than rounding shows: the proxy is the policy, and a ratio of a half is beyond the clip."""
    trajectory, *rest = answers
    twice = (trajectory._replace(log_probs_BxT=trajectory.log_probs_BxT + jnp.log(2.0)), *rest)
    config = dataclasses.replace(CONFIG, algorithm="ppo", lp_reg=1.0, lp_reg_share=1.0, lp_reg_min_p=1e-30)
    episodes = _assessed(config, twice)
    assert (episodes.advantages_BxT < 0)[trajectory.mask_BxT].sum() > 20
    plain, gated = (
        _terms(make_program(dataclasses.replace(config, kl_gate=gate), model), moved.params, episodes)
        for gate in ("none", "clip")
    )
    assert gated["kl"] == plain["kl"]
    np.testing.assert_allclose(gated["lp_reg"], 0.0, atol=1e-6)
    wide = dataclasses.replace(config, clip=0.9, lp_reg=0.0)
    assert plain["policy"] == _terms(make_program(wide, model), moved.params, episodes)["policy"]


def test_the_importance_of_a_clamped_log_prob_is_to_the_samplers_clamped_one(answers):
    """A token at -18 under both policies counts once, as at any other log-probability."""
    trajectory, *rest = answers
    rare = (trajectory._replace(log_probs_BxT=jnp.full((8, 13), -18.0)), *rest)
    lag = {"staleness": 1, "importance_sampling": "truncated"}
    for clamps in (False, True):
        config = dataclasses.replace(CONFIG, clamp_log_probs=clamps, **lag)
        _, metrics = corrected(config, _assessed(config, rare), jnp.full((8, 13), -18.0))
        assert metrics["importance"] == 1


def test_the_clip_by_entropy_is_that_of_the_rollouts_entropies(model, moved, answers):
    """All ratios are 1: the advantage of a token with h < 0 is A (1 + h), and no other changes."""
    config = dataclasses.replace(CONFIG, algorithm="ppo", clip_by="entropy", hapo_pivot=0.5)
    plain, found = _assessed(dataclasses.replace(config, clip_by="none"), answers), _assessed(config, answers)
    h_BxT, mask_BxT = np.asarray(found.signed_entropy_BxT), np.asarray(found.trajectory.mask_BxT)
    assert (h_BxT.min(), h_BxT.max()) == (-1, 1)
    assert not np.asarray(plain.signed_entropy_BxT).any()
    less_BxT = np.asarray(plain.advantages_BxT) * (1 + np.minimum(h_BxT, 0))
    terms = _terms(make_program(config, model), moved.params, found)
    np.testing.assert_allclose(terms["policy"], -less_BxT[mask_BxT].mean(), rtol=1e-4)


def test_ppo_clips_what_its_own_updates_have_changed(model, moved, answers):
    """Far from the rollout's policy the clipped loss has another gradient than the policy gradient."""
    trajectory, *rest = answers
    far = trajectory._replace(log_probs_BxT=trajectory.log_probs_BxT - 1.0)
    gradients = {}
    for algorithm in ("a2c", "ppo"):
        config = dataclasses.replace(CONFIG, algorithm=algorithm, value_coefficient=0.0)
        episodes = _assessed(config, (far, *rest))
        hyper = HYPER._replace(kl_coefficient=jnp.float32(0.0))
        gradient = jax.jit(loss_gradient, static_argnums=0)(make_program(config, model), hyper, moved.params, episodes)
        gradients[algorithm] = gradient[0]["policy"]
    ratio = optax.tree.norm(gradients["ppo"]) / optax.tree.norm(gradients["a2c"])
    assert abs(ratio - 1) > 0.05


KL_OF_TWO = np.log(1 / 2) / 4 + 3 * np.log(3 / 2) / 4
"""From TWO at temperature 2 to 1/2 and 1/2; at 1 it is 0.368 instead of 0.131."""


def _said(log_probs_BxT, right_B):
    """Answers that consist of token 1, without prompts."""
    log_probs_BxT = jnp.asarray(log_probs_BxT, jnp.float32)
    ones = jnp.ones(log_probs_BxT.shape, jnp.int32)
    return Trajectory(ones, ones, ones, log_probs_BxT, ones > 0, jnp.array(right_B))


def test_the_entropy_bonus_has_its_scale_and_bound_and_the_entropy_at_the_runs_temperature():
    """A = 1, and H of 1/4 and 3/4 is 2 ln 2 - 3 ln 3 / 4 = 0.562335: a tenth of it, then a twentieth of A."""
    config = dataclasses.replace(CONFIG, advantage_shaping="entropy_bonus", temperature=2.0, entropy_scale=0.1)
    for kappa, expected in ((5.0, 1.0562335), (20.0, 1.05)):
        bounded = dataclasses.replace(config, entropy_kappa=kappa)
        found = assessment._shaped(bounded, jnp.ones((1, 1)), _said([[0.0]], [1.0]), TWO[None, None])
        np.testing.assert_allclose(found, [[expected]], rtol=1e-6)


def test_gtpo_with_a_share_of_0_deals_nothing_out():
    """Rewards 1, 1 and -1, whatever the entropies are: less 1/3, over the root of 8/9."""
    config = dataclasses.replace(
        CONFIG,
        episodes=6,
        minibatch_episodes=6,
        algorithm="grpo",
        group_size=3,
        advantage_shaping="gtpo",
        gtpo_share=0.0,
    )
    logits_BxTxV = jnp.stack([0 * TWO, TWO, TWO])[:, None]
    found = assessment._shaped(config, jnp.zeros((3, 1)), _said([[0.0]] * 3, [1.0, 1.0, 0.0]), logits_BxTxV)
    np.testing.assert_allclose(found[:, 0], [0.5**0.5, 0.5**0.5, -(2**0.5)], rtol=1e-5)


def test_floored_weights_have_the_weak_one_as_their_floor():
    config = dataclasses.replace(CONFIG, kl_weak=0.3, kl_quantile=0.7)
    hyper = HYPER._replace(kl_weights=token_weights.index_of("floored"))
    sure, ones = jnp.array([[0.0, 1.0]]), jnp.ones((1, 2), bool)
    tokens = token_weights.Tokens(sure, 1 - sure, ones, ones, ones)
    found = assessment.kl_weights(config, hyper, tokens, jax.random.key(0))
    np.testing.assert_allclose(found, [[0.3, 1.0]], rtol=1e-6)


def test_kl_cov_never_holds_a_token_of_negative_covariance():
    """A less its mean is 1, -1, 1 and -1, log pi less its mean 1, -1, -1 and 1."""
    config = dataclasses.replace(CONFIG, kl_cov=1.0, kl_cov_share=1.0)
    said = _said([[-1.0, -3.0, -3.0, -1.0]], [1.0])
    found = assessment._held_by_kl_cov(config, said, jnp.array([[1.0, -1.0, 1.0, -1.0]]))
    np.testing.assert_array_equal(found, [[True, True, False, False]])


def test_the_kl_in_the_advantage_is_to_the_reference_at_the_runs_temperature():
    """The policy gave the token 1/2, the reference 3/4."""
    config = dataclasses.replace(CONFIG, kl_in="advantage", kl="k1", temperature=2.0)
    said = _said([[np.log(0.5)]], [1.0])
    found = assessment._kl_in_advantage(config, said, TWO[None, None], jnp.ones((1, 1)))
    np.testing.assert_allclose(found, [[np.log(2 / 3)]], rtol=1e-5)


def test_the_kl_of_an_episode_is_at_the_runs_temperature():
    """The first of two answers has it, the second none: alpha = 2 times half of it between each and their mean."""
    config = dataclasses.replace(CONFIG, algorithm="grpo", **PAIRS, kl_in="episode", temperature=2.0)
    logits_BxTxV = jnp.stack([TWO, jnp.zeros(2)])[:, None]
    said = _said([[0.0], [0.0]], [1.0, 0.0])
    found = assessment._zero_centered(config, said, logits_BxTxV, jnp.zeros((2, 1, 2)), jnp.ones((2, 1)), HYPER)
    np.testing.assert_allclose(found[:, 0], [1 - KL_OF_TWO, KL_OF_TWO - 1], rtol=1e-5)


def _terms_of(monkeypatch, config, said, logits, advantages=0.0, h=0.0):
    """The loss of logits, against a reference of equal ones."""
    monkeypatch.setattr(objective, "score", lambda model, outputs, trajectory: outputs)
    shape = said.mask_BxT.shape
    zeros, everywhere = jnp.zeros(shape), jnp.ones(shape, bool)
    logits_BxTxV = jnp.broadcast_to(logits, (*shape, len(logits)))
    of_tokens = (
        zeros,
        zeros + jnp.asarray(advantages),
        zeros,
        zeros + 1,
        everywhere,
        everywhere,
        zeros + jnp.asarray(h),
    )
    episodes = Episodes(said, jnp.zeros_like(logits_BxTxV), *of_tokens)
    params = {"policy": (logits_BxTxV, zeros[..., None]), "value": {}}
    return objective.loss_terms(Program(None, config, 1, ADDITION), HYPER, params, episodes)


def test_the_clip_and_the_advantage_of_hapo_have_their_own_strengths(monkeypatch):
    """Ratios of 1.5, beyond a clip of 0.2 that h does not widen: 1.2 times 1 + h / 2 where h = 1, 1.2 where h = -1."""
    config = dataclasses.replace(
        CONFIG, algorithm="grpo", **PAIRS, clip=0.2, clip_by="entropy", hapo_clip=0.0, hapo_advantage=0.5
    )
    said, h = _said([[np.log(0.5 / 1.5)] * 2], [1.0]), [[1.0, -1.0]]
    found = _terms_of(monkeypatch, config, said, jnp.zeros(2), advantages=1.0, h=h)
    np.testing.assert_allclose(found["policy"], -(1.8 + 1.2) / 2, rtol=1e-5)


def test_the_loss_has_its_kl_and_lp_reg_at_the_runs_temperature(monkeypatch):
    """Probabilities of 0.6, 0.3 and 0.1, of which the last is noise below 0.2 * 0.6, beside a third each.

    Token 1 has 1/3 without the noise; at temperature 1 it had less than 0.3.
    """
    options = {"lp_reg": 1.0, "lp_reg_min_p": 0.2, "temperature": 2.0}
    config = dataclasses.replace(CONFIG, algorithm="reinforce", **options)
    p_V = np.array([0.6, 0.3, 0.1])
    found = _terms_of(monkeypatch, config, _said([[np.log(0.3)]], [1.0]), jnp.asarray(2 * np.log(p_V), jnp.float32))
    np.testing.assert_allclose(found["kl"], 2.0 * (p_V * np.log(3 * p_V)).sum(), rtol=1e-5)
    np.testing.assert_allclose(found["lp_reg"], 1 / 0.9 - 1 + np.log(0.9), rtol=1e-3)


def _two_rounds(model, config):
    """The problems of a run's first two rounds, its states after them, and metrics."""
    program = make_program(config, model)
    runs, hypers = make_runs(config, {"run": {}}, 1)
    states = jax.vmap(functools.partial(init_run, program), in_axes=(None, 0))(model.params, hypers)
    drawn = [draw_problems(program, runs[0].seed, r) for r in range(2)]
    problems = jax.tree.map(lambda *of_rounds: jnp.stack(of_rounds)[None], *drawn)
    return drawn, *train_rounds(program, make_mesh(1, 8, data_devices=1), model.params, states, hypers, problems)


def test_a_whole_round_of_answers_in_groups_adapts_the_kl_coefficient(model):
    config = dataclasses.replace(
        CONFIG, algorithm="rloo", group_size=4, kl_in="reward", kl="k1", kl_target=0.5, kl_gain=1.0
    )
    drawn, states, metrics = _two_rounds(model, config)
    prompts = drawn[0].prompts_BxP.reshape(2, 4, -1)
    assert (prompts == prompts[:, :1]).all()
    assert (prompts[0, 0] != prompts[1, 0]).any()
    # The policy starts as the reference: a KL of 0, then little, both below the target.
    np.testing.assert_allclose(metrics["kl_coefficient"][0], [2.0, 2.0 * 0.8], rtol=1e-5)
    np.testing.assert_allclose(states.kl_coefficient, [2.0 * 0.8**2], rtol=1e-3)
    assert "loss/kl" not in metrics
    assert "explained_variance" not in metrics


def test_the_kl_coefficient_is_adapted_from_the_round_in_which_the_policy_first_learns(model):
    """Of two rounds that is the second; the KL is 0 in both, below the target."""
    _, states, metrics = _two_rounds(model, dataclasses.replace(CONFIG, value_warmup_rounds=1, kl_target=0.5))
    np.testing.assert_allclose(metrics["kl"][0], [0.0, 0.0], atol=1e-6)
    np.testing.assert_array_equal(metrics["kl_coefficient"][0], [2.0, 2.0])
    np.testing.assert_allclose(states.kl_coefficient, [2.0 * (1 - 0.2 * CONFIG.kl_gain)], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"algorithm": "trpo"}, "algorithm"),
        ({"algorithm": "grpo"}, "group_size"),
        ({"algorithm": "rloo", "group_size": 3}, "group_size"),
        ({"group_size": 0}, "group_size"),
        ({"advantage_shaping": "gtpo"}, "advantage_shaping"),
        ({"advantage_shaping": "top"}, "advantage_shaping"),
        ({"algorithm": "reinforce", "value_warmup_rounds": 1}, "value_warmup_rounds"),
        ({"rounds": 2, "test_every": 2, "value_warmup_rounds": 2}, "value_warmup_rounds"),
        ({"algorithm": "rloo", "group_size": 2, "discount": 0.9}, "discount"),
        ({"kl_in": "reward"}, "kl"),
        ({"kl_in": "episode"}, "kl_in"),
        ({"kl_in": "episode", "algorithm": "grpo", "group_size": 2, "kl": "k1"}, "kl"),
        (
            {"kl_in": "episode", "algorithm": "grpo", "group_size": 2, "advantage_shaping": "top_entropy"},
            "advantage_shaping",
        ),
        ({"kl_correction": "ratio"}, "kl_correction"),
        ({"kl_correction": "ratio", "kl": "k1", "kl_in": "reward"}, "kl_correction"),
        ({"kl_in": "critic"}, "kl_in"),
        ({"kl_in": "advantage"}, "kl"),
        ({"kl_in": "advantage", "kl": "k2"}, "kl"),
        ({"kl_in": "advantage", "kl": "k3", "kl_correction": "ratio"}, "kl_correction"),
        ({"kl_gate": "clip"}, "kl_gate"),
        ({"kl_gate": "clip", "algorithm": "rloo", "group_size": 2}, "kl_gate"),
        ({"kl_gate": "clip", "algorithm": "ppo", "kl": "k1", "kl_in": "reward"}, "kl_gate"),
        ({"kl_target": 0.0}, "kl_target"),
        ({"kl_target": 0.1, "kl_gain": 5.0}, "kl_gain"),
        ({"kl_target": 0.1, "kl_coefficient": 0.0}, "kl_coefficient"),
        ({"kl_weights": "inverted", "beta": 0.0}, "beta"),
        ({"clip": 0.0}, "clip"),
        ({"clip_by": "entropy"}, "clip_by"),
        ({"clip_by": "entropy", "algorithm": "rloo", "group_size": 2}, "clip_by"),
        ({"algorithm": "reinforce", **ALONE}, "episodes"),
        ({**ALONE, "normalize_advantages": True}, "episodes"),
        ({**ALONE, "normalize_advantages": True, "algorithm": "ppo"}, "episodes"),
        ({"reward_wrong": 1.0}, "reward_right"),
        ({"reward_right": 1 + 1e-9, "reward_wrong": 1.0}, "reward_right"),
        ({"hapo_pivot": 1.5}, "hapo_pivot"),
        ({"hapo_clip": -1.0}, "hapo_clip"),
        ({"hapo_advantage": 1.5}, "hapo_advantage"),
        ({"kl_cov": -1.0}, "kl_cov"),
        ({"kl_cov_share": 0.0}, "kl_cov_share"),
        ({"lp_reg": -1.0}, "lp_reg"),
        ({"lp_reg_share": 0.0}, "lp_reg_share"),
        ({"lp_reg_min_p": 1.5}, "lp_reg_min_p"),
        ({"entropy_quantile": 1.5}, "entropy_quantile"),
        ({"gtpo_share": 2.0}, "gtpo_share"),
        ({"entropy_over": "some"}, "entropy_over"),
        ({"entropy_top": 1}, "entropy_top"),
        ({"entropy_top": 42}, "entropy_top"),
        ({"entropy_nucleus": 0.0}, "entropy_nucleus"),
        ({"test_temperature": 0.0}, "test_temperature"),
        ({"entropy_over": "top", "entropy_coefficient": 0.0}, "entropy_over"),
        ({"kl_cov": 1.0, **ONE_UPDATE}, "kl_cov"),
        ({"kl_gate": "clip", "algorithm": "ppo", **ONE_UPDATE}, "kl_gate"),
        ({"kl_gate": "clip", "algorithm": "ppo", "kl_coefficient": 0.0}, "kl_gate"),
        ({"kl_correction": "ratio", "kl": "k3", "kl_coefficient": 0.0}, "kl_correction"),
        ({"kl_weights": "archer", "kl_weak": 1.0}, "kl_weak"),
        ({"kl_weights": "archer", "kl_quantile": 1.0}, "kl_quantile"),
        ({"kl_weights": "floored", "kl_weak": 1.0}, "kl_weak"),
        ({"kl_weights": "threshold", "kl_quantile": 1.0}, "kl_quantile"),
        ({"clip_by": "entropy", "algorithm": "ppo", "hapo_clip": 0.0, "hapo_advantage": 0.0}, "clip_by"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(change, field):
    with pytest.raises(ConfigError, match=f"^{field}: got"):
        dataclasses.replace(CONFIG, **change)


def test_one_answer_or_equal_rewards_are_taken_where_answers_are_still_told_apart():
    """A critic tells one answer from what it expected; gtpo has rewards of its own."""
    dataclasses.replace(CONFIG, **ALONE)
    gtpo = {"algorithm": "grpo", **PAIRS, "advantage_shaping": "gtpo"}
    dataclasses.replace(CONFIG, **gtpo, reward_right=0.0)


@pytest.mark.parametrize(
    "change",
    [
        {"kl_cov": 1.0, **ONE_UPDATE, "epochs": 2},
        {"kl_cov": 1.0, **ONE_UPDATE, "minibatch": "transitions"},
        {"algorithm": "ppo", "kl_gate": "clip"},
        {"algorithm": "ppo", "clip_by": "entropy", "hapo_clip": 0.0},
        {"algorithm": "reinforce", "value_coefficient": 0.5, "detach_critic": True},
        {"kl_gain": 0.5, "kl_weak": 1.0, "kl_quantile": 1.0},
    ],
)
def test_options_that_do_something_and_numbers_of_what_is_off_are_taken(change):
    dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize("method", BY_NAME)
def test_every_method_of_the_comparison_goes_together_with_the_scales_recipe(method):
    for scale in ("tiny", "gpt2"):
        dataclasses.replace(finetune_preset(scale, "ours"), **BY_NAME[method].overrides)


@pytest.mark.parametrize("recipe", ["ours", "paper", "authors"])
@pytest.mark.parametrize("algorithm", ["a2c", "reinforce", "ppo", "grpo", "rloo"])
def test_every_recipe_goes_together_with_every_algorithm(recipe, algorithm):
    preset = finetune_preset("tiny", recipe)
    dataclasses.replace(preset, algorithm=algorithm, **(PAIRS if algorithm in ("grpo", "rloo") else {}))


def test_the_recipes_are_what_the_paper_and_the_authors_code_say():
    paper, authors = (finetune_preset("gpt2", recipe) for recipe in ("paper", "authors"))
    assert (paper.learning_rate, paper.kl_coefficient, paper.beta, paper.kl) == (1e-6, 5.0, 150.0, "k2")
    assert (paper.episodes, paper.rounds, paper.minibatch, paper.gae_lambda) == (50, 8, "transitions", 0.95)
    assert (paper.reward_wrong, paper.certainty, paper.entropy_coefficient) == (0.0, "negentropy", 0.0005)
    assert (authors.reward_wrong, authors.certainty) == (-1.0, "negentropy_max_prob")
    assert (authors.certainty_temperature, authors.entropy_coefficient) == (4.0, 0.001)
    differing = {f.name for f in dataclasses.fields(paper) if getattr(paper, f.name) != getattr(authors, f.name)}
    assert authors.clamp_log_probs
    of_losses = {"reward_wrong", "certainty", "certainty_temperature", "entropy_coefficient", "clamp_log_probs"}
    assert differing == {"recipe"} | of_losses


def test_our_recipes_learning_rate_falls_with_the_models_size():
    rates = [finetune_preset(scale, "ours").learning_rate for scale in ("tiny", "ladder", "small", "gpt2")]
    assert rates == [FinetuneConfig().learning_rate, FinetuneConfig().learning_rate, 3e-5, 1e-5]


@pytest.mark.parametrize("scale", ["tiny", "ladder", "small", "gpt2"])
@pytest.mark.parametrize("recipe", ["ours", "paper", "authors"])
def test_every_recipe_is_at_home_at_every_scale(scale, recipe):
    config = finetune_preset(scale, recipe)
    assert (config.scale, config.recipe) == (scale, recipe)
