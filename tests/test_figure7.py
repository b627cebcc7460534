"""Figure 7's numbers from a metrics.jsonl written by hand, against means and intervals computed by hand."""

import json

import numpy as np
import pytest

from ckl_jax.errors import ConfigError
from ckl_jax.runtime import cli
from experiments import figure7_critical_tokens as figure7

CONFIG = {
    "command": "experiments.figure4_prioritized_kl",
    "config": {"seed": 4, "rounds": 2, "episodes": 10, "extra_digits": 1},
    "seeds": 3,
}
SEEDS = (4, 5, 6)
# Of the comma, by (step, operand): the last round's probabilities of the three seeds; everything else is 0.5.
LAST = {
    ("standard", 1, 2): (0.5, 0.6, 0.7),
    ("prioritized", 1, 2): (0.8, 0.8, 0.95),
    ("standard", 2, 1): (0.8, 0.8, 0.95),
    ("prioritized", 2, 1): (0.5, 0.6, 0.7),
    ("standard", 3, 1): (0.4, None, 0.6),
    ("prioritized", 3, 1): (0.5, 0.9, 0.8),
    ("standard", 3, 2): (None, 0.2, None),
    ("prioritized", 3, 2): (0.1, 0.3, 0.1),
}


def record(arm, seed, step):
    probability = np.full((3, 2, 2), 0.5)
    count = np.full((3, 2, 2), 7)
    probability[..., 1] = 0.01  # The digit's, which is not drawn.
    for (of_arm, line, operand), values in LAST.items():
        if step == 2 and of_arm == arm:
            value = values[seed - SEEDS[0]]
            probability[line - 1, operand - 1, 0] = 0.0 if value is None else value
            count[line - 1, operand - 1, 0] = 0 if value is None else 9
    measured = {"critical_probability_3x2xC": probability.tolist(), "critical_count_3x2xC": count.tolist()}
    return {"step": step, "arm": arm, "seed": seed, "success": 0.3, **measured}


def records(seeds=SEEDS):
    tests = [{"step": 0, "arm": arm, "seed": seed, "test_target": 0.2} for arm in figure7.ARMS for seed in seeds]
    return tests + [record(arm, seed, step) for step in (1, 2) for arm in figure7.ARMS for seed in seeds]


def write_run(path, lines):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "results.json").write_text(json.dumps({"device": "abacus", "platform": "wood", "wall_seconds": 12.5}))
    return path


def command(*arguments):
    return cli.parse(figure7.Figure7Command, None, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("figure7") / "run", records())
    figure7.main(command("--run", run))
    return run / "figure7"


@pytest.fixture(scope="module")
def tokens(finished):
    results = json.loads((finished / "results.json").read_text())
    return {(token["step"], token["operand"]): token for token in results["tokens"]}


def test_six_tokens_with_a_value_per_seed_and_round(finished, tokens):
    results = json.loads((finished / "results.json").read_text())
    assert results["seeds"] == [4, 5, 6]
    assert results["episodes"] == [0, 10]
    assert results["device"] == "abacus"
    assert results["wall_seconds"] == 12.5
    assert set(tokens) == {(step, operand) for step in (1, 2, 3) for operand in (1, 2)}
    assert tokens[1, 2]["arms"]["standard"]["curves"] == [[0.5, 0.5], [0.5, 0.6], [0.5, 0.7]]
    assert tokens[1, 2]["arms"]["standard"]["counts"] == [[7, 9], [7, 9], [7, 9]]


def test_mean_and_student_interval_over_seeds(tokens):
    # 0.5, 0.6, 0.7: mean 0.6, standard deviation 0.1, t(0.975, 2) = 4.302653.
    half = 4.302653 * 0.1 / 3**0.5
    assert tokens[1, 2]["arms"]["standard"]["final"] == pytest.approx([0.6, 0.6 - half, 0.6 + half], abs=1e-6)
    assert tokens[1, 2]["arms"]["standard"]["before"] == pytest.approx([0.5, 0.5, 0.5])


def test_the_difference_is_paired_by_seed_and_an_interval_above_zero_is_reproduced(tokens):
    # Differences 0.3, 0.2, 0.25: mean 0.25, standard deviation 0.05.
    half = 4.302653 * 0.05 / 3**0.5
    assert tokens[1, 2]["final_difference"] == pytest.approx([0.25, 0.25 - half, 0.25 + half], abs=1e-6)
    assert (tokens[1, 2]["pairs"], tokens[1, 2]["verdict"]) == (3, "reproduced")
    assert tokens[2, 1]["final_difference"] == pytest.approx([-0.25, -0.25 - half, -0.25 + half], abs=1e-6)
    assert tokens[2, 1]["verdict"] == "not reproduced"


