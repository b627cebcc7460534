"""Fine-tuning's chapter of rewards, algorithms and advantages."""

from dataclasses import dataclass
from typing import Annotated, Literal

from ckl_jax.advantage_shaping import AdvantageShaping
from ckl_jax.fields import AtLeast, Chapter, NonNegativeFloat, PositiveFloat, PositiveShare, Share

Algorithm = Literal["a2c", "reinforce", "ppo", "grpo", "rloo"]
Reward = Annotated[float, AtLeast(-1e6, 1e6)]


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
    """How much wider clip_by entropy makes the clip where abs(h) is 1: 1 doubles it."""
    hapo_advantage: Share = 1.0
    """How much clip_by entropy changes the advantage where abs(h) is 1; above 1 it would turn the sign of A."""
    reward_right: Reward = 1.0
    """Reward of a right answer, other than reward_wrong. With gtpo neither has an effect: right is 1, wrong is -1."""
    reward_wrong: Reward = 0.0
    """Reward of any other answer."""
    discount: Share = 1.0
    """What a reward one token later counts; 1 for algorithms without critic."""
    gae_lambda: Share = 1.0
    """GAE's: 1 waits for the reward, 0 trusts the critic's value of the next token. a2c and ppo alone."""
    normalize_advantages: bool = True
    """Subtract the mean over the round's tokens and divide by their standard deviation. A round of equal rewards then
    has advantage 0; a group of equal rewards with rloo, whose own is 0, has not. No effect with grpo, which
    standardizes within its groups, gtpo, and kl_in episode."""
    advantage_shaping: AdvantageShaping = "none"
    """What the policy's entropy H at a token does to its advantage A. `top_entropy`: A where H is among the round's top
    `entropy_quantile`, else 0 (80/20, arXiv 2506.01939). `entropy_bonus`: A + min(entropy_scale * H, abs(A) /
    entropy_kappa) (arXiv 2506.14758). `gtpo`: the reward shared out by H among the answers to a problem, then
    standardized (arXiv 2508.04349); grpo and rloo alone."""
    entropy_quantile: PositiveShare = 0.2
    """Share of tokens that top_entropy keeps."""
    entropy_scale: NonNegativeFloat = 0.4
    """What entropy_bonus multiplies H by."""
    entropy_kappa: PositiveFloat = 2.0
    """The bonus of entropy_bonus is at most abs(A) / entropy_kappa."""
    gtpo_share: Share = 0.5
    """Share of the reward that gtpo deals out by entropy."""
