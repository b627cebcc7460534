"""Text, tokens, critical tokens and samplers against the golden file made with the authors' template."""

import json
import pathlib

import numpy as np
import pytest

from ckl_jax import tasks
from ckl_jax.errors import ConfigError
from ckl_jax.tasks import alphabet
from ckl_jax.tasks.columns import ADDITION

GOLDEN = json.loads((pathlib.Path(__file__).parent / "data" / "scratchpads.json").read_text())


@pytest.mark.parametrize("case", GOLDEN, ids=[f"{c['a']}+{c['b']}/{c['max_pretrain_digits']}" for c in GOLDEN])
def test_text_and_critical_tokens_equal_the_golden_file(case):
    a, b, limit = case["a"], case["b"], case["max_pretrain_digits"]
    answer = ADDITION.answer_text(tasks.Problem(a, b))
    assert ADDITION.prompt_text(tasks.Problem(a, b)) == case["prompt"]
    assert answer == case["answer"]
    assert ADDITION.result_text(tasks.Problem(a, b)) == case["result"]
    found = ADDITION.critical_tokens(tasks.Problem(a, b), limit)
    as_golden = [
        {
            "step": t.step,
            "operand": t.operand,
            "name": t.name,
            "pos_in_operand_list": t.position_in_list,
            "char": t.character,
        }
        for t in found
    ]
    assert as_golden == case["critical_tokens"]
    assert all(answer[t.index] == t.character for t in found)
    assert len({t.index for t in found}) == len(found)


def rng():
    return np.random.default_rng(0)


def rl_of_one_more(generator, count, digits):
    return ADDITION.rl_problems(generator, count, digits, max(1, digits - 1))


def lengths(problems):
    return np.array([(len(str(problem.a)), len(str(problem.b))) for problem in problems])


def test_the_vocabulary_has_41_distinct_characters_and_padding_comes_first():
    assert len(set(alphabet.VOCABULARY)) == alphabet.VOCAB_SIZE == 41
    assert alphabet.VOCABULARY[alphabet.PAD_ID] == alphabet.PAD
    assert alphabet.VOCABULARY[alphabet.NEWLINE_ID] == "\n"


@pytest.mark.parametrize(
    "text",
    ["", alphabet.VOCABULARY, ADDITION.prompt_text(tasks.Problem(90, 7)) + ADDITION.answer_text(tasks.Problem(90, 7))],
)
def test_decode_undoes_encode(text):
    tokens = alphabet.encode(text)
    assert tokens.dtype == np.uint8
    assert tokens.shape == (len(text),)
    assert alphabet.decode(tokens) == alphabet.decode(tokens.tolist()) == text


def test_tokens_beyond_the_vocabulary_are_shown_where_asked_for():
    assert alphabet.decode([6, 41, 7, 255], beyond="?") == alphabet.decode([6]) + "?" + alphabet.decode([7]) + "?"
    with pytest.raises(ConfigError, match=r"tokens: got '-1\.\.6'"):
        alphabet.decode([6, -1], beyond="?")


def test_every_token_decodes_to_its_own_character():
    assert alphabet.encode(alphabet.decode(range(alphabet.VOCAB_SIZE))).tolist() == list(range(alphabet.VOCAB_SIZE))


@pytest.mark.parametrize("text", ["x", "1 + 2 = é", "\t"])
def test_encode_refuses_an_unknown_character_and_names_it(text):
    with pytest.raises(ValueError, match=r"^text: got \[.*(x|é|t)"):
        alphabet.encode(text)


@pytest.mark.parametrize("tokens", [[41], [3, -1], [[1, 2]], 3, [1.0, 2.0], [True]])
def test_decode_refuses_what_is_no_row_of_tokens(tokens):
    with pytest.raises(ValueError, match="tokens: "):
        alphabet.decode(np.array(tokens))


@pytest.mark.parametrize("value", [-1, True, np.True_, 2.0, np.float32(2), "2", None, 10**18])
def test_a_problem_refuses_what_is_no_operand_and_names_it(value):
    with pytest.raises(ValueError, match=r"^a: got"):
        tasks.Problem(value, 0)
    with pytest.raises(ValueError, match=r"^b: got"):
        tasks.Problem(0, value)
    with pytest.raises(ValueError, match=r"^b: got"):
        ADDITION.answer_text(tasks.Problem(0, value))


def test_a_problem_takes_the_smallest_and_largest_operands():
    tasks.Problem(0, 10**18 - 1)
    tasks.Problem(np.int64(7), np.uint8(0))


