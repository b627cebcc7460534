"""Bad input to the public functions: one line that names the argument and what is allowed, before anything compiles."""

import re
from typing import get_args

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hostile import refusal

from ckl_jax import (
    advantage_shaping,
    advantages,
    evaluate,
    losses,
    ratio_losses,
    rollout,
    tasks,
    token_weights,
    truncation,
)
from ckl_jax.analysis import critical, report, statistics
from ckl_jax.analysis.critical import Measuring
from ckl_jax.certainty import certainty
from ckl_jax.checkpoint.store import Model
from ckl_jax.config import ModelConfig
from ckl_jax.datasets import Scratchpads, TokenStream, load_stream, sample_documents, sample_stream
from ckl_jax.errors import ConfigError
from ckl_jax.presets import finetune_preset, pretrain_preset
from ckl_jax.rl.program import make_runs
from ckl_jax.rollout import generation, speculative
from ckl_jax.rollout.trajectory import Sampling
from ckl_jax.tasks import alphabet
from ckl_jax.tasks import problems as problems_lib
from ckl_jax.tasks.columns import ADDITION

NAN, INF, HUGE = float("nan"), float("inf"), 10**5_000
KL_WEIGHTS = get_args(token_weights.KLWeights)
CONFIG = ModelConfig(num_layers=1, num_heads=1, width=4, block_size=200)
MODEL = Model(CONFIG, 1, None)
ONE = [tasks.Problem(1, 2)]
PACKED = problems_lib.pack(ADDITION, ONE, 1, 1)
STREAM = TokenStream(np.zeros(5, np.uint8), np.zeros(1, np.int32))
RNG = np.random.default_rng(0)


def zeros(*shape):
    return np.zeros(shape, np.float32)


def mask(*shape):
    return np.ones(shape, bool)


def generated(batch=None, **sampling):
    return rollout.rollout(CONFIG, None, PACKED, None, Sampling(**{"max_length": 10} | sampling), batch=batch)


def verified(window=32, slots=None, **sampling):
    how = Sampling(**{"max_length": 10} | sampling)
    return speculative.speculative_rollout(CONFIG, None, PACKED, None, how, window=window, slots=slots)


def judged(**options):
    return evaluate.judge(MODEL, ONE, 1, **{"extra_length": 5} | options)


def scratchpads(**options):
    return Scratchpads(**{"max_digits": 2, "num_examples": 4} | options)


TEXTS = [
    (lambda: tasks.Problem(HUGE, 0), r"a: got int without a text, allowed is an integer from 0 to below 10\^18 .*"),
    (lambda: tasks.Problem(0, -1), r"b: got -1, allowed is an integer from 0 .*"),
    (lambda: tasks.Problem("1", 0), r"a: got '1', allowed is an integer from 0 .*"),
    (lambda: alphabet.encode(b"1+2"), r"text: got 'bytes', allowed is a str"),
    (lambda: alphabet.encode("é" * 10**6 + "\0"), r"text: got \['\\x00', 'é'\], allowed is characters of .*"),
    (lambda: alphabet.decode([41]), r"tokens: got '41\.\.41', allowed is 0\.\.40 \(the vocabulary\)"),
    (lambda: alphabet.decode([[1], [1, 2]]), r"tokens: got rows of several lengths, allowed is one axis of integers"),
    (lambda: alphabet.decode([object()]), r"tokens: got 'shape \(1,\) of object', allowed is one axis of integers"),
    (lambda: alphabet.decode("12"), r"tokens: got 'shape \(\) of <U2', allowed is one axis of integers"),
    (lambda: ADDITION.critical_tokens(tasks.Problem("1", 2), 1), r"a: got '1', allowed is an integer .*"),
    (lambda: ADDITION.critical_tokens(tasks.Problem(1, 2), NAN), r"max_pretrain_digits: got nan, allowed is 1 or more"),
    (lambda: ADDITION.max_answer_length(0), r"digits: got 0, allowed is 1\.\.18"),
    (lambda: ADDITION.max_prompt_length(HUGE), r"digits: got int without a text, allowed is 1\.\.18"),
    (lambda: ADDITION.varying_problems(RNG, 1.5, 2), r"count: got 1\.5, allowed is 1 or more"),
    (lambda: ADDITION.rl_problems(RNG, 1, 5, 5.0), r"max_pretrain_digits: got 5\.0, allowed is 1\.\.4 .*"),
    (lambda: ADDITION.draw(RNG, 3, 30), r"digits: got 30, allowed is 1\.\.18"),
    (lambda: problems_lib.pack(ADDITION, [], 1, 1), r"problems: got 0, allowed is 1 or more"),
    (lambda: problems_lib.pack(ADDITION, [(1, 2)], 1, 1), r"problems: got \(1, 2\), allowed is tasks\.Problem"),
    (
        lambda: problems_lib.pack(ADDITION, [tasks.Problem(100, 1)], 2, 1),
        r"problems: got 'an operand of 3 digits', .* 2 digits",
    ),
    (lambda: problems_lib.pack(ADDITION, ONE, 1, -3), r"max_pretrain_digits: got -3, allowed is 1 or more"),
]


