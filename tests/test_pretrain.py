"""Pre-training learns, and an interrupted run ends with the same numbers as one that was not."""

import dataclasses
import functools
import json
import shutil
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ckl_jax import pretrain as pretrain_lib
from ckl_jax.checkpoint.store import is_saved, load_model
from ckl_jax.config import PretrainConfig
from ckl_jax.datasets import load_stream, sample_documents
from ckl_jax.datasets.stream import Windows
from ckl_jax.errors import ConfigError
from ckl_jax.next_character import (
    batch_gradient,
    init_params,
    init_state,
    make_mesh,
    make_optimizer,
    next_token_loss,
    sinusoids,
    train_step,
)
from ckl_jax.pretrain import pretrain
from ckl_jax.runs.directory import RunDirectory
from ckl_jax.runtime import sharding
from ckl_jax.runtime.finite import NotFiniteError
from ckl_jax.runtime.preemption import PreemptedError
from ckl_jax.tasks.columns import SUBTRACTION


@pytest.fixture(scope="module")
def config(small_model):
    return PretrainConfig(
        max_digits=1,
        num_documents=60,
        packing="documents",
        batch_size=4,
        num_steps=24,
        warmup_steps=4,
        learning_rate=1e-2,
        ema_decay=0.6,
        start_share=0.25,
        checkpoint_every=8,
        eval_problems=2,
        model=dataclasses.replace(small_model, block_size=280),
    )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


def _run(config, path, data_dir, progress=lambda line: None):
    directory = RunDirectory(path, {"command": "pretrain", **dataclasses.asdict(config)})
    return pretrain(config, directory, data_dir, progress), directory.metrics()


@pytest.fixture(scope="module")
def uninterrupted(config, data_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("uninterrupted")
    before = train_step._cache_size()
    finished = _run(config, path, data_dir)
    assert train_step._cache_size() == before + 1, "one compilation serves all steps"
    return path, *finished


def test_a_run_logs_each_checkpoint_and_its_loss_falls(uninterrupted):
    _, _, metrics = uninterrupted
    assert [record["step"] for record in metrics] == [8, 16, 24]
    assert all(np.isfinite(value) for record in metrics for value in record.values())
    assert {"loss", "grad_norm", "accuracy_varying_1", "accuracy_varying_2"} <= metrics[0].keys()
    losses = [record["loss"] for record in metrics]
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 0.8 * np.log(41)


@pytest.mark.parametrize(
    ("change", "dropout"),
    [({"packing": "stream", "start_share": 0.0, "batch_size": 2}, 0.0), ({"optimizer": "muon"}, 0.2)],
    ids=["stream", "muon and dropout"],
)
def test_the_loss_falls_with_the_other_packing_and_optimizer_and_with_dropout(config, data_dir, change, dropout):
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=dropout), **change)
    stream = load_stream(config.max_digits, config.num_documents, config.seed, data_dir=data_dir)
    state, losses = jax.jit(functools.partial(init_state, config))(), []
    stream = jax.tree.map(jnp.asarray, stream)
    for _ in range(24):
        state, metrics = train_step(config, state, stream)
        losses.append(float(metrics["loss"]))
    losses = np.mean(np.reshape(losses, (3, 8)), axis=1)
    assert state.step == 24
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 0.85 * np.log(41)


