"""What J^beta frees: parts and shares of answers written by hand, and the command on a small model."""

import json

import numpy as np
import pytest
from made_answers import COMMA, PROBLEM, RIGHT, SUM, made, replaced, sure_except
from policies import untrained

from ckl_jax.checkpoint.store import Model, save_model
from ckl_jax.errors import ConfigError
from ckl_jax.runtime import cli
from experiments import freed_pressure as experiment


def test_every_character_has_a_part_of_whichever_step_and_critical_ones_are_apart():
    parts = experiment.parts_of(made(PROBLEM, [RIGHT]), 2)[0]
    assert parts[COMMA] == experiment.CRITICAL
    assert parts[RIGHT.index("2,3]")] == experiment.OVERLONG
    assert parts[RIGHT.index("1,2,3]")] == "operand 1 list"
    assert parts[SUM] == "sum"
    assert parts[RIGHT.index("A->")] == "digit"
    assert RIGHT.endswith("1 6 8\n")
    assert parts[len(RIGHT) - 6 : len(RIGHT) - 1].tolist() == ["result digit"] * 2 + [experiment.OVERLONG] * 3
    assert {*parts[: len(RIGHT)]} >= {"operand 1 list", "operand 2 list", "result list", "carry in", "carry", "frame"}
    assert {*parts[len(RIGHT) :]} == {""}
    assert not [name for name in parts if "step" in name]


def test_shares_are_sums_over_all_answers():
    """Weights J^2: 0.25 at a critical comma frees 0.75, 0.5 at a sum 0.5 and 0.8 at a sum 0.2."""
    sure = [{COMMA: 0.5}, {SUM: 0.5**0.5}, {SUM: 0.8**0.5}]
    answers = made(PROBLEM, [RIGHT] * 3, np.concatenate([sure_except(row) for row in sure]))
    parts = experiment.parts_of(answers, 2)
    found = experiment.by_part(answers, parts, 2)
    assert found[experiment.CRITICAL]["freed"][0] == pytest.approx(0.75 / 1.45)
    assert found["sum"]["freed"][0] == pytest.approx(0.7 / 1.45)
    assert found["carry"]["freed"] == (0, 0, 0)
    low, high = found["sum"]["freed"][1:]
    assert low == pytest.approx(0)
    assert high == pytest.approx(1)
    sums = np.sum(parts == "sum")
    assert found["sum"]["weight"] == pytest.approx(1 - 0.7 / sums)
    assert found["sum"]["tokens"] == pytest.approx(sums / (3 * len(RIGHT)))
    assert sum(part["tokens"] for part in found.values()) == pytest.approx(1)
    assert sum(part["freed"][0] for part in found.values()) == pytest.approx(1)


def test_an_answer_goes_wrong_where_it_first_leaves_the_right_text():
    """Of answers with a wrong result; the first two have the right one, the second in spite of a wrong sum."""
    wrong = replaced(RIGHT, len(RIGHT) - 3, "0")
    texts = [
        RIGHT,
        replaced(RIGHT, SUM, "0"),
        replaced(wrong, COMMA, "]"),
        replaced(wrong, SUM, "0"),
        replaced(replaced(wrong, SUM, "0"), SUM + 2, "0"),
        RIGHT[: SUM + 1],
    ]
    answers = made(PROBLEM, texts)
    assert answers.reward_B.tolist() == [1, 1, 0, 0, 0, 0]
    found = experiment.first_wrong(answers, experiment.parts_of(answers, 2), [RIGHT] * 6)
    assert {name: share[0] for name, share in found.items()} == {experiment.CRITICAL: 0.25, "sum": 0.75}


def test_the_curve_is_the_mean_weight_of_all_and_of_critical_tokens():
    answers = made(PROBLEM, [RIGHT], sure_except({COMMA: 0.5, SUM: 0.1}))
    found = experiment.curve(answers, (1, 2))
    critical = answers.critical_BxT.sum()
    assert found["critical"] == pytest.approx([1 - 0.5 / critical, 1 - 0.75 / critical])
    assert found["all"] == pytest.approx([1 - (0.5 + 0.9) / len(RIGHT), 1 - (0.75 + 0.99) / len(RIGHT)])


@pytest.fixture
def command(tmp_path, small_model):
    save_model(tmp_path / "model", Model(small_model, 1, untrained(small_model)), {})
    paths = ["--checkpoint", str(tmp_path / "model"), "--out", str(tmp_path / "out")]

    def made(*extra):
        return cli.parse(experiment.FreedPressureCommand, None, [*paths, "--answers", "4", *extra])

    return made


def test_the_command_writes_shares_that_add_up_and_draws_them_again(command, tmp_path, capsys):
    experiment.main(command("--beta", "2", "--betas", "1", "10"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["digits"] == 2
    assert sum(share[0] for share in results["first_wrong"].values()) == pytest.approx(1)
    assert sum(part["freed"][0] for part in results["parts"].values()) == pytest.approx(1)
    assert 0 < results["curve"]["all"][1] < results["curve"]["all"][0] < 1
    assert "mean J^2" in capsys.readouterr().out
    (tmp_path / "out" / "freed_pressure.png").unlink()
    experiment.main(command("--plot-only"))
    assert (tmp_path / "out" / "freed_pressure.png").read_bytes().startswith(b"\x89PNG")


class AskedError(Exception):
    """The policy has been given its problems."""


def test_the_problems_are_the_seeds(command, monkeypatch):
    asked = []

    def sample(model, problems, *_, **__):
        asked.append(problems)
        raise AskedError

    monkeypatch.setattr(experiment.critical, "sample", sample)
    for seed in ("0", "3"):
        with pytest.raises(AskedError):
            experiment.measure(command("--seed", seed))
    assert len(asked[0]) == len(asked[1]) == 4
    assert asked[0] != asked[1]


@pytest.mark.parametrize("options", [["--beta", "0"], ["--betas", "1", "0"], ["--answers", "0"]])
def test_what_cannot_work_is_refused_by_name(command, options):
    with pytest.raises(ConfigError, match=rf"^{options[0][2:]}: got"):
        command(*options)


def test_another_n_is_refused_by_the_name_of_its_option(command, tmp_path, small_model):
    save_model(tmp_path / "other", Model(small_model, 2, untrained(small_model)), {})
    with pytest.raises(ConfigError, match=r"^certainty_checkpoint: got \(2, 'addition', 41\), allowed is"):
        experiment.main(command("--certainty-checkpoint", str(tmp_path / "other")))
    assert not (tmp_path / "out").exists()
