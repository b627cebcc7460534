"""Figure 6: its numbers and verdicts from records written by hand, and the command end to end on a random model."""

import json

import made_runs
import numpy as np
import pytest
from policies import policy

from ckl_jax import finetune
from ckl_jax.checkpoint.store import Model, save_model
from ckl_jax.errors import ConfigError
from ckl_jax.runtime import cli
from experiments import figure6_beta_sweep as figure6
from experiments.common import arms as arms_lib

OPTIONS = (
    "--rounds 2 --test-every 1 --episodes 4 --minibatch-episodes 2 --diagnostic-episodes 2 --test-problems 4 "
    "--final-problems 8 --extra-length 5 --seeds 2 --rollout plain --betas 1000 10"
)
# Final accuracy of seeds 3 and 4; t(0.975, 1) = 12.7062 makes the half width 6.3531 times the two values' distance.
FINAL = {
    "standard": (0.30, 0.40),
    "beta_10": (0.40, 0.50),
    "beta_500": (0.60, 0.71),
    "beta_1000": (0.50, 0.60),
    "beta_10000": (0.05, 0.55),
}
WEIGHTS = {"standard": 1.0, "beta_10": 0.9, "beta_500": 0.6, "beta_1000": 0.5, "beta_10000": 0.2}


def pressure(arm, seed, step):
    return {"kl_weight": WEIGHTS[arm] - 0.1 * (step - 1), "kl": 0.01 * step, "loss/kl": 0.1 * seed}


CONFIG = {
    "config": {"seed": 3, "episodes": 10, "extra_digits": 1},
    "seeds": 2,
    "betas": [10.0, 500.0, 1000.0, 10000.0],
}
RUN = arms_lib.Run(CONFIG, made_runs.records(FINAL, seed=3, round_=pressure), {}, 6)


@pytest.fixture(scope="module")
def made():
    return figure6.summarize(RUN)


def claims(results):
    return figure6.claims(results, RUN)


