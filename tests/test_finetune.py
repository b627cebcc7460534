"""Fine-tuning: its runs, problems, rounds, gradients and resumption, on a random model of one layer.

The random model never solves a problem; its critic's errors give advantages that are not 0 when not normalized.
"""

import dataclasses
import functools
import json
import shutil
import signal
from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from policies import SCRIPT_MODEL, TWO, scripted_policy, untrained

from ckl_jax import losses, tasks
from ckl_jax.certainty import certainty as certainty_of
from ckl_jax.checkpoint.states import StateCheckpoints
from ckl_jax.checkpoint.store import Model, load_model, save_model
from ckl_jax.config import FinetuneConfig
from ckl_jax.errors import ConfigError
from ckl_jax.finetune import finetune
from ckl_jax.rl import collect as collect_lib
from ckl_jax.rl import setup, updates
from ckl_jax.rl.assessment import Episodes, assessed, kl_weights
from ckl_jax.rl.collect import collect
from ckl_jax.rl.critic import values
from ckl_jax.rl.objective import gradient_norms
from ckl_jax.rl.program import TEST_SEED, Hyper, Program, draw_problems, make_program, make_runs
from ckl_jax.rl.updates import RunState, init_run, train_round, train_rounds, update
from ckl_jax.rollout.trajectory import Trajectory, judged, score
from ckl_jax.runs.directory import RESUMABLE, RunDirectory
from ckl_jax.runtime.finite import NotFiniteError
from ckl_jax.runtime.preemption import PreemptedError
from ckl_jax.runtime.sharding import make_mesh
from ckl_jax.tasks import alphabet
from ckl_jax.tasks import problems as problems_lib
from ckl_jax.tasks.columns import ADDITION
from ckl_jax.token_weights import KLWeights, Tokens, index_of

ARMS = {"standard": {"beta": 0.0}, "prioritized": {"beta": 1.0}}
CONFIG = FinetuneConfig(
    extra_length=0,
    episodes=8,
    minibatch_episodes=4,
    rounds=4,
    test_every=2,
    test_problems=3,
    final_problems=3,
    learning_rate=1e-2,
    adam_epsilon=1e-3,
    beta=1.0,
    normalize_advantages=False,
    runs_at_once=2,
    rollout="plain",
    data_devices=1,
)


PINNED = {
    "certainty_mean": 0.202827,
    "certainty_min": 0.0816401,
    "entropy": 2.96036,
    "grad_norm": 9.57185,
    "grad_norm/entropy": 0.000457583,
    "grad_norm/policy": 1.02251,
    "grad_norm/value": 1.31235,
    "kl_weight": 0.202827,
    "length": 37.25,
    "loss/entropy": -0.00149179,
    "loss/kl": 0.00384183,
    "loss/policy": 2.78118,
    "loss/value": 2.05672,
}


@pytest.fixture(scope="module")
def model(small_model, tmp_path_factory):
    """Its embedding is scaled up, else every distribution is nearly uniform and J nearly 0."""
    path = tmp_path_factory.mktemp("model")
    save_model(path, Model(small_model, 1, untrained(small_model, contrast=10)), {})
    return load_model(path)


@pytest.fixture(scope="module")
def program(model):
    return make_program(CONFIG, model)


MESH = make_mesh(1, 1)


def _random_critic(state):
    """The critic starts at zero and says nothing yet; here it has opinions."""
    kernel = state.params["value"]["params"]["out"]["kernel"]
    noise = 0.3 * jax.random.normal(jax.random.key(9), kernel.shape)
    value = {**state.params["value"]["params"], "out": {**state.params["value"]["params"]["out"], "kernel": noise}}
    return state._replace(params={**state.params, "value": {"params": value}})


def _states(program, model, hypers):
    def create(params, hyper):
        return _random_critic(init_run(program, params, hyper))

    return jax.jit(jax.vmap(create, in_axes=(None, 0)))(model.params, hypers)


def _problems(program, runs, rounds):
    per_run = [[draw_problems(program, run.seed, r) for r in range(rounds)] for run in runs]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *[jax.tree.map(lambda *x: np.stack(x), *p) for p in per_run])


@pytest.fixture(scope="module")
def several(program, model):
    """Two rounds of two arms x two seeds, two runs at a time."""
    runs, hypers = make_runs(CONFIG, ARMS, 2)
    problems = _problems(program, runs, 2)
    return (
        runs,
        hypers,
        problems,
        *train_rounds(program, MESH, model.params, _states(program, model, hypers), hypers, problems),
    )


def test_runs_are_arms_times_seeds_with_the_arms_overrides():
    runs, hypers = make_runs(
        dataclasses.replace(CONFIG, seed=3),
        {"a": {"beta": 0.0, "learning_rate": 1e-4}, "b": {"kl_coefficient": 2.0, "kl_weights": "matched"}},
        2,
    )
    assert [run.name for run in runs] == ["a/seed_3", "a/seed_4", "b/seed_3", "b/seed_4"]
    np.testing.assert_array_equal(hypers.seed, [3, 4, 3, 4])
    np.testing.assert_array_equal(hypers.beta, [0, 0, 1, 1])
    np.testing.assert_allclose(hypers.learning_rate, [1e-4, 1e-4, 1e-2, 1e-2])
    np.testing.assert_allclose(hypers.kl_coefficient, [5, 5, 2, 2])
    np.testing.assert_array_equal(hypers.kl_weights, [index_of(word) for word in ["prioritized"] * 2 + ["matched"] * 2])


