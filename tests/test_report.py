"""The page's structure by the standard library's parser, what it escapes, and how a browser shows it."""

import json
import re
import subprocess
from html.parser import HTMLParser

import pytest
from browser import CHROMIUM

from ckl_jax.analysis import report
from ckl_jax.analysis.report import Character, Scratchpad, Section

VOID = {"meta"}
TEXT = "\n<scratch>\n[1,2] + [3]\n"


def pad(text=TEXT, right=True, critical=(), deviates=None, title="12 + 3 = 15", note="A note."):
    characters = tuple(
        Character(
            c,
            certainty=0.5 if i in critical else 1.0,
            entropy=0.25,
            probability=0.75,
            reference_probability=0.625,
            likeliest=((c, 0.75), ("<", 0.2), (" ", 0.05)),
            critical=i in critical,
            deviates=i == deviates,
        )
        for i, c in enumerate(text)
    )
    return Scratchpad(title, right, note, characters)


class Page(HTMLParser):
    """The elements of a document; fails on one that is not closed in its place."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "text": "", "inside": [e["class"] for e in self.open], **dict(attributes)}
        element.setdefault("class", "")
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, inside=None):
        return [e for e in self.elements if e["tag"] == tag and (inside is None or inside in e["inside"])]


def page(*pads, title="Title", introduction=("Text.",)):
    return report.page(title, introduction, [Section("Before", "Some.", pads)])


def test_every_character_is_a_span_with_its_marks():
    found = Page(page(pad(critical=(13,), deviates=15), pad(TEXT[:9], right=False)))
    spans = found.all("span", inside="pad")
    assert "".join(span["text"] for span in spans).replace("↵", "\n") == TEXT + TEXT[:9]
    assert [i for i, span in enumerate(spans) if "critical" in span["class"]] == [13]
    assert [i for i, span in enumerate(spans) if "deviates" in span["class"]] == [15]
    assert [i for i, span in enumerate(spans) if "style" in span] == [13]
    assert [i for i, span in enumerate(spans) if span["tabindex"] == "0"] == [0, len(TEXT)]
    assert [article["class"] for article in found.all("article")] == ["right", "wrong"]
    assert [len(line["text"]) for line in found.all("div") if line["class"] == "line"] == [1, 10, 12, 1, 8]


def test_the_data_of_the_script_is_one_entry_per_character():
    text = page(pad(critical=(13,)), pad(TEXT[:3]))
    (data,) = [script for script in Page(text).all("script") if script.get("type") == "application/json"]
    first, second = json.loads(data["text"])
    assert (len(first), len(second)) == (len(TEXT), 3)
    assert first[13] == [0.5, 0.25, 0.75, 0.625, ",< ", [0.75, 0.2, 0.05]]


def test_what_comes_from_outside_is_escaped():
    bad = "</script><script>alert('x')</script>&\""
    text = page(pad(bad, title=bad, note=bad), title=bad, introduction=(bad,))
    found = Page(text)
    assert len(found.all("script")) == 2
    assert "alert('x')" not in text
    assert found.all("h1")[0]["text"] == bad
    assert found.all("h3")[0]["text"] == bad + " right"
    assert "".join(span["text"] for span in found.all("span", inside="pad")) == bad


def test_the_page_asks_nothing_of_the_network():
    text = page(pad())
    found = Page(text)
    assert not [e for e in found.elements if {"src", "href"} & e.keys()]
    assert not re.search(r"https?:|url\(|@import", text)
    assert "default-src 'none'" in text


@pytest.mark.parametrize(
    ("certainty", "percent"), [(1.0, 0), (0.99, 10), (0.75, 50), (0.0, 100), (1.5, 0), (-1.0, 100)]
)
def test_the_shade_is_the_square_root_of_what_certainty_lacks(certainty, percent):
    assert report.shade(certainty) == percent


def test_the_legend_has_the_classes_of_the_characters():
    classes = [e["class"] for e in Page(report.legend_html()).elements]
    assert {"critical", "deviates"} <= set(classes)


PROBE = """<script>
  const root = document.documentElement;
  const wide = [];
  for (const width of [400, 1600]) {
    root.style.width = width + "px";
    wide.push([...document.querySelectorAll("body *")].every((e) => e.getBoundingClientRect().right <= width + 1));
  }
  const critical = document.querySelector(".pad .critical");
  critical.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
  const pointed = document.getElementById("details").textContent;
  const first = document.querySelector(".pad span");
  first.focus();
  first.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown", bubbles: true }));
  const focused = document.activeElement.textContent;
  document.body.dataset.probe = JSON.stringify({ wide, pointed, focused });
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_fits_it_to_400_and_1600_pixels_and_shows_a_characters_numbers(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page(pad(critical=(13,)), pad(right=False, deviates=15)).replace("</body>", PROBE))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    found = subprocess.run(
        [CHROMIUM, *options, "--virtual-time-budget=2000", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    (body,) = Page(found.stdout).all("body")
    probe = json.loads(body["data-probe"])
    assert probe["wide"] == [True, True]
    for shown in (",", "0.5000", "0.250 nats", "75.00 %", "62.50 %", "a critical token", "20.00 %"):
        assert shown in probe["pointed"]
    assert probe["focused"] == "<"
