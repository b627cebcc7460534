"""The driver on stand-ins for the items: order, resumption, failures, and the real items' command lines."""

import itertools
import json
import re
import signal

import pytest
from hostile import command_of

from ckl_jax.checkpoint.shipped import SHIPPED_TINY, shipped
from ckl_jax.errors import ConfigError
from ckl_jax.runtime import cli
from ckl_jax.runtime.preemption import PreemptedError
from experiments.common.models import pretrained
from experiments.reproduce import __main__ as reproduce
from experiments.reproduce.__main__ import Item, ReproduceCommand

STAND_IN = """
import argparse, json, pathlib, sys
parser = argparse.ArgumentParser()
for name in ("out", "seeds", "run", "fail"):
    parser.add_argument("--" + name)
given = parser.parse_args()
out = pathlib.Path(given.out)
out.mkdir(parents=True, exist_ok=True)
with (out / "calls").open("a") as file:
    file.write("called\\n")
print("working on", out.name)
if given.fail and pathlib.Path(given.fail).exists():
    sys.exit("it broke <here>")
claim = {"claim": "c", "paper": "p", "here": "h", "intervals": [], "verdict": "undecided", "rule": "r"}
made = {"device": "abacus", "platform": "wood", "wall_seconds": 1.0, "config": {"command": "stand_in"}}
(out / "results.json").write_text(json.dumps({"claims": [claim], "seeds": [int(given.seeds or 0)], **made}))
"""


def seeds(command):
    return ["--seeds", str(command.seeds)]


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Three items: figure7 reads figure4, and table1 fails while tmp_path/broken exists."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    broken = str(tmp_path / "broken")
    items = (
        Item("table1", "Table 1", "stand_in", lambda command: ["--fail", broken]),
        Item("figure4", "Figure 4", "stand_in", seeds),
        Item("figure7", "Figure 7", "stand_in", lambda command: ["--run", str(command.out / "figure4")], ("figure4",)),
    )
    monkeypatch.setattr(reproduce, "ITEMS", items)
    return tmp_path


def call(tmp_path, *arguments):
    command = cli.parse(ReproduceCommand, None, ["--out", str(tmp_path / "out"), *arguments])
    reproduce.main(command)


def calls(tmp_path):
    out = tmp_path / "out"
    return {path.parent.name: len(path.read_text().splitlines()) for path in out.glob("*/calls")}


def test_every_item_is_run_in_its_own_directory_and_shown(stand_ins, capsys):
    call(stand_ins)
    assert calls(stand_ins) == {"table1": 1, "figure4": 1, "figure7": 1}
    page = (stand_ins / "out" / "report.html").read_text()
    assert re.findall(r'<section id="(\w+)">', page) == ["figure4", "figure7", "table1"]
    assert "python -m stand_in --out" in page
    printed = capsys.readouterr().out
    assert "figure4 | working on figure4\n" in printed
    assert (stand_ins / "out" / "logs" / "figure4.log").read_text() == "working on figure4\n"


def test_what_is_done_is_skipped_and_what_changed_is_run_again_with_what_reads_it(stand_ins, capsys):
    call(stand_ins)
    call(stand_ins)
    assert calls(stand_ins) == {"table1": 1, "figure4": 1, "figure7": 1}
    assert "figure4: done before" in capsys.readouterr().out
    call(stand_ins, "--seeds", "3")
    assert calls(stand_ins) == {"table1": 1, "figure4": 2, "figure7": 2}
    (stand_ins / "out" / "figure7" / "results.json").unlink()
    call(stand_ins, "--seeds", "3")
    assert calls(stand_ins) == {"table1": 1, "figure4": 2, "figure7": 3}


