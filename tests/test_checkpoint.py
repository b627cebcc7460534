"""Checkpoints come back exactly, and whatever is missing, damaged or of another shape is refused."""

import contextlib
import dataclasses
import errno
import gc
import json
import random
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hostile import no_file_above
from policies import untrained

from ckl_jax.checkpoint.shipped import PRETRAINED, names
from ckl_jax.checkpoint.states import StateCheckpoints
from ckl_jax.checkpoint.store import Model, fingerprint, identity, load_model, save_model
from ckl_jax.errors import ConfigError

MADE_BY = {"command": "a test", "seed": 0}


@pytest.fixture(scope="module")
def model(two_layers):
    return Model(two_layers, 3, untrained(two_layers))


@pytest.fixture
def saved(model, tmp_path):
    save_model(tmp_path / "model", model, MADE_BY)
    return tmp_path / "model"


def _flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _refused(directory):
    with pytest.raises(ConfigError, match=r"^checkpoint: ") as caught:
        load_model(directory)
    assert "\n" not in str(caught.value)


def test_a_saved_model_loads_exactly(model, saved):
    loaded = load_model(saved)
    assert loaded[:2] == model[:2]
    chex.assert_trees_all_equal(loaded.params, model.params)
    chex.assert_trees_all_equal_shapes_and_dtypes(loaded.params, model.params)
    assert json.loads((saved / "model.json").read_text())["made_by"] == MADE_BY


def test_what_one_machine_was_told_for_speed_stays_behind_when_a_model_is_saved(model, tmp_path):
    told = dataclasses.replace(model.config, attention="plain", layers="scanned", remat=True)
    save_model(tmp_path, model._replace(config=told), MADE_BY)
    assert load_model(tmp_path).config == model.config


def test_saving_again_replaces_the_model(model, saved):
    other = model._replace(params=jax.tree.map(lambda x: x + 1, model.params), max_pretrain_digits=2)
    save_model(saved, other, MADE_BY)
    chex.assert_trees_all_equal(load_model(saved).params, other.params)
    assert load_model(saved).max_pretrain_digits == 2


def test_a_flipped_bit_in_any_file_of_the_parameters_is_refused(saved):
    files = [path for path in _files(saved / "params") if path.stat().st_size]
    assert len(files) >= 3
    for path in files:
        _flip_a_bit(path)
        _refused(saved)
        _flip_a_bit(path)
    load_model(saved)


def test_any_missing_file_is_refused(saved):
    for path in _files(saved):
        content = path.read_bytes()
        path.unlink()
        _refused(saved)
        path.write_bytes(content)
    load_model(saved)


def test_a_file_that_the_manifest_does_not_know_is_refused(saved):
    (saved / "params" / "extra").write_text("?")
    _refused(saved)


@pytest.mark.parametrize("name", ["model.json", "params.sha256.json"])
def test_a_truncated_description_or_manifest_is_refused(saved, name):
    text = (saved / name).read_text()
    for kept in (0, len(text) // 2):
        (saved / name).write_text(text[:kept])
        _refused(saved)


@pytest.mark.parametrize("change", [{"width": 32}, {"num_layers": 3}, {"num_layers": 1}, {"use_bias": False}])
def test_parameters_of_another_shape_than_the_description_says_are_refused(saved, change):
    description = json.loads((saved / "model.json").read_text())
    description["model"].update(change)
    (saved / "model.json").write_text(json.dumps(description))
    _refused(saved)


def test_parameters_of_another_type_are_refused(model, tmp_path):
    save_model(tmp_path, model._replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)), MADE_BY)
    _refused(tmp_path)


@pytest.mark.parametrize("change", [{"width": "wide"}, {"width": 15}, {"depth": 2}])
def test_a_description_that_is_no_model_is_refused(saved, change):
    description = json.loads((saved / "model.json").read_text())
    description["model"].update(change)
    (saved / "model.json").write_text(json.dumps(description))
    _refused(saved)


