"""What a field's type says is what the field takes: a loop over every field of every config."""

import dataclasses
import math
import pathlib
import re
import typing
from typing import Annotated, Literal

import numpy as np
import pytest
from hostile import refusal

from ckl_jax.analysis.critical import Measuring
from ckl_jax.analysis.discovery import Rule
from ckl_jax.check_xla import CheckXlaCommand
from ckl_jax.config import FinetuneConfig, ModelConfig, PretrainConfig
from ckl_jax.convert import ConvertCommand
from ckl_jax.errors import ConfigError, require_word
from ckl_jax.evaluate import EvaluateCommand
from ckl_jax.fields import Above, bound, kinds, require_fields
from ckl_jax.finetune import FinetuneCommand
from ckl_jax.pretrain import PretrainCommand
from ckl_jax.runs.logs import LogOptions

CONFIGS = [ModelConfig, PretrainConfig, FinetuneConfig, LogOptions, Measuring, Rule]
COMMANDS = [PretrainCommand, FinetuneCommand, EvaluateCommand, ConvertCommand, CheckXlaCommand]
FIELDS = [(config, name) for config in (*CONFIGS, *COMMANDS) for name in kinds(config)]
JUNK = [object(), b"1", [1], {"a": 1}, np.zeros(3), "a\nb"]
NUMBERS = [math.nan, math.inf, -math.inf, 1e39, -1e39, 1e-60, 2**31, -(2**31), 10**5_000, 10**400]


def stripped(kind):
    """The type without annotations, and whether None is one of its values."""
    if typing.get_origin(kind) in (typing.Union, type(int | None)):
        return stripped(typing.get_args(kind)[0])[0], True
    return (typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind), False


@pytest.mark.parametrize("config", [*CONFIGS, *COMMANDS], ids=lambda config: config.__name__)
def test_the_types_of_inherited_fields_resolve_where_the_config_stands(config):
    assert set(typing.get_type_hints(config.__init__)) >= set(kinds(config))


def outside(limits):
    """The numbers next to a bound that it excludes."""
    low, high = limits.low, limits.high
    yield low if isinstance(limits, Above) else math.nextafter(low, -math.inf)
    yield from () if high == math.inf else (math.nextafter(high, math.inf),)


def refused(kind):
    """What a field of this type must not take."""
    plain, optional = stripped(kind)
    yield from (junk for junk in JUNK if not (isinstance(junk, str) and plain in (str, pathlib.Path)))
    yield from [] if optional else [None]
    if plain in (int, float):
        limits = bound(kind)
        yield from ["1", True, np.float32(1), *NUMBERS, *outside(limits)]
        yield from [] if plain is float else [1.0, 1.5, int(limits.low) - 1, np.int32(1)]
        yield from [] if plain is float or limits.high == math.inf else [int(limits.high) + 1]
    elif plain is bool:
        yield from [0, 1, "True", "no"]
    elif typing.get_origin(plain) is Literal:
        yield from ["", "no such word", 0, True]
    elif typing.get_origin(plain) is tuple:
        yield from [("no such word",), "no such word", [*typing.get_args(typing.get_args(plain)[0])]]
    elif plain is pathlib.Path:
        yield from [0, True]


@pytest.mark.parametrize(("config", "name"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_what_the_type_of_a_field_excludes_is_refused_in_one_line_with_its_name(tmp_path, monkeypatch, config, name):
    monkeypatch.chdir(tmp_path)
    with refusal(tmp_path):
        for value in refused(kinds(config)[name]):
            with pytest.raises(ConfigError) as caught:
                config(**{name: value})
            assert re.fullmatch(rf"{name}: got [^\n]{{1,310}}, allowed is [^\n]+", str(caught.value)), str(caught.value)


@pytest.mark.parametrize("config", [*CONFIGS, *COMMANDS])
def test_defaults_and_the_ends_of_bounds_are_taken(config):
    default = config()
    for name, kind in kinds(config).items():
        plain, limits = stripped(kind)[0], bound(kind)
        assert (limits is not None) == (plain in (int, float))
        ends = {limits.low, limits.high} - {math.inf} if limits else set()
        for value in map(plain, (end for end in ends if end in limits)):
            changed = object.__new__(config)  # Without the rules across fields.
            vars(changed).update(vars(default) | {name: value})
            require_fields(changed)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: PretrainConfig(batch_size=2.0), "batch_size: got 2.0, allowed is an integer"),
        (lambda: Measuring(temperature="hot"), "temperature: got 'hot', allowed is a number"),
        (lambda: PretrainConfig(shard_state=1), "shard_state: got 1, allowed is True or False"),
        (lambda: PretrainConfig(model={"width": 4}), "model: got {'width': 4}, allowed is a ModelConfig"),
        (lambda: PretrainConfig(optimizer="sgd"), "optimizer: got 'sgd', allowed is adamw | muon"),
        (lambda: PretrainConfig(data_devices=0), "data_devices: got 0, allowed is at least 1, or None"),
        (lambda: Rule(least_drop=math.nan), "least_drop: got nan, allowed is above 0, at most 1"),
        (lambda: ModelConfig(dropout=1), "dropout: got 1, allowed is at least 0, at most 0.99"),
        (
            lambda: FinetuneConfig(reward_wrong=-1e7),
            "reward_wrong: got -10000000.0, allowed is at least -1e+06, at most 1e+06",
        ),
        (lambda: FinetuneConfig(beta=1e300), "beta: got 1e+300, allowed is at least 0, and what 32 bits can hold"),
    ],
)
def test_a_refusal_says_in_words_what_is_allowed(call, said):
    with pytest.raises(ConfigError) as caught:
        call()
    assert str(caught.value) == said


@dataclasses.dataclass(frozen=True)
class Free:
    number: float = 0.0
    digits: tuple[int, ...] = ()


def test_a_number_without_bounds_is_one_of_32_bits():
    with pytest.raises(ConfigError, match=r"^number: got inf, allowed is what 32 bits can hold$"):
        require_fields(Free(math.inf))
    with pytest.raises(ConfigError, match=r"^digits: got 1\.5, allowed is an integer$"):
        require_fields(Free(digits=(1, 1.5)))
    require_fields(Free(-1e6, (1, -2)))


@pytest.mark.parametrize("value", ["c", "a | b", 1, None, ["a"], ("a", "b"), {"a": 1}, np.array(["a"])])
def test_a_word_is_one_of_the_words_or_refused_with_all_of_them(value):
    for words in (("a", "b"), {"a": 1, "b": 2}):
        with pytest.raises(ConfigError, match=r"^kind: got .*, allowed is a \| b$"):
            require_word(value, "kind", words)
        require_word("b", "kind", words)