def test_a_failing_item_loses_no_other_and_is_tried_again(stand_ins):
    (stand_ins / "broken").touch()
    with pytest.raises(SystemExit) as stop:
        call(stand_ins)
    assert stop.value.code == 1
    assert calls(stand_ins) == {"table1": 1, "figure4": 1, "figure7": 1}
    page = (stand_ins / "out" / "report.html").read_text()
    assert "it broke &lt;here&gt;" in page
    assert "exit code 1" in page
    assert page.count('<div class="claims">') == 2
    (stand_ins / "broken").unlink()
    call(stand_ins)
    assert calls(stand_ins) == {"table1": 2, "figure4": 1, "figure7": 1}
    assert "it broke" not in (stand_ins / "out" / "report.html").read_text()


PREEMPTED = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if sys.argv[3] == "both":
    os.kill(os.getppid(), signal.SIGTERM)
else:
    os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""


@pytest.mark.parametrize("told", ["both", "the item alone"])
def test_sigterm_goes_on_to_the_item_and_stops_the_driver(stand_ins, monkeypatch, told):
    (stand_ins / "preempted.py").write_text(PREEMPTED)
    items = (Item("table1", "Table 1", "preempted", lambda command: [told]), *reproduce.ITEMS[1:])
    monkeypatch.setattr(reproduce, "ITEMS", items)
    with pytest.raises(PreemptedError):
        call(stand_ins)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert calls(stand_ins) == {}
    assert not (stand_ins / "out" / "reproduce.json").exists()


def test_an_item_whose_input_is_not_there_is_not_run(stand_ins):
    with pytest.raises(SystemExit):
        call(stand_ins, "--items", "figure7")
    assert calls(stand_ins) == {}
    assert "It reads the results of figure4" in (stand_ins / "out" / "report.html").read_text()
    call(stand_ins, "--items", "figure4", "figure7")
    assert calls(stand_ins) == {"figure4": 1, "figure7": 1}


def test_an_item_whose_input_failed_is_not_run_on_an_older_one(stand_ins):
    call(stand_ins)
    path = stand_ins / "out" / "reproduce.json"
    notes = json.loads(path.read_text())
    path.write_text(json.dumps(notes | {"figure4": notes["figure4"] | {"error": "exit code 2"}}))
    with pytest.raises(SystemExit):
        call(stand_ins, "--items", "figure7")
    assert calls(stand_ins)["figure7"] == 1
    assert "of a call that failed" in json.loads(path.read_text())["figure7"]["error"]


@pytest.mark.parametrize(
    ("option", "words"), [("scale", ["--scale", "ladder"]), ("checkpoint", ["--checkpoint", "tiny_subtraction"])]
)
def test_a_directory_is_of_one_scale_and_model(stand_ins, option, words):
    call(stand_ins, "--items", "table1")
    with pytest.raises(ConfigError, match=rf"^{option}: got .*that of the earlier call in"):
        call(stand_ins, *words)
    assert calls(stand_ins) == {"table1": 1}


def test_a_page_that_is_written_again_keeps_its_title(stand_ins):
    call(stand_ins, "--scale", "ladder", "--items", "table1")
    call(stand_ins, "--report-only")
    assert "every figure and table at the ladder scale, addition" in (stand_ins / "out" / "report.html").read_text()


def test_the_levels_of_a_task_are_pretrained_as_its_shipped_model_was(tmp_path):
    command = ReproduceCommand(checkpoint=shipped("multiplication"), out=tmp_path)
    for item in (item for item in reproduce.ITEMS if item.name in ("figure2", "figure3")):
        _, config_type, preset = command_of(item.module)
        models = cli.parse(config_type, preset, reproduce.arguments(command, item)[2:]).models
        assert pretrained(models.configs[-1], tmp_path) == shipped("multiplication")


def test_several_hosts_are_refused_before_anything_is_written(stand_ins, monkeypatch):
    for name, value in {"COORDINATOR_ADDRESS": "host:1", "NUM_PROCESSES": "2", "PROCESS_ID": "0"}.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES: got 2, allowed is 1: reproduce is for one host"):
        call(stand_ins)
    assert not (stand_ins / "out").exists()


