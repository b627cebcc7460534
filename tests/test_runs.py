"""A run's directory belongs to one configuration, and its metrics never hold a step twice."""

import dataclasses
import json
import pathlib
import re

import jax.numpy as jnp
import matplotlib.pyplot as plt
import pytest
from hostile import no_file_above

from ckl_jax.analysis import plots
from ckl_jax.checkpoint import manifest
from ckl_jax.checkpoint.store import Model, save_model
from ckl_jax.config import FinetuneConfig, ModelConfig, PretrainConfig
from ckl_jax.convert import ConvertCommand
from ckl_jax.errors import ConfigError
from ckl_jax.runs.directory import RunDirectory
from ckl_jax.runtime import cli

CONFIG = {"command": "finetune", "seed": 0, "config": {"beta": 150.0, "arms": (1, 2)}}
STATE = {"x": jnp.ones(3)}


def _contents(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")
    }


def test_a_new_directory_is_made_with_its_config(tmp_path):
    run = RunDirectory(tmp_path / "a" / "run", CONFIG)
    assert json.loads((run.path / "config.json").read_text()) == json.loads(json.dumps(CONFIG))
    assert run.metrics() == []


def test_an_empty_directory_is_taken(tmp_path):
    assert (RunDirectory(tmp_path, CONFIG).path / "config.json").exists()


def test_the_same_config_opens_the_same_run(tmp_path):
    RunDirectory(tmp_path, CONFIG).log([{"step": 1}])
    before = _contents(tmp_path)
    assert RunDirectory(tmp_path, CONFIG).metrics() == [{"step": 1}]
    assert _contents(tmp_path) == before


@pytest.mark.parametrize(
    ("other", "field"),
    [
        ({**CONFIG, "seed": 1}, "seed"),
        ({**CONFIG, "config": {**CONFIG["config"], "beta": 0.0}}, "config.beta"),
        ({**CONFIG, "config": {"arms": (1, 2)}}, "config.beta"),
        ({**CONFIG, "new": 3}, "new"),
    ],
)
def test_another_config_is_refused_by_the_field_that_differs_and_nothing_is_touched(tmp_path, other, field):
    RunDirectory(tmp_path, CONFIG).log([{"step": 1}])
    before = _contents(tmp_path)
    with pytest.raises(ConfigError, match=rf"^out: .*\(differing: {field}\)"):
        RunDirectory(tmp_path, other)
    assert _contents(tmp_path) == before


def _other(value):
    """Another value of the same type."""
    if isinstance(value, dict):
        return value | {"width": 7}
    return not value if isinstance(value, bool) else f"other {value}" if isinstance(value, str) else (value or 0) + 1


SPEED = {
    FinetuneConfig: "rollout rollout_batch transition_batch episode_batch attention attention_chunk remat data_devices "
    "shard_state runs_at_once",
    PretrainConfig: "data_devices microbatches shard_state",
    ModelConfig: "attention attention_chunk layers remat",
}


@pytest.mark.parametrize("cls", SPEED)
@pytest.mark.parametrize("place", [(), ("config",), ("models", "pretrain")])
def test_every_field_has_to_stay_but_those_of_speed_and_a_later_end(tmp_path, cls, place):
    def described(config):
        for name in reversed(place):
            config = {name: config, "seed": 0}
        return {"command": "finetune", **config}

    config = dataclasses.asdict(cls()) | ({"learning_rate_decay": False} if cls is FinetuneConfig else {})
    RunDirectory(tmp_path, described(config)).log([{"step": 1}])
    before = _contents(tmp_path)
    for name, value in config.items():
        other = described(config | {name: _other(value)})
        if name in SPEED[cls].split() or name == "rounds":
            run = RunDirectory(tmp_path, other)
            assert _contents(tmp_path) == before
            run.record_config()
            assert json.loads((tmp_path / "config.json").read_text()) == other
            RunDirectory(tmp_path, other | {"command": "finetune"})
            (tmp_path / "config.json").write_bytes(before["config.json"])
        else:
            field = ".".join((*place, name, *(["width"] if name == "model" else [])))
            said = rf"^(out: .*\(differing: {field}\)|num_steps: got 20001, allowed is 20000, that of the run in .*)"
            with pytest.raises(ConfigError, match=said):
                RunDirectory(tmp_path, other)
        assert _contents(tmp_path) == before


