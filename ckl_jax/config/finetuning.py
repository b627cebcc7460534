"""Fine-tuning, chapter by chapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from ckl_jax.config.advantage import Advantage
from ckl_jax.config.kl import KL
from ckl_jax.config.pretraining import Scale
from ckl_jax.config.shape import Attention, Dtype, Precision
from ckl_jax.errors import require
from ckl_jax.fields import (
    AtLeast,
    Chapter,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    require_fields,
)
from ckl_jax.resuming import end, speed
from ckl_jax.tasks.alphabet import VOCAB_SIZE

Recipe = Literal["ours", "paper", "authors"]


@dataclass(frozen=True)
class Budget(Chapter):
    """What to start from, and how much of it."""

    scale: Scale = "tiny"
    """Preset of the budget that the other fields start from; the model comes from the checkpoint."""
    recipe: Recipe = "ours"
    """`ours`: what learns well here: lambda 1, advantages normalized over the round, minibatches of whole episodes, the
    exact KL. `paper`: what the paper states for section 5.3, else what the authors' code does. `authors`: their code's
    settings, which differ in reward, certainty, entropy coefficient and clamped log-probs. Both were made for the 85M
    model; the numbers of test problems are ours (theirs: 100 after every round)."""
    seed: NonNegativeInt = 0
    """First seed; run k of an experiment has seed + k."""
    extra_digits: Annotated[int, AtLeast(1, 2)] = 1
    """Target length beyond the pre-training length N: N + 1 or N + 2 digits."""
    rounds: PositiveInt = end(14, unless="learning_rate_decay")
    """Collect-update rounds. Without learning_rate_decay a run may go on to more of them."""
    episodes: PositiveInt = 128
    """Episodes collected per round."""


@dataclass(frozen=True)
class Sampling(Chapter):
    """How a round's answers are sampled."""

    group_size: PositiveInt = 1
    """Answers to each problem, so a round has episodes / group_size problems; divides `episodes`. rloo and grpo need at
    least 2."""
    extra_length: NonNegativeInt = 100
    """Characters that an answer may be longer than the longest right one."""
    temperature: PositiveFloat = 1.0
    """Temperature of sampling, log-probs, entropy and reference log-probs in training."""
    staleness: NonNegativeInt = 0
    """Rounds by which the policy that writes the answers lags behind the one that learns from them, as where the two
    run side by side on machines of their own. The first policy writes those of the first rounds. A run keeps as many
    policies in memory; ppo's and grpo's ratio is to the policy at the start of the round."""
    importance_sampling: Literal["none", "truncated"] = "none"
    """`truncated`: a token's advantage is multiplied by min(pi / pi_sampler, `importance_limit`), the probability that
    the policy at the start of the round gives it over that of the policy that wrote it. For answers that are stale, or
    written at another precision than learned from."""
    importance_limit: PositiveFloat = 2.0
    """Greatest ratio that importance_sampling truncated multiplies an advantage by."""


@dataclass(frozen=True)
class Optimizer(Chapter):
    """Minibatches, the size of their steps, and the terms of the loss beside the policy's and the KL penalty."""

    minibatch: Literal["episodes", "transitions"] = "episodes"
    """What an Adam step averages over: whole episodes (4 to 50 steps a round), or single characters shuffled over the
    round's episodes (the authors' way: thousands of steps a round, so it wants a far smaller learning rate)."""
    minibatch_episodes: PositiveInt = 16
    """Whole episodes per Adam step; divides `episodes`. No effect with minibatch transitions."""
    minibatch_transitions: PositiveInt = 8
    """Single transitions per Adam step, at most those of `episodes` longest answers; the last step of an epoch takes
    what is left. No effect with minibatch episodes."""
    epochs: PositiveInt = 1
    """Passes over a round's episodes."""
    learning_rate: PositiveFloat = 3e-4
    """Adam's, for the policy (the trunk included)."""
    learning_rate_decay: bool = True
    """Linear decay of the policy's learning rate, from its full value in the first round towards 0 after the last."""
    value_learning_rate: PositiveFloat = 1e-2
    """Adam's, for the value head, whose output starts at 0."""
    value_warmup_rounds: NonNegativeInt = 0
    """First rounds in which only the value head learns; Adam's statistics of the policy warm up meanwhile. 0 for
    algorithms without critic."""
    adam_epsilon: PositiveFloat = 1e-8
    """Adam's, for both."""
    value_coefficient: NonNegativeFloat = 0.1
    """Weight of the value loss. No effect with algorithms without critic."""
    detach_critic: bool = False
    """Keep the value loss's gradient out of the trunk. No effect with algorithms without critic."""
    entropy_coefficient: NonNegativeFloat = 0.0005
    """Weight of the entropy bonus."""
    entropy_over: Literal["all", "top", "nucleus"] = "all"
    """Characters that share in the entropy bonus: all, or the likeliest alone, their entropy scaled to the range that
    all have (TRE, arXiv 2602.03635)."""
    entropy_top: Annotated[int, AtLeast(2, VOCAB_SIZE)] = 2
    """Number of likeliest characters with entropy_over top."""
    entropy_nucleus: PositiveShare = 0.99
    """Probability that the likeliest characters have together with entropy_over nucleus."""


