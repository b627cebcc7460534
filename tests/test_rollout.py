"""Generation against the teacher-forced pass, and what an episode's end, noise and batching promise."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from policies import SCRIPT_MODEL, policy, scripted_policy

from ckl_jax import losses, rollout, tasks
from ckl_jax.config import ModelConfig
from ckl_jax.errors import ConfigError
from ckl_jax.rollout import decoding
from ckl_jax.rollout.trajectory import Sampling
from ckl_jax.runtime import sharding
from ckl_jax.tasks import alphabet
from ckl_jax.tasks import problems as problems_lib
from ckl_jax.tasks.columns import ADDITION

PAIRS = [(7, 951), (123, 45), (999, 999), (0, 8), (31, 62), (504, 700)]
KEY = jax.random.key(11)
MODEL = ModelConfig(num_layers=1, num_heads=2, width=16, block_size=400)


def pack(pairs=PAIRS, digits=3):
    return problems_lib.pack(ADDITION, [tasks.Problem(a, b) for a, b in pairs], digits, 2)


def rows_of(tree, rows):
    return jax.tree.map(lambda x: x[np.array(rows)], tree)


@functools.partial(jax.jit, static_argnames=("config", "max_length", "greedy"))
def generate(config, params, problems, key, max_length, temperature=1.0, greedy=False):
    return decoding.rollout(config, params, problems, key, Sampling(max_length, temperature, greedy))


score = jax.jit(rollout.score, static_argnums=0)


@pytest.fixture(scope="module")
def long_trajectory():
    """No padding is drawn, so that every row fills the limit and the cache grows twice."""
    params = policy(MODEL, pad_logit=-50.0)
    return params, generate(MODEL, params, pack(), KEY, 2 * decoding.CACHE_BLOCK + 20, 0.7)


@pytest.fixture(scope="module")
def short_trajectory():
    params = policy(MODEL)
    return params, generate(MODEL, params, pack(PAIRS * 4), KEY, 60)


def test_teacher_forced_log_probs_equal_the_rollouts_across_cache_blocks(long_trajectory):
    params, trajectory = long_trajectory
    assert trajectory.mask_BxT.all()
    logits, hidden = score(MODEL, params, trajectory)
    assert hidden.shape == (*trajectory.mask_BxT.shape, MODEL.width)
    expected = losses.token_log_probs(logits, trajectory.answers_BxT, 0.7)
    np.testing.assert_allclose(trajectory.log_probs_BxT, expected, atol=1e-4)
    assert (np.array(expected).std(axis=1) > 0.5).all()


def test_after_the_end_come_only_padding_and_log_probs_of_0(short_trajectory):
    params, trajectory = short_trajectory
    lengths = trajectory.mask_BxT.sum(axis=1)
    assert lengths.min() < 10
    assert lengths.max() > 30
    for answer, mask, log_probs, length in zip(
        *map(np.array, (trajectory.answers_BxT, trajectory.mask_BxT, trajectory.log_probs_BxT, lengths)), strict=True
    ):
        assert mask[:length].all()
        assert (log_probs[:length] < 0).all()
        assert (answer[: length - 1] != alphabet.PAD_ID).all()
        assert (answer[length:] == alphabet.PAD_ID).all()
        assert length == len(mask) or answer[length - 1] == alphabet.PAD_ID
        assert (log_probs[length:] == 0).all()
    recomputed = losses.token_log_probs(score(MODEL, params, trajectory)[0], trajectory.answers_BxT)
    expected = np.where(trajectory.mask_BxT, recomputed, 0)
    np.testing.assert_allclose(trajectory.log_probs_BxT, expected, atol=1e-4)


def test_a_trajectory_holds_the_prompt_its_positions_and_segments(short_trajectory):
    _, trajectory = short_trajectory
    packed = pack(PAIRS * 4)
    width = packed.prompts_BxP.shape[1]
    np.testing.assert_array_equal(trajectory.tokens_BxL[:, :width], packed.prompts_BxP)
    columns = np.arange(width + 60)[None] - (width - packed.prompt_lengths_B)[:, None]
    np.testing.assert_array_equal(trajectory.positions_BxL, np.maximum(columns, 0))
    np.testing.assert_array_equal(trajectory.segments_BxL, columns >= 0)


def test_the_same_key_draws_the_same_tokens_and_another_key_others(short_trajectory):
    params, trajectory = short_trajectory
    again, other = (generate(MODEL, params, pack(PAIRS * 4), key, 60) for key in (KEY, jax.random.key(12)))
    np.testing.assert_array_equal(again.tokens_BxL, trajectory.tokens_BxL)
    assert (np.array(other.answers_BxT[:, :5] != trajectory.answers_BxT[:, :5])).any(axis=1).mean() > 0.9


def test_an_episode_draws_the_same_characters_in_any_batch(short_trajectory):
    params, trajectory = short_trajectory
    rows = [17, 1, 8]
    subset = generate(MODEL, params, rows_of(pack(PAIRS * 4), rows), KEY, 60)
    np.testing.assert_array_equal(subset.answers_BxT, trajectory.answers_BxT[jnp.array(rows)])


@pytest.mark.parametrize(("batch", "divisor"), [(8, 8), (7, 6), (100, 24)])
def test_decoding_in_groups_changes_no_character(short_trajectory, batch, divisor):
    params, trajectory = short_trajectory
    assert sharding.largest_divisor(24, batch) == divisor
    grouped = jax.jit(lambda problems: decoding.rollout(MODEL, params, problems, KEY, Sampling(60), batch=batch))
    np.testing.assert_array_equal(grouped(pack(PAIRS * 4)).tokens_BxL, trajectory.tokens_BxL)


def test_an_episode_draws_the_same_characters_under_more_left_padding(short_trajectory):
    params, trajectory = short_trajectory
    wider = generate(MODEL, params, pack(PAIRS * 4, digits=5), KEY, 60)
    np.testing.assert_array_equal(wider.answers_BxT, trajectory.answers_BxT)


def test_greedy_answers_are_the_argmax_of_the_teacher_forced_logits():
    params = policy(MODEL, seed=1, pad_logit=-50.0)
    trajectory = generate(MODEL, params, pack(), KEY, 40, greedy=True)
    assert trajectory.mask_BxT.all()
    logits, _ = score(MODEL, params, trajectory)
    np.testing.assert_array_equal(trajectory.answers_BxT, logits.argmax(axis=2))


def steps_taken(monkeypatch, *args, **options):
    """The trajectory and how many characters the loop drew."""
    steps, noise = [], decoding.gumbel_noise

    def counting(key, episodes, step, vocab_size):
        jax.debug.callback(lambda t: steps.append(t), step[0, 0])
        return noise(key, episodes, step, vocab_size)

    monkeypatch.setattr(decoding, "gumbel_noise", counting)
    trajectory = jax.jit(lambda: decoding.rollout(*args, **options))()
    jax.block_until_ready(trajectory)
    jax.effects_barrier()
    return trajectory, len(steps)


def test_the_loop_stops_after_one_character_when_all_episodes_start_with_padding(monkeypatch):
    params = policy(MODEL, pad_logit=500.0)
    trajectory, steps = steps_taken(monkeypatch, MODEL, params, pack(), KEY, Sampling(60))
    assert steps == 1
    assert trajectory.mask_BxT.sum(axis=1).tolist() == [1] * len(PAIRS)
    assert not trajectory.reward_B.any()


def test_the_episode_ends_with_the_newline_of_the_result_and_the_loop_with_it(monkeypatch):
    problems, right = pack([(123, 405), (123, 406)]), ADDITION.answer_text(tasks.Problem(123, 405))
    params = scripted_policy(right + "1+1=2\n" * 3, first=22)
    trajectory, steps = steps_taken(monkeypatch, SCRIPT_MODEL, params, problems, KEY, Sampling(250))
    assert steps == len(right) > decoding.CACHE_BLOCK
    assert [alphabet.decode(answer) for answer in trajectory.answers_BxT] == [right.ljust(250, alphabet.PAD)] * 2
    assert trajectory.mask_BxT.sum(axis=1).tolist() == [len(right)] * 2
    assert trajectory.reward_B.tolist() == [1.0, 0.0]


def test_an_answer_that_the_end_of_the_block_cuts_gets_no_reward():
    problems, right = pack([(123, 405)]), ADDITION.answer_text(tasks.Problem(123, 405))
    config = dataclasses.replace(SCRIPT_MODEL, block_size=22 + len(right) - 1)
    params = scripted_policy(right[:-1], first=22, config=config)
    trajectory = generate(config, params, problems, KEY, len(right) - 1, greedy=True)
    assert alphabet.decode(trajectory.answers_BxT[0]) == right[:-1]
    assert trajectory.mask_BxT.all()
    assert trajectory.reward_B.tolist() == [0.0]


def test_vmapped_runs_equal_solo_runs_though_they_end_at_different_times():
    params = [policy(MODEL, seed=3, pad_logit=500.0), policy(MODEL, seed=4, pad_logit=-50.0)]
    keys = jax.random.split(KEY, 2)

    def one(params, key):
        return decoding.rollout(MODEL, params, pack(PAIRS * 4), key, Sampling(60), axis_name="run")

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    together = jax.jit(jax.vmap(one, axis_name="run"))(stacked, keys)
    for run in range(2):
        solo = generate(MODEL, params[run], pack(PAIRS * 4), keys[run], 60)
        np.testing.assert_array_equal(together.tokens_BxL[run], solo.tokens_BxL)
        np.testing.assert_array_equal(together.mask_BxT[run], solo.mask_BxT)
        np.testing.assert_allclose(together.log_probs_BxT[run], solo.log_probs_BxT, atol=1e-4)
    assert together.mask_BxT.sum(axis=(1, 2)).tolist() == [24, 24 * 60]


@pytest.mark.parametrize(
    ("sampling", "name"),
    [
        (Sampling(30, temperature=0.0), "temperature"),
        (Sampling(30, temperature=-1.0), "temperature"),
        (Sampling(379), "block_size"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_touched(sampling, name):
    with pytest.raises(ConfigError, match=rf"^{name}: got"):
        decoding.rollout(MODEL, None, pack(), KEY, sampling)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_characters_are_drawn_from_the_softmax_at_the_temperature(temperature):
    count, params = 4000, policy(MODEL, seed=2)
    problems = pack([(123, 45)] * count)
    trajectory = generate(MODEL, params, problems, KEY, 1, temperature)
    logits, _ = score(MODEL, params, rows_of(trajectory, [0]))
    expected = np.array(jax.nn.softmax(logits[0, 0] / temperature), np.float64)
    drawn = np.bincount(np.array(trajectory.answers_BxT)[:, 0], minlength=alphabet.VOCAB_SIZE) / count
    deviations = np.abs(drawn - expected) / np.sqrt(expected * (1 - expected) / count + 1 / count**2)
    assert expected.max() > 3 / alphabet.VOCAB_SIZE
    assert deviations.max() < 4


def cut(trajectory, lengths):
    """The answers' first characters, as many as said, and -1 after them."""
    answers_BxT = np.array(trajectory.answers_BxT)
    columns_BxT = np.broadcast_to(np.arange(answers_BxT.shape[1])[None], answers_BxT.shape)
    return np.where(columns_BxT < np.array(lengths)[:, None], answers_BxT, -1)


