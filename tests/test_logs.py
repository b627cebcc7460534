"""Logs: copies in TensorBoard and Weights & Biases hold metrics.jsonl, samples are what was sampled, quiet is quiet."""

import contextlib
import dataclasses
import html
import io
import json
import re
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import wandb
from policies import SCRIPT_MODEL, policy, scripted_policy, untrained
from tensorboardX.proto.event_pb2 import Event
from wandb.proto.wandb_internal_pb2 import Record

from ckl_jax import finetune
from ckl_jax.checkpoint.states import StateCheckpoints
from ckl_jax.checkpoint.store import Model, save_model
from ckl_jax.config import FinetuneConfig
from ckl_jax.errors import ConfigError
from ckl_jax.rl import evaluation
from ckl_jax.rl.program import TEST_SEED, make_program
from ckl_jax.runs import logs
from ckl_jax.runs.directory import RunDirectory
from ckl_jax.runs.logs import LogOptions
from ckl_jax.runs.progress import Status, display
from ckl_jax.runtime import paths
from ckl_jax.tasks import alphabet, problems
from ckl_jax.tasks.columns import ADDITION

CONFIG = FinetuneConfig(
    extra_length=0,
    episodes=4,
    minibatch_episodes=2,
    diagnostic_episodes=2,
    rounds=4,
    test_every=2,
    test_problems=3,
    final_problems=4,
    old_problems=2,
    seed=3,
    rollout="plain",
    data_devices=1,
)


@pytest.fixture(scope="module")
def make(small_model, tmp_path_factory):
    """Runs the command in a directory and gives what it prints; Weights & Biases stays offline."""
    checkpoint = tmp_path_factory.mktemp("model")
    save_model(checkpoint, Model(small_model, 1, policy(small_model)), {})

    def run(out, **logs):
        command = finetune.FinetuneCommand(CONFIG, checkpoint, out, 2, LogOptions(**logs))
        with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
            patch.setenv("WANDB_MODE", "offline")
            finetune.main(command)
        return printed.getvalue().splitlines()

    return run