def test_the_moving_average_is_what_is_saved_and_a_plain_loop_finds_it(config, data_dir, uninterrupted):
    mesh = make_mesh(config)
    everywhere = sharding.everywhere(mesh)
    stream = load_stream(config.max_digits, config.num_documents, config.seed, data_dir=data_dir)
    stream = sharding.put(stream, everywhere)
    state = jax.jit(functools.partial(init_state, config), out_shardings=everywhere)()
    expected = jax.device_get(state.params)
    for step in range(config.num_steps):
        with jax.set_mesh(mesh):
            state, _ = train_step(config, state, stream)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, expected, jax.device_get(state.params))
    chex.assert_trees_all_close(state.average, expected, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_equal(uninterrupted[1].params, state.average)
    assert optax.tree.norm(optax.tree.sub(state.average, state.params)) > 1e-3


@pytest.mark.usefixtures("uninterrupted")  # Which compiles the step.
def test_every_step_has_a_batch_of_its_own(config, data_dir):
    mesh = make_mesh(config)
    everywhere = sharding.everywhere(mesh)
    stream = load_stream(config.max_digits, config.num_documents, config.seed, data_dir=data_dir)
    stream = sharding.put(stream, everywhere)
    start = jax.jit(functools.partial(init_state, config), out_shardings=everywhere)
    losses = []
    for step in (0, 0, 1):
        with jax.set_mesh(mesh):
            state = start()._replace(step=sharding.put(np.int32(step), everywhere))
            losses.append(float(train_step(config, state, stream)[1]["loss"]))
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_take_the_step_of_the_whole_batch(config, data_dir, microbatches):
    config = dataclasses.replace(config, packing="stream", start_share=0.0, num_steps=25)  # Windows are never the same.
    stream = load_stream(config.max_digits, config.num_documents, config.seed, data_dir=data_dir)
    whole, in_parts = (
        train_step(changed, jax.jit(functools.partial(init_state, config))(), jax.tree.map(jnp.asarray, stream))
        for changed in (config, dataclasses.replace(config, microbatches=microbatches))
    )
    np.testing.assert_allclose(in_parts[1]["loss"], whole[1]["loss"], rtol=1e-5)
    np.testing.assert_allclose(in_parts[1]["grad_norm"], whole[1]["grad_norm"], rtol=1e-4)


def test_masked_positions_count_once_in_microbatches(config):
    """The parts have unequal shares of the unmasked positions."""
    tokens = jax.random.randint(jax.random.key(0), (4, 12), 0, 41)
    mask = jnp.arange(12)[None] < jnp.array([[12], [1], [5], [0]])
    zeros = jnp.zeros_like(tokens)
    windows = Windows(tokens, tokens[:, ::-1], zeros + jnp.arange(12)[None], zeros, mask)
    params = init_params(config)
    whole = jax.value_and_grad(functools.partial(next_token_loss, config))(params, windows, jax.random.key(1))
    in_parts = batch_gradient(dataclasses.replace(config, microbatches=2), params, windows, jax.random.key(1))
    chex.assert_trees_all_close(in_parts, whole, rtol=1e-4, atol=1e-6)


def test_microbatches_divide_the_batch(config):
    with pytest.raises(ConfigError, match=r"^microbatches: got 3, allowed is a divisor of batch_size = 4"):
        dataclasses.replace(config, microbatches=3)


def test_without_a_decay_the_last_parameters_are_tested(config):
    state = jax.eval_shape(functools.partial(init_state, dataclasses.replace(config, ema_decay=0.0)))
    assert state.average is None
    assert state.tested is state.params


@pytest.mark.parametrize(("share", "last"), [(0.0, 0.0), (0.1, 0.001)])
def test_the_learning_rate_ends_at_its_share_of_the_peak(config, share, last):
    config = dataclasses.replace(config, final_learning_rate=share, ema_decay=0.0, weight_decay=0.0)
    optimizer, params = make_optimizer(config), {"w": jnp.ones((2, 2))}
    state, sizes = optimizer.init(params), []
    for _ in range(config.num_steps + 1):
        updates, state = optimizer.update({"w": jnp.full((2, 2), 0.1)}, state, params)
        sizes.append(float(jnp.abs(updates["w"]).max()))
    assert np.argmax(sizes) == config.warmup_steps
    np.testing.assert_allclose([sizes[config.warmup_steps], sizes[-1]], [0.01, last], atol=1e-6)


PARAMS = {"wte": {"w": jnp.ones((2, 3))}, "h_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}


def first_updates(config, gradient, **changes):
    """At the peak of the learning rate: of the shapes of ``PARAMS``."""
    config = dataclasses.replace(config, warmup_steps=0, **changes)
    optimizer = make_optimizer(config)
    gradients = jax.tree.map(lambda x: jnp.full(x.shape, gradient), PARAMS)
    return config, optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)[0]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weights_decay_and_biases_do_not(config, name):
    config, updates = first_updates(config, 0.0, optimizer=name, weight_decay=0.5)
    decayed = -config.learning_rate * 0.5
    np.testing.assert_allclose(updates["h_0"]["kernel"], decayed, rtol=1e-5)
    np.testing.assert_allclose(updates["wte"]["w"], decayed if name == "adamw" else 0.0, rtol=1e-5)
    np.testing.assert_array_equal(updates["h_0"]["bias"], 0.0)


def test_muon_is_for_the_layers_matrices_and_adam_for_the_rest(config):
    """Of one gradient everywhere Adam makes one step everywhere, Muon one of its own size."""
    _, updates = first_updates(config, 0.1, optimizer="muon", weight_decay=0.0)
    adam = updates["h_0"]["bias"][0]
    np.testing.assert_allclose(updates["wte"]["w"], adam, rtol=1e-5)
    assert np.abs(updates["h_0"]["kernel"] / adam - 1).min() > 0.1


@pytest.mark.parametrize(
    ("name", "first"),
    [("adamw", 0.029 / 0.19), ("muon", 0.9 * 0.029 / 0.271 + 0.1 * 0.2 / 0.19)],
    ids=["adamw", "muon"],
)
def test_the_second_step_of_adam_has_the_moments_of_both_gradients(config, name, first):
    """0.1, then 0.2: the first moment is 0.029 / 0.19, within Muon as Nesterov has it; the second 0.0225 / 0.75."""
    constant = {"warmup_steps": 0, "final_learning_rate": 1.0, "weight_decay": 0.0, "clip_norm": 100.0}
    optimizer = make_optimizer(dataclasses.replace(config, optimizer=name, adam_beta2=0.5, **constant))
    state = optimizer.init(PARAMS)
    for gradient in (0.1, 0.2):
        gradients = jax.tree.map(lambda x, size=gradient: jnp.full(x.shape, size), PARAMS)
        updates, state = optimizer.update(gradients, state, PARAMS)
    np.testing.assert_allclose(updates["h_0"]["bias"], -0.01 * first / 0.03**0.5, rtol=1e-5)


def test_muons_update_has_a_fifth_of_the_learning_rate_as_its_root_mean_square(config):
    """So that it is as large as Adam's. Newton and Schulz's five steps make a singular value of 1/2 about 1."""
    config = dataclasses.replace(config, optimizer="muon", warmup_steps=0, weight_decay=0.0)
    optimizer, params = make_optimizer(config), {"h_0": {"kernel": jnp.eye(4)}}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    value = 0.5
    for _ in range(5):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    found = np.sqrt(np.mean(np.square(updates["h_0"]["kernel"])))
    np.testing.assert_allclose(found, 0.2 * config.learning_rate * value, rtol=1e-3)


def test_gradients_are_clipped_by_their_global_norm(config):
    """Beyond the norm the optimizer's state does not depend on their size, below it does."""
    optimizer = make_optimizer(dataclasses.replace(config, optimizer="adamw", clip_norm=0.1))

    def after(size):
        gradients = jax.tree.map(lambda x: jnp.full(x.shape, size), PARAMS)
        return optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)[1]

    def size(state):
        return sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(state) if x.ndim)

    chex.assert_trees_all_close(after(1.0), after(100.0), rtol=1e-5)
    assert size(after(1.0)) > 3 * size(after(1e-3))


