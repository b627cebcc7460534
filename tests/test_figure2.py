"""Figure 2: its rules on made cells, and the command with a made judge, interrupted and redrawn."""

import dataclasses
import json
import shutil

import made_runs
import numpy as np
import pytest
from policies import SCRIPT_MODEL, policy, scripted_policy

from ckl_jax.analysis.statistics import share_interval
from ckl_jax.checkpoint.store import Model, save_model
from ckl_jax.config import PretrainConfig
from ckl_jax.errors import ConfigError
from ckl_jax.runtime import cli
from ckl_jax.tasks.columns import ADDITION
from ckl_jax.tasks.problems import measured_on
from experiments import figure2_pretraining as figure2
from experiments.common import models
from experiments.common.models import Models


def made_cells(numbers, problems=1000):
    """Cells from {N: solved problems at N .. N+3, None where they do not fit}, alike for both kinds of operands."""
    cells = []
    for operands in ("identical", "varying"):
        for base, row in numbers.items():
            for k, solved in enumerate(row):
                cell = {
                    "operands": operands,
                    "max_pretrain_digits": base,
                    "digits": base + k,
                    "fits": solved is not None,
                }
                if solved is not None:
                    cell["score_interval"] = share_interval(solved, problems)
                cells.append(cell)
    return cells


def said(cells, claim, *digits, scale="tiny", operands="varying"):
    rows = figure2.verdicts(cells, scale)
    found = [
        r for r in rows if (r["claim"], r["operands"], r["max_pretrain_digits"]) == (claim, operands, list(digits))
    ]
    assert len(found) == 1
    return found[0]["verdict"]


def test_verdicts_of_models_that_do_as_the_paper_says():
    cells = made_cells({3: (990, 300, 0, 0), 5: (960, 500, 30, 0)})
    for base in (3, 5):
        assert said(cells, "high at N", base) == "reproduced"
        assert said(cells, "falls at N+1", base) == "reproduced"
        assert said(cells, "almost none at N+3", base) == "reproduced"
    assert said(cells, "larger N better at N+1", 5, 3) == "reproduced"
    assert said(cells, "larger N better at N+2", 5, 3) == "reproduced"
    assert said(cells, "larger N better at N+3", 5, 3) == "undecided"
    assert {row["operands"] for row in figure2.verdicts(cells, "tiny")} == {"identical", "varying"}


def test_verdicts_of_models_that_do_the_opposite_and_of_too_few_problems():
    cells = made_cells({3: (500, 600, 300, 200), 5: (900, 910, 100, 100)})
    assert said(cells, "high at N", 3) == "not reproduced"
    assert said(cells, "falls at N+1", 3) == "not reproduced"
    assert said(cells, "almost none at N+3", 3) == "not reproduced"
    assert said(cells, "high at N", 5) == said(cells, "falls at N+1", 5) == "undecided"
    assert said(cells, "larger N better at N+2", 5, 3) == "not reproduced"
    few = made_cells({3: (10, 0, 0, 0)}, problems=10)
    assert said(few, "high at N", 3) == said(few, "almost none at N+3", 3) == "undecided"


def test_a_cell_that_does_not_fit_decides_nothing_and_one_n_has_no_other_to_compare():
    cells = made_cells({3: (990, 300, 0, None)})
    assert said(cells, "almost none at N+3", 3) == "does not fit"
    assert not any("larger" in row["claim"] for row in figure2.verdicts(cells, "tiny"))


def test_the_papers_numbers_are_compared_at_its_own_size_and_n_alone():
    cells = made_cells({7: (995, 660, 0, 0), 8: (995, 660, 0, 0), 11: (990, 900, 800, 0)})
    assert said(cells, "the paper's number at N+1", 7, scale="gpt2") == "reproduced"
    assert said(cells, "the paper's number at N+1", 7, scale="gpt2", operands="identical") == "not reproduced"
    compared = [r for r in figure2.verdicts(cells, "gpt2") if "paper" in r["claim"]]
    assert {tuple(row["max_pretrain_digits"]) for row in compared} == {(7,), (11,)}
    assert not any("paper" in row["claim"] for row in figure2.verdicts(cells, "small"))
    none_left = [r for r in figure2.verdicts(cells, "gpt2") if "none" in r["claim"]]
    assert {tuple(row["max_pretrain_digits"]) for row in none_left} == {(7,), (8,)}


def test_a_number_that_the_paper_rounds_to_all_or_none_is_no_exact_one():
    cells = made_cells({7: (999, 690, 1, 1)})
    for place in ("N", "N+2", "N+3"):
        assert said(cells, f"the paper's number at {place}", 7, scale="gpt2") == "reproduced"
    far = made_cells({7: (960, 690, 30, 30)})
    for place in ("N", "N+2", "N+3"):
        assert said(far, f"the paper's number at {place}", 7, scale="gpt2") == "not reproduced"


@pytest.fixture
def command(tmp_path, small_model):
    model = dataclasses.replace(small_model, num_layers=1, block_size=350)
    pretrain = PretrainConfig(max_digits=1, num_documents=60, packing="documents", model=model)
    return figure2.Figure2Command(Models("tiny", (1, 2), pretrain, tmp_path / "models"), tmp_path / "out", 4, 3, 40)