def clipped(log_probs, advantages, clip):
    return ratio_losses.clipped_policy_loss(log_probs, log_probs, advantages, np.ones_like(log_probs, bool), clip)


def gate(log_probs, advantages):
    return ratio_losses.open_gate(log_probs, log_probs, advantages, np.ones_like(log_probs, bool), 0.2)


def weighed(index):
    tokens = token_weights.Tokens(zeros(2, 2), zeros(2, 2), mask(2, 2), mask(2, 2), mask(2, 2))
    return token_weights.weigh(index, tokens, token_weights.Settings(1.0, 0.5, 0.5, None))


NO_WORD = (len(KL_WEIGHTS), np.int64(len(KL_WEIGHTS)), -1, "uniform", 1.0, np.arange(2))
TOKENS = "one per distribution"
SHAPE = "allowed is the shape of"
TERMS = [
    (lambda: certainty([0.0, 1.0]), r"logits: got 'list', allowed is an array"),
    (lambda: certainty(np.zeros(3, int)), r"logits: got 'int64', allowed is an array of floats"),
    (lambda: certainty(np.zeros(3, complex)), r"logits: got 'complex128', allowed is an array of floats"),
    (lambda: certainty(zeros(3, 1)), r"logits: got \(3, 1\), allowed is \[\.\.\., V\] with V >= 2"),
    (lambda: certainty(zeros(3), "sure"), r"kind: got 'sure', allowed is negentropy \| .*"),
    (lambda: certainty(zeros(3), temperature=NAN), r"temperature: got nan, allowed is above 0 and finite"),
    (lambda: certainty(zeros(3), temperature=1e-50), r"temperature: got 1e-50, allowed is above 0 and finite"),
    (lambda: certainty(zeros(3), temperature="1"), r"temperature: got '1', allowed is above 0 and finite"),
    (lambda: losses.entropy(zeros(2, 3), INF), r"temperature: got inf, allowed is above 0 and finite"),
    (lambda: losses.entropy(zeros()), r"logits: got \(\), allowed is .*"),
    (
        lambda: losses.token_log_probs(zeros(2, 3), np.zeros(3, int)),
        rf"tokens: got \(3,\), allowed is {TOKENS}, \(2,\)",
    ),
    (lambda: losses.token_log_probs(zeros(2, 3), zeros(2)), r"tokens: got 'float32', allowed is an array of integers"),
    (lambda: losses.token_log_probs(zeros(2, 3), [0, 1]), r"tokens: got 'list', allowed is an array"),
    (lambda: losses.kl_estimate(zeros(2), zeros(3)), rf"ref_log_probs: got \(3,\), {SHAPE} log_probs, \(2,\)"),
    (lambda: losses.kl_estimate(zeros(2), zeros(2), "k4"), r"kind: got 'k4', allowed is k1 \| k2 \| k3"),
    (lambda: losses.exact_kl(zeros(2, 3), zeros(2, 4)), rf"ref_logits: got \(2, 4\), {SHAPE} logits, \(2, 3\)"),
    (lambda: losses.exact_kl(zeros(2, 3), zeros(2, 3), -1.0), r"temperature: got -1\.0, allowed is above 0 and finite"),
    (lambda: losses.masked_mean([1.0], mask(1)), r"values: got 'list', allowed is an array"),
    (lambda: losses.masked_mean(zeros(2), mask(3)), rf"mask: got \(3,\), {SHAPE} the values, \(2,\)"),
    (
        lambda: losses.policy_gradient_loss(zeros(2), zeros(3), mask(2)),
        rf"advantages: got \(3,\), {SHAPE} log_probs, \(2,\)",
    ),
    (lambda: losses.policy_gradient_loss([0.0], zeros(1), mask(1)), r"log_probs: got 'list', allowed is an array"),
    (lambda: losses.value_loss(zeros(2), zeros(1), mask(2)), rf"returns: got \(1,\), {SHAPE} values, \(2,\)"),
    (lambda: losses.value_loss(zeros(2), zeros(2), mask(3)), rf"mask: got \(3,\), {SHAPE} the values, \(2,\)"),
    (lambda: losses.masked([1.0], None), r"values: got 'list', allowed is an array"),
    (lambda: clipped(zeros(2), zeros(3), 0.2), rf"advantages: got \(3,\), {SHAPE} log_probs, \(2,\)"),
    (lambda: clipped(zeros(2), zeros(2), 0.0), r"clip: got 0\.0, allowed is above 0"),
    (lambda: clipped(zeros(2), zeros(2), (0.2, -0.2)), r"clip: got -0\.2, allowed is above 0"),
    (lambda: clipped(zeros(2), zeros(2), (zeros(1), 0.2)), rf"clip: got \(1,\), {SHAPE} log_probs, \(2,\)"),
    (lambda: gate(zeros(2, 3), zeros(2)), rf"advantages: got \(2,\), {SHAPE} log_probs, \(2, 3\)"),
    (
        lambda: ratio_losses.redistributed(zeros(2, 3), zeros(3), zeros(2, 3), zeros(2, 3), mask(2, 3), 0.2, 0.1),
        rf"h: got \(3,\), {SHAPE} log_probs, \(2, 3\)",
    ),
    (
        lambda: ratio_losses.off_policy_kl(zeros(2), "k4", zeros(2), zeros(2)),
        r"kind: got 'k4', allowed is k1 \| k2 \| k3",
    ),
    (
        lambda: ratio_losses.off_policy_kl(zeros(3), "k2", zeros(2, 3), zeros(2, 3)),
        rf"kl: got \(3,\), {SHAPE} log_probs, \(2, 3\)",
    ),
    (lambda: ratio_losses.kl_cov([0.0], zeros(1), mask(1), mask(1)), r"log_probs: got 'list', allowed is an array"),
    (lambda: truncation.lp_reg(zeros(2), zeros(3), mask(2), mask(2)), rf"ref_log_probs: got \(3,\), {SHAPE} .*"),
    (lambda: advantages.leave_one_out(zeros(4, 2), 2), r"rewards: got \(4, 2\), allowed is \[B\], one number an .*"),
    (lambda: advantages.standardized_in_group([1.0, 0.0], 2), r"rewards: got 'list', allowed is an array"),
    (lambda: advantages.standardized_in_group(zeros(4), 0), r"group_size: got 0, allowed is 2 or more, a divisor .*"),
    (lambda: advantages.zero_centered(zeros(4), zeros(2), 2), rf"penalties: got \(2,\), {SHAPE} rewards, \(4,\)"),
    (lambda: advantages.gae(zeros(2), zeros(2), mask(2), 1.0, 1.0), r"mask: got \(2,\), allowed is \[B, T\]"),
    (
        lambda: advantages.gae(zeros(2, 3), zeros(2, 4), mask(2, 3), 1.0, 1.0),
        rf"values: got \(2, 4\), {SHAPE} mask, \(2, 3\)",
    ),
    (lambda: advantages.kl_to_go(zeros(3), mask(2, 3)), rf"kl: got \(3,\), {SHAPE} mask, \(2, 3\)"),
    (lambda: advantages.future_kl(zeros(2, 3), zeros(2), mask(2, 3)), rf"later: got \(2,\), {SHAPE} mask, .*"),
    (
        lambda: advantage_shaping.top_entropy(zeros(2), zeros(2, 2), mask(2, 2), 0.5),
        rf"advantages: got \(2,\), {SHAPE} mask, \(2, 2\)",
    ),
    (
        lambda: advantage_shaping.covariance(zeros(2, 1), zeros(2, 3), mask(2, 3)),
        rf"advantages: got \(2, 1\), {SHAPE} .*",
    ),
    (lambda: advantage_shaping.gtpo(zeros(2), zeros(2, 3), mask(2, 3), 0, 0.5), r"group_size: got 0, allowed is 2 .*"),
    (
        lambda: advantage_shaping.gtpo(zeros(2, 1), zeros(2, 3), mask(2, 3), 2, 0.5),
        r"success: got \(2, 1\), allowed is one per episode, \(2,\)",
    ),
    (lambda: losses.weighted_kl(zeros(2), zeros(3), mask(2)), rf"weights: got \(3,\), {SHAPE} kl, \(2,\)"),
    (lambda: losses.prioritized_kl(zeros(2), zeros(2), -1, mask(2)), r"beta: got -1, allowed is 0 or more, and finite"),
    (
        lambda: losses.prioritized_kl(zeros(2), zeros(2), INF, mask(2)),
        r"beta: got inf, allowed is 0 or more, and finite",
    ),
    (
        lambda: losses.prioritized_kl(zeros(2), zeros(2), "1", mask(2)),
        r"beta: got '1', allowed is 0 or more, and finite",
    ),
    (lambda: token_weights.threshold(zeros(2, 2), mask(2, 2), NAN), r"share: got nan, allowed is above 0, at most 1"),
    (lambda: token_weights.threshold(zeros(2), mask(2), 0.5), r"mask: got \(2,\), allowed is \[B, T\]"),
    (lambda: token_weights.threshold(zeros(2, 2), mask(4), 0.5), rf"mask: got \(4,\), {SHAPE} entropy, \(2, 2\)"),
    (lambda: token_weights.uniform([True]), r"mask: got 'list', allowed is an array"),
    (lambda: token_weights.critical_free(mask(2, 2), [True]), r"mask: got 'list', allowed is an array"),
    (lambda: token_weights.archer(zeros(2), mask(2), 0.5, 0.5), r"mask: got \(2,\), allowed is \[B, T\]"),
    (lambda: token_weights.archer(zeros(2, 2), mask(2, 2), 0.5, 2.0), r"weak: got 2\.0, allowed is 0 to 1"),
    (lambda: token_weights.index_of(["x"]), r"kl_weights: got \['x'\], .*"),
    *((lambda index=index: weighed(index), rf"index: got .*0\.\.{len(KL_WEIGHTS) - 1}") for index in NO_WORD),
    (lambda: critical.certainty_gaps(zeros(2, 3), mask(2, 4)), rf"mask: got \(2, 4\), {SHAPE} the certainty, \(2, 3\)"),
    (lambda: statistics.bootstrap_interval(zeros(0)), r"values: got 0, allowed is 1 or more"),
    (lambda: statistics.bootstrap_interval(np.array([NAN, 1.0])), r"values: got 'NaN .*', allowed is finite numbers"),
    (lambda: statistics.share_interval("1", 2), r"successes: got '1', allowed is an integer"),
    (lambda: statistics.share_interval(3, 2), r"successes: got 3, allowed is 0\.\.2"),
    (lambda: report.shade(NAN), r"certainty: got nan, allowed is a number"),
]
TOO_LONG = r"block_size: got 200, allowed is at least prompt \+ answer = \d+"
GENERATION = [
    (lambda: generated(temperature=0), r"temperature: got 0, allowed is above 0 and finite \(greedy=True for argmax\)"),
    (lambda: generated(temperature=NAN), r"temperature: got nan, allowed is above 0 and finite .*"),
    (lambda: generated(max_length=0), r"max_length: got 0, allowed is 1 or more"),
    (lambda: generated(max_length=2.5), r"max_length: got 2\.5, allowed is 1 or more"),
    (lambda: generated(max_length=10**9), TOO_LONG),
    (lambda: generated(batch=-1), r"batch: got -1, allowed is 1 or more, or None"),
    (lambda: generated(given_BxT=[[1]]), r"given_BxT: got 'list', allowed is an array"),
    (lambda: generated(given_BxT=zeros(1, 2)), r"given_BxT: got 'float32', allowed is an array of integers"),
    (lambda: generated(given_BxT=np.zeros((2, 2), int)), r"given_BxT: got \(2, 2\), allowed is \[1, up to 10\]"),
    (lambda: generated(given_BxT=np.full((1, 2), 77)), r"given_BxT: got '77\.\.77', allowed is -1 or a token below 41"),
    (lambda: generated(given_BxT=np.full((1, 2), -2)), r"given_BxT: got '-2\.\.-2', allowed is -1 or a token below 41"),
    (lambda: generated(given_BxT=np.array([[-1, 3]])), r"given_BxT: got 'a token after -1', allowed is -1 to the end"),
    (lambda: verified(given_BxT=np.array([[3, -1, 3]])), r"given_BxT: got 'a token after -1', allowed .*"),
    (lambda: verified(window=0), r"window: got 0, allowed is 1 or more"),
    (lambda: verified(slots=0), r"slots: got 0, allowed is 1 or more"),
    (lambda: verified(temperature=-1.0), r"temperature: got -1\.0, allowed is above 0 and finite .*"),
    (
        lambda: generation.generate(CONFIG, None, PACKED, None, Sampling(9), how="fast"),
        r"how: got 'fast', allowed .*",
    ),
    (lambda: evaluate.judge(MODEL, [], 1), r"problems: got 0, allowed is 1 or more"),
    (lambda: judged(temperature=INF), r"temperature: got inf, allowed is above 0 and finite .*"),
    (lambda: judged(extra_length=-500), r"extra_length: got -500, allowed is 0 or more"),
    (lambda: judged(extra_length=500), TOO_LONG),
    (lambda: judged(seed=2**31), r"seed: got 2147483648, allowed is 0\.\.2147483647"),
    (lambda: judged(given_BxT=np.zeros((3, 2), int)), r"given_BxT: got \(3, 2\), allowed is \[1, up to \d+\]"),
    (lambda: evaluate.judge(MODEL, ONE, 40), r"digits: got 40, allowed is 1\.\.18"),
    (lambda: evaluate.judge_cell(MODEL, "both", 1, 1), r"operands: got 'both', allowed is identical \| varying"),
    (lambda: critical.sample(MODEL, ONE, 9, Measuring()), r"digits: got 9, allowed is what fits the block: \d+ .*"),
    (lambda: critical.sample(MODEL, ONE, 1, Measuring(extra_length=5), Model(CONFIG, 2, None)), r"reference: got .*"),
]
SETTINGS = [
    (lambda: pretrain_preset(["tiny"]), r"scale: got \['tiny'\], allowed is tiny \| ladder \| small \| gpt2"),
    (lambda: make_runs(finetune_preset("tiny", "ours"), {"a": {}}, 10**9), r"seeds: got 10{9}, .* at most 1000"),
    (lambda: make_runs(finetune_preset("tiny", "ours"), {"a": {"rounds": 1}}, 1), r"arms\.a: got \['rounds'\], .*"),
    (lambda: scratchpads(max_digits="2"), r"max_digits: got '2', allowed is an integer, 0 or more"),
    (lambda: scratchpads(seed="../../x"), r"seed: got '\.\./\.\./x', allowed is an integer, 0 or more"),
    (lambda: scratchpads(num_examples=3), r"num_examples: got 3, allowed is at least max_digits\^2 = 4"),
    (lambda: load_stream(2, 4, split="../test"), r"split: got '\.\./test', allowed is train \| test"),
    (lambda: sample_stream(STREAM, None, 1, 10), r"num_documents: got 1, allowed is more: .* no window of 10"),
    (lambda: sample_documents(STREAM, None, 1, 10, 20), r"num_documents: got 1, allowed is more: .* no window of 10"),
]


