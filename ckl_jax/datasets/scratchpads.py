"""TFDS builder of scratchpads, written and read as array_record: TensorFlow is not needed.

The lengths of both operands are balanced over 1..N, as far as the task allows (its ``draw``): example i has the i-th
cell of the N x N grid of lengths. A problem belongs to the test split if the hash of its two operands, in either order,
says so: no problem, nor its mirror image, is in both.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from ckl_jax.errors import ConfigError, is_integer, require
from ckl_jax.runtime import reading
from ckl_jax.tasks.catalog import task_named
from ckl_jax.tasks.task import MAX_DIGITS, Problem, Task

TEST_SHARE = 0.05
MOST_DRAWS = 100_000  # For one example.
PREPARED = "what was prepared there: delete it, and the same command prepares it anew"


@dataclasses.dataclass(kw_only=True)
class ScratchpadsConfig(tfds.core.BuilderConfig):
    """What determines the examples; all of it is in the config's name, so other settings never reuse stale files."""

    task: str
    max_digits: int
    num_examples: int
    seed: int = 0


class Scratchpads(tfds.core.GeneratorBasedBuilder):
    """Problems of a task with operands of 1..``max_digits`` digits, their prompts and right answers.

    Splits: ``train`` with ``num_examples``, ``test`` with a twentieth of that. Features: ``a`` and ``b`` (int64),
    ``prompt`` and ``answer`` (text).
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First version."}

    def __init__(
        self,
        *,
        max_digits: int,
        num_examples: int,
        seed: int = 0,
        task: str = "addition",
        data_dir: str | None = None,
    ):
        """Prepares nothing yet. ``data_dir``: where the files are; default: TFDS's own directory.

        Raises:
          ConfigError: an unknown task, no integers from 0, ``max_digits`` above 17, or fewer examples than cells; the
            dataset is there and its description is damaged.
        """
        task_named(task)
        for name, value in (("max_digits", max_digits), ("num_examples", num_examples), ("seed", seed)):
            require(is_integer(value) and value >= 0, name, value, "an integer, 0 or more")
        require(1 <= max_digits < MAX_DIGITS, "max_digits", max_digits, f"1..{MAX_DIGITS - 1}")
        require(num_examples >= max_digits**2, "num_examples", num_examples, f"at least max_digits^2 = {max_digits**2}")
        config = ScratchpadsConfig(
            name=f"{task}_digits{max_digits}_examples{num_examples}_seed{seed}",
            description=f"{num_examples} problems of {task} of 1 to {max_digits} digits",
            task=task,
            max_digits=max_digits,
            num_examples=num_examples,
            seed=seed,
        )
        root = epath.Path(data_dir or tfds.core.constants.DATA_DIR)
        with reading.damaged(root / self.name / config.name / str(self.VERSION), "data_dir", PREPARED):
            super().__init__(config=config, data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "a": tfds.features.Scalar(np.int64),
                "b": tfds.features.Scalar(np.int64),
                "prompt": tfds.features.Text(),
                "answer": tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, description=__doc__)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def count(self, split: str) -> int:
        """How many examples a split has."""
        count = self.builder_config.num_examples
        return count if split == "train" else max(1, round(TEST_SHARE * count))

    def problems(self, split: str) -> Iterator[Problem]:
        """The problems of a split as they are drawn: TFDS shuffles the examples."""
        config = self.builder_config
        task = task_named(config.task)
        rng = np.random.default_rng([config.seed, split == "test"])
        for index in range(self.count(split)):
            cell = index % config.max_digits**2
            yield _draw_of_split(task, rng, split, cell // config.max_digits + 1, cell % config.max_digits + 1)

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        task = task_named(self.builder_config.task)
        for index, problem in enumerate(self.problems(split)):
            yield (
                index,
                {
                    "a": problem.a,
                    "b": problem.b,
                    "prompt": task.prompt_text(problem),
                    "answer": task.answer_text(problem),
                },
            )


def _draw_of_split(task: Task, rng: np.random.Generator, split: str, digits_a: int, digits_b: int) -> Problem:
    for _ in range(MOST_DRAWS):
        problem = task.draw(rng, digits_a, digits_b)
        if split_of(problem) == split:
            return problem
    drawn = f"{task.name}, none of whose {MOST_DRAWS} draws of {digits_a} and {digits_b} digits is in the {split} split"
    raise ConfigError(f"task: got {drawn}, allowed is one with more pairs of operands")


def split_of(problem: Problem) -> str:
    """``train`` or ``test``: a function of the unordered pair of operands alone."""
    low, high = sorted((int(problem.a), int(problem.b)))
    digest = hashlib.sha256(f"{low}+{high}".encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < TEST_SHARE * 2**64 else "train"
