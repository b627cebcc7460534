"""The tasks that commands know by name. Another one takes a line in ``TASKS`` and a word in ``TaskName``."""

from __future__ import annotations

from typing import Literal

from ckl_jax.errors import require_word
from ckl_jax.tasks.columns import ADDITION, MULTIPLICATION, SUBTRACTION
from ckl_jax.tasks.task import Task

TaskName = Literal["addition", "subtraction", "multiplication"]
TASKS: dict[str, Task] = {task.name: task for task in (ADDITION, SUBTRACTION, MULTIPLICATION)}


def task_named(name: str, field: str = "task") -> Task:
    """The task of that name. Raises ConfigError, which names ``field``, for another."""
    require_word(name, field, TASKS)
    return TASKS[name]
