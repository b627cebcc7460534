"""What the paper claims beside what was measured: the list ``claims`` of every results.json, which the report shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ckl_jax.errors import require

Interval = tuple[float, float, float]
Verdict = Literal["reproduced", "not reproduced", "undecided", "not comparable at this size"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, what was found, and the verdict.

    Attributes:
      claim: a sentence.
      paper, here: the numbers of both as text with their units, "not printed" where the paper only draws them.
      intervals: the numbers that decide, each (mean, low, high) in the rule's units; none if no interval decides.
      rule: how they give the verdict, fixed before the run.
    """

    claim: str
    paper: str
    here: str
    intervals: tuple[Interval, ...]
    verdict: Verdict
    rule: str

    def __post_init__(self) -> None:
        require(self.verdict in VERDICTS, "verdict", self.verdict, " | ".join(VERDICTS))


def verdict(interval: Interval) -> Verdict:
    """Reproduced if (mean, low, high) lies above 0, not reproduced if below, else undecided (also without bounds)."""
    _, low, high = interval
    return decided(low > 0, high < 0)


def decided(reproduced: bool, refuted: bool) -> Verdict:
    """The verdict where each side has its own condition."""
    return "reproduced" if reproduced else "not reproduced" if refuted else "undecided"


def as_json(claims: Iterable[Claim]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(claim) for claim in claims]
