"""Adam updates on minibatches, and collect -> update as one pure round, scanned over rounds and vmapped over runs."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ckl_jax import losses
from ckl_jax.config import FinetuneConfig
from ckl_jax.rl import minibatches
from ckl_jax.rl.assessment import Episodes
from ckl_jax.rl.collect import collect
from ckl_jax.rl.critic import ValueHead
from ckl_jax.rl.objective import gradient_norms, term_names
from ckl_jax.rl.program import Hyper, Program
from ckl_jax.runtime import sharding
from ckl_jax.runtime.targets import Call
from ckl_jax.tasks.problems import Problems

STAGES = ("rollout", "reference", "advantages", "update", "diagnostics")
"""What a round consists of, in its order but for the diagnostics, which are computed where their numbers are."""


class RunState(NamedTuple):
    """What a run carries from round to round: ``params`` has ``policy`` and ``value``; Adam's state lives on.

    ``kl_coefficient`` is the run's alpha, which a ``kl_target`` changes from round to round.
    """

    round: jax.Array
    params: dict[str, Any]
    opt_state: Any
    kl_coefficient: jax.Array


class StaleRunState(NamedTuple):
    """The same of a run whose answers are written by an earlier policy.

    A type of its own: with an empty field, Orbax would not restore the checkpoints of runs that never had one.
    ``samplers`` are the policies before each of the last ``staleness`` rounds, the oldest first, with a leading axis.
    """

    round: jax.Array
    params: dict[str, Any]
    opt_state: Any
    kl_coefficient: jax.Array
    samplers: Any


AnyRunState = RunState | StaleRunState


def _optimizer(config: FinetuneConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(eps=config.adam_epsilon)


def init_run(program: Program, policy_params: Any, hyper: Hyper) -> AnyRunState:
    """A run's state before its first round: the pre-trained policy, a fresh critic, Adam at zero."""
    key = jax.random.fold_in(jax.random.key(hyper.seed), 0)
    value_params = ValueHead().init(key, jnp.zeros((1, program.model.width)))
    params = {"policy": policy_params, "value": value_params}
    opt_state = _optimizer(program.config).init(params)
    state = RunState(jnp.zeros((), jnp.int32), params, opt_state, jnp.asarray(hyper.kl_coefficient))
    count = program.config.staleness
    if count == 0:
        return state
    return StaleRunState(*state, jax.tree.map(lambda x: jnp.stack([x] * count), policy_params))


def _sampler(state: AnyRunState) -> Any:
    """The policy that writes the round's answers, or None for that of ``params``."""
    return None if isinstance(state, RunState) else jax.tree.map(lambda x: x[0], state.samplers)


def _remembered(before: AnyRunState, after: AnyRunState) -> AnyRunState:
    """The state after a round with the policy before it as the newest sampler, and without the oldest."""
    if isinstance(before, RunState) or isinstance(after, RunState):
        return after
    policy = before.params["policy"]
    return after._replace(
        samplers=jax.tree.map(lambda old, new: jnp.concatenate([old[1:], new[None]]), before.samplers, policy)
    )


def _policy_learns(config: FinetuneConfig, state: AnyRunState) -> jax.Array:
    """Whether it does in the round after the state, or only the critic."""
    return state.round >= config.value_warmup_rounds