@pytest.mark.parametrize(
    ("arms", "seeds", "field"),
    [
        (ARMS, 0, "seeds"),
        ({}, 1, "arms"),
        ({"a": {"episodes": 4}}, 1, "arms.a"),
        ({"a": {"seed": 4}}, 1, "arms.a"),
        ({"a": {"beta": -1.0}}, 1, "beta"),
        ({"a": {"kl_weights": "shufled"}}, 1, "kl_weights"),
        ({"a": {}, "b": {"learning_rate": 0.0}}, 1, "learning_rate"),
    ],
)
def test_runs_that_cannot_work_are_refused(arms, seeds, field):
    with pytest.raises(ConfigError, match=rf"^{field}: got .* allowed is "):
        make_runs(CONFIG, arms, seeds)


def test_episodes_longer_than_the_block_are_refused(model):
    with pytest.raises(ConfigError, match=r"^extra_digits: .*block_size = 400"):
        make_program(dataclasses.replace(CONFIG, extra_length=300), model)


def test_problems_are_a_function_of_seed_and_round(program):
    problems = draw_problems(program, 0, 0)
    chex.assert_trees_all_equal(problems, draw_problems(program, 0, 0))
    later, of_next = draw_problems(program, 0, 1), draw_problems(program, 1, 0)
    for one, other in ((problems, later), (problems, of_next), (later, of_next)):
        assert (one.prompts_BxP != other.prompts_BxP).any()


def test_every_stage_of_every_round_of_every_seed_has_noise_of_its_own(program, monkeypatch):
    """Samples, shuffled weights and shuffled minibatches of two rounds of a seed, and of the next seed's first."""
    keys = []

    def collected(program, params, ref_params, hyper, problems, of_collect, axis_name, **others):
        keys.extend(of_collect)
        return None, {}

    def updated(program, hyper, state, episodes, key, axis_name):
        keys.append(key)
        return state, {}

    monkeypatch.setattr(updates, "collect", collected)
    monkeypatch.setattr(updates, "gradient_norms", lambda *arguments: {})
    monkeypatch.setattr(updates, "update", updated)
    for seed, index in ((0, 0), (0, 1), (1, 0)):
        state = RunState(jnp.int32(index), {}, None, HYPER.kl_coefficient)
        train_round(program, None, state, HYPER._replace(seed=jnp.uint32(seed)), None)
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 9


def test_a_round_reports_all_that_explains_whether_a_run_learns(several):
    *_, metrics = several
    expected = {"success", "reward", "entropy", "kl", "certainty_mean", "certainty_min", "kl_weight"}
    expected |= {"explained_variance", "critical_advantage", "critical_probability_3x2xC", "critical_count_3x2xC"}
    expected |= {f"{kind}/{term}" for kind in ("grad_norm", "loss") for term in ("policy", "value", "entropy", "kl")}
    assert expected <= metrics.keys()
    for name, value in metrics.items():
        assert value.shape[:2] == (4, 2), name
        assert jnp.isfinite(value).all(), name
    assert (metrics["certainty_min"] <= metrics["certainty_mean"]).all()


def test_the_first_round_has_the_pinned_metrics(several):
    """What this version computes, so that no other one computes something else unnoticed."""
    runs, *_, metrics = several
    assert runs[2].name == "prioritized/seed_0"
    found = {name: float(metrics[name][2, 0]) for name in PINNED}
    assert found == pytest.approx(PINNED, rel=2e-3)


def test_beta_0_weighs_every_token_1_and_a_larger_beta_less(several):
    runs, *_, metrics = several
    weights = {arm: metrics["kl_weight"][np.array([run.arm == arm for run in runs])] for arm in ARMS}
    np.testing.assert_array_equal(weights["standard"], 1.0)
    assert (weights["prioritized"] < 0.9).all()


def test_the_kl_has_no_gradient_while_the_policy_is_the_reference(several):
    *_, metrics = several
    norm, other = metrics["grad_norm/kl"], metrics["grad_norm/policy"]
    assert (norm[:, 0] < 1e-4 * other[:, 0]).all()
    assert (norm[:, 1] > 1e-2 * other[:, 1]).all()
    np.testing.assert_allclose(metrics["kl"][:, 0], 0, atol=1e-8)
    assert (metrics["kl"][:, 1] > 1e-4).all()


def test_rl_computes_as_its_own_config_says_and_in_the_checkpoints_chunks_if_it_says_nothing(model):
    others = {"dtype": "bfloat16", "precision": "high", "attention": "plain", "attention_chunk": 7, "remat": True}
    program = make_program(CONFIG, model, model)
    changed = make_program(dataclasses.replace(CONFIG, **others), model, model)
    for told in (changed.model, changed.certainty_model):
        assert {name: getattr(told, name) for name in others} == others
    for untold in (program.model, program.certainty_model):
        assert untold.attention_chunk == model.config.attention_chunk != 7


