"""The controls end to end on a random model of width 16, and their numbers and answers from records made by hand."""

import dataclasses
import json
import pathlib

import made_runs
import numpy as np
import pytest
from matplotlib.figure import Figure
from policies import untrained

from ckl_jax import finetune
from ckl_jax.checkpoint.store import Model, save_model
from ckl_jax.config import FinetuneConfig
from ckl_jax.errors import ConfigError
from ckl_jax.runtime import cli
from experiments import controls
from experiments.common import arms as arms_lib
from experiments.common import comparison

OPTIONS = (
    "--rounds 2 --test-every 1 --episodes 4 --minibatch-episodes 2 --diagnostic-episodes 2 --test-problems 4 "
    "--final-problems 4 --extra-length 5 --rollout plain --beta 2 --kl-coefficient 0.5 --learning-rate 0.01 --seeds 1"
)
ARMS = ["standard", "prioritized", "matched", "shuffled", "renormalized", "standard_0.1x", "standard_0.3x", "no_kl"]
PUBLISHED = pathlib.Path(controls.__file__).parent / "results" / "ladder" / "controls_N5"


def command(tmp_path, *extra: str) -> controls.ControlsCommand:
    paths = ["--checkpoint", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    return cli.parse(controls.ControlsCommand, controls.preset, [*OPTIONS.split(), *paths, *extra])


@pytest.fixture(scope="module", params=["made", pytest.param("trained", marks=pytest.mark.slow)])
def finished(request, tmp_path_factory, small_model):
    path = tmp_path_factory.mktemp("controls")
    save_model(path / "model", Model(small_model, 1, untrained(small_model, contrast=10)), {})
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "made":
            patch.setattr(finetune, "finetune", made_runs.finetune)
        controls.main(command(path))
    return path / "out"


@pytest.fixture
def rounds(finished):
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    return {(r["arm"], r["step"]): r for r in records if "success" in r}


trained = pytest.mark.parametrize("finished", [pytest.param("trained", marks=pytest.mark.slow)], indirect=True)


@trained
def test_every_arm_weighs_the_first_rounds_tokens_as_its_name_says(rounds):
    weight = {arm: rounds[arm, 1]["kl_weight"] for arm in ARMS}
    assert 0 < weight["prioritized"] < 0.9
    for arm in ("matched", "shuffled"):
        assert weight[arm] == pytest.approx(weight["prioritized"], rel=1e-4)
    for arm in ("standard", "renormalized", "standard_0.1x", "standard_0.3x", "no_kl"):
        assert weight[arm] == pytest.approx(1, rel=1e-4)
    assert len({rounds[arm, 1]["success"] for arm in ARMS}) == 1


@trained
def test_the_kl_term_has_the_arms_coefficient(rounds):
    per_kl = {arm: rounds[arm, 2]["loss/kl"] / rounds[arm, 2]["kl"] for arm in ARMS}
    assert per_kl["no_kl"] == 0
    assert per_kl["standard_0.1x"] < per_kl["standard_0.3x"] < per_kl["standard"]
    assert rounds["standard_0.1x", 2]["kl"] > 0


def test_results_have_every_arm_and_pair(finished):
    results = json.loads((finished / "results.json").read_text())
    assert list(results["arms"]) == ARMS
    found = [(pair["arm"], pair["control"]) for pair in results["pairs"]]
    assert found == [*(("prioritized", arm) for arm in ARMS if arm != "prioritized"), ("renormalized", "standard")]
    assert results["answer"].startswith("Does prioritization beat its own controls? undecided: not told apart from")
    assert [results["arms"][arm]["kl_coefficient"] for arm in ARMS] == [0.5, 0.5, 0.5, 0.5, 0.5, 0.05, 0.15, 0.0]
    assert (finished / "controls.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (finished / "controls.svg").read_text()


def test_plot_only_draws_again_and_trains_nothing(finished, capsys):
    metrics = (finished / "metrics.jsonl").read_bytes()
    (finished / "controls.png").unlink()
    controls.main(command(finished.parent, "--plot-only"))
    assert (finished / "controls.png").exists()
    assert (finished / "metrics.jsonl").read_bytes() == metrics
    printed = capsys.readouterr().out
    assert "| prioritized - matched |" in printed
    assert "Does prioritization beat its own controls? " in printed


def test_another_grid_in_the_same_directory_is_refused(finished):
    with pytest.raises(ConfigError, match="grid"):
        controls.main(command(finished.parent, "--grid", "0.5"))


def test_the_published_controls_have_the_same_arms_and_the_same_answer():
    published = json.loads((PUBLISHED / "results.json").read_text())
    lines = (PUBLISHED / "metrics.jsonl").read_text().splitlines()
    run = arms_lib.Run(published["config"], [json.loads(line) for line in lines], {}, 6)
    again = json.loads(json.dumps(controls.summarize(run)))
    assert again["answer"] == published["answer"]
    assert list(again["arms"]) == list(published["arms"])
    assert [pair["verdict"] for pair in again["pairs"]] == [pair["verdict"] for pair in published["pairs"]]


AFTER = {
    "standard": (0.30, 0.35, 0.40),
    "prioritized": (0.50, 0.60, 0.55),
    "matched": (0.40, 0.55, 0.40),
    "shuffled": (0.30, 0.39, 0.35),
    "renormalized": (0.50, 0.54, 0.61),
    "standard_0.1x": (0.20, 0.29, 0.25),
    "standard_0.3x": (0.10, 0.19, 0.15),
    "no_kl": (0.00, 0.10, 0.06),
}


def measured(arm, seed, step):
    comma, count = np.full((3, 2, 2), 0.1), np.ones((3, 2, 2))
    comma[0, 1, 0] = 0.5 + 0.1 * step + 0.01 * seed
    count[0, 1, 0] = not (arm == "matched" and seed == 2)
    return {"kl_weight": 0.9 + 0.02 * step, **made_runs.commas(comma, count)}


def summarized(after):
    def old(arm, seed, step):
        return {"test_old": 1 - after[arm][seed]} if step == 2 else {"test_old": 0.8}

    records = made_runs.records(after, test=old, round_=measured)
    config = {"config": dataclasses.asdict(FinetuneConfig()), "grid": [0.1, 0.3], "seeds": len(after["standard"])}
    return controls.summarize(arms_lib.Run(config, records, {}, 2))


@pytest.fixture(scope="module")
def summary():
    return summarized(AFTER)


def test_last_values_with_students_interval_over_seeds(summary):
    # 0.30, 0.35, 0.40: mean 0.35, standard deviation 0.05, t(0.975, 2) = 4.302653.
    half = 4.302653 * 0.05 / 3**0.5
    standard = summary["arms"]["standard"]
    assert standard["target_after"] == pytest.approx((0.35, 0.35 - half, 0.35 + half), abs=1e-6)
    assert standard["old_after"][0] == pytest.approx(0.65)
    assert standard["target_before"][0] == pytest.approx(0.2)
    assert standard["kl_after"][0] == pytest.approx(0.02)
    assert standard["weight"][0] == pytest.approx(0.93)
    assert standard["comma_after"][0] == pytest.approx(0.71)
    assert summary["arms"]["matched"]["comma_after"][0] == pytest.approx(0.705)


def test_differences_are_paired_by_seed(summary):
    found = {(pair["arm"], pair["control"]): pair for pair in summary["pairs"]}
    # 0.10, 0.05, 0.15: mean 0.10, standard deviation 0.05.
    half = 4.302653 * 0.05 / 3**0.5
    assert found["prioritized", "matched"]["target"] == pytest.approx((0.1, 0.1 - half, 0.1 + half), abs=1e-6)
    assert found["prioritized", "matched"]["verdict"] == "undecided"
    assert found["prioritized", "shuffled"]["differences"] == pytest.approx([0.2, 0.21, 0.2])
    assert found["prioritized", "shuffled"]["verdict"] == "better"
    assert found["prioritized", "shuffled"]["old"][0] == pytest.approx(-0.61 / 3)
    assert found["renormalized", "standard"]["verdict"] == "better"


def test_the_answer_names_the_control_that_is_open(summary):
    assert summary["answer"] == (
        "Does prioritization beat its own controls? undecided: "
        "better than standard, shuffled, standard_0.1x, standard_0.3x, no_kl; not told apart from matched. "
        "At full pressure, renormalized is better than standard (+20.0 [+17.5, +22.5] points)."
    )


@pytest.mark.parametrize(
    ("matched", "expected"),
    [
        ((0.40, 0.49, 0.45), "yes: better than standard, matched, shuffled, standard_0.1x, standard_0.3x, no_kl."),
        (
            (0.60, 0.70, 0.66),
            "no: better than standard, shuffled, standard_0.1x, standard_0.3x, no_kl; worse than matched.",
        ),
    ],
)
def test_a_yes_needs_every_control_and_a_no_needs_one(matched, expected):
    results = summarized(AFTER | {"matched": matched})
    assert f"controls? {expected}" in results["answer"]


@pytest.mark.parametrize("renormalized", [(0.5, 0.6, 0.55), (0.9, 0.9, 0.95)])
def test_renormalized_prioritizes_too_and_does_not_count(renormalized):
    results = summarized(AFTER | {"matched": (0.40, 0.49, 0.45), "renormalized": renormalized})
    assert "controls? yes:" in results["answer"]


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("beta", ["--beta", "0"]),
        ("kl_coefficient", ["--kl-coefficient", "0"]),
        ("kl_weights", ["--kl-weights", "matched"]),
        ("grid", ["--grid", "0.1", "1"]),
        ("grid", ["--grid", "0.1", "0.1"]),
        ("grid", ["--grid", "0"]),
    ],
)
def test_what_cannot_work_is_refused_by_name(tmp_path, field, options):
    with pytest.raises(ConfigError, match=field):
        command(tmp_path, *options)


