"""Discovery on answers and drops written by hand, on a policy whose critical characters are known, and as a command."""

import json

import numpy as np
import pytest
from made_answers import COMMA, PROBLEM, RIGHT, SUM, made, sure_except
from policies import SCRIPT_MODEL, scripted_policy

from ckl_jax import tasks
from ckl_jax.analysis import critical, discovery, statistics
from ckl_jax.analysis.discovery import Rule
from ckl_jax.checkpoint.store import Model, save_model
from ckl_jax.errors import ConfigError
from ckl_jax.runtime import cli
from ckl_jax.tasks import alphabet
from ckl_jax.tasks.columns import ADDITION, ColumnTask
from experiments import critical_token_discovery as experiment


def test_candidates_are_the_least_certain_characters_below_the_gap():
    certainty = np.concatenate([sure_except({COMMA: 0.5, SUM: 0.7, 40: 0.9}), sure_except({COMMA: 0.95, SUM: 0.8})])
    found = made(PROBLEM, [RIGHT] * 2, certainty)
    probes = discovery.choose(found, Rule(candidates=2, least_gap=0.1, controls=3), seed=0)
    tried = [(probe["answer"], probe["index"], probe["known"]) for probe in probes if probe["candidate"]]
    assert tried == [(0, COMMA, True), (0, SUM, False), (1, SUM, False)]
    assert probes[0]["gap"] == pytest.approx(-0.5 + 0.4 / (len(RIGHT) - 1))
    assert (probes[1]["place"], probes[1]["part"], probes[1]["own"]) == ((2, 8, 6), "step 1 sum", "8")
    controls = [probe for probe in probes if not probe["candidate"]]
    assert [probe["answer"] for probe in controls] == [0] * 3 + [1] * 3
    assert not {(probe["answer"], probe["index"]) for probe in controls} & {(row, index) for row, index, _ in tried}


def test_the_runner_up_is_the_likeliest_character_that_was_not_written():
    found = made(PROBLEM, [RIGHT] * 2, np.concatenate([sure_except({COMMA: 0.4}), sure_except({COMMA: 0.1})]))
    for row, probability in ((0, 0.3), (1, 0.8)):
        found.probabilities_BxTxV[row, COMMA, alphabet.VOCABULARY.index("]")] = probability
    probes = discovery.choose(found, Rule(candidates=1, controls=0), seed=0)
    assert [(probe["own"], probe["runner_up"]) for probe in probes] == [(",", "]")] * 2
    assert [probe["runner_up_probability"] for probe in probes] == pytest.approx([0.3, 0.8])
    assert [probe["own_probability"] for probe in probes] == pytest.approx([0.4, 0.1])


@pytest.mark.parametrize(
    ("after", "named"),
    [
        ("", "frame"),
        ("\n<scr", "frame"),
        ("\n<scratch>\n[1", "step 1 operand 1 list"),
        ("0 , 3+5+", "step 1 sum"),
        ("3+5+0=8 , A->", "step 1 digit"),
        ("3+5+0=8 , A->8 , C->", "step 1 carry"),
        (" , A=[8", "step 2 result list"),
        ("[1] + [", "step 3 operand 2 list"),
        ("[] + [] , A=[1,", "END line list"),
        ("[] + [] , A=[1,6,8] C=0 , E", "END line rest"),
        ("</scr", "frame"),
        ("</scratch>\n1 ", "result digit 2"),
    ],
)
def test_places_are_named_in_the_scratchpads_words(after, named):
    index = RIGHT.index(after) + len(after)
    assert discovery.part(RIGHT, critical.places(RIGHT)[index]) == named


def probes_of(place, drops, known, **other):
    """Open candidates; the runner-up has probability 0.3 and is the better one where the drop is below 0."""
    common = {"place": place, "part": f"line {place[0]}", "gap": -0.1, "candidate": True, "known": known, "open": True}
    common |= {"own_probability": 0.6, "runner_up_probability": 0.3, "success_own": 0.5}
    return [
        {**common, "better": "own" if d >= 0 else "runner_up", "success_runner_up": 0.5 - d, **other} for d in drops
    ]


# Two critical types, one known; one known type that does not decide; one that nobody is unsure of; one met too rarely.
A, B, C, D, E = ((line, 0, 0) for line in range(2, 7))
PROBES = (
    probes_of(A, [0.5, 0.3, -0.4], known=True)
    + probes_of(A, [0.0] * 9, known=True, open=False)
    + probes_of(B, [0.5, 0.4, 0.3, 0.5], known=False)
    + probes_of(C, [0.0, 0.1, 0.0], known=True)
    + probes_of(D, [0.5, 0.5], known=False)
    + probes_of(A, [0.5, 0.25], known=False, candidate=False)
)
KNOWN = [(A, "line 2")] * 5 + [(C, "line 4")] * 4 + [(E, "line 6")]


