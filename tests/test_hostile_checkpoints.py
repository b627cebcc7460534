"""Checkpoints that someone else made: nothing in them is run, believed or followed, and each is refused in one line."""

import json
import os
import re
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hostile import CANARY, PICKLE, refusal, saved_model

from ckl_jax.checkpoint import manifest
from ckl_jax.checkpoint.states import StateCheckpoints
from ckl_jax.checkpoint.store import load_model, save_model
from ckl_jax.errors import ConfigError

# Orbax leaves threads of its own behind when a read fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
WHERE = r"\S*model"
DESCRIPTION = rf"checkpoint: {WHERE}/model\.json is no model description "
DAMAGED = r" is damaged \(.+\); allowed is what the command that made it wrote"
JSON_OBJECT = r"allowed is a file with a JSON object, of at most 16777216 bytes"
PLAIN = r"allowed is a plain file or directory: links are not followed"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def model(good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(good, tmp_path / "model")
    return tmp_path / "model"


def _refused(model, expected):
    with refusal(model.parent), pytest.raises(ConfigError) as caught:
        load_model(model)
    assert re.fullmatch(expected, str(caught.value)), str(caught.value)


def seal(model):
    """The manifest that a stranger would write for what is there now."""
    manifest.write(model / "params")


def edited(directory, **changes):
    description = json.loads((directory / "model.json").read_text())
    top = {name: changes.pop(name) for name in ("model", "max_pretrain_digits") if name in changes}
    description["model"].update(changes)
    (directory / "model.json").write_text(json.dumps(description | top))


SIZES = {"num_layers": "at least 1, at most 1000", "num_heads": "at least 1", "attention_chunk": "at least 1"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        *(({name: -1}, rf"\({name}: got -1, allowed is {allowed}\)") for name, allowed in SIZES.items()),
        *(({name: 0}, rf"\({name}: got 0, allowed is {allowed}\)") for name, allowed in SIZES.items()),
        ({"num_layers": 10**9}, r"\(num_layers: got 1000000000, allowed is at least 1, at most 1000\)"),
        ({"num_layers": 10**40}, r"\(num_layers: got 10{40}, allowed is at least 1, at most 1000\)"),
        ({"width": 10**9}, r"\(width: got 10{9}, allowed is what makes at most 1e\+10 weights, not 1\.2e\+19 .*\)"),
        ({"block_size": 10**12}, r"\(block_size: got 10{12}, allowed is at least 1, and what 32 bits can hold\)"),
        ({"vocab_size": 5}, r"\(vocab_size: got 5, allowed is 41\.\.256\)"),
        ({"width": 2.5}, r"\(width: got 2\.5, allowed is an integer\)"),
        ({"width": "4"}, r"\(width: got '4', allowed is an integer\)"),
        ({"num_layers": True}, r"\(num_layers: got True, allowed is an integer\)"),
        ({"num_heads": None}, r"\(num_heads: got None, allowed is an integer\)"),
        ({"use_bias": "no"}, r"\(use_bias: got 'no', allowed is True or False\)"),
        ({"activation": "relu"}, r"\(activation: got 'relu', allowed is gelu_tanh \| gelu_erf\)"),
        ({"activation": ["gelu_erf"]}, r"\(activation: got \['gelu_erf'\], allowed is gelu_tanh \| gelu_erf\)"),
        ({"dropout": [0.1]}, r"\(dropout: got \[0\.1\], allowed is a number\)"),
        ({"dtype": ["float32"]}, r"\(dtype: got \['float32'\], allowed is float32 \| bfloat16\)"),
        ({"depth": 1}, r"\(model: got \['depth'\], allowed is fields of activation, .*width\)"),
        ({"model": {}}, r"\(model: got 'nothing for .*', allowed is all of num_layers, num_heads, .*\)"),
        ({"model": [1]}, r"\(model: got \[1\], allowed is an object of sizes\)"),
        ({"max_pretrain_digits": 0}, r"\(max_pretrain_digits: got 0, allowed is an integer of 1\.\.17\)"),
        ({"max_pretrain_digits": 18}, r"\(max_pretrain_digits: got 18, allowed is an integer of 1\.\.17\)"),
        ({"max_pretrain_digits": 1.5}, r"\(max_pretrain_digits: got 1\.5, allowed is an integer of 1\.\.17\)"),
        ({"max_pretrain_digits": "1"}, r"\(max_pretrain_digits: got '1', allowed is an integer of 1\.\.17\)"),
    ],
)
def test_a_description_of_no_model_is_refused(model, changes, expected):
    edited(model, **changes)
    _refused(model, DESCRIPTION + expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"width": 400}, rf"checkpoint: {WHERE} has .* for .*, allowed is .* \(model\.json\)"),
        ({"num_layers": 900}, r"checkpoint: got 'num_layers = 900 in model\.json', allowed is at most 16, the arrays"),
        ({"num_layers": 900, "width": 900}, r"checkpoint: got '\d+ weights in model\.json', allowed is what makes .*"),
    ],
)
def test_a_size_that_the_files_do_not_have_is_refused_before_anything_of_that_size_is_made(model, changes, expected):
    edited(model, **changes)
    _refused(model, expected)


