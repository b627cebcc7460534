"""What every figure does with its numbers: kept first, then judged, drawn in our style, and told."""

import json
import pathlib
import types

import matplotlib
import pytest
from matplotlib.figure import Figure

from ckl_jax.analysis import plots
from ckl_jax.errors import ConfigError
from experiments.common import figure

MODULE = "experiments.abacus"
RESULTS = pathlib.Path(__file__).parents[1] / "experiments" / "results"


def measure(command):
    return {"config": {"command": MODULE}, "beads": 7}


def text(results):
    return f"{results['beads']} beads, {results['verdict']}"


def judge(results):
    return {"verdict": "many" if results["beads"] > 3 else "few"}


def publish(out, plot_only=False, draw=lambda results: Figure(), measure=measure, **more):
    command = types.SimpleNamespace(out=out, plot_only=plot_only)
    figure.publish(command, MODULE, "abacus", measure, text, draw, judge=judge, **more)


def test_results_are_measured_judged_drawn_and_told(tmp_path, capsys):
    publish(tmp_path / "out", page=text)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["beads"], results["verdict"]) == (7, "many")
    assert results["wall_seconds"] >= 0
    assert {"device", "platform"} < results.keys()
    assert (tmp_path / "out" / "abacus.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "abacus.html").read_text() == "7 beads, many"
    files = "results.json, abacus.html, abacus.png, abacus.svg"
    assert capsys.readouterr().out == f"7 beads, many\n{files} in {tmp_path / 'out'}\n"


def test_a_number_that_is_none_is_null_and_is_read_as_none(tmp_path):
    nan = float("nan")

    def with_gaps(command):
        config = {"command": MODULE, "seeds": [None]}
        numbers = {
            "curve": [0.5, nan, (float("inf"), 1.0)],
            "gap": nan,
            "of": {"rod": [nan], "intervals": (None, (0.5, nan))},
        }
        return {"config": config, "beads": 7, **numbers}

    seen = []
    publish(tmp_path, measure=with_gaps)
    for _ in range(2):
        kept = strict(tmp_path / "results.json")
        assert kept["curve"] == [0.5, None, [None, 1.0]]
        of = {"rod": [None], "intervals": [None, [0.5, None]]}
        assert (kept["gap"], kept["of"], kept["config"]["seeds"]) == (None, of, [None])
        publish(tmp_path, plot_only=True, measure=None, draw=lambda results: seen.append(results) or Figure())
        assert str(seen[-1]["curve"]) == "[0.5, nan, [nan, 1.0]]"
        assert str(seen[-1]["of"]) == "{'rod': [nan], 'intervals': [None, [0.5, nan]]}"
        assert (seen[-1]["gap"], seen[-1]["config"]["seeds"]) == (None, [None])


def strict(path):
    """What a reader says that takes JSON by its rules."""
    return json.loads(path.read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json*")), ids=lambda path: str(path.relative_to(RESULTS)))
def test_what_is_published_can_be_read_by_any_reader_of_json(path):
    if path.suffix == ".json":
        strict(path)
    else:
        for line in path.read_text().splitlines():
            json.loads(line, parse_constant=pytest.fail)


def test_what_was_measured_survives_a_failure_and_is_judged_again_without_measuring(tmp_path):
    def fail(results):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        publish(tmp_path, draw=fail)
    kept = json.loads((tmp_path / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps(kept | {"beads": 2, "verdict": "old"}))
    publish(tmp_path, plot_only=True, measure=None)
    assert json.loads((tmp_path / "results.json").read_text()) == kept | {"beads": 2, "verdict": "few"}


@pytest.mark.parametrize(
    ("content", "plot_only", "expected"),
    [
        (None, True, r"^plot_only: got .*, allowed is a directory with an earlier call's results\.json"),
        ({"config": {"command": MODULE}}, True, r"^plot_only: .*results\.json is damaged \(KeyError: 'beads'\)"),
        ({"config": {"command": "another"}}, True, r"^out: .*another command's results\.json"),
        ({"config": {"command": "another"}}, False, r"^out: .*another command's results\.json"),
    ],
)
def test_what_cannot_be_read_is_refused_and_kept(tmp_path, content, plot_only, expected):
    if content is not None:
        (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=expected):
        publish(tmp_path, plot_only)
    assert [json.loads(path.read_text()) for path in tmp_path.iterdir()] == [content] * (content is not None)


def test_pictures_have_our_style_and_nobody_elses_changes(tmp_path):
    before, seen = dict(matplotlib.rcParams), {}

    def draw(results):
        seen.update(matplotlib.rcParams)
        return Figure()

    publish(tmp_path, draw=draw)
    assert plots.STYLE.items() <= seen.items()
    assert dict(matplotlib.rcParams) == before


def test_a_table_is_markdown():
    assert figure.markdown(["a", "b"], [["1", ""]]) == "| a | b |\n| --- | --- |\n| 1 |  |"


@pytest.mark.parametrize(("number", "said"), [(0, "0 seeds"), (1, "1 seed"), (2, "2 seeds"), (10, "10 seeds")])
def test_one_is_no_plural_in_a_title(number, said):
    assert plots.counted(number, "seed") == said
    assert said in plots.spread(number)


def test_every_arm_of_a_picture_has_its_own_color():
    names = ["standard", "prioritized", *(f"arm {index}" for index in range(30))]
    assert len(set(plots.colors_of(names).values())) == len(names)
