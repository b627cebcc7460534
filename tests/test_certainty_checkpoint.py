"""The KL weighted by another model's certainty: what is computed with it, what is refused, and a whole command."""

import dataclasses
import importlib
import json

import jax
import jax.numpy as jnp
import made_runs
import numpy as np
import pytest
from names import ROOT
from policies import untrained

from ckl_jax import finetune, losses, token_weights
from ckl_jax.analysis import plots
from ckl_jax.certainty import certainty
from ckl_jax.checkpoint.store import Model, fingerprint, save_model
from ckl_jax.config import FinetuneConfig
from ckl_jax.errors import ConfigError
from ckl_jax.preflight import programs
from ckl_jax.rl.collect import collect
from ckl_jax.rl.program import Hyper, draw_problems, make_program
from ckl_jax.rl.updates import init_run
from ckl_jax.rollout.trajectory import score
from ckl_jax.runtime import cli, targets
from ckl_jax.tasks.columns import SUBTRACTION
from experiments import figure4_prioritized_kl as figure4
from experiments.common import arms

OPTIONS = (
    "--rounds 1 --test-every 1 --episodes 4 --minibatch-episodes 2 --diagnostic-episodes 2 --test-problems 2 "
    "--final-problems 2 --old-problems 2 --extra-length 5 --rollout plain --beta 2"
)
HYPER = Hyper(jnp.uint32(0), jnp.float32(1e-2), jnp.float32(5.0), jnp.float32(2.0), jnp.int32(0))


OTHER_SIZES = {"block_size": 40, "vocab_size": 64}


@pytest.fixture(scope="module")
def models(small_model):
    """Ours, and another of another shape."""
    wider = dataclasses.replace(small_model, width=24)
    return Model(small_model, 1, untrained(small_model, contrast=10)), Model(wider, 1, untrained(wider, 1, contrast=10))


@pytest.mark.parametrize("word", ["prioritized", "threshold"])
def test_the_weights_are_those_of_the_other_models_certainty_and_the_kl_is_to_the_reference(models, word):
    ours, other = models
    config = FinetuneConfig(episodes=4, minibatch_episodes=2, diagnostic_episodes=2, extra_length=0, rollout="plain")
    program, hyper = make_program(config, ours, other), HYPER._replace(kl_weights=token_weights.index_of(word))
    params = init_run(program, ours.params, hyper).params
    problems, keys = jax.tree.map(jnp.asarray, draw_problems(program, 0, 0)), tuple(jax.random.split(jax.random.key(2)))

    @jax.jit
    def found(certainty_params):
        episodes, _ = collect(
            program, params, ours.params, hyper, problems, keys, None, certainty_params=certainty_params
        )
        return episodes, *(score(m.config, m.params, episodes.trajectory)[0] for m in models)

    episodes, own_logits, other_logits = found(other.params)
    mask_BxT = episodes.trajectory.mask_BxT
    expected_BxT = certainty(other_logits)
    np.testing.assert_allclose(episodes.certainty_BxT[mask_BxT], expected_BxT[mask_BxT], atol=1e-4)
    assert np.abs(certainty(own_logits) - expected_BxT)[mask_BxT].max() > 0.1
    np.testing.assert_allclose(episodes.ref_logits_BxTxV[mask_BxT], own_logits[mask_BxT], atol=1e-3)
    tokens = token_weights.Tokens(expected_BxT, losses.entropy(other_logits), mask_BxT, mask_BxT, mask_BxT)
    settings = token_weights.Settings(2.0, config.kl_quantile, config.kl_weak, keys[1])
    weights_BxT = token_weights.weigh(token_weights.index_of(word), tokens, settings)
    np.testing.assert_allclose(episodes.kl_weights_BxT, weights_BxT, atol=1e-3)


def test_a_model_of_another_task_or_vocabulary_or_a_shorter_block_is_refused(models):
    ours, other = models
    changed = [dataclasses.replace(other.config, **{name: size}) for name, size in OTHER_SIZES.items()]
    for wrong in (other._replace(task=SUBTRACTION), *(other._replace(config=config) for config in changed)):
        with pytest.raises(ConfigError, match=r"^certainty_checkpoint: got"):
            make_program(FinetuneConfig(), ours, wrong)


