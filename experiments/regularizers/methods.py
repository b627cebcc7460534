"""The methods that ``experiments.regularizers`` compares: what each changes of the standard KL's fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

GROUP = {"group_size": 8}
"""Answers to a problem for what needs several: an eighth of the problems, as many episodes."""


@dataclass(frozen=True)
class Method:
    """One word of config, or a few.

    Attributes:
      overrides: fields of FinetuneConfig that differ from the standard KL's.
      idea: a line, with its source.
      strength: the field that the grid scales, from the value in ``overrides`` or the command's config; "": none.
    """

    name: str
    idea: str
    overrides: Mapping[str, Any]
    strength: str = "kl_coefficient"


class Cell(NamedTuple):
    """A method with its strength multiplied by ``share``."""

    method: Method
    share: float

    @property
    def name(self) -> str:
        return f"{self.method.name}_{self.share:g}x" if self.method.strength else self.method.name


STANDARD = {"kl_weights": "uniform"}
METHODS = (
    Method("standard", "the same KL on every token", STANDARD),
    Method("prioritized", "J^beta on every token's KL (2502.06533)", {"kl_weights": "prioritized"}),
    Method("matched", "control: the round's mean of J^beta", {"kl_weights": "matched"}),
    Method("shuffled", "control: J^beta, permuted over the round's tokens", {"kl_weights": "shuffled"}),
    Method("renormalized", "control: J^beta over its mean", {"kl_weights": "renormalized"}),
    Method("no_kl", "control: none", STANDARD | {"kl_coefficient": 0.0}, ""),
    Method("inverted", "control: 1 - J^beta at the mean of J^beta", {"kl_weights": "inverted"}),
    Method("floored", "J^beta, at least 0.1 (after 2605.13255)", {"kl_weights": "floored"}),
    Method("critical_free", "control: 0 at the critical tokens, else 1", {"kl_weights": "critical_free"}),
    Method("critical_held", "control: J^beta, but 1 at the critical tokens", {"kl_weights": "critical_held"}),
    Method("overlong_free", "control: 0 at numbers' places from N on, else 1", {"kl_weights": "overlong_free"}),
    Method("overlong_held", "control: J^beta, but 1 at these places", {"kl_weights": "overlong_held"}),
    Method("threshold", "KL on tokens of low entropy alone (2512.04359)", {"kl_weights": "threshold"}),
    Method("archer", "weak KL where an answer's entropy is high (2507.15778)", {"kl_weights": "archer"}),
    Method("k2", "half the squared log-ratio (Schulman 2020)", STANDARD | {"kl": "k2"}),
    Method("k3", "ratio - 1 - log-ratio (Schulman 2020)", STANDARD | {"kl": "k3"}),
    Method(
        "k3_corrected",
        "k3 times the ratio to the rollout's policy (2512.02556)",
        STANDARD | {"kl": "k3", "kl_correction": "ratio"},
    ),
    Method("k1_reward", "log-ratio to go, in the reward", STANDARD | {"kl": "k1", "kl_in": "reward"}),
    Method(
        "future_kl",
        "log-ratio to go, in the advantage without baseline (2601.10201)",
        STANDARD | {"kl": "k1", "kl_in": "advantage"},
    ),
    Method(
        "prioritized_future_kl",
        "J^beta on every log-ratio to go (2601.10201)",
        {"kl_weights": "prioritized", "kl": "k1", "kl_in": "advantage"},
    ),
    Method("prioritized_k2", "J^beta on k2, the paper's loss", {"kl_weights": "prioritized", "kl": "k2"}),
    Method(
        "adaptive", "alpha adapted to a target KL (Ziegler et al. 2019)", STANDARD | {"kl_target": 0.02}, "kl_target"
    ),
    Method(
        "kl_cov",
        "no KL to the reference; to the old policy where covariance is great (2505.22617)",
        STANDARD | {"kl_coefficient": 0.0, "kl_cov": 1.0},
        "kl_cov",
    ),
    Method(
        "top_entropy",
        "gradient on the top 20% of entropy (2506.01939)",
        STANDARD | {"advantage_shaping": "top_entropy"},
    ),
    Method("entropy_bonus", "entropy in the advantage (2506.14758)", STANDARD | {"advantage_shaping": "entropy_bonus"}),
    Method("stale", "answers of the policy 4 rounds ago", STANDARD | {"staleness": 4}),
    Method(
        "stale_corrected",
        "the same, advantages times the ratio to that policy, at most 2 (Ionides 2008)",
        STANDARD | {"staleness": 4, "importance_sampling": "truncated"},
    ),
    Method(
        "nucleus_entropy",
        "entropy bonus over the likeliest 99% alone (2602.03635)",
        STANDARD | {"entropy_over": "nucleus", "entropy_coefficient": 0.001},
        "entropy_coefficient",
    ),
    Method("reinforce", "reward minus the round's mean, no critic", STANDARD | {"algorithm": "reinforce"}),
    Method("ppo", "clipped ratio (Schulman et al. 2017)", STANDARD | {"algorithm": "ppo"}),
    Method(
        "ppo_gate",
        "ppo, without KL where the clip stops the gradient (F1-B of ZCPO)",
        STANDARD | {"algorithm": "ppo", "kl_gate": "clip"},
    ),
    Method("rloo", "8 answers to a problem, leave one out (2402.14740)", STANDARD | GROUP | {"algorithm": "rloo"}),
    Method("grpo", "8 answers, standardized, clipped ratio (2402.03300)", STANDARD | GROUP | {"algorithm": "grpo"}),
    Method(
        "hapo",
        "grpo, clip and advantage by the entropy of a token (2509.16591)",
        STANDARD | GROUP | {"algorithm": "grpo", "clip_by": "entropy"},
    ),
    Method(
        "lp_reg",
        "grpo that looks after unlikely characters which are no noise (2510.03222)",
        STANDARD | GROUP | {"algorithm": "grpo", "lp_reg": 1.0},
        "lp_reg",
    ),
    Method(
        "zcpo",
        "8 answers, the KL of each less their mean in the advantage (Ding 2026)",
        STANDARD | GROUP | {"algorithm": "grpo", "kl_in": "episode"},
    ),
    Method(
        "gtpo",
        "grpo with the reward shared out by entropy (2508.04349)",
        STANDARD | GROUP | {"algorithm": "grpo", "advantage_shaping": "gtpo"},
    ),
)
"""Standard first. Of those screened, the confirmation always has ``ALWAYS``; the others must earn it in the screen."""
NEEDED = ("standard", "prioritized")
ALWAYS = (*NEEDED, "matched", "shuffled", "renormalized", "no_kl")
CONTROLS = ("standard", "matched", "shuffled", "no_kl")
"""What prioritization must beat; renormalized prioritizes too."""
BY_NAME = {method.name: method for method in METHODS}
