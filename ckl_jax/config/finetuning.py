"""Fine-tuning, chapter by chapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ckl_jax.advantage_shaping import AdvantageShaping
from ckl_jax.certainty import CertaintyKind
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
    Share,
    require_fields,
)
from ckl_jax.resuming import end, speed
from ckl_jax.tasks.alphabet import VOCAB_SIZE
from ckl_jax.token_weights import KLWeights

Recipe = Literal["ours", "paper", "authors"]
Algorithm = Literal["a2c", "reinforce", "ppo", "grpo", "rloo"]
Reward = Annotated[float, AtLeast(-1e6, 1e6)]


@dataclass(frozen=True)
class Budget(Chapter):
    """What to start from, and how much of it."""

    scale: Scale = "tiny"
    """Preset of the budget that the other fields start from; the model comes from the checkpoint."""
    recipe: Recipe = "ours"
    """`ours`: what learns well here: lambda 1, advantages normalized over the round, minibatches of whole episodes, the
    exact KL. `paper`: what the paper states for section 5.3, else what the authors' code does. `authors`: their code's
    settings, which differ in reward, certainty, entropy coefficient and clamped log-probs. Both were made for the 85M
    model."""
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
    """Of sampling, log-probs, entropy and reference log-probs in training."""
    staleness: NonNegativeInt = 0
    """Rounds by which the policy that writes the answers lags behind the one that learns from them, as where the two
    run side by side on machines of their own. The first policy writes those of the first rounds. A run keeps as many
    policies in memory; ppo's and grpo's ratio is to the policy at the start of the round."""
    importance_sampling: Literal["none", "truncated"] = "none"
    """`truncated`: a token's advantage is multiplied by min(pi / pi_sampler, `importance_limit`), the probability that
    the policy at the start of the round gives it over that of the policy that wrote it. For answers that are stale, or
    written at another precision than learned from."""
    importance_limit: PositiveFloat = 2.0
    """Of importance_sampling truncated."""


@dataclass(frozen=True)
class Advantage(Chapter):
    """How much better than expected an answer is, at each of its tokens."""

    algorithm: Algorithm = "a2c"
    """Advantage and policy loss. `a2c`: GAE with a critic, advantage times log-probability. `ppo`: the same advantage,
    clipped ratio. Without critic: `reinforce`, reward minus the mean of the round's other episodes; `rloo`, minus that
    of the other answers to the same problem; `grpo`, standardized over the answers to it, clipped ratio."""
    clip: PositiveFloat = 0.2
    """ppo and grpo: the ratio of new to old probability counts up to 1 +- clip. No effect on the others."""
    clip_by: Literal["none", "entropy"] = "none"
    """`entropy`: HAPO (arXiv 2509.16591) with ppo and grpo, by h in [-1, 1], the round's log-entropies, 0 at their
    `hapo_pivot`-quantile. The clip is 1 + hapo_clip * abs(h) times as wide above where h > 0, below where h < 0. The
    advantage is A * (1 + hapo_advantage * h) for ratios beyond half the clip where h > 0, and within it where h < 0."""
    hapo_pivot: Share = 0.8
    """Quantile of entropy that clip_by entropy takes for neither low nor high."""
    hapo_clip: NonNegativeFloat = 1.0
    """Of clip_by entropy."""
    hapo_advantage: Share = 1.0
    """Of clip_by entropy; above 1 it would turn the sign of A."""
    reward_right: Reward = 1.0
    """Of an answer with the right result."""
    reward_wrong: Reward = 0.0
    """Of any other."""
    discount: Share = 1.0
    """What a reward one token later counts; 1 for algorithms without critic."""
    gae_lambda: Share = 1.0
    """GAE's: 1 waits for the reward, 0 trusts the critic's value of the next token. a2c and ppo alone."""
    normalize_advantages: bool = True
    """Subtract the round's mean and divide by its standard deviation; a round of equal rewards then has advantage 0.
    No effect with grpo, which standardizes within its groups, gtpo, and kl_in episode."""
    advantage_shaping: AdvantageShaping = "none"
    """What the policy's entropy H at a token does to its advantage A. `top_entropy`: A where H is among the round's top
    `entropy_quantile`, else 0 (80/20, arXiv 2506.01939). `entropy_bonus`: A + min(entropy_scale * H, abs(A) /
    entropy_kappa) (arXiv 2506.14758). `gtpo`: the reward shared out by H among the answers to a problem, then
    standardized (arXiv 2508.04349); grpo and rloo alone."""
    entropy_quantile: PositiveShare = 0.2
    """Share of tokens that top_entropy keeps."""
    entropy_scale: NonNegativeFloat = 0.4
    """Of entropy_bonus."""
    entropy_kappa: PositiveFloat = 2.0
    """Of entropy_bonus."""
    gtpo_share: Share = 0.5
    """Share of the reward that gtpo deals out by entropy."""


@dataclass(frozen=True)
class Optimizer(Chapter):
    """Minibatches, the size of their steps, and the terms of the loss beside the policy's and the KL penalty."""

    minibatch: Literal["episodes", "transitions"] = "episodes"
    """What an Adam step averages over: whole episodes (4 to 50 steps a round), or single characters shuffled over the
    round's episodes (the authors' way: thousands of steps a round, so it wants a far smaller learning rate)."""
    minibatch_episodes: PositiveInt = 16
    """Whole episodes per Adam step; divides `episodes`. No effect with minibatch transitions."""
    minibatch_transitions: PositiveInt = 8
    """Single transitions per Adam step; the last step of an epoch takes what is left. No effect with minibatch
    episodes."""
    epochs: PositiveInt = 1
    """Passes over a round's episodes."""
    learning_rate: PositiveFloat = 3e-4
    """Adam's, for the policy (the trunk included)."""
    learning_rate_decay: bool = True
    """Linear decay of the policy's learning rate, from its full value in the first round towards 0 after the last."""
    value_learning_rate: PositiveFloat = 1e-2
    """Adam's, for the value head, which starts at random."""
    value_warmup_rounds: NonNegativeInt = 0
    """First rounds in which only the value head learns; Adam's statistics of the policy warm up meanwhile. 0 for
    algorithms without critic."""
    adam_epsilon: PositiveFloat = 1e-8
    """Adam's, for both."""
    value_coefficient: NonNegativeFloat = 0.1
    """Of the value loss."""
    detach_critic: bool = False
    """Keep the value loss's gradient out of the trunk."""
    entropy_coefficient: NonNegativeFloat = 0.0005
    """Of the entropy bonus."""
    entropy_over: Literal["all", "top", "nucleus"] = "all"
    """Characters that share in the entropy bonus: all, or the likeliest alone, their entropy scaled to the range that
    all have (TRE, arXiv 2602.03635)."""
    entropy_top: Annotated[int, AtLeast(2, VOCAB_SIZE)] = 2
    """Number of likeliest characters with entropy_over top."""
    entropy_nucleus: PositiveShare = 0.99
    """Probability that the likeliest characters have together with entropy_over nucleus."""


