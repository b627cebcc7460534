"""Both kinds of minibatches on a random model of width 16, and the comparison on curves made by hand."""

import json

import jax
import numpy as np
import pytest
from policies import untrained

from ckl_jax.checkpoint.store import Model, load_model, save_model
from ckl_jax.errors import ConfigError
from ckl_jax.runtime import cli
from experiments import minibatches

OPTIONS = (
    "--rounds 2 --test-every 1 --episodes 2 --minibatch-episodes 2 --diagnostic-episodes 2 --test-problems 4 "
    "--final-problems 4 --extra-length 5 --rollout plain --seeds 2 --minibatch-transitions 16 --transition-batch 16 "
    "--episode-rates 0.003 0.3 --transition-rates 0.01"
)


def command(place, *extra: str) -> minibatches.MinibatchesCommand:
    paths = ["--checkpoint", str(place / "model"), "--out", str(place / "out")]
    return cli.parse(minibatches.MinibatchesCommand, minibatches.preset, [*OPTIONS.split(), *paths, *extra])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_model):
    place = tmp_path_factory.mktemp("minibatches")
    save_model(place / "model", Model(small_model, 1, untrained(small_model, contrast=10)), {})
    minibatches.main(command(place))
    return place, json.loads((place / "out" / "results.json").read_text())


@pytest.mark.slow
def test_both_kinds_are_trained_with_their_rates_on_the_same_problems(finished):
    place, results = finished
    assert list(results["arms"]) == ["episodes_0.003", "episodes_0.3", "transitions_0.01"]
    updates, success = {}, {}
    for kind in minibatches.KINDS:
        for line in (place / "out" / kind / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record["step"] == 1 and "updates" in record:
                updates[kind] = record["updates"]
                success[kind, record["seed"]] = record["success"], record["kl"]
    assert updates["episodes"] == 1
    assert updates["transitions"] > 2
    for seed in range(2):
        assert success["episodes", seed] == success["transitions", seed]


@pytest.mark.slow
def test_the_displacement_is_that_of_the_saved_policies(finished):
    place, results = finished
    start = load_model(place / "model").params
    for arm, found in results["arms"].items():
        kind = found["minibatch"]
        for seed, expected in enumerate(found["displacement"]):
            policy = load_model(place / "out" / kind / arm / f"seed_{seed}").params
            leaves = zip(jax.tree.leaves(policy), jax.tree.leaves(start), strict=True)
            flat = np.concatenate([np.ravel(x) - np.ravel(y) for x, y in leaves])
            assert np.linalg.norm(flat) == pytest.approx(expected, rel=1e-4)
    by_rate = [np.mean(results["arms"][f"episodes_{rate}"]["displacement"]) for rate in (0.003, 0.3)]
    assert by_rate[1] > 10 * by_rate[0]


def test_a_curve_is_read_between_its_points_in_the_logarithm_and_nowhere_else():
    curve = [(100.0, 0.5), (1.0, 0.1)]
    assert minibatches.at_displacement(curve, 10.0) == pytest.approx(0.3)
    assert minibatches.at_displacement(curve, 1.0) == pytest.approx(0.1)
    assert np.isnan(minibatches.at_displacement(curve, 0.5))
    assert np.isnan(minibatches.at_displacement(curve, 101.0))


def arm(kind, displacement, after):
    return {"minibatch": kind, "displacement": displacement, "learning_curve": [[0.0, x] for x in after]}


@pytest.mark.parametrize(
    ("after", "expected"), [([0.4, 0.41, 0.42], "better"), ([0.2, 0.21, 0.22], "worse"), ([0.1, 0.3, 0.5], "undecided")]
)
def test_transitions_are_compared_with_episodes_at_their_own_displacement(after, expected):
    arms = {
        "near": arm("episodes", [1.0, 1.0, 1.0], [0.1, 0.1, 0.1]),
        "far": arm("episodes", [100.0, 100.0, 100.0], [0.5, 0.5, 0.5]),
        "single": arm("transitions", [10.0, 10.0, 10.0], after),
    }
    (pair,) = minibatches.compare(arms)
    assert pair["verdict"] == expected
    assert pair["difference"][0] == pytest.approx(np.mean(after) - 0.3)
    assert pair["seeds_compared"] == 3


def test_what_lies_outside_of_the_episodes_curve_is_not_compared():
    arms = {
        "near": arm("episodes", [1.0, 1.0], [0.1, 0.1]),
        "far": arm("episodes", [2.0, 100.0], [0.5, 0.5]),
        "single": arm("transitions", [10.0, 10.0], [0.3, 0.3]),
    }
    (pair,) = minibatches.compare(arms)
    assert (pair["seeds_compared"], pair["difference"], pair["verdict"]) == (1, None, "none")


@pytest.mark.slow
def test_the_figure_and_table_are_made_again_without_training(finished, capsys):
    place, results = finished
    (place / "out" / "minibatches.png").unlink()
    minibatches.main(command(place, "--plot-only"))
    printed = capsys.readouterr().out
    assert "| transitions_0.01 |" in printed
    assert (place / "out" / "minibatches.png").exists()
    assert json.loads((place / "out" / "results.json").read_text()) == results


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--episode-rates", "0.1"], "episode_rates"),
        (["--transition-rates", "0"], "transition_rates"),
        (["--transition-rates", "0.1", "0.1"], "transition_rates"),
        (["--minibatch", "transitions"], "minibatch"),
        (["--learning-rate", "0.1"], "learning_rate"),
        (["--certainty-checkpoint", "N5", "--beta", "0"], "certainty_checkpoint"),
        (["--certainty-checkpoint", "N5", "--kl-weights", "uniform"], "certainty_checkpoint"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tmp_path, options, field):
    with pytest.raises(ConfigError, match=f"^{field}: got") as error:
        command(tmp_path, *options)
    assert "\n" not in str(error.value)
