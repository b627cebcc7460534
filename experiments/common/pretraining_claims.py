"""Figures 2 and 3 as claims: their verdicts, whose rules stand in their docstrings, in the words of the report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ckl_jax.analysis.statistics import percent
from experiments.common.claims import NOT_COMPARABLE, Claim, as_json
from experiments.common.figure import of_task

PAPER = {
    "high at N": "91.2 to 98.9% identical, 94.4 to 100% varying (N = 7 to 13)",
    "falls at N+1": "48.8% identical, 69.0% varying (N = 7)",
    "almost none at N+3": "0.0% (N = 7, 9)",
    "larger N better": "higher for larger N, except at N+1 from 9 to 11",
    "the paper's number": "its own cell, see Tables 4 and 5",
    "larger N starts higher": "drawn, no numbers (N = 7 to 13)",
    "larger N ends higher": "drawn, no numbers (N = 7 to 13)",
}
RULES = {
    "high at N": "the accuracy at N lies above 90%",
    "falls at N+1": "the accuracy at N lies above that at N + 1",
    "almost none at N+3": "the accuracy at N + 3 lies below 1%",
    "larger N better": "the accuracy of the largest N lies above that of the smallest",
    "the paper's number": "our interval and the paper's overlap, else not reproduced",
    "larger N starts higher": "the share solved before RL by the largest N lies above that by the smallest",
    "larger N ends higher": "the accuracy after RL of the largest N lies above that of the smallest",
}


def figure2_claims(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The list ``claims`` of figure 2's results.json."""
    scale, task = results["config"]["models"]["scale"], task_of(results)
    cells = paper_cells(results["cells"], results["paper"], scale, task)
    return as_json(from_verdicts(results["verdicts"], task) + cells)


def task_of(results: dict[str, Any]) -> str:
    """Of the models of figure 2 or 3; results of before there were others have none written down."""
    return str(results["config"]["models"]["pretrain"].get("task", "addition"))


def from_verdicts(rows: Iterable[dict[str, Any]], task: str = "addition") -> list[Claim]:
    """A claim per row of ``verdicts``; a cell that does not fit the block is not comparable."""
    return [_claim(row, task) for row in rows]


def compared(row: dict[str, Any]) -> str:
    """Which N a row of ``verdicts`` compares."""
    return " against ".join(map(str, row["max_pretrain_digits"]))


def _claim(row: dict[str, Any], task: str) -> Claim:
    kind = next(name for name in PAPER if row["claim"].startswith(name))
    lengths = f", {row['operands']} lengths" if "operands" in row else ""
    fits = row["verdict"] != "does not fit"
    one, other = row["intervals"]
    here = f"{percent(one)}% against {percent(other)}%" if fits else "an answer does not fit the model's block"
    rest = "" if kind == "the paper's number" else "; not reproduced if it lies on the other side, else undecided"
    return Claim(
        f"{row['claim'][0].upper()}{row['claim'][1:]} (N = {compared(row)}{lengths}{of_task(task)})",
        PAPER[kind],
        here,
        tuple(interval for interval in (one, other) if interval is not None),
        row["verdict"] if fits else NOT_COMPARABLE,
        f"95% intervals: reproduced if {RULES[kind]}{rest}",
    )


def paper_cells(
    cells: list[dict[str, Any]], paper: dict[str, dict[str, Any]], scale: str, task: str = "addition"
) -> list[Claim]:
    """Our accuracies beside the paper's at another size, operands by operands; none at its own, or of another task."""
    if scale == "gpt2" or task != "addition":
        return []
    found = []
    for operands, numbers in paper.items():
        ours: dict[int, list[str]] = {}
        for cell in cells:
            if cell["operands"] == operands:
                shown = f"{100 * cell['accuracy'][0]:.1f}" if cell["fits"] else "does not fit"
                ours.setdefault(cell["max_pretrain_digits"], []).append(shown)
        theirs = {base: [f"{mean:g}" for mean, _ in row] for base, row in numbers.items()}
        said = tuple("; ".join(f"N = {base}: {', '.join(row)}" for base, row in of.items()) for of in (theirs, ours))
        rule = "accuracies of other N and another model size stand side by side; the rules above compare their order"
        title = f"Accuracy in % at N, N+1, N+2, N+3, {operands} lengths"
        found.append(Claim(title, said[0], said[1], (), NOT_COMPARABLE, rule))
    return found
