"""Figure 5 on made answers, and end to end on a random model: page, pictures and data."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from made_answers import made, replaced
from policies import untrained

from ckl_jax import tasks
from ckl_jax.checkpoint.store import Model, save_model
from ckl_jax.errors import ConfigError
from ckl_jax.runtime import cli
from ckl_jax.tasks.columns import ADDITION
from experiments.figure5_certainty_colors import __main__ as figure5
from experiments.figure5_certainty_colors import shown as shown_lib

PROBLEM = tasks.Problem(123, 45)
RIGHT = ADDITION.answer_text(tasks.Problem(123, 45))
TOKENS = ADDITION.critical_tokens(tasks.Problem(123, 45), 2)
COMMA = TOKENS[1].index
WRONG = replaced(RIGHT, COMMA, "]").replace("1 6 8", "1 6")


def sure_except(*by_index):
    certainty = np.ones((len(by_index), len(RIGHT)))
    for row, values in enumerate(by_index):
        for index, value in values.items():
            certainty[row, index] = value
    return certainty


def test_a_scratchpad_has_each_characters_numbers_and_marks():
    found = made(PROBLEM, [RIGHT, WRONG], sure_except({}, {COMMA: 0.5}))
    right, wrong = (shown_lib.scratchpad(ADDITION, found, PROBLEM, row) for row in range(2))
    assert (right.text, wrong.text) == (RIGHT, WRONG)
    assert (right.right, wrong.right) == (True, False)
    assert right.title == "123 + 45 = 168"
    assert [i for i, c in enumerate(right.characters) if c.critical] == sorted(t.index for t in TOKENS)
    assert [i for i, c in enumerate(wrong.characters) if c.critical] == [COMMA]
    assert [i for i, c in enumerate(wrong.characters) if c.deviates] == [COMMA]
    assert not any(c.deviates for c in right.characters)
    shown = wrong.characters[COMMA]
    assert (shown.character, shown.certainty, shown.entropy, shown.probability) == ("]", 0.5, 0.5, 0.5)
    assert shown.likeliest[0] == ("]", 0.5)
    assert len(shown.likeliest) == 5
    stored = json.loads(json.dumps(shown_lib.stored(wrong)))
    assert shown_lib.stored(shown_lib.restored(stored)) == stored
    assert right.note == "Every character is as in the right answer."
    assert wrong.note == f"Leaves the right answer at character {COMMA}, a critical token: “]” instead of “,”."


def test_an_answer_that_stops_early_leaves_at_its_end():
    pad = shown_lib.scratchpad(ADDITION, made(PROBLEM, [RIGHT[:-1]]), PROBLEM, 0)
    assert pad.note == f"Leaves the right answer at character {len(RIGHT) - 1}: “%” instead of a newline."


def test_the_first_right_and_wrong_answers_are_shown_side_by_side():
    found = made(PROBLEM, [WRONG, RIGHT, RIGHT, RIGHT, WRONG])
    section = shown_lib.section("Before RL", ADDITION, found, [PROBLEM] * 5, 2)
    assert [pad.right for pad in section.scratchpads] == [True, False, True, False]
    assert section.note.startswith("3 of 5 sampled answers are right.")
    assert [pad.right for pad in shown_lib.one_of_each(section)] == [True, False]
    section = shown_lib.section("Before RL", ADDITION, found.first(3), [PROBLEM] * 3, 2)
    assert [pad.right for pad in section.scratchpads] == [True, False, True]
    only_wrong = shown_lib.section("Before RL", ADDITION, found.first(1), [PROBLEM], 2)
    assert [pad.right for pad in shown_lib.one_of_each(only_wrong)] == [False]


def test_the_summary_counts_answers_whose_least_certain_character_is_critical():
    other = RIGHT.index("C=0")
    certainty = sure_except({COMMA: 0.5}, {COMMA: 0.5, other: 0.25}, {})
    found = made(PROBLEM, [RIGHT, RIGHT, RIGHT[:5]], certainty)
    summary = figure5.summarize(found)
    assert summary["least_certain_is_critical"][0] == 0.5
    assert summary["answers_with_critical"] == 2
    assert summary["right"][0] == pytest.approx(2 / 3)
    assert summary["certainty_at_critical"][0] == pytest.approx(1 - 0.5 / len(TOKENS))
    assert summary["probability_of_right_at_critical"] == pytest.approx(1 - 0.5 / len(TOKENS))
    assert summary["critical_share_of_characters"] == pytest.approx(2 * len(TOKENS) / (2 * len(RIGHT) + 6))


@pytest.mark.parametrize(
    ("interval", "said"), [((0.8, 0.6, 0.9), "holds"), ((0.5, 0.4, 0.6), "undecided"), ((0.2, 0.1, 0.4), "fails")]
)
def test_the_verdict_follows_its_rule(interval, said):
    assert figure5.verdict({"least_certain_is_critical": interval}) == said


@pytest.fixture(scope="module")
def models(tmp_path_factory, small_model):
    path = tmp_path_factory.mktemp("figure5")
    config = dataclasses.replace(small_model, num_layers=1)
    for seed, base in ((0, 1), (1, 1), (2, 2)):
        save_model(path / f"model_{seed}", Model(config, base, untrained(config, seed)), {})
    for name, changes in {"other_heads": {"num_heads": 1}, "other_shape": {"width": 32}}.items():
        other = dataclasses.replace(config, **changes)
        save_model(path / name, Model(other, 1, untrained(other)), {})
    return path


def command(path, *extra):
    options = ["--generations", "3", "--examples", "1", "--extra-length", "5"]
    paths = ["--checkpoint", str(path / "model_0"), "--out", str(path / "out")]
    return cli.parse(figure5.Figure5Command, None, [*options, *paths, *extra])


def test_the_command_writes_page_pictures_and_data(models, capsys):
    figure5.main(command(models, "--finetuned", str(models / "model_1")))
    results = json.loads((models / "out" / "results.json").read_text())
    assert list(results["policies"]) == ["Before RL", "After RL"]
    before, after = results["policies"].values()
    assert before["checkpoint"] != after["checkpoint"]
    (shown,) = before["shown"]
    assert len(shown["text"]) == len(shown["certainty"]) == len(shown["reference_probability"])
    assert shown["probability"] == shown["reference_probability"]
    assert after["shown"][0]["probability"] != after["shown"][0]["reference_probability"]
    assert str(models) not in json.dumps(results)
    assert (models / "out" / "figure5.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (models / "out" / "figure5.svg").read_text()
    page = (models / "out" / "figure5.html").read_text()
    assert "Before RL" in page
    assert "After RL" in page
    printed = capsys.readouterr().out
    assert "| After RL |" in printed

    for name in ("figure5.html", "figure5.png"):
        (models / "out" / name).unlink()
    figure5.main(cli.parse(figure5.Figure5Command, None, ["--plot-only", "--out", str(models / "out")]))
    assert capsys.readouterr().out == printed
    assert (models / "out" / "figure5.html").read_text() == page
    assert (models / "out" / "figure5.png").exists()
    assert json.loads((models / "out" / "results.json").read_text()) == results


OTHERWISE_COMPUTED = {"attention": "plain", "layers": "scanned", "remat": True, "attention_chunk": 80}
OTHERWISE_COMPUTED |= {"dtype": "bfloat16", "precision": "default", "dropout": 0.1}


def test_a_policy_of_a_checkpoint_that_was_trained_in_other_arithmetic_and_speed_is_its_own(models, tmp_path):
    shutil.copytree(models / "model_0", tmp_path / "model_0")
    path = tmp_path / "model_0" / "model.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps(described | {"model": described["model"] | OTHERWISE_COMPUTED}))
    found = figure5.measure(command(tmp_path, "--finetuned", str(models / "model_1")))
    assert list(found["policies"]) == ["Before RL", "After RL"]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--generations", "0"], "generations"),
        (["--examples", "0"], "examples"),
        (["--certainty-temperature", "0"], "certainty_temperature"),
        (["--extra-length", "1000"], "extra_length"),
        (["--finetuned", "model_2"], "finetuned"),
        (["--finetuned", "other_heads"], "finetuned"),
        (["--finetuned", "other_shape"], "finetuned"),
        (["--finetuned", "missing"], "finetuned"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(models, options, field):
    if options[0] == "--finetuned":
        options = ["--finetuned", str(models / options[1])]
    with pytest.raises(ConfigError, match=rf"^{field}: ") as error:
        figure5.main(command(models, *options))
    assert "\n" not in str(error.value)
