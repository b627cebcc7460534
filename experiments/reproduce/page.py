"""The page that compares every figure and table with the paper: pure functions from results.json files to one HTML.

It knows no figure: an item shows the ``claims``, ``seeds``, ``device``, ``platform``, ``wall_seconds`` and ``config``
of its results.json and the picture beside it. Pictures are data URIs; nothing is loaded, and every text is escaped.
"""

from __future__ import annotations

import base64
import collections
import html
import json
import pathlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ckl_jax.analysis import report
from ckl_jax.errors import ConfigError
from ckl_jax.runs.records import read_results
from experiments.common.claims import VERDICTS, Claim

MARKS: dict[str, str] = dict(zip(VERDICTS, ("✓", "✗", "?", "≠"), strict=True))
FAILED, MISSING = "failed", "not run"
NEEDED = ("claims", "seeds", "device", "platform", "wall_seconds", "config")
INTRODUCTION = (
    "Paper: Vassoyan, Beau, Plaud, “Ignore the KL Penalty! Boosting Exploration on Critical Tokens to Enhance RL "
    "Fine-Tuning”, arXiv 2502.06533: 85M parameters pre-trained on 3 to 13 digits, 10 seeds.",
    "Every verdict follows from its rule and what is shown beside it, a 95% interval where the rule has one, and the "
    "rules are in the modules that made the numbers. Undecided means that what was measured allows both answers, often "
    "because there are few seeds.",
)
PICTURES = {"svg": "image/svg+xml", "png": "image/png"}


@dataclass(frozen=True)
class Card:
    """What the page shows of an item.

    Attributes:
      name: also the id of its section.
      command: as typed.
      results: its results.json, None if there is none.
      picture: data URI, "" if it has none.
      error: why it did not end well, "" if it did.
    """

    name: str
    title: str
    command: str
    results: dict[str, Any] | None = None
    claims: tuple[Claim, ...] = ()
    picture: str = ""
    error: str = ""

    @property
    def verdicts(self) -> dict[str, int]:
        """How often each verdict was given, or the state that took its place."""
        if self.results is None or self.error:
            return {FAILED if self.error else MISSING: 1}
        counts = collections.Counter(claim.verdict for claim in self.claims)
        return {name: counts[name] for name in VERDICTS if counts[name]}


def read_card(name: str, title: str, directory: pathlib.Path, command: str, error: str = "") -> Card:
    """The card of what is in ``directory``; a results.json that cannot be shown becomes the card's error.

    Args:
      command: what was typed; "": the module that results.json names.
    """
    path = directory / "results.json"
    if not path.exists():
        return Card(name, title, command, error=error)
    try:
        results = read_results(path, name)
        lacking = [key for key in NEEDED if key not in results]
        if lacking:
            raise ConfigError(f"{path.name} lacks {', '.join(lacking)}")
        claims = tuple(Claim(**claim) for claim in results["claims"])
        command = command or f"python -m {results['config']['command']}"
    except (ConfigError, KeyError, TypeError) as problem:
        return Card(name, title, command, error=error or str(problem))
    return Card(name, title, command, results, claims, picture(directory, name), error)


def picture(directory: pathlib.Path, name: str) -> str:
    """The item's picture as a data URI, as SVG where there is one; "" if there is none."""
    for suffix, kind in PICTURES.items():
        path = directory / f"{name}.{suffix}"
        if path.exists():
            return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return ""


def page(title: str, cards: Sequence[Card]) -> str:
    """The whole document."""
    style = pathlib.Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    paragraphs = "".join(f"<p>{html.escape(text)}</p>" for text in INTRODUCTION)
    body = (
        f"<main><h1>{html.escape(title)}</h1>{paragraphs}{contents_html(cards)}\n"
        + "\n".join(card_html(card) for card in cards)
        + "</main>"
    )
    return report.document(title, body, style=style, images=True)


def contents_html(cards: Iterable[Card]) -> str:
    """The table of contents with every item's verdicts."""
    rows = "".join(
        f'<li><a href="#{card.name}">{html.escape(card.title)}</a><span>{_badges(card.verdicts)}</span></li>'
        for card in cards
    )
    return f'<nav aria-label="Contents"><ul>{rows}</ul></nav>'


def _badges(verdicts: dict[str, int]) -> str:
    return " ".join(badge(name, count) for name, count in verdicts.items())


def badge(verdict: str, count: int = 1) -> str:
    """A verdict as a word with a mark, so that it does not depend on its colour."""
    times = f"{count} " if count > 1 else ""
    return f'<span class="badge {verdict.replace(" ", "-")}">{MARKS.get(verdict, "–")} {times}{verdict}</span>'


def card_html(card: Card) -> str:
    """An item's section: picture, claims, and how it was made."""
    parts = [f"<h2>{html.escape(card.title)}</h2>"]
    if card.error:
        parts.append(f'<div class="error">{badge(FAILED)}<pre>{html.escape(card.error)}</pre></div>')
    elif card.results is None:
        parts.append(f"<p>{badge(MISSING)} There is no results.json yet.</p>")
    if card.picture:
        image = f'<img alt="{html.escape(card.title, quote=True)}" src="{card.picture}">'
        parts.append(f'<div class="picture" tabindex="0" role="group" aria-label="Picture">{image}</div>')
    rules = {claim.rule for claim in card.claims}
    common = len(card.claims) > 1 and len(rules) == 1
    if card.claims:
        shown = "".join(claim_html(claim, with_rule=not common) for claim in card.claims)
        parts.append(f'<div class="claims">{shown}</div>')
    if common:
        parts.append(f'<p class="rule">Rule for all: {html.escape(rules.pop())}.</p>')
    return f'<section id="{card.name}">{"".join(parts)}{_made_html(card)}</section>'


def claim_html(claim: Claim, *, with_rule: bool = True) -> str:
    """A claim as an article: verdict, the paper's numbers and ours, and the rule."""
    rows = [("paper", claim.paper), ("here", claim.here)] + [("rule", claim.rule)] * with_rule
    listed = "".join(f'<dt>{name}</dt><dd class="{name}">{html.escape(text)}</dd>' for name, text in rows)
    return f"<article><h3>{html.escape(claim.claim)}</h3>{badge(claim.verdict)}<dl>{listed}</dl></article>"


def _made_html(card: Card) -> str:
    rows = [("command", f"<code>{html.escape(card.command)}</code>")] if card.command else []
    config = ""
    if card.results is not None:
        made = card.results
        device = f"{made['device']} ({made['platform']})"
        shown = (("seeds", seeds_text(made["seeds"])), ("device", device), ("time", duration(made["wall_seconds"])))
        rows += [(name, html.escape(text)) for name, text in shown]
        text = html.escape(json.dumps(made["config"], indent=1))
        config = f"<details><summary>config</summary><pre>{text}</pre></details>"
    listed = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in rows)
    return f'<dl class="made">{listed}</dl>{config}'


def seeds_text(seeds: Sequence[int]) -> str:
    """How many seeds and which: "10 (0 to 9)"."""
    if list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))) and len(seeds) > 2:
        return f"{len(seeds)} ({seeds[0]} to {seeds[-1]})"
    return f"{len(seeds)} ({', '.join(map(str, seeds))})"


def duration(seconds: float) -> str:
    """Wall time in a unit that suits it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