@pytest.mark.parametrize("rollout", ["plain", "speculative"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_that_is_the_reference_has_no_kl_and_ratios_of_1(model, dtype, rollout):
    """Whatever the rollout's own passes have rounded."""
    program = make_program(dataclasses.replace(CONFIG, rollout=rollout, dtype=dtype), model)

    @jax.jit
    def found(params, ref_params, problems):
        keys = jax.random.split(jax.random.key(2))
        episodes, metrics = collect(program, params, ref_params, HYPER, problems, (keys[0], keys[1]), None)
        trajectory, mask = episodes.trajectory, episodes.trajectory.mask_BxT
        ref = losses.token_log_probs(episodes.ref_logits_BxTxV, trajectory.answers_BxT, mask=mask)
        again = score(program.model, params["policy"], trajectory)[0]
        new = losses.token_log_probs(again, trajectory.answers_BxT, mask=mask)
        return metrics["kl"], ref - trajectory.log_probs_BxT, jnp.exp(new - trajectory.log_probs_BxT), mask

    params = init_run(program, model.params, HYPER).params
    problems = jax.tree.map(jnp.asarray, draw_problems(program, 0, 0))
    kl, k1_BxT, ratio_BxT, mask_BxT = found(params, model.params, problems)
    assert mask_BxT.sum() > 100
    exact = dtype == "bfloat16"
    np.testing.assert_allclose(kl, 0, atol=0 if exact else 1e-8)
    np.testing.assert_allclose(k1_BxT, 0, atol=0 if exact else 1e-5)
    np.testing.assert_allclose(ratio_BxT, 1, atol=0.05 if exact else 1e-5)


@pytest.mark.parametrize(
    "changes", [{"episode_batch": 1}, {"episode_batch": 3}, {"remat": True}, {"attention_chunk": 7}]
)
def test_what_takes_less_memory_makes_the_same_update(program, model, changes):
    state, episodes, _ = _collected(program, model.params)
    smaller = make_program(dataclasses.replace(program.config, **changes), model)
    expected, metrics = _updated(program, state, episodes)
    found, others = _updated(smaller, state, episodes)
    chex.assert_trees_all_close(others, metrics, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(found.params, expected.params, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_fused_attention_makes_the_same_round(small_model):
    config = dataclasses.replace(small_model, width=128)
    wide = Model(config, 1, untrained(config, contrast=4))
    made = []
    for attention in ("plain", "fused"):
        program = make_program(dataclasses.replace(CONFIG, attention=attention), wide)
        state, episodes, metrics = _collected(program, wide.params)
        made.append((metrics, *_updated(program, state, episodes)))
    (plain, state, of_update), (fused, other, of_other) = made
    chex.assert_trees_all_close((fused, of_other), (plain, of_update), rtol=1e-3, atol=1e-5)
    chex.assert_trees_all_close(other.params, state.params, rtol=1e-3, atol=1e-5)


def test_arms_of_a_seed_start_with_the_same_episodes_and_seeds_differ(several):
    runs, _, problems, _, metrics = several
    assert [run.name for run in runs[::2]] == ["standard/seed_0", "prioritized/seed_0"]
    chex.assert_trees_all_equal(*(jax.tree.map(lambda x, i=i: x[i], problems) for i in (0, 2)))
    for name in ("length", "entropy", "certainty_mean"):
        first = metrics[name][:, 0]
        np.testing.assert_allclose(first[0], first[2], rtol=1e-5)
        assert abs(first[0] - first[1]) > 1e-3 * first[0]


@pytest.mark.slow
def test_a_run_is_the_same_alone_and_among_others_one_or_two_at_a_time(several, model):
    _, hypers, problems, states, metrics = several
    one_at_a_time = make_program(dataclasses.replace(CONFIG, runs_at_once=1), model)
    for index in (0, 3):
        row = jax.tree.map(lambda x, index=index: x[index : index + 1], (hypers, problems))
        alone, of_it = train_rounds(one_at_a_time, MESH, model.params, _states(one_at_a_time, model, row[0]), *row)
        np.testing.assert_array_equal(of_it["length"][0], metrics["length"][index])
        for name in metrics:
            np.testing.assert_allclose(of_it[name][0], metrics[name][index], rtol=1e-3, atol=1e-5, err_msg=name)
        expected = jax.tree.map(lambda x, index=index: x[index : index + 1], states)
        chex.assert_trees_all_close(alone.params, expected.params, rtol=1e-3, atol=1e-5)
        moved = jax.tree.map(lambda new, old: new[0] - old, alone.params["policy"], model.params)
        assert optax.tree.norm(moved) > 1e-2


def test_repeated_rounds_are_one_compilation(several, program, model):
    _, hypers, problems, states, _ = several
    before = train_rounds._cache_size()
    states = jax.tree.map(jnp.copy, states)
    for _ in range(2):
        states, _ = train_rounds(program, MESH, model.params, states, hypers, problems)
    assert train_rounds._cache_size() == before
    np.testing.assert_array_equal(states.round, 6)


HYPER = Hyper(jnp.uint32(0), jnp.float32(1e-2), jnp.float32(5.0), jnp.float32(1.0), jnp.int32(0))


@functools.partial(jax.jit, static_argnums=0)
def _collected(program, ref_params):
    """A state whose policy has moved away from the reference, and its episodes."""
    state = _random_critic(init_run(program, ref_params, HYPER))
    noise = jax.random.normal(jax.random.key(1), ref_params["params"]["wpe"]["embedding"].shape)
    policy = jax.tree.map(jnp.copy, ref_params)
    policy["params"]["wpe"]["embedding"] += 0.05 * noise
    state = state._replace(params={**state.params, "policy": policy})
    problems = jax.tree.map(jnp.asarray, draw_problems(program, 0, 0))
    keys = jax.random.split(jax.random.key(2))
    episodes, metrics = collect(program, state.params, ref_params, HYPER, problems, (keys[0], keys[1]), None)
    return state, episodes, metrics


def _weighed(config, episodes, index):
    """Every third character counts as critical, every second as overlong."""
    mask_BxT = episodes.trajectory.mask_BxT
    entropy_BxT = losses.entropy(episodes.ref_logits_BxTxV, config.certainty_temperature)
    places = (jnp.broadcast_to(jnp.arange(mask_BxT.shape[1]) % every == 0, mask_BxT.shape) for every in (3, 2))
    tokens = Tokens(episodes.certainty_BxT, entropy_BxT, mask_BxT, *places)
    weights_BxT = kl_weights(config, HYPER._replace(kl_weights=index), tokens, jax.random.key(4))
    return episodes._replace(kl_weights_BxT=weights_BxT)


@functools.partial(jax.jit, static_argnums=0)
def _updated(program, state, episodes):
    return update(program, HYPER, state, episodes, jax.random.key(3))


@pytest.fixture(scope="module")
def collected_otherwise(program, model):
    otherwise = {"normalize_advantages": True, "certainty": "max_prob", "certainty_temperature": 4.0}
    return _collected(program._replace(config=dataclasses.replace(CONFIG, **otherwise)), model.params)[1]


@pytest.mark.parametrize(
    ("kl", "certainty"),
    [("k1", "negentropy"), ("k2", "negentropy_max_prob"), ("k3", "max_prob"), ("exact", "negentropy")],
)
def test_every_kind_of_kl_and_certainty_makes_a_finite_update(program, model, kl, certainty):
    state, episodes, _ = _collected(program, model.params)
    episodes = episodes._replace(certainty_BxT=certainty_of(episodes.ref_logits_BxTxV, certainty))
    episodes = _weighed(program.config, episodes, HYPER.kl_weights)
    assert ((episodes.certainty_BxT >= 0) & (episodes.certainty_BxT <= 1)).all()
    after, terms = _updated(program._replace(config=dataclasses.replace(CONFIG, kl=kl)), state, episodes)
    chex.assert_tree_all_finite((after, terms))
    assert terms["loss/kl"] > 0 or kl == "k1"
    moved = jax.tree.map(lambda new, old: new - old, after.params, state.params)
    assert optax.tree.norm(moved["policy"]) > 1e-3
    assert optax.tree.norm(moved["value"]) > 1e-3


@pytest.mark.parametrize("word", get_args(KLWeights))
def test_every_word_of_weights_makes_an_update_with_its_share_of_the_kl(program, model, word):
    """All weights of one word, times the KL of the standard one token by token, are the round's only minibatch."""
    program = program._replace(config=dataclasses.replace(CONFIG, minibatch_episodes=CONFIG.episodes, kl_quantile=0.5))
    state, episodes, _ = _collected(program, model.params)
    episodes = _weighed(program.config, episodes, jnp.int32(index_of(word)))
    after, terms = _updated(program, state, episodes)
    chex.assert_tree_all_finite((after, terms))
    mask_BxT, weights_BxT = episodes.trajectory.mask_BxT, episodes.kl_weights_BxT
    logits_BxTxV, _ = score(program.model, state.params["policy"], episodes.trajectory)
    kl_BxT = losses.exact_kl(logits_BxTxV, episodes.ref_logits_BxTxV)
    expected = HYPER.kl_coefficient * (weights_BxT * kl_BxT)[mask_BxT].sum() / mask_BxT.sum()
    assert expected > 1e-3
    np.testing.assert_allclose(terms["loss/kl"], expected, rtol=1e-3)
    moved = jax.tree.map(lambda new, old: new - old, after.params, state.params)
    assert optax.tree.norm(moved["policy"]) > 1e-3


def test_weights_look_at_the_references_entropy_at_the_certaintys_temperature(program, model):
    config = dataclasses.replace(CONFIG, certainty_temperature=4.0, kl_quantile=0.5)
    _, episodes, _ = _collected(program, model.params)
    trajectory, logits_BxTxV, mask = episodes.trajectory, episodes.ref_logits_BxTxV, episodes.trajectory.mask_BxT
    hyper = HYPER._replace(kl_weights=index_of("threshold"))
    found = assessed(
        config,
        trajectory,
        hyper,
        jax.random.key(4),
        logits_BxTxV=logits_BxTxV,
        ref_logits_BxTxV=logits_BxTxV,
        sure_logits_BxTxV=logits_BxTxV,
        values_BxT=jnp.zeros(mask.shape),
        critical_BxT=mask,
        overlong_BxT=mask,
    ).kl_weights_BxT
    mask, entropy = np.asarray(mask), np.asarray(losses.entropy(logits_BxTxV, 4.0))
    np.testing.assert_array_equal(found[mask], entropy[mask] <= np.sort(entropy[mask])[round(mask.sum() / 2) - 1])


@pytest.fixture(scope="module")
def collect_scripted():
    """A round of a word whose policy, a model of 2 digits, says a text about 123 + 456."""
    program = make_program(CONFIG, Model(SCRIPT_MODEL, 2, untrained(SCRIPT_MODEL)))
    problem = tasks.Problem(123, 456)
    problems = jax.tree.map(jnp.asarray, problems_lib.pack(ADDITION, [problem] * CONFIG.episodes, 3, 2))
    keys = (jax.random.key(1), jax.random.key(2))

    @jax.jit
    def collected(policy, hyper):
        params = init_run(program, policy, hyper).params
        return collect(program, params, policy, hyper, problems, keys, None)

    def of(text, word="critical_free"):
        hyper = HYPER._replace(kl_weights=jnp.int32(index_of(word)))
        return collected(scripted_policy(text, len(ADDITION.prompt_text(problem))), hyper)

    return of


def test_a_round_spares_the_critical_tokens_that_its_answers_come_to(collect_scripted):
    problem = tasks.Problem(123, 456)
    right, tokens = ADDITION.answer_text(problem), ADDITION.critical_tokens(problem, 2)
    comma = min(t.index for t in tokens if t.operand == 2)
    cases = {
        right: {t.index for t in tokens},
        right[: comma - 1] + "9" + right[comma:]: {t.index for t in tokens if t.operand == 1},
        right[:comma]: {t.index for t in tokens if t.index <= comma},
    }
    for text, expected in cases.items():
        episodes, metrics = collect_scripted(text + alphabet.PAD)
        weights_BxT, mask_BxT = np.asarray(episodes.kl_weights_BxT), np.asarray(episodes.trajectory.mask_BxT)
        said = alphabet.decode(np.asarray(episodes.trajectory.answers_BxT)[0])
        assert said[: len(text)] == text
        free = mask_BxT & (weights_BxT == 0)
        assert all(set(np.flatnonzero(row)) == expected for row in free), text
        assert (weights_BxT[mask_BxT & ~free] == 1).all()
        assert metrics["critical_count_3x2xC"].sum() == len(expected) * CONFIG.episodes


def test_a_round_spares_what_is_overlong_for_the_model_and_its_critical_tokens(collect_scripted):
    text = ADDITION.answer_text(tasks.Problem(123, 456))
    episodes, _ = collect_scripted(text + alphabet.PAD, "overlong_free")
    weights_BxT, mask_BxT = np.asarray(episodes.kl_weights_BxT), np.asarray(episodes.trajectory.mask_BxT)
    shown = zip(text, weights_BxT[0], mask_BxT[0], strict=False)
    spared = "".join(
        character if not made or not weight or character == "\n" else "." for character, weight, made in shown
    )
    written, lines = text.split("\n"), spared.split("\n")
    assert written[2].startswith("[1,2,3] + [4,5,6] , A=[] , C=0 , ")
    assert lines[2] == "...2,3]......5,6]".ljust(len(written[2]), ".")
    assert written[3].startswith("[1,2] + [4,5] , A=[9] , C=0 , ")
    assert lines[3] == "..,2].....,5]".ljust(len(written[3]), ".")
    assert written[-2] == "5 7 9"
    assert lines[-2] == "..7 9"


WARM = Program(SCRIPT_MODEL, dataclasses.replace(CONFIG, temperature=2.0), 2, ADDITION)


@pytest.fixture(scope="module")
def reported():
    """What a round at temperature 2 reports of two answers to 123 + 456.

    By default the policy gives 1/2 to every character that it has written and 1/80 to each of the 40 others.
    """
    problem = tasks.Problem(123, 456)
    problems = problems_lib.pack(ADDITION, [problem] * 2, 3, 2)
    length = len(ADDITION.answer_text(problem))

    @jax.jit
    def metrics(answers_BxT, logits_BxTxV, ref_logits_BxTxV, returns_BxT, values_BxT):
        zeros = jnp.zeros(answers_BxT.shape)
        trajectory = judged(problems, answers_BxT, zeros)
        episodes = Episodes(trajectory, ref_logits_BxTxV, zeros, zeros, returns_BxT, *[zeros] * 4)
        return collect_lib._collect_metrics(WARM, episodes, logits_BxTxV, values_BxT, problems)

    def of(*texts, logits=None, returns=(0.0, 0.0), value=0.0):
        answers_BxT = jnp.stack([alphabet.encode(text.ljust(length, alphabet.PAD)) for text in texts]).astype(jnp.int32)
        written_BxTxV = 2 * np.log(40.0) * jax.nn.one_hot(answers_BxT, alphabet.VOCAB_SIZE)
        logits_BxTxV = written_BxTxV if logits is None else jnp.broadcast_to(logits, written_BxTxV.shape)
        returns_BxT = jnp.broadcast_to(jnp.array(returns)[:, None], answers_BxT.shape)
        values_BxT = jnp.full(answers_BxT.shape, value)
        return metrics(answers_BxT, logits_BxTxV, jnp.minimum(logits_BxTxV, 0.0), returns_BxT, values_BxT)

    return of


def test_the_probability_of_a_critical_token_is_that_of_the_right_character_where_answers_come_to_it(reported):
    """A right answer beside one that comes to no token, and beside one that has a wrong digit for the second."""
    problem = tasks.Problem(123, 456)
    right = ADDITION.answer_text(problem)
    digit = next(token for token in ADDITION.critical_tokens(problem, 2) if token.name == "n+1_digit")
    assert (digit.step, digit.operand, digit.slot, digit.character) == (1, 1, 1, "3")
    alone = reported(right, "\n")
    np.testing.assert_array_equal(alone["critical_count_3x2xC"][0], [[1, 1], [1, 1]])
    np.testing.assert_allclose(alone["critical_probability_3x2xC"][0], [[0.5, 0.5], [0.5, 0.5]], rtol=1e-5)
    beside = reported(right, right[: digit.index] + "9" + right[digit.index + 1 :])
    np.testing.assert_array_equal(beside["critical_count_3x2xC"][0], [[2, 2], [2, 2]])
    expected = [[0.5, (1 / 2 + 1 / 80) / 2], [0.5, 0.5]]
    np.testing.assert_allclose(beside["critical_probability_3x2xC"][0], expected, rtol=1e-5)


def test_the_reported_kl_is_at_the_runs_temperature(reported):
    """ln(1/2) / 4 + 3 ln(3/2) / 4; at temperature 1 it were 0.368."""
    two = jnp.full(alphabet.VOCAB_SIZE, -1e9).at[:2].set(TWO)
    text = ADDITION.answer_text(tasks.Problem(123, 456))
    np.testing.assert_allclose(reported(text, text, logits=two)["kl"], 0.130812, rtol=1e-5)


def test_a_critic_that_says_the_mean_return_explains_none_of_the_variance(reported):
    text = ADDITION.answer_text(tasks.Problem(123, 456))
    found = reported(text, text, returns=(1.0, 0.0), value=0.5)
    np.testing.assert_allclose(found["explained_variance"], 0.0, atol=1e-6)


def test_answers_that_are_scored_again_have_log_probs_at_the_runs_temperature(monkeypatch):
    """A token of probability 3/4."""
    monkeypatch.setattr(collect_lib, "score", lambda model, logits, trajectory: (logits, logits))
    ones = jnp.ones((1, 1), jnp.int32)
    written = Trajectory(ones, ones, ones, jnp.zeros((1, 1)), jnp.ones((1, 1), bool), jnp.zeros(1))
    logits = TWO[None, None]
    trajectory, *_ = collect_lib._scored_alike(WARM, logits, jnp.zeros_like(logits), written)
    np.testing.assert_allclose(trajectory.log_probs_BxT, [[np.log(0.75)]], rtol=1e-6)


def test_arms_of_one_program_differ_in_the_word(program, model, several):
    """Two rounds of three words: the first round weighs the same tokens, the second's policies have parted."""
    arms = {word: {"kl_weights": word} for word in ("prioritized", "matched", "uniform")}
    runs, hypers = make_runs(CONFIG, {**arms, "other": {"kl_weights": "shuffled"}}, 1)
    _, metrics = train_rounds(
        program, MESH, model.params, _states(program, model, hypers), hypers, _problems(program, runs, 2)
    )
    weight = dict(zip(("prioritized", "matched", "uniform", "shuffled"), metrics["kl_weight"], strict=True))
    first = several[4]["kl_weight"][2, 0]
    for word in ("prioritized", "matched", "shuffled"):
        np.testing.assert_allclose(weight[word][0], first, rtol=1e-5, err_msg=word)
    np.testing.assert_array_equal(weight["uniform"], 1.0)
    second = metrics["loss/kl"][:, 1]
    assert len(np.unique(np.round(second, 6))) == 4


def test_the_collect_uses_the_configs_certainty_and_its_temperature(collected_otherwise):
    episodes = collected_otherwise
    expected = certainty_of(episodes.ref_logits_BxTxV, "max_prob", 4.0)
    np.testing.assert_allclose(episodes.certainty_BxT, expected, rtol=1e-5)


def test_a_fresh_critic_says_zero_everywhere(program, model):
    state = init_run(program, model.params, HYPER)
    hidden = jax.random.normal(jax.random.key(0), (2, 3, model.config.width))
    np.testing.assert_array_equal(values(state.params["value"], hidden), np.zeros((2, 3)))


def test_only_the_critic_learns_in_the_value_warmup(program, model):
    state, episodes, _ = _collected(program, model.params)
    after, _ = _updated(program._replace(config=dataclasses.replace(CONFIG, value_warmup_rounds=1)), state, episodes)
    chex.assert_trees_all_equal(after.params["policy"], state.params["policy"])
    moved = jax.tree.map(lambda new, old: new - old, after.params["value"], state.params["value"])
    assert optax.tree.norm(moved) > 1e-3


def test_the_learning_rate_of_the_policy_decays_linearly_over_the_rounds_and_the_critics_does_not(program, model):
    config = dataclasses.replace(CONFIG, minibatch_episodes=CONFIG.episodes)
    state, episodes, _ = _collected(program, model.params)

    def moved(round_index, **change):
        of_round = state._replace(round=jnp.int32(round_index))
        after, _ = _updated(program._replace(config=dataclasses.replace(config, **change)), of_round, episodes)
        return jax.tree.map(lambda new, old: new - old, after.params, state.params)

    whole, first, last = moved(3, learning_rate_decay=False), moved(0), moved(3)
    assert min(optax.tree.norm(whole["policy"]), optax.tree.norm(whole["value"])) > 1e-3
    chex.assert_trees_all_close(first, whole, atol=1e-6)
    chex.assert_trees_all_close(last["policy"], jax.tree.map(lambda x: x / 4, whole["policy"]), atol=1e-6)
    chex.assert_trees_all_close(last["value"], whole["value"], atol=1e-6)


def test_equal_rewards_are_no_advantage_when_normalized(program, model, collected_otherwise):
    _, raw, metrics = _collected(program, model.params)
    assert metrics["success"] == 0
    assert jnp.abs(raw.advantages_BxT).max() > 1e-3
    np.testing.assert_array_equal(collected_otherwise.advantages_BxT, 0.0)
    np.testing.assert_allclose(collected_otherwise.returns_BxT, raw.returns_BxT, atol=1e-6)


def test_a_detached_critic_takes_the_value_gradient_off_the_policy_and_no_other(program, model):
    norms = jax.jit(gradient_norms, static_argnums=0)
    state, episodes, _ = _collected(program, model.params)
    attached = norms(program, HYPER, state.params, episodes)
    detached_program = program._replace(config=dataclasses.replace(CONFIG, detach_critic=True))
    detached = norms(detached_program, HYPER, state.params, episodes)
    assert attached.pop("grad_norm/value") > 1e-4
    assert detached.pop("grad_norm/value") == 0
    chex.assert_trees_all_close(attached, detached, rtol=1e-5)
    assert min(attached.values()) > 0


def test_kl_cov_has_no_gradient_before_the_first_update(program, model):
    """The rollout's policy is the update's, but another pass computed its log-probabilities."""
    changed = program._replace(config=dataclasses.replace(CONFIG, kl_cov=1.0, kl_cov_share=0.5))
    state, episodes, _ = _collected(changed, model.params)
    norms = jax.jit(gradient_norms, static_argnums=0)(changed, HYPER, state.params, episodes)
    assert norms["grad_norm/kl_cov"] == 0 < norms["grad_norm/policy"]


@pytest.mark.parametrize(("seed", "seeds"), [(TEST_SEED, 1), (TEST_SEED - 1, 2)])
def test_a_run_on_the_problems_of_the_tests_is_refused(seed, seeds):
    with pytest.raises(
        ConfigError, match=rf"^seed: got '{seed} for {seeds} runs', allowed is a range without {TEST_SEED}"
    ):
        make_runs(dataclasses.replace(CONFIG, seed=seed), ARMS, seeds)
    make_runs(dataclasses.replace(CONFIG, seed=TEST_SEED + 1), ARMS, seeds)


def _run(config, model, path, progress=lambda line: None, arms=ARMS, seeds=2):
    directory = RunDirectory(path, {"command": "finetune", **dataclasses.asdict(config)})
    return finetune(config, model, directory, arms, seeds, progress)


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("uninterrupted")
    drawn = []

    def recorded(program, mesh, ref_params, states, hypers, problems):
        drawn.append(problems)
        return train_rounds(program, mesh, ref_params, states, hypers, problems)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "train_rounds", recorded)
        # What pre-training computed in has no part in it, and the policies say what they were trained in.
        pretrained = dataclasses.replace(
            model.config, dtype="bfloat16", precision="default", attention="plain", remat=True
        )
        runs = _run(CONFIG, model._replace(config=pretrained), path)
    return path, runs, drawn


def test_a_run_logs_every_round_and_test_of_every_arm_and_saves_its_policies(uninterrupted, model):
    path, runs, _ = uninterrupted
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    tests = [(r["step"], r["arm"], r["seed"]) for r in records if {"test_target", "test_old"} <= r.keys()]
    rounds = [(r["step"], r["arm"], r["seed"]) for r in records if {"success", "kl_weight", "grad_norm/kl"} <= r.keys()]
    assert tests == [(step, *run) for step in (0, 2, 4) for run in runs]
    assert rounds == [(step, *run) for step in (1, 2, 3, 4) for run in runs]
    saved = [load_model(path / run.name) for run in runs]
    for policy in saved:
        assert policy[:2] == (model.config, 1)
        chex.assert_trees_all_equal_shapes_and_dtypes(policy.params, model.params)
    for one, other in ((saved[0], saved[1]), (saved[0], saved[2]), (saved[0], model)):
        assert optax.tree.norm(jax.tree.map(jnp.subtract, one.params, other.params)) > 1e-3


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew_over_its_records(uninterrupted, model, tmp_path):
    """All that ships as a result is such a run, and so is one whose space on the disk was needed."""
    path, _, _ = uninterrupted
    shutil.copytree(path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ConfigError, match=r"^out: .* has records up to step 4 and no checkpoint to go on from"):
        _run(CONFIG, model, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (path / "metrics.jsonl").read_bytes()


def _files(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_finished_run_saves_a_policy_that_is_missing_and_no_other(uninterrupted, model, tmp_path):
    path, (first, *others), _ = uninterrupted
    shutil.copytree(path, tmp_path / "run")
    (tmp_path / "run" / first.name / "model.json").unlink()
    kept = [_files(tmp_path / "run" / run.name) for run in others]
    _run(CONFIG, model, tmp_path / "run")
    assert [_files(tmp_path / "run" / run.name) for run in others] == kept
    chex.assert_trees_all_equal(*(load_model(place / first.name).params for place in (path, tmp_path / "run")))


def test_all_arms_of_a_seed_get_the_same_problems_and_each_round_new_ones(uninterrupted):
    _, _, drawn = uninterrupted
    assert len(drawn) == 2
    for problems in drawn:
        for seed in (0, 1):
            chex.assert_trees_all_equal(*(jax.tree.map(lambda x, i=i: x[i], problems) for i in (seed, seed + 2)))
    rounds = np.concatenate([problems.prompts_BxP[0] for problems in drawn])
    assert len(np.unique(rounds, axis=0)) == 4


class _KilledError(Exception):
    pass


def _killed_after_a_checkpoint(monkeypatch):
    def progress(line):
        if line.startswith("round 2/"):
            raise _KilledError

    return progress


def _interrupted_before_a_checkpoint(monkeypatch):
    save = StateCheckpoints.save

    def interrupted_save(self, step, state):
        if step == 2:
            raise KeyboardInterrupt
        save(self, step, state)

    monkeypatch.setattr(StateCheckpoints, "save", interrupted_save)
    return lambda line: None


@pytest.mark.parametrize("interruption", [_killed_after_a_checkpoint, _interrupted_before_a_checkpoint])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, model, uninterrupted, monkeypatch, interruption):
    path, runs, _ = uninterrupted
    with monkeypatch.context() as patch, pytest.raises((_KilledError, KeyboardInterrupt)):
        _run(CONFIG, model, tmp_path, interruption(patch))
    assert not (tmp_path / runs[0].name).exists()
    shown = []
    assert _run(CONFIG, model, tmp_path, shown.append) == runs
    assert not any(line.startswith("before") for line in shown)
    for run in runs:
        chex.assert_trees_all_equal(load_model(tmp_path / run.name).params, load_model(path / run.name).params)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (path / "metrics.jsonl").read_bytes()


def test_sigterm_and_numbers_that_are_not_finite_stop_a_run_that_then_ends_with_the_same_bits(
    tmp_path, model, uninterrupted, monkeypatch
):
    path, runs, _ = uninterrupted

    def signalled(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return train_rounds(*arguments)

    def poisoned(program, mesh, ref_params, states, *others):
        states = states._replace(params=jax.tree.map(lambda x: x.at[2].mul(jnp.nan), states.params))
        return train_rounds(program, mesh, ref_params, states, *others)

    with monkeypatch.context() as patch:
        patch.setattr(setup, "train_rounds", signalled)
        with pytest.raises(PreemptedError, match=rf"^round 2/4 is saved in {tmp_path}$"):
            _run(CONFIG, model, tmp_path)
        logged = (tmp_path / "metrics.jsonl").read_bytes()
        patch.setattr(setup, "train_rounds", poisoned)
        with pytest.raises(NotFiniteError, match=r"^round 3 of prioritized/seed_0: entropy is nan"):
            _run(CONFIG, model, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == logged
    assert {file.name for file in (tmp_path / "checkpoints").iterdir() if file.is_dir()} == {"0", "2"}
    assert _run(CONFIG, model, tmp_path) == runs
    for run in runs:
        chex.assert_trees_all_equal(load_model(tmp_path / run.name).params, load_model(path / run.name).params)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (path / "metrics.jsonl").read_bytes()


def _assert_same_run(path, other, runs):
    for run in runs:
        chex.assert_trees_all_equal(load_model(path / run.name).params, load_model(other / run.name).params)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (path / name).read_bytes() == (other / name).read_bytes()


# Another value for every field that changes the speed alone; those of the second kind make the same program here.
OTHER_SPEED = {"runs_at_once": 1, "rollout": "speculative", "rollout_batch": 4, "data_devices": 2, "shard_state": True}
OTHER_SPEED |= {"episode_batch": 2, "remat": True, "attention_chunk": 64}
OF_PRETRAINING = {"layers", "microbatches"}
SAME_PROGRAM = {"transition_batch": 3, "attention": "plain"}


@pytest.mark.slow
def test_a_run_goes_on_with_other_speed_to_the_same_numbers(tmp_path, model, uninterrupted, monkeypatch):
    path, runs, _ = uninterrupted
    assert {*OTHER_SPEED, *SAME_PROGRAM} == {*RESUMABLE.speed} - OF_PRETRAINING
    with pytest.raises(_KilledError):
        _run(CONFIG, model, tmp_path / "a", _killed_after_a_checkpoint(monkeypatch))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    other = dataclasses.replace(CONFIG, **SAME_PROGRAM)
    assert _run(other, model, tmp_path / "a") == runs
    _assert_same_run(tmp_path / "a", path, runs)
    other = dataclasses.replace(other, **OTHER_SPEED)
    assert _run(other, model, tmp_path / "b") == runs
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == {
        "command": "finetune",
        **dataclasses.asdict(other),
    }
    for name in ("metrics.jsonl", "samples.jsonl"):
        found, expected = (
            [json.loads(line) for line in (of / name).read_text().splitlines()] for of in (tmp_path / "b", path)
        )
        chex.assert_trees_all_close(_numbers(found), _numbers(expected), rtol=1e-2, atol=1e-4)
        chosen = ("step", "arm", "seed", "answer", "success", "test_target", "test_old")
        exact = [[{key: record.get(key) for key in chosen} for record in records] for records in (found, expected)]
        assert exact[0] == exact[1]


def _numbers(records):
    return [{key: np.array(x, float) for key, x in r.items() if not isinstance(x, str)} for r in records]


def test_a_finished_run_that_is_given_more_rounds_ends_with_the_bits_of_one_that_had_them(tmp_path, model, monkeypatch):
    small = {"episodes": 4, "final_problems": 6, "diagnostic_episodes": 1}
    long = dataclasses.replace(CONFIG, learning_rate_decay=False, **small)
    short = dataclasses.replace(long, rounds=2)
    run = functools.partial(_run, model=model, arms={"run": {}}, seeds=1)
    runs = run(long, path=tmp_path / "whole")
    run(short, path=tmp_path / "longer")
    finished = (tmp_path / "longer" / "metrics.jsonl").read_bytes()
    assert not (tmp_path / "whole" / "metrics.jsonl").read_bytes().startswith(finished)
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "log", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(long, path=tmp_path / "longer")
    with pytest.raises(ConfigError, match=r"^rounds: got 2, allowed is 4 or more, as the run in .*longer has$"):
        run(short, path=tmp_path / "longer")
    assert run(long, path=tmp_path / "longer") == runs
    _assert_same_run(tmp_path / "longer", tmp_path / "whole", runs)
    assert (tmp_path / "longer" / "config.json").read_bytes() == (tmp_path / "whole" / "config.json").read_bytes()


def _interrupt(*_):
    raise KeyboardInterrupt


def test_the_task_knows_its_lengths(program):
    assert isinstance(program, Program)
    assert program.digits == 2
    assert program.max_length == 157
