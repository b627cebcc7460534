"""The oracles end to end on a model made by hand, and their numbers and answers from records made by hand."""

import dataclasses
import json

import made_runs
import numpy as np
import pytest
from policies import SCRIPT_MODEL, scripted_policy

from ckl_jax import finetune
from ckl_jax.checkpoint.store import Model, save_model
from ckl_jax.config import FinetuneConfig
from ckl_jax.errors import ConfigError
from ckl_jax.runtime import cli
from ckl_jax.tasks import alphabet
from ckl_jax.tasks.columns import ADDITION
from ckl_jax.tasks.task import Problem
from experiments import spared_tokens
from experiments.common import arms as arms_lib

OPTIONS = (
    "--rounds 2 --test-every 1 --episodes 64 --minibatch-episodes 32 --diagnostic-episodes 2 --test-problems 4 "
    "--final-problems 4 --extra-length 5 --rollout plain --beta 2 --kl-coefficient 0.5 --learning-rate 0.01 --seeds 1"
)
ARMS = ["standard", "prioritized", "critical_free", "critical_held", "shuffled", "inverted"]
PAIRS = [
    *(("prioritized", "standard"), ("critical_free", "standard"), ("critical_held", "standard")),
    *(("prioritized", "critical_held"), ("prioritized", "shuffled"), ("prioritized", "inverted")),
]
QUESTIONS = ("Is it enough to spare the critical tokens?", "Is it needed?")


