"""Figure 3: its rules on made runs, the command with a made trainer, and one real run on a model of width 16."""

import dataclasses
import json

import made_runs
import numpy as np
import pytest
from names import ROOT

from ckl_jax import finetune as finetune_lib
from ckl_jax.analysis.statistics import mean_interval, share_interval
from ckl_jax.checkpoint.store import load_model
from ckl_jax.config import PretrainConfig
from ckl_jax.errors import ConfigError
from ckl_jax.presets import finetune_preset
from ckl_jax.runtime import cli
from experiments import figure3_pretraining_levels as figure3
from experiments.common import models
from experiments.common.models import Models


def records(before, after, seed=0):
    """metrics.jsonl of a run with a round before each of two tests: ``before`` of 100, then 50, then ``after``."""
    solved = {"standard": [last / 100 for last in after]}
    early = {0: {"test_target": before / 100}, 1: {"test_target": 0.5}}
    test, kl = (lambda arm, seed, step: early.get(step, {})), (lambda arm, seed, step: {"kl": 0.01 * seed})
    return made_runs.records(solved, seed=seed, tests=(0, 1, 2), test=test, round_=kl)


def run(base, extra, before, after, seed=0):
    config = dataclasses.replace(finetune_preset("tiny", "ours"), extra_digits=extra, seed=seed)
    return figure3.summarize(config, base, len(after), records(before, after, seed))


def test_the_summary_of_a_run():
    found = run(3, 2, 10, (60, 80), seed=4)
    assert (found["digits"], found["seeds"]) == (5, [4, 5])
    assert (found["test_episodes"], found["round_episodes"]) == ([0, 128, 256], [128, 256])
    assert found["learning_curve"] == [[0.1, 0.5, 0.6], [0.1, 0.5, 0.8]]
    assert found["kl"] == [[0.04, 0.04], [0.05, 0.05]]
    assert found["before"] == pytest.approx(share_interval(10, 100))
    assert found["after"] == pytest.approx(mean_interval([0.6, 0.8]).within(0, 1))
    assert found["gain"][0] == pytest.approx(0.6)
    assert found["last_change"][0] == pytest.approx(0.2)
    assert (found["old_before"], found["old_after"][0]) == (0.9, pytest.approx(0.9))


def test_the_last_change_is_one_of_the_same_problems_or_none():
    made = records(10, (60, 80))
    for record in made:
        if record["step"] == 2 and "test_problems" in record:
            record["test_problems"] = 1000
    config = dataclasses.replace(finetune_preset("tiny", "ours"), extra_digits=2)
    found = figure3.summarize(config, 3, 2, made)
    assert np.isnan(found["last_change"]).all()
    assert found["gain"][0] == pytest.approx(0.6)


def test_seeds_that_all_end_alike_decide_nothing():
    one, other = run(3, 1, 0, (0, 0)), run(4, 1, 0, (20, 20))
    assert said(one, other)["larger N ends higher on N+1"] == ([4, 3], "undecided")


def said(*runs):
    return {row["claim"]: (row["max_pretrain_digits"], row["verdict"]) for row in figure3.verdicts(list(runs))}


def test_verdicts_compare_the_largest_with_the_smallest_n_of_each_target():
    low, middle = run(3, 2, 0, (10, 11, 12)), run(4, 2, 50, (1, 50, 99))
    high = run(5, 2, 20, (80, 81, 82))
    assert said(high, middle, low) == {
        "larger N starts higher on N+2": ([5, 3], "reproduced"),
        "larger N ends higher on N+2": ([5, 3], "reproduced"),
    }
    assert said(run(3, 1, 40, (90, 91)), run(5, 1, 10, (10, 11))) == {
        "larger N starts higher on N+1": ([5, 3], "not reproduced"),
        "larger N ends higher on N+1": ([5, 3], "not reproduced"),
    }
    assert {verdict for _, verdict in said(low, middle).values()} == {"reproduced", "undecided"}


def test_models_that_solve_nothing_are_drawn_at_the_bottom_of_an_axis_of_accuracy():
    nothing, some = (
        json.loads((ROOT / "experiments" / "results" / "ladder" / name / "results.json").read_text())
        for name in ("figure3_plus2_N3_N6", "figure3_N3_N6")
    )
    assert figure3.draw(nothing).axes[0].get_ylim() == (-1, 10)
    assert figure3.draw(some).axes[0].get_ylim()[1] > 40


def test_one_n_or_one_seed_decides_nothing():
    assert said(run(3, 1, 0, (10, 20)), run(3, 2, 0, (10, 20))) == {}
    assert said(run(3, 1, 0, (10,)), run(4, 1, 0, (90,)))["larger N ends higher on N+1"] == ([4, 3], "undecided")


