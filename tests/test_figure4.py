"""The main job end to end on a random model of width 16: every file is written, resumed and redrawn."""

import json
import re

import made_runs
import numpy as np
import pytest
from policies import untrained

from ckl_jax.checkpoint.store import Model, load_model, save_model
from ckl_jax.errors import ConfigError
from ckl_jax.runtime import cli
from ckl_jax.tasks.columns import MULTIPLICATION, SUBTRACTION
from experiments import figure4_prioritized_kl as figure4
from experiments.common import arms as arms_lib

OPTIONS = (
    "--rounds 4 --test-every 2 --episodes 4 --minibatch-episodes 2 --diagnostic-episodes 2 --test-problems 4 "
    "--final-problems 8 --extra-length 5 --rollout plain --seeds 2"
)


def command(tmp_path, *extra: str) -> figure4.Figure4Command:
    paths = ["--checkpoint", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    return cli.parse(figure4.Figure4Command, figure4.preset, [*OPTIONS.split(), *paths, *extra])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_model):
    path = tmp_path_factory.mktemp("figure4")
    save_model(path / "model", Model(small_model, 1, untrained(small_model)), {})
    figure4.main(command(path))
    return path


def test_results_have_both_arms_all_seeds_and_paired_differences(finished):
    results = json.loads((finished / "out" / "results.json").read_text())
    assert results["seeds"] == [0, 1]
    assert results["test_episodes"] == [0, 8, 16]
    assert results["round_episodes"] == [4, 8, 12, 16]
    for arm in ("standard", "prioritized"):
        values = results["arms"][arm]
        assert np.shape(values["learning_curve"]) == (2, 3)
        assert np.shape(values["critical_comma_step1"]) == np.shape(values["critical_comma_step2"]) == (2, 4)
        assert len(values["target_after"]) == 3
    after = {arm: np.array(results["arms"][arm]["learning_curve"])[:, -1] for arm in results["arms"]}
    assert results["paired_difference"]["target"][0] == pytest.approx((after["prioritized"] - after["standard"]).mean())
    assert results["wall_seconds"] > 0


def test_the_arms_differ_in_the_weights_of_the_kl_alone(finished):
    records = [json.loads(line) for line in (finished / "out" / "metrics.jsonl").read_text().splitlines()]
    first = {r["arm"]: r for r in records if "success" in r and r["step"] == 1 and r["seed"] == 0}
    assert first["standard"]["kl_weight"] == 1
    assert first["prioritized"]["kl_weight"] < 1
    assert first["standard"]["success"] == first["prioritized"]["success"]
    assert first["standard"]["entropy"] == pytest.approx(first["prioritized"]["entropy"], rel=1e-5)