@pytest.mark.parametrize("name", names())
def test_a_model_that_ships_is_read_by_its_name(name):
    assert fingerprint(load_model(name).params) == fingerprint(load_model(PRETRAINED / name).params)


def test_a_directory_of_the_same_name_comes_first(model, tmp_path, monkeypatch):
    save_model(tmp_path / "tiny", model, {})
    monkeypatch.chdir(tmp_path)
    assert fingerprint(load_model("tiny").params) == fingerprint(model.params)


def test_a_missing_model_is_told_which_ship_and_how_to_make_one():
    with pytest.raises(ConfigError, match=r"/tiny_maximum', allowed is .*ckl_jax\.pretrain .*tiny \| tiny_mult"):
        load_model(PRETRAINED / "tiny_maximum")


def test_a_missing_directory_is_refused(tmp_path):
    _refused(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def _state(step):
    return {"step": jnp.asarray(step, jnp.int32), "params": jnp.arange(6.0).reshape(2, 3) * step}


ABSTRACT = jax.eval_shape(lambda: _state(0))


@pytest.fixture
def checkpoints(tmp_path):
    checkpoints = StateCheckpoints(tmp_path / "checkpoints")
    yield checkpoints
    checkpoints.close()


@contextlib.contextmanager
def _reopened(checkpoints):
    again = StateCheckpoints(checkpoints.directory)
    yield again
    again.close()


def _restored_anew(checkpoints):
    with _reopened(checkpoints) as again:
        return again.restore_latest(ABSTRACT)


def test_a_new_directory_has_no_checkpoint(checkpoints):
    assert checkpoints.restore_latest(ABSTRACT) is None


def test_the_newest_state_comes_back_exactly_and_two_are_kept(checkpoints):
    for step in (0, 2, 4):
        checkpoints.save(step, _state(step))
    step, state = _restored_anew(checkpoints)
    assert step == 4
    chex.assert_trees_all_equal(state, _state(4))
    names = {path.name for path in checkpoints.directory.iterdir()}
    assert names == {"2", "4", "2.sha256.json", "4.sha256.json"}


def test_a_checkpoint_without_a_manifest_is_unfinished_and_is_written_again(checkpoints):
    checkpoints.save(1, _state(1))
    checkpoints.save(2, _state(20))
    (checkpoints.directory / "2.sha256.json").unlink()
    with _reopened(checkpoints) as reopened:
        step, state = reopened.restore_latest(ABSTRACT)
        assert step == 1
        chex.assert_trees_all_equal(state, _state(1))
        reopened.save(2, _state(2))
    step, state = _restored_anew(checkpoints)
    assert step == 2
    chex.assert_trees_all_equal(state, _state(2))


def test_what_no_array_shows_of_a_model_names_it_too(model):
    """Of a foreign model N, the activation and the heads may be typed by hand: a corrected one is another model."""
    config = model.config
    others = [
        model._replace(max_pretrain_digits=4),
        model._replace(config=dataclasses.replace(config, num_heads=1)),
        model._replace(config=dataclasses.replace(config, activation="gelu_erf")),
    ]
    for other in others:
        assert identity(other) != identity(model)
        assert identity(other)["checkpoint"] == identity(model)["checkpoint"]
    assert identity(model._replace(config=dataclasses.replace(config, attention_chunk=80))) == identity(model)


def _save_without_a_manifest(checkpoints, step):
    """As a process that is killed before it has written the manifest."""

    def killed(path, history):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "_finish", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(step, _state(2))


def test_one_without_a_manifest_takes_no_complete_ones_place(checkpoints):
    """A process is killed before a manifest, then again at other steps: the complete checkpoint outlives both."""
    checkpoints.save(1000, _state(1))
    for step in (1400, 1300, 1600):
        with _reopened(checkpoints) as reopened:
            assert reopened.restore_latest(ABSTRACT)[0] == 1000
            _save_without_a_manifest(reopened, step)
    step, state = _restored_anew(checkpoints)
    assert step == 1000
    chex.assert_trees_all_equal(state, _state(1))
    assert {path.name for path in checkpoints.directory.iterdir()} == {"1000", "1000.sha256.json"}


def test_those_without_a_manifest_stay_until_a_complete_one_is_there(checkpoints):
    _save_without_a_manifest(checkpoints, 1400)
    with _reopened(checkpoints) as reopened:
        assert reopened.restore_latest(ABSTRACT) is None
        assert reopened.unfinished() == {1400}
        reopened.save(1300, _state(3))
        assert reopened.unfinished() == set()
    assert {path.name for path in checkpoints.directory.iterdir()} == {"1300", "1300.sha256.json"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_no_complete_one_could_replace_is_not_removed(checkpoints):
    checkpoints.save(1, _state(1))
    _save_without_a_manifest(checkpoints, 2)
    with _reopened(checkpoints) as reopened, pytest.raises(ConfigError, match=r"^checkpoint: "):
        reopened.restore_latest(jax.eval_shape(lambda: {"step": jnp.zeros(())}))
    assert {path.name for path in checkpoints.directory.iterdir()} == {"1", "1.sha256.json", "2"}
    gc.collect()


UNREAD = (
    ".DS_Store",
    "._manifest.ocdbt",
    ".nfs00001",
    "Thumbs.db",
    "desktop.ini",
    "_METADATA~",
    "#d#",
    ".d.swp",
    ".#x",
)


def test_files_that_nothing_reads_damage_no_checkpoint_and_others_do(checkpoints):
    for step in (1, 2):
        checkpoints.save(step, _state(step))
    directories = {path for path in checkpoints.directory.rglob("*") if path.is_dir()} | {checkpoints.directory}
    strays = [directory / name for directory in directories for name in (*UNREAD, "@eaDir/x")]
    for stray in strays:
        stray.parent.mkdir(exist_ok=True)
        stray.write_text("?")
    link = checkpoints.directory / "2" / "._loop"
    link.symlink_to("..")
    stray = checkpoints.directory / "._2.sha256.json"
    stray.write_text("?")
    assert _restored_anew(checkpoints)[0] == 2
    with _reopened(checkpoints) as reopened:
        reopened.save(3, _state(3))
        for place in ("", "default", "default/d"):
            for name in ("x", "zarr.json", ".zarray", "manifest.ocdbt2"):
                file = checkpoints.directory / "3" / place / name
                file.write_text("?")
                with pytest.raises(ConfigError, match=rf"^checkpoint: .*/3 is damaged, .*{name}"):
                    reopened.restore_latest(ABSTRACT)
                file.unlink()
        assert reopened.restore_latest(ABSTRACT)[0] == 3
    assert stray.exists()


def test_a_manifest_that_lists_what_nothing_reads_is_kept_to_without_it(checkpoints):
    checkpoints.save(1, _state(1))
    manifest = checkpoints.directory / "1.sha256.json"
    listed = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(listed | {".DS_Store": "0" * 64, "default/._d/x": "0" * 64}))
    assert _restored_anew(checkpoints)[0] == 1


def test_a_damaged_checkpoint_is_refused_and_not_passed_over(checkpoints):
    checkpoints.save(1, _state(1))
    checkpoints.save(2, _state(2))
    for path in _files(checkpoints.directory / "2"):
        if path.stat().st_size:
            _flip_a_bit(path)
            with pytest.raises(ConfigError, match=r"^checkpoint: "):
                checkpoints.restore_latest(ABSTRACT)
            _flip_a_bit(path)
    assert checkpoints.restore_latest(ABSTRACT)[0] == 2


def test_a_hundred_random_bit_flips_are_all_refused(checkpoints):
    checkpoints.save(1, _state(1), history=[{"loss": 0.5}])
    step = checkpoints.directory / "1"
    files = [path for path in [*_files(step), checkpoints.directory / "1.sha256.json"] if path.stat().st_size]
    assert {"history.json", "1.sha256.json"} < {path.name for path in files}
    drawn = random.Random(0)
    for _ in range(100):
        path = drawn.choice(files)
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[drawn.randrange(len(whole))] ^= 1 << drawn.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"^checkpoint: .* is damaged"):
            checkpoints.restore_latest(ABSTRACT)
        path.write_bytes(whole)
    assert checkpoints.restore_latest(ABSTRACT)[0] == 1


