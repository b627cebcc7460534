"""Command lines: help names every field, and bad input ends as one line that says what is allowed."""

import contextlib
import dataclasses
import inspect
import re
import sys
import typing

import pytest
from hostile import TYPES, command_of, options_of
from policies import untrained

from ckl_jax import evaluate, finetune, pretrain
from ckl_jax.checkpoint.store import Model, save_model
from ckl_jax.config import FinetuneConfig, ModelConfig, PretrainConfig
from ckl_jax.errors import ConfigError
from ckl_jax.fields import Chapter, bound, kinds
from ckl_jax.presets import pretrain_preset
from ckl_jax.runtime import cli
from experiments import figure3_pretraining_levels

PRETRAIN = (pretrain.main, pretrain.PretrainCommand, pretrain.preset)
FINETUNE = (finetune.main, finetune.FinetuneCommand, finetune.preset)
EVALUATE = (evaluate.main, evaluate.EvaluateCommand, None)


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def tiny_checkpoint(tmp_path):
    config = ModelConfig(num_layers=1, num_heads=1, width=4, block_size=200)
    params = untrained(config)
    save_model(tmp_path / "model", Model(config, 1, params), {})
    return tmp_path / "model"


def _error(capsys, monkeypatch, command, arguments):
    """The one line that a command prints before it ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.run(*command)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        (PRETRAIN, "--scale huge", ["scale", "'huge'", "tiny | ladder | small | gpt2"]),
        (PRETRAIN, "--scale", ["--scale", "expected one argument"]),
        (PRETRAIN, "--optimizer sgd", ["--optimizer", "'sgd'", "adamw", "muon"]),
        (PRETRAIN, "--optimiser muon", ["--optimiser", "--optimizer {adamw,muon}"]),
        (PRETRAIN, "--batch-size 0", ["batch_size: got 0", "at least 1"]),
        (PRETRAIN, "--batch-size many", ["--batch-size", "'many'"]),
        (PRETRAIN, "--num-documents 24", ["num_documents: got 24", "at least 25"]),
        (PRETRAIN, "--num-documents 9000000", ["num_documents: got 9000000", "at most"]),
        (PRETRAIN, "--model.vocab-size 40", ["model.vocab_size: got 40", "41..256"]),
        (PRETRAIN, "--model.vocab-size 257", ["model.vocab_size: got 257", "41..256"]),
        (PRETRAIN, "--data-devices 7", ["data_devices: got 7"]),
        (FINETUNE, "--data-devices 7", ["data_devices: got 7"]),
        (PRETRAIN, "--model.block-size 572", ["model.block_size: got 572", "at least 573"]),
        (PRETRAIN, "--model.width 97", ["width: got 97", "multiple of num_heads = 2"]),
        (PRETRAIN, "--model.dtype float64", ["--model.dtype", "float32", "bfloat16"]),
        (PRETRAIN, "--log-to mlflow", ["--log-to", "'mlflow'", "tensorboard", "wandb"]),
        (FINETUNE, "--log-to tensorboard csv", ["--log-to", "'csv'", "tensorboard", "wandb"]),
        (FINETUNE, "--quiet yes", ["--quiet: got 'yes'", "--quiet or --no-quiet"]),
        (FINETUNE, "--no-quiet=True", ["--quiet: got '=True'", "--quiet or --no-quiet"]),
        (PRETRAIN, "--model.use-bias=", ["--model.use-bias: got ''", "--model.use-bias or --model.no-use-bias"]),
        (FINETUNE, "--scale huge", ["scale", "'huge'", "tiny | ladder | small | gpt2"]),
        (FINETUNE, "--recipe secret", ["recipe", "'secret'", "ours"]),
        (FINETUNE, "--minibatch-episodes 7", ["minibatch_episodes: got 7", "divisor of episodes = 128"]),
        (FINETUNE, "--minibatch tokens", ["--minibatch", "'tokens'", "episodes", "transitions"]),
        (FINETUNE, "--test-every 3", ["test_every: got 3", "divisor of rounds = 14"]),
        (FINETUNE, "--diagnostic-episodes 129", ["diagnostic_episodes: got 129", "at most 128"]),
        (FINETUNE, "--checkpoint nowhere", ["checkpoint: got", "nowhere", "model.json"]),
        *(
            (FINETUNE, f"--certainty-checkpoint N6 {unread}", ["certainty_checkpoint: got", "none where no token"])
            for unread in ("--beta 0", "--kl-weights uniform", "--kl-weights overlong_free", "--kl-coefficient 0")
        ),
        (EVALUATE, "--problems 0", ["problems: got 0", "at least 1"]),
        (EVALUATE, "--checkpoint nowhere", ["checkpoint: got", "nowhere", "model.json"]),
        (EVALUATE, "nowhere", ["Unrecognized options", "nowhere"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_line_with_field_value_and_what_is_allowed(
    capsys, monkeypatch, tmp_path, command, arguments, said
):
    line = _error(capsys, monkeypatch, command, arguments.split())
    assert [part for part in said if part not in line] == []
    assert list(tmp_path.rglob("*")) == [tmp_path / "here"]


@pytest.mark.parametrize("name", TYPES)
def test_a_word_that_names_a_preset_chooses_it_or_is_refused(name):
    """One that changes nothing but the record would be a number under a wrong name."""
    _, kind, preset = command_of(name)
    for option, of_words in options_of(kind):
        if not option.endswith((".scale", ".recipe", ".task")):
            continue
        name = option.removeprefix("--")
        chooses = preset is not None and name.replace(".", "_") in inspect.signature(preset).parameters
        for word in typing.get_args(of_words)[1:]:
            with contextlib.nullcontext() if chooses else pytest.raises(ConfigError, match=rf"^{name}: got"):
                cli.parse(kind, preset, [option, word])


def test_figures_2_and_3_take_the_presets_of_their_parts():
    _, kind, preset = command_of("experiments.figure3_pretraining_levels")
    command = cli.parse(kind, preset, ["--finetune.recipe", "paper", "--pretrain.task", "multiplication"])
    assert command.finetune == figure3_pretraining_levels.standard_kl("tiny", "paper")
    assert command.finetune.kl_coefficient == 10
    assert command.models.pretrain == pretrain_preset("tiny", "multiplication")
    _, kind, preset = command_of("experiments.figure2_pretraining")
    command = cli.parse(kind, preset, ["--pretrain.task=multiplication", "--scale=ladder"])
    assert command.models.pretrain == pretrain_preset("ladder", "multiplication")


def test_parse_raises_a_config_error_for_code_that_calls_it():
    with pytest.raises(ConfigError, match=r"^beta: got -1.0"):
        cli.parse(finetune.FinetuneCommand, finetune.preset, ["--beta", "-1"])
    with pytest.raises(ConfigError, match=r"Unrecognized options: --betta"):
        cli.parse(finetune.FinetuneCommand, finetune.preset, ["--betta", "1"])


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--seeds", "0"], "seeds"),
        (["--extra-digits", "2"], "extra_digits"),
        (["--extra-length", "60"], "extra_digits"),
    ],
)
def test_fine_tuning_that_cannot_work_is_refused_before_its_directory_is_made(
    capsys, monkeypatch, tmp_path, tiny_checkpoint, arguments, field
):
    out = tmp_path / "out"
    line = _error(capsys, monkeypatch, FINETUNE, ["--checkpoint", tiny_checkpoint, "--out", out, *arguments])
    assert line.startswith(f"error: {field}: got ")
    assert not out.exists()


def test_a_directory_of_another_config_is_refused_and_left_alone(capsys, monkeypatch, tmp_path, tiny_checkpoint):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text('{"command": "another"}')
    for command, more in ((PRETRAIN, []), (FINETUNE, ["--checkpoint", tiny_checkpoint])):
        line = _error(capsys, monkeypatch, command, ["--out", out, *more])
        assert line.startswith("error: out: ")
        assert "differing: " in line
        assert "new, empty or of this run" in line
        assert [path.name for path in out.iterdir()] == ["config.json"]


def _entries(capsys, monkeypatch, command, columns):
    """For every option of a help: the title of its box, and its text in one line."""
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as stop:
        cli.parse(*command[1:], ["--help"])
    assert stop.value.code == 0
    found, title, option = {}, None, None
    for line in capsys.readouterr().out.splitlines():
        text = line.strip("│╭─╮╰╯- ")
        if named := re.fullmatch(r"(?:(\w+) )?options", text):
            title, option = named[1] or "", None
        elif title is not None:
            assert len(line) <= columns
            if start := re.match(r"\W*(--[a-z][\w.-]*)(.*)", line.rstrip("│ ")):
                option, text = start[1], start[2]
            if option:
                found[option] = (title, " ".join([*found.get(option, ("", ""))[1].split(), *text.split()]))
    return found


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", [name for name in TYPES if name.startswith("ckl_jax.")])
def test_help_says_of_every_option_what_it_is_and_its_default(capsys, monkeypatch, name, columns):
    command = command_of(name)
    entries = _entries(capsys, monkeypatch, command, columns)
    assert entries.keys() == dict(options_of(command[1])).keys()
    for option, (_, text) in entries.items():
        assert re.fullmatch(
            r"(, --\S+|{.*?}\S*|\[{.*\]|[A-Z]+|\[[A-Z]+ \[[A-Z]+ \.{3}\]\]) \S.* \(default: [^)]+\)", text
        ), f"{option} {text}"


@pytest.mark.parametrize(("command", "config_type"), [(PRETRAIN, PretrainConfig), (FINETUNE, FinetuneConfig)])
def test_help_comes_in_chapters_and_shows_bounds(capsys, monkeypatch, command, config_type):
    entries, config = _entries(capsys, monkeypatch, command, 80), command[2]().config
    chapters = config_type.__bases__
    assert all(issubclass(chapter, Chapter) for chapter in chapters)
    own = [name for name in kinds(config_type) if not any(name in kinds(chapter) for chapter in chapters)]
    assert own == ["model"] * (command is PRETRAIN)
    for chapter in chapters:
        for name, kind in kinds(chapter).items():
            title, text = entries["--" + name.replace("_", "-")]
            assert title.lower() == chapter.__name__.lower()
            limits = "" if bound(kind) is None else f"; {bound(kind)}"
            assert text.endswith(f"(default: {getattr(config, name)}{limits})")
    titles = [*dict.fromkeys(title.lower() for title, _ in entries.values())]
    assert titles == ["", *(chapter.__name__.lower() for chapter in reversed(chapters)), *own]


def test_a_preset_gives_the_defaults_and_options_override_them():
    command = cli.parse(pretrain.PretrainCommand, pretrain.preset, ["--scale=small", "--model.num-layers", "2"])
    expected = pretrain.preset("small").config
    assert command.config == dataclasses.replace(expected, model=dataclasses.replace(expected.model, num_layers=2))
    command = cli.parse(finetune.FinetuneCommand, finetune.preset, ["--normalize-advantages", "False", "--beta", "0"])
    expected = finetune.preset("tiny").config
    assert command.config == dataclasses.replace(expected, normalize_advantages=False, beta=0.0)


def _switched(value, config_type, prefix="--"):
    """Every bool field of a command, by its option, with its value in ``value``."""
    for field in dataclasses.fields(config_type):
        found = getattr(value, field.name)
        unnamed = field.name in ("config", "logs", "models", "sampling", "rule")
        option = prefix if unnamed else prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(found):
            yield from _switched(found, type(found), option if unnamed else option + ".")
        elif isinstance(found, bool):
            yield option, found


@pytest.mark.parametrize("name", TYPES)
def test_a_switch_is_a_switch_and_may_be_written_with_its_value(name):
    _, config_type, preset = command_of(name)
    on = preset() if preset else config_type()
    switches = dict(_switched(on, config_type))
    assert switches.keys() == cli._switches(config_type).keys()
    negative = [re.sub(r"^--(.*\.)?", r"--\1no-", option) for option in switches]
    ways = {
        True: [[*switches], [word for option in switches for word in (option, "True")]],
        False: [
            negative,
            [f"--no-{option[2:]}" for option in switches],
            [word for option in switches for word in (option, "False")],
            ["--" + option[2:].replace("-", "_") + "=False" for option in switches],
        ],
    }
    for value, forms in ways.items():
        for words in forms:
            parsed = cli.parse(config_type, preset, words)
            assert dict(_switched(parsed, config_type)) == dict.fromkeys(switches, value)


@dataclasses.dataclass(frozen=True)
class Maybe:
    """Switches that nothing here has yet.

    Args:
      maybe: or neither.
      plain: on by default.
    """

    maybe: bool | None = None
    plain: bool = True


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", Maybe()),
        ("--maybe --no-plain", Maybe(True, False)),
        ("--no-maybe --plain", Maybe(False)),
        ("--maybe None --plain False", Maybe(None, False)),
        ("--maybe=False", Maybe(False)),
        ("--maybe True", Maybe(True)),
    ],
)
def test_a_switch_may_have_a_third_state(words, expected):
    assert cli.parse(Maybe, None, words.split()) == expected
