"""The prioritized KL in tunix's learner, where the dependency group tunix is installed (CI has it not)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tunix")

from flax import nnx
from tunix.rl import algo_core, common

from ckl_jax.certainty import certainty
from ckl_jax.errors import ConfigError
from experiments import tunix_grpo
from experiments.tunix_grpo import PrioritizedConfig, TunixCommand

COMMAND = TunixCommand(prompts=2, steps=2)


@pytest.fixture(scope="module", autouse=True)
def promotion():
    """tunix's models rely on the promotion of ranks, which our tests forbid; in its threads too."""
    forbidden = jax.config.jax_numpy_rank_promotion
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_numpy_rank_promotion", forbidden)


@pytest.fixture(scope="module")
def sampled():
    """A learner whose policy is not its reference, and an example of its rollout."""
    learner = tunix_grpo.make_learner(PrioritizedConfig(num_generations=4, beta=0.5), COMMAND, 0, [])
    policy = learner.rl_cluster.rollout.model()
    policy.lm_head.w[...] += 0.05 * jax.random.normal(jax.random.key(1), policy.lm_head.w.shape)
    prompts = next(tunix_grpo.additions(COMMAND, 0))["prompts"]
    return learner, policy, learner._generate_and_compute_advantage({"prompts": np.repeat(prompts, 4)})


def loss_of(sampled, loss, exponent):
    learner, policy, example = sampled
    config = PrioritizedConfig(num_generations=4, beta=0.5, certainty_exponent=exponent)
    config.temperature = 1.0
    rollout = learner.rl_cluster.rollout

    @nnx.jit
    def value_and_gradient(policy):
        return nnx.value_and_grad(lambda m: loss(m, example, config, rollout.pad_id(), rollout.eos_id())[0])(policy)

    return value_and_gradient(policy)


def test_another_commands_results_are_not_overwritten(tmp_path):
    (tmp_path / "results.json").write_text('{"config": {"command": "experiments.figure4_prioritized_kl"}}')
    with pytest.raises(ConfigError, match=r"^out: "):
        tunix_grpo.main(TunixCommand(out=tmp_path))


def test_without_an_exponent_the_loss_and_its_gradient_are_tunixs(sampled):
    ours, our_gradient = loss_of(sampled, tunix_grpo.prioritized_grpo, 0.0)
    theirs, their_gradient = loss_of(sampled, algo_core.grpo_loss_fn, 0.0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), our_gradient, their_gradient)


def test_an_exponent_lowers_the_penalty_where_the_reference_is_unsure(sampled):
    _, policy, example = sampled
    mask = example.completion_mask.astype(bool)
    log_probs = common.compute_per_token_logps(*nnx.split(policy), example.prompt_ids, example.completion_ids, 0, 42)
    kl = 0.5 * (log_probs - example.ref_per_token_logps) ** 2
    pressed, without = (loss_of(sampled, tunix_grpo.prioritized_grpo, x)[0] for x in (3.0, 1e9))
    expected = 0.5 * jnp.mean(kl * example.certainty**3, where=mask)
    assert expected > 1e-3
    np.testing.assert_allclose(pressed - without, expected, rtol=1e-4)


def test_the_certainty_is_the_references_at_every_completion_token(sampled):
    learner, _, example = sampled
    ids = jnp.concatenate([example.prompt_ids, example.completion_ids], axis=1)
    real = ids != 0
    positions = jnp.cumsum(real, axis=1) - 1
    attention = jnp.tril(jnp.ones((ids.shape[1],) * 2, bool)) & real[:, None, :]
    reference = learner.rl_cluster.inference_worker.get_model("reference")
    logits, _ = reference(ids, positions=positions, cache=None, attention_mask=attention)
    first = example.prompt_ids.shape[1] - 1
    expected = certainty(logits[:, first:-1])
    mask = np.asarray(example.completion_mask)
    np.testing.assert_allclose(np.asarray(example.certainty)[mask], np.asarray(expected)[mask], atol=1e-5)
    assert np.asarray(expected)[mask].std() > 0.01


@pytest.mark.parametrize("field", ["steps", "prompts", "seeds", "exponent", "coefficient", "learning_rate"])
def test_a_value_that_cannot_work_is_refused(field):
    with pytest.raises(ConfigError, match=f"{field}: got 0"):
        TunixCommand(**{field: 0})


def test_the_command_runs_both_arms(tmp_path, capsys):
    tunix_grpo.main(TunixCommand(out=tmp_path, prompts=2, steps=2, seeds=1))
    printed = capsys.readouterr().out
    assert "| prioritized | 0 |" in printed
    assert (tmp_path / "results.json").exists()