@pytest.mark.parametrize("batch", [None, 12])
def test_a_given_start_of_its_own_answer_goes_on_to_the_same_episode(short_trajectory, batch):
    params, trajectory = short_trajectory
    lengths = np.array(trajectory.mask_BxT.sum(axis=1))
    starts = np.arange(24) * lengths // 23  # From nothing to the whole answer.
    problems, given = pack(PAIRS * 4), cut(trajectory, starts)
    for width in (60, starts.max()):
        again = jax.jit(
            lambda given: decoding.rollout(MODEL, params, problems, KEY, Sampling(60, given_BxT=given), batch=batch)
        )(given[:, :width])
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), again, trajectory)


def test_a_given_character_changes_the_answer_and_is_judged_with_it():
    problems, right = pack([(123, 405)] * 3), ADDITION.answer_text(tasks.Problem(123, 405))
    params = scripted_policy(right, first=22)
    last = right.rindex("8")
    given = np.full((3, 250), -1)
    given[0, : last + 1] = alphabet.encode(right[:last] + "9")
    given[1, : last + 1] = alphabet.encode(right[: last + 1])
    given[2, : last + 1] = alphabet.encode(right[:last] + alphabet.PAD)
    trajectory = jax.jit(
        lambda given: decoding.rollout(SCRIPT_MODEL, params, problems, KEY, Sampling(250, given_BxT=given))
    )(given)
    texts = [alphabet.decode(answer).rstrip(alphabet.PAD) for answer in trajectory.answers_BxT]
    assert texts == [right[:last] + "9\n", right, right[:last]]
    assert trajectory.reward_B.tolist() == [0.0, 1.0, 0.0]
    assert trajectory.mask_BxT.sum(axis=1).tolist() == [len(right), len(right), last + 1]
    np.testing.assert_allclose(trajectory.log_probs_BxT[1, : len(right)], 0.0, atol=1e-3)
    assert trajectory.log_probs_BxT[0, last] < -5


