"""A run's directory belongs to one configuration, and its metrics never hold a step twice."""

import json

import pytest

from ckl_jax.config import ConfigError
from ckl_jax.runs import RunDirectory

CONFIG = {"command": "finetune", "seed": 0, "config": {"beta": 150.0, "arms": (1, 2)}}


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


def test_a_directory_of_other_files_is_refused_and_nothing_is_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"^out: .*no config.json"):
        RunDirectory(tmp_path, CONFIG)
    assert _contents(tmp_path) == {"thesis.tex": b"precious"}


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