def test_a_seed_that_recorded_nothing_is_left_out(tokens):
    arms = tokens[3, 1]["arms"]
    assert arms["standard"]["curves"][1][1] is None
    assert arms["standard"]["final"][0] == pytest.approx(0.5)
    assert arms["prioritized"]["final"][0] == pytest.approx((0.5 + 0.9 + 0.8) / 3)
    # Differences 0.1 and 0.2 of the two seeds with both: t(0.975, 1) = 12.7062, standard deviation 0.1 / sqrt(2).
    half = 12.7062 * 0.05
    assert tokens[3, 1]["final_difference"] == pytest.approx([0.15, 0.15 - half, 0.15 + half], abs=1e-5)
    assert (tokens[3, 1]["pairs"], tokens[3, 1]["verdict"]) == (2, "undecided")


def test_a_single_pair_decides_nothing(tokens):
    mean, low, high = tokens[3, 2]["final_difference"]
    assert mean == pytest.approx(0.1)
    assert (low, high) == (None, None)
    assert (tokens[3, 2]["pairs"], tokens[3, 2]["verdict"]) == (1, "undecided")


def test_the_picture_is_a_png_and_an_svg(finished):
    assert (finished / "figure7.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (finished / "figure7.svg").read_text()


def test_plot_only_draws_again_from_the_results_alone(finished, tmp_path, capsys):
    (tmp_path / "results.json").write_bytes((finished / "results.json").read_bytes())
    figure7.main(command("--run", tmp_path / "gone", "--out", tmp_path, "--plot-only"))
    assert (tmp_path / "figure7.png").exists()
    assert "| 1, 2 | 50.0 [50.0, 50.0] |" in capsys.readouterr().out


def test_a_run_that_is_not_there_is_refused_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(ConfigError, match=r"^run: .*python -m experiments\.figure4_prioritized_kl --out \S+gone$"):
        figure7.main(command("--run", tmp_path / "gone"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "named"),
    [({}, ""), ({"task": "subtraction", "certainty_checkpoint": "x"}, ", subtraction, J of another model")],
)
def test_a_claim_says_of_which_task_and_whose_certainty_it_is(changes, named):
    config = CONFIG | changes
    for claim in figure7.claims({**figure7.summarize(config, records()), "config": {"run": config}}):
        assert claim.here.endswith(f"{named})")
        assert ("subtraction" in claim.here) == bool(changes)


def test_of_n_plus_2_digits_it_is_the_comma_before_the_last():
    config = CONFIG | {"config": CONFIG["config"] | {"extra_digits": 2}}
    wider = records()
    for line in wider:
        if "success" in line:
            for name, last in (("critical_probability_3x2xC", 0.9), ("critical_count_3x2xC", 3)):
                line[name] = [[[*tokens, last, 0] for tokens in of_step] for of_step in line[name]]
    for token in figure7.summarize(config, wider)["tokens"]:
        for values in token["arms"].values():
            assert values["curves"] == [[0.9, 0.9]] * 3
            assert values["counts"] == [[3, 3]] * 3


def test_an_unfinished_run_is_refused(tmp_path):
    run = write_run(tmp_path / "run", records()[:-1])
    with pytest.raises(ConfigError, match=r"^run: got '1 of 12 rounds missing'"):
        figure7.main(command("--run", run))


def test_a_run_of_another_command_is_refused(tmp_path):
    run = write_run(tmp_path / "run", records())
    (run / "config.json").write_text('{"command": "finetune"}')
    with pytest.raises(ConfigError, match=r"^run: config\.json is not figure 4's"):
        figure7.main(command("--run", run))


def test_damaged_metrics_are_refused(tmp_path):
    run = write_run(tmp_path / "run", records())
    (run / "metrics.jsonl").write_text('{"step": 1, "ar')
    with pytest.raises(ConfigError, match=r"^run: .*metrics\.jsonl is damaged"):
        figure7.main(command("--run", run))


def test_another_commands_results_are_not_overwritten(tmp_path):
    run = write_run(tmp_path / "run", records())
    before = (run / "results.json").read_bytes()
    with pytest.raises(ConfigError, match=r"^out: .*another command's results\.json"):
        figure7.main(command("--run", run, "--out", run))
    assert (run / "results.json").read_bytes() == before


def test_an_out_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match=r"^out: "):
        figure7.main(command("--out", tmp_path / "file"))
