"""Runs in a bucket: their files against a file system in memory that, like a bucket's, cannot append."""

import dataclasses
import json
import pathlib
import sys
import types

import fsspec
import matplotlib.pyplot as plt
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from ckl_jax import cli, paths, plots, runs
from ckl_jax.checkpoint import write_json
from ckl_jax.config import ConfigError
from ckl_jax.runs import RunDirectory


class Bucket(MemoryFileSystem):
    """gs:// in memory."""

    protocol = ("gs", "gcs")
    store = {}  # noqa: RUF012  What the class it stands for does.
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(str(path).removeprefix("gs://").removeprefix("gcs://"))

    def open(self, path, mode="rb", **options):
        assert "a" not in mode, "gcsfs overwrites instead"
        return super().open(path, mode, **options)


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setattr(fsspec, "filesystem", lambda name, **_: Bucket())
    monkeypatch.setattr(fsspec, "get_filesystem_class", lambda name: Bucket)
    monkeypatch.setitem(sys.modules, "google.cloud.storage", types.ModuleType("storage"))
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield paths.parse("gs://bucket")
    Bucket.store.clear()
    backend.fsspec_backend._get_filesystem.cache_clear()


@dataclasses.dataclass(frozen=True)
class Command:
    """A command.

    Args:
      out: where to.
      more: several.
    """

    out: pathlib.Path = pathlib.Path("runs/x")
    more: tuple[pathlib.Path, ...] = ()


def test_an_option_takes_local_paths_and_buckets(bucket):
    parsed = cli.parse(Command, None, ["--out", "gs://bucket/run", "--more", "a", "gs://bucket/b"])
    assert str(parsed.out) == "gs://bucket/run"
    assert str(parsed.out / "results.json") == "gs://bucket/run/results.json"
    assert [str(path) for path in parsed.more] == ["a", "gs://bucket/b"]
    assert cli.parse(Command, None, []) == Command()
    assert cli.parse(Command, None, ["--out", "a/b"]) == Command(pathlib.Path("a/b"))


@pytest.mark.parametrize("text", ["gs://", "s3://bucket/run", "http://host/x"])
def test_what_is_no_bucket_is_refused(bucket, text):
    with pytest.raises(ConfigError, match=r"got .*allowed are local paths and gs://bucket/directory"):
        cli.parse(Command, None, ["--out", text])


def test_a_bucket_without_gcsfs_is_refused_and_no_directory_named_gs_is_made(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def missing(name):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ConfigError, match="extra tpu"):
        cli.parse(Command, None, ["--out", "gs://bucket/run"])
    assert not list(tmp_path.iterdir())


def test_a_bucket_is_not_put_below_this_directory(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(paths.resolved(bucket / "run")) == "gs://bucket/run"
    assert paths.resolved(pathlib.Path("run")) == tmp_path.resolve() / "run"


def test_files_in_a_bucket_are_appended_to_listed_and_replaced(bucket):
    run = bucket / "run"
    paths.append(run / "metrics.jsonl", "one\n")
    paths.append(run / "metrics.jsonl", "two\n")
    write_json(run / "deep" / "results.json", {"a": 1})
    write_json(run / "deep" / "results.json", {"a": 2})
    assert (run / "metrics.jsonl").read_text() == "one\ntwo\n"
    assert json.loads((run / "deep" / "results.json").read_text()) == {"a": 2}
    below = sorted(str(path.relative_to(run)) for path in paths.files_below(run))
    assert below == ["deep/results.json", "metrics.jsonl"]


def test_a_run_in_a_bucket_keeps_its_config_and_metrics_and_refuses_another(bucket, monkeypatch):
    monkeypatch.setattr(runs, "StateCheckpoints", lambda directory: None)  # Orbax asks Google itself for its bucket.
    run = RunDirectory(bucket / "run", {"seed": 0})
    run.log([{"step": 1}, {"step": 2}])
    run.log([{"step": 3}])
    run.log_seconds(3, 1.5)
    run.log_seconds(4, 0.5)
    again = RunDirectory(bucket / "run", {"seed": 0})
    again.rewind_metrics(2)
    assert again.metrics() == [{"step": 1}, {"step": 2}]
    assert again.seconds() == 2.0
    with pytest.raises(ConfigError, match="differing: seed"):
        RunDirectory(bucket / "run", {"seed": 1})


def test_figures_are_drawn_into_a_bucket(bucket):
    figure = plt.figure()
    plots.save(figure, bucket / "run", "figure")
    assert (bucket / "run" / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (bucket / "run" / "figure.svg").read_bytes()
