"""Bad input to every command: one line that names the field and what is allowed, exit code 2, and nothing touched."""

import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from hostile import CANARY, PICKLE, TYPES, CompiledError, refusal, refused_command, saved_model

from ckl_jax.checkpoint import manifest

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results" / "tiny"
WITHOUT_OUT = ("ckl_jax.evaluate", "ckl_jax.models", "ckl_jax.check_xla", "ckl_jax.preflight")
WITH_OUT = [name for name in TYPES if name not in WITHOUT_OUT]
WITH_CHECKPOINT = [
    name
    for name in TYPES
    if name.rpartition(".")[2].split("_")[0] in ("finetune", "evaluate", "figure1", "figure4", "figure5", "figure6")
] + [
    f"experiments.{name}"
    for name in (
        *("critical_token_discovery", "controls", "spared_tokens", "minibatches", "regularizers", "reproduce"),
        "profile_round",
    )
]
PLOT_ONLY = [f"experiments.figure{name}" for name in ("1_scratchpad", "2_pretraining", "3_pretraining_levels")]
PLOT_ONLY += [f"experiments.{name}" for name in ("figure7_critical_tokens", "critical_token_discovery", "regularizers")]
PLOT_ONLY += [f"experiments.{name}" for name in ("table1_certainty_gap", "figure5_certainty_colors", "minibatches")]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def here(good, tmp_path, monkeypatch):
    """A working directory with a model, a file, and a link to itself."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(good, tmp_path / "model")
    (tmp_path / "file").write_text("not yours")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


def test_what_is_not_refused_is_stopped_where_it_compiles(here):
    with pytest.raises(CompiledError), refusal(here):
        jax.jit(lambda x: x + 12345)(np.float32(1))


def test_every_command_is_in_the_table():
    modules = [path for package in ("ckl_jax", "experiments") for path in (ROOT / package).rglob("*.py")]
    runs = re.compile(r"cli\.run\((functools\.partial\()?main")
    files = [path.relative_to(ROOT).with_suffix("") for path in modules if runs.search(path.read_text())]
    with_main = {".".join(part for part in path.parts if part != "__main__") for path in files}
    # Not for users; in test_tunix.py, as its package is not in the extra test.
    elsewhere = {"experiments.benchmark.process", "experiments.tunix_grpo"}
    assert with_main == set(TYPES) | elsewhere


def _words(arguments):
    return arguments.split() if isinstance(arguments, str) else arguments


PRINTABLE = "allowed is one or more printable characters"
SEEN = "allowed is a path that the system can look at"


@pytest.mark.parametrize("name", WITH_OUT)
@pytest.mark.parametrize(
    ("out", "expected"),
    [
        ("", rf"--out: path: got '', {PRINTABLE}"),
        ("a\nb", rf"--out: path: got 'a\\nb', {PRINTABLE}"),
        ("a\0b", rf"--out: path: got 'a\\x00b', {PRINTABLE}"),
        ("\udcff", rf"--out: path: got '\\udcff', {PRINTABLE}"),
        ("x" * 300, rf"--out: path: got '[x ]+\.\.\., {SEEN} \(File name too long\)"),
        ("loop/x", rf"--out: path: got 'loop/x', {SEEN} \(Too many levels of symbolic links\)"),
        ("s3://a/b", r"--out: path: got s3://a/b, allowed are local paths and gs://bucket/directory"),
        ("file/x", r"out: got '\S*file/x', allowed is a directory, or a place for a new one, which \S*file is not"),
        ("new/../file/x", r"out: got '\S*file/x', allowed is a directory, or a place .* which \S* is not"),
    ],
    ids=["empty", "newline", "NUL", "bytes", "long", "loop", "bucket", "below a file", ".."],
)
def test_a_place_where_nothing_can_be_written_is_refused(here, capsys, monkeypatch, name, out, expected):
    refused_command(here, capsys, monkeypatch, name, ["--out", out], expected)


@pytest.mark.parametrize("name", TYPES)
def test_an_unknown_option_is_refused(here, capsys, monkeypatch, name):
    refused_command(
        here, capsys, monkeypatch, name, ["--no-such-option", "1"], "Unrecognized options: --no-such-option, 1"
    )


NO_MODEL = r"{}: got '\S*{}', allowed is a directory with params/, params\.sha256\.json and model\.json, "
NO_MODEL += r"as python -m ckl_jax\.pretrain writes it, or the name of a model that ships: .*"


@pytest.mark.parametrize("path", ["nowhere", "file", "model/../model/params", "."])
@pytest.mark.parametrize("name", [*WITH_CHECKPOINT, "experiments.table1_certainty_gap"])
def test_what_is_no_checkpoint_is_refused(here, capsys, monkeypatch, name, path):
    option = "--checkpoints" if name.endswith("table1_certainty_gap") else "--checkpoint"
    expected = NO_MODEL.format(option[2:], "" if path == "." else pathlib.Path(path).name)
    refused_command(here, capsys, monkeypatch, name, [option, path], expected)


@pytest.mark.parametrize("name", [*WITH_CHECKPOINT, "experiments.table1_certainty_gap"])
def test_a_checkpoint_of_a_stranger_is_refused(here, capsys, monkeypatch, name):
    option = "--checkpoints" if name.endswith("table1_certainty_gap") else "--checkpoint"
    description = json.loads((here / "model" / "model.json").read_text())
    description["model"]["num_layers"] = 10**9
    (here / "model" / "model.json").write_text(json.dumps(description))
    said = rf"{option[2:]}: \S*model\.json is no model description \(num_layers: got 1000000000, allowed is .*\)"
    refused_command(here, capsys, monkeypatch, name, [option, "model"], said)


BELOW_A_FILE = r"got 'file/x', allowed is a directory, or a place for a new one, which \S*file is not"
NUMBER_32 = r"allowed is .*, and what 32 bits can hold"


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        (
            "ckl_jax.pretrain",
            "--model.num-layers 1000000000",
            r"model: num_layers: got 10{9}, allowed is .*at most 1000",
        ),
        (
            "ckl_jax.pretrain",
            "--model.width 1000000000",
            r"model: width: got 10{9}, allowed is what makes at most 1e\+10 .*",
        ),
        (
            "ckl_jax.pretrain",
            "--model.num-layers -3",
            r"model: num_layers: got -3, allowed is at least 1, at most 1000",
        ),
        ("ckl_jax.pretrain", "--batch-size 1e3", r"--batch-size: invalid literal for int\(\) with base 10: '1e3'"),
        ("ckl_jax.pretrain", "--seed 99999999999", rf"seed: got 9{{11}}, {NUMBER_32}"),
        ("ckl_jax.pretrain", "--data-dir file/x", f"data_dir: {BELOW_A_FILE}"),
        ("ckl_jax.finetune", "--seeds 1000000000", r"seeds: got 10{9}, allowed is at least 1, at most 1000"),
        (
            "ckl_jax.finetune",
            "--checkpoint model --extra-digits 2",
            r"extra_digits: got 2, allowed is what fits the model: .*",
        ),
        ("ckl_jax.evaluate", "--temperature inf", rf"temperature: got inf, {NUMBER_32}, or None"),
        ("ckl_jax.evaluate", "--problems 1.5", r"--problems: invalid literal for int\(\) with base 10: '1\.5'"),
        ("experiments.figure1_scratchpad", "--a -1", r"a: got -1, allowed is an integer from 0, of at most 18 digits"),
        ("experiments.figure1_scratchpad", "--a 5 --b 5", r"a: got 5, allowed is an operand .* more than the 5 .*"),
        ("experiments.figure1_scratchpad", "--temperature nan", r"temperature: got nan, allowed is above 0.*, or None"),
        ("experiments.figure1_scratchpad", "--temperature inf", r"temperature: got inf, allowed is above 0.*, or None"),
        ("experiments.figure2_pretraining", "--digits 5 4", r"digits: got \(5, 4\), allowed is .* ascending"),
        ("experiments.figure2_pretraining", "--digits 17", r".*digits.*"),
        ("experiments.figure2_pretraining", "--pretrained file/x", f"pretrained: {BELOW_A_FILE}"),
        ("experiments.figure2_pretraining", "--data-dir file/x", f"data_dir: {BELOW_A_FILE}"),
        (
            "experiments.figure3_pretraining_levels",
            "--extra-digits 3",
            r"extra_digits: got \(3,\), allowed is 1, 2, .*",
        ),
        ("experiments.figure3_pretraining_levels", "--seeds 0", r"seeds: got 0, allowed is at least 1, at most 1000"),
        ("experiments.figure4_prioritized_kl", "--log-to csv", r"invalid choice 'csv' for argument '--log-to'\. .*"),
        ("experiments.figure4_prioritized_kl", "--beta 0", r"beta: got 0\.0, allowed is above 0, .*"),
        ("experiments.figure5_certainty_colors", "--generations 0", r"generations: got 0, allowed is at least 1"),
        (
            "experiments.figure5_certainty_colors",
            "--finetuned nowhere",
            NO_MODEL.format("finetuned", "nowhere"),
        ),
        ("experiments.figure6_beta_sweep", "--betas 10 nan", r"betas: got nan, allowed is above 0"),
        ("experiments.figure6_beta_sweep", "--betas", r"(--betas: .*|betas: got \(\), allowed is .*)"),
        (
            "experiments.figure7_critical_tokens",
            "--run nowhere",
            r"run: got 'nowhere', allowed is a finished run of: .*",
        ),
        ("experiments.table1_certainty_gap", "--temperature inf", r"temperature: got inf, allowed is above 0.*"),
        ("experiments.table1_certainty_gap", "--checkpoints", r"(--checkpoints: .*|checkpoints: got \(\), allowed .*)"),
        ("experiments.critical_token_discovery", "--digits 19", r"digits: got 19, allowed is 1\.\.18, or None"),
        (
            "experiments.critical_token_discovery",
            "--least-gap nan",
            r"least_gap: got nan, allowed is at least 0, at most 1",
        ),
        ("experiments.critical_token_discovery", "--answers 0", r"answers: got 0, allowed is at least 1"),
        ("experiments.controls", "--seeds -1", r"seeds: got -1, allowed is at least 1, at most 1000"),
        (
            "experiments.figure2_pretraining",
            "--pretrain.max-digits 6",
            r"pretrain\.max_digits: got 6, allowed is one of .*",
        ),
        (
            "experiments.figure3_pretraining_levels",
            "--finetune.extra-digits 2",
            r"finetune\.extra_digits: got 2, allowed is none \(1\): extra_digits has the targets",
        ),
        ("experiments.figure3_pretraining_levels", "--finetune.recipe secret", r"recipe: got 'secret', allowed is .*"),
        ("experiments.controls", "--kl-target 0.1", r"kl_target: got 0\.1, allowed is None, .*"),
        ("experiments.controls", "--grid nan", r"grid: got nan, allowed is .*"),
        ("experiments.spared_tokens", "--beta 0", r"beta: got 0\.0, allowed is above 0"),
        ("experiments.regularizers", "--methods k4", r"methods: got \['k4'\], allowed is standard \| prioritized .*"),
        ("experiments.regularizers", "--grid -1", r"grid: got \(-1\.0,\), allowed is .*"),
        ("experiments.regularizers", "--leaders 200", r"leaders: got 200, allowed is 0 to \d+, .*"),
        ("experiments.reproduce", "--items figure9", r"items: got \['figure9'\], allowed is figure1 \| .*"),
        (
            "experiments.reproduce",
            ["--options", 'figure1: "x'],
            r"options: got .*, allowed is what a shell can split .*",
        ),
        ("experiments.reproduce", "--scale gpt2", r"checkpoint: got None, allowed is a directory that .* wrote"),
        ("experiments.benchmark", "--sections rolout", r"sections: got 'rolout', allowed is rollout, .*"),
        ("experiments.benchmark", "--repeats 0", r"repeats: got 0, allowed is at least 1, or None"),
        (
            "experiments.benchmark",
            "--quick --sections memory --policies nowhere",
            NO_MODEL.format("policies", "nowhere"),
        ),
    ],
    ids=lambda value: " ".join(_words(value))[:60].rpartition(".")[2] if value else "",
)
def test_a_value_that_cannot_work_is_refused(here, capsys, monkeypatch, name, arguments, expected):
    refused_command(here, capsys, monkeypatch, name, _words(arguments), expected)


DAMAGED = r"\S*{} is damaged \(.*\); allowed is .*"


@pytest.mark.parametrize("name", PLOT_ONLY)
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"config": {"command": "COMMAND"}}', "plot_only: " + DAMAGED.format(r"results\.json")),
        ("[]", r"out: got '\S*earlier', allowed is a directory without another command's results\.json \(here: .*\)"),
        ('{"config": 7}', r"out: got '\S*earlier', allowed is a directory without another command's results\.json .*"),
        ('{"half', "out: " + DAMAGED.format(r"results\.json")),
        ("[" * 100_000, "out: " + DAMAGED.format(r"results\.json")),
    ],
    ids=["empty", "list", "junk", "half", "deep"],
)
def test_results_that_no_command_wrote_are_refused_and_kept(here, capsys, monkeypatch, name, content, expected):
    (here / "earlier").mkdir()
    (here / "earlier" / "results.json").write_text(content.replace("COMMAND", name))
    refused_command(here, capsys, monkeypatch, name, ["--plot-only", "--out", "earlier"], expected)


@pytest.mark.parametrize(
    ("name", "published", "field", "value"),
    [
        ("experiments.figure1_scratchpad", "figure1", "text", [None]),
        ("experiments.figure1_scratchpad", "figure1", "prompt", 7),
        ("experiments.figure7_critical_tokens", "figure7", "tokens", [None]),
        ("experiments.figure7_critical_tokens", "figure7", "episodes", [0]),
        ("experiments.table1_certainty_gap", "table1", "models", [{"delta_j": 7}]),
        ("experiments.figure5_certainty_colors", "figure5", "policies", {"Before RL": [None]}),
        ("experiments.figure5_certainty_colors", "figure5", "max_pretrain_digits", "5"),
        ("experiments.critical_token_discovery", "discovery", "types", {"a": 1}),
        ("experiments.critical_token_discovery", "discovery", "probes", [7]),
        ("experiments.critical_token_discovery", "discovery", "wall_seconds", [None]),
    ],
)
def test_results_with_one_field_of_junk_are_refused_and_kept(here, capsys, monkeypatch, name, published, field, value):
    results = json.loads((RESULTS / published / "results.json").read_text())
    (here / "earlier").mkdir()
    (here / "earlier" / "results.json").write_text(json.dumps(results | {field: value}))
    expected = "plot_only: " + DAMAGED.format(r"earlier/results\.json")
    refused_command(here, capsys, monkeypatch, name, ["--plot-only", "--out", "earlier"], expected)


@pytest.mark.parametrize(
    ("config", "metrics", "expected"),
    [
        ([], "", r"run: config\.json is not figure 4's \(.*\); allowed is a finished run of: .*"),
        (
            {"seeds": 10**9, "config": {"episodes": 1, "rounds": 10**9, "seed": 0, "extra_digits": 1}},
            "",
            r"run: got '20{18} or more of 20{18} rounds missing', allowed is a finished run of: .*",
        ),
        (
            {"seeds": 1, "config": {"episodes": 1, "rounds": 1, "seed": 0, "extra_digits": 1}},
            "".join(
                json.dumps({"arm": arm, "seed": 0, "step": 1, "critical_count_3x2xC": 7}) + "\n"
                for arm in ("standard", "prioritized")
            ),
            "run: " + DAMAGED.format("run"),
        ),
    ],
    ids=["list", "enormous", "junk"],
)
def test_a_run_that_no_command_wrote_is_refused(here, capsys, monkeypatch, config, metrics, expected):
    (here / "run").mkdir()
    for name, content in {"config.json": json.dumps(config), "metrics.jsonl": metrics, "results.json": "{}"}.items():
        (here / "run" / name).write_text(content)
    refused_command(here, capsys, monkeypatch, "experiments.figure7_critical_tokens", ["--run", "run"], expected)


@pytest.mark.parametrize("content", ["[1]", '{"figure1": 7}', '{"figure1"', "[" * 100_000])
def test_notes_that_reproduce_did_not_write_are_refused(here, capsys, monkeypatch, content):
    (here / "earlier").mkdir()
    (here / "earlier" / "reproduce.json").write_text(content)
    damaged = r"out: (got '\S*reproduce\.json', allowed is a directory of an earlier call|\S+ is damaged .*)"
    refused_command(here, capsys, monkeypatch, "experiments.reproduce", ["--out", "earlier"], damaged)


@pytest.mark.parametrize("content", [b"[]", b"{}", PICKLE, b"[" * 100_000], ids=["list", "empty", "pickle", "deep"])
@pytest.mark.parametrize(
    "name", ["ckl_jax.pretrain", "ckl_jax.finetune", "experiments.controls", "experiments.regularizers"]
)
def test_a_config_of_another_make_is_refused_and_kept(here, capsys, monkeypatch, name, content):
    (here / "run").mkdir()
    (here / "run" / "config.json").write_bytes(content)
    another = r"out: \S*run holds a run with another config \(differing: .*\); allowed is .*"
    refused_command(here, capsys, monkeypatch, name, ["--out", "run"], rf"({another}|out: \S+ is damaged .*)")


def test_processes_print_that_one_line_and_end_with_2(here):
    (here / "model" / "params" / "_METADATA").write_bytes(PICKLE)
    manifest.write(here / "model" / "params")
    calls = {
        ("ckl_jax.evaluate", "--checkpoint", "model"): r"error: checkpoint: .* allowed is .*\n",
        ("experiments.figure7_critical_tokens", "--run", "a\nb"): rf"error: --run: path: got 'a\\nb', {PRINTABLE}\n",
    }
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with refusal(here):
        for call, expected in calls.items():
            done = subprocess.run([sys.executable, "-m", *call], capture_output=True, text=True, env=environment)
            assert (done.returncode, done.stdout) == (2, "")
            assert re.fullmatch(expected, done.stderr), done.stderr
    assert not (here / CANARY).exists()


def test_without_tunix_its_command_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tunix", None)
    with pytest.raises(SystemExit, match=r"^tunix: .* uv run --group tunix python -m experiments\.tunix_grpo$"):
        runpy.run_module("experiments.tunix_grpo", run_name="__main__")
