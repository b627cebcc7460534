"""Weights of the KL against numbers worked out by hand, and the properties that make them controls."""

import functools
import inspect
from typing import get_args

import chex
import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from ckl_jax import token_weights
from ckl_jax.config import FinetuneConfig
from ckl_jax.errors import ConfigError
from ckl_jax.token_weights import KLWeights, Settings, Tokens

WORDS = get_args(KLWeights)
INF, NAN = float("inf"), float("nan")
CERTAINTY = np.array([[0.5, 1.0, 0.0, 0.25], [0.75, 0.5, 9.0, -9.0]], np.float32)
ENTROPY = np.array([[0.3, 0.0, 0.9, 0.1], [0.4, 0.6, 0.0, 0.0]], np.float32)
MASK = np.array([[True, True, True, True], [True, True, False, False]])
CRITICAL = np.array([[True, False, True, False], [False, True, True, False]])
OVERLONG = np.array([[True, False, True, True], [False, True, False, True]])
KEY = jax.random.key(0)
# J^2 is 0.25, 1, 0, 0.0625, 0.5625, 0.25 with mean 2.125 / 6; 2/3 of six tokens are four: 0, 0.1, 0.3 and 0.4. In the
# first episode 2/3 of four are three, in the second 2/3 of two are one. 1 - J^2 has the mean 3.875 / 6, so that the
# inverted weights are it times 2.125 / 3.875.
BY_HAND = {
    "prioritized": [[0.25, 1.0, 0.0, 0.0625], [0.5625, 0.25, 0.0, 0.0]],
    "uniform": [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]],
    "matched": [[0.354167] * 4, [0.354167, 0.354167, 0.0, 0.0]],
    "renormalized": [[0.705882, 2.823529, 0.0, 0.176471], [1.588235, 0.705882, 0.0, 0.0]],
    "threshold": [[1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]],
    "archer": [[1.0, 1.0, 0.25, 1.0], [1.0, 0.25, 0.0, 0.0]],
    "inverted": [[0.411290, 0.0, 0.548387, 0.514113], [0.239919, 0.411290, 0.0, 0.0]],
    "floored": [[0.25, 1.0, 0.25, 0.25], [0.5625, 0.25, 0.0, 0.0]],
    "critical_free": [[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]],
    "critical_held": [[1.0, 1.0, 1.0, 0.0625], [0.5625, 1.0, 0.0, 0.0]],
    "overlong_free": [[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]],
    "overlong_held": [[1.0, 1.0, 1.0, 1.0], [0.5625, 1.0, 0.0, 0.0]],
}


def weigh(
    word,
    certainty=CERTAINTY,
    entropy=ENTROPY,
    beta=2.0,
    mask=MASK,
    places=(CRITICAL, OVERLONG),
    key=KEY,
    share=2 / 3,
):
    tokens = Tokens(*map(jnp.asarray, (certainty, entropy, mask, *places)))
    return token_weights.weigh(token_weights.index_of(word), tokens, Settings(beta, share, 0.25, key))


def test_the_words_are_the_configs_and_each_has_its_function():
    assert {*BY_HAND, "shuffled"} == set(WORDS)
    assert FinetuneConfig().kl_weights == "prioritized"
    assert all(inspect.isfunction(getattr(token_weights, word)) for word in WORDS)
    assert [token_weights.index_of(word) for word in WORDS] == list(range(len(WORDS)))


class HandComputedWeightsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*BY_HAND.items())
    def test_weights_of_six_tokens(self, word, expected):
        found = self.variant(functools.partial(weigh, word))(CERTAINTY, ENTROPY)
        chex.assert_type(found, jnp.float32)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_runs_of_one_program_differ_in_the_word():
    indices = jnp.arange(len(WORDS))
    tokens = Tokens(*map(jnp.asarray, (CERTAINTY, ENTROPY, MASK, CRITICAL, OVERLONG)))
    settings = Settings(2.0, 2 / 3, 0.25, KEY)
    together = jax.jit(jax.vmap(lambda index: token_weights.weigh(index, tokens, settings)))(indices)
    for index, word in enumerate(WORDS):
        np.testing.assert_allclose(together[index], weigh(word), atol=1e-7, err_msg=word)


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_weights_are_those_of_other_tokens(seed):
    found = np.asarray(weigh("shuffled", key=jax.random.key(seed)))
    assert sorted(found[MASK]) == [0.0, 0.0625, 0.25, 0.25, 0.5625, 1.0]
    np.testing.assert_array_equal(found[~MASK], 0.0)


def test_every_token_gets_every_weight_equally_often():
    certainty = jnp.array([[0.1, 0.2, NAN], [0.3, 0.4, INF]])
    mask = jnp.array([[True, True, False], [True, True, False]])
    keys = jax.random.split(jax.random.key(1), 4000)
    found = jax.vmap(lambda key: token_weights.shuffled(certainty, 1.0, mask, key))(keys)
    for row, step in ((0, 0), (0, 1), (1, 0), (1, 1)):
        values, counts = np.unique(found[:, row, step], return_counts=True)
        np.testing.assert_allclose(values, [0.1, 0.2, 0.3, 0.4], atol=1e-6)
        np.testing.assert_allclose(counts / 4000, 0.25, atol=0.03)  # four standard errors


ROUNDS = st.tuples(
    arrays.arrays(np.float32, (3, 5), elements=st.floats(0, 1, width=32)),
    arrays.arrays(np.bool_, (3, 5)),
    arrays.arrays(np.bool_, (3, 5)),
    st.sampled_from([0.0, 0.5, 1.0, 3.0, 150.0]),
)


