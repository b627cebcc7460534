"""tpu_scripts/run_gpu.sh with a python that notes its arguments and ends as planned.

What is to be read before anything runs, a real one reads where READS names it.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from hostile import options_of

from ckl_jax.config import PretrainConfig
from ckl_jax.pretrain import PretrainCommand
from ckl_jax.pretrain import preset as pretrain_preset
from ckl_jax.runtime import cli
from experiments.figure2_pretraining import Figure2Command
from experiments.figure2_pretraining import preset as figure2_preset
from experiments.figure3_pretraining_levels import Figure3Command
from experiments.figure3_pretraining_levels import preset as figure3_preset
from experiments.reproduce.__main__ import ITEMS, ReproduceCommand

UNTIL = 300.0  # Seconds after which a stage that should be at some point counts as stuck.
ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "tpu_scripts" / "run_gpu.sh"
PYTHON = (
    f"#!{sys.executable} -IS"
    + """
import json, os, signal, sys, time
if sys.argv[1].endswith("/parse.py"):
    os.execv(os.environ["READS"], [os.environ["READS"], *sys.argv[1:]]) if "READS" in os.environ else sys.exit()
slow = os.environ.get("SLOW") if sys.argv[2] == os.environ.get("SLOW_IN", sys.argv[2]) else None
if slow == "saves":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if slow == "stays":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[2] == os.environ.get("SAVED_BY"):
    open(os.environ["SAVED"], "w").close()
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
codes = os.environ["CODES"].split()
time.sleep(600 if slow else 0)
sys.exit(int(codes[min(len(open(os.environ["CALLS"]).readlines()), len(codes)) - 1]))
"""
)


@pytest.fixture
def call(tmp_path):
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(*words, codes="0", **more):
        environment = os.environ | {"PYTHON": str(python), "CALLS": str(calls), "CODES": codes} | more
        streams = {"capture_output": True, "text": True}
        done = subprocess.run([SCRIPT, *words], env=environment, cwd=ROOT, timeout=UNTIL, **streams)
        return done, [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []

    return run


@pytest.mark.parametrize(
    ("pretrain", "options", "items"),
    [
        ("--num-steps 20 --warmup-steps 2", "table1: --generations 2\nfigure4: --rounds 2", ""),
        (
            "\n--num-steps 20\n  --warmup-steps 2\n",
            "\ntable1: --generations 2\n \nfigure4: --rounds 2\n\n",
            "table1 figure2\n\tfigure4\nfigure6\n",
        ),
    ],
    ids=["one line", "lines"],
)
def test_a_stage_pretrains_and_reproduces_with_commands_that_exist(call, pretrain, options, items):
    shrunken = {"PRETRAIN": pretrain, "OPTIONS": options, "ITEMS": items}
    done, (first, second) = call("small", "runs/a b", DIGITS="3", SEEDS="4", **shrunken)
    assert done.returncode == 0, done.stderr
    assert (first[:2], second[:2]) == (["-m", "ckl_jax.pretrain"], ["-m", "experiments.reproduce"])
    pretraining = cli.parse(PretrainCommand, pretrain_preset, first[2:])
    reproduction = cli.parse(ReproduceCommand, None, second[2:])
    config = pretraining.config
    assert (config.scale, config.max_digits, config.num_steps, config.target_accuracy) == ("small", 3, 20, 0.99)
    assert pretraining.out == reproduction.checkpoint == pathlib.Path("runs/a b/pretrained/small_N3")
    assert (reproduction.scale, reproduction.seeds) == ("small", 4)
    assert reproduction.items == ("table1", "figure2", "figure4", "figure6")
    assert reproduction.more["table1"] == ["--generations", "2"]
    assert reproduction.more["figure4"] == ["--rounds", "2"]
    figures = {"figure2": (Figure2Command, figure2_preset), "figure3": (Figure3Command, figure3_preset)}
    for name, figure in figures.items():
        found = cli.parse(*figure, ["--scale", "small", *reproduction.more[name]])
        assert found.models.configs == [config], "the model that is there, not another one"


OF_MODELS = dict(options_of(PretrainConfig)).keys() - {"--scale", "--task", "--max-digits"}


@pytest.mark.parametrize("option", [option for option, _ in options_of(PretrainCommand) if option not in OF_MODELS])
@pytest.mark.parametrize("written", ["{} x", "{}=x"])
def test_what_the_figures_cannot_take_is_refused_before_anything_is_trained(call, option, written):
    done, calls = call("small", "runs/x", PRETRAIN=written.format(option))
    assert (done.returncode, calls) == (2, [])
    assert f"allowed are settings of pre-training but {option}" in done.stderr


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"ITEMS": "table1 figure9"}, "items: got ['figure9']"),
        ({"SEEDS": "many"}, "--seeds"),
        ({"SEEDS": "0"}, "seeds: got 0"),
        ({"OPTIONS": "figure4 --rounds 2"}, "options: got ['figure4 --rounds 2']"),
        ({"OPTIONS": "table1: --generations 2\nfigure4: --no-such 1"}, "figure4: Unrecognized options: --no-such, 1"),
        ({"OPTIONS": "figure6: --rounds 0"}, "figure6: rounds: got 0"),
        ({"PRETRAIN": "--embed-dim 7"}, "figure2: "),
    ],
    ids=str,
)
def test_what_an_item_would_refuse_is_refused_before_anything_is_trained(call, setting, said):
    done, calls = call("small", "runs/x", READS=sys.executable, JAX_PLATFORMS="cpu", **setting)
    assert (done.returncode, calls) == (2, []), done.stderr
    assert f"error: {said}" in done.stderr


def test_what_the_items_take_is_run(call):
    shrunken = {"PRETRAIN": "--num-steps 20\n--warmup-steps 2", "OPTIONS": "figure4: --rounds 2 --test-every 1"}
    everything = " ".join(item.name for item in ITEMS)
    done, calls = call("gpt2", "runs/x", READS=sys.executable, JAX_PLATFORMS="cpu", ITEMS=everything, **shrunken)
    assert (done.returncode, len(calls)) == (0, 2), done.stderr


@pytest.mark.parametrize(
    ("codes", "expected", "count"), [("75", 75, 1), ("0 75", 75, 2), ("137", 137, 1), ("0 137", 137, 2), ("2", 2, 1)]
)
def test_its_exit_code_tells_more_to_do_from_a_failure(call, codes, expected, count):
    done, calls = call("gpt2", "runs/x", codes=codes)
    assert (done.returncode, len(calls)) == (expected, count)
    assert ("the same command goes on" in done.stdout) == (expected == 75)


MODULES = ["ckl_jax.pretrain", "experiments.reproduce"]


@pytest.mark.parametrize(
    ("slow", "slow_in", "saved_by", "name"),
    [
        ("saves", MODULES[0], MODULES[0], "7.sha256.json"),
        ("stays", MODULES[0], MODULES[0], "7.sha256.json"),
        ("dies", MODULES[1], MODULES[1], "results.json"),
        ("stays", MODULES[1], MODULES[0], "params.sha256.json"),
        ("stays", MODULES[0], "nobody", ""),
        ("saves", MODULES[1], "nobody", ""),
        ("dies", MODULES[1], "nobody", ""),
        ("saves", MODULES[1], MODULES[1], "reproduce.json"),
    ],
)
def test_a_stage_ends_in_time_and_there_is_more_to_do_only_if_it_has_saved_something(
    call, tmp_path, slow, slow_in, saved_by, name
):
    directory = tmp_path / "made"
    directory.mkdir()
    for earlier in ("1.sha256.json", "results.json"):
        (directory / earlier).touch()
        os.utime(directory / earlier, (1, 1))
    times = {"STAGE_SECONDS": "3", "GRACE_SECONDS": "1" if slow == "stays" else "60"}
    saved = {"SAVED_BY": saved_by, "SAVED": str(directory / name)}
    done, calls = call("small", str(directory), SLOW=slow, SLOW_IN=slow_in, **times, **saved)
    goes_on = name.endswith(("sha256.json", "results.json"))
    assert (done.returncode, len(calls)) == (75 if goes_on else 2, 1 + MODULES.index(slow_in)), done.stderr
    assert ("the same command goes on" in done.stdout) == goes_on
    assert (f"STAGE_SECONDS: got 3, in which {slow_in} saved nothing; allowed is more" in done.stderr) != goes_on


READERS = {"read": "", "died": "2>&1 | head -0", "full": ">/dev/full 2>/dev/full", "closed": "<&- >&- 2>&-"}


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM])
@pytest.mark.parametrize("streams", READERS)
def test_a_signal_to_all_saves_the_work_and_ends_the_stage_whoever_reads(tmp_path, call, streams, number):
    saved, code = tmp_path / "saved", tmp_path / "code"
    waiting = f"""#!{sys.executable} -IS