def command(tmp_path, *extra: str) -> spared_tokens.SparedTokensCommand:
    paths = ["--checkpoint", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    return cli.parse(spared_tokens.SparedTokensCommand, spared_tokens.preset, [*OPTIONS.split(), *paths, *extra])


def hesitant(problem):
    """A model that says one problem's answer, and at the first critical comma as often "]"."""
    first = len(ADDITION.prompt_text(problem))
    params = scripted_policy(ADDITION.answer_text(problem) + alphabet.PAD, first)["params"]
    before = first - 1 + min(token.index for token in ADDITION.critical_tokens(problem, 1))
    wpe = params["wpe"]["embedding"].at[before, alphabet.encode(",]")].set(50.0)
    return {"params": params | {"wpe": {"embedding": wpe}}}


@pytest.fixture(scope="module", params=["made", pytest.param("trained", marks=pytest.mark.slow)])
def finished(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("spared_tokens")
    save_model(path / "model", Model(SCRIPT_MODEL, 1, hesitant(Problem(45, 67))), {})
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "made":
            patch.setattr(finetune, "finetune", made_runs.finetune)
        spared_tokens.main(command(path))
    return path / "out"


trained = pytest.mark.parametrize("finished", [pytest.param("trained", marks=pytest.mark.slow)], indirect=True)


@trained
def test_every_arm_weighs_the_first_rounds_tokens_as_its_name_says(finished):
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    first, second = ({r["arm"]: r for r in records if r["step"] == step and "success" in r} for step in (1, 2))
    weight = {arm: first[arm]["kl_weight"] for arm in ARMS}
    assert weight["standard"] == 1
    assert weight["prioritized"] < weight["critical_held"] < weight["critical_free"] < 1
    for arm in ("shuffled", "inverted"):
        assert weight[arm] == pytest.approx(weight["prioritized"], rel=1e-6)
    assert len({f"{second[arm]['loss/kl']:.3g}" for arm in ARMS}) == len(ARMS)


def test_results_have_every_arm_and_pair(finished):
    results = json.loads((finished / "results.json").read_text())
    assert list(results["arms"]) == ARMS
    assert [(pair["arm"], pair["control"]) for pair in results["pairs"]] == PAIRS
    assert [answer.partition(":")[0] for answer in results["answers"]] == [f"{asked} undecided" for asked in QUESTIONS]
    assert (finished / "spared_tokens.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (finished / "spared_tokens.svg").read_text()


def test_plot_only_draws_again_and_trains_nothing(finished, capsys):
    metrics = (finished / "metrics.jsonl").read_bytes()
    (finished / "spared_tokens.png").unlink()
    spared_tokens.main(command(finished.parent, "--plot-only"))
    assert (finished / "spared_tokens.png").exists()
    assert (finished / "metrics.jsonl").read_bytes() == metrics
    printed = capsys.readouterr().out
    assert all(f"| {arm} - {control} |" in printed for arm, control in PAIRS)
    assert all(f"\n{asked} undecided: " in printed for asked in QUESTIONS)


AFTER = {
    "standard": (0.30, 0.35, 0.40),
    "prioritized": (0.49, 0.55, 0.61),
    "critical_free": (0.39, 0.45, 0.51),
    "critical_held": (0.34, 0.41, 0.48),
    "shuffled": (0.50, 0.53, 0.56),
    "inverted": (0.59, 0.64, 0.69),
}
HALF = 4.302653 / 3**0.5
"""Of Student's 95% interval of three seeds with a standard deviation of 1."""


def measured(arm, seed, step):
    comma = np.full((3, 2, 2), 0.1)
    comma[0, 1, 0] = 0.5 + 0.1 * step + 0.01 * seed
    return {"kl_weight": 0.9 + 0.02 * step, **made_runs.commas(comma)}


def run_of(after):
    def old(arm, seed, step):
        return {"test_old": 1 - after[arm][seed]} if step == 2 else {"test_old": 0.8}

    records = made_runs.records(after, test=old, round_=measured)
    config = {"config": dataclasses.asdict(FinetuneConfig()), "seeds": len(after["standard"])}
    return arms_lib.Run(config, records, {}, 2)


@pytest.fixture(scope="module")
def summary():
    return spared_tokens.summarize(run_of(AFTER))


def test_last_values_with_students_interval_over_seeds(summary):
    # 0.49, 0.55, 0.61: mean 0.55, standard deviation 0.06.
    prioritized = summary["arms"]["prioritized"]
    assert prioritized["target_after"] == pytest.approx((0.55, 0.55 - 0.06 * HALF, 0.55 + 0.06 * HALF), abs=1e-6)
    assert prioritized["old_after"][0] == pytest.approx(0.45)
    assert prioritized["target_before"][0] == pytest.approx(0.2)
    assert prioritized["kl_after"][0] == pytest.approx(0.02)
    assert prioritized["weight"][0] == pytest.approx(0.93)
    assert prioritized["comma_after"][0] == pytest.approx(0.71)


# The p-value of a mean m of three differences with standard deviation s is 1 - t / sqrt(2 + t^2), t = sqrt(3) m / s.
# In their order 0.000832, 0.001696, 0.003317, 0.004090, 0.035099 and 0.367544 are multiplied by 6, 5, 4, 3, 2 and 1;
# the fourth would be 0.012270, below the third.
@pytest.mark.parametrize(
    ("names", "mean", "deviation", "p", "verdict"),
    [
        (("prioritized", "standard"), 0.20, 0.01, 0.004994, "better"),
        (("critical_free", "standard"), 0.10, 0.01, 0.013267, "better"),
        (("critical_held", "standard"), 0.06, 0.02, 0.070197, "undecided"),
        (("prioritized", "critical_held"), 0.14, 0.01, 0.008482, "better"),
        (("prioritized", "shuffled"), 0.02, 0.03, 0.367544, "undecided"),
        (("prioritized", "inverted"), -0.09, 0.01, 0.013267, "worse"),
    ],
)
def test_differences_are_paired_by_seed_and_judged_by_the_corrected_p(summary, names, mean, deviation, p, verdict):
    (pair,) = [pair for pair in summary["pairs"] if (pair["arm"], pair["control"]) == names]
    half = deviation * HALF
    assert pair["target"] == pytest.approx((mean, mean - half, mean + half), abs=1e-6)
    assert pair["old"][0] == pytest.approx(-mean)
    assert pair["p_holm"] == pytest.approx(p, abs=2e-6)
    assert pair["verdict"] == verdict


def test_the_table_has_the_corrected_p_and_its_verdict(summary):
    shown = spared_tokens.text({**summary, "wall_seconds": 1.0}, run_of(AFTER))
    assert "| critical_held - standard | +6.0 [+1.0, +11.0] | 0.0702 | undecided | -6.0 [-11.0, -1.0] |" in shown
    assert "| prioritized - inverted | -9.0 [-11.5, -6.5] | 0.0133 | worse | +9.0 [+6.5, +11.5] |" in shown
    assert "| prioritized | 0.930 | 55.0 [40.1, 69.9] | 45.0 [30.1, 59.9] | 0.0200 | 71.0 [68.5, 73.5] |" in shown
    assert "| before |  | 20.0 |  | 0 |  |" in shown


@pytest.mark.parametrize(
    ("changed", "enough", "needed"),
    [
        (
            {},
            "yes: critical_free minus standard is +10.0 [+7.5, +12.5] points.",
            "yes: prioritized minus critical_held is +14.0 [+11.5, +16.5] points.",
        ),
        (
            {"critical_free": (0.21, 0.25, 0.29)},
            "no: critical_free minus standard is -10.0 [-12.5, -7.5] points.",
            "yes: prioritized minus critical_held is +14.0 [+11.5, +16.5] points.",
        ),
        (
            {"critical_held": (0.58, 0.65, 0.72)},
            "yes: critical_free minus standard is +10.0 [+7.5, +12.5] points.",
            "no: prioritized minus critical_held is -10.0 [-12.5, -7.5] points.",
        ),
        # Above 0 by their intervals, and not after the correction.
        (
            {"critical_free": (0.34, 0.41, 0.48), "critical_held": (0.45, 0.49, 0.53)},
            "undecided: critical_free minus standard is +6.0 [+1.0, +11.0] points.",
            "undecided: prioritized minus critical_held is +6.0 [+1.0, +11.0] points.",
        ),
    ],
    ids=["both", "not enough", "not needed", "undecided"],
)
def test_the_answers_are_the_verdicts_of_their_pairs(changed, enough, needed):
    answers = spared_tokens.summarize(run_of(AFTER | changed))["answers"]
    assert answers == [f"{asked} {said}" for asked, said in zip(QUESTIONS, (enough, needed), strict=True)]


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("beta", ["--beta", "0"]),
        ("kl_coefficient", ["--kl-coefficient", "0"]),
        ("kl_weights", ["--kl-weights", "matched"]),
    ],
)
def test_what_cannot_work_is_refused_by_name(tmp_path, field, options):
    with pytest.raises(ConfigError, match=rf"\b{field}: "):
        command(tmp_path, *options)


def test_a_figure_of_four_seeds_has_intervals_and_a_colour_for_every_arm(tmp_path):
    run = run_of({arm: (*values, values[0]) for arm, values in AFTER.items()})
    figure = spared_tokens.draw(spared_tokens.summarize(run), run)
    figure.savefig(tmp_path / "spared_tokens.png")
    curves, after, pairs = figure.axes
    lines = {line.get_label(): line.get_color() for line in curves.lines}
    assert list(lines) == ARMS
    assert len(set(lines.values())) == len(ARMS)
    for panel, labels in ((after, ARMS), (pairs, [f"{arm} - {control}" for arm, control in PAIRS])):
        assert [label.get_text() for label in panel.get_yticklabels()] == labels
        assert [bar.has_xerr for bar in panel.containers] == [True] * len(labels)
    assert [bar.lines[0].get_color() for bar in after.containers] == list(lines.values())
