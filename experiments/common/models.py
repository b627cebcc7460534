"""Pre-trained models that experiments share: each is trained once and read from then on.

A model of N digits at a scale lies under ``<pretrained>/<scale>_N<N>``, as ``python -m ckl_jax.pretrain --scale <scale>
--max-digits <N> --out <pretrained>/<scale>_N<N>`` writes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_hex

from ckl_jax.checkpoint import shipped
from ckl_jax.checkpoint.store import Model, load_model
from ckl_jax.config import PretrainConfig, Scale
from ckl_jax.errors import naming, require
from ckl_jax.presets import pretrain_preset
from ckl_jax.pretrain import pretrain
from ckl_jax.runs.directory import RESUMABLE, RunDirectory
from ckl_jax.runtime import hosts, reading
from ckl_jax.runtime.paths import require_directory, resolved
from ckl_jax.tasks.catalog import TaskName

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Models:
    """Which pre-trained models an experiment compares, and where they are kept."""

    scale: Scale = "tiny"
    """Preset that the other fields start from."""
    digits: tuple[int, ...] = (3, 4, 5)
    """N of each model, ascending: it is pre-trained on operands of 1 to N digits."""
    pretrain: PretrainConfig = field(default_factory=lambda: pretrain_preset("tiny"))
    """How each is pre-trained; its max_digits is replaced by each N."""
    pretrained: pathlib.Path = pathlib.Path("runs/pretrained")
    """Holds a directory per model, <scale>_N<N> (and _<task>), that all experiments share; what is missing there is
    trained."""
    data_dir: pathlib.Path | None = None
    """Where TFDS keeps the datasets; default: TFDS's own default directory."""

    def __post_init__(self) -> None:
        ascending = all(low < high for low, high in itertools.pairwise(self.digits))
        require(len(self.digits) >= 1 and ascending, "digits", self.digits, "1 or more numbers of digits, ascending")
        require(self.pretrain.scale == self.scale, "pretrain.scale", self.pretrain.scale, f"scale = {self.scale}")
        given, known = self.pretrain.max_digits, (*self.digits, pretrain_preset(self.scale).max_digits)
        require(given in known, "pretrain.max_digits", given, f"one of digits = {self.digits}, which all are trained")
        require_directory(self.pretrained, "pretrained", may_be_read_only=True)
        if self.data_dir is not None:
            require_directory(self.data_dir, "data_dir", may_be_read_only=True)
        _ = self.configs  # Refuses here what the block cannot hold.

    @property
    def configs(self) -> list[PretrainConfig]:
        """The pre-training of each N. Raises ConfigError where the model's block is too short for it."""
        return [dataclasses.replace(self.pretrain, max_digits=digits) for digits in self.digits]

    def describe(self) -> dict[str, Any]:
        """What determines the models: everything but where files lie."""
        paths = ("pretrained", "data_dir")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in paths}

    def load(self, config: PretrainConfig) -> Model:
        """The model of one of ``configs``, trained first if it is not there."""
        return load_model(pretrained(config, self.pretrained, data_dir=self.data_dir))


def models_preset(scale: str, task: TaskName = "addition") -> Models:
    """Those that ship on the ladder; N = 3, 4, 5 at the tiny scale; elsewhere the paper's that a block holds."""
    config = pretrain_preset(scale, task)
    digits = {"tiny": (3, 4, 5), "ladder": (3, 5, 6, 7, 9)}.get(scale, (7, 9))
    return Models(config.scale, digits, config)


def pretrained(
    config: PretrainConfig,
    directory: pathlib.Path,
    progress: Progress = print,
    data_dir: pathlib.Path | None = None,
) -> pathlib.Path:
    """The checkpoint of ``config``'s model: one that ships if it is of that config, else ``directory``'s.

    What is missing is trained and what was interrupted goes on; what is finished is only read.

    Raises:
      ConfigError: the model's place holds a run of another config; nothing is touched.
    """
    name = f"{config.scale}_N{config.max_digits}" + ("" if config.task == "addition" else f"_{config.task}")
    path = resolved(directory / name, "pretrained")
    for place in (*(shipped.PRETRAINED / known for known in shipped.names()), path):
        if hosts.of_first(functools.partial(_is_finished, place, config)):
            return place
    described = {"command": "pretrain", **dataclasses.asdict(config)}
    with naming("pretrained", instead_of="out"), contextlib.closing(RunDirectory(path, described)) as run:
        progress(f"pre-training {name} in {path}")
        pretrain(config, run, data_dir, lambda line: progress(f"{name}: {line}"))
    return path


def _is_finished(directory: pathlib.Path, config: PretrainConfig) -> bool:
    """Whether the model of a pre-training is there, whose config may have another preset's name and speed."""
    path = directory / "model.json"
    if not path.exists():  # It is written last.
        return False
    with reading.damaged(path, "pretrained"):
        made = reading.read_object(path, "pretrained")["made_by"]["config"]
        return RESUMABLE.same_numbers(made | {"scale": config.scale}, dataclasses.asdict(config))


def colors_of(digits: Sequence[int]) -> dict[int, str]:
    """A colour for each N, darkest for the smallest: the same in all figures of the same models."""
    shades = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.8, len(digits)))
    return {base: to_hex(shade) for base, shade in zip(digits, shades, strict=True)}
