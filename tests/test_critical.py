"""Critical tokens in made answers against hand counts, and the sampling of real ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_answers import made, replaced
from policies import SCRIPT_MODEL, policy, scripted_policy, untrained

from ckl_jax import tasks
from ckl_jax.analysis import critical
from ckl_jax.analysis.critical import Measuring
from ckl_jax.analysis.statistics import share_interval
from ckl_jax.checkpoint.store import Model
from ckl_jax.config import ModelConfig
from ckl_jax.errors import ConfigError
from ckl_jax.tasks.columns import ADDITION, SUBTRACTION

PROBLEM = tasks.Problem(123, 45)
RIGHT = ADDITION.answer_text(tasks.Problem(123, 45))
TOKENS = ADDITION.critical_tokens(tasks.Problem(123, 45), 2)


def test_delta_j_is_certainty_minus_the_mean_of_the_others():
    certainty = np.array([[1.0, 0.4, 0.9, 7.0], [0.5, 7.0, 7.0, 7.0]])
    mask = np.array([[True, True, True, False], [True, False, False, False]])
    expected = [[1 - 1.3 / 2, 0.4 - 1.9 / 2, 0.9 - 1.4 / 2, np.nan], [np.nan] * 4]
    np.testing.assert_allclose(critical.certainty_gaps(certainty, mask), expected)


def test_means_leave_out_what_is_not_selected_and_what_is_nan():
    values = np.array([[1.0, 2.0, np.nan, 100.0], [1.0, 2.0, 3.0, 4.0]])
    selected = np.array([[True, True, True, False], [False] * 4])
    np.testing.assert_array_equal(critical.mean_where(values, selected), [1.5, np.nan])


def test_places_count_lines_words_and_characters():
    expected = [(0, 0, 0), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1), (2, 0, 0), (2, 1, 0)]
    assert critical.places("\n[ +\n 4") == expected


def test_the_same_column_has_the_same_place_whatever_the_lengths():
    def place_of(a, b, after):
        text = ADDITION.answer_text(tasks.Problem(a, b))
        return critical.places(text)[text.index(after) + len(after)]

    assert place_of(123, 45, "3+5+0=") == place_of(6, 789, "6+9+0=") == (2, 8, 6)


@pytest.mark.parametrize(
    ("written", "right", "index"), [("abc", "abc", None), ("abd", "abc", 2), ("ab", "abc", 2), ("abcd", "abc", 3)]
)
def test_the_first_deviation(written, right, index):
    assert critical.first_deviation(written, right) == index


def test_critical_tokens_of_a_right_answer_are_marked_where_they_stand():
    found = made(PROBLEM, [RIGHT, RIGHT[: TOKENS[-1].index]])
    assert np.flatnonzero(found.critical_BxT[0]).tolist() == sorted(t.index for t in TOKENS)
    assert found.expected_B.tolist() == [len(TOKENS)] * 2
    assert found.text(0) == RIGHT


def test_wrong_critical_tokens_are_counted_and_what_follows_them_is_not():
    last, comma = TOKENS[0], TOKENS[1]
    texts = [
        RIGHT,
        replaced(RIGHT, comma.index, "]"),
        replaced(RIGHT, last.index, "9"),
        replaced(RIGHT, RIGHT.index("C=0"), "A"),
        "",
    ]
    found = made(PROBLEM, texts)
    assert found.wrong_critical_B.tolist() == [0, 1, 1, 0, 0]
    assert found.recorded_Bx3x2xC.sum(axis=(1, 2, 3)).tolist() == [len(TOKENS), 1, 2, len(TOKENS), 0]


def test_values_at_critical_tokens_are_those_of_their_characters():
    found = made(PROBLEM, [RIGHT])
    positions = np.arange(found.mask_BxT.shape[1])[None]
    at = found.at_critical(positions)[found.recorded_Bx3x2xC]
    assert sorted(at.tolist()) == sorted(t.index for t in TOKENS)


def test_a_share_has_wilsons_interval():
    np.testing.assert_allclose(share_interval(8, 10), (0.8, 0.4902, 0.9433), atol=1e-4)
    assert share_interval(0, 0)[1:] == (0.0, 1.0)
    assert np.isnan(share_interval(0, 0)[0])
    with pytest.raises(ConfigError, match="successes"):
        share_interval(3, 2)


def test_a_policy_that_knows_the_answer_is_read_as_right():
    problem = tasks.Problem(21, 43)
    text = ADDITION.answer_text(tasks.Problem(21, 43))
    params = scripted_policy(text, len(ADDITION.prompt_text(tasks.Problem(21, 43))))
    found = critical.sample(Model(SCRIPT_MODEL, 1, params), [problem] * 3, 2, Measuring(extra_length=3))
    assert [found.text(row) for row in range(3)] == [text] * 3
    assert found.reward_B.tolist() == [1.0] * 3
    assert found.wrong_critical_B.tolist() == [0] * 3
    assert found.recorded_Bx3x2xC.sum() == 3 * len(ADDITION.critical_tokens(tasks.Problem(21, 43), 1))
    np.testing.assert_allclose(found.certainty_BxT[found.mask_BxT], 1.0, atol=1e-3)


MODEL = ModelConfig(num_layers=1, num_heads=2, width=16, block_size=400)
PROBLEMS = ADDITION.rl_problems(np.random.default_rng(0), 4, 2, 1)
HOW = Measuring(temperature=1.5, certainty="max_prob", certainty_temperature=2.0, extra_length=3)


def test_certainty_and_reference_probabilities_are_the_references():
    writer, reference = Model(MODEL, 1, policy(MODEL, 0)), Model(MODEL, 1, policy(MODEL, 1))
    alone = critical.sample(writer, PROBLEMS, 2, HOW)
    judged = critical.sample(writer, PROBLEMS, 2, HOW, reference)
    np.testing.assert_array_equal(alone.answers_BxT, judged.answers_BxT)
    mask = alone.mask_BxT
    np.testing.assert_allclose(alone.probabilities_BxTxV[mask], judged.probabilities_BxTxV[mask], atol=1e-5)
    np.testing.assert_array_equal(alone.probabilities_BxTxV, alone.ref_probabilities_BxTxV)
    assert np.abs(judged.probabilities_BxTxV - judged.ref_probabilities_BxTxV)[mask].max() > 0.01
    log_p = jnp.log(jnp.asarray(judged.ref_probabilities_BxTxV[mask])) * 1.5
    at_2 = jax.nn.softmax(log_p / 2.0)
    np.testing.assert_allclose(judged.certainty_BxT[mask], at_2.max(axis=-1), atol=1e-4)
    np.testing.assert_allclose(judged.entropy_BxT[mask], -jax.scipy.special.xlogy(at_2, at_2).sum(axis=-1), atol=1e-3)


def test_batches_change_nothing(monkeypatch):
    model = Model(MODEL, 1, policy(MODEL, 0))
    whole = critical.sample(model, PROBLEMS, 2, HOW)
    monkeypatch.setattr(critical, "BATCH", 2)
    parts = critical.sample(model, PROBLEMS, 2, HOW)
    np.testing.assert_array_equal(whole.answers_BxT, parts.answers_BxT)
    np.testing.assert_allclose(whole.certainty_BxT[whole.mask_BxT], parts.certainty_BxT[whole.mask_BxT], atol=1e-4)
    assert [x.shape[0] for x in whole.first(2)] == [2] * len(whole)


def test_answers_are_sampled_with_the_seed(monkeypatch):
    keys = []

    def answer(*arguments, max_length):
        keys.append(arguments[-1])
        return [np.zeros(1)] * len(critical.Generations._fields)

    monkeypatch.setattr(critical, "_answer", answer)
    critical.sample(Model(MODEL, 1, {}), PROBLEMS[:1], 2, dataclasses.replace(HOW, seed=3))
    assert keys == [jax.random.key(3)]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": 0.0},
        {"temperature": float("inf")},
        {"certainty_temperature": -1.0},
        {"certainty": "shannon"},
        {"extra_length": -1},
        {"seed": -1},
    ],
)
def test_sampling_that_cannot_work_is_refused_in_one_line(bad):
    with pytest.raises(ConfigError, match=f"^{next(iter(bad))}: got .*, allowed is .*$"):
        Measuring(**bad)


def test_a_reference_may_have_another_shape():
    writer, wider = Model(MODEL, 1, policy(MODEL, 0)), dataclasses.replace(MODEL, width=24, block_size=300)
    judged = critical.sample(writer, PROBLEMS, 2, HOW, Model(wider, 1, policy(wider, 1)))
    alone = critical.sample(writer, PROBLEMS, 2, HOW)
    np.testing.assert_array_equal(alone.answers_BxT, judged.answers_BxT)
    assert np.abs(alone.certainty_BxT - judged.certainty_BxT)[alone.mask_BxT].max() > 0.01


def test_certainty_is_measured_in_float32_whatever_pre_training_had():
    """So is it in RL: bfloat16 would round a J close to 1."""
    params = untrained(MODEL, contrast=10)
    low = dataclasses.replace(MODEL, dtype="bfloat16", precision="default")
    found = [critical.sample(Model(config, 1, params), PROBLEMS, 2, Measuring()) for config in (MODEL, low)]
    np.testing.assert_array_equal(found[0].certainty_BxT, found[1].certainty_BxT)


def test_a_reference_of_another_n_or_task_and_too_long_episodes_are_refused():
    model = Model(MODEL, 1, policy(MODEL, 0))
    short = dataclasses.replace(MODEL, block_size=60)
    for wrong in (model._replace(max_pretrain_digits=2), model._replace(task=SUBTRACTION)):
        said = r"^reference: got .*, allowed is the policy's N, task and size of the vocabulary, \(1, 'addition', 41\)"
        with pytest.raises(ConfigError, match=said):
            critical.sample(model, PROBLEMS, 2, Measuring(extra_length=3), wrong)
    with pytest.raises(
        ConfigError, match=r"digits: got 2, allowed is what fits the block: 177 characters \(block_size = 60\)"
    ):
        critical.sample(model, PROBLEMS, 2, HOW, model._replace(config=short))
    with pytest.raises(ConfigError, match=r"extra_length: got 1000, allowed is at most \d+ \(block_size = 400\)"):
        critical.sample(model, PROBLEMS, 2, Measuring(extra_length=1000))