def test_a_history_comes_back_with_its_checkpoint_exactly(checkpoints):
    history = [{"loss": float(np.float32(0.1)), "grad_norm": 3.0}]
    checkpoints.save(1, _state(1), history)
    checkpoints.save(2, _state(2))
    with _reopened(checkpoints) as reopened:
        assert reopened.restore_latest(ABSTRACT)[0] == 2
        assert reopened.restore_history(2) is None
        assert reopened.restore_history(1) == history
    checkpoints.save(1, _state(1))
    assert checkpoints.restore_history(1) is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_is_full_is_an_error_that_names_the_checkpoint_and_keeps_the_last_one(
    checkpoints, tmp_path, caplog
):
    checkpoints.save(1, _state(1))
    large = {"step": jnp.asarray(2), "params": jax.random.normal(jax.random.key(0), (300, 300))}
    with no_file_above(50_000):
        with pytest.raises(OSError, match="File too large") as caught:
            checkpoints.save(2, large)
        assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(checkpoints.directory / "2"))
        with pytest.raises(OSError, match="File too large") as caught:
            save_model(tmp_path / "model", Model(None, 1, large), MADE_BY)
        assert caught.value.filename == str(tmp_path / "model" / "params")
    assert caplog.text == ""
    complete = {"1", "1.sha256.json"}
    end = time.monotonic() + 120
    while True:  # The writer that failed may still be at work in its thread, unlike that of a process that died.
        step, state = _restored_anew(checkpoints)
        assert step == 1
        chex.assert_trees_all_equal(state, _state(1))
        names = {path.name for path in checkpoints.directory.iterdir()}
        if names == complete or time.monotonic() > end:
            break
        time.sleep(0.1)
    assert names == complete


