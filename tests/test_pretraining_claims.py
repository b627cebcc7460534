"""Verdicts of figures 2 and 3 in the report's words."""

from ckl_jax.analysis.statistics import share_interval
from experiments import figure2_pretraining as figure2
from experiments import figure3_pretraining_levels as figure3
from experiments.common.pretraining_claims import from_verdicts, paper_cells


def cells(by_base, problems=1000):
    return [
        {
            "max_pretrain_digits": base,
            "operands": operands,
            "digits": base + k,
            "fits": solved is not None,
            **({} if solved is None else _measured(solved, problems)),
        }
        for operands in ("identical", "varying")
        for base, row in by_base.items()
        for k, solved in enumerate(row)
    ]


def _measured(solved, problems):
    return {"accuracy": (solved / problems, 0, 1), "score_interval": share_interval(solved, problems)}


def test_every_rule_of_figure_2_has_its_words_and_keeps_its_verdict():
    found = cells({7: (990, 480, 5, 0), 9: (960, 700, 200, None)})
    for scale, paper_numbers in (("tiny", 0), ("gpt2", 16)):
        rows = figure2.verdicts(found, scale)
        claims = from_verdicts(rows)
        assert len(claims) == len(rows)
        assert sum("The paper's number" in claim.claim for claim in claims) == paper_numbers
    first = claims[0]
    assert (first.claim, first.verdict) == ("High at N (N = 7, identical lengths)", "reproduced")
    assert first.here.startswith("99.0 [98.")
    assert first.here.endswith("against 90.0 [90.0, 90.0]%")
    not_fitting = [claim for claim in claims if "does not fit" in claim.here]
    assert {claim.verdict for claim in not_fitting} == {"not comparable at this size"}
    assert any("Larger N better at N+3 (N = 9 against 7, varying" in claim.claim for claim in not_fitting)


def test_claims_on_another_task_name_it_and_have_no_cells_of_the_paper_beside_them():
    found = cells({5: (829, 1, 0, None)})
    for claim in from_verdicts(figure2.verdicts(found, "gpt2", "subtraction"), "subtraction"):
        assert claim.claim.endswith(" lengths, subtraction)")
    paper = {"identical": {"7": ((98.9, 0.7), (48.8, 3.0), (0.0, 0.0), (0.0, 0.0))}}
    assert paper_cells(found, paper, "tiny", "subtraction") == []
    assert "paper" not in figure2.table(_results(found, "subtraction"))
    assert "paper" in figure2.table(_results(found, "addition"))


def _results(found, task):
    return {"cells": found, "verdicts": [], "config": {"models": {"pretrain": {"task": task}}}}


def test_figure_3_compares_the_largest_n_with_the_smallest():
    intervals = {3: (0.1, 0.05, 0.15), 5: (0.5, 0.4, 0.6)}
    runs = [
        {"extra_digits": 1, "max_pretrain_digits": base, "before": interval, "after": interval}
        for base, interval in intervals.items()
    ]
    starts, ends = from_verdicts(figure3.verdicts(runs))
    assert starts.claim == "Larger N starts higher on N+1 (N = 5 against 3)"
    assert (starts.verdict, ends.verdict) == ("reproduced", "reproduced")
    assert starts.here == "50.0 [40.0, 60.0]% against 10.0 [5.0, 15.0]%"


def test_the_papers_cells_stand_beside_ours_at_another_size_alone():
    paper = {"identical": {"7": ((98.9, 0.7), (48.8, 3.0), (0.0, 0.0), (0.0, 0.0))}}
    found = cells({5: (829, 1, 0, None)})
    assert paper_cells(found, paper, "gpt2") == []
    (claim,) = paper_cells(found, paper, "tiny")
    assert claim.here == "N = 5: 82.9, 0.1, 0.0, does not fit"
    assert claim.paper == "N = 7: 98.9, 48.8, 0, 0"
    assert claim.verdict == "not comparable at this size"
