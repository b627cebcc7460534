"""One of two processes that ``test_hosts`` starts: what each finds when they agree, as JSON in DIRECTORY/<its number>.

python tests/host_worker.py DIRECTORY
"""

import json
import pathlib
import sys

import jax
import numpy as np

from ckl_jax import tasks
from ckl_jax.checkpoint.store import load_model
from ckl_jax.errors import ConfigError
from ckl_jax.evaluate import judge
from ckl_jax.runs.directory import RunDirectory
from ckl_jax.runs.logs import Copies
from ckl_jax.runtime import hosts, sharding
from ckl_jax.tasks import alphabet
from ckl_jax.tasks.columns import ADDITION


def refusal(call, *arguments):
    try:
        call(*arguments)
    except ConfigError as error:
        return str(error)


def failure(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return [error.errno, error.filename]


def full_disk():
    raise OSError(28, "No space left on device", "metrics.jsonl")


class Full:
    """A copy of the records that has no room."""

    def add(self, record):
        full_disk()


def logs_refused(directory):
    """What each process is told of records that process 0 cannot write, and that a copy of them cannot take."""
    run = RunDirectory(directory / "full", {"seed": 0})
    for path in (run.metrics_path, run.samples_path, run.path / "seconds.jsonl"):
        hosts.of_first(path.mkdir)
    records = [{"step": 1}]
    found = [failure(run.log, records), failure(run.log_samples, records), failure(run.log_seconds, 1, 2.0)]
    hosts.of_first(run.metrics_path.rmdir)
    run._copies = Copies({"tensorboard": Full()})
    return [*found, failure(run.log, records)]


def nested():
    """What is done by all together, done by process 0 alone."""
    inner = hosts.of_first(
        lambda: hosts.of_first(lambda: hosts.together(lambda: (hosts.several(), hosts.any_host(True))))
    )
    return [*inner, hosts.several()]


def refuse(where):
    if jax.process_index() == where:
        raise ConfigError(f"refused by {where}")


def judged(model):
    """Whether three answers are right that are given whole, the second with another number's result."""
    problems = [tasks.Problem(1, 2), tasks.Problem(3, 4), tasks.Problem(5, 6)]
    texts = [ADDITION.answer_text(tasks.Problem(a, b)) for a, b in ((1, 2), (3, 5), (5, 6))]
    given_BxT = np.full((3, max(map(len, texts))), -1)
    for row, text in enumerate(texts):
        given_BxT[row, : len(text)] = alphabet.encode(text)
    return judge(model, problems, 1, given_BxT=given_BxT).tolist()


def run_directory(directory):
    run = RunDirectory(directory / "run", {"seed": 0})
    run.log([{"step": 1}])
    run.log_seconds(1, 2.0)
    run.log([{"step": 2}])
    run.rewind_metrics(1)
    return run.metrics(), run.seconds()


def main(directory):
    hosts.start()
    print(f"process {jax.process_index()}")
    mesh = sharding.make_mesh(2, 1)
    by_run = sharding.put(np.arange(6).reshape(2, 3), sharding.by_run(mesh))
    found = {
        "several": hosts.several(),
        "first": hosts.is_first(),
        "any": [hosts.any_host(jax.process_index() == number) for number in range(3)],
        "of_first": hosts.of_first(lambda: np.full(5000, 7 + jax.process_index())).tolist() == [7] * 5000,
        "of_first refused": refusal(hosts.of_first, lambda: refuse(0)),
        "of_first failed": failure(hosts.of_first, full_disk),
        "together": hosts.together(jax.process_index),
        "together refused": [refusal(hosts.together, lambda number=number: refuse(number)) for number in range(2)],
        "own part": np.asarray(by_run.addressable_data(0)).tolist(),
        "whole": sharding.to_host(by_run).tolist(),
        "uneven": refusal(sharding.make_mesh, 1, 3),
        "judged": judged(load_model(directory / "model")),
        "records": run_directory(directory),
        "another run": refusal(RunDirectory, directory / "run", {"seed": 1}),
        "nested": nested(),
        "logs refused": logs_refused(directory),
        "written": failure(hosts.write_json, directory / "nowhere" / "results.json", {}),
        "other options": refusal(
            RunDirectory, directory / "other", {"config": {"seed": jax.process_index(), "beta": 1}}
        ),
        "other model": refusal(load_model, directory / ["model", "other"][jax.process_index()]),
    }
    (directory / str(jax.process_index())).write_text(json.dumps(found))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