def _without(text):
    return rf"checkpoint: {WHERE}/\S+\.json is damaged \({text}.*\); allowed is what the command that made it wrote"


@pytest.mark.parametrize("name", ["model.json", "params.sha256.json"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", _without("JSONDecodeError")),
        (b'{"a"', _without("JSONDecodeError")),
        (b"[" * 100_000, _without("RecursionError")),
        (b"\xff\xfe", _without("UnicodeDecodeError")),
        (b'{"a": NaN}', _without("ValueError: NaN is no number")),
        (b'{"a": -Infinity}', _without("ValueError: -Infinity is no number")),
        (b'{"a": {"b": 1, "b": 2}}', _without("ValueError: a key stands twice")),
        (b'{"a": ' + b"9" * 5_000 + b"}", _without("ValueError: Exceeds the limit")),
        (PICKLE, _without("UnicodeDecodeError")),
        (b'[["a", 1], [2, "b"]]', rf"checkpoint: got '{WHERE}/\S+ with a list', {JSON_OBJECT}"),
        (b"7", rf"checkpoint: got '{WHERE}/\S+ with a int', {JSON_OBJECT}"),
    ],
    ids=lambda value: str(value[:12]) if isinstance(value, bytes) else "",
)
def test_what_is_no_strict_json_object_is_refused(model, name, content, expected):
    (model / name).write_bytes(content)
    _refused(model, expected)


def _huge(path):
    with path.open("wb") as file:
        file.truncate(2**33)


@pytest.mark.parametrize(
    "make",
    [_huge, lambda path: path.mkdir(), os.mkfifo, lambda path: path.symlink_to("/dev/zero")],
    ids=["of 8 GB", "directory", "pipe", "link to a device"],
)
@pytest.mark.parametrize("name", ["model.json", "params.sha256.json"])
def test_what_is_no_small_plain_file_is_not_read(model, name, make):
    (model / name).unlink()
    make(model / name)
    _refused(model, rf"checkpoint: got '{WHERE}/{re.escape(name)}( of \d+ bytes)?', {JSON_OBJECT}")


def test_a_manifest_that_names_files_elsewhere_is_refused_and_they_are_not_read(model):
    manifest = json.loads((model / "params.sha256.json").read_text())
    elsewhere = {"../../file": "0" * 64, "/etc/passwd": "0" * 64}
    (model / "params.sha256.json").write_text(json.dumps(manifest | elsewhere))
    _refused(model, rf"checkpoint: {WHERE}/params is damaged, these .* manifest: \['\.\./\.\./file', '/etc/passwd'\]")


def _link_outside(model, name):
    shutil.move(model / name, model.parent / "outside")
    (model / name).symlink_to(model.parent / "outside")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda model: _link_outside(model, "params/d"), "params/d"),
        (lambda model: _link_outside(model, "params/_METADATA"), "params/_METADATA"),
        (lambda model: _link_outside(model, "params"), "params"),
        (lambda model: (model / "params/loop").symlink_to(model / "params"), "params/loop"),
        (lambda model: (model / "params/zero").symlink_to("/dev/zero"), "params/zero"),
        (lambda model: os.mkfifo(model / "params/pipe"), "params/pipe"),
    ],
    ids=["directory outside", "file outside", "params outside", "loop", "device", "pipe"],
)
def test_links_pipes_and_devices_among_the_parameters_are_not_followed(model, change, name):
    change(model)
    _refused(model, rf"checkpoint: got '{WHERE}/{name}', {PLAIN}")


def test_what_nothing_reads_beside_the_parameters_is_not_looked_at(model, good):
    for directory in [model, *(path for path in model.rglob("*") if path.is_dir())]:
        for name in (".DS_Store", "._d", "Thumbs.db", "desktop.ini", "model.json~", ".model.json.swp", ".nfs01"):
            (directory / name).write_text("?")
        (directory / "._loop").symlink_to("..")
        (directory / ".#lock").symlink_to("nowhere")
    chex.assert_trees_all_equal(load_model(model).params, load_model(good).params)


def test_a_name_with_a_newline_stays_on_the_line(model):
    (model / "params" / "a\nb").write_text("?")
    _refused(model, rf"checkpoint: {WHERE}/params is damaged, these files differ from the manifest: \['a\\nb'\]")


def _in_metadata(old, new):
    def change(model):
        text = (model / "params/_METADATA").read_text()
        assert old in text
        (model / "params/_METADATA").write_text(text.replace(old, new))

    return change