def test_the_picture_is_a_png_and_an_svg(finished):
    assert (finished / "out" / "figure4.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (finished / "out" / "figure4.svg").read_text()


def test_every_policy_is_saved_as_a_checkpoint(finished):
    for arm in ("standard", "prioritized"):
        assert load_model(finished / "out" / arm / "seed_1").max_pretrain_digits == 1


def test_plot_only_draws_again_and_trains_nothing(finished, capsys):
    metrics = (finished / "out" / "metrics.jsonl").read_bytes()
    (finished / "out" / "figure4.png").unlink()
    figure4.main(command(finished, "--plot-only"))
    assert (finished / "out" / "figure4.png").exists()
    assert (finished / "out" / "metrics.jsonl").read_bytes() == metrics
    assert "paired" in capsys.readouterr().out


def test_a_call_that_computes_nothing_keeps_the_device_that_did(finished, monkeypatch):
    """Else a run of a GPU that is drawn again on a laptop would be the laptop's."""
    before = json.loads((finished / "out" / "results.json").read_text())
    monkeypatch.setattr("experiments.common.figure.machine", lambda: {"device": "another", "platform": "other"})
    figure4.main(command(finished))
    assert json.loads((finished / "out" / "results.json").read_text()) == before


def test_a_second_call_with_another_seed_count_is_refused(finished):
    with pytest.raises(ConfigError, match="seeds"):
        figure4.main(command(finished, "--seeds", "3"))


@pytest.fixture
def multiplying(tmp_path, small_model):
    save_model(tmp_path / "model", Model(small_model, 1, untrained(small_model), MULTIPLICATION), {})


def test_another_tasks_model_is_refused(tmp_path, multiplying):
    with pytest.raises(ConfigError, match=r"^task: got 'addition', allowed is multiplication, the checkpoint's"):
        figure4.main(command(tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_another_tasks_model_is_fine_tuned_on_its_own_problems(tmp_path, multiplying):
    rounds = ["--rounds", "1", "--test-every", "1", "--seeds", "1", "--rollout", "plain"]
    figure4.main(command(tmp_path, "--task", "multiplication", *rounds))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["task"] == "multiplication"
    sample = json.loads((tmp_path / "out" / "samples.jsonl").read_text().splitlines()[0])
    assert re.fullmatch(r"\d\dT\d", sample["problem"])
    assert load_model(tmp_path / "out" / "prioritized" / "seed_0").task == MULTIPLICATION


@pytest.mark.parametrize("task", ["addition", "subtraction", "multiplication"])
def test_the_tasks_own_model_ships_and_is_the_default(task):
    default = cli.parse(figure4.Figure4Command, figure4.preset, ["--task", task])
    model = load_model(default.checkpoint)
    assert model.task.name == default.task == task
    assert model.max_pretrain_digits == 5


def test_an_unknown_task_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^task: got 'division', allowed is addition \| subtraction"):
        command(tmp_path, "--task", "division")


def test_what_leaves_no_prioritized_kl_to_compare_is_refused(tmp_path):
    for option, value in (
        ("beta", "0"),
        ("kl_weights", "uniform"),
        ("kl_weights", "threshold"),
        ("kl_coefficient", "0"),
    ):
        with pytest.raises(ConfigError, match=rf"^{option}: got"):
            command(tmp_path, f"--{option.replace('_', '-')}", value)


@pytest.mark.parametrize(
    ("prioritized", "verdict"),
    [([0.5, 0.51, 0.53], "reproduced"), ([0.1, 0.11, 0.13], "not reproduced"), ([0.1, 0.3, 0.5], "undecided")],
)
def test_the_claim_is_judged_by_the_difference_to_the_standard_arm(prioritized, verdict):
    config = {"config": {"seed": 0, "episodes": 10, "extra_digits": 1}, "seeds": 3}
    records = made_runs.records({"standard": [0.3, 0.31, 0.32], "prioritized": prioritized})
    results = figure4.summarize(arms_lib.Run(config, records, {"wall_seconds": 1.0}, 6))
    assert results["claims"][0]["verdict"] == verdict


@pytest.mark.parametrize(("extra", "said"), [(1, "8 to 9 digits"), (2, "7 to 9 digits")])
def test_claim_and_title_say_from_which_n_it_went(extra, said):
    config = {"config": {"seed": 0, "episodes": 10, "extra_digits": extra}, "seeds": 2}
    records = made_runs.records({"standard": [0.2, 0.3], "prioritized": [0.3, 0.5]})
    run = arms_lib.Run(config, records, {"wall_seconds": 1.0}, 9)
    results = figure4.summarize(run)
    assert f"(addition, {said}, 2 seeds)" in results["claims"][0]["here"]
    assert results["paired_difference"]["target"][0] == pytest.approx(0.15)
    assert f"from N = {said}" in figure4.draw(results, run).axes[0].get_title()


def test_the_claim_says_of_which_task_and_whose_certainty_it_was():
    config = {"config": {"seed": 0, "episodes": 10, "extra_digits": 1}, "seeds": 2, "certainty_checkpoint": "0123"}
    records = made_runs.records({"standard": [0.2, 0.3], "prioritized": [0.3, 0.5]})
    results = figure4.summarize(arms_lib.Run(config, records, {"wall_seconds": 1.0}, 9, SUBTRACTION))
    assert "(subtraction, 8 to 9 digits, J of another model, 2 seeds)" in results["claims"][0]["here"]