@pytest.fixture(scope="module")
def whole(make, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, make(out, log_to=("tensorboard", "wandb"), quiet=True)


@pytest.fixture(scope="module")
def resumed(make, tmp_path_factory):
    """Stopped with round 2 logged but not saved; it goes on with Weights & Biases too."""
    out = tmp_path_factory.mktemp("resumed")
    save = StateCheckpoints.save

    def interrupted_save(self, step, state):
        if step == 2:
            raise KeyboardInterrupt
        save(self, step, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StateCheckpoints, "save", interrupted_save)
        with pytest.raises(KeyboardInterrupt):
            make(out, log_to=("tensorboard",))
    assert {record["step"] for record in _lines(out / "samples.jsonl")} == {0, 2}
    return out, make(out, log_to=("tensorboard", "wandb"))


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _run(record):
    return f"{record['arm']}/seed_{record['seed']}"


def _numbers(out):
    """(run, step, name, number) of all in metrics.jsonl that is no array."""
    return [
        (_run(record), record["step"], name, float(value))
        for record in _lines(out / "metrics.jsonl")
        for name, value in record.items()
        if name not in ("step", "arm", "seed") and not isinstance(value, list)
    ]


def _shown(sample):
    return f"{sample['problem']}, reward {sample['reward']:g}:\n{sample['answer']}"


def _events(out):
    """(run, step, value) of all event files: TFRecords, each a length, its checksum, the data and its checksum."""
    found = []
    for path in (out / "tensorboard").rglob("events*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            run = str(path.parent.relative_to(out / "tensorboard"))
            found += [(run, event.step, value) for value in event.summary.value]
            at += size + 16
    return found


def _history(out):
    """Rows logged offline: blocks of 32 KiB of parts of records, each a checksum, a length, which part, and data."""
    (path,) = out.glob("wandb/offline-run-*/run-*.wandb")
    data, at, record, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        _, size, part = struct.unpack_from("<IHB", data, at)
        record = (record if part in (3, 4) else b"") + data[at + 7 : at + 7 + size]
        at += 7 + size
        if part in (1, 4):
            items = Record.FromString(record).history.item
            found.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return [row for row in found if row]


@pytest.mark.parametrize("name", ["whole", "resumed"])
def test_tensorboard_has_every_number_of_metrics_once(name, request):
    out, _ = request.getfixturevalue(name)
    shown = [(run, step, v.tag, v.simple_value) for run, step, v in _events(out) if v.HasField("simple_value")]
    expected = [(run, step, tag, float(np.float32(number))) for run, step, tag, number in _numbers(out)]
    assert len(expected) > 100
    assert {run for run, *_ in expected} == {"run/seed_3", "run/seed_4"}
    assert sorted(shown) == sorted(expected)


@pytest.mark.parametrize("name", ["whole", "resumed"])
def test_wandb_offline_has_every_number_of_metrics_once(name, request):
    out, _ = request.getfixturevalue(name)
    shown = [
        (f"{run}/seed_{seed}", row["step"], name, float(number))
        for row in _history(out)
        for key, number in row.items()
        for run, seed, name in re.findall(r"^(run)/seed_(\d)/(?!sample_)(.+)", key)
    ]
    assert sorted(shown) == sorted(_numbers(out))


@pytest.mark.parametrize("name", ["whole", "resumed"])
def test_samples_are_in_both_as_text(name, request):
    out, _ = request.getfixturevalue(name)
    samples = _lines(out / "samples.jsonl")
    texts = [(run, step, v.tag, *v.tensor.string_val) for run, step, v in _events(out) if v.HasField("tensor")]
    assert sorted(texts) == sorted(
        (_run(s), s["step"], f"sample_{s['sample']}/text_summary", f"```\n{_shown(s)}```".encode()) for s in samples
    )
    pages = [path.read_text() for path in out.glob("wandb/offline-run-*/files/media/html/run/seed_3/*.html")]
    assert sorted(pages) == sorted(f"<pre>{html.escape(_shown(s))}</pre>" for s in samples)


def test_samples_are_two_answers_at_every_test_and_the_same_after_an_interruption(whole, resumed):
    samples = _lines(whole[0] / "samples.jsonl")
    assert [(s["step"], _run(s), s["sample"]) for s in samples] == [
        (step, "run/seed_3", index) for step in (0, 2, 4) for index in (0, 1)
    ]
    assert len({s["answer"] for s in samples}) > 2
    assert (resumed[0] / "samples.jsonl").read_bytes() == (whole[0] / "samples.jsonl").read_bytes()


def test_a_sample_has_the_reward_of_its_text():
    drawn = ADDITION.rl_problems(np.random.default_rng(TEST_SEED), 3, 2, 1)
    right = drawn[1]
    first = len(ADDITION.prompt_text(right))
    scripted = scripted_policy(ADDITION.answer_text(right), first)
    params = jax.tree.map(lambda *x: jnp.stack(x), policy(SCRIPT_MODEL), scripted)
    tested = evaluation.test(make_program(CONFIG, Model(SCRIPT_MODEL, 1, scripted)), params, 3)
    rewards = []
    for row in (0, 1):
        for sample, problem in zip(tested.samples(row), drawn[:2], strict=True):
            assert sample["problem"] == f"{problem.a}+{problem.b}"
            ended = alphabet.encode(sample["answer"] + alphabet.PAD)
            answer_1xT = jnp.asarray(ended, jnp.int32)[None]
            recomputed = problems.reward(
                answer_1xT, problems.pack(ADDITION, [problem], 2, 1).results_BxR.astype(np.int32)
            )
            assert sample["reward"] == recomputed[0]
            rewards.append(sample["reward"])
    assert rewards == [0, 0, 0, 1]
    assert tested.samples(1)[1]["answer"] == ADDITION.answer_text(right)
    assert tested.accuracy["target"].tolist() == [0, pytest.approx(tested.rewards_RxS[1].mean())]


def test_the_old_lengths_are_tested_on_fewer_problems_of_up_to_n_digits():
    program = make_program(dataclasses.replace(CONFIG, old_problems=7), Model(SCRIPT_MODEL, 1, policy(SCRIPT_MODEL)))
    for count in (5, 20):
        (target, digits), (old, base) = evaluation.problem_sets(program, count).values()
        assert (len(target), digits, len(old), base) == (count, 2, min(count, 7), 1)
        assert {len(str(max(problem.a, problem.b))) for problem in target} == {2}
        assert {len(str(max(problem.a, problem.b))) for problem in old} == {1}


def test_problems_of_the_old_lengths_may_have_two_short_operands(small_model):
    program = make_program(dataclasses.replace(CONFIG, old_problems=20), Model(small_model, 3, {}))
    old, base = evaluation.problem_sets(program, 20)["old"]
    assert base == 3
    assert {len(str(max(problem.a, problem.b))) for problem in old} == {1, 2, 3}


@pytest.mark.parametrize(("on_the_way", "at_the_ends"), [(3, 9), (9, 3)])
def test_a_shorter_test_has_the_first_problems_of_a_longer_one(on_the_way, at_the_ends):
    config = dataclasses.replace(CONFIG, old_problems=7, test_problems=on_the_way, final_problems=at_the_ends)
    program = make_program(config, Model(SCRIPT_MODEL, 1, policy(SCRIPT_MODEL)))
    short, long = (evaluation.problem_sets(program, count) for count in (3, 9))
    for name in ("target", "old"):
        assert short[name][0] == long[name][0][:3]
        assert len(long[name][0]) == {"target": 9, "old": 7}[name]


def test_a_test_samples_at_its_own_temperature():
    model = Model(SCRIPT_MODEL, 1, untrained(SCRIPT_MODEL, contrast=10))
    params = jax.tree.map(lambda x: x[None], model.params)

    def answers(**options):
        program = make_program(dataclasses.replace(CONFIG, **options), model)
        return evaluation.test(program, params, 3).answers_RxSxT

    usual = answers()
    np.testing.assert_array_equal(usual, answers(temperature=5.0))
    assert (usual != answers(test_temperature=5.0)).any()
    assert (usual != answers(test_temperature=0.01)).any()


def test_quiet_prints_the_end_and_nothing_else(whole, resumed):
    out, printed = whole
    assert printed == [f"saved: {out}/run/seed_3, {out}/run/seed_4"]
    assert [line.split(":")[0] for line in resumed[1]] == ["round 2/4", "round 4/4", "saved"]


def test_logging_is_no_part_of_the_config(whole):
    assert not {"log_to", "quiet", "logs"} & json.loads((whole[0] / "config.json").read_text()).keys()


@pytest.mark.parametrize(("name", "library"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_library_is_an_error_that_names_the_extra(name, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"^log_to: needs {library}, allowed with the extra logs installed only"):
        LogOptions((name,))


def test_another_value_is_refused():
    with pytest.raises(ConfigError, match=r"^log_to: got 'mlflow', allowed is tensorboard \| wandb$"):
        LogOptions(("mlflow",))
    with pytest.raises(ConfigError, match=r"^quiet: got 'no', allowed is True or False$"):
        LogOptions(quiet="no")


def test_tensorboard_in_a_bucket_is_refused():
    with pytest.raises(
        ConfigError, match=r"^log_to: got 'tensorboard', allowed is wandb only where out is in a bucket"
    ):
        LogOptions(("tensorboard",)).require_possible(paths.parse("gs://bucket/run"))


def test_libraries_are_imported_only_when_asked_for():
    code = "import ckl_jax.finetune, sys; sys.exit(str({'tensorboardX', 'wandb'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "set()"


@pytest.mark.parametrize("error", [wandb.errors.UsageError, RuntimeError, PermissionError])
def test_wandb_that_cannot_start_is_one_line(tmp_path, monkeypatch, error):
    def refused(**_):
        raise error("No API key\nconfigured.")

    monkeypatch.setattr(wandb, "init", refused)
    with pytest.raises(
        ConfigError, match=r"^log_to: got wandb, which cannot start \(No API key configured\.\); allowed"
    ):
        RunDirectory(tmp_path, {}, LogOptions(("wandb",))).rewind_metrics(-1)


def test_a_run_that_wandb_knows_goes_on_from_its_last_step(tmp_path, monkeypatch):
    class Known:
        resumed, summary = True, {"step": 2}

        def __init__(self):
            self.rows = []
            self.log = self.rows.append

        def define_metric(self, *_, **__):
            pass

    run, ids = Known(), []
    monkeypatch.setattr(wandb, "init", lambda **settings: ids.append(settings["id"]) or run)
    for _ in range(2):
        directory = RunDirectory(tmp_path, {}, LogOptions(("wandb",)))
        directory.rewind_metrics(3)
        if not directory.metrics():
            run.rows.clear()
            directory.log([{"step": step, "loss": step / 2} for step in (1, 2, 3, 4)])
        else:
            assert run.rows[4:] == [{"step": 2, "loss": 1.0}, {"step": 3, "loss": 1.5}]
    assert ids[0] == ids[1]


def test_a_copy_that_fails_is_given_up_and_the_others_and_the_run_go_on(tmp_path, monkeypatch, capsys):
    added = []

    class Whole:
        lacks_from = 0
        add, close = added.append, added.clear

    class Broken(Whole):
        def add(self, record):
            raise RuntimeError("Connection lost")

    class Unfinished(Whole):
        def close(self):
            raise OSError("disk full")

    copies = logs.Copies({"wandb": Broken(), "tensorboard": Whole(), "third": Unfinished()})
    directory = RunDirectory(tmp_path, {})
    monkeypatch.setattr(LogOptions, "start", lambda *_: copies)
    directory.rewind_metrics(-1)
    for step in (1, 2):
        directory.log([{"step": step}])
    assert added == 2 * [{"step": 1}] + 2 * [{"step": 2}]
    assert [record["step"] for record in directory.metrics()] == [1, 2]
    directory.close()
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(";")[0] for line in said] == [
        "log_to: wandb fails (Connection lost)",
        "log_to: third fails (disk full)",
    ]


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_a_bar_with_accuracy_kl_and_time_left(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with display(quiet=False) as progress:
        progress("pre-training")
        progress(Status("a line for a file", 7, 14, "standard 25.0% KL 0.012", 103.4))
    shown = terminal.getvalue()
    assert [
        part for part in ("pre-training", "7/14", "standard 25.0% KL 0.012", "103 s left") if part not in shown
    ] == []
    assert "a line for a file" not in shown


def test_what_is_no_terminal_gets_lines(capsys):
    with display(quiet=False) as progress:
        progress(Status("round 7/14: 25.0%", 7, 14, "25.0% KL 0.012", 103.4))
    assert capsys.readouterr().out == "round 7/14: 25.0%\n"
