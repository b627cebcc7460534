"""Minibatches of single transitions, on a random model of one layer and hand-made episodes of random lengths."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from policies import untrained

from ckl_jax.certainty import certainty
from ckl_jax.checkpoint.store import Model, load_model
from ckl_jax.config import FinetuneConfig
from ckl_jax.errors import ConfigError
from ckl_jax.finetune import finetune
from ckl_jax.rl import minibatches as transitions
from ckl_jax.rl import setup
from ckl_jax.rl.assessment import Episodes
from ckl_jax.rl.objective import loss_terms
from ckl_jax.rl.program import Hyper, draw_problems, make_program
from ckl_jax.rl.updates import init_run, train_rounds, update
from ckl_jax.rollout.trajectory import Trajectory
from ckl_jax.runs.directory import RunDirectory
from ckl_jax.runtime.sharding import make_mesh

CONFIG = FinetuneConfig(
    minibatch="transitions",
    minibatch_transitions=8,
    transition_batch=4,
    extra_length=0,
    episodes=4,
    diagnostic_episodes=1,
    rounds=2,
    test_every=1,
    test_problems=2,
    final_problems=2,
    learning_rate=1e-3,
    adam_epsilon=1e-3,
    entropy_coefficient=0.5,
    value_coefficient=0.5,
    kl_coefficient=2.0,
    beta=1.0,
    normalize_advantages=False,
    rollout="plain",
    data_devices=1,
)
HYPER = Hyper(jnp.uint32(0), jnp.float32(1e-3), jnp.float32(2.0), jnp.float32(1.0), jnp.int32(0))
ANSWER_LENGTHS = (5, 12, 1, 9)
PROMPT_LENGTHS = (7, 3, 6, 1)
COUNT = sum(ANSWER_LENGTHS)


@pytest.fixture(scope="module")
def model(small_model):
    return Model(small_model, 1, untrained(small_model, contrast=10))


@pytest.fixture(scope="module")
def program(model):
    return make_program(CONFIG, model)


@pytest.fixture(scope="module")
def params(program, model):
    """A critic with opinions: a fresh one says 0 and gives the trunk no gradient."""
    params = init_run(program, model.params, HYPER).params
    params["value"] = jax.tree.map(lambda x: x + 0.1, params["value"])
    return params


@pytest.fixture(scope="module")
def episodes():
    """Random characters; prompts of up to 7 columns, answers of up to 12 of 13."""
    rng = np.random.default_rng(0)
    tokens_BxL = rng.integers(0, 41, (4, 20))
    positions_BxL = np.arange(20)[None] - (7 - np.array(PROMPT_LENGTHS))[:, None]
    mask_BxT = np.arange(13)[None] < np.array(ANSWER_LENGTHS)[:, None]
    ref_logits_BxTxV = 2 * rng.normal(size=(4, 13, 41))
    trajectory = Trajectory(
        jnp.asarray(tokens_BxL, jnp.int32),
        jnp.asarray(np.maximum(positions_BxL, 0), jnp.int32),
        jnp.asarray(positions_BxL >= 0, jnp.int32),
        jnp.zeros((4, 13)),
        jnp.asarray(mask_BxT),
        jnp.zeros(4),
    )
    ref_logits_BxTxV = jnp.asarray(ref_logits_BxTxV, jnp.float32)
    advantages_BxT, returns_BxT = jnp.asarray(rng.normal(size=(2, 4, 13)), jnp.float32)
    sure_BxT = certainty(ref_logits_BxTxV)
    weights_BxT = jnp.where(trajectory.mask_BxT, sure_BxT, 0.0)
    held_BxT = trajectory.mask_BxT & (advantages_BxT > 0)
    unlikely_BxT = trajectory.mask_BxT & (advantages_BxT < 0)
    return Episodes(
        trajectory,
        ref_logits_BxTxV,
        sure_BxT,
        advantages_BxT,
        returns_BxT,
        weights_BxT,
        held_BxT,
        unlikely_BxT,
        sure_BxT,
    )


@pytest.fixture
def two_buckets(monkeypatch):
    """Buckets of 16 and 19 columns."""
    monkeypatch.setattr(transitions, "ALIGNMENT", 16)


_shuffled = jax.jit(transitions.shuffled)
_minibatch = jax.jit(transitions.minibatch, static_argnums=4)


def _epoch(episodes, size, key=0):
    """All minibatches of an epoch, and its shuffled transitions' count."""
    order_BT, count = _shuffled(jax.random.key(key), episodes.trajectory.mask_BxT)
    number = -(-int(count) // size)
    return [_minibatch(episodes.trajectory, order_BT, count, i, size) for i in range(number)]


def _pairs(minibatch):
    rows_M, steps_M, lengths_M = (np.asarray(x) for x in minibatch)
    return list(zip(rows_M[lengths_M > 0].tolist(), steps_M[lengths_M > 0].tolist(), strict=True))


@pytest.mark.parametrize("size", [1, 8, 9, 100])
def test_an_epoch_has_every_valid_transition_once_and_no_other(episodes, size):
    minibatches = _epoch(episodes, size)
    assert [len(_pairs(m)) for m in minibatches[:-1]] == [size] * (len(minibatches) - 1)
    found = [pair for minibatch in minibatches for pair in _pairs(minibatch)]
    expected = [(row, step) for row, length in enumerate(ANSWER_LENGTHS) for step in range(length)]
    assert sorted(found) == expected


def test_transitions_are_shuffled_over_all_episodes_and_anew_by_every_key(episodes):
    pairs = []
    for key in range(200):
        order_BT, count = _shuffled(jax.random.key(key), episodes.trajectory.mask_BxT)
        pairs += _pairs(_minibatch(episodes.trajectory, order_BT, count, 0, 1))
    rows, counts = np.unique([row for row, _ in pairs], return_counts=True)
    np.testing.assert_array_equal(rows, range(4))
    np.testing.assert_allclose(counts / 200, np.array(ANSWER_LENGTHS) / COUNT, atol=0.12)
    assert len(set(pairs)) > 20


def test_a_minibatch_goes_from_short_to_long_prefixes_and_fillers_have_length_0(episodes):
    for minibatch in _epoch(episodes, 10):
        rows_M, steps_M, lengths_M = (np.asarray(x) for x in minibatch)
        valid = lengths_M > 0
        np.testing.assert_array_equal(lengths_M, np.sort(lengths_M))
        np.testing.assert_array_equal(lengths_M[valid], (np.array(PROMPT_LENGTHS)[rows_M] + steps_M)[valid])
    assert valid.sum() == COUNT % 10


@pytest.mark.parametrize(("number", "expected"), [(1, [19]), (2, [16, 19]), (8, [16, 19])])
def test_buckets_end_with_the_longest_possible_prefix(episodes, two_buckets, number, expected):
    assert transitions.buckets(episodes.trajectory, number) == expected


def test_there_are_no_more_buckets_than_asked_for(episodes):
    for columns in range(2, 600):
        trajectory = episodes.trajectory._replace(tokens_BxL=jax.ShapeDtypeStruct((1, columns), jnp.int32))
        lengths = transitions.buckets(trajectory)
        assert len(lengths) <= transitions.BUCKETS
        assert lengths[-1] == columns - 1
        assert (np.diff([0, *lengths]) > 0).all()


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_gradient(program, params, episodes):
    def loss(params):
        terms = loss_terms(program, HYPER, params, episodes)
        return sum(terms.values()), terms

    (_, terms), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return terms, grads


@pytest.mark.parametrize("options", [{"kl": "exact"}, {"kl": "k2", "detach_critic": True, "temperature": 2.0}])
def test_all_transitions_as_one_minibatch_have_the_episodes_loss_and_gradient(program, params, episodes, options):
    program = program._replace(config=dataclasses.replace(CONFIG, **options))
    expected = _loss_and_gradient(program, params, episodes)
    (minibatch,) = _epoch(episodes, COUNT + 3)
    found = _loss_and_gradient(program, params, transitions.cut(episodes, minibatch, 19))
    assert min(abs(term) for term in expected[0].values()) > 1e-3
    assert optax.tree.norm(expected[1]["policy"]) > 1e-2
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [11, 16, 19])
def test_the_bucket_has_no_influence(program, params, episodes, length):
    """The longest of these prefixes has 11 characters."""
    minibatch = transitions.Indices(*(jnp.array(x) for x in ([0, 1, 3, 1], [4, 0, 7, 5], [11, 3, 8, 8])))
    found = _loss_and_gradient(program, params, transitions.cut(episodes, minibatch, length))
    expected = _loss_and_gradient(program, params, transitions.cut(episodes, minibatch, 12))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_follows_a_transition_has_no_influence_and_what_precedes_it_has(program, params, episodes):
    minibatch = transitions.Indices(jnp.array([0, 1]), jnp.array([2, 6]), jnp.array([9, 9]))

    def changed(row, columns):
        tokens_BxL = episodes.trajectory.tokens_BxL
        tokens_BxL = tokens_BxL.at[row, columns].set((tokens_BxL[row, columns] + 1) % 41)
        other = episodes._replace(trajectory=episodes.trajectory._replace(tokens_BxL=tokens_BxL))
        return _loss_and_gradient(program, params, transitions.cut(other, minibatch, 16))[0]

    same = changed(0, slice(0, 0))
    for row, columns in ((0, slice(7 + 2 + 1, 20)), (1, slice(7 + 6 + 1, 20)), (1, slice(0, 4)), (2, slice(0, 20))):
        chex.assert_trees_all_equal(changed(row, columns), same)
    for row, column in ((0, 0), (0, 6), (0, 8), (0, 9), (1, 4), (1, 12), (1, 13)):
        assert changed(row, slice(column, column + 1))["policy"] != same["policy"], (row, column)


