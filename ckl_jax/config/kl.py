"""Fine-tuning's chapter of the KL to the pre-trained model, and of what holds the policy beside it."""

from dataclasses import dataclass
from typing import Annotated, Literal

from ckl_jax.certainty import CertaintyKind
from ckl_jax.fields import AtLeast, Chapter, NonNegativeFloat, PositiveFloat, PositiveShare, Share
from ckl_jax.token_weights import KLWeights


@dataclass(frozen=True)
class KL(Chapter):
    """The penalty on leaving the pre-trained model: alpha times the mean over tokens of J^beta * KL."""

    beta: NonNegativeFloat = 150.0
    """Exponent of the certainty J; with `prioritized` weights 0 is the standard KL penalty. No effect with kl_weights
    uniform, threshold, archer, critical_free and overlong_free."""
    kl_coefficient: NonNegativeFloat = 5.0
    """alpha, on the mean over tokens of J^beta * KL (the paper: 5 with the prioritized KL, 10 in section 5.2)."""
    kl: Literal["k1", "k2", "k3", "exact"] = "exact"
    """KL to the pre-trained model per token: over the whole vocabulary, or Schulman's estimates on the sampled tokens
    (the paper's is k2). In a loss without ratio k1 has no gradient in expectation; ppo and grpo multiply estimates by
    the ratio, so that with data used again all three have the gradient of KL(policy || reference)."""
    kl_correction: Literal["none", "ratio"] = "none"
    """`ratio`: multiply the estimates by the ratio with the other algorithms too; k3 so is that of DeepSeek-V3.2 (arXiv
    2512.02556). Needs kl k1, k2 or k3, in the loss. The ratio is to the policy before the round's updates, with
    `staleness` too: then it is not to the one that wrote the answers."""
    kl_gate: Literal["none", "clip"] = "none"
    """`clip`: a token's KL counts 0 where ppo's and grpo's clip stops its policy gradient (F1-B of ZCPO, Ding 2026), so
    not at tokens that `lp_reg` keeps from it. Needs one of them, and the KL in the loss."""
    kl_in: Literal["loss", "reward", "advantage", "episode"] = "loss"
    """`reward`: every token's advantage loses alpha * the weighted k1 of itself and of all after it, less the mean of
    that over the round's other episodes; needs kl k1. `advantage`: the same without that baseline (FRPO, arXiv
    2601.10201); needs kl k1, or k3 for the tokens after it. `episode`: an answer's advantage, 1 at most in its group,
    loses alpha * its mean weighted KL less that of the group (ZCPO, Ding 2026); grpo and rloo alone, needs kl exact."""
    certainty: CertaintyKind = "negentropy"
    """J, the reference's certainty of its next token."""
    certainty_temperature: PositiveFloat = 1.0
    """Temperature of the reference's distribution inside J, and of its entropy with kl_weights threshold and archer."""
    kl_weights: KLWeights = "prioritized"
    """Weight of every token's KL. `prioritized`: J^beta. Its controls: `uniform` (1: the standard KL), `matched` (the
    round's mean of J^beta), `shuffled` (J^beta permuted over the round's tokens), `renormalized` (J^beta divided by its
    mean), `inverted` (1 - J^beta, scaled to the mean of J^beta). `floored`: the greater of J^beta and `kl_weak` (after
    arXiv 2605.13255). By the reference's entropy: `threshold` (1 on the round's tokens of low entropy, else 0; arXiv
    2512.04359), `archer` (1 on each episode's tokens of low entropy, else `kl_weak`; arXiv 2507.15778). By the task's
    own critical tokens: `critical_free` (0 at them, else 1), `critical_held` (1 at them, else J^beta).
    `overlong_free` and `overlong_held` are the same of more places: also where a number has come to N digits."""
    kl_quantile: PositiveShare = 0.8
    """Share of tokens whose entropy counts as low. No effect but with kl_weights threshold and archer."""
    kl_weak: Share = 0.1
    """Weight of the tokens of high entropy with kl_weights archer (in that work's published settings 0), and the least
    weight with kl_weights floored."""
    kl_target: PositiveFloat | None = None
    """Exact KL per token in nats that alpha is adapted to after every round in which the policy learns, so not in those
    of value_warmup_rounds (Ziegler et al. 2019); default: a fixed alpha. What is compared with it is the metric `kl`,
    that of the policy to the reference on the round's tokens before its updates, without weights."""
    kl_gain: Annotated[float, AtLeast(0, 4.5)] = 0.1
    """How fast: alpha is multiplied by 1 + kl_gain * (KL / kl_target - 1), the bracket clipped to +-0.2. So at most
    from 0.1 to 1.9; with a gain of 5 it could be 0 and stay so, with more negative: a reward for leaving. No effect
    without kl_target."""
    kl_cov: NonNegativeFloat = 0.0
    """Coefficient of KL-Cov: abs(log ratio to the policy before the round's updates) on the round's tokens with the
    greatest covariance of advantage and log-probability, if above 0 (arXiv 2505.22617); 0: none. Needs rounds of
    several updates: before the first that ratio is 1. ppo and grpo keep their clip, where that work's published code
    has an unclipped ratio."""
    kl_cov_share: PositiveShare = 0.002
    """Share of the round's tokens that KL-Cov holds."""
    lp_reg: NonNegativeFloat = 0.0
    """Coefficient of Lp-Reg: k3 to the policy without its noise, on the round's least likely tokens of negative
    advantage, if they are no noise; ppo and grpo do not clip these (arXiv 2510.03222). 0: none."""
    lp_reg_share: PositiveShare = 0.01
    """Share of the tokens of negative advantage that Lp-Reg looks after."""
    lp_reg_min_p: PositiveShare = 0.02
    """What is less likely than this times the likeliest character is noise for Lp-Reg."""
