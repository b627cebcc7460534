"""Several processes as one program: what the environment must say, and two real ones against a single one."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
from policies import untrained

from ckl_jax.checkpoint.store import Model, load_model, save_model
from ckl_jax.errors import ConfigError
from ckl_jax.runtime import hosts

ROOT = pathlib.Path(__file__).parent.parent
SETTINGS = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
PRETRAIN = """
    --max-digits 1 --num-documents 60 --packing documents --batch-size 4 --num-steps 6 --warmup-steps 2
    --checkpoint-every 2 --eval-problems 3 --optimizer adamw --learning-rate 1e-3 --model.num-layers 1
    --model.num-heads 2 --model.width 16 --model.block-size 280 --model.attention-chunk 64 --shard-state
"""
FINETUNE = """
    --rounds 2 --test-every 1 --episodes 4 --minibatch-episodes 2 --diagnostic-episodes 2 --test-problems 3
    --final-problems 6 --old-problems 3 --extra-length 5 --learning-rate 1e-2 --adam-epsilon 1e-3 --rollout plain
    --beta 2 --seeds 1
"""


@pytest.fixture
def joined(monkeypatch):
    """The arguments of calls of ``jax.distributed.initialize``, in an environment that names no hosts."""
    for name in (*SETTINGS, "CKL_HOSTS"):
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    return calls


def test_a_process_on_its_own_is_the_first_and_agrees_with_itself(joined):
    hosts.start()
    assert joined == []
    assert hosts.is_first()
    assert not hosts.several()
    assert (hosts.any_host(True), hosts.any_host(False)) == (True, False)
    assert hosts.of_first(lambda: "found") == hosts.together(lambda: "found") == "found"


@pytest.mark.parametrize("call", [hosts.of_first, hosts.together])
def test_what_is_refused_on_its_own_is_raised_as_it_is(call):
    error = ConfigError("out: got nothing")

    def refuse():
        raise error

    with pytest.raises(ConfigError) as caught:
        call(refuse)
    assert caught.value is error


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        (SETTINGS, {"coordinator_address": "10.0.0.1:8476", "num_processes": 2, "process_id": 1}),
        ({"CKL_HOSTS": "auto"}, {}),
    ],
)
def test_the_environment_says_which_others_are_joined_and_is_not_passed_on(joined, monkeypatch, settings, arguments):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    hosts.start()
    hosts.start()
    assert joined == [arguments]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID: got '', allowed is a value where JAX_COORDINATOR_ADDRESS has one"),
        ({"JAX_COORDINATOR_ADDRESS": ""}, "JAX_COORDINATOR_ADDRESS: got '', allowed is a value where JAX_NUM"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "JAX_COORDINATOR_ADDRESS: got '10.0.0.1', allowed is host:port"),
        ({"JAX_COORDINATOR_ADDRESS": "host:70000"}, "JAX_COORDINATOR_ADDRESS: got 'host:70000', allowed is host:port"),
        ({"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES: got '0', allowed is a number of at least 1"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES: got 'two', allowed is a number"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID: got '2', allowed is 0 to 1, below JAX_NUM_PROCESSES = 2"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID: got '-1', allowed is 0 to 1"),
        ({"CKL_HOSTS": "auto"}, "CKL_HOSTS: got 'auto', allowed is only without JAX_COORDINATOR_ADDRESS"),
        (dict.fromkeys(SETTINGS, "") | {"CKL_HOSTS": "2"}, "CKL_HOSTS: got '2', allowed is auto"),
    ],
)
def test_settings_that_are_partial_or_cannot_work_are_refused_by_name(joined, monkeypatch, change, said):
    for name, value in (SETTINGS | change).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        hosts.start()
    assert str(caught.value).startswith(said)
    assert joined == []


@pytest.mark.parametrize(
    ("raised", "told"),
    [(ValueError, (ConfigError, "does not say")), (RuntimeError, (ConnectionError, "were not found by"))],
)
def test_others_that_are_not_found_are_one_line(joined, monkeypatch, capsys, raised, told):
    def fail(**arguments):
        raise raised("coordinator_address\n should be defined.")

    monkeypatch.setenv("CKL_HOSTS", "auto")
    monkeypatch.setattr(jax.distributed, "initialize", fail)
    kind, words = told
    with pytest.raises(kind, match=rf"^hosts: .*{words}.*\({raised.__name__}: coordinator_address should be def"):
        hosts.start()
    assert "waiting for the other processes, CKL_HOSTS=auto: up to 5 minutes" in capsys.readouterr().err


def test_nothing_is_done_by_process_0_without_the_others_hearing_how_it_ended():
    """They would wait for it in what all compute next; ``of_first`` tells them."""
    files = [path for package in ("ckl_jax", "experiments") for path in (ROOT / package).rglob("*.py")]
    assert [str(path) for path in files if "is_first" in path.read_text() and path.name != "hosts.py"] == []


class Machine:
    """Starts processes that share a directory, a model in it, and compiled programs."""

    def __init__(self, path):
        self.path = path
        self.processes = []
        self.environment = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, "CKL_HOSTS")}
        self.environment |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "JAX_COMPILATION_CACHE_DIR": str(path / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
        }

    def start(self, count, *words):
        """That many processes that run ``python words``, as one program where there are several."""
        with socket.socket() as server:
            server.bind(("localhost", 0))
            address = f"localhost:{server.getsockname()[1]}"
        started = []
        for index in range(count):
            joining = dict(zip(SETTINGS, (address, str(count), str(index)), strict=True)) if count > 1 else {}
            log = self.path / f"errors_{len(self.processes)}.txt"
            with log.open("w") as file:
                style = {"stdout": subprocess.PIPE, "stderr": file, "text": True, "cwd": ROOT}
                process = subprocess.Popen([sys.executable, *map(str, words)], env=self.environment | joining, **style)
            self.processes.append(process)
            started.append((process, log))
        return started


def printed(started):
    """The lines that process 0 has printed when all have ended well; the others print none."""
    lines = [process.communicate(timeout=1800)[0].splitlines() for process, _ in started]
    assert [process.returncode for process, _ in started] == [0] * len(started), errors(started)
    assert not any(lines[1:])
    return [line for line in lines[0] if not line.startswith("[Gloo]")]


def kill_after(start, started):
    """Kills all processes as soon as process 0 has printed a line that starts so."""
    try:
        reached = any(line.startswith(start) for line in iter(started[0][0].stdout.readline, ""))
        assert reached, errors(started)
    finally:
        for process, _ in started:
            process.kill()
            process.communicate()


def errors(started):
    return [log.read_text() for _, log in started]


@pytest.fixture(scope="module")
def machine(tmp_path_factory, small_model):
    path = tmp_path_factory.mktemp("hosts")
    for name, seed in (("model", 0), ("other", 1)):
        save_model(path / name, Model(small_model, 1, untrained(small_model, seed=seed)), {})
    machine = Machine(path)
    yield machine
    for process in machine.processes:
        process.kill()
        process.wait()


def records(directory, arm=None):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if arm in (None, record.get("arm"))]


def assert_same_records(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"arm"}:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=3e-5, err_msg=name)


def assert_same_model(found, expected):
    chex.assert_trees_all_close(load_model(found).params, load_model(expected).params, rtol=1e-3, atol=3e-5)


@pytest.mark.slow
def test_two_processes_agree_and_share_files_and_devices(machine):
    assert printed(machine.start(2, "tests/host_worker.py", machine.path)) == ["process 0"]
    first, second = (json.loads((machine.path / str(index)).read_text()) for index in range(2))
    other = "hosts: another process cannot go on, and says why"
    differing = {
        "first": (True, False),
        "together": (0, 1),
        "together refused": (["refused by 0", other], [other, "refused by 1"]),
        "own part": ([[0, 1, 2]], [[3, 4, 5]]),
    }
    assert {name: (first.pop(name), second.pop(name)) for name in differing} == differing
    for name, own in (
        ("other options", r"^out: got 'config\.seed unlike"),
        ("other model", r"^checkpoint: got '\w{64}', a"),
    ):
        assert first.pop(name) == other
        assert re.match(own, second.pop(name))
    assert first == second
    assert first == {
        "several": True,
        "any": [True, True, False],
        "of_first": True,
        "of_first refused": "refused by 0",
        "of_first failed": [28, "metrics.jsonl"],
        "whole": [[0, 1, 2], [3, 4, 5]],
        "uneven": "number of processes: got 2, allowed is one that evenly shares 1 runs, or 3 rows of each, or both",
        "judged": [1.0, 0.0, 1.0],
        "records": [[{"step": 1}], 2.0],
        "another run": first["another run"],
        "nested": [False, True, True],
        "logs refused": first["logs refused"],
        "written": [2, first["written"][1]],
    }
    assert "holds a run with another config (differing: seed)" in first["another run"]
    files = [str(machine.path / "full" / f"{name}.jsonl") for name in ("metrics", "samples", "seconds")]
    assert first["logs refused"] == [*([21, file] for file in files), None]
    assert first["written"][1].startswith(str(machine.path / "nowhere" / "results.json"))


@pytest.mark.slow
def test_pretraining_by_two_processes_stopped_and_resumed_is_that_by_one(machine):
    words = ["-m", "ckl_jax.pretrain", *PRETRAIN.split(), "--data-dir", machine.path / "tfds", "--out"]
    alone, together = machine.path / "pretrained_alone", machine.path / "pretrained"
    one = machine.start(1, *words, alone)
    kill_after("step 2/6", machine.start(2, *words, together))
    assert (together / "checkpoints" / "2" / "default" / "ocdbt.process_1").is_dir()
    lines = printed(machine.start(2, *words, together))
    assert not any(line.startswith("step 2/6") for line in lines)
    printed(one)
    assert_same_records(records(together), records(alone))
    assert_same_model(together, alone)


@pytest.mark.slow
def test_figure4_by_two_processes_stopped_and_resumed_and_its_episodes_shared_are_those_by_one(machine):
    words = [*FINETUNE.split(), "--checkpoint", machine.path / "model", "--out"]
    alone, by_run, by_row = (machine.path / name for name in ("alone", "by_run", "by_row"))
    figure4 = ["-m", "experiments.figure4_prioritized_kl", *words]
    one = machine.start(1, *figure4, alone)
    kill_after("round 1/2", machine.start(2, *figure4, by_run))
    lines = printed(machine.start(2, *figure4, by_run))
    assert [line.split(":")[0] for line in lines if line.startswith(("before", "round"))] == ["round 2/2"]
    printed(one)
    assert_same_records(records(by_run), records(alone))
    for arm in ("standard", "prioritized"):
        assert_same_model(by_run / arm / "seed_0", alone / arm / "seed_0")
    assert {path.name for path in by_run.iterdir()} == {path.name for path in alone.iterdir()}

    finetune = ["-m", "ckl_jax.finetune", "--shard-state", *words]
    printed(machine.start(2, *finetune, by_row))
    assert (by_row / "checkpoints" / "2" / "default" / "ocdbt.process_1").is_dir()
    expected = [record | {"arm": "run"} for record in records(alone, "prioritized")]
    assert_same_records(records(by_row), expected)
    assert_same_model(by_row / "run" / "seed_0", alone / "prioritized" / "seed_0")
