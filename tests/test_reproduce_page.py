"""The page of all results: built from what is published and from results written by hand, and looked at in Chromium."""

import pathlib
import re

import pytest
from browser import CHROMIUM, Browser

from ckl_jax.errors import ConfigError
from ckl_jax.runtime.hosts import write_json
from experiments.common.claims import LIES_ABOVE, NOT_COMPARABLE, OVERLAP, VERDICTS, Claim, as_json
from experiments.reproduce import __main__ as reproduce
from experiments.reproduce import page

PUBLISHED = pathlib.Path(__file__).parent.parent / "experiments" / "results" / "tiny"
NAMES = [item.name for item in reproduce.ITEMS]
PIXEL = '<svg xmlns="http://www.w3.org/2000/svg" width="30" height="20"><rect width="30" height="20"/></svg>'


def claim(said="reproduced", **changes):
    values = {"claim": "Water is wet", "paper": "12 <of> 12", "here": "+3.0 [+1.0, +5.0]", "rule": "above & beyond"}
    return Claim(**{**values, "intervals": ((0.03, 0.01, 0.05),), "verdict": said, **changes})


def results(*claims, **changes):
    made = {"device": "abacus", "platform": "wood", "wall_seconds": 150.0, "config": {"command": "experiments.x"}}
    return {"claims": as_json(claims), "seeds": [3, 4, 5], **made, **changes}


def write(directory, values, name=None):
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "results.json", values)
    if name:
        (directory / f"{name}.svg").write_text(PIXEL)
    return directory


@pytest.fixture(scope="module")
def published():
    titles = {item.name: item.title for item in reproduce.ITEMS}
    cards = [page.read_card(name, titles[name], PUBLISHED / name, "") for name in sorted(NAMES)]
    return cards, page.page("Everything", cards)


def test_a_claim_has_one_of_four_verdicts():
    assert {*LIES_ABOVE.values(), *OVERLAP.values(), NOT_COMPARABLE} == set(VERDICTS)
    with pytest.raises(ConfigError, match="verdict"):
        claim("holds")


def test_a_card_counts_its_verdicts_in_one_order(tmp_path):
    write(tmp_path / "a", results(claim("undecided"), claim("reproduced"), claim("undecided")), "a")
    card = page.read_card("a", "A", tmp_path / "a", "")
    assert list(card.verdicts.items()) == [("reproduced", 1), ("undecided", 2)]
    assert card.command == "python -m experiments.x"
    assert card.picture.startswith("data:image/svg+xml;base64,")


def test_a_card_says_what_is_missing_or_damaged(tmp_path):
    read = page.read_card
    assert read("a", "A", tmp_path / "a", "").verdicts == {"not run": 1}
    assert read("a", "A", tmp_path / "a", "", "exit code 3").verdicts == {"failed": 1}
    lacking = {key: value for key, value in results(claim()).items() if key != "claims"}
    assert "lacks claims" in read("b", "B", write(tmp_path / "b", lacking), "").error
    foreign = results(claim()) | {"claims": [{"claim": "x"}]}
    assert "paper" in read("c", "C", write(tmp_path / "c", foreign), "").error
    (write(tmp_path / "d", results()) / "results.json").write_text("{")
    assert "damaged" in read("d", "D", tmp_path / "d", "").error
    (tmp_path / "d" / "results.json").write_text("[]")
    assert "lacks" in read("d", "D", tmp_path / "d", "").error


def test_old_results_stay_visible_beside_a_new_error(tmp_path):
    card = page.read_card("a", "A", write(tmp_path / "a", results(claim()), "a"), "", "exit code 3")
    section = page.card_html(card)
    assert "exit code 3" in section
    assert "Water is wet" in section
    assert card.verdicts == {"failed": 1}


def test_a_section_shows_claim_numbers_rule_and_how_it_was_made(tmp_path):
    card = page.read_card("a", "A & B", write(tmp_path / "a", results(claim()), "a"), "python -m x --seeds 3")
    section = page.card_html(card)
    for text in ("A &amp; B", "Water is wet", "12 &lt;of&gt; 12", "+3.0 [+1.0, +5.0]", "above &amp; beyond"):
        assert text in section
    for text in ("python -m x --seeds 3", "3 (3 to 5)", "abacus (wood)", "2 min", "✓ reproduced"):
        assert text in section


def test_a_rule_that_all_claims_share_is_shown_once(tmp_path):
    write(tmp_path / "a", results(claim(), claim("undecided")))
    shared = page.card_html(page.read_card("a", "A", tmp_path / "a", ""))
    assert shared.count("above &amp; beyond") == 1
    write(tmp_path / "a", results(claim(), claim(rule="another")))
    assert "above &amp; beyond" in page.card_html(page.read_card("a", "A", tmp_path / "a", ""))


def test_seeds_and_times_are_shown_in_short():
    assert page.seeds_text([0]) == "1 (0)"
    assert page.seeds_text([4, 7]) == "2 (4, 7)"
    assert page.seeds_text(list(range(10))) == "10 (0 to 9)"
    assert [page.duration(x) for x in (12.4, 2774.7, 9000.0)] == ["12 s", "46 min", "2.5 h"]


def test_everything_published_is_shown_as_it_was_decided(published):
    cards, text = published
    for card in cards:
        if (PUBLISHED / card.name).exists():
            assert not card.error, card.name
            assert card.claims, card.name
            assert bool(card.picture) == (card.name != "table1")
            assert sum(card.verdicts.values()) == len(card.claims)
    assert re.findall(r'<section id="(\w+)">', text) == sorted(NAMES)


def test_the_page_loads_nothing_from_elsewhere(published):
    _, text = published
    assert not re.findall(r'(?:src|href)="(?!data:image/|#)', text)
    assert "default-src 'none'" in text
    assert "<script" not in text


def test_a_title_cannot_break_out_of_the_page(tmp_path):
    write(tmp_path / "a", results(claim(claim="<script>alert(1)")), "a")
    card = page.read_card("a", '"><script>alert(2)', tmp_path / "a", "</code><script>", "<script>3")
    text = page.page("<script>4", [card])
    assert "<script" not in text


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_chromium_shows_every_section_and_picture_at_every_width_and_colour_scheme(published, tmp_path):
    cards, text = published
    (tmp_path / "report.html").write_text(text)
    browser = Browser(tmp_path / "profile")
    try:
        papers = set()
        for width, scheme in ((1400, "light"), (1400, "dark"), (400, "light"), (400, "dark")):
            browser.open(tmp_path / "report.html", width, scheme=scheme)
            assert browser.problems == []
            seen = browser.evaluate(
                "[...document.querySelectorAll('section')].map(s => [s.id, s.checkVisibility(), s.offsetHeight])"
            )
            assert [name for name, visible, height in seen if visible and height > 60] == sorted(NAMES)
            widths = browser.evaluate(
                "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))"
            )
            assert len(widths) == sum(bool(card.picture) for card in cards)
            assert min(widths) > 0
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            cut = "[...document.querySelectorAll('h2, h3, dd, .badge')].filter(e => e.scrollWidth > e.clientWidth + 1)"
            assert (
                browser.evaluate(f"{cut}.filter(e => getComputedStyle(e).display != 'inline').map(e => e.outerHTML)")
                == []
            )
            papers.add(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(papers) == 2
    finally:
        browser.close()
