"""What the models calculate: characters, tasks and their texts, and problems as arrays.

Imports nothing but ``ckl_jax.errors``.
"""

from ckl_jax.tasks.catalog import TASKS, TaskName, task_named
from ckl_jax.tasks.columns import ADDITION, MULTIPLICATION, SUBTRACTION, ColumnTask
from ckl_jax.tasks.problems import Problems, pack, reward
from ckl_jax.tasks.task import EXTRA_LENGTH, MAX_DIGITS, RESULT_MARK, CriticalToken, Problem, Task, draw_number

__all__ = [
    "ADDITION",
    "EXTRA_LENGTH",
    "MAX_DIGITS",
    "MULTIPLICATION",
    "RESULT_MARK",
    "SUBTRACTION",
    "TASKS",
    "ColumnTask",
    "CriticalToken",
    "Problem",
    "Problems",
    "Task",
    "TaskName",
    "draw_number",
    "pack",
    "reward",
    "task_named",
]
