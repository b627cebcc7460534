"""Speculative rollout against step-by-step decoding: the same characters from any policy, drafter, window and slots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from policies import SCRIPT_MODEL, policy, scripted_policy

from ckl_jax import tasks
from ckl_jax.checkpoint.shipped import SHIPPED_TINY
from ckl_jax.checkpoint.store import load_model
from ckl_jax.config import ModelConfig
from ckl_jax.errors import ConfigError
from ckl_jax.rollout.decoding import rollout
from ckl_jax.rollout.generation import generate
from ckl_jax.rollout.speculative import TRIAL_PASSES, speculative_rollout
from ckl_jax.rollout.trajectory import Sampling, gumbel_noise, score
from ckl_jax.tasks import alphabet
from ckl_jax.tasks import problems as problems_lib
from ckl_jax.tasks.columns import ADDITION

KEY = jax.random.key(11)
MODEL = ModelConfig(num_layers=1, num_heads=2, width=16, block_size=400)
PAIRS = [(7, 951), (123, 45), (999, 999), (0, 8), (31, 62), (504, 700), (88, 9)]
LENGTH = 120
NEAR_TIE = 1e-3


def pack(pairs=PAIRS, digits=3):
    return problems_lib.pack(ADDITION, [tasks.Problem(a, b) for a, b in pairs], digits, 2)


@functools.partial(jax.jit, static_argnames=("config", "max_length", "greedy"))
def plain(config, params, problems, key, max_length=LENGTH, temperature=1.0, greedy=False):
    return rollout(config, params, problems, key, Sampling(max_length, temperature, greedy))


@functools.partial(
    jax.jit,
    static_argnames=("config", "max_length", "greedy", "slots", "window", "drafter", "with_scores", "least_accepted"),
)
def speculative(
    config, params, problems, key, max_length=LENGTH, temperature=1.0, greedy=False, given_BxT=None, **more
):
    sampling = Sampling(max_length, temperature, greedy, given_BxT)
    return speculative_rollout(config, params, problems, key, sampling, **more)


score_of = jax.jit(score, static_argnums=0)


def assert_same_characters(config, params, problems, key, expected, verified, temperature=1.0, greedy=False):
    """Equal, except from where the two best perturbed logits of a row are closer than NEAR_TIE."""
    trajectory = verified.trajectory
    differs_BxT = np.array(expected.answers_BxT != trajectory.answers_BxT)
    rows = np.flatnonzero(differs_BxT.any(axis=1))
    if len(rows):
        logits_BxTxV = score_of(config, params, expected)[0] / temperature
        if not greedy:
            steps = jnp.broadcast_to(jnp.arange(logits_BxTxV.shape[1])[None], logits_BxTxV.shape[:2])
            logits_BxTxV += gumbel_noise(key, jnp.asarray(problems.episodes_B), steps, config.vocab_size)
        best = np.sort(np.array(logits_BxTxV), axis=2)[..., -2:]
        gaps = (best[..., 1] - best[..., 0])[rows, differs_BxT[rows].argmax(axis=1)]
        assert gaps.max() < NEAR_TIE
        assert len(rows) <= 0.05 * len(differs_BxT)
    same = np.setdiff1d(np.arange(len(differs_BxT)), rows)
    for one, other in zip(expected, trajectory, strict=True):
        np.testing.assert_allclose(one[same], other[same], atol=1e-3)


def spiteful(lists_Bx2xJ, answers_BxT, known_B, window):
    """A drafter that knows nothing: characters that change with position."""
    return (known_B[:, None] * 7 + jnp.arange(window)[None] * 3) % alphabet.VOCAB_SIZE


POLICIES = {
    "untrained": {"pad_logit": -2.0},
    "never ends": {"seed": 1, "pad_logit": -50.0},
    "ends at once": {"seed": 2, "pad_logit": 500.0},
}


@functools.cache
def made(name):
    return policy(MODEL, **POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"slots": 1, "window": 5},
        {"slots": 3, "window": 1},
        {"drafter": spiteful, "slots": 3},
    ],
    ids=["default", "one slot", "one character", "drafts of nonsense"],
)
def test_untrained_policies_draw_the_same_characters_as_step_by_step(name, options):
    expected = plain(MODEL, made(name), pack(), KEY)
    verified = speculative(MODEL, made(name), pack(), KEY, **options)
    assert_same_characters(MODEL, made(name), pack(), KEY, expected, verified)


@pytest.mark.parametrize(
    ("temperature", "greedy"), [(0.3, False), pytest.param(1.7, False, marks=pytest.mark.slow), (1.0, True)]
)
def test_temperatures_and_greedy_draw_the_same_characters(temperature, greedy):
    params = made("untrained")
    expected = plain(MODEL, params, pack(), KEY, temperature=temperature, greedy=greedy)
    verified = speculative(MODEL, params, pack(), KEY, temperature=temperature, greedy=greedy, slots=3)
    assert_same_characters(MODEL, params, pack(), KEY, expected, verified, temperature, greedy)


@pytest.fixture(scope="module")
def shipped():
    return load_model(SHIPPED_TINY)


@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.slow), 1.5])
def test_the_pretrained_policy_draws_the_same_characters_on_lengths_it_does_and_does_not_know(shipped, temperature):
    rng = np.random.default_rng(5)
    drawn = ADDITION.rl_problems(rng, 24, 6, 5) + ADDITION.short_problems(rng, 8, 5)
    problems, length = problems_lib.pack(ADDITION, drawn, 6, 5), ADDITION.max_answer_length(6, 20)
    expected = plain(shipped.config, shipped.params, problems, KEY, length, temperature)
    options = {"temperature": temperature, "slots": 8, "with_scores": True}
    verified = speculative(shipped.config, shipped.params, problems, KEY, length, **options)
    assert_same_characters(shipped.config, shipped.params, problems, KEY, expected, verified, temperature)
    logits, hidden = score_of(shipped.config, shipped.params, verified.trajectory)
    mask = np.array(verified.trajectory.mask_BxT)
    np.testing.assert_allclose(verified.logits_BxTxV[mask], logits[mask], atol=2e-3)
    np.testing.assert_allclose(verified.hidden_BxTxD[mask], hidden[mask], atol=2e-3)
    assert np.isfinite(verified.logits_BxTxV).all()
    if temperature == 1.0:
        assert verified.trajectory.reward_B.mean() > 0.2
        assert mask.sum() / (verified.passes * 8) > 4


def test_scores_are_given_only_when_asked_for():
    verified = speculative(MODEL, made("ends at once"), pack(), KEY)
    assert verified.logits_BxTxV is None
    assert verified.hidden_BxTxD is None


def test_a_right_policy_needs_a_pass_per_window_and_a_slot_takes_the_next_episode():
    right, window = ADDITION.answer_text(tasks.Problem(123, 405)), 64
    params = scripted_policy(right, first=22)
    problems = pack([(123, 405)] * 3)
    # 21 characters of the prompt after its first, and the answer, which a window's last sample can end.
    passes = -(-(21 + len(right)) // window)
    for slots, expected in ((3, passes), (1, 3 * passes), (2, 2 * passes)):
        options = {"slots": slots, "window": window}
        verified = speculative(SCRIPT_MODEL, params, problems, KEY, 250, **options)
        assert verified.passes == expected
        assert verified.trajectory.reward_B.tolist() == [1.0] * 3
        assert verified.trajectory.mask_BxT.sum(axis=1).tolist() == [len(right)] * 3


def test_one_wrong_character_costs_one_pass_more_with_the_tasks_drafts():
    right = ADDITION.answer_text(tasks.Problem(123, 405))
    wrong = ADDITION.answer_text(tasks.Problem(12, 405))
    wrong = right[: right.index(",3]")] + wrong[wrong.index(",2]") + 2 :]
    window = 64
    params = scripted_policy(wrong, first=22)
    verified = speculative(SCRIPT_MODEL, params, pack([(123, 405)]), KEY, 250, window=window)
    assert alphabet.decode(verified.trajectory.answers_BxT[0]).rstrip(alphabet.PAD) == wrong
    assert verified.passes <= -(-(21 + len(wrong)) // window) + 1


@functools.partial(jax.jit, static_argnames=("how", "with_scores"))
def generated(params, how, with_scores=True):
    return generate(MODEL, params, pack(PAIRS * 3), KEY, Sampling(LENGTH), how=how, batch=4, with_scores=with_scores)


def test_auto_gives_up_on_a_policy_that_follows_no_draft_and_loses_nothing():
    params = made("never ends")
    expected, verified, chosen = (generated(params, how) for how in ("plain", "speculative", "auto"))
    assert verified.passes > 300
    assert chosen.passes == 0
    jax.tree.map(np.testing.assert_array_equal, chosen, expected)
    assert_same_characters(MODEL, params, pack(PAIRS * 3), KEY, expected.trajectory, verified)


def test_auto_is_speculative_for_a_policy_that_follows_the_drafts(shipped):
    problems = problems_lib.pack(ADDITION, ADDITION.short_problems(np.random.default_rng(1), 40, 4), 4, 2)
    length = ADDITION.max_answer_length(4, 20)
    chosen = jax.jit(lambda params: generate(shipped.config, params, problems, KEY, Sampling(length), batch=4))
    verified = chosen(shipped.params)
    assert verified.complete
    assert verified.passes > TRIAL_PASSES
    expected = plain(shipped.config, shipped.params, problems, KEY, length)
    assert_same_characters(shipped.config, shipped.params, problems, KEY, expected, verified)


def test_giving_up_is_told():
    options = {"least_accepted": 8.0, "slots": 4}
    hopeless = speculative(MODEL, made("never ends"), pack(PAIRS * 3), KEY, **options)
    assert not hopeless.complete
    assert hopeless.passes == TRIAL_PASSES


def test_an_unknown_way_is_refused():
    with pytest.raises(ConfigError, match=r"^how: got 'fast', allowed is auto \| speculative \| plain"):
        generate(MODEL, None, pack(), KEY, Sampling(30), how="fast")


def test_vmapped_runs_equal_solo_runs_though_they_end_at_different_times():
    params = [made("ends at once"), made("never ends")]
    keys = jax.random.split(KEY, 2)

    def one(params, key):
        return speculative_rollout(MODEL, params, pack(), key, Sampling(LENGTH), slots=3, axis_name="run")

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    together = jax.jit(jax.vmap(one, axis_name="run"))(stacked, keys)
    for run in range(2):
        expected = plain(MODEL, params[run], pack(), keys[run])
        of_run = jax.tree.map(lambda x, run=run: x[run], together)
        assert_same_characters(MODEL, params[run], pack(), keys[run], expected, of_run)


@pytest.mark.parametrize(
    ("sampling", "options", "name"),
    [
        (Sampling(30, temperature=0.0), {}, "temperature"),
        (Sampling(379), {}, "block_size"),
        (Sampling(30), {"window": 0}, "window"),
        (Sampling(30), {"slots": 0}, "slots"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_touched(sampling, options, name):
    with pytest.raises(ConfigError, match=rf"^{name}: got"):
        speculative_rollout(MODEL, None, pack(), KEY, sampling, **options)


@pytest.mark.parametrize("options", [{"slots": 2, "window": 5}, {"drafter": spiteful, "slots": 3, "window": 40}])
def test_given_starts_go_on_as_step_by_step(options):
    params = made("untrained")
    expected = plain(MODEL, params, pack(), KEY)
    lengths = np.array(expected.mask_BxT.sum(axis=1))
    starts = np.arange(len(PAIRS)) * lengths // (len(PAIRS) - 1)  # From nothing to the whole answer.
    columns = np.broadcast_to(np.arange(LENGTH)[None], (len(PAIRS), LENGTH))
    given = np.where(columns < starts[:, None], expected.answers_BxT, -1)
    verified = speculative(MODEL, params, pack(), KEY, given_BxT=given, **options)
    assert_same_characters(MODEL, params, pack(), KEY, expected, verified)
    given[:, :30] = np.where(given[:, :30] >= 0, 30, -1)
    other = jax.jit(lambda given: rollout(MODEL, params, pack(), KEY, Sampling(LENGTH, given_BxT=given)))(given)
    verified = speculative(MODEL, params, pack(), KEY, given_BxT=given, **options)
    assert (np.array(other.answers_BxT) == 30).any()
    assert_same_characters(MODEL, params, pack(), KEY, other, verified)


def test_the_pretrained_policy_goes_on_from_a_changed_character_as_step_by_step(shipped):
    drawn = ADDITION.rl_problems(np.random.default_rng(6), 8, 6, 5)
    problems, length = problems_lib.pack(ADDITION, drawn, 6, 5), 150
    given = np.full((8, 80), -1)
    for row, problem in enumerate(drawn):
        text = ADDITION.answer_text(problem)[: 10 * row]
        given[row, : len(text)] = alphabet.encode(text[:-1] + "]" if text else "")
    sampling = Sampling(length, given_BxT=given)
    expected = jax.jit(functools.partial(rollout, shipped.config, shipped.params, problems, KEY, sampling))()
    how = functools.partial(generate, shipped.config, shipped.params, problems, KEY, sampling)
    verified = jax.jit(functools.partial(how, how="speculative", with_scores=True))()
    assert_same_characters(shipped.config, shipped.params, problems, KEY, expected, verified)
    np.testing.assert_array_equal(np.where(given >= 0, verified.trajectory.answers_BxT[:, :80], -1), given)