def test_a_chosen_item_is_run_alone_and_the_others_are_named(stand_ins):
    call(stand_ins, "--items", "figure4")
    assert calls(stand_ins) == {"figure4": 1}
    assert (stand_ins / "out" / "report.html").read_text().count("There is no results.json yet") == 2


def test_report_only_runs_nothing(stand_ins):
    call(stand_ins)
    (stand_ins / "out" / "report.html").unlink()
    call(stand_ins, "--report-only", "--seeds", "9")
    assert calls(stand_ins) == {"table1": 1, "figure4": 1, "figure7": 1}
    assert (stand_ins / "out" / "report.html").exists()


def test_options_of_one_item_reach_it_alone(stand_ins):
    call(stand_ins, "--options", "figure4: --seeds 8", "figure4: --run 'a b'")
    results = json.loads((stand_ins / "out" / "figure4" / "results.json").read_text())
    assert results["seeds"] == [8]
    notes = json.loads((stand_ins / "out" / "reproduce.json").read_text())
    assert notes["figure4"]["command"].endswith("--seeds 8 --run 'a b'")
    assert "--seeds 8" not in notes["figure7"]["command"]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--items", "figure9"], "items"),
        (["--options", "figure9: --seeds 1"], "options"),
        (["--options", "figure4: '"], "options"),
        (["--seeds", "0"], "seeds"),
        (["--scale", "small"], "checkpoint"),
        (["--checkpoint", "nowhere"], "checkpoint"),
        (["--report-only"], "out"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(stand_ins, arguments, field):
    with pytest.raises(ConfigError, match=rf"\b{field}: "):
        call(stand_ins, *arguments)
    assert not (stand_ins / "out").exists()


@pytest.mark.parametrize("item", reproduce.ITEMS, ids=lambda item: item.name)
@pytest.mark.parametrize(("scale", "checkpoint"), [("tiny", None), ("tiny", SHIPPED_TINY), ("ladder", None)])
def test_every_items_module_takes_the_arguments_that_it_gets(item, scale, checkpoint, tmp_path):
    command = ReproduceCommand(scale, checkpoint=checkpoint, out=tmp_path / "out", seeds=4)
    _, config_type, preset = command_of(item.module)
    parsed = cli.parse(config_type, preset, reproduce.arguments(command, item)[2:])
    assert parsed.out == tmp_path / "out" / item.name
    assert getattr(parsed, "seeds", 4) == 4


@pytest.mark.parametrize("item", reproduce.ITEMS, ids=lambda item: item.name)
def test_at_the_ladder_every_item_of_one_model_starts_from_n5(item, tmp_path):
    words = reproduce.arguments(ReproduceCommand("ladder", out=tmp_path), item)
    given = {word for option, word in itertools.pairwise(words) if option in ("--checkpoint", "--checkpoints")}
    reads_no_model = item.name in ("figure2", "figure3", "figure7")
    assert given == (set() if reads_no_model else {str(shipped(scale="ladder"))})


def test_what_an_item_reads_is_run_before_it():
    names = [item.name for item in reproduce.ITEMS]
    for item in reproduce.ITEMS:
        assert all(names.index(needed) < names.index(item.name) for needed in item.needs)


def test_figure_1_gets_operands_of_the_checkpoints_own_length(tmp_path):
    description = json.loads((SHIPPED_TINY / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(description | {"max_pretrain_digits": 3}))
    (item,) = [item for item in reproduce.ITEMS if item.name == "figure1"]
    words = reproduce.arguments(ReproduceCommand(checkpoint=tmp_path), item)
    operands = [int(words[words.index(name) + 1]) for name in ("--a", "--b")]
    assert len(str(max(operands))) == 4


@pytest.mark.slow
def test_the_real_figure_1_ends_in_a_page(tmp_path):
    call(tmp_path, "--items", "figure1")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "data:image/svg+xml;base64," in page
    assert "788400" in page
