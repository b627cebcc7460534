"""A thousand rounds in one process: memory stays flat, nothing is traced again, and two checkpoints are kept."""

import json
import pathlib
import resource

import jax
import numpy as np
import pytest
from policies import untrained

from ckl_jax.checkpoint.store import Model
from ckl_jax.config import FinetuneConfig
from ckl_jax.finetune import finetune
from ckl_jax.runs.directory import RunDirectory

CONFIG = FinetuneConfig(
    extra_length=0,
    episodes=2,
    minibatch_episodes=2,
    rounds=1000,
    test_every=20,
    test_problems=2,
    final_problems=2,
    old_problems=2,
    diagnostic_episodes=1,
    rollout="plain",
    data_devices=1,
)
MEGABYTES_MORE = 40
"""What 800 rounds may add to the process; 17 were measured."""
TRACED = "/jax/core/compile/jaxpr_trace_duration"


def _resident_megabytes():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@pytest.mark.slow
def test_a_thousand_rounds_take_no_more_memory_than_two_hundred_and_compile_once(small_model, tmp_path):
    params = untrained(small_model)
    directory = RunDirectory(tmp_path, {})
    resident, traces, kept, traced = {}, {}, {}, []

    def count(event, seconds, **_):
        if event == TRACED:
            traced.append(seconds)

    def look(line):
        if line.startswith("round "):
            done = int(line.split()[1].split("/")[0])
            resident[done], traces[done] = _resident_megabytes(), len(traced)
            kept[done] = {path.name for path in directory.checkpoints.directory.iterdir()}

    jax.monitoring.register_event_duration_secs_listener(count)
    finetune(CONFIG, Model(small_model, 1, params), directory, {"run": {}}, 1, look)
    jax.monitoring.unregister_event_duration_listener(count)
    assert max(resident[done] for done in resident if done > 200) - resident[200] < MEGABYTES_MORE, resident
    assert traces[20] > 0
    assert traces[200] == traces[1000]
    assert kept[1000] == {"980", "1000", "980.sha256.json", "1000.sha256.json"}
    assert {len(names) for names in kept.values()} == {4}
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(np.r_[np.arange(1001), np.arange(20, 1001, 20)].tolist())