@pytest.mark.parametrize(
    ("call", "expected"),
    [*TEXTS, *TERMS, *GENERATION, *SETTINGS],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_input_is_one_line_before_anything_compiles(tmp_path, monkeypatch, call, expected):
    monkeypatch.chdir(tmp_path)
    with refusal(tmp_path), pytest.raises(ConfigError) as caught:
        call()
    assert re.fullmatch(expected, str(caught.value)), str(caught.value)


def test_a_token_that_the_vocabulary_does_not_have_is_not_read_as_another():
    log_probs = losses.token_log_probs(zeros(4, 3), np.array([0, -1, 3, 2]))
    np.testing.assert_array_equal(np.isnan(log_probs), [False, True, True, False])


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.text(alphabet.VOCABULARY, max_size=80))
def test_text_becomes_tokens_and_the_same_text(text):
    assert alphabet.decode(alphabet.encode(text)) == text


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.text(max_size=40))
def test_any_other_text_is_refused_in_one_line(text):
    if set(text) <= set(alphabet.VOCABULARY):
        assert alphabet.decode(alphabet.encode(text)) == text
    else:
        with pytest.raises(ConfigError, match=r"\Atext: got \[[^\n]*\], allowed is characters of [^\n]*\Z"):
            alphabet.encode(text)


