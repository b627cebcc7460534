"""Every file that a command reads, damaged in every way: one line that names where it lies, or it was not needed."""

import json
import pathlib
import re
import shutil
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from damage import each
from hostile import command_of, saved_model, snapshot

from ckl_jax import pretrain as pretrain_lib
from ckl_jax.analysis import plots
from ckl_jax.rl import setup
from ckl_jax.runs import logbook
from ckl_jax.runtime import cli, preemption
from experiments.common import figure

# Orbax leaves threads of its own behind when a read fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
RESULTS = pathlib.Path(__file__).parents[1] / "experiments" / "results" / "tiny"
FINETUNE = "--checkpoint model --out run --rounds 2 --test-every 1 --episodes 2 --minibatch-episodes 2"
FINETUNE += " --diagnostic-episodes 1 --extra-length 0 --final-problems 2 --test-problems 2 --old-problems 2"
PRETRAIN = "--max-digits 1 --num-documents 10 --num-steps 6 --warmup-steps 1 --checkpoint-every 2 --batch-size 2"
PRETRAIN += " --eval-problems 1 --packing documents --optimizer adamw --model.num-layers 1 --model.num-heads 1"
PRETRAIN += " --model.width 4 --model.block-size 280 --out run --data-dir data"


class WentOnError(BaseException):
    """The command has read what it needs."""


def _go_on(*_, **__):
    raise WentOnError


class Answered:
    def __init__(self):
        self.accuracy = {"target": np.zeros(1), "old": np.zeros(1)}

    def samples(self, row):
        return [{"sample": 0, "problem": "1+1", "answer": "x", "reward": 0.0}]


def _run(name, arguments, monkeypatch):
    module, config_type, preset = command_of(name)
    monkeypatch.setattr(sys, "argv", [name, *arguments.split()])
    cli.run(module.main, config_type, preset)


def _ended(name, arguments, monkeypatch, capsys):
    """Exit code and standard error of a command, or None where it went on."""
    try:
        _run(name, arguments, monkeypatch)
    except SystemExit as stop:
        return stop.code, capsys.readouterr().err
    except WentOnError:
        pass
    finally:
        plt.close("all")
    capsys.readouterr()
    return None


@pytest.fixture
def finetuned(tmp_path, monkeypatch):
    """A run whose rounds do nothing, stopped after the first of two."""
    monkeypatch.chdir(tmp_path)
    saved_model(tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(logbook, "test", lambda *_: Answered())
        done = iter([({"success": np.zeros((1, 1)), "kl": np.zeros((1, 1))},)])
        patch.setattr(setup, "train_rounds", lambda program, mesh, ref, states, *_: (states, *next(done)))
        patch.setattr(preemption, "requested", lambda *_: not done.__length_hint__())
        with pytest.raises(SystemExit):
            _run("ckl_jax.finetune", FINETUNE, patch)
    monkeypatch.setattr(setup, "train_rounds", _go_on)
    return "ckl_jax.finetune", FINETUNE


@pytest.fixture
def pretrained(tmp_path, monkeypatch):
    """A run whose steps do nothing, stopped between two checkpoints."""
    monkeypatch.chdir(tmp_path)
    metrics = {"loss": np.float32(1), "grad_norm": np.float32(1)}
    with monkeypatch.context() as patch:
        patch.setattr(pretrain_lib, "judge", lambda *_, **__: np.ones(1))
        patch.setattr(pretrain_lib, "train_step", lambda config, state, stream: (state, metrics))
        patch.setattr(preemption, "requested", lambda step=0: step == 3)
        with pytest.raises(SystemExit):
            _run("ckl_jax.pretrain", PRETRAIN, patch)
    monkeypatch.setattr(pretrain_lib, "train_step", _go_on)
    return "ckl_jax.pretrain", PRETRAIN


WRITTEN = {f"run/{name}" for name in ("config.json", "metrics.jsonl", "samples.jsonl", "seconds.jsonl", ".lock")}
OF_ARRAYS = {"deleted", "other JSON b'[]'"}  # Their manifest catches all that changes a file.
NOT_READ = {"seconds.jsonl", ".lock"}


@pytest.mark.parametrize("kind", [pytest.param("finetuned", marks=pytest.mark.slow), "pretrained"])
def test_a_run_with_a_damaged_file_is_refused_in_one_line_or_goes_on_and_nothing_is_lost(
    kind, request, tmp_path, monkeypatch, capsys
):
    name, arguments = request.getfixturevalue(kind)
    assert _ended(name, arguments, monkeypatch, capsys) is None
    kept, refused, went_on = tmp_path.parent / f"kept {kind}", set(), []
    shutil.copytree(tmp_path, kept)
    steps = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.is_dir())
    for path, way in each(tmp_path):
        place = path.relative_to(tmp_path)
        if f"checkpoints/{steps[0]}" in str(place) or place.parts[0] == "data" or place.name == ".lock":
            continue
        if {"checkpoints", "params"} & {*place.parts} and way not in OF_ARRAYS:
            continue
        before = snapshot(tmp_path)
        ended = _ended(name, arguments, monkeypatch, capsys)
        changed = {file for file, content in snapshot(tmp_path).items() if before.get(file) != content}
        if ended is None:
            went_on.append((place.name, way))
            assert changed <= WRITTEN, (place, way)
            for file in changed:
                shutil.copy(kept / file, tmp_path / file)
            continue
        code, said = ended
        refused.add(str(place))
        assert code in (1, 2), (place, way, said)
        assert re.fullmatch(rf"error: [^\n]*{tmp_path}/{place.parts[0]}[^\n]*\n", said), (place, way, said)
        assert changed <= {"run/.lock"}, (place, way, changed)
    read = {file for file in snapshot(kept) if (kept / file).is_file() and f"checkpoints/{steps[0]}" not in file}
    read = {file for file in read if not file.startswith("data") and pathlib.Path(file).name not in NOT_READ}
    assert read - refused == set()
    print(went_on)