def command(tmp_path, *extra):
    paths = ["--checkpoint", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    return cli.parse(figure6.Figure6Command, figure6.preset, [*OPTIONS.split(), *paths, *extra])


@pytest.fixture(scope="module", params=["made", pytest.param("trained", marks=pytest.mark.slow)])
def finished(request, tmp_path_factory, small_model):
    path = tmp_path_factory.mktemp("figure6")
    save_model(path / "model", Model(small_model, 1, policy(small_model)), {})
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "made":
            patch.setattr(finetune, "finetune", made_runs.finetune)
        figure6.main(command(path))
    return path


def test_the_pressure_is_the_mean_over_rounds_with_its_interval_over_seeds(made):
    assert made["test_episodes"] == [0, 20]
    pressure = made["arms"]["beta_500"]["pressure"]
    assert pressure["kl_weight"] == pytest.approx((0.55, 0.55, 0.55))
    assert pressure["kl"] == pytest.approx((0.015, 0.015, 0.015))
    assert pressure["kl_loss"] == pytest.approx((0.35, 0.35 - 12.7062 * 0.05, 0.35 + 12.7062 * 0.05), abs=1e-5)


def test_differences_to_the_standard_arm_are_paired_by_seed(made):
    assert made["arms"]["beta_500"]["target_minus_standard"] == pytest.approx((0.305, 0.2415, 0.3685), abs=1e-4)
    assert made["arms"]["beta_500"]["against_standard"] == "above"
    # Student's interval is -0.05 +- 2.54, which no difference of shares can be.
    assert made["arms"]["beta_10000"]["target_minus_standard"] == pytest.approx((-0.05, -1, 1))
    assert made["arms"]["beta_10000"]["against_standard"] == "undecided"


def test_the_four_claims_follow_their_rules(made):
    better, best, decline, collapse = claims(made)
    assert better.intervals[0] == pytest.approx((0.2025, 0.1707, 0.2343), abs=1e-4)  # Means of 10 and 500: 0.5, 0.605.
    assert best.intervals[0] == pytest.approx((0.105, 0.0415, 0.1685), abs=1e-4)
    assert "beta 1000" in best.here
    assert decline.intervals[0] == pytest.approx((0.105, 0.0415, 0.1685), abs=1e-4)
    assert collapse.intervals[0][0] == pytest.approx(0.05)
    assert [claim.verdict for claim in (better, best, decline, collapse)] == ["reproduced"] * 3 + ["undecided"]


def test_a_better_rival_of_beta_500_is_not_reproduced(made):
    better = json.loads(json.dumps(made))
    for row in better["arms"]["standard"]["learning_curve"]:
        row[-1] += 0.5
    judged = claims(better)
    assert [claim.verdict for claim in judged] == ["not reproduced", "not reproduced", "reproduced", "undecided"]
    assert "(standard)" in judged[1].here


def test_claims_about_betas_that_were_not_swept_are_left_out(made):
    few = {**made, "betas": [1000.0]}
    assert claims(few) == []


@pytest.mark.parametrize("betas", [[500.0], [10.0, 500.0], [500.0, 1000.0]])
def test_beta_500_is_not_called_the_best_without_rivals_on_both_sides(made, betas):
    assert "Beta 500 is the best" not in {claim.claim for claim in claims({**made, "betas": betas})}


def test_one_seed_decides_nothing(made):
    one = json.loads(json.dumps(made))
    for values in one["arms"].values():
        values["learning_curve"] = values["learning_curve"][:1]
    assert {claim.verdict for claim in claims(one)} == {"undecided"}


def test_all_arms_are_one_run(finished):
    results = json.loads((finished / "out" / "results.json").read_text())
    assert list(results["arms"]) == ["standard", "beta_10", "beta_1000"]
    assert results["betas"] == [10, 1000]
    assert results["seeds"] == [0, 1]
    assert np.shape(results["arms"]["beta_10"]["kl_loss"]) == (2, 2)
    assert [claim["claim"] for claim in results["claims"]] == [
        "Beta from 10 to 500 is slightly better than the standard KL"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("finished", ["trained"], indirect=True)
def test_the_weights_fall_with_beta(finished):
    results = json.loads((finished / "out" / "results.json").read_text())
    weights = [results["arms"][arm]["pressure"]["kl_weight"][0] for arm in results["arms"]]
    assert weights[0] == 1
    assert weights[0] > weights[1] > weights[2]
    assert (finished / "out" / "beta_1000" / "seed_1" / "model.json").exists()


def test_the_picture_is_a_png_and_an_svg(finished):
    assert (finished / "out" / "figure6.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (finished / "out" / "figure6.svg").read_text()


def test_plot_only_needs_three_files_and_gives_the_same_results(finished, tmp_path, capsys):
    for name in ("config.json", "metrics.jsonl", "results.json"):
        (tmp_path / name).write_bytes((finished / "out" / name).read_bytes())
    figure6.main(command(finished, "--out", str(tmp_path), "--plot-only", "--betas", "7"))
    assert (tmp_path / "results.json").read_bytes() == (finished / "out" / "results.json").read_bytes()
    assert (tmp_path / "figure6.png").exists()
    assert "| beta 1000 |" in capsys.readouterr().out


def test_plot_only_without_a_finished_run_is_refused(finished, tmp_path):
    with pytest.raises(ConfigError, match=r"^plot_only: "):
        figure6.main(command(finished, "--out", str(tmp_path / "new"), "--plot-only"))
    assert not (tmp_path / "new").exists()


def test_plot_only_with_another_checkpoint_is_refused(finished, tmp_path, small_model):
    save_model(tmp_path / "other", Model(small_model, 1, policy(small_model, 1)), {})
    with pytest.raises(ConfigError, match=r"^checkpoint: "):
        figure6.main(command(finished, "--checkpoint", str(tmp_path / "other"), "--plot-only"))


def test_other_betas_in_the_same_directory_are_refused(finished):
    with pytest.raises(ConfigError, match="betas"):
        figure6.main(command(finished, "--betas", "10"))


@pytest.mark.parametrize("betas", [("0",), ("-1", "10"), ("10", "10"), ("nan",), ("inf",)])
def test_betas_that_are_no_exponents_are_refused(tmp_path, betas):
    with pytest.raises(ConfigError, match=r"\bbetas: "):
        command(tmp_path, "--betas", *betas)


@pytest.mark.parametrize("options", [("--kl-coefficient", "0"), ("--kl-in", "reward", "--kl", "k1")])
def test_a_run_without_a_kl_in_its_loss_is_refused(tmp_path, options):
    with pytest.raises(ConfigError, match=rf"\b{options[0].strip('-').replace('-', '_')}: got"):
        command(tmp_path, *options)


def test_the_single_beta_has_no_meaning_here(tmp_path):
    with pytest.raises(ConfigError, match=r"\bbeta: .*--betas"):
        command(tmp_path, "--beta", "7")