import pathlib, signal, sys, time
if sys.argv[1].endswith("/parse.py"):
    sys.exit()
def save(*_):
    pathlib.Path({str(saved)!r}).write_text("done")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
pathlib.Path({str(tmp_path / "began")!r}).touch()
time.sleep(600)
"""
    (tmp_path / "python").write_text(waiting)
    outlive = "trap : HUP INT QUIT TERM"
    process = subprocess.Popen(
        ["bash", "-c", f"{outlive}; {{ {outlive}; {SCRIPT} small x; echo $? >{code}; }} {READERS[streams]}"],
        env=os.environ | {"PYTHON": str(tmp_path / "python")},
        cwd=tmp_path,
        start_new_session=True,
        preexec_fn=lambda: [
            signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
        ],
    )
    end = time.monotonic() + UNTIL
    while not (tmp_path / "began").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    for _ in range(3):
        os.killpg(process.pid, number)
        time.sleep(0.05)
    process.wait(UNTIL)
    while not code.exists() or not code.read_text():
        assert time.monotonic() < end
        time.sleep(0.02)
    assert (int(code.read_text()), saved.read_text()) == (128 + number, "done")


def test_a_dry_run_calls_nothing(call):
    done, calls = call("--dry-run", "small", "runs/a b")
    assert done.returncode == 0
    assert calls == []
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.parametrize("words", [(), ("small",), ("tiny", "runs/x"), ("small", "runs/x", "more")])
def test_bad_arguments_are_refused_before_anything_runs(call, words):
    done, calls = call(*words)
    assert (done.returncode, calls) == (2, [])
    assert done.stderr.startswith("run_gpu.sh: got ")


@pytest.mark.parametrize(
    "setting", [{"STAGE_SECONDS": "0"}, {"STAGE_SECONDS": "soon"}, {"DIGITS": "x"}, {"ITEMS": " \n"}]
)
def test_bad_settings_are_refused_before_anything_runs(call, setting):
    done, calls = call("small", "runs/x", **setting)
    assert (done.returncode, calls) == (2, [])
