"""Table 1 on made answers whose numbers are known by hand, its verdicts, and the command end to end."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from made_answers import made, replaced
from policies import untrained

from ckl_jax import tasks
from ckl_jax.analysis.critical import Measuring
from ckl_jax.checkpoint.store import Model, save_model
from ckl_jax.errors import ConfigError
from ckl_jax.runtime import cli
from ckl_jax.tasks.columns import ADDITION
from experiments.table1_certainty_gap import __main__ as table1
from experiments.table1_certainty_gap import counting, verdicts

PROBLEM = tasks.Problem(123, 45)
RIGHT = ADDITION.answer_text(tasks.Problem(123, 45))
TOKENS = ADDITION.critical_tokens(tasks.Problem(123, 45), 2)
LENGTH = len(RIGHT)


def sure_except(by_index):
    certainty = np.ones((1, LENGTH))
    for index, value in by_index.items():
        certainty[0, index] = value
    return certainty


def test_delta_j_of_an_answer_that_is_unsure_at_its_critical_tokens_alone():
    count = len(TOKENS)
    found = made(PROBLEM, [RIGHT] * 2, sure_except({token.index: 0.5 for token in TOKENS}))
    row = counting.delta_j(found)
    missing = 0.5 / (LENGTH - 1)
    assert row["critical"][0] == pytest.approx(-0.5 + (count - 1) * missing)
    assert row["noncritical_minimum"][0] == pytest.approx(count * missing)
    assert row["noncritical_minimum_of_each_answer"][0] == pytest.approx(count * missing)
    assert row["noncritical_mean"][0] == pytest.approx(count * missing)
    assert row["per_answer"]["recorded"] == [count] * 2
    kind = row["by_kind"]["step 1, operand 1, n+1_comma"]
    assert kind["answers"] == 2
    assert kind["delta_j"][0] == pytest.approx(row["critical"][0])
    assert row["by_kind"]["step 1, operand 2, n+1_comma"]["answers"] == 0


def test_the_lowest_place_is_the_one_with_the_lowest_mean_over_answers():
    often, once = RIGHT.index("=8") + 1, RIGHT.index("C=0") + 2
    certainty = np.concatenate([sure_except({often: 0.6, once: 0.1}), *[sure_except({often: 0.6})] * 3])
    row = counting.delta_j(made(PROBLEM, [RIGHT] * 4, certainty))
    place = row["lowest_places"][0]
    assert (place["line"], place["word"], place["character"]) == (2, 8, 6)
    assert (place["mostly"], place["answers"]) == ("8", 4)
    assert row["noncritical_minimum"][0] == pytest.approx(0.6 - 1 + 0.9 / (LENGTH - 1) / 4)
    of_each = row["noncritical_minimum_of_each_answer"][0]
    assert of_each == pytest.approx((0.1 - 1 + 0.4 / (LENGTH - 1)) / 4 + (0.6 - 1) * 3 / 4)


def test_places_that_few_answers_reach_do_not_count():
    certainty = np.concatenate([sure_except({LENGTH - 2: 0.01})] + [sure_except({})] * 5)
    texts = [RIGHT] + [RIGHT[:20]] * 5
    found = counting.by_place(made(PROBLEM, texts), certainty[:, :LENGTH])
    assert {place["answers"] for place, _ in found} == {6}
    assert [len(values) for _, values in found] == [6] * len(found)
    assert found[0][1].mean() == 1.0


def test_criterion_1_counts_what_became_of_wrong_and_right_critical_tokens():
    comma = TOKENS[1].index
    texts = [
        RIGHT,
        replaced(RIGHT, comma, "]").replace("1 6 8", "1 6"),
        replaced(RIGHT, comma, "]"),
        RIGHT.replace("1 6 8", "1 6 9"),
        RIGHT[:5],
    ]
    found = counting.criterion_1(made(PROBLEM, texts))

    def counts(name):
        return found[name]["ended_so"], found[name]["count"]

    assert counts("right") == (2, 5)
    assert counts("wrong_critical_ended_wrong") == (1, 2)
    assert counts("none_wrong_ended_right") == (1, 3)
    assert counts("all_met_and_right_ended_right") == (1, 2)
    assert counts("ended_wrong_had_wrong_critical") == (1, 3)
    assert found["right"]["share"][0] == 0.4


def row_of(critical, others, share, **more):
    gap, criterion = {"critical": critical, "noncritical_minimum": others}, {"share": share}
    row = {"max_pretrain_digits": 5, "delta_j": gap, "criterion_1": {"wrong_critical_ended_wrong": criterion}}
    return row | more


def test_models_of_the_same_n_are_told_apart_by_their_names():
    rows = [{"max_pretrain_digits": base, "name": name} for base, name in ((5, "tiny"), (5, "N5"), (7, "N7"))]
    assert verdicts.labels(rows) == ["5 (tiny)", "5 (N5)", "7"]
    same = [{"max_pretrain_digits": 5, "name": "seed_0", "checkpoint": print_ * 16} for print_ in ("0123", "89ab")]
    assert verdicts.labels([*same, rows[1]]) == ["5 (seed_0, 01230123)", "5 (seed_0, 89ab89ab)", "5 (N5)"]


@pytest.mark.parametrize(
    ("critical", "others", "share", "expected"),
    [
        ((-0.3, -0.4, -0.2), (0.001, 0.0, 0.002), (0.99, 0.95, 1.0), ("holds", "holds", "as in the paper")),
        ((-0.3, -0.4, -0.2), (-0.3, -0.5, -0.1), (0.95, 0.9, 0.98), ("undecided", "undecided", "as in the paper")),
        ((0.1, 0.05, 0.2), (-0.3, -0.4, -0.2), (0.5, 0.4, 0.6), ("fails", "fails", "not as in the paper")),
        ((0.1, 0.1, 0.1), (0.1, 0.1, 0.1), (1.0, 0.9, 1.0), ("undecided", "undecided", "not as in the paper")),
    ],
)
def test_verdicts_follow_their_rules(critical, others, share, expected):
    said = verdicts.verdicts(verdicts.sides(row_of(critical, others, share)))
    assert (said["gap"], said["wrong_critical_token_decides"], said["size"]) == expected


def test_a_size_is_compared_at_the_papers_n_alone_and_only_with_an_interval():
    critical, others, share = (-0.3, -0.4, -0.2), (0.0, 0.0, 0.0), (1.0, 0.9, 1.0)
    assert "size" in verdicts.sides(row_of(critical, others, share))
    assert "size" not in verdicts.sides(row_of(critical, others, share, max_pretrain_digits=4))
    assert "size" not in verdicts.sides(row_of(critical, others, share, task="subtraction"))
    nan = float("nan")
    said = verdicts.verdicts(verdicts.sides(row_of((nan, nan, nan), others, share)))
    assert "size" not in said
    assert said["gap"] == "undecided"


@pytest.mark.parametrize(("base", "expected"), [(5, "undecided"), (4, "not comparable at this size")])
def test_a_size_of_one_answer_is_undecided_where_the_paper_has_one(base, expected):
    nan = float("nan")
    row = row_of((-0.3, nan, nan), (0.0, nan, nan), (1.0, 0.9, 1.0), max_pretrain_digits=base, generations=1)
    row["criterion_1"]["wrong_critical_ended_wrong"] |= {"ended_so": 1, "count": 1}
    (size,) = [claim for claim in verdicts.claims([row]) if "how much less" in claim.claim]
    assert size.verdict == expected


def command(path, *extra):
    options = ["--generations", "3", "--criterion-generations", "5", "--extra-length", "5"]
    paths = ["--checkpoints", str(path / "model"), str(path / "model"), "--out", str(path / "out")]
    return cli.parse(table1.Table1Command, None, [*options, *paths, *extra])


@pytest.fixture(scope="module")
def model_path(tmp_path_factory, small_model):
    path = tmp_path_factory.mktemp("table1")
    config = dataclasses.replace(small_model, num_layers=1)
    save_model(path / "model", Model(config, 1, untrained(config)), {})
    return path


def test_the_command_writes_results_and_prints_the_tables(model_path, capsys):
    table1.main(command(model_path))
    results = json.loads((model_path / "out" / "results.json").read_text())
    first, second = results["models"]
    assert json.dumps(first) == json.dumps(second)
    assert len(first["problems"]) == first["generations"] == len(first["delta_j"]["per_answer"]["reward"]) == 3
    assert first["criterion_1"]["generations"] == 5
    assert results["config"]["sampling"]["extra_length"] == 5
    assert results["wall_seconds"] > 0
    printed = capsys.readouterr().out
    assert "| N | critical |" in printed
    assert "Criterion 1" in printed
    table1.main(cli.parse(table1.Table1Command, None, ["--plot-only", "--out", str(model_path / "out")]))
    assert capsys.readouterr().out == printed
    assert json.loads((model_path / "out" / "results.json").read_text()) == results


def test_a_row_is_of_its_seeds_problems_and_of_as_many_answers_as_each_part_is_to_have(small_model, monkeypatch):
    """The answers stand for how many of them are taken."""
    monkeypatch.setattr(table1.critical, "sample", lambda *_: SimpleNamespace(first=lambda count: count))
    for part in ("delta_j", "criterion_1"):
        monkeypatch.setattr(table1, part, lambda count: count)

    def row(seed, generations, of_criterion):
        how = {"generations": generations, "criterion_generations": of_criterion, "sampling": Measuring(seed=seed)}
        return table1._row(table1.Table1Command(**how), Model(small_model, 1, {"w": np.zeros(1)}), "")

    first, third = row(0, 5, 3), row(3, 5, 3)
    assert (first["delta_j"], first["criterion_1"]) == (5, 3)
    assert len(first["problems"]) == len(third["problems"]) == 5
    assert first["problems"] != third["problems"]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--generations", "0"], "generations"),
        (["--criterion-generations", "0"], "criterion_generations"),
        (["--temperature", "0"], "temperature"),
        (["--certainty", "shannon"], "certainty"),
        (["--extra-length", "1000"], "extra_length"),
        (["--checkpoints", "missing"], "^checkpoints: "),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(model_path, options, field):
    with pytest.raises(ConfigError, match=field) as error:
        table1.main(command(model_path, *options))
    assert "\n" not in str(error.value)


def test_an_out_that_is_a_file_is_refused(model_path):
    (model_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"out: .*file', allowed is a directory"):
        command(model_path, "--out", str(model_path / "file"))
