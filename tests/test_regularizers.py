"""The regularizers' two stages on a random model of width 16, and choices and answers from records made by hand."""

import dataclasses
import json
import pathlib
import re
import shlex

import made_runs
import pytest
from policies import untrained

from ckl_jax import finetune
from ckl_jax.checkpoint.store import Model, save_model
from ckl_jax.config import FinetuneConfig
from ckl_jax.errors import ConfigError
from ckl_jax.finetune import FinetuneCommand
from ckl_jax.finetune import preset as finetune_command
from ckl_jax.runtime import cli
from experiments.common import arms as arms_lib
from experiments.regularizers import __main__ as regularizers
from experiments.regularizers import results as found
from experiments.regularizers.methods import ALWAYS, BY_NAME, METHODS, Cell

OPTIONS = (
    "--rounds 2 --test-every 1 --episodes 4 --minibatch-episodes 2 --diagnostic-episodes 2 --test-problems 4 "
    "--final-problems 4 --extra-length 5 --rollout plain --beta 2 --learning-rate 0.01 --grid 0.5 --screen-seeds 1 "
    "--screen-rounds 1 --seeds 2 --leaders 0"
)
SOME = ("standard", "prioritized", "no_kl")


def command(tmp_path, *extra: str) -> regularizers.RegularizersCommand:
    paths = ["--checkpoint", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    return cli.parse(
        regularizers.RegularizersCommand, regularizers.preset, [*OPTIONS.split(), "--methods", *SOME, *paths, *extra]
    )


@pytest.fixture(scope="module", params=["made", pytest.param("trained", marks=pytest.mark.slow)])
def place(request, tmp_path_factory, small_model):
    """A directory with a model; its fine-tunings are made up, or real."""
    path = tmp_path_factory.mktemp("regularizers")
    save_model(path / "model", Model(small_model, 1, untrained(small_model, contrast=10)), {})
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "made":
            patch.setattr(finetune, "finetune", made_runs.finetune)
        yield path


def seconds(directory):
    return {str(path): path.read_text() for path in directory.rglob("seconds.jsonl") if path.parent != directory}


@pytest.fixture(scope="module")
def finished(place):
    """Both stages, the first of them by itself before."""
    regularizers.main(command(place, "--screen-only"))
    of_screen = json.loads((place / "out" / "results.json").read_text())
    assert "confirmation" not in of_screen
    took = seconds(place / "out")
    assert len(took) == len(SOME)
    regularizers.main(command(place))
    results = json.loads((place / "out" / "results.json").read_text())
    assert results["screen"] == of_screen["screen"]
    assert took.items() <= seconds(place / "out").items()  # Nothing was trained again.
    return place / "out", results


def test_every_method_is_screened_and_the_chosen_are_confirmed_on_other_seeds(finished):
    directory, results = finished
    cells = {"no_kl"} | {f"{name}_0.5x" for name in SOME if name != "no_kl"}
    assert set(results["screen"]) == cells
    assert results["chosen"] == list(results["confirmation"]["arms"]) == list(SOME)
    for stage, expected in (("screen", {1000}), ("confirmation", {0, 1})):
        assert {path.name for path in (directory / stage).iterdir()} == cells
        records = (directory / stage / "standard_0.5x" / "metrics.jsonl").read_text().splitlines()
        assert {json.loads(line)["seed"] for line in records} == expected


@pytest.mark.slow
@pytest.mark.parametrize("place", ["trained"], indirect=True)
def test_a_cell_is_trained_with_its_strength_and_weights(finished):
    directory, _ = finished

    def last(cell):
        lines = (directory / "confirmation" / cell / "metrics.jsonl").read_text().splitlines()
        (record,) = (r for r in map(json.loads, lines) if (r["seed"], r["step"]) == (0, 2) and "success" in r)
        return record

    assert last("standard_0.5x")["kl_weight"] == pytest.approx(1)
    assert last("standard_0.5x")["loss/kl"] > 0
    assert last("no_kl")["loss/kl"] == 0
    assert last("prioritized_0.5x")["kl_weight"] < 0.9


def test_table_figure_and_answers_come_again_from_results_alone(finished, capsys):
    directory, _ = finished
    (directory / "regularizers.png").unlink()
    regularizers.main(command(directory.parent, "--plot-only"))
    printed = capsys.readouterr().out
    assert (directory / "regularizers.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (directory / "regularizers.svg").read_text()
    for name in SOME:
        assert f"| {name} |" in printed
    assert "Does prioritization beat its own controls? " in printed


def test_an_earlier_calls_methods_are_taken_over_and_the_others_trained(finished, capsys):
    directory, before = finished
    out = directory.parent / "more"
    options = ["--methods", *SOME, "k2", "--leaders", "1", "--earlier", str(directory), "--out", str(out)]
    regularizers.main(command(directory.parent, *options))
    results = json.loads((out / "results.json").read_text())
    assert [path.name for stage in ("screen", "confirmation") for path in (out / stage).iterdir()] == ["k2_0.5x"] * 2
    assert results["screen"].items() > before["screen"].items()
    assert results["confirmation"]["arms"].items() > before["confirmation"]["arms"].items()
    assert results["confirmation"]["against_controls"] == before["confirmation"]["against_controls"]
    assert list(results["confirmation"]["arms"]) == results["chosen"] == [*SOME, "k2"]
    assert results["config"]["earlier"]["cells"] == sorted(before["screen"])
    assert results["wall_seconds"] > before["wall_seconds"]
    assert "| k2 | 0.5x |" in capsys.readouterr().out


def test_all_of_an_earlier_call_is_taken_over_without_a_run(finished):
    directory, before = finished
    options = ["--earlier", str(directory), "--out", str(directory.parent / "same")]
    regularizers.main(command(directory.parent, *options))
    results = json.loads((directory.parent / "same" / "results.json").read_text())
    assert results["confirmation"] == before["confirmation"]


@pytest.mark.parametrize(
    ("name", "options"),
    [("seeds", ["--seeds", "3"]), ("grid", ["--grid", "0.5", "1"]), ("learning_rate", ["--learning-rate", "0.02"])],
)
def test_an_earlier_call_of_other_settings_is_refused(finished, name, options):
    directory, _ = finished
    out = directory.parent / "other"
    with pytest.raises(ConfigError, match=f"^{name}: got .* that of --earlier"):
        regularizers.main(command(directory.parent, *options, "--earlier", str(directory), "--out", str(out)))
    assert not out.exists()


def test_an_earlier_call_from_before_a_field_had_its_default(finished):
    directory, before = finished
    older = directory.parent / "older"
    older.mkdir()
    config = before["config"] | {"config": dict(before["config"]["config"])}
    del config["config"]["clamp_log_probs"], config["config"]["precision"]
    (older / "results.json").write_text(json.dumps(before | {"config": config}))
    options = ["--earlier", str(older), "--out", str(directory.parent / "since")]
    for option in (["--clamp-log-probs"], ["--precision", "high"]):
        field = option[0].strip("-").replace("-", "_")
        with pytest.raises(ConfigError, match=f"^{field}: got .* that of --earlier"):
            regularizers.main(command(directory.parent, *options, *option))
    regularizers.main(command(directory.parent, *options))
    assert json.loads((directory.parent / "since" / "results.json").read_text())["screen"] == before["screen"]


def test_a_screen_alone_does_not_overwrite_a_confirmation(finished):
    directory, before = finished
    with pytest.raises(ConfigError, match=r"^screen_only: got True, allowed is no: "):
        regularizers.main(command(directory.parent, "--screen-only"))
    assert json.loads((directory / "results.json").read_text()) == before


def test_a_stale_method_is_screened_by_the_test_of_the_policy_that_learned():
    cells = [Cell(BY_NAME[name], 1.0) for name in ("standard", "stale")]
    rounds = [{"success": 0.1, "kl": 0.0, "step": step} for step in (1, 2, 3, 4)]
    tests = [{"test_target": 0.4, "test_old": 1.0, "step": 4}]
    records = [{**record, "arm": cell.name, "seed": 0} for cell in cells for record in rounds + tests]
    run = arms_lib.Run({"config": {"rounds": 4, "seed": 0}, "seeds": 1}, records, {}, 2)
    screen = found.screened(run, cells)
    assert [screen[cell.name]["success"] for cell in cells] == [[pytest.approx(0.1)], [0.4]]
    results = {"config": {"grid": [1.0]}, "screen": screen, "best": found.best_shares(screen), "chosen": []}
    rows = found.screen_table(results).splitlines()[2:]
    assert {row.split(" | ")[0]: "tested after the last round" in row for row in rows} == {
        "| standard": False,
        "| stale": True,
    }


@pytest.mark.parametrize("share", ["0.5", "2"])
def test_of_an_earlier_grid_a_few_shares_may_be_asked_for(tmp_path, monkeypatch, small_model, share):
    """What was confirmed at another share than is now the best is trained at this one."""
    save_model(tmp_path / "model", Model(small_model, 1, untrained(small_model)), {})
    monkeypatch.setattr(finetune, "finetune", made_runs.finetune)
    directory = tmp_path / "wide"
    regularizers.main(command(tmp_path, "--grid", "0.5", "2", "--out", str(directory)))
    before = json.loads((directory / "results.json").read_text())
    out = tmp_path / f"only_{share}"
    options = ["--grid", share, "--earlier", str(directory), "--out", str(out)]
    regularizers.main(command(tmp_path, *options))
    results = json.loads((out / "results.json").read_text())
    kept = {name: cell for name, cell in before["screen"].items() if cell["share"] == float(share) or name == "no_kl"}
    assert results["screen"] == kept
    same = {name for name, best in before["best"].items() if best["share"] == float(share) or name == "no_kl"}
    trained = {path.name for path in (out / "confirmation").iterdir()} if (out / "confirmation").exists() else set()
    assert trained == {f"{name}_{share}x" for name in set(SOME) - same}
    assert set(results["confirmation"]["arms"]) == set(SOME)
    with pytest.raises(ConfigError, match=r"^grid: got .*, allowed is of \[0.5, 2.0\], that of --earlier"):
        regularizers.main(
            command(tmp_path, "--grid", "5", "--earlier", str(directory), "--out", str(tmp_path / "other"))
        )


def test_an_earlier_call_that_is_not_there_is_refused(finished):
    directory, _ = finished
    with pytest.raises(ConfigError, match=r"^earlier: got .*, allowed is a directory with a finished call"):
        regularizers.main(command(directory.parent, "--earlier", str(directory.parent / "no"), "--out", str(directory)))


def test_other_options_in_the_same_directory_are_refused(finished):
    directory, _ = finished
    with pytest.raises(ConfigError, match="grid"):
        regularizers.main(command(directory.parent, "--grid", "1"))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_differs_from_all_others_and_scales_its_strength(method):
    config = FinetuneConfig()

    def settings(cell):
        made, traced = regularizers.configured(config, cell)
        return dataclasses.asdict(dataclasses.replace(made, **traced))

    mine = settings(Cell(method, 1.0))
    assert all(mine != settings(Cell(other, 1.0)) for other in METHODS if other is not method)
    doubled = {name for name, value in settings(Cell(method, 2.0)).items() if value != mine[name]}
    assert doubled == ({method.strength} if method.strength else set())
    if method.strength:
        assert settings(Cell(method, 2.0))[method.strength] == pytest.approx(2 * mine[method.strength])
    assert method.name not in ALWAYS or ALWAYS.index(method.name) == METHODS.index(method)


def test_the_best_share_is_kept_and_the_best_others_lead():
    def cell(method, share, *success):
        return {"method": method, "share": share, "success": list(success)}

    screen = [
        cell("standard", 0.2, 0.1, 0.3),
        cell("standard", 1.0, 0.3, 0.3),
        cell("rloo", 0.2, 0.5, 0.5),
        cell("rloo", 1.0, 0.5, 0.5),
        cell("grpo", 1.0, 0.1, 0.1),
        cell("k2", 0.2, 0.6, 0.5),
        cell("no_kl", 1.0, 0.9, 0.9),
    ]
    best = found.best_shares({str(index): cell for index, cell in enumerate(screen)})
    assert list(best) == ["no_kl", "k2", "rloo", "standard", "grpo"]
    assert {name: values["share"] for name, values in best.items()} == {
        "no_kl": 1.0,
        "k2": 0.2,
        "rloo": 1.0,
        "standard": 1.0,
        "grpo": 1.0,
    }
    assert found.choose(best, 2) == ["standard", "no_kl", "k2", "rloo"]


def test_the_screens_accuracy_is_that_of_the_last_three_rounds():
    records = [
        {"arm": "k2_1x", "seed": seed, "step": step, "success": step / 10 + seed, "kl": step / 100}
        for step in range(1, 6)
        for seed in (0, 1)
    ] + [{"arm": "k2_1x", "seed": seed, "step": 5, "test_old": 0.9} for seed in (0, 1)]
    run = arms_lib.Run({"config": {"rounds": 5, "seed": 0, "extra_digits": 1}, "seeds": 2}, records, {}, 2)
    screen = found.screened(run, [Cell(BY_NAME["k2"], 1.0)])
    assert screen["k2_1x"]["success"] == pytest.approx([0.4, 1.4])
    assert screen["k2_1x"]["old"] == [0.9, 0.9]
    assert screen["k2_1x"]["kl"] == [0.05, 0.05]


AFTER = {
    "standard": (0.30, 0.35, 0.40, 0.35),
    "prioritized": (0.50, 0.60, 0.55, 0.55),
    "matched": (0.40, 0.50, 0.50, 0.45),
    "shuffled": (0.30, 0.39, 0.35, 0.35),
    "renormalized": (0.70, 0.74, 0.71, 0.72),
    "no_kl": (0.10, 0.10, 0.15, 0.12),
    "rloo": (0.30, 0.30, 0.45, 0.35),
}


def confirmation(after):
    cells = [Cell(BY_NAME[name], 0.2) for name in after]
    records = made_runs.records({cell.name: after[cell.method.name] for cell in cells})
    config = {"config": {"seed": 0, "episodes": 4, "extra_digits": 1}, "seeds": 4}
    return found.confirmed(arms_lib.Run(config, records, {}, 2), cells, after, {"arms": {}})


def test_the_answers_are_computed_from_the_pairs():
    results = confirmation(AFTER)
    beats, against, needed = found.answers(results)
    assert beats == ("Does prioritization beat its own controls? yes: better than standard, matched, shuffled, no_kl.")
    assert against == (
        "Against the standard KL, each at its own coefficient: better than it: prioritized, matched, renormalized; "
        "worse than it: no_kl; not told apart from it: shuffled, rloo."
    )
    assert needed.startswith("Is a KL needed at all? Without one training is worse than the standard KL (-23.2 [")
    assert results["arms"]["rloo"]["comma_after"][0] == pytest.approx(0.7)


def test_two_methods_are_compared_alone(tmp_path):
    chosen = {name: AFTER[name] for name in found.choose(["prioritized", "standard"], 0)}
    assert list(chosen) == ["standard", "prioritized"]
    results = confirmation(chosen)
    assert [pair["control"] for pair in results["against_controls"]] == ["standard"]
    beats, against = found.answers(results)
    assert beats.endswith("? of those that were run (not: matched, shuffled, no_kl) yes: better than standard.")
    assert "better than it: prioritized; worse than it: none;" in against
    screen = {name: {"method": name, "share": 0.2, "success": [0.1]} for name in chosen}
    config = {"grid": [0.2], "screen_seeds": 1, "screen_rounds": 1}
    best = found.best_shares(screen)
    results |= {"digits": 2, "config": config, "screen": screen, "best": best, "chosen": list(best)}
    found.draw({**results, "confirmation": results}).savefig(tmp_path / "regularizers.png")


def test_all_methods_at_once_can_be_confirmed_and_drawn(tmp_path):
    after = {method.name: AFTER["standard"] for method in METHODS}
    screen = {name: {"method": name, "share": 0.2, "success": [0.1]} for name in after}
    config = {"grid": [0.2], "screen_seeds": 1, "screen_rounds": 1}
    best = found.best_shares(screen)
    results = {"digits": 2, "config": config, "screen": screen, "best": best, "chosen": list(best)}
    found.draw({**results, "confirmation": confirmation(after)}).savefig(tmp_path / "regularizers.png")


def test_one_control_that_is_better_makes_it_a_no():
    results = confirmation(AFTER | {"shuffled": (0.60, 0.70, 0.65, 0.66)})
    assert (
        "beat its own controls? no: better than standard, matched, no_kl; worse than shuffled."
        in found.answers(results)[0]
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("methods", ["--methods", "k4", *ALWAYS]),
        ("methods", ["--methods", "standard", "k2"]),
        ("methods", ["--methods", *ALWAYS, "k2", "k2"]),
        ("grid", ["--grid", "0"]),
        ("grid", ["--grid", "1", "1"]),
        ("grid", ["--grid", "nan"]),
        ("leaders", ["--leaders", "1"]),
        ("screen_rounds", ["--screen-rounds", "0"]),
        ("screen_seeds", ["--screen-seeds", "0"]),
        ("seeds", ["--seeds", "1001"]),
        ("algorithm", ["--algorithm", "ppo"]),
        ("kl_coefficient", ["--kl-coefficient", "0"]),
        ("staleness", ["--methods", *ALWAYS, "stale"]),
        ("staleness", ["--methods", *ALWAYS, "stale", "--rounds", "14"]),
        ("group_size", ["--methods", *ALWAYS, "rloo", "--episodes", "4"]),
    ],
)
def test_what_cannot_work_is_refused_by_name(tmp_path, name, options):
    with pytest.raises(ConfigError, match=name):
        command(tmp_path, *options)


PLACE = pathlib.Path(regularizers.__file__).parent
PAGE = re.split(r"^### ", (PLACE / "README.md").read_text(), flags=re.MULTILINE)[1:]
SECTIONS = {name: text for name, _, text in (section.partition("\n") for section in PAGE)}
PUBLISHED = json.loads((PLACE.parent / "results" / "tiny" / "regularizers" / "results.json").read_text())


def test_the_page_has_a_section_of_every_method_and_no_other():
    assert len(PAGE) == len(SECTIONS)
    assert set(SECTIONS) == set(BY_NAME)


@pytest.mark.parametrize("name", BY_NAME)
def test_the_page_says_how_a_method_is_configured_and_what_came_out(name):
    text, method = SECTIONS[name], BY_NAME[name]
    assert set(re.findall(r"\d{4}\.\d{5}", method.idea)) == set(re.findall(r"\[(\d{4}\.\d{5})\]", text))
    found = {line.split(":")[0]: line.partition(": ")[2] for line in re.findall(r"^- (.*)$", text, re.MULTILINE)}
    assert list(found) == ["Formula", "Config", "Result", "Verdict"]
    config = cli.parse(FinetuneCommand, finetune_command, shlex.split(found["Config"].strip("`"))).config
    standard = dataclasses.replace(finetune_command().config, **BY_NAME["standard"].overrides)
    assert config == dataclasses.replace(standard, **method.overrides)
    screened = PUBLISHED["best"].get(name)
    assert ("screen" in found["Result"]) == (screened is not None)
    if screened:
        rank, at = list(PUBLISHED["best"]).index(name) + 1, f" at {screened['share']:g}x" if method.strength else ""
        assert (
            f"screen {100 * screened['success']:.1f}%{at}, rank {rank} of {len(PUBLISHED['best'])}" in found["Result"]
        )
    pairs = {pair["arm"]: [100 * x for x in pair["target"]] for pair in PUBLISHED["confirmation"]["against_standard"]}
    assert ("confirmed" in found["Result"]) == (name in pairs)
    if name in pairs:
        assert "confirmed {:+.1f} [{:+.1f}, {:+.1f}]".format(*pairs[name]) in found["Result"]
    if found["Result"] == "not run.":
        assert found["Verdict"] == "none."
