"""Which of a model's own characters are critical, from its certainty and its success alone.

The rules are those of ``experiments.critical_token_discovery``, whose docstring says why. *Probes* are the characters
that were tried, each a dict: the number of its answer, its index and place there, gap, own character and runner-up with
their probabilities, whether it is a candidate (else a control) and a known critical token, and, once it has been tried,
``open`` and ``better`` as the first completions say, and the success rates of the others from either character.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from ckl_jax.analysis.critical import Generations, Place, certainty_gaps, places
from ckl_jax.analysis.statistics import mean_interval, share_interval
from ckl_jax.errors import require
from ckl_jax.fields import AtLeast, NonNegativeInt, PositiveInt, PositiveShare, Share, require_fields
from ckl_jax.tasks import alphabet

WORDS = {0: "operand 1 list", 2: "operand 2 list", 4: "result list", 6: "carry in", 8: "sum", 10: "digit", 12: "carry"}


@dataclass(frozen=True)
class Rule:
    """Which characters are tried, and when their type is called critical."""

    candidates: PositiveInt = 6
    """Least certain characters tried in each answer, at most."""
    least_gap: Share = 0.01
    """How much less certain than the answer's other characters a candidate must be."""
    controls: NonNegativeInt = 1
    """Other characters tried in each answer, picked at random."""
    first_completions: PositiveInt = 4
    """Times that an answer is completed from each of the two characters to see whether it is open, and for which."""
    completions: PositiveInt = 8
    """Times that an open answer is completed from each of them after that, for the drop."""
    least_drop: PositiveShare = 0.2
    """Mean drop in success that makes a type critical."""
    least_answers: Annotated[int, AtLeast(2)] = 5
    """Drops that a type must have been measured on."""

    def __post_init__(self) -> None:
        require_fields(self)
        require(self.least_gap < 1, "least_gap", self.least_gap, "below 1")


def choose(answers: Generations, rule: Rule, seed: int) -> list[dict[str, Any]]:
    """The characters to try, answer by answer, candidates before controls."""
    rng = np.random.default_rng(seed)
    gaps_BxT = certainty_gaps(answers.certainty_BxT, answers.mask_BxT)
    critical_BxT = answers.critical_BxT
    probes = []
    for row in range(len(gaps_BxT)):
        text = answers.text(row)
        where, gaps_T = places(text), gaps_BxT[row, : len(text)]
        least = [int(i) for i in np.argsort(gaps_T)[: rule.candidates] if gaps_T[i] < -rule.least_gap]
        others = np.setdiff1d(np.arange(len(text)), least)
        controls = rng.choice(others, min(rule.controls, len(others)), replace=False)
        for index in [*least, *controls.tolist()]:
            own = answers.answers_BxT[row, index]
            probabilities_V = answers.probabilities_BxTxV[row, index]
            others_V = np.where(np.arange(len(probabilities_V)) == own, -1, probabilities_V)
            runner_up = int(others_V.argmax())
            probe = {
                "answer": row,
                "index": index,
                "place": where[index],
                "part": part(text, where[index]),
                "candidate": index in least,
                "known": bool(critical_BxT[row, index]),
                "gap": float(gaps_T[index]),
                "own": alphabet.decode([own], beyond=alphabet.UNKNOWN),
                "own_token": int(own),
                "own_probability": float(answers.probabilities_BxTxV[row, index, own]),
                "runner_up": alphabet.decode([runner_up], beyond=alphabet.UNKNOWN),
                "runner_up_token": runner_up,
                "runner_up_probability": float(others_V[runner_up]),
            }
            probes.append(probe)
    return probes


def part(text: str, place: Place) -> str:
    """What stands at a place of an answer, in the words of the scratchpad."""
    line, word, _ = place
    lines = text.split("\n")
    if line > 0 and lines[line - 1] == "</scratch>":
        return f"result digit {word + 1}"
    if not lines[line].startswith("["):
        return "frame"
    named = "list" if lines[line].startswith("[] + []") and word == 4 else WORDS.get(word, "separator")
    return "END line " + (named if word < 5 else "rest") if "END" in lines[line] else f"step {line - 1} {named}"