@pytest.mark.parametrize("kind", ["finetuned", "pretrained"])
def test_a_run_goes_on_where_it_was_moved_copied_or_linked_to(kind, request, tmp_path, monkeypatch, capsys):
    name, arguments = request.getfixturevalue(kind)
    (tmp_path / "run").rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "copied")
    (tmp_path / "linked").symlink_to("moved")
    for place in ("moved", "copied", "linked"):
        assert _ended(name, arguments.replace("--out run", f"--out {place}"), monkeypatch, capsys) is None


def test_a_run_cut_at_a_whole_line_is_no_finished_one(tmp_path, monkeypatch, capsys):
    shutil.copytree(RESULTS / "figure4", tmp_path / "run", ignore=shutil.ignore_patterns("*.png", "*.svg"))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    half = [line for line in lines if json.loads(line)["step"] <= 7]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(half))
    before = snapshot(tmp_path)
    arguments = f"--plot-only --out {tmp_path / 'run'}"
    said = r"error: plot_only: got '\S+run', allowed is the directory of a run that has done its 14 rounds\n"
    code, err = _ended("experiments.figure4_prioritized_kl", arguments, monkeypatch, capsys)
    assert (code, bool(re.fullmatch(said, err))) == (2, True), err
    assert snapshot(tmp_path) == before


PLOTTED = {
    "figure1": "figure1_scratchpad",
    "figure2": "figure2_pretraining",
    "figure3": "figure3_pretraining_levels",
    "figure4": "figure4_prioritized_kl",
    "figure4_subtraction": "figure4_prioritized_kl --task subtraction",
    "figure4_multiplication": "figure4_prioritized_kl --task multiplication",
    "figure5": "figure5_certainty_colors",
    "figure6": "figure6_beta_sweep",
    "figure7": "figure7_critical_tokens",
    "table1": "table1_certainty_gap",
    "discovery": "critical_token_discovery",
    "freed_pressure": "freed_pressure",
    "minibatches": "minibatches",
    "regularizers": "regularizers",
}


def test_every_published_directory_is_in_the_table():
    assert {path.name for path in RESULTS.iterdir()} == {*PLOTTED, "reproduce"}


OF_A_RUN = "seeds test_episodes round_episodes arms claims"
MAY_LACK = {
    "figure1": "critical_in_right_answer probability seeds claims device platform wall_seconds",
    "figure2": "seeds claims device platform",
    "figure3": "seeds claims device platform",
    "figure4": f"{OF_A_RUN} paired_difference",
    "figure4_subtraction": f"{OF_A_RUN} paired_difference",
    "figure4_multiplication": f"{OF_A_RUN} paired_difference",
    "figure5": "seeds verdict claims device platform",
    "figure6": f"{OF_A_RUN} betas",
    "figure7": "claims device platform wall_seconds",
    "table1": "definition paper seeds claims device platform",
    "discovery": "open_candidates device platform",
    "freed_pressure": "device platform wall_seconds",
    "minibatches": "test_episodes round_episodes pairs device platform wall_seconds",
    "regularizers": "confirmation device platform",
}
"""Keys of results.json: nothing shown comes from them, they are found again, or a screen alone lacks them."""
LONG = ("figure1", "figure4", "figure4_subtraction", "figure4_multiplication", "figure5", "figure6", "regularizers")