@pytest.mark.parametrize(
    ("digits", "length"),
    [
        (3, 242),
        (4, 313),
        (5, 390),
        (6, 473),
        (7, 562),
        (8, 657),
        (9, 758),
        (11, 978),
        (12, 1097),
        (13, 1222),
        (15, 1490),
        (16, 1633),
    ],
)
def test_the_longest_document_has_the_known_length(digits, length):
    assert ADDITION.max_prompt_length(digits) + ADDITION.max_answer_length(digits, extra=0) == length
    assert ADDITION.max_answer_length(digits) == ADDITION.max_answer_length(digits, extra=0) + tasks.EXTRA_LENGTH


@pytest.mark.parametrize("digits", [1, 3])
def test_no_document_is_longer_than_the_longest(digits):
    for problem in ADDITION.short_problems(rng(), 300, digits):
        assert len(ADDITION.prompt_text(problem)) <= ADDITION.max_prompt_length(digits)
        assert len(ADDITION.answer_text(problem)) <= ADDITION.max_answer_length(digits, extra=0)


def test_identical_problems_have_both_operands_of_that_length():
    assert (lengths(ADDITION.identical_problems(rng(), 200, 4)) == 4).all()
    ones = ADDITION.identical_problems(rng(), 300, 1)
    assert {p.a for p in ones} == {p.b for p in ones} == set(range(10))


def test_operands_reach_from_the_smallest_to_the_largest_number_of_their_length():
    values = [problem.a for problem in ADDITION.identical_problems(rng(), 2000, 2)]
    assert (min(values), max(values)) == (10, 99)


def test_varying_problems_have_one_operand_of_that_length_on_either_side_and_the_other_uniform():
    drawn = lengths(ADDITION.varying_problems(rng(), 4000, 4))
    assert (drawn.max(axis=1) == 4).all()
    shares = np.bincount(drawn.min(axis=1), minlength=5)[1:] / len(drawn)
    np.testing.assert_allclose(shares, 1 / 4, atol=0.03)
    uneven = drawn[drawn[:, 0] != drawn[:, 1]]
    np.testing.assert_allclose((uneven[:, 0] == 4).mean(), 0.5, atol=0.04)


def test_short_problems_draw_both_lengths_uniformly_and_independently():
    drawn = lengths(ADDITION.short_problems(rng(), 4000, 3))
    shares = np.histogram2d(drawn[:, 0], drawn[:, 1], bins=np.arange(0.5, 4))[0] / len(drawn)
    np.testing.assert_allclose(shares, 1 / 9, atol=0.03)


def test_rl_problems_draw_the_other_length_half_within_and_half_beyond_the_pretraining():
    drawn = lengths(ADDITION.rl_problems(rng(), 6000, 6, 4))
    assert (drawn.max(axis=1) == 6).all()
    shares = np.bincount(drawn.min(axis=1), minlength=7)[1:] / len(drawn)
    np.testing.assert_allclose(shares, [1 / 8] * 4 + [1 / 4] * 2, atol=0.025)
    uneven = drawn[drawn[:, 0] != drawn[:, 1]]
    np.testing.assert_allclose((uneven[:, 0] == 6).mean(), 0.5, atol=0.03)


@pytest.mark.parametrize(
    "sampler", [ADDITION.identical_problems, ADDITION.varying_problems, ADDITION.short_problems, rl_of_one_more]
)
def test_samplers_repeat_themselves_and_refuse_bad_counts_and_digits(sampler):
    problems = sampler(rng(), 5, 3)
    assert len(problems) == 5
    assert problems == sampler(rng(), 5, 3)
    for count, digits, name in [(0, 3, "count"), (-1, 3, "count"), (5, 0, "digits"), (5, 19, "digits")]:
        with pytest.raises(ValueError, match=rf"^{name}: got"):
            sampler(rng(), count, digits)


@pytest.mark.parametrize("max_pretrain_digits", [0, 5, 6])
def test_rl_problems_refuse_a_pretraining_length_that_leaves_no_gap(max_pretrain_digits):
    with pytest.raises(ValueError, match=r"^max_pretrain_digits: got"):
        ADDITION.rl_problems(rng(), 5, 5, max_pretrain_digits)


def test_critical_tokens_refuse_a_pretraining_length_below_1():
    with pytest.raises(ValueError, match=r"^max_pretrain_digits: got"):
        ADDITION.critical_tokens(tasks.Problem(12, 3), 0)
