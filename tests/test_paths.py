"""Runs in a bucket: their files against a file system in memory that, like a bucket's, cannot append."""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import sys
import types

import fsspec
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from hostile import TYPES, command_of, options_of, saved_model
from matplotlib.figure import Figure

from ckl_jax import checkpoint, convert
from ckl_jax.analysis import plots
from ckl_jax.checkpoint import manifest
from ckl_jax.checkpoint.shipped import PRETRAINED, located
from ckl_jax.datasets import load_stream
from ckl_jax.errors import ConfigError
from ckl_jax.runs import directory, records
from ckl_jax.runs.directory import RunDirectory
from ckl_jax.runtime import cli, paths
from ckl_jax.runtime.hosts import write_json


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


@pytest.mark.parametrize("text", ["./N7", "N7/", ".//N7", "./N7/."])
def test_a_path_is_not_the_name_of_a_model_that_ships(monkeypatch, tmp_path, text):
    monkeypatch.chdir(tmp_path)
    assert located(paths.parse("N7")) == PRETRAINED / "N7"
    assert located(paths.parse(text)) == tmp_path / "N7"
    (tmp_path / "N7").mkdir()
    with pytest.raises(
        ConfigError, match=rf"^checkpoint: got 'N7', allowed is {PRETRAINED}/N7 for the model that ships"
    ):
        located(paths.parse("N7"))
    (tmp_path / "N7" / "model.json").touch()
    assert located(paths.parse("N7")) == pathlib.Path("N7")


@pytest.mark.parametrize(("text", "expected"), [("~", "/home/me"), ("~/", "/home/me"), (".", "."), ("///", "/")])
def test_a_home_and_a_directory_itself_stay_what_they_are(monkeypatch, text, expected):
    monkeypatch.setenv("HOME", "/home/me")
    assert paths.parse(text) == pathlib.Path(expected)


@pytest.mark.parametrize(
    "text",
    [
        *("gs://", "gs:///", "gs:///x", "gs:/bucket/x", "gs://b", "gs://BUCKET/x", "gs://bucket:80/x"),
        *(
            "gs:bucket/x",
            "GS:bucket",
            "s3:bucket",
            "gs://bucket/a/../../b",
            "s3://bucket/run",
            "s3:/bucket/run",
            "http://host/x",
            "hdfs:/x",
        ),
    ],
)
def test_what_is_no_bucket_is_refused(bucket, text):
    with pytest.raises(ConfigError, match=r"got .*allowed are local paths and gs://bucket/directory"):
        cli.parse(Command, None, ["--out", text])


def test_a_bucket_with_a_variable_is_refused(bucket):
    with pytest.raises(ConfigError, match=r"got 'gs://bucket/\$\(RUN\)', allowed is a path without variables"):
        cli.parse(Command, None, ["--out", "gs://bucket/$(RUN)"])


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


@pytest.mark.parametrize("name", ["lr=[1]", "a?b", "a*"])
def test_a_place_in_a_bucket_that_orbax_takes_for_a_pattern_is_refused(bucket, name):
    with pytest.raises(ConfigError, match=r"^out: got 'gs://bucket/.*', allowed is a path without .*: Orbax"):
        RunDirectory(f"gs://bucket/{name}", {})


def test_a_run_in_a_bucket_keeps_its_config_and_metrics_and_refuses_another(bucket, monkeypatch):
    monkeypatch.setattr(directory, "StateCheckpoints", lambda where: None)  # Orbax asks Google itself for its bucket.
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


