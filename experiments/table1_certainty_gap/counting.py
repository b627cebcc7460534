"""What is counted in a model's answers: certainty at critical tokens and elsewhere, and how the answers ended."""

from __future__ import annotations

import collections
import math
from typing import Any

import numpy as np

from ckl_jax.analysis import critical
from ckl_jax.analysis.critical import Generations
from ckl_jax.analysis.statistics import Interval, mean_interval, share_interval

SHOWN_PLACES = 5
LEAST_SHARE = 0.2


def _interval(values: np.ndarray) -> Interval:
    return mean_interval(values[np.isfinite(values)])


def delta_j(generations: Generations) -> dict[str, Any]:
    """The row of Table 1: each quantity as (mean, low, high) over answers, and the per-answer values behind it."""
    mask_BxT, recorded = generations.mask_BxT, generations.recorded_Bx3x2xC
    gaps_BxT = critical.certainty_gaps(generations.certainty_BxT, mask_BxT)
    at_critical = np.where(recorded, generations.at_critical(gaps_BxT), np.nan)
    critical_B = critical.mean_where(gaps_BxT, generations.critical_BxT)
    others_BxT = np.where(generations.critical_BxT, np.nan, gaps_BxT)
    lowest_B = np.where(np.isnan(others_BxT), np.inf, others_BxT).min(axis=1)
    common = by_place(generations, others_BxT)
    kinds = [f"n+{slot // 2 + 1}_{('comma', 'digit')[slot % 2]}" for slot in range(at_critical.shape[3])]
    return {
        "critical": _interval(critical_B),
        "noncritical_minimum": _interval(common[0][1] if common else np.zeros(0)),
        "places": len(common),
        "lowest_places": [{**place, "delta_j": _interval(values)} for place, values in common[:SHOWN_PLACES]],
        "noncritical_minimum_of_each_answer": _interval(lowest_B),
        "noncritical_mean": _interval(critical.mean_where(others_BxT, mask_BxT)),
        "mean_certainty": _interval(critical.mean_where(generations.certainty_BxT, mask_BxT)),
        "by_kind": {
            f"step {step + 1}, operand {operand + 1}, {kind}": {
                "delta_j": _interval(at_critical[:, step, operand, slot]),
                "answers": int(recorded[:, step, operand, slot].sum()),
            }
            for step in range(at_critical.shape[1])
            for operand in range(2)
            for slot, kind in enumerate(kinds)
        },
        "per_answer": {
            "critical": critical_B.tolist(),
            "noncritical_lowest": lowest_B.tolist(),
            "recorded": recorded.sum(axis=(1, 2, 3)).tolist(),
            "reward": generations.reward_B.astype(int).tolist(),
        },
    }


def by_place(generations: Generations, values_BxT: np.ndarray) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Every place that enough answers reach with the finite values [B, T] there, the lowest mean first."""
    found: dict[critical.Place, list[float]] = collections.defaultdict(list)
    written: dict[critical.Place, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for row, values_T in enumerate(values_BxT):
        text = generations.text(row)
        for place, character, value in zip(critical.places(text), text, values_T, strict=False):
            if np.isfinite(value):
                found[place].append(float(value))
                written[place][character] += 1
    least = max(2, math.ceil(LEAST_SHARE * len(values_BxT)))
    common = [
        (
            {
                "line": line,
                "word": word,
                "character": character,
                "mostly": written[line, word, character].most_common(1)[0][0],
                "answers": len(values),
            },
            np.array(values),
        )
        for (line, word, character), values in found.items()
        if len(values) >= least
    ]
    return sorted(common, key=lambda pair: pair[1].mean())


def criterion_1(generations: Generations) -> dict[str, Any]:
    """Counts and (share, low, high): how answers with a wrong critical token, with none, and with all right ended."""
    wrong_B = generations.wrong_critical_B
    recorded_B = generations.recorded_Bx3x2xC.sum(axis=(1, 2, 3))
    ended_right_B = generations.reward_B > 0
    has_wrong_B = wrong_B > 0
    all_right_B = ~has_wrong_B & (recorded_B == generations.expected_B)

    def share(ended_B: np.ndarray, among_B: np.ndarray) -> dict[str, Any]:
        hits, count = int((ended_B & among_B).sum()), int(among_B.sum())
        return {"count": count, "ended_so": hits, "share": share_interval(hits, count)}

    return {
        "generations": len(wrong_B),
        "right": share(ended_right_B, np.ones(len(wrong_B), bool)),
        "wrong_critical_ended_wrong": share(~ended_right_B, has_wrong_B),
        "none_wrong_ended_right": share(ended_right_B, ~has_wrong_B),
        "all_met_and_right_ended_right": share(ended_right_B, all_right_B),
        "ended_wrong_had_wrong_critical": share(has_wrong_B, ~ended_right_B),
    }