def test_a_run_that_did_not_note_yet_what_its_arrays_do_not_show_goes_on(tmp_path):
    older = {"command": "finetune", "checkpoint": "abc", "config": {"seed": 0}}
    noted = older | {"model": {"max_pretrain_digits": 7, "num_heads": 4}}
    directory = RunDirectory(tmp_path, older)
    directory.close()
    directory = RunDirectory(tmp_path, noted)
    directory.record_config()
    directory.close()
    for other in ({"max_pretrain_digits": 9, "num_heads": 4}, {"max_pretrain_digits": 7, "num_heads": 2}):
        with pytest.raises(ConfigError, match=r"differing: model\.(max_pretrain_digits|num_heads)\)"):
            RunDirectory(tmp_path, noted | {"model": other})


@pytest.mark.parametrize("cls", SPEED)
def test_a_field_that_an_older_run_did_not_have_yet_was_its_default(tmp_path, cls):
    config = dataclasses.asdict(cls())
    for name in config.keys() - {"model", "learning_rate"}:
        older = {"command": "finetune", "config": {key: value for key, value in config.items() if key != name}}
        directory = tmp_path / name
        RunDirectory(directory, older).close()
        RunDirectory(directory, {**older, "config": config}).close()
        if name not in (*SPEED[cls].split(), "rounds", "num_steps"):
            with pytest.raises(ConfigError, match=rf"differing: config\.{name}\)"):
                RunDirectory(directory, {**older, "config": config | {name: _other(config[name])}})


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            {"rounds": 14, "learning_rate_decay": True},
            {"rounds": 28},
            r"rounds: got 28, allowed is 14, that of the run in \S+: with learning_rate_decay = True its training .*",
        ),
        (
            {"num_steps": 20, "learning_rate": 1e-3},
            {"num_steps": 40},
            r"num_steps: got 40, allowed is 20, that of the run in \S+: with learning_rate = 0\.001 its training .*",
        ),
        (
            {"rounds": 14, "learning_rate_decay": False},
            {"rounds": 7},
            r"rounds: got 7, allowed is 14 or more, as the run in \S+ has",
        ),
        (
            {"rounds": 14, "learning_rate_decay": False},
            {"rounds": 28, "beta": 1.0},
            r"out: .*\(differing: config\.beta\).*",
        ),
        (
            {"rounds": 14, "learning_rate_decay": False},
            {"rounds": 28, "learning_rate_decay": True},
            r"out: .*\(differing: config\.learning_rate_decay\).*",
        ),
    ],
)
def test_an_end_that_would_change_what_was_trained_is_refused_by_name_and_reason(tmp_path, old, new, said):
    RunDirectory(tmp_path, {"config": old}).log([{"step": 1}])
    before = _contents(tmp_path)
    with pytest.raises(ConfigError) as caught:
        RunDirectory(tmp_path, {"config": old | new})
    assert re.fullmatch(said, str(caught.value)), str(caught.value)
    assert _contents(tmp_path) == before


def test_a_directory_of_other_files_is_refused_and_nothing_is_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"^out: .*no config.json"):
        RunDirectory(tmp_path, CONFIG)
    assert _contents(tmp_path) == {"thesis.tex": b"precious"}


IGNORED = [
    ".DS_Store",
    "._config.json",
    ".gitkeep",
    ".nfs000000a1",
    "Thumbs.db",
    "desktop.ini",
    "lost+found/",
    ".git/HEAD",
]
IGNORED += ["log", "run.log", "slurm-123.out", "slurm-123.err", "job.o4711", "nohup.out", "train_log.txt", "logs/1.log"]
IGNORED += ["config.json.tmp", "logs/"]
OWNED = ["thesis.tex", "notes.txt", "metrics.jsonl", "results.json", "checkpoints/1/_METADATA", "params/manifest.ocdbt"]
OWNED += ["tensorboard/a/events.out.tfevents.17.host", "run.sh", "model.json", "standard/seed_0/model.json", "log.csv"]


def _put(directory, name):
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    if name.endswith("/"):
        (directory / name).mkdir(exist_ok=True)
    else:
        (directory / name).write_text("precious")


def test_logs_and_what_nothing_reads_do_not_block_a_new_run_and_all_else_does(tmp_path):
    for name in IGNORED:
        _put(tmp_path / "new", name)
    before = _contents(tmp_path / "new")
    RunDirectory(tmp_path / "new", CONFIG).log([{"step": 1}])
    after = _contents(tmp_path / "new")
    del before["config.json.tmp"], after["config.json"], after["metrics.jsonl"], after["checkpoints"], after[".lock"]
    assert after == before
    for number, name in enumerate(OWNED):
        directory = tmp_path / str(number)
        for ignored in IGNORED:
            _put(directory, ignored)
        _put(directory, name)
        before = _contents(directory)
        with pytest.raises(
            ConfigError, match=rf"^out: {directory} holds {re.escape(name)} but no config\.json; allowed"
        ):
            RunDirectory(directory, CONFIG)
        assert _contents(directory) == before


