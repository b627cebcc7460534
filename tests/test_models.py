"""The cache of pre-trained models: each is trained once, goes on when interrupted, and never stands for another."""

import dataclasses

import made_runs
import pytest

from ckl_jax import finetune
from ckl_jax.checkpoint.shipped import SHIPPED_TINY
from ckl_jax.checkpoint.store import fingerprint, load_model
from ckl_jax.config import PretrainConfig
from ckl_jax.errors import ConfigError
from ckl_jax.presets import pretrain_preset
from experiments import controls, minibatches, spared_tokens
from experiments import figure4_prioritized_kl as figure4
from experiments import figure6_beta_sweep as figure6
from experiments.common import models
from experiments.common.models import Models, models_preset, pretrained
from experiments.regularizers import __main__ as regularizers


@pytest.fixture
def config(small_model):
    return PretrainConfig(
        max_digits=1,
        num_documents=60,
        packing="documents",
        batch_size=4,
        num_steps=4,
        warmup_steps=1,
        checkpoint_every=2,
        eval_problems=2,
        model=dataclasses.replace(small_model, num_layers=1, block_size=280),
    )


def refuse_to_train(*arguments):
    raise AssertionError("trained a model that is there")


def test_a_missing_model_is_trained_and_a_finished_one_is_read(config, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "pretrain", made_runs.pretrain)
    lines = []
    path = pretrained(config, tmp_path, lines.append)
    assert path == tmp_path / "tiny_N1"
    assert lines[0].startswith("pre-training tiny_N1")
    assert load_model(path).max_pretrain_digits == 1
    monkeypatch.setattr(models, "pretrain", refuse_to_train)
    assert pretrained(config, tmp_path, refuse_to_train) == path


def test_a_finished_model_is_not_opened_for_writing_whatever_it_was_trained_with_for_speed(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr(models, "pretrain", made_runs.pretrain)
    path = pretrained(config, tmp_path, lambda line: None)
    monkeypatch.setattr(models, "RunDirectory", refuse_to_train)
    assert pretrained(dataclasses.replace(config, microbatches=2), tmp_path, refuse_to_train) == path


def test_a_place_that_cannot_be_used_is_refused_by_the_options_name(config, tmp_path):
    (tmp_path / "tiny_N1").mkdir()
    (tmp_path / "tiny_N1" / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"^pretrained: \S+/tiny_N1 holds notes\.txt but no config\.json"):
        pretrained(config, tmp_path)
    (tmp_path / "tiny_N1" / "model.json").write_text('{"made_by": {}}')
    with pytest.raises(ConfigError, match=r"^pretrained: \S+/tiny_N1/model\.json is damaged"):
        pretrained(config, tmp_path)


@pytest.mark.slow
def test_an_interrupted_pre_training_goes_on_to_the_same_model(config, tmp_path):
    data_dir = tmp_path / "tfds"
    whole = load_model(pretrained(config, tmp_path / "whole", lambda line: None, data_dir))

    def interrupt(line):
        if "step 2/" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrained(config, tmp_path / "halves", interrupt, data_dir)
    lines = []
    resumed = load_model(pretrained(config, tmp_path / "halves", lines.append, data_dir))
    assert fingerprint(resumed.params) == fingerprint(whole.params)
    assert [line.split(":")[1].split("/")[0] for line in lines[1:]] == [" step 4"]


def test_the_place_of_another_config_is_refused_and_left_alone(config, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "pretrain", made_runs.pretrain)
    pretrained(config, tmp_path, lambda line: None)
    before = (tmp_path / "tiny_N1" / "model.json").read_bytes()
    monkeypatch.setattr(models, "pretrain", refuse_to_train)
    with pytest.raises(ConfigError, match="num_steps"):
        pretrained(dataclasses.replace(config, num_steps=6), tmp_path)
    assert (tmp_path / "tiny_N1" / "model.json").read_bytes() == before


def test_the_shipped_model_is_never_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "pretrain", refuse_to_train)
    assert pretrained(pretrain_preset("tiny"), tmp_path) == SHIPPED_TINY
    assert list(tmp_path.iterdir()) == []
    assert models_preset("tiny").load(models_preset("tiny").configs[-1]).max_pretrain_digits == 5


def test_the_ladders_models_ship(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "pretrain", refuse_to_train)
    found = [pretrained(config, tmp_path) for config in models_preset("ladder").configs]
    assert [path.name for path in found] == ["N3", "N5", "N6", "N7", "N9"]


@pytest.mark.parametrize("module", [finetune, figure4, figure6, controls, spared_tokens, regularizers, minibatches])
def test_what_fine_tunes_starts_from_the_model_of_its_scale(module):
    started = [module.preset(scale).checkpoint for scale in ("tiny", "ladder", "small", "gpt2")]
    assert [path.name for path in started] == ["tiny", "N5", "small", "gpt2"]
    for none_ships in started[2:]:
        with pytest.raises(ConfigError, match=r"^checkpoint: got '\S*', allowed is .* ckl_jax.pretrain"):
            load_model(none_ships)


@pytest.mark.parametrize("module", [figure4, figure6, controls, spared_tokens, minibatches])
def test_another_task_starts_from_its_own_model_at_the_ladder_too(module):
    assert module.preset("ladder", task="subtraction").checkpoint.name == "tiny_subtraction"


def test_only_the_shipped_models_own_config_stands_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "pretrain", lambda *arguments: None)
    for change in ({"seed": 1}, {"max_digits": 4}, {"num_steps": 200}):
        config = dataclasses.replace(pretrain_preset("tiny"), **change)
        assert pretrained(config, tmp_path / str(change), lambda line: None) != SHIPPED_TINY


@pytest.mark.parametrize("scale", ["tiny", "ladder", "small", "gpt2"])
def test_a_scales_models_differ_in_n_alone(scale):
    chosen = models_preset(scale)
    assert [config.max_digits for config in chosen.configs] == list(chosen.digits)
    for config in chosen.configs:
        assert dataclasses.replace(config, max_digits=pretrain_preset(scale).max_digits) == pretrain_preset(scale)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"digits": ()}, "digits"),
        ({"digits": (3, 3)}, "digits"),
        ({"digits": (5, 3)}, "digits"),
        ({"digits": (0, 3)}, "max_digits"),
        ({"digits": (3, 8)}, "model.block_size"),
        ({"scale": "small"}, "pretrain.scale"),
    ],
)
def test_what_cannot_work_is_refused(change, field):
    with pytest.raises(ConfigError, match=rf"^{field}: "):
        Models(**change)


def test_every_n_has_a_colour_of_its_own():
    assert len(set(models.colors_of((3, 4, 5)).values())) == 3
