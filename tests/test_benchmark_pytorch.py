"""The PyTorch baselines compute what ours computes: logits, greedy answers, and the loss of single transitions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from policies import untrained

from ckl_jax import losses
from ckl_jax.checkpoint.shipped import SHIPPED_TINY
from ckl_jax.checkpoint.store import Model, load_model
from ckl_jax.config import FinetuneConfig
from ckl_jax.datasets.stream import Windows
from ckl_jax.model import forward
from ckl_jax.next_character import next_token_loss
from ckl_jax.presets import pretrain_preset
from ckl_jax.rl.collect import collect
from ckl_jax.rl.critic import values
from ckl_jax.rl.objective import loss_terms
from ckl_jax.rl.program import draw_problems, make_program, make_runs
from ckl_jax.rl.updates import init_run
from ckl_jax.rollout.decoding import rollout
from ckl_jax.rollout.trajectory import Sampling, answer_mask, score
from ckl_jax.tasks import alphabet
from ckl_jax.tasks import problems as problems_lib
from ckl_jax.tasks.columns import ADDITION
from experiments.benchmark import authors_round, pytorch


def large_params(config, seed=0):
    """Ten times the initialization, so that every part of the model moves the logits."""
    params = untrained(config, seed)
    return jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x + 0.1, params)


def greedy(config, params, packed, max_length):
    run = jax.jit(functools.partial(rollout, config, sampling=Sampling(max_length, greedy=True)))
    return run(params, packed, jax.random.key(0))


@pytest.mark.parametrize(("use_bias", "activation"), [(True, "gelu_erf"), (False, "gelu_tanh")])
def test_both_torch_models_give_our_logits(two_layers, use_bias, activation):
    config = dataclasses.replace(two_layers, use_bias=use_bias, activation=activation)
    params = large_params(config)
    tokens = np.array(jax.random.randint(jax.random.key(7), (2, 17), 0, config.vocab_size))
    expected = jax.jit(forward, static_argnums=0)(config, params, tokens)
    with torch.no_grad():
        logits, hidden = pytorch.GPT.from_params(config, params)(torch.tensor(tokens))
        theirs = pytorch.to_transformers(config, params)(torch.tensor(tokens)).logits
    assert float(jnp.std(expected.logits_BxTxV)) > 0.5
    np.testing.assert_allclose(logits, expected.logits_BxTxV, atol=1e-4)
    np.testing.assert_allclose(hidden, expected.hidden_BxTxD, atol=1e-4)
    np.testing.assert_allclose(theirs, expected.logits_BxTxV, atol=1e-4)


def test_greedy_answers_of_transformers_on_the_shipped_model_equal_ours():
    model = load_model(SHIPPED_TINY)
    drawn = ADDITION.short_problems(np.random.default_rng(0), 4, 3)
    packed = problems_lib.pack(ADDITION, drawn, 3, model.max_pretrain_digits)
    limit = ADDITION.max_answer_length(3, extra=10)
    ours = greedy(model.config, model.params, packed, limit)
    found = pytorch.generate(pytorch.to_transformers(model.config, model.params), packed, limit, None, 0)
    np.testing.assert_array_equal(found, ours.answers_BxT)
    assert ours.reward_B.sum() >= 2
    assert (np.asarray(ours.mask_BxT).sum(axis=1) < limit).any()


def test_transformers_samples_until_the_limit_or_the_end_of_the_episode(two_layers):
    packed = problems_lib.pack(ADDITION, ADDITION.short_problems(np.random.default_rng(0), 3, 1), 1, 1)
    answers = pytorch.generate(pytorch.to_transformers(two_layers, large_params(two_layers)), packed, 12, 1.0, 3)
    assert answers.shape == (3, 12)
    after = ~np.asarray(answer_mask(jnp.asarray(answers)))
    assert (answers[after] == alphabet.PAD_ID).all()


def test_the_pretraining_step_has_our_loss_and_learns(two_layers):
    config = dataclasses.replace(pretrain_preset("tiny"), max_digits=1, optimizer="adamw", model=two_layers)
    params = large_params(two_layers)
    text = np.array(jax.random.randint(jax.random.key(7), (2, 21), 1, two_layers.vocab_size))
    inputs, targets = text[:, :-1], text[:, 1:]
    zeros = np.zeros_like(inputs)
    positions = np.broadcast_to(np.arange(20)[None], inputs.shape)
    windows = Windows(*map(jnp.asarray, (inputs, targets, positions, zeros, zeros == 0)))
    expected = next_token_loss(config, params, windows, jax.random.key(0))
    model = pytorch.GPT.from_params(two_layers, params)
    optimizer = pytorch.make_adamw(config, model)
    losses = [pytorch.pretrain_step(model, optimizer, (inputs, targets)) for _ in range(5)]
    assert losses[0] == pytest.approx(float(expected), abs=1e-4)
    assert losses[-1] < losses[0]


@pytest.fixture(scope="module")
def round_of(two_layers):
    """A collect of a policy that differs from its reference, and the authors' networks with the same parameters."""
    config = FinetuneConfig(
        episodes=4, minibatch_episodes=2, diagnostic_episodes=2, extra_length=5, kl="k2", beta=3.0, temperature=1.5
    )
    reference = large_params(two_layers)
    program = make_program(config, Model(two_layers, 1, reference))
    hyper = jax.tree.map(lambda x: x[0], make_runs(config, {"run": {}}, 1)[1])
    policy = jax.tree.map(lambda x: 1.1 * x, reference)
    params = init_run(program, policy, hyper).params
    key = jax.random.key(5)
    params["value"] = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), params["value"])
    run = jax.jit(lambda p, r, problems: collect(program, p, r, hyper, problems, (key, key), None)[0])
    episodes = run(params, reference, draw_problems(program, 0, 0))
    return program, hyper, params, reference, episodes