@pytest.mark.parametrize("shape", [(len(PAIRS), 31), (len(PAIRS) - 1, 30), (len(PAIRS),)])
def test_given_characters_of_another_shape_are_refused(shape):
    with pytest.raises(ConfigError, match=rf"^given_BxT: got .*, allowed is \[{len(PAIRS)}, up to 30\]"):
        decoding.rollout(MODEL, None, pack(), KEY, Sampling(30, given_BxT=np.zeros(shape, int)))


@pytest.mark.parametrize("speculative", [False, True], ids=["step by step", "speculative"])
def test_scanned_layers_are_stacked_once_before_the_loops_and_write_the_same(speculative):
    scanned, unrolled = (dataclasses.replace(MODEL, num_layers=2, layers=word) for word in ("scanned", "unrolled"))
    params, sampling = policy(unrolled, pad_logit=-50.0), Sampling(40, greedy=True)

    def written(config, params):
        if speculative:
            return rollout.speculative_rollout(config, params, pack(), KEY, sampling).trajectory.answers_BxT
        return decoding.rollout(config, params, pack(), KEY, sampling).answers_BxT

    answers = [jax.jit(written, static_argnums=0)(config, params) for config in (scanned, unrolled)]
    np.testing.assert_array_equal(*answers)
    traced = jax.make_jaxpr(functools.partial(written, scanned))(params)
    loops = [equation for equation in traced.eqns if equation.primitive.name == "while"]
    stacked = re.compile(rf"f32\[2,{MODEL.width},{3 * MODEL.width}\] = (stack|concatenate)\[")
    assert len(loops) >= 1
    assert len(stacked.findall(str(traced))) == 1
    assert not any(stacked.search(str(loop)) for loop in loops)
