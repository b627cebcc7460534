"""Kills pre-training and fine-tuning with kill -9 at random moments and compares what they end with.

    python -m tests.kill_trials --trials 100

A trial is a kill. The same command is started again until it ends, and then its parameters, metrics.jsonl, results.json
and the names of its files must be those of a run that was never killed, to the last bit. Prints how many were and were
not; the exit code is 1 if any was not. Both commands take seconds and save a checkpoint every 100 ms or so: many kills
fall into the saving.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ckl_jax.checkpoint.store import Model, fingerprint, load_model, save_model
from ckl_jax.config import ModelConfig
from ckl_jax.model import GPT2

ROOT = pathlib.Path(__file__).parent.parent
MODEL = ModelConfig(num_layers=1, num_heads=2, width=16, block_size=400, attention_chunk=64)
PRETRAIN = """ckl_jax.pretrain --max-digits 1 --num-documents 60 --packing documents --batch-size 4 --num-steps 60
--warmup-steps 4 --checkpoint-every 4 --eval-problems 2 --model.num-layers 1 --model.num-heads 2 --model.width 16
--model.block-size 280 --model.attention-chunk 64 --data-dir tfds"""
FINETUNE = """experiments.figure4_prioritized_kl --checkpoint model --extra-length 0 --episodes 4 --minibatch-episodes 2
--diagnostic-episodes 2 --rounds 12 --test-every 1 --test-problems 2 --final-problems 2 --old-problems 2 --seeds 1
--rollout plain"""


class Job(NamedTuple):
    """A command in a working directory where all its runs share the compiled programs."""

    words: str
    place: pathlib.Path

    def start(self, out: pathlib.Path) -> subprocess.Popen:
        """Starts the command, quietly; what it says goes to ``out``.log."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_COMPILATION_CACHE_DIR": str(self.place / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "-m", *self.words.split(), "--out", str(out)]
        with out.with_suffix(".log").open("a") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, cwd=self.place, env=environment)


def make_jobs(place: pathlib.Path) -> tuple[Job, Job]:
    """Pre-training, and Figure 4's fine-tuning of a random model, each in a directory of its own."""
    params = jax.jit(GPT2(MODEL).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    params["params"]["wte"]["embedding"] *= 10
    for name in ("pretrain", "finetune"):
        (place / name).mkdir()
    save_model(place / "finetune" / "model", Model(MODEL, 1, params), {})
    return Job(PRETRAIN, place / "pretrain"), Job(FINETUNE, place / "finetune")


def outcome(out: pathlib.Path) -> dict[str, object]:
    """What must be the same for every run of a command, which is all but the time that it took."""
    models = sorted(path.parent for path in out.rglob("model.json"))
    results = json.loads((out / "results.json").read_text()) if (out / "results.json").exists() else {}
    return {
        "parameters": {str(path.relative_to(out)): fingerprint(load_model(path).params) for path in models},
        "metrics": (out / "metrics.jsonl").read_bytes(),
        "samples": (out / "samples.jsonl").read_bytes() if (out / "samples.jsonl").exists() else b"",
        "results": json.dumps({name: value for name, value in results.items() if name != "wall_seconds"}),
        "files": sorted(str(path.relative_to(out)) for pattern in ("*", "checkpoints/*") for path in out.glob(pattern)),
    }


def run_whole(job: Job) -> tuple[dict[str, object], float]:
    """What runs that are not killed end with, and the seconds that they take when nothing must be compiled."""
    found = []
    for name in ("compiling", "compiled_before"):
        process = job.start(job.place / name)
        _wait_for_start(process, job.place / name)
        started = time.monotonic()
        assert process.wait() == 0, (job.place / f"{name}.log").read_text()
        found.append(outcome(job.place / name))
    assert found[0] == found[1]
    return found[0], time.monotonic() - started


def trials(job: Job, kills: int, seed: int, whole: dict[str, object], seconds: float) -> Iterator[tuple[int, int, int]]:
    """Starts runs and kills them until there were enough kills.

    Args:
      seed: of the moments.
      whole, seconds: from ``run_whole``.

    Yields:
      kills, runs that ended in spite of them, and how many of these ended differently, whenever a run ended.
    """
    drawn, done, different = random.Random(seed), 0, 0
    for runs in itertools.count(1):
        out = job.place / f"run_{runs}"
        while _killed(job, out, drawn.random() < 0.5, drawn.uniform(0, 0.7 * seconds)):
            done += 1
        different += outcome(out) != whole
        yield done, runs, different
        if done >= kills:
            return


def _killed(job: Job, out: pathlib.Path, after_a_record: bool, seconds: float) -> bool:
    """Starts the command and kills it that much later than it has its directory, or has logged something new."""
    process = job.start(out)
    _wait_for_start(process, out)
    if after_a_record:
        wait_for_a_record(process, out)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    assert code in (0, -signal.SIGKILL), out.with_suffix(".log").read_text()
    return code != 0


def _wait_for_start(process: subprocess.Popen, out: pathlib.Path) -> None:
    """Until the process has its directory: before, there is nothing to damage."""
    lock = out / ".lock"
    while process.poll() is None and not (lock.exists() and lock.read_text().startswith(f"{process.pid} ")):
        time.sleep(0.01)


def wait_for_a_record(process: subprocess.Popen, out: pathlib.Path) -> None:
    """Until the process has computed something new."""
    metrics = out / "metrics.jsonl"
    before = metrics.read_bytes() if metrics.exists() else b""
    while process.poll() is None and (metrics.read_bytes() if metrics.exists() else b"") in (before, b""):
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100, help="kills of each of the two commands")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    all_different = 0
    with tempfile.TemporaryDirectory() as place:
        for job in make_jobs(pathlib.Path(place)):
            different = 0
            for kills, runs, different in trials(job, given.trials, given.seed, *run_whole(job)):
                print(f"{job.place.name}: {kills} kills, {runs} runs ended, {different} differently", flush=True)
            all_different += different
    sys.exit(1 if all_different else 0)


if __name__ == "__main__":
    main()