@dataclass(frozen=True)
class KL(Chapter):
    """The penalty on leaving the pre-trained model: alpha times the mean over tokens of J^beta * KL."""

    beta: NonNegativeFloat = 150.0
    """Exponent of the certainty J; 0 is the standard KL penalty."""
    kl_coefficient: NonNegativeFloat = 5.0
    """alpha, on the mean over tokens of J^beta * KL (the paper: 5 with the prioritized KL, 10 in section 5.2)."""
    kl: Literal["k1", "k2", "k3", "exact"] = "exact"
    """KL to the pre-trained model per token: over the whole vocabulary, or Schulman's estimates on the sampled tokens
    (the paper's is k2). In a loss without ratio k1 has no gradient in expectation; ppo and grpo multiply estimates by
    the ratio, so that with data used again all three have the gradient of KL(policy || reference)."""
    kl_correction: Literal["none", "ratio"] = "none"
    """`ratio`: multiply the estimates by the ratio with the other algorithms too; k3 so is that of DeepSeek-V3.2 (arXiv
    2512.02556). Needs kl k1, k2 or k3, in the loss."""
    kl_gate: Literal["none", "clip"] = "none"
    """`clip`: a token's KL counts 0 where ppo's and grpo's clip stops its policy gradient (F1-B of ZCPO, Ding 2026).
    Needs one of them, and the KL in the loss."""
    kl_in: Literal["loss", "reward", "advantage", "episode"] = "loss"
    """`reward`: every token's advantage loses alpha * the weighted k1 of itself and of all after it, less the mean of
    that over the round's other episodes; needs kl k1. `advantage`: the same without that baseline (FRPO, arXiv
    2601.10201); needs kl k1, or k3 for the tokens after it. `episode`: an answer's advantage, 1 at most in its group,
    loses alpha * its mean weighted KL less that of the group (ZCPO, Ding 2026); grpo and rloo alone, needs kl exact."""
    certainty: CertaintyKind = "negentropy"
    """J, the reference's certainty of its next token."""
    certainty_temperature: PositiveFloat = 1.0
    """Temperature of the reference's distribution inside J."""
    kl_weights: KLWeights = "prioritized"
    """Weight of every token's KL. `prioritized`: J^beta. Its controls: `uniform` (1: the standard KL), `matched` (the
    round's mean of J^beta), `shuffled` (J^beta permuted over the round's tokens), `renormalized` (J^beta divided by its
    mean), `inverted` (1 - J^beta, scaled to the mean of J^beta). `floored`: the greater of J^beta and `kl_weak` (after
    arXiv 2605.13255). By the reference's entropy: `threshold` (1 on the round's tokens of low entropy, else 0; arXiv
    2512.04359), `archer` (1 on each episode's tokens of low entropy, else `kl_weak`; arXiv 2507.15778). By the task's
    own critical tokens: `critical_free` (0 at them, else 1), `critical_held` (1 at them, else J^beta), and
    the same of more places, `overlong_free` and `overlong_held`: also where a number has come to N digits or more."""
    kl_quantile: PositiveShare = 0.8
    """Share of tokens whose entropy counts as low. No effect but with kl_weights threshold and archer."""
    kl_weak: Share = 0.1
    """Weight of the tokens of high entropy with kl_weights archer (in that work's published settings 0), and the least
    weight with kl_weights floored."""
    kl_target: PositiveFloat | None = None
    """Exact KL per token in nats that alpha is adapted to after every round (Ziegler et al. 2019); default: a fixed
    alpha. What is compared with it is the metric `kl`, that of the policy to the reference on the round's tokens before
    its updates, without weights."""
    kl_gain: NonNegativeFloat = 0.1
    """How fast: alpha is multiplied by 1 + kl_gain * (KL / kl_target - 1), the bracket clipped to +-0.2."""
    kl_cov: NonNegativeFloat = 0.0
    """Coefficient of KL-Cov: abs(log ratio to the policy of the rollout) on the round's tokens with the greatest
    covariance of advantage and log-probability, if above 0 (arXiv 2505.22617); 0: none."""
    kl_cov_share: PositiveShare = 0.002
    """Share of the round's tokens that KL-Cov holds."""
    lp_reg: NonNegativeFloat = 0.0
    """Coefficient of Lp-Reg: k3 to the policy without its noise, on the round's least likely tokens of negative
    advantage, if they are no noise; ppo and grpo do not clip these (arXiv 2510.03222). 0: none."""
    lp_reg_share: PositiveShare = 0.01
    """Share of the tokens of negative advantage that Lp-Reg looks after."""
    lp_reg_min_p: PositiveShare = 0.02
    """What is less likely than this times the likeliest character is noise for Lp-Reg."""


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
    """Of sampling in tests."""
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
    """Episodes generated together, at most."""
    transition_batch: PositiveInt = speed(8)
    """Transitions of a minibatch computed together, at most; short prefixes come first and each group is padded to its
    own length."""
    episode_batch: PositiveInt | None = speed(None)
    """Episodes of a minibatch computed together, at most; default: all. Fewer take less memory."""
    attention: Attention = speed("auto")
    """Of passes over whole episodes: one kernel of a TPU, or as XLA compiles it, as in pre-training."""
    remat: bool = speed(False)
    """Compute the activations of a layer again in the backward pass instead of keeping them."""
    data_devices: PositiveInt | None = speed(None)
    """Devices that share a run's episodes and minibatches; default: what runs side by side leave idle."""
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
        exactly = "none where the policy that learns writes the answers, in float32 at precision highest"
        rules = [
            ("test_every", self.rounds % self.test_every == 0, f"a divisor of rounds = {self.rounds}"),
            ("diagnostic_episodes", self.diagnostic_episodes <= episodes, f"at least 1, at most {episodes}"),
            ("minibatch_episodes", divides, divisor),
            ("group_size", self.group_size >= least, f"at least {least}"),
            ("group_size", episodes % self.group_size == 0, divisor),
            ("advantage_shaping", grouped or self.advantage_shaping != "gtpo", "with algorithm grpo or rloo alone"),
            ("staleness", self.staleness < self.rounds, f"0 or more, below rounds = {self.rounds}"),
            ("importance_sampling", lags or self.importance_sampling == "none", exactly),
            ("clip_by", self.has_ratio or self.clip_by == "none", "none but with algorithm ppo or grpo"),
            ("value_warmup_rounds", critic or self.value_warmup_rounds == 0, f"0 {no_critic}"),
            ("discount", critic or self.discount == 1, f"1 {no_critic}"),
            ("kl", self.kl_in != "reward" or self.kl == "k1", "k1 with kl_in reward"),
            ("kl", self.kl_in != "advantage" or self.kl in ("k1", "k3"), "k1 or k3 with kl_in advantage"),
            ("kl", not of_episode or self.kl == "exact", "exact with kl_in episode"),
            ("kl_in", not of_episode or grouped, "episode with algorithm grpo or rloo alone"),
            ("advantage_shaping", not of_episode or self.advantage_shaping == "none", "none with kl_in episode"),
            ("kl_correction", estimated or self.kl_correction == "none", "none but with k1, k2 or k3 in the loss"),
            ("kl_gate", gated or self.kl_gate == "none", "none but with ppo or grpo, and the KL in the loss"),
            ("kl_coefficient", self.kl_target is None or self.kl_coefficient > 0, multiplied),
        ]
        for name, holds, allowed in rules:
            require(holds, name, getattr(self, name), allowed)

    @property
    def has_critic(self) -> bool:
        return self.algorithm in ("a2c", "ppo")

    @property
    def is_exact(self) -> bool:
        """Of the arithmetic: two programs that compute the same log-probs differ by rounding alone."""
        return self.dtype == "float32" and self.precision == "highest"

    @property
    def has_ratio(self) -> bool:
        """The losses are corrected for how much more likely the policy makes a token than when it was sampled."""
        return self.algorithm in ("ppo", "grpo")