def summarize(
    probes: Sequence[dict[str, Any]], known: Sequence[tuple[Place, str]], answers: int, rule: Rule
) -> dict[str, Any]:
    """Types with their verdicts, those that are critical first, then precision, recall and their verdicts.

    Args:
      probes: what ``choose`` gives, tried.
      known: place and part of every known token of the answers.
      answers: how many there are.
    """
    by_place: dict[Place, list[dict[str, Any]]] = collections.defaultdict(list)
    for probe in probes:
        if probe["candidate"] and probe["open"]:
            by_place[probe["place"]].append(probe)
    parts = dict(known) | {place: some[0]["part"] for place, some in by_place.items()}
    met = collections.Counter(place for place, _ in known)
    types = []
    for place, named in parts.items():
        some = by_place[place]
        drops_P = drops(some)
        drop = mean_interval(drops_P).within(-1, 1)
        chance_P = np.array([probe[f"{worse(probe)}_probability"] for probe in some])
        kind = {
            "place": place,
            "name": f"{named}, character {place[2] + 1}",
            "candidates": len(some),
            "known_candidates": sum(probe["known"] for probe in some),
            "known_tokens": met[place],
            "gap": float(np.mean([probe["gap"] for probe in some])) if some else float("nan"),
            "own_is_better": sum(probe["better"] == "own" for probe in some),
            "drop": drop,
            "cost": float((chance_P * drops_P).sum() / answers),
            "verdict": type_verdict(len(some), drop, rule.least_answers, rule.least_drop),
        }
        types.append(kind)
    types.sort(key=lambda kind: (kind["verdict"] != "critical", -kind["cost"]))
    found = [kind for kind in types if kind["verdict"] == "critical"]
    hits, tried = (sum(kind[name] for kind in found) for name in ("known_candidates", "candidates"))
    known_types = sum(is_known(kind) for kind in found)
    shares = {"precision": share_interval(known_types, len(found)), "recall": share_interval(hits, len(known))}
    known_candidates = sum(kind["known_candidates"] for kind in types)
    return {
        "types": types,
        **shares,
        "precision_of_candidates": share_interval(hits, tried),
        "verdicts": {name: verdict(share) for name, share in shares.items()},
        "known_that_are_open_candidates": share_interval(known_candidates, len(known)),
        "types_known": len(met),
        "types_critical": len(found),
        "types_critical_and_known": known_types,
        "drop_of_controls": mean_interval(
            drops([probe for probe in probes if probe["open"] and not probe["candidate"]])
        ),
        "open_candidates": sum(len(some) for some in by_place.values()),
    }


def is_known(kind: dict[str, Any]) -> bool:
    """Most candidates of the type are known critical tokens; without candidates, some token at that place is."""
    return 2 * kind["known_candidates"] > kind["candidates"] or (not kind["candidates"] and kind["known_tokens"] > 0)


def worse(probe: dict[str, Any]) -> str:
    """Which of the two characters is not the better one: ``own`` or ``runner_up``."""
    return "runner_up" if probe["better"] == "own" else "own"


def drops(probes: Sequence[dict[str, Any]]) -> np.ndarray:
    """Success from the better character minus that from the other, of probes that are open: float64 [P]."""
    return np.array([p[f"success_{p['better']}"] - p[f"success_{worse(p)}"] for p in probes], np.float64)


def type_verdict(count: int, drop: tuple[float, float, float], least_answers: int, least_drop: float) -> str:
    """What the drops of a type say.

    ``too few`` of them; ``critical``: their mean is ``least_drop`` or more and their interval lies above 0; ``not
    critical``: it lies below ``least_drop``; else ``undecided``.
    """
    mean, low, high = drop
    if count < least_answers:
        return "too few"
    if mean >= least_drop and low > 0:
        return "critical"
    return "not critical" if high < least_drop else "undecided"


def verdict(share: tuple[float, float, float]) -> str:
    """Is it most of them? It ``holds`` if the interval lies above one half, ``fails`` if below, else ``undecided``."""
    _, low, high = share
    return "holds" if low > 0.5 else "fails" if high < 0.5 else "undecided"