def test_the_answers_are_sampled_at_the_configs_temperature(round_of):
    program, _, params, _, episodes = round_of
    trajectory = episodes.trajectory
    logits, _ = score(program.model, params["policy"], trajectory)
    expected = losses.token_log_probs(logits, trajectory.answers_BxT, 1.5, trajectory.mask_BxT)
    np.testing.assert_allclose(trajectory.log_probs_BxT, expected, atol=1e-4)


def make_networks(round_of):
    program, _, params, reference, _ = round_of
    return authors_round.make_round(program.model, program.config, params, reference)


def test_the_loss_of_single_transitions_equals_ours_and_every_parameter_learns(round_of):
    program, hyper, params, _, episodes = round_of
    networks, transitions = make_networks(round_of), authors_round.to_transitions(episodes)
    mask = np.asarray(episodes.trajectory.mask_BxT)
    assert len(transitions.end_N) == mask.sum()
    indices = np.random.default_rng(0).choice(mask.sum(), 8, replace=False)
    rows, columns = (x[indices] for x in np.nonzero(mask))
    selected = np.zeros_like(mask)
    selected[rows, columns] = True
    only = episodes._replace(trajectory=episodes.trajectory._replace(mask_BxT=jnp.asarray(selected)))
    expected = sum(loss_terms(program, hyper, params, only).values())
    modules = {"trunk": networks.trunk, "critic": networks.critic}
    before = {(m, n): p.detach().clone() for m, module in modules.items() for n, p in module.named_parameters()}
    found = authors_round.update(networks, transitions, indices)
    assert found == pytest.approx(float(expected), abs=1e-4)
    gradients = {(m, n): p.grad for m, module in modules.items() for n, p in module.named_parameters()}
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())
    moved = {(m, n): (p - before[m, n]).abs().max() for m, mod in modules.items() for n, p in mod.named_parameters()}
    assert all(x > 0 for x in moved.values())
    assert all(p.grad is None for p in networks.reference.parameters())
    again = [authors_round.update(networks, transitions, indices) for _ in range(10)]
    assert again[-1] < found


def test_state_values_equal_ours(round_of):
    program, _, params, _, episodes = round_of
    networks, transitions = make_networks(round_of), authors_round.to_transitions(episodes)
    mask = np.asarray(episodes.trajectory.mask_BxT)
    found = authors_round.state_values(networks, transitions.prefixes(np.arange(mask.sum())))
    _, hidden = score(program.model, params["policy"], episodes.trajectory)
    np.testing.assert_allclose(found, np.asarray(values(params["value"], hidden))[mask], atol=1e-4)


def test_the_rollout_without_a_cache_gives_our_greedy_characters(two_layers):
    params = large_params(two_layers)
    packed = problems_lib.pack(ADDITION, ADDITION.short_problems(np.random.default_rng(0), 2, 3), 3, 1)
    ours = greedy(two_layers, params, packed, 24)
    model = pytorch.GPT.from_params(two_layers, params)
    prefixes = [
        torch.tensor(prompt[-length:].astype(np.int64))
        for prompt, length in zip(packed.prompts_BxP, packed.prompt_lengths_B, strict=True)
    ]
    for t in range(24):
        found = authors_round.next_characters(model, prefixes, None)
        for b in range(2):
            if ours.mask_BxT[b, t]:
                assert found[b] == ours.answers_BxT[b, t]
        prefixes = [torch.cat([p, torch.tensor([c])]) for p, c in zip(prefixes, found, strict=True)]


def test_a_round_is_timed_in_parts_and_scaled_to_the_whole(round_of):
    networks, transitions = make_networks(round_of), authors_round.to_transitions(round_of[4])
    count = len(transitions.end_N)
    timed = authors_round.time_round(
        networks, transitions, batch=4, value_batch=16, rollout_lengths=3, value_batches=2, share=0.1
    )
    assert set(timed["seconds"]) == {"rollout", "values", "updates"}
    assert all(seconds > 0 for seconds in timed["seconds"].values())
    assert timed["total"] == pytest.approx(sum(timed["seconds"].values()))
    assert timed["items"]["updates"] == count // 4
    assert timed["timed_items"]["updates"] == round(0.1 * (count // 4))
    assert timed["timed_items"]["rollout"] == 9
    lengths = sorted(np.asarray(round_of[4].trajectory.mask_BxT).sum(axis=1))
    assert timed["items"]["rollout"] == lengths[3] + lengths[1]


def test_value_passes_shrink_before_memory_runs_out():
    assert authors_round.fitting_batch(width=96, longest=490) > 256
    assert authors_round.fitting_batch(width=768, longest=1000) == 81