@pytest.mark.parametrize("width", [8, 7])
def test_sinusoids_say_how_far_two_positions_are_apart(width):
    rows = np.asarray(sinusoids(50, width), np.float64)
    assert rows.shape == (50, width)
    np.testing.assert_allclose(rows[3, 0], 2**0.5 * np.sin(3), rtol=1e-6)
    np.testing.assert_allclose(rows[3, -(-width // 2)], 2**0.5 * np.cos(3), rtol=1e-6)
    if width % 2 == 0:
        products = rows @ rows.T
        for apart in range(5):
            np.testing.assert_allclose(np.diagonal(products, apart), products[0, apart], rtol=1e-4)
        np.testing.assert_allclose(np.mean(rows**2, axis=1), 1, rtol=1e-5)


def test_only_the_positions_start_as_sinusoids(config):
    found = init_params(dataclasses.replace(config, position_init="sinusoidal"))["params"]
    expected = init_params(config)["params"]
    positions = found.pop("wpe")["embedding"]
    assert positions.shape == expected.pop("wpe")["embedding"].shape
    np.testing.assert_allclose(np.std(positions), 0.02, rtol=0.2)
    chex.assert_trees_all_equal(found, expected)


def test_dropout_is_a_function_of_its_key(config, data_dir):
    stream = load_stream(config.max_digits, config.num_documents, config.seed, data_dir=data_dir)
    windows = sample_documents(stream, jax.random.key(0), 2, 118, config.model.block_size)
    params = jax.jit(functools.partial(init_params, config))()
    dropping = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.5))
    loss = jax.jit(functools.partial(next_token_loss, dropping))
    first, again, other = (loss(params, windows, jax.random.key(seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_the_saved_model_is_the_returned_one_and_says_how_it_was_made(config, uninterrupted):
    path, model, _ = uninterrupted
    loaded = load_model(path)
    assert loaded.config == config.model
    assert loaded.max_pretrain_digits == 1
    chex.assert_trees_all_equal(loaded.params, model.params)
    made_by = json.loads((path / "model.json").read_text())["made_by"]
    assert made_by["config"] == dataclasses.asdict(config)


def test_another_task_is_learned_from_its_own_dataset_and_tested_on_its_own_problems(
    config, data_dir, tmp_path, monkeypatch
):
    judged = []

    def judge(model, problems, digits):
        judged.append((model.task, problems))
        return np.arange(4) < digits

    monkeypatch.setattr(pretrain_lib, "judge", judge)
    model, metrics = _run(dataclasses.replace(config, task="subtraction", num_steps=8), tmp_path / "run", data_dir)
    assert model.task == load_model(tmp_path / "run").task == SUBTRACTION
    assert [record["step"] for record in metrics] == [8]
    drawn = [SUBTRACTION.varying_problems(np.random.default_rng([0, digits]), 2, digits) for digits in (1, 2)]
    assert judged == [(SUBTRACTION, drawn[0]), (SUBTRACTION, drawn[1])]
    assert [metrics[0][f"accuracy_varying_{digits}"] for digits in (1, 2)] == [0.25, 0.5]


def test_devices_that_cannot_share_a_batch_are_refused_before_the_dataset_is_prepared(config, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_lib, "load_stream", lambda *_, **__: pytest.fail("prepared"))
    command = pretrain_lib.PretrainCommand(dataclasses.replace(config, data_devices=3), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"^data_devices: got 3"):
        pretrain_lib.main(command)
    assert not (tmp_path / "run").exists()


def test_training_ends_at_the_target_accuracy_and_stays_there(config, data_dir, tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.0, 0.9, 0.0])
    monkeypatch.setattr(pretrain_lib, "judge", lambda *arguments: np.array([next(accuracies)]))
    config = dataclasses.replace(config, target_accuracy=0.9)
    ended, metrics = _run(config, tmp_path, data_dir, lambda line: None)
    assert [record["step"] for record in metrics] == [8, 16]
    again, metrics = _run(config, tmp_path, data_dir, lambda line: None)
    assert [record["step"] for record in metrics] == [8, 16]
    chex.assert_trees_all_equal(again.params, ended.params)


class _KilledError(Exception):
    pass


def _killed_after_a_checkpoint(monkeypatch):
    def progress(line):
        if line.startswith("step 16/"):
            raise _KilledError

    return progress


def _interrupted_before_a_checkpoint(monkeypatch):
    calls = []
    log = RunDirectory.log

    def interrupted_log(self, records):
        log(self, records)
        calls.append(records)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunDirectory, "log", interrupted_log)
    return lambda line: None


@pytest.mark.parametrize("interruption", [_killed_after_a_checkpoint, _interrupted_before_a_checkpoint])
def test_an_interrupted_run_ends_with_the_same_bits(
    config, data_dir, tmp_path, uninterrupted, monkeypatch, interruption
):
    path, expected, _ = uninterrupted
    with monkeypatch.context() as patch, pytest.raises((_KilledError, KeyboardInterrupt)):
        _run(config, tmp_path, data_dir, interruption(patch))
    assert not (tmp_path / "model.json").exists()
    shown = []
    model, _ = _run(config, tmp_path, data_dir, shown.append)
    assert 0 < len(shown) < 3
    chex.assert_trees_all_equal(model.params, expected.params)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (path / "metrics.jsonl").read_bytes()


def test_a_run_goes_on_with_other_speed_to_the_same_numbers(config, data_dir, tmp_path, uninterrupted, monkeypatch):
    _, expected, metrics = uninterrupted
    other = dataclasses.replace(
        config, data_devices=2, shard_state=True, model=dataclasses.replace(config.model, attention_chunk=100)
    )
    with pytest.raises(_KilledError):
        _run(config, tmp_path, data_dir, _killed_after_a_checkpoint(monkeypatch))
    model, found = _run(other, tmp_path, data_dir)
    chex.assert_trees_all_close(found, metrics, rtol=1e-2)
    chex.assert_trees_all_close(model.params, expected.params, atol=1e-3)
    with pytest.raises(ConfigError, match=r"^num_steps: got 48, allowed is 24, .* learning_rate = 0\.01 its training"):
        _run(dataclasses.replace(other, num_steps=48), tmp_path, data_dir)


def _at_step(monkeypatch, step, act):
    """Calls ``act`` on the state before that step; what it returns is trained on."""
    reached = []

    def train(config, state, stream):
        reached.append(int(state.step) + 1)
        return train_step(config, act(state) if reached[-1] == step else state, stream)

    monkeypatch.setattr(pretrain_lib, "train_step", train)
    return reached


def test_sigterm_saves_within_a_chunk_and_the_run_ends_with_the_same_bits(
    config, data_dir, tmp_path, uninterrupted, monkeypatch
):
    path, expected, metrics = uninterrupted
    expected = jax.tree.map(np.asarray, expected.params)

    def signalled(state):
        signal.raise_signal(signal.SIGTERM)
        return state

    for step, logged in ((3, 0), (8, 0), (14, 1), (15, 1), (24, 2)):
        with monkeypatch.context() as patch:
            reached = _at_step(patch, step, signalled)
            with pytest.raises(PreemptedError, match=rf"^step {step}/24 is saved in {tmp_path}$"):
                _run(config, tmp_path, data_dir)
        assert reached[-1] == step
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] if logged else []
        assert records == metrics[:logged]
    assert not (tmp_path / "model.json").exists()
    model, _ = _run(config, tmp_path, data_dir)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, model.params), expected)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (path / "metrics.jsonl").read_bytes()