def _updated(config, model, params, episodes, hyper=HYPER, key=3, axis_name=None):
    program = make_program(config, model)
    state = init_run(program, model.params, hyper)._replace(params=params)
    return update(program, hyper, state, episodes, jax.random.key(key), axis_name)


def _assert_same_update(found, expected):
    chex.assert_trees_all_close(found[0].params, expected[0].params, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(found[1], expected[1], rtol=1e-3, atol=1e-5)


def test_one_update_of_all_transitions_is_one_update_of_all_episodes(model, params, episodes):
    whole = dataclasses.replace(CONFIG, minibatch="episodes", minibatch_episodes=4)
    single = dataclasses.replace(CONFIG, minibatch_transitions=COUNT + 3, transition_batch=10)
    expected = jax.jit(functools.partial(_updated, whole, model))(params, episodes)
    found = jax.jit(functools.partial(_updated, single, model))(params, episodes)
    assert found[1]["updates"] == expected[1]["updates"] == 1
    moved = jax.tree.map(jnp.subtract, expected[0].params["policy"], params["policy"])
    assert optax.tree.norm(moved) > 1e-2
    _assert_same_update(found, expected)


def test_an_update_is_adams_over_the_minibatches_of_its_key_one_after_another(model, params, episodes, two_buckets):
    """Against a plain loop over two epochs, the last minibatch of each averaged over what is left."""
    config = dataclasses.replace(CONFIG, epochs=2, learning_rate_decay=False)
    program = make_program(config, model)
    adam = optax.scale_by_adam(eps=config.adam_epsilon)
    rates = {"policy": float(HYPER.learning_rate), "value": config.value_learning_rate}
    expected, opt_state, of_terms = params, adam.init(params), []
    for key in jax.random.split(jax.random.key(3), 2):
        order_BT, _ = transitions.shuffled(key, episodes.trajectory.mask_BxT)
        for start in range(0, COUNT, 8):
            flat_M = order_BT[start : min(start + 8, COUNT)]
            rows_M, steps_M = flat_M // 13, flat_M % 13
            fillers = 8 - len(flat_M)
            lengths_M = jnp.pad(jnp.ones(len(flat_M), int), (0, fillers))
            pad = functools.partial(jnp.pad, pad_width=(0, fillers))
            batch = transitions.cut(episodes, transitions.Indices(pad(rows_M), pad(steps_M), lengths_M), 19)
            terms, grads = _loss_and_gradient(program, expected, batch)
            directions, opt_state = adam.update(grads, opt_state)
            expected = {
                name: jax.tree.map(lambda p, d, rate=rate: p - rate * d, expected[name], directions[name])
                for name, rate in rates.items()
            }
            of_terms.append(terms)
    state, metrics = jax.jit(functools.partial(_updated, config, model))(params, episodes)
    assert metrics["updates"] == len(of_terms) == 8
    chex.assert_trees_all_close(state.params, expected, rtol=1e-4, atol=1e-5)
    for name in of_terms[0]:
        mean = np.mean([terms[name] for terms in of_terms])
        np.testing.assert_allclose(metrics[f"loss/{name}"], mean, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("options", [{"transition_batch": 1}, {"transition_batch": 8}])
def test_computing_fewer_transitions_together_changes_nothing(model, params, episodes, options):
    expected = jax.jit(functools.partial(_updated, CONFIG, model))(params, episodes)
    config = dataclasses.replace(CONFIG, **options)
    _assert_same_update(jax.jit(functools.partial(_updated, config, model))(params, episodes), expected)


def test_vmapped_runs_with_different_counts_update_as_each_alone(model, params, episodes, two_buckets):
    """The second run has fewer transitions, so that it has ended when the first goes on."""
    few = episodes._replace(
        trajectory=episodes.trajectory._replace(mask_BxT=episodes.trajectory.mask_BxT.at[1:, 2:].set(False))
    )
    both = jax.tree.map(lambda *x: jnp.stack(x), episodes, few)
    hypers = HYPER._replace(kl_coefficient=jnp.array([2.0, 1.0]))
    axes = Hyper(None, None, 0, None, None)

    def run(axis_name):
        return lambda hyper, episodes: _updated(CONFIG, model, params, episodes, hyper, axis_name=axis_name)

    together = jax.jit(jax.vmap(run("runs"), (axes, 0), axis_name="runs"))(hypers, both)
    np.testing.assert_array_equal(together[1]["updates"], [4, 2])
    alone = jax.jit(run(None))
    for index, one in enumerate((episodes, few)):
        hyper = hypers._replace(kl_coefficient=hypers.kl_coefficient[index])
        _assert_same_update(jax.tree.map(lambda x, i=index: x[i], together), alone(hyper, one))


class _KilledError(Exception):
    pass


ARMS = {"standard": {"beta": 0.0}, "prioritized": {"beta": 1.0}}


def _finetune(config, model, path, progress=lambda line: None):
    directory = RunDirectory(path, {"command": "finetune", **dataclasses.asdict(config)})
    return finetune(config, model, directory, ARMS, 1, progress)


@pytest.fixture(scope="module")
def finetuned(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("finetuned")
    before = train_rounds._cache_size()
    runs = _finetune(CONFIG, model, path)
    assert train_rounds._cache_size() == before + 1
    return path, runs


def _rounds(path):
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "updates" in record]


def test_a_fine_tuning_with_transitions_logs_its_updates_and_moves_the_policy(finetuned, model, program):
    path, runs = finetuned
    records = _rounds(path)
    assert [(r["step"], r["arm"]) for r in records] == [(step, run.arm) for step in (1, 2) for run in runs]
    for record in records:
        transitions_of_round = record["length"] * CONFIG.episodes
        assert record["updates"] == np.ceil(transitions_of_round / 8)
        assert record["updates"] > 4
        assert all(np.isfinite(record[f"{kind}/{t}"]) for kind in ("loss", "grad_norm") for t in ("policy", "kl"))
    for run in runs:
        policy = load_model(path / run.name).params
        assert optax.tree.norm(jax.tree.map(jnp.subtract, policy, model.params)) > 1e-2


@pytest.mark.slow
def test_an_interrupted_fine_tuning_with_transitions_ends_with_the_same_bits(finetuned, model, tmp_path):
    path, runs = finetuned

    def killed(line):
        if line.startswith("round 1/"):
            raise _KilledError

    with pytest.raises(_KilledError):
        _finetune(CONFIG, model, tmp_path, killed)
    assert _finetune(CONFIG, model, tmp_path) == runs
    assert (tmp_path / "metrics.jsonl").read_bytes() == (path / "metrics.jsonl").read_bytes()
    for run in runs:
        chex.assert_trees_all_equal(load_model(tmp_path / run.name).params, load_model(path / run.name).params)


@pytest.mark.slow
def test_runs_side_by_side_are_the_runs_one_at_a_time(finetuned, model, tmp_path, monkeypatch):
    path, runs = finetuned
    monkeypatch.setattr(setup, "make_mesh", lambda config, num_runs: make_mesh(1, 1))  # Each has its own else.
    _finetune(dataclasses.replace(CONFIG, runs_at_once=2), model, tmp_path)
    for found, expected in zip(_rounds(tmp_path)[:2], _rounds(path)[:2], strict=True):
        assert found.pop("arm") == expected.pop("arm")
        assert found["updates"] == expected["updates"]
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-4, err_msg=name)
    assert all((tmp_path / run.name).exists() for run in runs)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("minibatch", "tokens", "episodes | transitions"),
        ("minibatch_transitions", 0, "at least 1"),
        ("transition_batch", 0, "at least 1"),
    ],
)
def test_bad_values_are_refused_with_one_line_that_names_the_field(field, value, allowed):
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(CONFIG, **{field: value})
    assert str(error.value) == f"{field}: got {value!r}, allowed is {allowed}"


def test_a_minibatch_has_at_most_the_transitions_that_a_round_can_have(model):
    most = CONFIG.episodes * make_program(CONFIG, model).max_length
    make_program(dataclasses.replace(CONFIG, minibatch_transitions=most), model)
    whole = dataclasses.replace(CONFIG, minibatch="episodes", minibatch_episodes=4)
    make_program(dataclasses.replace(whole, minibatch_transitions=most + 1), model)
    with pytest.raises(ConfigError) as error:
        make_program(dataclasses.replace(CONFIG, minibatch_transitions=most + 1), model)
    allowed = f"at most episodes * the longest answer = {most}"
    assert str(error.value) == f"minibatch_transitions: got {most + 1}, allowed is {allowed}"


def test_minibatches_of_transitions_ask_nothing_of_the_episodes_minibatch(model):
    config = dataclasses.replace(CONFIG, minibatch_episodes=3)
    with pytest.raises(ConfigError, match=r"^minibatch_episodes: got 3"):
        dataclasses.replace(config, minibatch="episodes")
    assert draw_problems(make_program(config, model), 0, 0).prompts_BxP.shape[0] == 4
