"""Accuracy: the bootstrap's intervals, and answers that depend neither on the batch nor on the call."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest
from policies import untrained

from ckl_jax import evaluate
from ckl_jax.analysis.statistics import bootstrap_interval
from ckl_jax.checkpoint.store import Model, save_model
from ckl_jax.errors import ConfigError
from ckl_jax.evaluate import EvaluateCommand, judge, moved
from ckl_jax.model import forward
from ckl_jax.runtime.sharding import make_mesh
from ckl_jax.tasks import EXTRA_LENGTH
from ckl_jax.tasks import problems as problems_lib
from ckl_jax.tasks.columns import ADDITION


def test_equal_values_have_an_interval_without_width():
    assert bootstrap_interval(np.ones(50)) == (1.0, 1.0)
    assert bootstrap_interval(np.zeros(1)) == (0.0, 0.0)


def test_the_interval_is_as_wide_as_the_normal_approximation_and_reproducible():
    values = (np.arange(1000) < 300).astype(np.float32)
    low, high = bootstrap_interval(values)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    np.testing.assert_allclose((low, high), (0.3 - half, 0.3 + half), atol=0.004)
    assert bootstrap_interval(values) == (low, high)


def test_the_interval_covers_the_true_accuracy_about_95_times_in_100():
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(rng.random(100) < 0.7, samples=500) for _ in range(400)]
    covered = np.mean([low <= 0.7 <= high for low, high in intervals])
    assert 0.91 < covered < 0.98


def test_no_value_has_no_interval():
    with pytest.raises(ConfigError, match=r"^values: "):
        bootstrap_interval(np.ones(0))


@pytest.fixture
def fingerprints(small_model, monkeypatch):
    """``judge`` of a random model with a reward that tells answers apart: that of a random model is always 0."""

    def weighted_sum(answers_BxT, results_BxR):
        return (answers_BxT * jnp.arange(answers_BxT.shape[1])[None]).sum(axis=1).astype(jnp.float32)

    monkeypatch.setattr(problems_lib, "reward", weighted_sum)
    evaluate._rewards.clear_cache()
    params = untrained(small_model)
    problems = ADDITION.varying_problems(np.random.default_rng(0), 8, 1)

    def judged(**options):
        return judge(Model(small_model, 1, params), problems, 1, extra_length=0, **options)

    yield judged
    evaluate._rewards.clear_cache()


def test_judging_is_deterministic_and_the_same_in_batches_of_any_size(fingerprints, monkeypatch):
    whole = fingerprints(temperature=1.0)
    assert len(np.unique(whole)) == 8
    np.testing.assert_array_equal(fingerprints(temperature=1.0), whole)
    assert (fingerprints(temperature=1.0, seed=1) != whole).any()
    monkeypatch.setattr(evaluate, "BATCH", 5)
    np.testing.assert_array_equal(fingerprints(temperature=1.0), whole)


def test_the_greedy_answer_does_not_depend_on_the_seed(fingerprints):
    np.testing.assert_array_equal(fingerprints(seed=1), fingerprints(seed=2))


def test_answers_do_not_depend_on_the_number_of_devices(fingerprints, monkeypatch):
    shared = fingerprints(temperature=1.0)
    monkeypatch.setattr(evaluate.sharding, "make_mesh", lambda *arguments: make_mesh(1, 1))
    np.testing.assert_array_equal(shared, fingerprints(temperature=1.0))


def test_a_moved_model_reads_as_the_whole_one_further_on_in_its_block(small_model):
    model = Model(small_model, 1, untrained(small_model))
    tokens_BxT = jnp.arange(10).reshape(1, 10)
    positions_BxT = jnp.arange(10).reshape(1, 10)
    there = moved(model, 7)
    found = forward(there.config, there.params, tokens_BxT, positions_BxT).logits_BxTxV
    expected = forward(model.config, model.params, tokens_BxT, positions_BxT + 7).logits_BxTxV
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert there.config.block_size == small_model.block_size - 7
    with pytest.raises(ConfigError, match=r"^offsets: got 400, allowed is a position of the block$"):
        moved(model, 400)


def test_the_command_judges_both_kinds_of_operands_with_its_options(small_model, tmp_path, monkeypatch, capsys):
    judged = []

    def fake(model, problems, digits, **options):
        judged.append((problems, digits, options))
        return np.full(len(problems), float(all(len(str(p.a)) == len(str(p.b)) == digits for p in problems)))

    save_model(tmp_path, Model(small_model, 2, untrained(small_model)), {})
    monkeypatch.setattr(evaluate, "judge", fake)
    evaluate.main(EvaluateCommand(tmp_path, problems=30, temperature=0.7, seed=3))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[1], row[4]) for row in rows if "possible:" not in row] == [("100.0", "0.0")] * (len(judged) // 2)
    assert len(judged) >= 4
    for problems, _, options in judged:
        assert (len(problems), options["temperature"], options["seed"]) == (30, 0.7, 3)


def test_a_cells_problems_and_noise_are_its_seeds(small_model, monkeypatch):
    monkeypatch.setattr(evaluate, "judge", lambda model, problems, digits, **how: (problems, how["seed"]))
    model = Model(small_model, 1, None)
    first, third = (evaluate.judge_cell(model, "varying", 2, 9, seed=seed) for seed in (0, 3))
    assert first[0] != third[0]
    assert (first[1], third[1]) == (0, 3)


def test_lengths_end_where_problems_do(small_model):
    assert [*evaluate.lengths(Model(small_model, 5, None))] == [5, 6, 7, 8]
    assert [*evaluate.lengths(Model(small_model, 17, None))] == [17, 18]


def test_the_command_averages_each_problem_over_the_offsets(small_model, tmp_path, monkeypatch, capsys):
    save_model(tmp_path, Model(small_model, 1, untrained(small_model)), {})
    by_block = {400: [1.0, 1.0, 0.0, 0.0], 380: [1.0, 0.0, 0.0, 0.0]}
    monkeypatch.setattr(evaluate, "judge", lambda model, *_, **__: np.array(by_block[model.config.block_size]))
    shares = []
    monkeypatch.setattr(evaluate, "bootstrap_interval", lambda values: shares.append(values.tolist()) or (0.0, 1.0))
    evaluate.main(EvaluateCommand(tmp_path, problems=4, offsets=(0, 20)))
    assert shares[0] == [1.0, 0.5, 0.0, 0.0]
    first, *others = capsys.readouterr().out.splitlines()[2:]
    assert first.split()[:2] == ["1", "37.5"]
    longest = ADDITION.longest_episode(4, 0)
    said = f"not possible: up to {longest + EXTRA_LENGTH + 20} positions, block_size = 400"
    assert others[-1].split(maxsplit=1) == ["4", f"{said}, at most --extra-length {380 - longest}"]


def test_the_command_says_with_how_much_room_a_length_fits_and_takes_it(small_model, tmp_path, monkeypatch, capsys):
    save_model(tmp_path, Model(small_model, 1, untrained(small_model)), {})
    room = 400 - ADDITION.longest_episode(3, 0)
    given = []
    monkeypatch.setattr(evaluate, "judge", lambda *_, extra_length, **__: given.append(extra_length) or np.ones(4))
    evaluate.main(EvaluateCommand(tmp_path, problems=4, extra_length=room + 1))
    *_, three, _ = capsys.readouterr().out.splitlines()
    assert three.split(maxsplit=1)[1] == (
        f"not possible: up to 401 positions, block_size = 400, at most --extra-length {room}"
    )
    assert {*given} == {room + 1}
    evaluate.main(EvaluateCommand(tmp_path, problems=4, extra_length=room))
    *_, three, _ = capsys.readouterr().out.splitlines()
    assert three.split()[:2] == ["3", "100.0"]


def test_accuracies_are_shares_of_counts_in_float64(fingerprints):
    """Else 0.9 of float32 lies below the 0.9 that was asked for as a target."""
    assert fingerprints().dtype == np.float64


@pytest.mark.parametrize("digits", range(1, 18))
def test_a_model_is_not_measured_on_what_a_round_of_rl_draws(digits):
    for seed in range(4):
        drawn = [np.random.default_rng([seed, index]).integers(2**63, size=4) for index in range(200)]
        found = problems_lib.measured_on(seed, digits).integers(2**63, size=4)
        assert not any((found == numbers).any() for numbers in drawn)


def test_only_measured_on_and_training_seed_what_draws_problems():
    """What is drawn elsewhere with a seed and another number, or with a seed alone, would be some round's problems."""
    root = pathlib.Path(__file__).parents[1]
    files = [path for part in ("ckl_jax", "experiments") for path in (root / part).rglob("*.py")]
    assert (np.random.default_rng(7).integers(99, size=9) == np.random.default_rng([7, 0]).integers(99, size=9)).all()
    sources = {str(path.relative_to(root)): path.read_text() for path in files}
    training = {"ckl_jax/rl/program.py", "ckl_jax/pretrain.py", "ckl_jax/datasets/scratchpads.py"}
    of_numbers = {path for path, source in sources.items() if "default_rng([" in source}
    assert of_numbers == training | {"ckl_jax/tasks/problems.py", "experiments/benchmark/speculation.py"}
    bare = re.compile(r"default_rng\((?!\[)")
    of_a_seed = {path for path, source in sources.items() if bare.search(source) and "_problems(" in source}
    assert of_a_seed == {
        "ckl_jax/rl/evaluation.py",  # No run has its seed.
        "ckl_jax/check_xla.py",  # These four look at bits, programs and speed, not at accuracy.
        "ckl_jax/preflight/programs.py",
        "experiments/benchmark/against_pytorch.py",
        "experiments/benchmark/workload.py",
        "experiments/critical_token_discovery.py",  # Where dots are drawn.
        "experiments/reproduce/__main__.py",  # One problem of a model without RL.
    }
