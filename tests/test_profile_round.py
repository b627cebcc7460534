"""The profile of a round: stages from a program's text, operations from a trace, and a real one of a small model."""

import json

import pytest
from policies import untrained

from ckl_jax.checkpoint.store import Model, save_model
from ckl_jax.errors import ConfigError
from ckl_jax.rl.updates import STAGES
from ckl_jax.runtime import cli
from experiments import profile_round as profile

TEXT = """HloModule made

%body (x: f32[4]) -> f32[4] {
  %x = f32[4] parameter(0)
  %added = f32[4] copy(%x)
  ROOT %step = f32[4] add(%added, %x), metadata={op_name="jit(f)/update/while/body/add"}
}

%fused (y: f32[4]) -> f32[4] {
  %y = f32[4] parameter(0)
  ROOT %inner = f32[4] add(%y, %y), metadata={op_name="jit(f)/rollout/add"}
}

ENTRY %main (z: f32[4]) -> f32[4] {
  %z = f32[4] parameter(0)
  %sampled = f32[4] fusion(%z), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/while/body/rollout/add"}
  %sum = f32[4] all-reduce(%sampled), to_apply=%fused, metadata={op_name="jit(f)/diagnostics/mean"}
  %loop = f32[4] call(%sum), to_apply=%body, metadata={op_name="jit(f)/update/while"}
  ROOT %out = f32[4] copy(%loop)
}
"""


def test_an_operation_has_the_stage_of_its_name_or_of_the_loop_around_it():
    found = profile.stages(TEXT)
    expected = {"sampled": "rollout", "sum": "exchange", "added": "update", "step": "update", "out": "other"}
    assert {name: stage for name, stage in found.items() if name not in "xyz"} == expected


def event(name, start, duration, thread=1, **other):
    return {"ph": "X", "pid": 7, "tid": thread, "ts": start, "dur": duration, "args": {"hlo_op": name}, **other}


def test_operations_of_a_trace_are_those_of_the_program_in_seconds_since_the_first():
    events = [
        event("step", 2_000_000, 500_000),
        event("sampled", 1_000_000, 250_000, thread=2),
        event("loop", 1_000_000, 9_000_000),
        {"ph": "M", "pid": 7, "name": "process_name"},
        {"ph": "X", "pid": 7, "tid": 1, "ts": 0, "dur": 5, "name": "of the host"},
    ]
    found = profile.operations(events, profile.stages(TEXT))
    assert found == [((7, 1), 1.0, 0.5, "update"), ((7, 2), 0.0, 0.25, "rollout")]


def test_the_timeline_has_what_fills_most_of_a_part_and_leaves_out_idle_threads():
    busy = [
        profile.Operation((0, 1), 0.0, 4.0, "rollout"),
        profile.Operation((0, 1), 4.0, 1.0, "update"),
        profile.Operation((0, 1), 9.0, 1.0, "update"),
        profile.Operation((0, 2), 0.0, 0.01, "other"),
    ]
    found = profile.timeline(busy)
    (row,) = found["threads"]
    assert found["width"] == pytest.approx(10 / profile.BINS)
    tenth = profile.BINS // 10
    assert row == ["rollout"] * 4 * tenth + ["update"] * tenth + [""] * 4 * tenth + ["update"] * tenth


OPTIONS = (
    "--rounds 2 --test-every 1 --episodes 4 --minibatch-episodes 2 --diagnostic-episodes 2 --extra-length 5 "
    "--rollout plain --seeds 2"
)


@pytest.fixture
def command(tmp_path, small_model):
    save_model(tmp_path / "model", Model(small_model, 1, untrained(small_model)), {})
    paths = ["--checkpoint", str(tmp_path / "model"), "--out", str(tmp_path / "out")]

    def made(*extra):
        return cli.parse(profile.ProfileCommand, profile.preset, [*OPTIONS.split(), *paths, *extra])

    return made


def test_a_round_is_traced_and_its_stages_are_found(command, tmp_path, capsys):
    profile.main(command())
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["rounds"]) == 2
    for stage in STAGES:
        assert results["by_stage"][stage] > 0
    named = sum(results["by_stage"][stage] for stage in (*STAGES, "exchange"))
    assert named > 0.7 * sum(results["by_stage"].values())
    assert list((tmp_path / "out" / "trace").rglob("*.trace.json.gz"))
    assert "| rollout |" in capsys.readouterr().out
    (tmp_path / "out" / "profile_round.png").unlink()
    profile.main(command("--plot-only"))
    assert (tmp_path / "out" / "profile_round.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("number", ["0", "3"])
def test_a_round_that_the_run_does_not_have_is_refused(command, number):
    with pytest.raises(ConfigError, match=rf"^round: got {number}, allowed is"):
        command("--round", number)