@functools.partial(jax.jit, static_argnums=0)
def _compiled(word, certainty, entropy, beta, mask, critical):
    return weigh(word, certainty, entropy, beta, mask, (critical, ~critical))


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(ROUNDS)
def test_the_controls_have_the_pressure_they_promise(round_):
    certainty, mask, critical, beta = round_
    found = {word: np.asarray(_compiled(word, certainty, 1 - certainty, beta, mask, critical)) for word in WORDS}
    for word, weights in found.items():
        assert np.isfinite(weights).all(), word
        assert (weights >= 0).all(), word
        assert (weights[~mask] == 0).all(), word
    if not mask.any():
        return
    mean = found["prioritized"][mask].mean()
    np.testing.assert_allclose(found["matched"][mask], mean, rtol=1e-5, atol=1e-30)
    np.testing.assert_array_equal(np.sort(found["shuffled"][mask]), np.sort(found["prioritized"][mask]))
    if mean > 1e-30:
        np.testing.assert_allclose(found["renormalized"][mask].mean(), 1.0, rtol=1e-4)
        np.testing.assert_allclose(found["renormalized"] * mean, found["prioritized"], rtol=1e-4, atol=1e-30)
    if (certainty[mask] ** beta < 0.999).any():
        np.testing.assert_allclose(found["inverted"][mask].mean(), mean, rtol=1e-3, atol=1e-30)
        order = np.argsort(found["prioritized"][mask])
        assert (np.diff(found["inverted"][mask][order]) <= 0).all()
    np.testing.assert_array_equal(found["floored"][mask], np.maximum(found["prioritized"][mask], np.float32(0.25)))
    np.testing.assert_array_equal(found["critical_free"], mask & ~critical)
    np.testing.assert_array_equal(found["critical_held"], np.where(mask & critical, 1, found["prioritized"]))
    np.testing.assert_array_equal(found["overlong_free"], mask & critical)
    np.testing.assert_array_equal(found["overlong_held"], np.where(mask & ~critical, 1, found["prioritized"]))
    kept = found["threshold"] == 1
    assert kept.sum() >= max(1, round(2 / 3 * mask.sum()))
    assert (1 - certainty)[kept].max() <= (1 - certainty)[mask & ~kept].min(initial=np.inf)
    if beta == 0:
        np.testing.assert_array_equal(found["prioritized"], found["uniform"])


@pytest.mark.parametrize("garbage", [INF, -INF, NAN])
@pytest.mark.parametrize("word", WORDS)
def test_what_stands_outside_the_mask_has_no_influence(word, garbage):
    certainty, entropy = (np.where(MASK, values, garbage).astype(np.float32) for values in (CERTAINTY, ENTROPY))
    np.testing.assert_array_equal(weigh(word, certainty, entropy), weigh(word))
    np.testing.assert_array_equal(weigh(word, places=(CRITICAL ^ ~MASK, OVERLONG ^ ~MASK)), weigh(word))
    np.testing.assert_array_equal(weigh(word, certainty, entropy, mask=np.zeros_like(MASK)), 0.0)


@pytest.mark.parametrize("word", WORDS)
def test_no_gradient_flows_through_weights(word):
    certainty = jnp.where(MASK, CERTAINTY, NAN)

    def total(certainty, entropy, beta):
        return weigh(word, certainty, entropy, beta).sum()

    for gradient in jax.grad(total, argnums=(0, 1, 2))(certainty, jnp.asarray(ENTROPY), 2.0):
        np.testing.assert_array_equal(gradient, jnp.zeros_like(gradient))


def test_equal_entropies_are_all_low():
    np.testing.assert_array_equal(weigh("threshold", entropy=np.full_like(ENTROPY, 0.7)), MASK)
    np.testing.assert_array_equal(weigh("archer", entropy=np.zeros_like(ENTROPY)), MASK)


def test_a_tiny_share_keeps_the_least_entropy_and_the_whole_share_everything():
    np.testing.assert_array_equal(weigh("threshold", share=1e-6), np.eye(2, 4, 1) * [[1], [0]])
    np.testing.assert_array_equal(weigh("threshold", share=1.0), MASK)


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("kl_weights", lambda x, m: token_weights.index_of("shufled")),
        ("beta", lambda x, m: token_weights.prioritized(x, -1.0, m)),
        ("mask", lambda x, m: token_weights.matched(x, 1.0, m[:, 1:])),
        ("mask", lambda x, m: token_weights.archer(x, m[:1], 0.8, 0.1)),
        ("critical", lambda x, m: token_weights.critical_free(m[:, 1:], m)),
        ("critical", lambda x, m: token_weights.critical_held(x, 1.0, m[:1], m)),
        ("beta", lambda x, m: token_weights.critical_held(x, -1.0, m, m)),
        ("share", lambda x, m: token_weights.threshold(x, m, 0.0)),
        ("share", lambda x, m: token_weights.archer(x, m, 1.5, 0.1)),
        ("weak", lambda x, m: token_weights.archer(x, m, 0.8, -0.1)),
        ("weak", lambda x, m: token_weights.floored(x, 1.0, m, 1.1)),
    ],
)
def test_what_cannot_work_is_refused_by_name(field, call):
    with pytest.raises(ConfigError, match=f"^{field}: got"):
        call(jnp.asarray(CERTAINTY), jnp.asarray(MASK))


@pytest.mark.parametrize(
    ("field", "value"),
    [("kl_weights", "J^beta"), ("kl_quantile", 0.0), ("kl_quantile", 1.1), ("kl_weak", -0.1), ("kl_weak", 1.1)],
)
def test_the_config_refuses_bad_values(field, value):
    with pytest.raises(ConfigError, match=f"^{field}: got"):
        FinetuneConfig(**{field: value})
