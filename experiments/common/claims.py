"""What the paper claims beside what was measured: the list ``claims`` of every results.json, which the report shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ckl_jax.analysis.statistics import Interval, Side
from ckl_jax.errors import require_word

Verdict = Literal["reproduced", "not reproduced", "undecided", "not comparable at this size"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
NOT_COMPARABLE: Verdict = "not comparable at this size"
LIES_ABOVE: dict[Side, Verdict] = {"above": "reproduced", "below": "not reproduced", "undecided": "undecided"}
"""The claim that an interval lies above a number, or another interval."""
LIES_BELOW: dict[Side, Verdict] = {"above": "not reproduced", "below": "reproduced", "undecided": "undecided"}
"""The claim that it lies below."""
OVERLAP: dict[Side, Verdict] = {"above": "not reproduced", "below": "not reproduced", "undecided": "reproduced"}
"""The claim that two intervals are of the same number."""
HOLDS: dict[Side, str] = {"above": "holds", "below": "fails", "undecided": "undecided"}
"""A rule of ours instead of a claim of the paper."""


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, what was found, and the verdict.

    Attributes:
      claim: a sentence.
      paper, here: the numbers of both as text with their units, "not printed" where the paper only draws them.
      intervals: the numbers that decide, in the rule's units; none if no interval decides.
      rule: how they give the verdict, fixed before the run.
    """

    claim: str
    paper: str
    here: str
    intervals: tuple[Interval, ...]
    verdict: Verdict
    rule: str

    def __post_init__(self) -> None:
        require_word(self.verdict, "verdict", VERDICTS)


def as_json(claims: Iterable[Claim]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(claim) for claim in claims]