def test_sigterm_during_a_test_ends_the_run_with_its_block(config, data_dir, tmp_path, uninterrupted, monkeypatch):
    path, _, metrics = uninterrupted
    judge = pretrain_lib.judge

    def signalled(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return judge(*arguments)

    with monkeypatch.context() as patch:
        reached = _at_step(patch, 0, lambda state: state)
        patch.setattr(pretrain_lib, "judge", signalled)
        with pytest.raises(PreemptedError, match=rf"^step 8/24 is saved in {tmp_path}$"):
            _run(config, tmp_path, data_dir)
    assert reached[-1] == 8
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == metrics[:1]
    _run(config, tmp_path, data_dir)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (path / "metrics.jsonl").read_bytes()


def test_a_loss_that_is_not_finite_ends_the_run_and_the_last_good_state_is_kept(
    config, data_dir, tmp_path, uninterrupted, monkeypatch
):
    path, _, metrics = uninterrupted

    def poisoned(state):
        return state._replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))

    for step, message in ((13, "step 13 of seed 0: loss is nan"), (10, "step 10 of seed 0: loss is nan")):
        with monkeypatch.context() as patch:
            _at_step(patch, step, poisoned)
            with pytest.raises(NotFiniteError, match=message):
                _run(config, tmp_path, data_dir)
        saved = {file.name for file in (tmp_path / "checkpoints").iterdir()}
        assert saved == {"8", "8.sha256.json"}
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == metrics[0]
    _run(config, tmp_path, data_dir)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (path / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("speed", [{}, {"microbatches": 2}])
def test_a_finished_run_is_not_trained_again(config, data_dir, uninterrupted, monkeypatch, speed):
    path, expected, metrics = uninterrupted
    monkeypatch.setattr("ckl_jax.pretrain.train_step", None)
    files = {
        file: file.read_bytes()
        for file in [path / "model.json", *path.glob("params*/**/*"), *path.glob("params.*")]
        if file.is_file()
    }
    model, again = _run(dataclasses.replace(config, **speed), path, data_dir)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, model.params), jax.tree.map(np.asarray, expected.params))
    assert again == metrics
    assert {file: file.read_bytes() for file in files} == files


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew_over_its_records(config, data_dir, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ConfigError, match=r"^out: .* has records up to step 24 and no checkpoint to go on from"):
        _run(config, tmp_path / "run", data_dir)
    for name in ("metrics.jsonl", "model.json"):
        assert (tmp_path / "run" / name).read_bytes() == (uninterrupted[0] / name).read_bytes()


@pytest.mark.parametrize("name", ["model.json", "params.sha256.json"])
def test_a_finished_run_saves_a_model_that_is_missing_or_another_ones(config, data_dir, uninterrupted, tmp_path, name):
    path, expected, _ = uninterrupted
    shutil.copytree(path, tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    _run(config, tmp_path / "run", data_dir)
    chex.assert_trees_all_equal(load_model(tmp_path / "run").params, jax.tree.map(np.asarray, expected.params))
    described = tmp_path / "run" / "model.json"
    described.write_text(described.read_text().replace('"num_steps": 24', '"num_steps": 16'))
    assert not is_saved(tmp_path / "run", json.loads((path / "model.json").read_text())["made_by"])
    _run(config, tmp_path / "run", data_dir)
    assert described.read_text() == (path / "model.json").read_text()
