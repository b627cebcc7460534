"""Figure 1 on a policy that says a given miscopied answer, and on a random one."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from policies import SCRIPT_MODEL, policy, scripted_policy

from ckl_jax.checkpoint.store import Model, save_model
from ckl_jax.errors import ConfigError
from ckl_jax.model import forward
from ckl_jax.runtime import cli
from ckl_jax.tasks import alphabet
from ckl_jax.tasks.columns import ADDITION
from ckl_jax.tasks.task import Problem
from experiments.figure1_scratchpad import __main__ as figure1
from experiments.figure1_scratchpad import drawing

RIGHT = ADDITION.answer_text(Problem(12, 34))
MISCOPIED = RIGHT.replace("[3,4]", "[3]", 1)


def says(text):
    return Model(SCRIPT_MODEL, 1, scripted_policy(text, len(ADDITION.prompt_text(Problem(12, 34)))))


def command(*arguments):
    return cli.parse(figure1.Figure1Command, None, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def miscopied():
    return figure1.answer(says(MISCOPIED), 12, 34)


@pytest.fixture(scope="module")
def unsure(small_model):
    model = Model(small_model, 1, policy(small_model, pad_logit=-100.0))
    return model, figure1.answer(model, 12, 34, temperature=2.0, seed=3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("figure1")
    save_model(path / "model", says(MISCOPIED), {})
    figure1.main(command("--checkpoint", path / "model", "--a", 12, "--b", 34, "--out", path / "out"))
    return path


def test_the_first_deviation_names_both_characters(miscopied):
    assert miscopied["text"] == MISCOPIED
    assert miscopied["right_text"] == RIGHT
    assert miscopied["first_deviation"] == {"index": RIGHT.index(",4]"), "written": "]", "right": ","}


def test_critical_tokens_are_those_that_the_text_came_to(miscopied):
    found = [(t["step"], t["operand"], t["name"], t["right"], t["written"]) for t in miscopied["critical"]]
    assert found == [
        (1, 1, "n+1_comma", ",", ","),
        (1, 1, "n+1_digit", "2", "2"),
        (1, 2, "n+1_comma", ",", "]"),
        (2, 1, "n+1_digit", "1", "1"),
    ]
    assert miscopied["critical_in_right_answer"] == 6
    assert [t["index"] for t in miscopied["critical"]] == [
        MISCOPIED.index(",2]"),
        MISCOPIED.index("2]"),
        RIGHT.index(",4]"),
        MISCOPIED.index("[1] + ") + 1,
    ]


def test_certainty_and_probability_belong_to_the_character_they_stand_at(miscopied):
    assert len(miscopied["certainty"]) == len(miscopied["probability"]) == len(MISCOPIED)
    np.testing.assert_allclose(miscopied["certainty"], 1, atol=1e-4)
    np.testing.assert_allclose(miscopied["probability"], 1, atol=1e-4)
    assert [t["probability"] for t in miscopied["critical"]] == pytest.approx([1, 1, 0, 1], abs=1e-4)


def test_an_unsure_model_gets_its_own_distributions_certainty(small_model, unsure):
    model, measured = unsure
    assert measured == figure1.answer(model, 12, 34, temperature=2.0, seed=3)
    prompt, text = measured["prompt"], measured["text"]
    assert len(text) == ADDITION.max_answer_length(2)
    tokens = jnp.asarray(alphabet.encode(prompt + text), jnp.int32)[None]
    logits = forward(
        small_model, model.params, tokens, jnp.arange(tokens.size)[None], jnp.ones_like(tokens)
    ).logits_BxTxV
    before_TxV = np.asarray(logits, np.float64)[0, len(prompt) - 1 : -1]
    at = (np.arange(len(text)), alphabet.encode(text))
    p_TxV = np.exp(before_TxV) / np.exp(before_TxV).sum(axis=1, keepdims=True)
    sure_T = 1 + (p_TxV * np.log(np.maximum(p_TxV, 1e-300))).sum(axis=1) / math.log(alphabet.VOCAB_SIZE)
    np.testing.assert_allclose(measured["certainty"], sure_T, atol=1e-4)
    sampled_TxV = np.exp(before_TxV / 2) / np.exp(before_TxV / 2).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(measured["probability"], sampled_TxV[at], atol=1e-4)


def test_a_right_answer_has_no_deviation_and_all_critical_tokens():
    measured = figure1.answer(says(RIGHT), 12, 34)
    assert measured["solved"]
    assert measured["first_deviation"] is None
    assert len(measured["critical"]) == measured["critical_in_right_answer"] == 6


def test_results_say_what_they_were_made_from(finished):
    results = json.loads((finished / "out" / "results.json").read_text())
    assert results["text"] == MISCOPIED
    assert results["config"] | {"checkpoint": ""} == {
        "command": "experiments.figure1_scratchpad",
        "a": 12,
        "b": 34,
        "temperature": None,
        "seed": 0,
        "checkpoint": "",
    }
    assert results["device"] == jax.devices()[0].device_kind
    assert results["wall_seconds"] > 0


def test_the_picture_is_a_png_and_an_svg(finished):
    assert (finished / "out" / "figure1.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (finished / "out" / "figure1.svg").read_text()


def test_plot_only_draws_again_without_a_model(finished, capsys):
    (finished / "out" / "figure1.png").unlink()
    figure1.main(command("--checkpoint", finished / "gone", "--out", finished / "out", "--plot-only"))
    assert (finished / "out" / "figure1.png").exists()
    assert MISCOPIED in capsys.readouterr().out


def test_a_text_without_lines_is_wrapped_and_drawn(unsure, tmp_path):
    picture = figure1.draw(unsure[1] | {"config": {"temperature": 2.0}})
    picture.savefig(tmp_path / "figure1.png")


def test_cells_wrap_long_lines_and_end_lines_after_their_newline():
    assert drawing.cells("ab\nabcd", 3) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("--a", -1), "a"),
        (("--b", 10**18), "b"),
        (("--temperature", 0), "temperature"),
        (("--seed", -1), "seed"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(arguments, field):
    with pytest.raises(ConfigError, match=rf"^{field}: "):
        command(*arguments)


def test_operands_of_known_lengths_are_refused(finished):
    with pytest.raises(ConfigError, match=r"^a: got 5, allowed is an operand .* more than the 1 digits"):
        figure1.main(command("--checkpoint", finished / "model", "--a", 5, "--b", 7, "--out", finished / "new"))
    assert not (finished / "new").exists()


def test_answers_that_do_not_fit_the_model_are_refused(finished):
    with pytest.raises(ConfigError, match=r"^block_size: "):
        figure1.main(command("--checkpoint", finished / "model", "--a", 12345, "--out", finished / "new"))
