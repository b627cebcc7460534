"""The rules of Table 1, and its claims."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import Any

from ckl_jax.analysis.statistics import Interval, Side, percent
from experiments.common.claims import HOLDS, LIES_ABOVE, NOT_COMPARABLE, OVERLAP, Claim

PAPER = {
    3: ((-0.33, 0.01), (0.0012, 0.0001)),
    5: ((-0.21, 0.18), (0.0002, 0.0001)),
    7: ((-0.13, 0.04), (0.0004, 0.0001)),
}
ALMOST_SURELY = math.nextafter(0.95, 0)  # "95% or more": a side has no equal.
SIZES: dict[Side, str] = {
    "above": "not as in the paper",
    "below": "not as in the paper",
    "undecided": "as in the paper",
}


def papers(row: dict[str, Any]) -> tuple[tuple[float, float], ...]:
    """The paper's mean and half interval at critical tokens and at the others, of additions at the row's N, if any."""
    return PAPER.get(row["max_pretrain_digits"], ()) if row.get("task", "addition") == "addition" else ()


def labels(rows: list[dict[str, Any]]) -> list[str]:
    """What tells the models apart: N, where several have the same the checkpoint's name, and if that is the same too
    the first characters of its fingerprint."""
    counts = collections.Counter(row["max_pretrain_digits"] for row in rows)
    names = collections.Counter((row["max_pretrain_digits"], row.get("name")) for row in rows)

    def label(row: dict[str, Any]) -> str:
        base = row["max_pretrain_digits"]
        if counts[base] == 1:
            return f"{base}"
        same = names[base, row["name"]] > 1
        return f"{base} ({row['name']}{', ' + row['checkpoint'][:8] if same else ''})"

    return [label(row) for row in rows]


def sides(row: dict[str, Any]) -> dict[str, Side]:
    """What the rules of ``__main__``'s docstring compare, with the side that the claims are on above."""
    gap, criterion = row["delta_j"], row["criterion_1"]
    critical = Interval(*gap["critical"])
    found: dict[str, Side] = {
        "gap": Interval(*gap["noncritical_minimum"]).side(critical),
        "wrong_critical_token_decides": Interval(*criterion["wrong_critical_ended_wrong"]["share"]).side(ALMOST_SURELY),
    }
    if papers(row) and math.isfinite(critical.low):
        mean, half = papers(row)[0]
        found["size"] = critical.lies((mean, mean - half, mean + half))
    return found


def verdicts(found: dict[str, Side]) -> dict[str, str]:
    """The words for ``sides``."""
    return {name: (SIZES if name == "size" else HOLDS)[side] for name, side in found.items()}


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Both criteria and the gap's size for every model, by the rules of ``__main__``'s docstring."""
    return [claim for row, label in zip(rows, labels(rows), strict=True) for claim in _claims(row, label)]


def _claims(row: dict[str, Any], base: str) -> list[Claim]:
    gap = row["delta_j"]
    critical, others = gap["critical"], gap["noncritical_minimum"]
    found = sides(row)
    share = row["criterion_1"]["wrong_critical_ended_wrong"]
    paper = [f"{mean:g} ± {half:g}" for mean, half in papers(row)]
    return [
        Claim(
            f"N = {base}: critical tokens are less certain than all others (Delta J, criterion 2)",
            f"{paper[0]} against {paper[1]} at the least certain others" if paper else "no such model",
            f"{certainty(critical)} against {certainty(others)} ({row['generations']} answers)",
            (critical, others),
            LIES_ABOVE[found["gap"]],
            "95% intervals over answers: reproduced if that of the critical tokens lies below that of the non-critical "
            "minimum, not reproduced if above, else undecided",
        ),
        Claim(
            f"N = {base}: how much less certain (Delta J at critical tokens)",
            paper[0] if paper else "no such model",
            f"{certainty(critical)} ({row['generations']} answers)",
            (critical,),
            OVERLAP[found["size"]] if "size" in found else "undecided" if paper else NOT_COMPARABLE,
            "reproduced if our 95% interval and the paper's at the same N overlap, else not reproduced; undecided "
            "without an interval, not comparable where the paper has no such model",
        ),
        Claim(
            f"N = {base}: a wrong critical token makes the answer wrong (criterion 1)",
            "almost surely, no number",
            f"{share['ended_so']} of {share['count']} wrong: {percent(share['share'])}%",
            (share["share"],),
            LIES_ABOVE[found["wrong_critical_token_decides"]],
            "share of the answers with a wrong critical token that end wrong, Wilson's 95% interval: reproduced if its "
            "lower end is 95% or more, not reproduced if its upper end is below, else undecided",
        ),
    ]


def certainty(interval: Sequence[float]) -> str:
    """A difference of certainties with its interval."""
    return Interval(*interval).text(".4f")