def test_a_file_is_refused_and_not_touched(tmp_path):
    (tmp_path / "run").write_text("precious")
    with pytest.raises(ConfigError, match=r"^out: .*a file"):
        RunDirectory(tmp_path / "run", CONFIG)
    assert _contents(tmp_path) == {"run": b"precious"}


def test_rewinding_drops_later_lines_and_a_half_written_last_one(tmp_path):
    run = RunDirectory(tmp_path, CONFIG)
    records = [{"step": step, "arm": arm} for step in (0, 1, 2, 3) for arm in ("a", "b")]
    run.log(records)
    with run.metrics_path.open("a") as file:
        file.write('{"step": 1, "ar')
    run.rewind_metrics(2)
    assert run.metrics() == records[:6]
    run.log([{"step": 3}])
    assert run.metrics() == [*records[:6], {"step": 3}]
    run.rewind_metrics(-1)
    assert run.metrics() == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"step": 2, "lo', r"\(line 2: .*\)"),
        ("[2]", r"\(line 2: no record with a step\)"),
        ('{"loss": 2}', r"\(line 2: no record with a step\)"),
        ('{"step": 0}', r"\(line 2: step 0 after step 1\)"),
        ("\x00\x00", r"\(line 2: .*\)"),
        ("\udcff", r"\(.*utf-8.*\)"),
    ],
)
def test_metrics_that_are_damaged_before_their_end_are_refused_and_not_touched(tmp_path, line, said):
    run = RunDirectory(tmp_path, CONFIG)
    run.log([{"step": 1}, {"step": 2}, {"step": 3}])
    text = run.metrics_path.read_text().replace('{"step": 2}', line).encode(errors="surrogateescape")
    run.metrics_path.write_bytes(text)
    with pytest.raises(ConfigError, match=rf"^out: .*metrics.jsonl is damaged {said}; allowed is"):
        run.rewind_metrics(3)
    assert run.metrics_path.read_bytes() == text


def test_metrics_that_end_before_the_checkpoint_are_refused_and_not_touched(tmp_path):
    run = RunDirectory(tmp_path, CONFIG)
    run.log([{"step": 1}, {"step": 2}, {"step": 4}])
    run.rewind_metrics(3, recorded=2)
    for recorded in (3, 1):
        with pytest.raises(ConfigError, match=rf"it ends at step 2\); allowed is one with step {recorded}, "):
            run.rewind_metrics(3, recorded=recorded)
    assert run.metrics() == [{"step": 1}, {"step": 2}]
    run.metrics_path.unlink()
    with pytest.raises(ConfigError, match="it ends at step None"):
        run.rewind_metrics(3, recorded=2)


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^out: got '.*/file/run', allowed is a directory, or a place for a new one"):
        RunDirectory(tmp_path / "file" / "run", CONFIG)
    with pytest.raises(ConfigError, match=r"^out: got /proc/run, allowed is a directory that can be written \("):
        RunDirectory(pathlib.Path("/proc/run"), CONFIG)


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    run = RunDirectory(tmp_path, CONFIG)
    run.metrics_path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        run.log([{"step": 1}])
    assert caught.value.filename == str(run.metrics_path)


