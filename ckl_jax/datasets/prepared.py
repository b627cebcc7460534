"""The dataset's files: prepared once, and read whole or not at all.

TFDS prepares in ``incomplete.*`` beside the dataset's directory, which it renames at the end. What a process that was
killed left there is never read and may be deleted.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
from collections.abc import Callable

from etils import epath

from ckl_jax.datasets.scratchpads import PREPARED, Scratchpads, split_of
from ckl_jax.runtime import reading
from ckl_jax.tasks.catalog import task_named

INFO = "dataset_info.json"
REDRAWN = 1_000  # Problems that are drawn again, as a task may have come to draw others.


def documents(make: Callable[[], Scratchpads], split: str) -> list[str]:
    """Prompt + answer of every example of a split; the dataset is prepared first if it is not there.

    Args:
      make: gives a new builder.

    Raises:
      ConfigError: a file is missing or damaged, an example is not what its operands make or what the task draws, there
        are more or fewer of them than the settings say, or the task has no problems of the split. OSError: the dataset
        cannot be written.
    """
    builder = make()
    path = epath.Path(builder.data_dir)
    if not (path / INFO).is_file():
        _prepare(builder, path)
        builder = make()
    with reading.damaged(path, "data_dir", PREPARED):
        return _read(builder, split)


def _prepare(builder: Scratchpads, path: epath.Path) -> None:
    with contextlib.suppress(OSError, ValueError):
        path.rmdir()  # An empty one holds nothing, but TFDS takes it for the dataset.
    with reading.damaged(path, "data_dir", PREPARED):
        if path.exists():
            raise ValueError(f"it has no {INFO}")
    try:
        builder.download_and_prepare()
    except OSError:
        if not (path / INFO).is_file():  # Else another process has prepared the same meanwhile.
            raise
    except RuntimeError as error:  # Of a full disk, say.
        raise OSError(errno.EIO, " ".join(str(error).split()), str(path)) from error


def _read(builder: Scratchpads, split: str) -> list[str]:
    source, task = builder.as_data_source(split=split), task_named(builder.builder_config.task)
    if len(source) != builder.count(split):
        raise ValueError(f"{len(source)} examples of {split}, not {builder.count(split)}")
    found, missing = [], set(itertools.islice(builder.problems(split), REDRAWN))
    for number, example in enumerate(source.__getitems__(range(len(source)))):  # Five times faster than one by one.
        if None in example.values():  # A shard that is cut.
            raise ValueError(f"example {number} of {split} cannot be read")
        problem = task.problem(int(example["a"]), int(example["b"]))
        missing.discard(problem)
        found.append(task.prompt_text(problem) + task.answer_text(problem))
        same = found[-1] == _text(example["prompt"]) + _text(example["answer"])
        if not same or split_of(problem) != split:
            raise ValueError(f"example {number} of {split} is not what its operands make")
    if len(found) != len(source):
        raise ValueError(f"{len(found)} examples of {split}, not {len(source)}")
    if missing:
        raise ValueError(f"its examples are not those that the task {task.name} draws now")
    return found


def _text(feature: bytes | str) -> str:
    return feature.decode() if isinstance(feature, bytes) else feature
