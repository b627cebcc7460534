"""Answers that an earlier policy has written: which one, what is made of their log-probs, and that a run resumes."""

import contextlib
import dataclasses
import itertools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from policies import untrained

from ckl_jax import losses
from ckl_jax.checkpoint.store import Model
from ckl_jax.config import FinetuneConfig
from ckl_jax.errors import ConfigError
from ckl_jax.finetune import finetune
from ckl_jax.rl.collect import collect
from ckl_jax.rl.program import Hyper, draw_problems, make_program
from ckl_jax.rl.updates import RunState, _sampler, init_run, train_round
from ckl_jax.rollout.generation import generate
from ckl_jax.rollout.trajectory import Sampling, score
from ckl_jax.runs import logbook
from ckl_jax.runs.directory import RunDirectory

CONFIG = FinetuneConfig(
    episodes=4,
    minibatch_episodes=2,
    extra_length=0,
    rounds=4,
    test_every=2,
    test_problems=2,
    final_problems=2,
    old_problems=2,
    learning_rate=1e-2,
    beta=1.0,
    diagnostic_episodes=2,
    rollout="plain",
    staleness=2,
    importance_sampling="truncated",
)
HYPER = Hyper(jnp.uint32(0), jnp.float32(1e-2), jnp.float32(5.0), jnp.float32(1.0), jnp.int32(0))


@pytest.fixture(scope="module")
def model(small_model):
    return Model(small_model, 1, untrained(small_model, contrast=10))


def problems_of(program, index):
    return jax.tree.map(jnp.asarray, draw_problems(program, 0, index))


def test_the_policy_before_the_round_k_rounds_ago_writes_the_answers(model):
    program = make_program(CONFIG, model)
    step = jax.jit(lambda state, problems: train_round(program, model.params, state, HYPER, problems))
    state, policies = init_run(program, model.params, HYPER), []
    for index in range(CONFIG.rounds):
        policies.append(state.params["policy"])
        chex.assert_trees_all_equal(_sampler(state), policies[max(0, index - CONFIG.staleness)])
        state, metrics = step(state, problems_of(program, index))
        ratio = metrics["importance"]
        assert (ratio == 1) if index == 0 else (0 < ratio < CONFIG.importance_limit and abs(ratio - 1) > 1e-4)
    moved = [jax.tree.leaves(policy)[0] for policy in policies]
    assert all(not np.array_equal(a, b) for a, b in itertools.pairwise(moved))


def test_without_staleness_the_policy_itself_writes_them(model):
    program = make_program(dataclasses.replace(CONFIG, staleness=0, importance_sampling="none"), model)
    state = init_run(program, model.params, HYPER)
    assert isinstance(state, RunState)
    assert _sampler(state) is None


@pytest.mark.parametrize("how", ["truncated", "none"])
def test_stale_answers_have_the_log_probs_of_the_policy_and_advantages_times_the_truncated_ratio(model, how):
    limit = 1.02
    program = make_program(dataclasses.replace(CONFIG, importance_sampling=how, importance_limit=limit), model)
    params = init_run(program, model.params, HYPER).params
    policy = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(1), x.shape), params["policy"])
    problems, keys = problems_of(program, 0), tuple(jax.random.split(jax.random.key(2)))

    @jax.jit
    def found(sampler, policy):
        params_now = {**params, "policy": policy}
        episodes, metrics = collect(program, params_now, model.params, HYPER, problems, keys, None, sampler)
        sampling = Sampling(program.max_length, 1.0)
        written = generate(model.config, sampler, problems, keys[0], sampling, how="plain", batch=4)[0]
        logits_BxTxV, _ = score(program.model, policy, written)
        return episodes, metrics, written, logits_BxTxV

    stale, metrics, written, logits_BxTxV = found(params["policy"], policy)
    mask_BxT = written.mask_BxT
    np.testing.assert_array_equal(stale.trajectory.tokens_BxL, written.tokens_BxL)
    new_BxT = losses.token_log_probs(logits_BxTxV, written.answers_BxT, mask=mask_BxT)
    np.testing.assert_allclose(stale.trajectory.log_probs_BxT, new_BxT, atol=1e-4)
    ratio_BxT = np.exp(np.asarray(new_BxT) - np.asarray(written.log_probs_BxT))
    assert 0.2 < (ratio_BxT[mask_BxT] > limit).mean() < 0.8
    if how == "none":
        assert "importance" not in metrics
        return
    plain = make_program(dataclasses.replace(CONFIG, importance_sampling="none"), model)
    now, frozen, first = {**params, "policy": policy}, model.params, params["policy"]
    uncorrected, _ = jax.jit(lambda: collect(plain, now, frozen, HYPER, problems, keys, None, first))()
    expected_BxT = np.minimum(ratio_BxT, limit) * np.asarray(uncorrected.advantages_BxT)
    np.testing.assert_allclose(stale.advantages_BxT, np.where(mask_BxT, expected_BxT, 0), atol=1e-3)
    np.testing.assert_allclose(metrics["importance"], np.minimum(ratio_BxT, limit)[mask_BxT].mean(), rtol=1e-4)


def trained(path, config, model, **changes):
    with contextlib.closing(RunDirectory(path, dataclasses.asdict(config))) as directory:
        finetune(config, model, directory, {"run": changes}, 2, print)
        return [
            json.dumps({name: value for name, value in record.items() if name != "seconds"})
            for record in directory.metrics()
        ]


def test_an_interrupted_run_goes_on_with_its_old_policies(tmp_path, model, monkeypatch):
    expected = trained(tmp_path / "whole", CONFIG, model)
    assert len({json.loads(line)["step"] for line in expected}) == CONFIG.rounds + 1
    told = logbook.Logbook.tell

    def killed(self, done, *others):
        told(self, done, *others)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(logbook.Logbook, "tell", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "stopped", CONFIG, model)
    assert trained(tmp_path / "stopped", CONFIG, model) == expected


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"staleness": 0}, "importance_sampling"),
        ({"staleness": -1}, "staleness"),
        ({"staleness": 4}, "staleness"),
        ({"importance_limit": 0.0}, "importance_limit"),
    ],
)
def test_what_cannot_work_is_refused_by_name(changes, name):
    with pytest.raises(ConfigError, match=f"^{name}: got"):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize("arithmetic", [{"dtype": "bfloat16"}, {"precision": "high"}])
def test_below_float32_an_answer_has_other_log_probs_when_it_is_learned_from(model, arithmetic):
    program = make_program(dataclasses.replace(CONFIG, staleness=0, **arithmetic), model)
    keys = tuple(jax.random.split(jax.random.key(2)))
    params = init_run(program, model.params, HYPER).params
    _, metrics = jax.jit(lambda p: collect(program, params, model.params, HYPER, p, keys, None))(
        problems_of(program, 0)
    )
    np.testing.assert_allclose(metrics["importance"], 1, atol=0.05)