@dataclass(frozen=True)
class Testing(Chapter):
    """What is measured on the way."""

    test_every: PositiveInt = 7
    """Rounds between tests and checkpoints; divides `rounds`."""
    test_problems: PositiveInt = 100
    """Problems of each test within the learning curve (the same for all runs)."""
    final_problems: PositiveInt = 1000
    """Problems of the tests before the first and after the last round."""
    old_problems: PositiveInt = 200
    """Problems of the old lengths in every test, at most as many as of the target length."""
    test_temperature: PositiveFloat = 1.0
    """Temperature of sampling in tests."""
    diagnostic_episodes: PositiveInt = 4
    """Episodes of each round on which the gradient norm of each loss term is measured; at most `episodes`."""


@dataclass(frozen=True)
class Arithmetic(Chapter):
    """Of policy and reference, in training and tests, whatever pre-training had."""

    dtype: Dtype = "float32"
    """Type of the activations; parameters, logits and losses are float32 always."""
    precision: Precision = "highest"
    """Precision of the matrix products (TF32 and bfloat16 passes on accelerators below `highest`)."""
    clamp_log_probs: bool = False
    """Clamp the probabilities of tokens to [e, 1 - e], e = 1.19e-7, in all log-probs of the losses, those of the
    reference too: none is below -15.94, and none has a gradient beyond. The authors' torch distributions do so. Entropy
    and exact KL are not clamped."""


@dataclass(frozen=True)
class Speed(Chapter):
    """Devices, and how much at once: they change the speed alone, and the numbers by rounding at most."""

    rollout: Literal["auto", "speculative", "plain"] = speed("auto")
    """How episodes are generated: the policy verifies drafts that the task writes, or decodes step by step, or the
    first unless the task has none or it turns out too slow."""
    rollout_batch: PositiveInt = speed(128)
    """Episodes generated together, at most. Step by step they are equal groups: a prime number of test problems is
    answered one after another."""
    transition_batch: PositiveInt = speed(8)
    """Transitions of a minibatch computed together, at most; short prefixes come first and each group is padded to its
    own length."""
    episode_batch: PositiveInt | None = speed(None)
    """Episodes of a minibatch that a device computes together, at most; default: all. Fewer take less memory."""
    attention: Attention = speed("auto")
    """Of passes over whole episodes: one kernel of a TPU or GPU, or as XLA compiles it, as in pre-training."""
    attention_chunk: PositiveInt | None = speed(None)
    """Queries per chunk of those passes' plain attention; default: as in pre-training. Larger chunks compile faster."""
    remat: bool = speed(False)
    """Compute the activations of a layer again in the backward pass instead of keeping them."""
    data_devices: PositiveInt | None = speed(None)
    """Devices that share a run's episodes and minibatches; default: what runs side by side leave idle. Tests take all
    that share their problems evenly."""
    shard_state: bool = speed(False)
    """Split parameters and optimizer state over those devices too (fully sharded data parallelism)."""
    runs_at_once: PositiveInt = speed(1)
    """Runs (arms x seeds) computed side by side by vmap, at most; equal groups are done one after another."""


