"""Commands that are killed at any moment go on and end with the same bits; those that are told to stop say so."""

import signal

import kill_trials
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return kill_trials.make_jobs(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def pretrained(jobs):
    return kill_trials.run_whole(jobs[0])


def _end_the_same_after_three_kills(job, whole, seconds):
    *_, (kills, runs, different) = kill_trials.trials(job, 3, 0, whole, seconds)
    assert kills >= 3
    assert runs >= 1
    assert different == 0


def test_pre_training_that_is_killed_ends_with_the_same_bits(jobs, pretrained):
    _end_the_same_after_three_kills(jobs[0], *pretrained)


def test_fine_tuning_that_is_killed_ends_with_the_same_bits(jobs):
    _end_the_same_after_three_kills(jobs[1], *kill_trials.run_whole(jobs[1]))


def test_pre_training_that_is_told_to_stop_exits_with_75_and_goes_on(jobs, pretrained):
    out = jobs[0].place / "stopped"
    process = jobs[0].start(out)
    kill_trials.wait_for_a_record(process, out)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    last = out.with_suffix(".log").read_text().splitlines()[-1]
    assert last.startswith("stopped by SIGTERM: step ")
    assert last.endswith(f"/60 is saved in {out}; the same command goes on from there")
    assert jobs[0].start(out).wait() == 0
    assert kill_trials.outcome(out) == pretrained[0]
