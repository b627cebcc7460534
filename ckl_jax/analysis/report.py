"""Self-contained HTML pages of scratchpads, every character coloured by certainty: pure functions from values to text.

A page needs no network: report.css and report.js are written into it, and its content policy forbids everything else.
Colours, outlines and marks need no script; pointing at a character, or focusing a scratchpad and using the arrow keys,
shows the character's numbers. Every text that comes from outside is escaped.
"""

from __future__ import annotations

import html
import json
import math
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

from ckl_jax.errors import require

_HERE = pathlib.Path(__file__).parent
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_LEGEND_STEPS = (1.0, 0.99, 0.95, 0.9, 0.75, 0.5, 0.0)


@dataclass(frozen=True)
class Character:
    """A generated character with what is shown of it.

    Attributes:
      certainty, entropy: of the reference's distribution there, entropy in nats.
      probability, reference_probability: of this character, under the policy that wrote it and under the reference.
      likeliest: the policy's likeliest characters with their probabilities, best first.
      critical: a recorded critical token.
      deviates: the first character that differs from the right text.
    """

    character: str
    certainty: float
    entropy: float
    probability: float
    reference_probability: float
    likeliest: tuple[tuple[str, float], ...]
    critical: bool = False
    deviates: bool = False


@dataclass(frozen=True)
class Scratchpad:
    """An answer: what it is about, whether its result is right, a sentence on it, and its characters."""

    title: str
    right: bool
    note: str
    characters: tuple[Character, ...]

    @property
    def text(self) -> str:
        return "".join(character.character for character in self.characters)


@dataclass(frozen=True)
class Section:
    """Scratchpads side by side under a heading."""

    title: str
    note: str
    scratchpads: tuple[Scratchpad, ...]


def shade(certainty: float) -> int:
    """Strength of a character's colour in percent: the square root of 1 - J, so that 0.99 can be told from 1."""
    require(not math.isnan(certainty), "certainty", certainty, "a number")
    return round(100 * math.sqrt(min(1.0, max(0.0, 1.0 - certainty))))


def character_html(character: Character, *, first: bool = False) -> str:
    """One character as a span; ``first``: the one that the tab key reaches."""
    classes = [name for name, on in (("critical", character.critical), ("deviates", character.deviates)) if on]
    attributes = f' tabindex="{0 if first else -1}"'
    if classes:
        attributes += f' class="{" ".join(classes)}"'
    if shade(character.certainty):
        attributes += f' style="--unsure:{shade(character.certainty)}%"'
    return f"<span{attributes}>{'↵' if character.character == chr(10) else html.escape(character.character)}</span>"


def scratchpad_html(scratchpad: Scratchpad) -> str:
    """An article with the answer's lines, each a block that wraps with an indent."""
    lines: list[list[str]] = [[""]]
    for index, character in enumerate(scratchpad.characters):
        span = character_html(character, first=index == 0)
        if character.character in " \n":
            lines[-1] += [span, ""]
        else:
            lines[-1][-1] += span
        if character.character == "\n":
            lines.append([""])
    body = "".join(f'<div class="line">{_words(line)}</div>' for line in lines if any(line))
    verdict = "right" if scratchpad.right else "wrong"
    title = html.escape(scratchpad.title)
    return (
        f'<article class="{verdict}"><h3>{title} <em>{verdict}</em></h3><p>{html.escape(scratchpad.note)}</p>'
        f'<div class="pad" role="group" aria-label="Answer to {title}, {verdict}">{body}</div></article>'
    )


def _words(parts: Sequence[str]) -> str:
    """A line from words, each kept together where the line wraps, and the spaces between them (parts of odd index)."""
    return "".join(part if index % 2 or not part else f"<b>{part}</b>" for index, part in enumerate(parts))


def section_html(section: Section) -> str:
    """A heading, a sentence, and the scratchpads in as many columns as there is room for."""
    pads = "".join(scratchpad_html(scratchpad) for scratchpad in section.scratchpads)
    return (
        f"<section><h2>{html.escape(section.title)}</h2><p>{html.escape(section.note)}</p>"
        f'<div class="columns">{pads}</div></section>'
    )


def legend_html() -> str:
    """What the colours, outlines and marks mean."""
    steps = "".join(f'<span style="--unsure:{shade(step)}%">{step:g}</span>' for step in _LEGEND_STEPS)
    return (
        f'<div class="legend"><div>certainty of the pre-trained model <span class="scale">{steps}</span></div>'
        '<div><span class="critical">,</span> critical token</div>'
        '<div><span class="deviates">]</span> first character that is not as in the right answer</div></div>'
    )


def characters_json(scratchpads: Sequence[Scratchpad]) -> str:
    """What the script shows: per scratchpad and character [J, H, p, reference's p, likeliest, their p], as JSON that
    cannot end the script element it stands in."""
    rows = [
        [
            [
                *(_short(x) for x in (c.certainty, c.entropy, c.probability, c.reference_probability)),
                "".join(character for character, _ in c.likeliest),
                [_short(probability) for _, probability in c.likeliest],
            ]
            for c in scratchpad.characters
        ]
        for scratchpad in scratchpads
    ]
    return json.dumps(rows, separators=(",", ":")).replace("<", "\\u003c")


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def document(title: str, body: str, *, style: str = "", images: bool = False) -> str:
    """A whole HTML document that may load nothing: report.css, then ``style``; ``images`` allows those in data URIs."""
    base = _HERE.joinpath("report.css").read_text(encoding="utf-8")
    policy = _POLICY + ("; img-src data:" if images else "")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{html.escape(title)}</title>\n<style>\n{base}{style}</style></head>\n"
        f"<body>{body}</body></html>\n"
    )


def page(title: str, introduction: Sequence[str], sections: Sequence[Section]) -> str:
    """The document of some sections of scratchpads.

    Args:
      introduction: paragraphs under the title.
    """
    script = _HERE.joinpath("report.js").read_text(encoding="utf-8")
    paragraphs = "".join(f"<p>{html.escape(text)}</p>" for text in introduction)
    data = characters_json([scratchpad for section in sections for scratchpad in section.scratchpads])
    return document(
        title,
        f"<main><h1>{html.escape(title)}</h1>{paragraphs}{legend_html()}\n"
        + "\n".join(section_html(section) for section in sections)
        + '</main>\n<aside id="details" aria-live="polite"><p>Point at a character, or focus a scratchpad and use the '
        "arrow keys, to see the model's distribution there.</p></aside>\n"
        f'<script type="application/json" id="characters">{data}</script>\n<script>\n{script}</script>',
    )