def test_precision_and_recall_of_hand_made_probes():
    found = discovery.summarize(PROBES, KNOWN, 10, Rule(least_answers=3))
    types = {kind["place"]: kind for kind in found["types"]}
    said = {place: kind["verdict"] for place, kind in types.items()}
    assert said == {A: "critical", B: "critical", C: "not critical", D: "too few", E: "too few"}
    assert [kind["place"] for kind in found["types"]][:2] == [B, A]
    assert found["precision"] == statistics.share_interval(1, 2)  # Of types: candidates of one are all known or none.
    assert found["precision_of_candidates"][0] == pytest.approx(3 / 7)
    assert found["recall"][0] == pytest.approx(3 / 10)
    assert found["known_that_are_open_candidates"][0] == pytest.approx(6 / 10)
    assert found["open_candidates"] == 12
    assert (found["types_critical"], found["types_critical_and_known"], found["types_known"]) == (2, 1, 3)
    assert found["drop_of_controls"][0] == pytest.approx(0.375)
    # 0.5, 0.3, 0.4: mean 0.4, standard deviation 0.1, t(0.975, 2) = 4.302653.
    half = 4.302653 * 0.1 / 3**0.5
    assert types[A]["drop"] == pytest.approx((0.4, 0.4 - half, 0.4 + half), abs=1e-6)
    assert types[A]["own_is_better"] == 2
    assert types[A]["cost"] == pytest.approx((0.3 * 0.5 + 0.3 * 0.3 + 0.6 * 0.4) / 10)
    assert types[B]["cost"] == pytest.approx(0.3 * 1.7 / 10)
    assert (types[E]["candidates"], types[E]["known_tokens"], types[E]["name"]) == (0, 1, "line 6, character 1")
    assert [discovery.is_known(types[place]) for place in (A, B, C, D, E)] == [True, False, True, False, True]


@pytest.mark.parametrize(
    ("count", "drop", "said"),
    [
        (4, (1.0, 1.0, 1.0), "too few"),
        (5, (1.0, 1.0, 1.0), "critical"),
        (5, (0.2, 0.01, 0.4), "critical"),
        (5, (0.5, -0.01, 1.0), "undecided"),
        (5, (0.5, 0.0, 1.0), "undecided"),
        (5, (0.19, 0.1, 0.28), "undecided"),
        (5, (0.1, 0.05, 0.19), "not critical"),
        (5, (0.1, 0.05, 0.2), "undecided"),
        (5, (-0.5, -0.6, -0.4), "not critical"),
    ],
)
def test_types_are_judged_by_their_rule(count, drop, said):
    assert discovery.type_verdict(count, drop, least_answers=5, least_drop=0.2) == said


@pytest.mark.parametrize(
    ("share", "said"),
    [
        ((0.8, 0.6, 0.9), "holds"),
        ((0.7, 0.5, 0.9), "undecided"),
        ((0.5, 0.4, 0.6), "undecided"),
        ((0.3, 0.1, 0.5), "undecided"),
        ((0.2, 0.1, 0.4), "fails"),
        ((0, 0, 1), "undecided"),
    ],
)
def test_precision_and_recall_are_judged_by_their_rule(share, said):
    assert discovery.verdict(share) == said


SAID = ADDITION.answer_text(tasks.Problem(21, 43))
RESULT, HARMLESS = len(SAID) - 2, SAID.index("C=0")


def policy_that_says(text, wavers_at=()):
    """Says the text after the prompt of 21+43 whatever the context, but often a 9 at some places."""
    first = len(ADDITION.prompt_text(tasks.Problem(21, 43)))
    params = scripted_policy(text, first)["params"]
    wpe = params["wpe"]["embedding"]
    for index in wavers_at:
        wpe = wpe.at[first - 1 + index, alphabet.VOCABULARY.index("9")].set(48.0)  # Beside the 50 of the text's own.
    return Model(SCRIPT_MODEL, 1, {"params": {**params, "wpe": {"embedding": wpe}}})