@pytest.mark.parametrize("again", [1, 2])
def test_saving_an_existing_step_again_replaces_it_and_keeps_the_other(checkpoints, again):
    checkpoints.save(1, _state(1))
    checkpoints.save(2, _state(2))
    checkpoints.save(again, _state(7))
    assert {path.name for path in checkpoints.directory.iterdir() if path.is_dir()} == {"1", "2"}
    step, state = _restored_anew(checkpoints)
    assert step == 2
    chex.assert_trees_all_equal(state, _state(7 if again == 2 else 2))


def test_a_kill_while_a_step_is_saved_again_leaves_the_one_before(checkpoints, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    checkpoints.save(1, _state(1))
    checkpoints.save(2, _state(2))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_finish", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(2, _state(7))
    step, state = _restored_anew(checkpoints)
    assert step == 1
    chex.assert_trees_all_equal(state, _state(1))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_state_of_other_shapes_or_names_is_refused(checkpoints):
    checkpoints.save(1, _state(1))
    for other in (
        {"step": _state(0)["step"], "params": jnp.zeros((3, 2))},
        {"step": _state(0)["step"], "weights": jnp.zeros((2, 3))},
    ):
        with pytest.raises(ConfigError, match=r"^checkpoint: "):
            checkpoints.restore_latest(jax.eval_shape(lambda other=other: other))
    gc.collect()  # Orbax's futures warn when they are collected, here and not in a later test.


def test_a_fingerprint_names_the_values_and_not_the_place():
    params = {"a": jnp.arange(3.0), "b": jnp.ones((2, 2))}
    assert fingerprint(params) == fingerprint(jax.tree.map(np.asarray, params))
    assert fingerprint(params) != fingerprint({**params, "a": jnp.array([0.0, 1.0, 2.5])})
    assert fingerprint(params) != fingerprint({**params, "b": jnp.ones((4,))})
