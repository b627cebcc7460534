"""What is measured: how much of it on which machine, and the models, problems and rounds that it is measured on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ckl_jax import tasks
from ckl_jax.checkpoint.shipped import SHIPPED_TINY
from ckl_jax.checkpoint.store import Model, load_model
from ckl_jax.config import FinetuneConfig, ModelConfig, PretrainConfig
from ckl_jax.datasets.stream import TokenStream, token_stream
from ckl_jax.model import GPT2
from ckl_jax.presets import finetune_preset, pretrain_preset
from ckl_jax.rl.program import Hyper, Program, draw_problems, make_program, make_runs
from ckl_jax.rl.updates import AnyRunState, init_run
from ckl_jax.tasks import alphabet
from ckl_jax.tasks.columns import ADDITION
from ckl_jax.tasks.problems import Problems

PLAIN_BATCH = 32
"""Episodes that the tiny model decodes together step by step, the fastest number on 2 CPU cores."""


@dataclass(frozen=True)
class Plan:
    """How much each section measures."""

    repeats: int = 3
    """Pairs of measurements after the warm-up."""
    rollouts: tuple[tuple[str, int, int], ...] = (
        ("tiny", 6, 128),
        ("tiny", 5, 128),
        ("small", 5, 32),
        ("gpt2", 3, 8),
    )
    """Scale, digits and episodes of the rollouts against transformers."""
    authors_share: float = 0.01
    """Share of the authors' Adam steps, and of our transition mode's, that is timed."""
    pretraining: tuple[tuple[str, int, int], ...] = (("tiny", 16, 5), ("small", 4, 2), ("gpt2", 1, 1))
    """Scale, batch and steps per measurement."""
    speculation: tuple[tuple[int, float], ...] = ((0, 0.5), (0, 1.0), (0, 1.5), (1, 1.0), (1, 1.5), (2, 1.0))
    """Digits beyond N and temperatures of the speculative rollouts."""
    speculation_episodes: int = 128
    policies: tuple[tuple[str, str], ...] = ()
    """Fine-tuned checkpoints that join them, and their fingerprints: another one may come to lie at a path."""
    runs: tuple[int, ...] = (1, 2, 4, 8, 16)
    runs_episodes: int = 32
    episodes: tuple[int, ...] = (16, 32, 64, 128)
    pretrain_digits: tuple[int, ...] = (2, 3, 4, 5, 6)
    """N: the rounds are on N + 1 digits."""
    digits_episodes: int = 32
    sizes: tuple[str, ...] = ("tiny", "small")
    """Scales of the rounds with random weights."""
    sizes_episodes: int = 8
    settings_works: tuple[str, ...] = ("pretraining", "round", "transitions")
    settings_steps: int = 30
    settings_rounds: int = 3
    matmul_sizes: tuple[int, ...] = (512, 1024, 2048, 4096)
    copy_bytes: int = 2**28
    quick: bool = False
    """Everything on a model of width 16 and 2 digits: checks the code and measures nothing of interest."""


Progress = Callable[[str], None]
Section = Callable[[Plan, Progress], dict[str, Any]]
"""Measures, telling progress on the way, and returns what JSON can hold."""

QUICK = Plan(
    repeats=1,
    rollouts=(("tiny", 1, 2),),
    authors_share=0.01,
    pretraining=(("tiny", 2, 1),),
    speculation=((0, 1.0),),
    speculation_episodes=4,
    runs=(2,),
    runs_episodes=4,
    episodes=(4,),
    pretrain_digits=(1,),
    digits_episodes=4,
    sizes=("tiny",),
    sizes_episodes=4,
    settings_works=("pretraining",),
    settings_steps=1,
    settings_rounds=1,
    matmul_sizes=(64,),
    copy_bytes=2**16,
    quick=True,
)
ACCELERATOR = Plan(
    rollouts=(("tiny", 6, 128), ("tiny", 5, 128), ("small", 5, 128), ("gpt2", 5, 128)),
    pretraining=(("tiny", 64, 20), ("small", 64, 10), ("gpt2", 16, 5)),
    sizes=("tiny", "small", "gpt2"),
    sizes_episodes=32,
    matmul_sizes=(2048, 4096, 8192),
    copy_bytes=2**31,
)


def choose_plan(quick: bool) -> Plan:
    """The plan for the device that JAX computes on."""
    if quick:
        return QUICK
    return Plan() if jax.default_backend() == "cpu" else ACCELERATOR


def model_config(plan: Plan, scale: str) -> ModelConfig:
    """The model of a scale, without dropout and in float32, which plain PyTorch code computes in."""
    if plan.quick:
        return ModelConfig(num_layers=1, num_heads=2, width=16, block_size=400, attention_chunk=64)
    return dataclasses.replace(pretrain_preset(scale).model, dropout=0.0, dtype="float32", precision="highest")


def unending_model(plan: Plan, scale: str) -> Model:
    """A model with random weights whose episodes all run to the length limit, because it never writes padding.

    No trained weights of these sizes exist, and episodes of plain random weights end at their first padding character.
    The bias of the last layer norm is 1 and padding's embedding negative, which puts the logit of padding at -100; a
    result line, the other end, is beyond chance.
    """
    config = dataclasses.replace(model_config(plan, scale), use_bias=True)
    layers = jax.jit(GPT2(config).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    embedding = layers["wte"]["embedding"].at[alphabet.PAD_ID].set(-100.0 / config.width)
    ln_f = {**layers["ln_f"], "bias": jnp.ones(config.width)}
    params = {"params": {**layers, "wte": {"embedding": embedding}, "ln_f": ln_f}}
    return Model(config, pretrained_digits(plan), params)


def pretrained_digits(plan: Plan) -> int:
    return 1 if plan.quick else pretrain_preset("tiny").max_digits


def tiny_model(plan: Plan) -> Model:
    """The shipped checkpoint."""
    return unending_model(plan, "tiny") if plan.quick else load_model(SHIPPED_TINY)


def tiny_config(plan: Plan, **overrides: Any) -> FinetuneConfig:
    """The fine-tuning of the tiny scale. Where the number of episodes changes, what must fit it follows."""
    config = finetune_preset("tiny", "ours")
    quick = {"episodes": 4, "extra_length": 0} if plan.quick else {}
    overrides = quick | overrides
    episodes = overrides.get("episodes", config.episodes)
    fitting = {
        "minibatch_episodes": min(config.minibatch_episodes, episodes),
        "diagnostic_episodes": min(config.diagnostic_episodes, episodes),
    }
    return dataclasses.replace(config, **(fitting | overrides))


class Round(NamedTuple):
    """The arguments of ``train_round`` for the first round of seed 0, and the model that it starts from."""

    program: Program
    reference: Any
    state: AnyRunState
    hyper: Hyper
    problems: Problems


def first_round(model: Model, config: FinetuneConfig) -> Round:
    program = make_program(config, model)
    hyper = jax.tree.map(lambda x: x[0], make_runs(config, {"run": {}}, 1)[1])
    state = jax.jit(functools.partial(init_run, program))(model.params, hyper)
    problems = jax.tree.map(jnp.asarray, draw_problems(program, 0, 0))
    return Round(program, model.params, state, hyper, problems)


def pretrain_config(plan: Plan, scale: str, batch: int) -> PretrainConfig:
    """Windows of the whole block from the stream, AdamW, no dropout: what plain PyTorch code computes too."""
    return dataclasses.replace(
        pretrain_preset(scale),
        max_digits=pretrained_digits(plan),
        packing="stream",
        optimizer="adamw",
        batch_size=batch,
        model=model_config(plan, scale),
    )


def text_stream(digits: int, count: int = 2000) -> TokenStream:
    """Scratchpads back to back as the dataset has them, made in memory."""
    drawn: Sequence[tasks.Problem] = ADDITION.short_problems(np.random.default_rng(0), count, digits)
    return token_stream(ADDITION.prompt_text(p) + ADDITION.answer_text(p) for p in drawn)
