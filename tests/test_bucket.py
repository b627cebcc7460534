"""Whole runs in a bucket: killed in the middle, the same command goes on there and ends as the local run does."""

import json
import os
import socket
import subprocess
import sys
import time

import bucket_server
import fsspec.config
import kill_trials
import pytest

from ckl_jax.checkpoint.shipped import SHIPPED_TINY
from ckl_jax.checkpoint.store import fingerprint, load_model
from ckl_jax.errors import ConfigError
from ckl_jax.runtime import paths

pytestmark = pytest.mark.slow
ARMS = ("standard", "prioritized")


@pytest.fixture(scope="module")
def environment():
    """Of processes whose gs:// is a server on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, bucket_server.__file__, str(port)]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout.readline() == "ready\n"
        yield bucket_server.environment(port)
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def bucket(environment):
    """The bucket, seen from this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "gcs", json.loads(environment["FSSPEC_GCS"]))
        yield paths.parse(f"gs://{bucket_server.BUCKET}")


def start(job, out, environment):
    words = [sys.executable, "-m", *job.words.split(), "--out", str(out)]
    settings = os.environ | environment | {"PYTHONPATH": str(kill_trials.ROOT), "JAX_PLATFORMS": "cpu"}
    settings |= {
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(job.place / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    log = (job.place / "log").open("w")
    return subprocess.Popen(words, cwd=job.place, env=settings, stdout=log, stderr=log)


def outcome(out):
    models = {arm: fingerprint(load_model(out / arm / "seed_0").params) for arm in ARMS}
    results = json.loads((out / "results.json").read_text())
    return models, (out / "metrics.jsonl").read_text(), results | {"wall_seconds": None}


def test_fine_tuning_in_a_bucket_that_is_killed_goes_on_and_ends_as_on_disk(bucket, environment, tmp_path):
    _, job = kill_trials.make_jobs(tmp_path)
    local, remote = job.place / "local", bucket / "figure4"
    assert start(job, local, {}).wait() == 0, (job.place / "log").read_text()
    process = start(job, remote, environment)
    metrics = remote / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("success") >= 6):
        time.sleep(0.05)
    assert process.poll() is None, (job.place / "log").read_text()
    process.kill()
    process.wait()
    before = metrics.read_text()
    assert start(job, remote, environment).wait() == 0, (job.place / "log").read_text()
    after = metrics.read_text()
    assert outcome(remote) == outcome(local)
    assert len(after) > len(before)
    assert (remote / "figure4.png").exists()
    seconds = (remote / "seconds.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in seconds].count(0) == 1  # It did not begin again.


def test_a_model_that_was_copied_into_a_bucket_loads(bucket):
    for file in paths.files_below(SHIPPED_TINY):
        copy = bucket / "copied" / file.relative_to(SHIPPED_TINY).as_posix()
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    assert fingerprint(load_model(bucket / "copied").params) == fingerprint(load_model(SHIPPED_TINY).params)


def test_a_damaged_checkpoint_in_a_bucket_is_refused(bucket):
    out = bucket / "copied"
    (manifest,) = out.glob("params.sha256.json")
    (name, _), *_ = json.loads(manifest.read_text()).items()
    file = out / "params" / name
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ConfigError, match="checkpoint: "):
        load_model(out)