def command(path, *extra):
    options = ["--answers", "10", "--first-completions", "2", "--completions", "2", "--extra-length", "3"]
    paths = ["--checkpoint", str(path / "model"), "--out", str(path / "out")]
    return cli.parse(experiment.DiscoveryCommand, None, [*options, *paths, *extra])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A policy that wavers at the result and at another place; only the first is fatal, since it never reads back."""
    path = tmp_path_factory.mktemp("discovery")
    save_model(path / "model", policy_that_says(SAID, (RESULT, HARMLESS)), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ColumnTask, "rl_problems", lambda task, rng, count, *digits: [tasks.Problem(21, 43)] * count)
        experiment.main(command(path))
    return path


def test_a_policy_that_wavers_where_it_matters_and_where_it_does_not(finished):
    found = json.loads((finished / "out" / "results.json").read_text())
    assert 0.4 <= found["success"][0] <= 0.9
    places = critical.places(SAID)
    types = {tuple(kind["place"]): kind for kind in found["types"] if kind["candidates"]}
    assert set(types) == {places[RESULT], places[HARMLESS]}
    result, harmless = types[places[RESULT]], types[places[HARMLESS]]
    assert (result["verdict"], result["drop"], result["candidates"]) == ("critical", [1.0, 1.0, 1.0], 10)
    assert (harmless["verdict"], harmless["drop"]) == ("not critical", [0.0, 0.0, 0.0])
    assert result["own_is_better"] == round(10 * found["success"][0])
    probes = [probe for probe in found["probes"] if probe["candidate"] and probe["index"] == RESULT]
    assert {(probe["own"], probe["runner_up"], probe["better"]) for probe in probes} == {
        ("4", "9", "own"),
        ("9", "4", "runner_up"),
    }
    assert (found["precision"][0], found["recall"][0], found["types_critical_and_known"]) == (0.0, 0.0, 0)
    assert found["verdicts"]["recall"] == "fails"
    assert found["types_known"] == len(ADDITION.critical_tokens(tasks.Problem(21, 43), 1))


def test_what_is_judged_again_has_noise_of_its_own(tmp_path, monkeypatch):
    """The first completions choose the better branch, so the later ones must not repeat them."""
    seeds = []

    def judged(model, problems, digits, *, seed, **how):
        seeds.append(seed)
        return np.arange(len(problems)) % 2.0

    save_model(tmp_path / "model", policy_that_says(SAID, (RESULT,)), {})
    monkeypatch.setattr(ColumnTask, "rl_problems", lambda task, rng, count, *digits: [tasks.Problem(21, 43)] * count)
    monkeypatch.setattr(experiment, "judge", judged)
    experiment.main(command(tmp_path))
    assert len(seeds) == 8
    own, runner_up, own_again, runner_up_again = (seeds[first : first + 2] for first in range(0, 8, 2))
    assert (own, own_again) == (runner_up, runner_up_again)
    assert len({0, *own, *own_again}) == 5


def test_results_say_how_they_were_made_and_are_drawn_again(finished, monkeypatch, capsys):
    results = json.loads((finished / "out" / "results.json").read_text())
    assert results["config"]["digits"] == 2
    assert results["config"]["rule"]["completions"] == 2
    assert str(finished) not in json.dumps(results)
    assert sum(probe["open"] and probe["candidate"] for probe in results["probes"]) == results["open_candidates"]
    assert (finished / "out" / "discovery.png").read_bytes().startswith(b"\x89PNG")
    (finished / "out" / "discovery.svg").unlink()
    monkeypatch.setattr(experiment, "measure", None)
    experiment.main(command(finished, "--plot-only"))
    assert "<svg" in (finished / "out" / "discovery.svg").read_text()
    assert "| precision | 0.0 [" in capsys.readouterr().out


def test_a_model_that_solves_nothing_has_nothing_open_and_one_that_is_sure_nothing_to_try(finished, monkeypatch):
    monkeypatch.setattr(ColumnTask, "rl_problems", lambda task, rng, count, *digits: [tasks.Problem(11, 11)] * count)
    save_model(finished / "wrong" / "model", policy_that_says(SAID, (RESULT, HARMLESS)), {})
    options = command(finished, "--checkpoint", str(finished / "wrong" / "model"), "--out", str(finished / "wrong"))
    experiment.main(options)
    results = json.loads((finished / "wrong" / "results.json").read_text())
    assert not any(probe["open"] for probe in results["probes"])
    assert (results["open_candidates"], results["types_critical"]) == (0, 0)
    with pytest.raises(ConfigError, match=r"^least_gap: got 0.99, allowed is low enough for a candidate"):
        experiment.main(command(finished, "--least-gap", "0.99", "--controls", "0"))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--answers", "0"], "answers"),
        (["--digits", "0"], "digits"),
        (["--digits", "19"], "digits"),
        (["--candidates", "0"], "candidates"),
        (["--completions", "0"], "completions"),
        (["--first-completions", "0"], "first_completions"),
        (["--controls", "-1"], "controls"),
        (["--least-gap", "1"], "least_gap"),
        (["--least-drop", "0"], "least_drop"),
        (["--least-answers", "1"], "least_answers"),
        (["--temperature", "0"], "temperature"),
        (["--digits", "9"], "digits: got 9, allowed is what fits the block"),
        (["--checkpoint", "missing"], "checkpoint"),
        (["--plot-only", "--out", "missing"], "plot_only"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(finished, options, field):
    with pytest.raises(ConfigError, match=field) as error:
        experiment.main(command(finished, *options))
    assert "\n" not in str(error.value)
