"""Runs over several devices: the same numbers as on one, and uneven shares refused."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ckl_jax.checkpoint import Model
from ckl_jax.config import ConfigError, FinetuneConfig
from ckl_jax.finetune import draw_problems, finetune, make_runs, make_task
from ckl_jax.model import GPT2
from ckl_jax.runs import RunDirectory
from ckl_jax.sharding import by_run, runs_mesh
from ckl_jax.updates import init_run, train_rounds

ARMS = {"standard": {"beta": 0.0}, "prioritized": {"beta": 2.0}}
CONFIG = FinetuneConfig(
    rounds=2,
    episodes=4,
    minibatch_episodes=2,
    test_every=1,
    test_problems=4,
    final_problems=8,
    old_problems=4,
    extra_length=5,
    learning_rate=1e-2,
    diagnostic_episodes=2,
    rollout="plain",
)


@pytest.fixture(scope="module")
def model(small_model):
    return Model(small_model, 1, jax.jit(GPT2(small_model).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))


def trained(model, num_devices):
    task = make_task(CONFIG, model)
    runs, hypers = make_runs(CONFIG, ARMS, 2)
    per_run = [jax.tree.map(lambda x: x[None], draw_problems(task, run.seed, 0)) for run in runs]
    problems = jax.tree.map(lambda *leaves: np.stack(leaves), *per_run)
    mesh = runs_mesh(len(runs), num_devices)
    states = jax.vmap(lambda hyper: init_run(task, model.params, hyper))(hypers)
    states, hypers, problems = jax.device_put((states, hypers, problems), by_run(mesh))
    states, metrics = train_rounds(task, mesh, model.params, states, hypers, problems)
    assert len(jax.tree.leaves(states)[0].sharding.device_set) == num_devices
    return jax.tree.map(np.asarray, (states.params, metrics))


@pytest.mark.parametrize("num_devices", [2, 4])
def test_runs_on_several_devices_are_those_on_one(model, num_devices):
    expected, found = trained(model, 1), trained(model, num_devices)
    np.testing.assert_array_equal(expected[1]["length"], found[1]["length"])
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-5)
    assert not np.allclose(expected[1]["kl_weight"][0], expected[1]["kl_weight"][2])


def test_as_many_devices_are_taken_as_share_the_runs_evenly():
    assert [runs_mesh(runs).size for runs in (1, 2, 3, 4, 6, 7, 20)] == [1, 2, 3, 4, 3, 1, 4]


@pytest.mark.parametrize(("runs", "devices"), [(4, 3), (4, 8), (4, 0)])
def test_an_uneven_share_is_refused(runs, devices):
    with pytest.raises(ConfigError, match=rf"^num_devices: got {devices}, allowed is a divisor of {runs} runs"):
        runs_mesh(runs, devices)


def test_a_run_on_four_devices_resumes_on_them_and_ends_the_same(model, tmp_path, monkeypatch):
    def run(path, rounds=2):
        config = dataclasses.replace(CONFIG, rounds=rounds)
        directory = RunDirectory(path, {"config": "the same"})
        lines = []
        finetune(config, model, directory, ARMS, 2, lines.append)
        directory.checkpoints.close()
        return (path / "metrics.jsonl").read_text(), lines

    whole, _ = run(tmp_path / "whole")

    class StoppedError(Exception):
        pass

    def stop_after_a_round(line):
        if line.startswith("round 1"):
            raise StoppedError

    directory = RunDirectory(tmp_path / "parts", {"config": "the same"})
    with pytest.raises(StoppedError):
        finetune(CONFIG, model, directory, ARMS, 2, stop_after_a_round)
    directory.checkpoints.close()
    resumed, lines = run(tmp_path / "parts")
    assert [line.split(":")[0] for line in lines] == ["round 2/2"]
    assert resumed == whole