def update(
    program: Program, hyper: Hyper, state: AnyRunState, episodes: Episodes, key: jax.Array, axis_name: str | None = None
) -> tuple[AnyRunState, dict[str, jax.Array]]:
    """One pass per epoch over the episodes or their single transitions in shuffled minibatches, an Adam step each.

    Args:
      axis_name: name of the vmapped axis of runs, if any.

    Returns:
      the next state, and as means over the updates ``loss/<term>``, ``grad_norm`` of the whole loss in all parameters
      and ``param_norm`` after them; and ``updates``, their number. If an update is not finite, those metrics that are
      not finite in the first such update are, and no others.
    """
    config = program.config
    optimizer = _optimizer(config)
    decay = 1.0 - state.round / config.rounds if config.learning_rate_decay else 1.0
    rates = {
        "policy": jnp.where(_policy_learns(config, state), decay * hyper.learning_rate, 0.0),
        "value": jnp.asarray(config.value_learning_rate),
    }
    plan = {"episodes": minibatches.of_episodes, "transitions": minibatches.of_transitions}[config.minibatch]

    def epoch(carry, key):
        updates, gradient = plan(program, hyper, episodes, key, axis_name)

        def step(index, carry):
            params, opt_state, sums, sound = carry
            whole = sharding.gathered(params) if config.shard_state else params
            grads, terms = gradient(whole, index)
            if config.shard_state:
                grads = sharding.gathered(grads)
            directions, opt_state = optimizer.update(grads, opt_state, params)
            params = {
                name: jax.tree.map(lambda p, d, rate=rates[name]: p - rate * d, params[name], directions[name])
                for name in params
            }
            if config.shard_state:
                params, opt_state = sharding.split_state((params, opt_state))
            found = {f"loss/{name}": term for name, term in terms.items()}
            found |= {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
            # From the first update on that is not finite nothing is added: its cause stays the only thing to be named.
            sums = jax.tree.map(lambda total, new: jnp.where(sound, total + new, total), sums, found)
            return params, opt_state, sums, sound & jnp.isfinite(jnp.stack(jax.tree.leaves(found))).all()

        return jax.lax.fori_loop(0, updates, step, carry), updates

    names = [*(f"loss/{name}" for name in term_names(config)), "grad_norm", "param_norm"]
    start = state.params, state.opt_state, dict.fromkeys(names, jnp.zeros(())), jnp.ones((), bool)
    keys = jax.random.split(key, config.epochs)
    (params, opt_state, sums, _), updates = jax.lax.scan(epoch, start, keys)
    updates = updates.sum()
    metrics = {name: total / updates for name, total in sums.items()}
    state = state._replace(round=state.round + 1, params=params, opt_state=opt_state)
    return state, metrics | {"updates": updates}


def train_round(
    program: Program,
    ref_params: Any,
    state: AnyRunState,
    hyper: Hyper,
    problems: Problems,
    axis_name: str | None = None,
    certainty_params: Any = None,
) -> tuple[AnyRunState, dict[str, jax.Array]]:
    """One collect-update round of one run. Its randomness is a function of (seed, round) alone.

    The stages are named in the compiled program: ``STAGES``.
    """
    key = jax.random.fold_in(jax.random.key(hyper.seed), state.round + 1)
    rollout_key, shuffle_key, weights_key = jax.random.split(key, 3)
    hyper = hyper._replace(kl_coefficient=state.kl_coefficient)
    episodes, metrics = collect(
        program,
        state.params,
        ref_params,
        hyper,
        problems,
        (rollout_key, weights_key),
        axis_name,
        sampler=_sampler(state),
        certainty_params=certainty_params,
    )
    with jax.named_scope("diagnostics"):
        metrics |= gradient_norms(program, hyper, state.params, episodes) | {"kl_coefficient": hyper.kl_coefficient}
    with jax.named_scope("update"):
        updated, terms = update(program, hyper, state, episodes, shuffle_key, axis_name)
        updated = _remembered(state, updated)
    if program.config.kl_target is not None:
        adapted = losses.adapted_coefficient(
            hyper.kl_coefficient, metrics["kl"], program.config.kl_target, program.config.kl_gain
        )
        learns = _policy_learns(program.config, state)
        updated = updated._replace(kl_coefficient=jnp.where(learns, adapted, hyper.kl_coefficient))
    return updated, metrics | terms


def planned_states(program: Program, mesh: Mesh, ref_params: Any, hypers: Hyper) -> tuple[AnyRunState, Call]:
    """The shapes of all runs' states on the mesh, and what makes the first ones there.

    Args:
      ref_params, hypers: where they are to be; the latter with a leading axis of runs R.
    """
    create = jax.vmap(functools.partial(init_run, program), in_axes=(None, 0))
    return sharding.planned_state(create, (ref_params, hypers), mesh, program.config.shard_state, sharding.RUN_AXIS)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def train_rounds(
    program: Program,
    mesh: Mesh,
    ref_params: Any,
    states: AnyRunState,
    hypers: Hyper,
    problems: Problems,
    certainty_params: Any = None,
) -> tuple[AnyRunState, dict[str, jax.Array]]:
    """Several rounds of all runs as one program, every device its own runs and its share of their episodes.

    Args:
      mesh: from ``program.make_mesh``.
      states, hypers: with a leading axis of runs R.
      problems: with leading axes [R, rounds].
      certainty_params: of the program's ``certainty_model``, if it has one.

    Returns:
      the states after the rounds, and metrics with leading axes [R, rounds].
    """

    def run(frozen, axis_name, state, hyper, problems_of_run):
        ref_params, certainty_params = frozen

        def one(state, problems_of_round):
            return train_round(program, ref_params, state, hyper, problems_of_round, axis_name, certainty_params)

        return jax.lax.scan(one, state, problems_of_run)

    def on_device(frozen, *of_device):
        return sharding.map_runs(program.config.runs_at_once, functools.partial(run, frozen), *of_device)

    frozen = ref_params, certainty_params
    states, metrics = sharding.over_runs(mesh, on_device, frozen, states, hypers, problems)
    shardings = sharding.state_shardings(mesh, states, program.config.shard_state, sharding.RUN_AXIS)
    return jax.lax.with_sharding_constraint(states, shardings), metrics