OPERANDS = st.integers(0, 999)
LENGTH = ADDITION.max_answer_length(3, extra=20)
rewards = jax.jit(problems_lib.reward)


def reward_of(text, a, b):
    answer_1xT = alphabet.encode(text[:LENGTH].ljust(LENGTH, alphabet.PAD))[None].astype(np.int32)
    packed = problems_lib.pack(ADDITION, [tasks.Problem(a, b)], 3, 2)
    return float(rewards(answer_1xT, packed.results_BxR.astype(np.int32))[0])


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(OPERANDS, OPERANDS, st.text(alphabet.VOCABULARY, max_size=LENGTH), st.booleans())
def test_no_text_but_one_with_the_right_line_is_rewarded(a, b, text, marked):
    text = text + tasks.RESULT_MARK + text if marked else text
    ended = text[:LENGTH].partition(alphabet.PAD)[0]
    _, mark, after = ended.partition(tasks.RESULT_MARK)
    expected = bool(mark) and after.partition("\n")[:2] == (ADDITION.result_text(tasks.Problem(a, b)), "\n")
    assert reward_of(text, a, b) == float(expected)


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(OPERANDS, OPERANDS, st.data())
def test_the_right_line_is_rewarded_and_no_line_with_another_character_is(a, b, data):
    line = ADDITION.result_text(tasks.Problem(a, b))
    at = data.draw(st.integers(0, len(line) - 1))
    other = data.draw(st.sampled_from(alphabet.VOCABULARY.replace(line[at], "")))
    assert reward_of(tasks.RESULT_MARK + line + "\n", a, b) == 1
    assert reward_of(tasks.RESULT_MARK + line[:at] + other + line[at + 1 :] + "\n", a, b) == 0
    assert reward_of(tasks.RESULT_MARK + line, a, b) == 0


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.integers(0, 10**18 - 1), st.integers(0, 10**18 - 1), st.integers(1, 20))
def test_critical_tokens_stand_in_the_answer_where_they_say(a, b, limit):
    answer = ADDITION.answer_text(tasks.Problem(a, b))
    found = ADDITION.critical_tokens(tasks.Problem(a, b), limit)
    assert all(0 <= token.index < len(answer) and answer[token.index] == token.character for token in found)
    assert len({token.index for token in found}) == len(found)
    longer = max(len(str(a)), len(str(b))) > limit
    assert bool(found) == longer
    assert all(token.step in (1, 2, 3) and token.operand in (1, 2) for token in found)


indices = jax.jit(problems_lib.critical_indices)


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(OPERANDS, OPERANDS, st.data())
def test_critical_tokens_of_any_answer_lie_inside_it_and_what_precedes_them_is_right(a, b, data):
    right = ADDITION.answer_text(tasks.Problem(a, b))
    cut = data.draw(st.integers(0, len(right)))
    text = (right[:cut] + data.draw(st.text(alphabet.VOCABULARY, max_size=40)))[:LENGTH]
    packed = problems_lib.pack(ADDITION, [tasks.Problem(a, b)], 3, 2)
    answers_1xT = alphabet.encode(text.ljust(LENGTH, alphabet.PAD))[None].astype(np.int32)
    where, recorded = (np.asarray(array)[0] for array in indices(answers_1xT, packed))
    assert ((where >= 0) & (where < LENGTH)).all()
    for token in ADDITION.critical_tokens(tasks.Problem(a, b), 2):
        slot = (token.step - 1, token.operand - 1, token.slot)
        if token.index <= cut:
            assert recorded[slot]
            assert where[slot] == token.index