@pytest.mark.parametrize(
    "published", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in PLOTTED]
)
def test_published_results_plot_and_damaged_ones_are_refused_in_one_line(published, tmp_path, monkeypatch, capsys):
    module, _, options = PLOTTED[published].partition(" ")
    name, directory = f"experiments.{module}", tmp_path / published
    shutil.copytree(RESULTS / published, directory, ignore=shutil.ignore_patterns("*.png", "*.svg", "*_*"))
    monkeypatch.setattr(figure.hosts, "write_json", _go_on)
    arguments = f"--plot-only --out {directory} {options}"
    assert _ended(name, arguments, monkeypatch, capsys) is None
    reads_a_run = "figure4" in published or published == "figure6"
    for path, way in each(directory):
        if path.name in ("results.json", "config.json", "metrics.jsonl")[: 3 if reads_a_run else 1]:
            before = snapshot(directory)
            ended = _ended(name, arguments, monkeypatch, capsys)
            assert snapshot(directory) == before, (path.name, way)
            if ended is None:
                assert way in ("one byte less", "one bit"), (path.name, way)
                continue
            code, said = ended
            assert code == 2, (path.name, way, said)
            assert re.fullmatch(rf"error: [^\n]*{directory}[^\n]*\n", said), (path.name, way, said)
    results = json.loads((directory / "results.json").read_text())
    (directory / "results.json").write_text(json.dumps(results | {"of a later version": [1]}))
    assert _ended(name, arguments, monkeypatch, capsys) is None
    lacking = set()
    for key in results:
        (directory / "results.json").write_text(json.dumps({name: results[name] for name in results if name != key}))
        ended = _ended(name, arguments, monkeypatch, capsys)
        if ended is None:
            lacking.add(key)
        else:
            assert ended[0] == 2, (key, ended)
            assert re.fullmatch(rf"error: [^\n]*{directory}[^\n]*\n", ended[1]), (key, ended)
    assert lacking == {*MAY_LACK[published].split()}


READERS = {
    "figure7": ("figure7_critical_tokens", "--run {} --out new", ("config.json", "metrics.jsonl", "results.json")),
    "regularizers": ("regularizers", "--earlier {} --out new --screen-only True", ("results.json",)),
    "report": ("reproduce", "--report-only True --out {}", ("reproduce.json",)),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_another_command_wrote_is_read_whole_or_refused_in_one_line(reader, tmp_path, monkeypatch, capsys):
    module, options, names = READERS[reader]
    name, directory = f"experiments.{module}", tmp_path / "earlier"
    published = {"figure7": "figure4", "regularizers": "regularizers", "report": "reproduce"}[reader]
    shutil.copytree(RESULTS / published, directory, ignore=shutil.ignore_patterns("*.png", "*.svg", "kl_cov"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "save", _go_on)
    for ends, function in (("regularizers", "run_stage"), ("reproduce", "write_report")):
        if module == ends:
            monkeypatch.setattr(command_of(name)[0], function, _go_on)
    arguments = options.format(directory)
    assert _ended(name, arguments, monkeypatch, capsys) is None
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
    for path, way in each(directory):
        if path.name not in names:
            continue
        before = snapshot(tmp_path)
        ended = _ended(name, arguments, monkeypatch, capsys)
        if ended is None:
            harmless = reader == "report" and way in ("deleted", "a dangling link", "other JSON b'{}'")
            assert harmless or way in ("one byte less", "one bit"), (path.name, way)
            shutil.rmtree(tmp_path / "new", ignore_errors=True)
        else:
            assert ended[0] == 2, (path.name, way, ended)
            assert re.fullmatch(rf"error: [^\n]*{directory}[^\n]*\n", ended[1]), (path.name, way, ended)
            assert snapshot(tmp_path) == before, (path.name, way)


def test_a_report_with_damaged_results_names_them_and_writes_no_half_page(tmp_path, monkeypatch, capsys):
    for published in ("figure1", "figure4", "table1", "figure3"):
        (tmp_path / published).mkdir()
        shutil.copy(RESULTS / published / "results.json", tmp_path / published)
    assert _ended("experiments.reproduce", f"--report-only True --out {tmp_path}", monkeypatch, capsys) is None
    page = (tmp_path / "report.html").read_bytes()
    for path, way in each(tmp_path):
        if path.name != "results.json":
            continue
        ended = _ended("experiments.reproduce", f"--report-only True --out {tmp_path}", monkeypatch, capsys)
        if ended is not None:
            assert ended[0] in (1, 2), (path, way, ended)
            assert ended[1].count("\n") <= 1, (path, way, ended)
        assert (tmp_path / "report.html").read_bytes().endswith(page[-20:]), (path, way)