@dataclass(frozen=True)
class FinetuneConfig(Speed, Arithmetic, Testing, KL, Optimizer, Advantage, Sampling, Budget):
    """RL fine-tuning of a pre-trained model on operands of `extra_digits` more digits (paper, section 5).

    Its chapters in reverse: the fields of the last come first.
    """

    def __post_init__(self) -> None:
        require_fields(self)
        grouped, critic, episodes = self.algorithm in ("rloo", "grpo"), self.has_critic, self.episodes
        least, divisor = 2 if grouped else 1, f"a divisor of episodes = {episodes}"
        divides = self.minibatch == "transitions" or episodes % self.minibatch_episodes == 0
        no_critic = f"with algorithm {self.algorithm}, which has no critic"
        estimated = self.kl != "exact" and self.kl_in == "loss"
        of_episode = self.kl_in == "episode"
        gated = self.has_ratio and self.kl_in == "loss"
        multiplied = "above 0 with a kl_target, which multiplies it"
        lags = self.staleness > 0 or not self.is_exact
        normalized = f"at least 2 with algorithm {self.algorithm} and normalize_advantages"
        alike = np.float32(self.reward_right) == np.float32(self.reward_wrong)
        another = f"another number than reward_wrong = {self.reward_wrong} but with advantage_shaping gtpo"
        exactly = "none where the policy that learns writes the answers, in float32 at precision highest"
        one_update = self.epochs == 1 and self.minibatch == "episodes" and self.minibatch_episodes == episodes
        moves = "where a round is several updates: with one, no ratio has left 1"
        pressed = "none with kl_coefficient 0"
        by_entropy = self.kl_weights in ("threshold", "archer")
        even = f"below 1 with kl_weights {self.kl_weights}: 1 is kl_weights uniform"
        rewarded = self.entropy_coefficient > 0
        unclipped = self.clip_by == "entropy" and self.hapo_clip == 0 and self.hapo_advantage == 0
        rules = [
            ("test_every", self.rounds % self.test_every == 0, f"a divisor of rounds = {self.rounds}"),
            ("episodes", episodes >= 2 or self.algorithm != "reinforce", "at least 2 with algorithm reinforce"),
            ("episodes", episodes >= 2 or not (critic and self.normalize_advantages), normalized),
            ("reward_right", not alike or self.advantage_shaping == "gtpo", another),
            ("diagnostic_episodes", self.diagnostic_episodes <= episodes, f"at least 1, at most {episodes}"),
            ("minibatch_episodes", divides, divisor),
            ("group_size", self.group_size >= least, f"at least {least}"),
            ("group_size", episodes % self.group_size == 0, divisor),
            ("advantage_shaping", grouped or self.advantage_shaping != "gtpo", "with algorithm grpo or rloo alone"),
            ("staleness", self.staleness < self.rounds, f"0 or more, below rounds = {self.rounds}"),
            ("importance_sampling", lags or self.importance_sampling == "none", exactly),
            ("clip_by", self.has_ratio or self.clip_by == "none", "none but with algorithm ppo or grpo"),
            ("clip_by", not unclipped, "none with hapo_clip 0 and hapo_advantage 0"),
            ("entropy_over", rewarded or self.entropy_over == "all", "all with entropy_coefficient 0"),
            ("value_warmup_rounds", critic or self.value_warmup_rounds == 0, f"0 {no_critic}"),
            ("value_warmup_rounds", self.value_warmup_rounds < self.rounds, f"0 or more, below rounds = {self.rounds}"),
            ("discount", critic or self.discount == 1, f"1 {no_critic}"),
            ("kl", self.kl_in != "reward" or self.kl == "k1", "k1 with kl_in reward"),
            ("kl", self.kl_in != "advantage" or self.kl in ("k1", "k3"), "k1 or k3 with kl_in advantage"),
            ("kl", not of_episode or self.kl == "exact", "exact with kl_in episode"),
            ("kl_in", not of_episode or grouped, "episode with algorithm grpo or rloo alone"),
            ("advantage_shaping", not of_episode or self.advantage_shaping == "none", "none with kl_in episode"),
            ("kl_correction", estimated or self.kl_correction == "none", "none but with k1, k2 or k3 in the loss"),
            ("kl_gate", gated or self.kl_gate == "none", "none but with ppo or grpo, and the KL in the loss"),
            ("kl_correction", self.kl_coefficient > 0 or self.kl_correction == "none", pressed),
            ("kl_gate", self.kl_coefficient > 0 or self.kl_gate == "none", pressed),
            ("kl_gate", not one_update or self.kl_gate == "none", f"clip {moves}"),
            ("kl_cov", not one_update or self.kl_cov == 0, f"above 0 {moves}"),
            ("kl_quantile", self.kl_quantile < 1 or not by_entropy, even),
            ("kl_weak", self.kl_weak < 1 or self.kl_weights not in ("archer", "floored"), even),
            ("kl_coefficient", self.kl_target is None or self.kl_coefficient > 0, multiplied),
            ("beta", self.beta > 0 or self.kl_weights != "inverted", "above 0 with kl_weights inverted"),
        ]
        for name, holds, allowed in rules:
            require(holds, name, getattr(self, name), allowed)

    @property
    def has_critic(self) -> bool:
        return self.algorithm in ("a2c", "ppo")

    @property
    def reads_certainty(self) -> bool:
        """Whether a token's KL depends on how sure the reference is."""
        by_entropy = self.kl_weights in ("threshold", "archer")
        by_certainty = self.beta > 0 and self.kl_weights not in ("uniform", "critical_free", "overlong_free")
        return self.kl_coefficient > 0 and (by_entropy or by_certainty)

    @property
    def is_exact(self) -> bool:
        """Of the arithmetic: two programs that compute the same log-probs differ by rounding alone."""
        return self.dtype == "float32" and self.precision == "highest"

    @property
    def has_ratio(self) -> bool:
        """The losses are corrected for how much more likely the policy makes a token than when it was sampled."""
        return self.algorithm in ("ppo", "grpo")
