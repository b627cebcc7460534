"""The pre-trained models that ship, with the accuracy that was measured of each.

    python -m ckl_jax.models

Every command takes the name of one as `--checkpoint`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ckl_jax.checkpoint import shipped
from ckl_jax.checkpoint.store import read_description
from ckl_jax.config import ModelConfig
from ckl_jax.model import num_parameters, param_shapes
from ckl_jax.runtime import cli


class Accuracy(NamedTuple):
    """Greedy, in %; None where it was not measured.

    Attributes:
      problems: of a cell.
      offsets: the positions of the block at which they started, as `ckl_jax.evaluate --offsets` has them.
    """

    problems: int
    offsets: tuple[int, ...]
    varying: float
    varying_longer: float | None
    identical: float | None
    identical_longer: float | None


ACCURACY: Mapping[str, Accuracy] = {
    "tiny": Accuracy(1000, (0,), 94.9, 40.6, 83.6, 0.0),
    "N3": Accuracy(300, (0, 60, 180), 92.7, 0.0, 78.9, 0.0),
    "N5": Accuracy(300, (0, 60, 180), 100.0, 7.1, 100.0, 0.0),
    "N6": Accuracy(300, (0, 60, 180), 98.7, 47.9, 91.7, 0.0),
    "N7": Accuracy(300, (0, 60, 180), 99.4, 90.2, 97.9, 62.3),
    "N9": Accuracy(300, (0, 30, 59), 99.6, 93.8, 97.2, 74.6),
    "tiny_subtraction": Accuracy(1000, (0,), 87.3, None, None, None),
    "tiny_multiplication": Accuracy(1000, (0,), 90.9, None, None, None),
}
"""By the model's name. experiments/README.md has the intervals."""


def parameters(config: ModelConfig) -> int:
    """How many numbers a model of this shape has."""
    return num_parameters(param_shapes(config))


@dataclass(frozen=True)
class ModelsCommand:
    """Lists the models that ship, with their accuracy in % on N and on N + 1 digits."""


def main(_: ModelsCommand) -> None:
    print(f"{'':66}{'varying':>16}{'identical':>16}")
    header = f"{'name':22}{'task':16}{'N':>4}{'parameters':>12}{'problems':>12}"
    print(header + f"{'N':>8}{'N + 1':>8}" * 2)
    for name, measured in ACCURACY.items():
        config, digits, task = read_description(shipped.PRETRAINED / name)
        problems = f"{measured.problems} x {len(measured.offsets)}"
        shares = "".join(f"{'-' if share is None else format(share, '.1f'):>8}" for share in measured[2:])
        print(f"{name:22}{task.name:16}{digits:>4}{parameters(config):>12,}{problems:>12}{shares}")


if __name__ == "__main__":
    cli.run(main, ModelsCommand)
