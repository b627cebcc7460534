"""What is not finite is refused, and the first of it is named."""

import jax.numpy as jnp
import numpy as np
import pytest

from ckl_jax.runtime.finite import NotFiniteError, require_metrics, require_state

RUNS = ["standard/seed_0", "prioritized/seed_0"]


def _metrics():
    names = ("certainty_mean", "entropy", "kl", "explained_variance", "grad_norm/kl", "loss/kl", "loss/policy")
    return {**{name: np.ones((2, 3)) for name in names}, "critical_probability_3x2xC": np.ones((2, 3, 3, 2, 4))}


def test_finite_metrics_pass():
    require_metrics("round", 0, RUNS, _metrics())


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        ({("loss/kl", (1, 0)): np.nan}, "round 8 of prioritized/seed_0: loss/kl is nan, allowed is a finite number"),
        ({("loss/kl", (0, 2)): np.inf}, "round 10 of standard/seed_0: loss/kl is inf, allowed is a finite number"),
        (
            {("critical_probability_3x2xC", (0, 1, 2, 1, 3)): -np.inf},
            "round 9 of .*: critical_probability_3x2xC is -inf",
        ),
        ({("entropy", (0, 1)): np.nan, ("loss/policy", (1, 0)): np.nan}, "round 8 of prioritized/seed_0: loss/policy"),
        (
            {("loss/kl", (0, 0)): np.nan, ("grad_norm/kl", (1, 0)): np.nan},
            "round 8 of prioritized/seed_0: grad_norm/kl",
        ),
        ({("certainty_mean", (0, 0)): np.nan, ("kl", (0, 0)): np.nan}, "round 8 of standard/seed_0: kl"),
    ],
)
def test_the_first_round_and_in_it_the_first_cause_is_named(damaged, said):
    metrics = _metrics()
    for (name, index), value in damaged.items():
        metrics[name][index] = value
    with pytest.raises(NotFiniteError, match=f"^{said}"):
        require_metrics("round", 7, RUNS, metrics)


def test_a_loss_comes_before_the_norm_of_its_gradient():
    metrics = {name: np.array([[1.0, np.nan]]) for name in ("grad_norm", "loss")}
    with pytest.raises(NotFiniteError, match=r"^step 2 of seed 0: loss is nan"):
        require_metrics("step", 0, ["seed 0"], metrics)


def test_a_state_is_refused_by_the_run_and_the_name_of_the_array():
    state = {"round": jnp.array([1, 1]), "params": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 3))}}
    require_state("round", 7, RUNS, state, by_run=True)
    state["params"]["kernel"] = state["params"]["kernel"].at[1, 2, 0].set(jnp.inf)
    said = "^after round 7 of prioritized/seed_0: params/kernel has numbers that are not finite$"
    with pytest.raises(NotFiniteError, match=said):
        require_state("round", 7, RUNS, state, by_run=True)
    with pytest.raises(NotFiniteError, match=r"^after step 7 of seed 0: kernel"):
        require_state("step", 7, ["seed 0"], {"kernel": state["params"]["kernel"]}, by_run=False)