def test_a_figure_of_four_seeds_has_intervals(tmp_path):
    after = {arm: (*values, values[0]) for arm, values in AFTER.items()}
    results = summarized(after)
    run = arms_lib.Run({"config": {}}, [], {}, 2)
    controls.draw(results, run).savefig(tmp_path / "controls.png")


@pytest.mark.parametrize(("least", "low"), [(-100, 16.5 - 3.1824 * 29.011 / 2), (0, 0)])
def test_an_interval_is_cut_off_where_no_value_can_be_and_not_at_the_sign_of_its_values(least, low):
    """All four differences are above 0, and their interval is not."""
    axes = Figure().subplots()
    comparison.rows(axes, [np.array([1.0, 2.0, 3.0, 60.0])], ["arm"], ["black"], least)
    (bar,) = axes.collections
    assert bar.get_segments()[0][:, 0].min() == pytest.approx(low, abs=0.01)


def test_stale_answers_are_of_a_policy_that_had_learned_from_fewer_episodes():
    results = {"round_episodes": [10, 20, 30, 40]}
    assert arms_lib.episodes_before(results).tolist() == [0, 10, 20, 30]
    assert arms_lib.episodes_before_answers(results, {}).tolist() == [0, 10, 20, 30]
    assert arms_lib.episodes_before_answers(results, {"staleness": 2}).tolist() == [0, 0, 0, 10]
