"""Runs over several devices: the same numbers as on one, and uneven shares refused."""

import dataclasses
import functools
from typing import NamedTuple

import chex
import jax
import numpy as np
import pytest
from policies import untrained

from ckl_jax.checkpoint.store import Model
from ckl_jax.config import FinetuneConfig, PretrainConfig
from ckl_jax.errors import ConfigError
from ckl_jax.finetune import finetune
from ckl_jax.next_character import init_state, train_step
from ckl_jax.rl import minibatches
from ckl_jax.rl.objective import term_names
from ckl_jax.rl.program import draw_problems, make_program, make_runs
from ckl_jax.rl.updates import init_run, train_rounds
from ckl_jax.runs.directory import RunDirectory
from ckl_jax.runtime import sharding, targets
from ckl_jax.runtime.sharding import by_run, make_mesh, state_shardings
from experiments.benchmark.workload import text_stream

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
    adam_epsilon=1e-3,  # Else Adam makes full steps of the rounding in gradients that are 0.
    diagnostic_episodes=2,
    rollout="plain",
)


@pytest.fixture(scope="module")
def model(small_model):
    return Model(small_model, 1, untrained(small_model))


def trained(model, shape, **overrides):
    """Parameters and metrics of two runs after a round on a mesh of that shape."""
    config = dataclasses.replace(CONFIG, **overrides)
    program = make_program(config, model)
    runs, hypers = make_runs(config, ARMS, 2)
    per_run = [jax.tree.map(lambda x: x[None], draw_problems(program, run.seed, 0)) for run in runs]
    problems = jax.tree.map(lambda *leaves: np.stack(leaves), *per_run)
    mesh = make_mesh(len(runs), 4, *shape)
    states = jax.vmap(lambda hyper: init_run(program, model.params, hyper))(hypers)
    states = jax.device_put(states, state_shardings(mesh, states, config.shard_state, "run"))
    hypers, problems = jax.device_put((hypers, problems), by_run(mesh))
    states, metrics = train_rounds(program, mesh, model.params, states, hypers, problems)
    return states, jax.tree.map(np.asarray, (states.params, metrics))


@pytest.fixture(scope="module")
def on_one_device(model):
    return functools.cache(lambda minibatch: trained(model, (1, 1), minibatch=minibatch)[1])


def assert_same_numbers(found, expected):
    np.testing.assert_array_equal(found[1]["length"], expected[1]["length"])
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=3e-5)


@pytest.mark.parametrize(
    ("shape", "overrides"),
    [
        pytest.param((4, 2), {}, marks=pytest.mark.slow),
        ((1, 4), {}),
        pytest.param((2, 2), {"minibatch": "transitions", "runs_at_once": 2}, marks=pytest.mark.slow),
        ((2, 4), {"rollout": "speculative", "shard_state": True}),
    ],
)
def test_any_mesh_gives_the_numbers_of_one_device(model, on_one_device, shape, overrides):
    states, found = trained(model, shape, **overrides)
    assert_same_numbers(found, on_one_device(overrides.get("minibatch", "episodes")))
    assert not np.allclose(found[1]["kl_weight"][0], found[1]["kl_weight"][2])
    split = shape[0] * shape[1] if overrides.get("shard_state") else shape[0]
    for leaf in jax.tree.leaves(states.params["policy"]):
        assert len(leaf.sharding.device_set) == shape[0] * shape[1]
        assert leaf.addressable_shards[0].data.size * split == leaf.size


class Masked(NamedTuple):
    mask_BxT: jax.Array


class Drawn(NamedTuple):
    trajectory: Masked


