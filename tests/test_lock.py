"""Two processes never write to one run's directory, and a process that is gone, however it went, holds none."""

import contextlib
import errno
import fcntl
import os
import subprocess
import sys

import pytest

from ckl_jax.errors import ConfigError
from ckl_jax.runs.directory import RunDirectory
from ckl_jax.runs.lock import hold

HOLDER = """
import pathlib, sys
from ckl_jax.runs.lock import hold
held = hold(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def _held_by_another_process(directory):
    command = [sys.executable, "-c", HOLDER, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_by_the_first_ones_id_until_that_is_killed(tmp_path):
    config = {"command": "a test"}
    run = RunDirectory(tmp_path, config)
    run.log([{"step": 1}])
    run.close()
    with _held_by_another_process(tmp_path) as process:
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        with pytest.raises(
            ConfigError, match=rf"^out: {tmp_path} is in use by process {process.pid} on .*; allowed is"
        ):
            RunDirectory(tmp_path, config)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
        process.kill()
        process.wait()
        again = RunDirectory(tmp_path, config)
        assert again.metrics() == [{"step": 1}]
        assert (tmp_path / ".lock").read_text().startswith(f"{os.getpid()} on ")
        again.close()


def test_one_process_may_open_its_directory_again_and_the_last_to_close_it_lets_others_in(tmp_path):
    first, second = RunDirectory(tmp_path, {}), RunDirectory(tmp_path, {})
    first.close()
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    refused = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert f"in use by process {os.getpid()}" in refused.stderr
    second.close()
    assert subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout == "held\n"


def test_a_directory_that_nothing_refers_to_any_more_is_let_go(tmp_path):
    lock = hold(tmp_path)
    assert hold(tmp_path) is lock
    del lock
    with _held_by_another_process(tmp_path):
        pass


def test_a_lock_of_a_process_that_was_killed_before_it_wrote_a_config_is_no_other_run(tmp_path):
    (tmp_path / ".lock").write_text("1 on nowhere\n")
    assert (RunDirectory(tmp_path, {}).path / "config.json").exists()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch, code):
    def refused(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refused)
    run = RunDirectory(tmp_path, {"command": "a test"})
    assert (tmp_path / ".lock").read_text().startswith(f"{os.getpid()} on ")
    run.close()


def test_what_a_lock_file_says_need_not_be_text(tmp_path, monkeypatch):
    (tmp_path / ".lock").write_bytes(b"7 on b\xfcro\n")

    def held(*_):
        raise BlockingIOError

    monkeypatch.setattr(fcntl, "flock", held)
    with pytest.raises(ConfigError, match=r"is in use by process 7 on b.ro; allowed"):
        RunDirectory(tmp_path, {"command": "a test"})
