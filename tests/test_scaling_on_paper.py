"""Scaling on paper from made answers of preflight: what is asked, resumed, told and drawn."""

import itertools
import json
import os
import subprocess
import sys

import pytest
from names import ROOT

from ckl_jax.errors import ConfigError
from ckl_jax.preflight import chips
from experiments import scaling_on_paper as scaling

TOPOLOGIES = ("v5e:1x1", "v5e:2x4")


class Device:
    process_index = 0


class Done:
    stderr = "warning\nerror: model: got nothing"


@pytest.fixture
def asked(monkeypatch):
    """What preflight was asked; its answers have two of whatever there are chips of, and no cost with split ones."""
    calls = []

    def answer(words, **_):
        calls.append(words)
        options = dict(itertools.pairwise(words))
        number = scaling.chips_of(options["--topology"])
        split = "--shard-state" in words or "--data-devices" in words
        seconds = {"arithmetic": 0.01, "memory": 0.02, "links": 0.001 * number}
        cost = None if split else {"collectives": {"all-reduce": 2e8} if number > 1 else {}}
        program = {"name": "training step", "fits": not split, "needed": 2 * 2**30, "cost": cost}
        program |= {"mesh": {"run": 1, "data": number}}
        program |= {"seconds": seconds, "share_of_peak": 0.5}
        with open(options["--json"], "w") as file:
            json.dump({"programs": [program]}, file)
        return Done

    monkeypatch.setattr(scaling.subprocess, "run", answer)

    def topology(name):
        devices = [Device() for _ in range(scaling.chips_of(name))]
        return chips.Topology(name, chips.CHIPS["v5e"], tuple(devices))

    monkeypatch.setattr(scaling, "topology", topology)
    return calls


def test_every_topology_is_asked_once_with_as_many_windows_a_chip(asked, tmp_path, capsys):
    command = scaling.ScalingCommand(topologies=TOPOLOGIES, windows=3, out=tmp_path / "out")
    scaling.main(command)
    said = [" ".join(words[words.index("pretrain") :]) for words in asked]
    one, eight = "pretrain --scale gpt2 --batch-size 3", "pretrain --scale gpt2 --batch-size 24"
    assert said == [one, eight, f"{eight} --shard-state"]
    printed = capsys.readouterr().out
    assert "| v5e:2x4 | 8 | parameters whole | 1 x 8 | 2.00 | 10 | 20 | 8 | memory | 50% | all-reduce 0.2 |" in printed
    assert "| v5e:1x1 | 1 | parameters whole | 1 x 1 | 2.00 | 10 | 20 | 1 | memory | 50% | none |" in printed
    assert printed.count("| does not fit |") == 1
    assert (tmp_path / "out" / "scaling_on_paper.png").read_bytes().startswith(b"\x89PNG")


def test_fine_tuning_is_asked_for_as_many_runs_on_all_chips_and_episodes_are_shared_by_all_that_can(asked, tmp_path):
    topologies = (*TOPOLOGIES, "v5e:16x16")
    command = scaling.ScalingCommand(topologies=topologies, program="finetune", runs=6, out=tmp_path / "out")
    scaling.main(command)
    said = [" ".join(words[words.index("--only") :]) for words in asked]
    assert all(words.startswith("--only rounds ") for words in said)
    runs = "finetune --scale gpt2 --seeds 6"
    ends = [runs, runs, f"{runs} --data-devices 8", runs]  # Of 256 chips 96 can share them: 16 episodes of each run.
    assert [words[words.index("finetune") :] for words in said] == ends
    figure = scaling.draw(json.loads((tmp_path / "out" / "results.json").read_text()))
    assert figure.get_suptitle() == "rounds of gpt2 on v5e, 6 runs together, on paper"
    assert [panel.get_title() for panel in figure.axes] == ["runs first", "episodes first"]
    tallest = max(bar.get_height() for bar in figure.axes[0].patches)
    assert tallest == pytest.approx(0.256)  # Seconds, of the links of 256 chips.


@pytest.mark.parametrize(("program", "field"), [("pretrain", "runs"), ("finetune", "windows")])
def test_an_option_of_the_other_program_is_refused(program, field):
    with pytest.raises(ConfigError, match=f"^{field}: got 3"):
        scaling.ScalingCommand(program=program, **{field: 3})


def test_a_picture_of_several_kinds_names_them(asked, tmp_path):
    command = scaling.ScalingCommand(topologies=(*TOPOLOGIES, "h100:2x8"), out=tmp_path / "out")
    figure = scaling.draw(scaling.measure(command))
    assert "on v5e and h100" in figure.get_suptitle()
    ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert ticks == ["v5e:1x1", "v5e:2x4", "h100:2x8"]


def test_an_interrupted_call_asks_for_what_is_missing_alone(asked, tmp_path):
    command = scaling.ScalingCommand(topologies=TOPOLOGIES, out=tmp_path / "out")
    scaling.main(command)
    (tmp_path / "out" / "v5e_2x4_whole.json").unlink()
    asked.clear()
    scaling.main(command)
    assert [words[words.index("--topology") + 1] for words in asked] == ["v5e:2x4"]
    asked.clear()
    scaling.main(scaling.ScalingCommand(out=tmp_path / "out", plot_only=True))
    assert not asked


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("experiments.scaling_on_paper --plot-only --out nowhere", "plot_only: "),
        ("ckl_jax.preflight --topology h1:1 pretrain", "topology: got 'h1:1'"),
    ],
)
def test_no_device_is_looked_for_before_the_compiler_of_another(words, said, tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "rocm", "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-m", *words.split()]
    done = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert f"error: {said}" in done.stderr


def test_other_settings_in_the_same_directory_are_refused(asked, tmp_path):
    scaling.main(scaling.ScalingCommand(topologies=TOPOLOGIES, out=tmp_path / "out"))
    with pytest.raises(ConfigError, match="windows"):
        scaling.main(scaling.ScalingCommand(topologies=TOPOLOGIES, windows=1, out=tmp_path / "out"))


def test_a_preflight_that_fails_is_named_with_its_last_word(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling.subprocess, "run", lambda *_, **__: Done)
    with pytest.raises(ConfigError, match=r"^topologies: preflight failed for v5e:1x1: error: model: got nothing"):
        scaling.main(scaling.ScalingCommand(topologies=TOPOLOGIES, out=tmp_path / "out"))


def test_an_unknown_topology_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"^topology: got 'h100:1x1x1'"):
        scaling.main(scaling.ScalingCommand(topologies=("h100:1x1x1",), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