@pytest.fixture(scope="module")
def place(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("certainty")
    for name, model in zip(("ours", "other"), models, strict=True):
        save_model(path / name, model, {})
    return path


def parsed(place, *options):
    words = [*OPTIONS.split(), "--checkpoint", str(place / "ours"), "--out", str(place / "out"), *options]
    return cli.parse(finetune.FinetuneCommand, finetune.preset, words)


def weights(path, arm):
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [record["kl_weight"] for record in records if record["arm"] == arm and "kl_weight" in record]


@pytest.fixture(scope="module")
def borrowing(place):
    """A finished run with the certainty of the other model."""
    command = parsed(place, "--certainty-checkpoint", str(place / "other"))
    finetune.main(command)
    return command


def test_a_run_notes_whose_certainty_it_has_and_does_not_go_on_with_another(models, place, borrowing):
    config = json.loads((place / "out" / "config.json").read_text())
    assert config["certainty_checkpoint"] == fingerprint(models[1].params)
    records = (place / "out" / "metrics.jsonl").read_text()
    finetune.main(dataclasses.replace(borrowing, out=place / "own", certainty_checkpoint=None))
    assert weights(place / "out", "run") != weights(place / "own", "run")
    for certainty_checkpoint in (None, place / "ours"):
        with pytest.raises(ConfigError, match="certainty_checkpoint"):
            finetune.main(dataclasses.replace(borrowing, certainty_checkpoint=certainty_checkpoint))
    assert (place / "out" / "metrics.jsonl").read_text() == records


def test_the_commands_that_compare_arms_take_it_too(models, place, borrowing):
    words = ["--checkpoint", str(place / "ours"), "--certainty-checkpoint", str(place / "other")]
    out = place / "figure4"
    words += ["--seeds", "1", "--out", str(out)]
    figure4.main(cli.parse(figure4.Figure4Command, figure4.preset, [*OPTIONS.split(), *words]))
    results = json.loads((out / "results.json").read_text())
    assert results["config"]["certainty_checkpoint"] == fingerprint(models[1].params)
    assert weights(out, "standard") == [1.0]
    np.testing.assert_allclose(weights(out, "prioritized"), weights(place / "out", "run"), atol=1e-4)


COMPARING = [path.stem for path in ROOT.glob("experiments/*.py") if "(arms_lib.ArmsCommand)" in path.read_text()]


def test_all_commands_that_compare_arms_were_found():
    for name in COMPARING:
        importlib.import_module(f"experiments.{name}")
    found = {kind.__module__ for kind in arms.ArmsCommand.__subclasses__()} - {"__main__"}  # Other tests run commands.
    assert found == {f"experiments.{name}" for name in COMPARING}
    assert len(found) > 4


@pytest.mark.parametrize("name", COMPARING)
def test_every_command_that_compares_arms_hands_it_on_notes_it_and_says_it_in_its_picture(
    name, models, place, tmp_path, monkeypatch
):
    module, titles, lent = importlib.import_module(f"experiments.{name}"), [], []
    (options,) = (kind for kind in arms.ArmsCommand.__subclasses__() if kind.__module__ == module.__name__)

    def made_finetune(config, model, directory, *rest):
        lent.append(rest[-1])
        runs = made_runs.finetune(config, model, directory, *rest)
        for run in runs:
            save_model(directory.path / run.name, models[1]._replace(config=model.config, params=moved), {})
        return runs

    def save(picture, out, name):
        titles.extend([picture.get_suptitle(), *(axes.get_title() for axes in picture.axes)])

    moved = jax.tree.map(lambda x: x + 0.1, models[0].params)
    monkeypatch.setattr(finetune, "finetune", made_finetune)
    monkeypatch.setattr(plots, "save", save)
    words = [*OPTIONS.removesuffix(" --beta 2").split(), "--checkpoint", str(place / "ours")]
    words += ["--certainty-checkpoint", str(place / "other"), "--seeds", "2", "--out", str(tmp_path / "out")]
    module.main(cli.parse(options, module.preset, words))
    assert {fingerprint(model.params) for model in lent} == {fingerprint(models[1].params)}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["certainty_checkpoint"] == fingerprint(models[1].params)
    assert any("J of another model" in title for title in titles), titles


def test_a_model_that_is_not_there_is_named_by_its_own_option(place):
    with pytest.raises(ConfigError, match=r"^certainty_checkpoint: got '\S*nowhere', allowed is"):
        finetune.main(parsed(place, "--certainty-checkpoint", str(place / "nowhere")))


def test_preflight_plans_the_other_model_too(place):
    names = {}
    for options in ([], ["--certainty-checkpoint", str(place / "other")]):
        with targets.compiling_for(jax.devices()[:1]):
            planned = list(programs.of_finetuning(parsed(place, *options)))
        names[len(options)] = [program.name for program in planned]
        (rounds,) = (program for program in planned if "rounds" in program.name)
        assert len(rounds.call.arguments) == (7 if options else 6)
    assert names[0] == names[2]
