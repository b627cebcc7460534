"""Certainty J against numbers worked out by hand, at its extremes, and in what it refuses."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from ckl_jax.certainty import certainty, entropy_of
from ckl_jax.errors import ConfigError

KINDS = ("negentropy", "negentropy_max_prob", "max_prob")
INF = float("inf")


class HandComputedCertaintyTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(
        ("negentropy", 1.0, [0.278072, 0.396240]),
        ("negentropy", 2.0, [0.081704, 0.103759]),
        ("negentropy_max_prob", 1.0, [0.678072, 0.792481]),
        ("negentropy_max_prob", 2.0, [0.415037, 0.5]),
        ("max_prob", 1.0, [0.64, 0.75]),
        ("max_prob", 2.0, [0.444444, 0.5]),
    )
    def test_certainty_of_two_distributions_over_four_tokens(self, kind, temperature, expected):
        logits = jnp.log(jnp.array([[16.0, 4.0, 4.0, 1.0], [9.0, 1.0, 1.0, 1.0]]))
        found = self.variant(lambda x, t: certainty(x, kind, t))(logits, temperature)
        np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize(("kind", "expected"), [("negentropy", 0.0), ("negentropy_max_prob", 0.0), ("max_prob", 0.2)])
def test_a_uniform_distribution_has_the_least_certainty(kind, expected):
    np.testing.assert_allclose(certainty(jnp.full(5, 3.0), kind), expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_possible_token_has_certainty_one(kind):
    assert certainty(jnp.array([-INF, 2.0, -INF]), kind) == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_certainty_lies_in_zero_to_one_at_any_spread_of_the_logits(kind):
    noise = np.random.default_rng(0).normal(size=(50, 41))
    spread = np.logspace(-8, 6, 8)[:, None, None]
    found = np.asarray(certainty(jnp.asarray(spread * noise), kind))
    assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_certainty_of_bfloat16_logits_is_computed_in_float32(kind):
    logits = jnp.array([0.5, -1.25, 2.0, 0.0], jnp.bfloat16)
    found = certainty(logits, kind, 4.0)
    chex.assert_type(found, jnp.float32)
    chex.assert_trees_all_equal(found, certainty(logits.astype(jnp.float32), kind, 4.0))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3)])
def test_certainty_and_entropy_accept_any_leading_shape(shape):
    logits = jnp.zeros((*shape, 4))
    chex.assert_shape([certainty(logits, kind) for kind in KINDS], shape)
    chex.assert_shape(entropy_of(logits), shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("logits", [[1.0, 2.0, 0.5], [-INF, 0.0, 1.0]])
def test_certainty_takes_no_gradient(kind, logits):
    gradient = jax.grad(lambda x: certainty(x, kind, 2.0))(jnp.array(logits))
    chex.assert_trees_all_equal(gradient, jnp.zeros(3))


@pytest.mark.parametrize(
    ("field", "shape", "arguments"),
    [
        ("kind", (3,), {"kind": "entropy"}),
        ("temperature", (3,), {"temperature": 0.0}),
        ("temperature", (3,), {"temperature": -1.0}),
        ("temperature", (3,), {"temperature": float("nan")}),
        ("temperature", (3,), {"temperature": 1e39}),
        ("temperature", (3,), {"temperature": 10**400}),
        ("logits", (2, 1), {}),
        ("logits", (), {}),
    ],
)
def test_what_cannot_work_is_refused_by_name(field, shape, arguments):
    with pytest.raises(ConfigError, match=f"^{field}: got"):
        certainty(jnp.zeros(shape), **arguments)


def test_entropy_of_is_in_nats_and_counts_impossible_tokens_zero():
    log_p = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]))
    np.testing.assert_allclose(entropy_of(log_p), [1.039721, 0.693147, 0.0], atol=1e-6)


def test_the_gradient_of_entropy_is_finite_where_a_token_is_impossible():
    gradient = jax.grad(lambda x: entropy_of(jax.nn.log_softmax(x)))(jnp.log(jnp.array([0.75, 0.25, 0.0])))
    np.testing.assert_allclose(gradient, [-0.205990, 0.205990, 0.0], atol=1e-6)