@pytest.fixture
def command(tmp_path, small_model):
    model = dataclasses.replace(small_model, num_layers=1, block_size=350)
    pretrain = PretrainConfig(max_digits=1, num_documents=60, packing="documents", model=model)
    changes = {"rounds": 2, "test_every": 1, "episodes": 2, "minibatch_episodes": 2, "diagnostic_episodes": 2}
    changes |= {"test_problems": 2, "final_problems": 4, "old_problems": 2, "extra_length": 5, "rollout": "plain"}
    finetune = dataclasses.replace(figure3.standard_kl("tiny"), **changes)
    return figure3.Figure3Command(Models("tiny", (1, 2), pretrain, tmp_path / "models"), finetune, out=tmp_path / "out")


@pytest.fixture(autouse=True)
def _random_models(monkeypatch):
    monkeypatch.setattr(models, "pretrain", made_runs.pretrain)


def test_every_n_and_target_is_a_run_of_its_own(command, monkeypatch, capsys):
    trained = []

    def made_finetune(config, model, directory, arms, seeds, progress, certainty_from):
        assert arms == {"standard": {}}
        assert (config.beta, config.kl_coefficient) == (0, 1.0)
        trained.append((directory.path.name, model.max_pretrain_digits + config.extra_digits))
        if len(trained) == 2:
            raise KeyboardInterrupt
        directory.rewind_metrics(-1)
        directory.log(records(10 * model.max_pretrain_digits, (60, 62)))
        directory.log_seconds(2, 1.5)

    monkeypatch.setattr(finetune_lib, "finetune", made_finetune)
    with pytest.raises(KeyboardInterrupt):
        figure3.main(command)
    assert not (command.out / "results.json").exists()
    figure3.main(command)
    assert trained[2:] == [("N1_plus1", 2), ("N1_plus2", 3), ("N2_plus1", 3), ("N2_plus2", 4)]
    results = json.loads((command.out / "results.json").read_text())
    assert [(r["max_pretrain_digits"], r["extra_digits"]) for r in results["runs"]] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert results["wall_seconds"] == sum(r["wall_seconds"] for r in results["runs"]) == 1.5 * 5
    assert len({r["checkpoint"] for r in results["runs"]}) == 2
    assert len(results["verdicts"]) == 4
    written, count = (command.out / "results.json").read_bytes(), len(trained)
    (command.out / "figure3.png").unlink()
    capsys.readouterr()
    figure3.main(dataclasses.replace(command, plot_only=True))
    assert (command.out / "figure3.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (command.out / "figure3.svg").read_text()
    assert ((command.out / "results.json").read_bytes(), len(trained)) == (written, count)
    printed = capsys.readouterr().out
    assert "| 2 | 4 | 20.0 [13.3, 28.9] | 61.0 [48.3, 73.7] | +41.0 " in printed
    with pytest.raises(ConfigError, match="seeds"):
        figure3.main(dataclasses.replace(command, seeds=3))
    assert len(trained) == count


@pytest.mark.slow
def test_a_real_run_ends_with_results_and_a_policy_per_seed(command):
    one = dataclasses.replace(command, extra_digits=(1,), models=dataclasses.replace(command.models, digits=(1,)))
    figure3.main(one)
    (found,) = json.loads((command.out / "results.json").read_text())["runs"]
    assert (found["test_episodes"], found["round_episodes"]) == ([0, 2, 4], [2, 4])
    assert [len(curve) for curve in found["learning_curve"]] == [3, 3]
    assert load_model(command.out / "N1_plus1" / "standard" / "seed_1").max_pretrain_digits == 1
    metrics = (command.out / "N1_plus1" / "metrics.jsonl").read_bytes()
    figure3.main(one)
    assert (command.out / "N1_plus1" / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--digits", "5", "7"], "digits: N = 7 does not fit: extra_digits"),
        (["--extra-digits", "3"], "extra_digits"),
        (["--extra-digits"], "extra_digits"),
        (["--seeds", "0"], "seeds"),
        (["--finetune.beta", "1"], "finetune.beta"),
        (["--finetune.scale", "small"], "finetune.scale"),
        (["--finetune.kl-weights", "threshold"], "finetune.kl_weights"),
        (["--finetune.kl-coefficient", "0"], "finetune.kl_coefficient"),
        (["--digits", "5", "--pretrain.task", "subtraction", "--pretrain.model.block-size", "583"], "digits"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(options, field):
    with pytest.raises(ConfigError, match=f"{field}: ") as error:
        cli.parse(figure3.Figure3Command, figure3.preset, options)
    assert "\n" not in str(error.value)


def test_a_longer_n_is_possible_where_only_a_shorter_target_is_asked_for():
    assert cli.parse(figure3.Figure3Command, figure3.preset, ["--digits", "7", "--extra-digits", "1"]).seeds == 2


@pytest.mark.parametrize("scale", ["tiny", "ladder", "small", "gpt2"])
def test_every_scale_has_the_standard_kl_at_twice_figure_4s_coefficient(scale):
    config, figure4 = figure3.preset(scale).finetune, finetune_preset(scale, "ours")
    assert (config.beta, config.kl_coefficient) == (0, 2 * figure4.kl_coefficient)
    changed = {"beta", "kl_coefficient", "extra_length"}
    same = [dataclasses.asdict(c).items() for c in (config, figure4)]
    assert all(a == b for a, b in zip(*same, strict=True) if a[0] not in changed)