@pytest.fixture
def finished(command, monkeypatch):
    """Interrupted before its fourth cell, with a line half written, and started again; half of all is solved."""
    measured = []

    def half_right(model, operands, digits, count, *, seed, extra_length):
        assert (seed, extra_length) == (3, 40)
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append((model.max_pretrain_digits, operands, digits))
        return np.arange(count, dtype=np.float32) % 2

    monkeypatch.setattr(models, "pretrain", made_runs.pretrain)
    monkeypatch.setattr(figure2, "judge_cell", half_right)
    with pytest.raises(KeyboardInterrupt):
        figure2.main(command)
    with (command.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "oper')
    first = list(measured)
    measured[:] = [None] * 4
    figure2.main(command)
    return first, measured[4:], json.loads((command.out / "results.json").read_text())


def test_all_cells_are_there_once_and_those_that_were_done_are_kept(finished):
    first, second, results = finished
    assert first == [(1, "identical", 1), (1, "varying", 1), (1, "identical", 2)]
    assert second[0] == (1, "varying", 2)
    cells = results["cells"]
    keys = [(c["max_pretrain_digits"], c["operands"], c["digits"]) for c in cells]
    assert keys == [(n, kind, n + k) for n in (1, 2) for k in range(4) for kind in ("identical", "varying")]
    assert [key for key, cell in zip(keys, cells, strict=True) if cell["fits"]] == first + second
    assert len({cell["checkpoint"] for cell in cells}) == 2
    assert results["wall_seconds"] > 0
    assert {"device", "config", "paper", "verdicts"} <= results.keys()


def test_models_that_were_trained_again_are_measured_beside_the_earlier_ones(finished, command, monkeypatch):
    def other(config, run, data_dir, progress):
        model = Model(config.model, config.max_digits, policy(config.model, config.max_digits + 10))
        save_model(run.path, model, {"config": dataclasses.asdict(config)})

    shutil.rmtree(command.models.pretrained)
    monkeypatch.setattr(models, "pretrain", other)
    for _ in range(2):
        figure2.main(command)
    again = json.loads((command.out / "results.json").read_text())
    theirs, ours = ({cell["checkpoint"] for cell in results["cells"]} for results in (finished[2], again))
    assert not theirs & ours
    steps = [json.loads(line)["step"] for line in (command.out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 2 * len(again["cells"]) + 1))


def test_a_cell_has_its_interval_or_says_why_not(finished):
    for cell in finished[2]["cells"]:
        assert cell["fits"] == (cell["digits"] <= 3)
        if cell["fits"]:
            assert (cell["solved"], cell["problems"]) == (2, 4)
            assert cell["accuracy"] == [0.5, 0.0, 1.0]
            assert cell["score_interval"] == pytest.approx(share_interval(2, 4))
        else:
            assert cell["characters"] > cell["block_size"] == 350


def test_plot_only_draws_again_and_the_table_names_what_does_not_fit(finished, command, capsys):
    written = (command.out / "results.json").read_bytes()
    (command.out / "figure2.png").unlink()
    figure2.main(dataclasses.replace(command, plot_only=True))
    assert (command.out / "figure2.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (command.out / "figure2.svg").read_text()
    assert (command.out / "results.json").read_bytes() == written
    printed = capsys.readouterr().out
    assert "| identical | 2 | 50.0 [0.0, 100.0] | 50.0 [0.0, 100.0] | does not fit | does not fit |" in printed
    assert "| varying, paper (85M) | 13 | 95.6 ± 1.4 | 92.5 ± 1.9 | 84.7 ± 2.4 | 51.8 ± 3.2 |" in printed


def test_another_number_of_problems_is_refused_before_anything_is_trained(finished, command):
    with pytest.raises(ConfigError, match="problems"):
        figure2.main(dataclasses.replace(command, problems=5))


def test_a_cell_counts_what_the_model_solves(command):
    """A model that answers its seed's last problem, whatever is asked; with the seed 0 that solves none."""
    asked, others = (ADDITION.identical_problems(measured_on(seed, 1), 4, 1) for seed in (command.seed, 0))
    params = scripted_policy(ADDITION.answer_text(asked[-1]), ADDITION.max_prompt_length(1))
    cell = figure2.measure_cell(command, Model(SCRIPT_MODEL, 1, params), "identical", 1)
    right = asked[-1].a + asked[-1].b
    assert cell["solved"] == sum(problem.a + problem.b == right for problem in asked)
    assert not any(problem.a + problem.b == right for problem in others)


def test_the_papers_numbers_have_all_four_n_and_lengths():
    assert {np.shape(list(rows.values())) for rows in figure2.PAPER.values()} == {(4, 4, 2)}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--problems", "0"], "problems"),
        (["--seed", "-1"], "seed"),
        (["--extra-length", "-1"], "extra_length"),
        (["--digits", "4", "3"], "digits"),
        (["--digits", "16", "--pretrain.model.block-size", "4000"], "digits"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(options, field):
    with pytest.raises(ConfigError, match=rf"{field}: ") as error:
        cli.parse(figure2.Figure2Command, figure2.preset, options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scale", ["small", "gpt2"])
def test_larger_scales_take_the_papers_n_that_their_block_holds(scale):
    assert figure2.preset(scale).models.digits == (7, 9)