def test_a_picture_for_which_the_disk_is_too_small_is_an_error_that_names_it_and_leaves_the_old_one(tmp_path):
    (tmp_path / "a.png").write_bytes(b"old")
    with no_file_above(100), pytest.raises(OSError, match="File too large") as caught:
        plots.save(plt.figure(), tmp_path, "a")
    plt.close("all")
    assert caught.value.filename == str(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == b"old"


def _saved_without_manifests(path, steps, records):
    """As a copy without *.json, or a run that was killed before it had written the first manifest."""
    run = RunDirectory(path, CONFIG)
    run.log([{"step": step} for step in records])
    for step in steps:
        run.checkpoints.save(step, STATE)
    run.close()
    for file in (path / "checkpoints").glob("*.sha256.json"):
        file.rename(path / f"kept_{file.name}")


@pytest.mark.parametrize(
    ("steps", "records"), [([7, 14], [7, 14]), ([14], [7, 14]), ([14], [7]), ([300, 600], []), ([4], [0, 1, 2, 3, 4])]
)
def test_checkpoints_that_lack_their_manifests_are_refused_and_left_alone(tmp_path, steps, records):
    _saved_without_manifests(tmp_path, steps, records)
    before = _contents(tmp_path)
    run = RunDirectory(tmp_path, CONFIG)
    missing = ", ".join(rf"{step}\.sha256\.json" for step in steps)
    with pytest.raises(ConfigError, match=rf"^out: \S+/checkpoints has no {missing}, .*; allowed is .* manifests"):
        run.restore(STATE)
    assert _contents(tmp_path) == before
    for step in steps:
        (tmp_path / f"kept_{step}.sha256.json").rename(tmp_path / "checkpoints" / f"{step}.sha256.json")
    assert run.restore(STATE)[0] == steps[-1]


@pytest.mark.parametrize(("step", "records"), [(0, [0]), (1000, [1000]), (300, [])])
def test_a_run_that_was_killed_while_it_wrote_its_first_checkpoint_begins_anew_and_replaces_it(tmp_path, step, records):
    _saved_without_manifests(tmp_path, [step], records)
    run = RunDirectory(tmp_path, CONFIG)
    assert run.restore(STATE) is None
    assert run.checkpoints.unfinished() == set()
    run.checkpoints.save(step, STATE)
    assert run.restore(STATE)[0] == step


def test_a_run_that_was_killed_twice_before_its_first_manifest_begins_anew(tmp_path, monkeypatch):
    """The second attempt comes to another step than the first."""

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(manifest, "write", killed)
    for step, records in ((300, []), (500, [{"step": 500}])):
        run = RunDirectory(tmp_path, CONFIG)
        assert run.restore(STATE) is None
        run.log(records)
        with pytest.raises(KeyboardInterrupt):
            run.checkpoints.save(step, STATE)
        run.close()
    assert RunDirectory(tmp_path, CONFIG).restore(STATE) is None


@pytest.mark.parametrize("name", ["lr=[1e-3]", "[1", "1]", "a\\b", "below/[1]/run"])
def test_a_place_where_orbax_would_write_what_cannot_be_read_is_refused_before_anything_is_there(tmp_path, name):
    def write(path):
        return save_model(path, Model(ModelConfig(), 1, {}), {})

    def convert_to(path):
        return cli.parse(ConvertCommand, None, ["--source", "gpt2", "--digits", "1", "--out", str(path)])

    for open_there in (lambda path: RunDirectory(path, CONFIG), write, convert_to):
        with pytest.raises(
            ConfigError, match=r"^(out|directory): got '.*', allowed is a path without (\[ \]|\[|\]|\\): Orbax"
        ):
            open_there(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_half_a_line_of_seconds_is_dropped(tmp_path):
    run = RunDirectory(tmp_path, CONFIG)
    run.log_seconds(1, 1.5)
    with (tmp_path / "seconds.jsonl").open("a") as file:
        file.write('{"step": 2, "sec')
    run.rewind_metrics(1)
    run.log_seconds(2, 2.0)
    assert run.seconds() == 3.5


def test_samples_are_rewound_with_the_metrics_and_when_damaged_nothing_is(tmp_path):
    run = RunDirectory(tmp_path, CONFIG)
    for step in (0, 2, 4):
        run.log([{"step": step}])
        run.log_samples([{"step": step, "answer": text} for text in ("a", "b")])
    with run.samples_path.open("a") as file:
        file.write('{"step": 6, "ans')
    run.rewind_metrics(2, recorded=2)
    samples = [json.loads(line) for line in run.samples_path.read_text().splitlines()]
    assert samples == [{"step": step, "answer": text} for step in (0, 2) for text in ("a", "b")]
    run.samples_path.write_text("junk\n")
    with pytest.raises(ConfigError, match=r"^out: .*samples.jsonl is damaged"):
        run.rewind_metrics(0)
    assert run.metrics() == [{"step": 0}, {"step": 2}]


def test_rewinding_a_run_without_metrics_does_nothing(tmp_path):
    run = RunDirectory(tmp_path, CONFIG)
    run.rewind_metrics(3)
    assert not run.metrics_path.exists()


def test_seconds_add_up_over_interrupted_attempts(tmp_path):
    assert RunDirectory(tmp_path, CONFIG).seconds() == 0
    RunDirectory(tmp_path, CONFIG).log_seconds(1, 1.5)
    run = RunDirectory(tmp_path, CONFIG)
    run.log_seconds(1, 2.0)
    assert run.seconds() == 3.5


def test_seconds_add_up_where_a_run_begins_again_because_its_checkpoints_are_gone(tmp_path):
    for total in (3.0, 6.0, 9.0):
        run = RunDirectory(tmp_path, CONFIG)
        run.rewind_metrics(-1)
        for step in (0, 7):
            run.log([{"step": step}])
            run.log_seconds(step, 1.5)
        assert run.seconds() == total
        run.close()