def _only(name, content):
    def change(model):
        shutil.rmtree(model / "params")
        (model / "params").mkdir()
        (model / "params" / name).write_bytes(content)

    return change


@pytest.mark.parametrize(
    "change",
    [
        _in_metadata('"wpe"', '"../../../outside"'),
        _in_metadata('"wpe"', '"/etc"'),
        _in_metadata('"use_ocdbt": true', '"use_ocdbt": false'),
        lambda model: (model / "params/_METADATA").write_text("[" * 100_000),
        lambda model: (model / "params/_METADATA").write_text('{"tree_metadata": {"x": []}}'),
        lambda model: (model / "params/_METADATA").write_bytes(PICKLE),
        lambda model: (model / "params/manifest.ocdbt").write_bytes(PICKLE),
        _only("checkpoint", PICKLE * 100),
        _only(
            "params.npy",
            b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }" + PICKLE,
        ),
    ],
    ids=["..", "absolute", "no ocdbt", "deep", "junk", "pickled tree", "pickled database", "only a pickle", "npy"],
)
def test_a_sealed_checkpoint_of_another_make_is_refused(model, change):
    change(model)
    seal(model)
    stored = r"got '\S*params', allowed is the arrays of Orbax as save wrote them, with their metadata"
    _refused(model, rf"checkpoint: ({stored}|\S+params{DAMAGED}|got '.* weights in .*|\S+ has None for .*)")


def test_no_file_of_the_parameters_is_ever_unpickled(model, good):
    files = sorted(path.relative_to(good) for path in (good / "params").rglob("*") if path.is_file())
    expected, refusals = load_model(good), []
    for name in files:
        (model / name).write_bytes(PICKLE)
        seal(model)
        try:
            chex.assert_trees_all_equal(load_model(model).params, expected.params)  # A file that Orbax does not need.
        except ConfigError as error:
            refusals.append(str(error))
        shutil.copy(good / name, model / name)
    said = rf"checkpoint: (\S+params{DAMAGED}|got .* as save wrote them, .*)"
    assert [line for line in refusals if not re.fullmatch(said, line)] == []
    assert len(refusals) >= 3
    assert not (model.parent / CANARY).exists()


def _saved_anew(model, change):
    params = jax.tree_util.tree_map_with_path(
        lambda key, x: change(np.asarray(x)) if "wpe" in jax.tree_util.keystr(key) else np.asarray(x),
        load_model(model).params,
    )
    shutil.rmtree(model / "params")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(model / "params", params)
    seal(model)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda x: x.astype(np.int8),
            r"has \(\(200, 4\), 'int8'\) for .*wpe.*, allowed is \(\(200, 4\), 'float32'\) .*",
        ),
        (lambda x: x.astype(np.float64), r"has \(\(200, 4\), 'float64'\) for .*wpe.*, allowed is .* \(model\.json\)"),
        (lambda x: x[:199], r"has \(\(199, 4\), 'float32'\) for .*wpe.*, allowed is \(\(200, 4\), 'float32'\) .*"),
        (lambda x: x * np.nan, r'with NaN or infinity in .*wpe.*", allowed is finite parameters'),
        (lambda x: x + np.inf, r'with NaN or infinity in .*wpe.*", allowed is finite parameters'),
    ],
    ids=["int8", "float64", "shape", "NaN", "infinity"],
)
def test_parameters_that_would_be_cast_or_are_not_finite_are_refused_by_name(model, change, expected):
    _saved_anew(model, change)
    _refused(model, rf"checkpoint: (got \")?{WHERE} {expected}")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32])
def test_a_state_of_another_type_is_not_cast(tmp_path, dtype):
    checkpoints = StateCheckpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"step": np.int32(1), "params": {"kernel": np.ones((2, 3), np.float32)}})
    asked = {"step": jax.ShapeDtypeStruct((), jnp.int32), "params": {"kernel": jax.ShapeDtypeStruct((2, 3), dtype)}}
    expected = r"checkpoint: \S+/1 has \(\(2, 3\), 'float32'\) for .*params\.kernel.*, allowed is .* \(this run\)"
    with refusal(tmp_path), pytest.raises(ConfigError) as caught:
        checkpoints.restore_latest(asked)
    checkpoints.close()
    assert re.fullmatch(expected, str(caught.value)), str(caught.value)


def test_a_model_is_not_saved_over_another_with_what_cannot_be_loaded(model):
    loaded = load_model(model)
    for digits in (0, 18, 1.5, "1"):
        with (
            refusal(model.parent),
            pytest.raises(ConfigError, match=r"^max_pretrain_digits: got .*, allowed is an int"),
        ):
            save_model(model, loaded._replace(max_pretrain_digits=digits), {})
    with (
        refusal(model.parent),
        pytest.raises(ConfigError, match=r"^directory: got .*, allowed is a directory, or a pl"),
    ):
        save_model(model / "model.json" / "below", loaded, {})