@pytest.mark.parametrize(
    ("devices", "size", "limit", "together"),
    [
        *((1, 8, 1, 1), (1, 8, 4, 4), (1, 8, 3, 2), (4, 8, 1, 4), (4, 8, 2, 8), (4, 8, None, 8)),
        *((4, 12, 2, 4), (4, 12, 3, 12), (2, 12, 5, 6), (4, 2, 1, 2)),
    ],
)
def test_the_episodes_computed_together_are_those_of_a_device(monkeypatch, model, devices, size, limit, together):
    """A limit for one device leaves no other one idle. Each has as many rows: else a kernel computes all on each."""
    config = dataclasses.replace(CONFIG, episodes=size, minibatch_episodes=size, episode_batch=limit)
    program = make_program(config, model)
    rows = []

    def noted(program, hyper, params, chosen):
        rows.append(len(chosen.trajectory.mask_BxT))
        return params, dict.fromkeys(term_names(program.config), jax.numpy.zeros(()))

    def update(params, mask_BxT):
        drawn = Drawn(Masked(mask_BxT))
        _, gradient = minibatches.of_episodes(program, None, drawn, jax.random.key(0), None)
        return gradient(params, 0)

    monkeypatch.setattr(minibatches, "loss_gradient", noted)
    with jax.set_mesh(make_mesh(1, 8, data_devices=devices)):
        jax.eval_shape(update, {"policy": np.zeros(3)}, np.ones((size, 5), bool))
    assert set(rows) == {together}


@pytest.fixture(scope="module")
def pretrained(small_model):
    """The state, and parameters and metrics, after three steps on so many devices."""
    config = PretrainConfig(
        max_digits=1,
        num_documents=10,
        batch_size=8,
        packing="documents",
        model=dataclasses.replace(small_model, dropout=0.1),
    )
    stream = text_stream(1, 50)

    @functools.cache
    def train(devices, shard_state):
        of_state = dataclasses.replace(config, shard_state=shard_state)
        create = functools.partial(init_state, of_state)
        mesh = make_mesh(1, config.batch_size, data_devices=devices)
        state = jax.jit(create, out_shardings=state_shardings(mesh, jax.eval_shape(create), shard_state))()
        with jax.set_mesh(mesh):
            for _ in range(3):
                state, metrics = train_step(of_state, state, stream)
        return state, jax.tree.map(np.asarray, (state.params, metrics))

    return train


@pytest.mark.parametrize(("devices", "shard_state"), [(2, False), (4, True), (8, False)])
def test_pretraining_on_several_devices_is_that_on_one(pretrained, devices, shard_state):
    (_, expected), (state, found) = pretrained(1, False), pretrained(devices, shard_state)
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=3e-5)
    embedding = state.params["params"]["wpe"]["embedding"]
    assert len(embedding.sharding.device_set) == devices
    assert embedding.addressable_shards[0].data.size * (devices if shard_state else 1) == embedding.size


def test_the_mesh_uses_as_many_devices_as_share_runs_and_rows_evenly():
    shapes = {(runs, rows): make_mesh(runs, rows).devices.shape for runs in (1, 2, 3, 6, 7, 20) for rows in (1, 2, 12)}
    assert shapes == {
        (1, 1): (1, 1),
        (1, 2): (1, 2),
        (1, 12): (1, 6),
        (2, 1): (2, 1),
        (2, 2): (2, 2),
        (2, 12): (2, 4),
        (3, 1): (3, 1),
        (3, 2): (3, 2),
        (3, 12): (3, 2),
        (6, 1): (6, 1),
        (6, 2): (6, 1),
        (6, 12): (2, 4),
        (7, 1): (7, 1),
        (7, 2): (7, 1),
        (7, 12): (7, 1),
        (20, 1): (5, 1),
        (20, 2): (4, 2),
        (20, 12): (4, 2),
    }


def test_accelerators_that_do_not_compute_are_told(monkeypatch):
    some, rows = make_mesh(1, 12), "batch_size 12 / microbatches 1 rows"
    assert sharding.idle(some, rows) == ""
    monkeypatch.setattr(targets, "platform", lambda: "tpu")
    assert sharding.idle(make_mesh(1, 16), rows) == ""
    expected = "6 of 8 devices compute: batch_size 12 / microbatches 1 rows are shared evenly by no more of them"
    assert sharding.idle(some, rows) == expected


@pytest.mark.parametrize("devices", [3, 16, 0])
def test_an_uneven_share_is_refused_with_the_even_ones(devices):
    with pytest.raises(ConfigError, match=rf"^run_devices: got {devices}, allowed is one of \[1, 2, 4\]"):
        make_mesh(4, 1, devices)
    with pytest.raises(ConfigError, match=rf"^data_devices: got {devices}, allowed is one of \[1, 2, 4, 8\]"):
        make_mesh(1, 16, data_devices=devices)


@pytest.mark.slow
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