def test_what_is_written_survives_a_power_cut(tmp_path, monkeypatch):
    """Every file is on the disk before the name that says it is whole, and before what comes after it."""
    synced, fsync = [], os.fsync

    def note(descriptor):
        synced.append(pathlib.Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    paths.replace(tmp_path / "config.json", "{}")
    assert synced == [tmp_path / "config.json.tmp", tmp_path]
    paths.append(tmp_path / "metrics.jsonl", "{}\n")
    assert synced[2:] == [tmp_path / "metrics.jsonl"]
    (tmp_path / "saved" / "inner").mkdir(parents=True)
    (tmp_path / "saved" / "inner" / "array").write_bytes(b"1")
    manifest.write(tmp_path / "saved")
    assert synced[-2:] == [tmp_path / "saved.sha256.json.tmp", tmp_path]
    assert {tmp_path / "saved", tmp_path / "saved/inner", tmp_path / "saved/inner/array"} <= set(synced[3:-2])


@pytest.mark.parametrize(("number", "raises"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_sync_is_written_and_one_that_fails_is_told(tmp_path, monkeypatch, number, raises):
    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"config\.json") if raises else contextlib.nullcontext():
        paths.replace(tmp_path / "config.json", "{}")
    assert (tmp_path / "config.json").exists() != raises


def test_figures_are_drawn_into_a_bucket(bucket):
    plots.save(Figure(), bucket / "run", "figure")
    assert (bucket / "run" / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (bucket / "run" / "figure.svg").read_bytes()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gs://bucket", "gs://bucket"),
        ("gs://bucket/", "gs://bucket"),
        ("GS://bucket/run/", "gs://bucket/run"),
        ("gs://bucket//run///x", "gs://bucket/run/x"),
        ("gs://bucket/./run", "gs://bucket/run"),
        ("gs://my.bucket-1_x/~/1$", "gs://my.bucket-1_x/~/1$"),
    ],
)
def test_a_bucket_is_named_in_one_way(bucket, text, expected):
    assert str(paths.parse(text)) == str(paths.resolved(paths.parse(text))) == expected
    assert str(paths.parse(text) / "x") == expected + "/x"


HOME_AND_OTHERS = {
    "~": "{home}",
    "~/": "{home}",
    "~/x/": "{home}/x",
    "~/../y": "{home}/../y",
    "~root/x": "{root}/x",
    "./~/x": "{here}/~/x",
    "x/~": "x/~",
    "file:///a/b%20c/": "/a/b c",
    "file://localhost/a": "/a",
    "file:/a/b": "/a/b",
    "x/./y//z/": "x/y/z",
    "a:b/c": "a:b/c",
    "./s3:/x": "{here}/s3:/x",
    "c:/x": "c:/x",
    "costs$": "costs$",
    "there$HOME": "there$HOME",
}


@pytest.mark.parametrize("text", HOME_AND_OTHERS)
def test_a_path_means_what_people_expect_of_it(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "there$HOME").mkdir()
    expected = HOME_AND_OTHERS[text].format(
        here=tmp_path, home=tmp_path / "home", root=pathlib.Path("~root").expanduser()
    )
    assert paths.parse(text) == pathlib.Path(expected)
    assert paths.resolved(text) == pathlib.Path(expected).resolve()
    assert paths.parse(pathlib.Path(expected)) == pathlib.Path(expected)


REFUSED = {
    "$HOME/x": "without variables",
    "runs/${SEED}": "without variables",
    "runs/$(SEED)/x": "without variables",
    "~no-such-user/x": "only where that user has a home directory",
    "file://host/x": "file:///directory",
    "file:///a%0Ab": "one or more printable",
    "file:///a%00": "one or more printable",
    "file:///x?y": "file:///directory",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_no_shell_has_replaced_and_what_is_elsewhere_is_refused(text):
    with pytest.raises(ConfigError, match=rf"^--out: path: got \S+, allowed is .*{REFUSED[text]}"):
        cli.parse(Command, None, ["--out", text])


@pytest.mark.parametrize("name", TYPES)
def test_every_path_of_every_command_is_read_in_that_way(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    _, config_type, preset = command_of(name)
    options = [option for option, kind in options_of(config_type) if "Path" in str(kind)]
    assert options or name in ("ckl_jax.models", "ckl_jax.check_xla")
    for option in options:
        field = option.removeprefix("--").replace("-", "_")
        parsed = cli.parse(config_type, preset, [f"{option}=~/x/"])
        holder = getattr(parsed, "models", parsed) if not hasattr(parsed, field) else parsed
        assert getattr(holder, field) in (tmp_path / "x", (tmp_path / "x",))
        for text in ("$HOME/x", "gs:/bucket/x", "s3://x/y"):
            with pytest.raises(ConfigError, match=rf"{option}: path: got \S+, allowed (is|are) "):
                cli.parse(config_type, preset, [option, text])
    assert list(tmp_path.iterdir()) == []


def test_public_functions_take_a_path_as_text(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved_model(tmp_path / "model")
    model = checkpoint.load_model("~/model")
    checkpoint.save_model("~/copy", model, {})
    assert checkpoint.fingerprint(checkpoint.load_model(f"file://{tmp_path}/copy/").params) == checkpoint.fingerprint(
        model.params
    )
    RunDirectory("~/run", {"seed": 0}).close()
    assert (tmp_path / "run" / "config.json").exists()
    plots.save(Figure(), "~/run", "figure")
    assert (tmp_path / "run" / "figure.png").exists()
    assert records.earlier_results("~/run", "nothing") is None
    load_stream(1, 4, data_dir="~/data")
    assert (tmp_path / "data").is_dir()
    for source in ("~/model", f"file://{tmp_path}/model"):
        with pytest.raises(ConfigError, match=r"^out: got .*, allowed is another than source"):
            convert.ConvertCommand(source, tmp_path / "model")
        assert convert._local(source, "source", convert.HUB_FILES) == tmp_path / "model"


@pytest.mark.parametrize("has_home", [False, True])
def test_a_dataset_without_a_home_is_refused_by_name(tmp_path, monkeypatch, has_home):
    (tmp_path / "file").write_text("not yours")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "none"))
    if not has_home:
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(ConfigError, match=r"^data_dir: got '?~/tensorflow_datasets'?, allowed is "):
        load_stream(1, 4)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "given"))
    load_stream(1, 4)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "given"}
