"""Table 1 and criterion 1 as Markdown."""

from __future__ import annotations

from typing import Any

from ckl_jax.analysis.statistics import percent
from experiments.common.figure import Results, markdown
from experiments.table1_certainty_gap.verdicts import certainty, labels, papers

SHARES = (
    "wrong_critical_ended_wrong",
    "none_wrong_ended_right",
    "all_met_and_right_ended_right",
    "ended_wrong_had_wrong_critical",
)


def text(results: Results) -> str:
    """Table 1 beside the paper's, the kinds of critical tokens, and criterion 1, as Markdown."""
    rows = results["models"]
    named = list(zip(rows, labels(rows), strict=True))
    return "\n\n".join(
        [
            "Delta J, mean over answers with 95% interval",
            markdown(
                ["N", "critical", "non-critical (minimum)", "paper: critical", "paper: non-critical", "gap", "size"],
                [_gap_cells(*one) for one in named],
            ),
            markdown(
                ["N", "tokens", "Delta J", "answers"],
                [cells for one in named for cells in _kind_cells(*one)],
            ),
            "Criterion 1, % with 95% interval",
            markdown(
                ["N", "answers", "right", *(name.replace("_", " ") for name in SHARES), "wrong token decides"],
                [_criterion_cells(*one) for one in named],
            ),
            f"{results['wall_seconds']:.0f} s",
        ]
    )


def _gap_cells(row: dict[str, Any], label: str) -> list[str]:
    gap, said = row["delta_j"], row["verdicts"]
    paper = [f"{mean:g} ± {half:g}" for mean, half in papers(row)] or ["-", "-"]
    ours = [certainty(gap[name]) for name in ("critical", "noncritical_minimum")]
    return [label, *ours, *paper, said["gap"], said.get("size", "-")]


def _kind_cells(row: dict[str, Any], label: str) -> list[list[str]]:
    gap = row["delta_j"]
    found = list(gap["by_kind"].items())
    for place in gap["lowest_places"]:
        where = f"line {place['line']}, word {place['word']}, character {place['character']}"
        found.append((f"non-critical, {where}, mostly {place['mostly']!r}", place))
    for name in ("noncritical_minimum_of_each_answer", "noncritical_mean"):
        found.append((name.replace("_", " "), {"delta_j": gap[name], "answers": row["generations"]}))
    return [[label, kind, certainty(values["delta_j"]), str(values["answers"])] for kind, values in found]


def _criterion_cells(row: dict[str, Any], label: str) -> list[str]:
    found = row["criterion_1"]
    shares = [f"{found[n]['ended_so']} of {found[n]['count']}: {percent(found[n]['share'])}" for n in SHARES]
    start = [label, str(found["generations"]), percent(found["right"]["share"])]
    return [*start, *shares, row["verdicts"]["wrong_critical_token_decides"]]
