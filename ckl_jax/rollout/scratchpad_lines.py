"""A line of a scratchpad as numbers: what it says, which one follows it, and its text; on the device."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ckl_jax.tasks import alphabet
from ckl_jax.tasks.columns import ColumnTask
from ckl_jax.tasks.task import RESULT_MARK

HEADER, STEP, END, CLOSE, RESULT, DONE = range(6)
SHORTEST_STEP = len("[1] + [] , A=[] , C=0 , 1+0+0=1 , A->1 , C->0\n")


class Line(NamedTuple):
    """What determines one line of the answer. Digits are left-aligned and -1 where there is none.

    Attributes:
      kind_B: HEADER (the two lines before the first step), STEP, END (the line without operands), CLOSE, RESULT, DONE.
      operands_Bx2xN, total_BxN: the line's three lists.
      carry_B: the carry into the column.
    """

    kind_B: jax.Array
    operands_Bx2xN: jax.Array
    total_BxN: jax.Array
    carry_B: jax.Array

    @property
    def column_Bx2(self) -> jax.Array:
        """Last digit of either operand, 0 where it has none left."""
        last_Bx2x1 = jnp.maximum((self.operands_Bx2xN >= 0).sum(axis=2, keepdims=True) - 1, 0)
        return jnp.take_along_axis(self.operands_Bx2xN, last_Bx2x1, axis=2)[..., 0].clip(0)


def select(condition_B: jax.Array, yes: Line, no: Line) -> Line:
    """One line where the condition holds, else the other."""

    def where(x, y):
        return jnp.where(condition_B.reshape(-1, *[1] * (x.ndim - 1)), x, y)

    return jax.tree.map(where, yes, no)


def step_line(task: ColumnTask, operands_Bx2xN: jax.Array, total_BxN: jax.Array, carry_B: jax.Array) -> Line:
    """The line of these lists and carry: a step while there are digits to use, else the END line."""
    used = operands_Bx2xN[:, : 1 if task.repeats_second else 2]
    kind_B = jnp.where((used >= 0).any(axis=(1, 2)), STEP, END)
    return Line(kind_B, operands_Bx2xN, total_BxN, carry_B)


def _value(task: ColumnTask, line: Line) -> tuple[jax.Array, jax.Array, jax.Array]:
    x_B, y_B = line.column_Bx2.T
    return task.outcome(x_B, y_B, line.carry_B)


def outcome(task: ColumnTask, line: Line) -> tuple[jax.Array, jax.Array]:
    """The digit and the carry that a step yields."""
    return _value(task, line)[1:]


def advance(task: ColumnTask, line: Line, digit_B: jax.Array, carry_B: jax.Array) -> Line:
    """The line after this one, which yields that digit and that carry."""
    kept_Bx2xN = jnp.pad(line.operands_Bx2xN[:, :, 1:], ((0, 0), (0, 0), (0, 1)), constant_values=-1) >= 0
    if task.repeats_second:
        kept_Bx2xN = kept_Bx2xN.at[:, 1].set(True)
    shifted_BxN = jnp.concatenate([digit_B[:, None], line.total_BxN[:, :-1]], axis=1)
    following = step_line(task, jnp.where(kept_Bx2xN, line.operands_Bx2xN, -1), shifted_BxN, carry_B)
    return select(line.kind_B == STEP, following, line._replace(kind_B=jnp.minimum(line.kind_B + 1, DONE)))


def longest_line(num_digits: int) -> int:
    """At least the characters of any line with lists of up to ``num_digits`` digits."""
    return 6 * num_digits + 60


class Template(NamedTuple):
    """Every character K that some line may have: a literal or the register's digit, shown if the register has one."""

    literal_K: np.ndarray
    register_K: np.ndarray
    kinds_6xK: np.ndarray


@functools.cache
def template_of(task: ColumnTask, num_digits: int) -> Template:
    """All characters in their order, of lines whose lists have up to ``num_digits`` digits."""
    first, second, total, result, always = np.cumsum([0, num_digits, num_digits, num_digits, num_digits + 1])
    carry, digit_1, digit_2, minus, tens, ones, digit, carried = range(always + 1, always + 9)
    entries: list[tuple[str, int, tuple[int, ...]]] = []

    def text(characters, *kinds):
        entries.extend((character, always, kinds) for character in characters)

    def digits(register, count, separator, *kinds):
        for index in range(count):
            if index:
                entries.append((separator, register + index, kinds))
            entries.append(("", register + index, kinds))

    def step(*parts):
        for part in parts:
            text(part, STEP) if isinstance(part, str) else digits(part, 1, "", STEP)

    text("\n<scratch>\n", HEADER)
    for opening, register in (("[", first), (f"] {task.operator} [", second), ("] , A=[", total)):
        text(opening, STEP, END)
        digits(register, num_digits, ",", STEP, END)
    text("]", STEP, END)
    step(" ,")
    text(" C=", STEP, END)
    digits(carry, 1, "", STEP, END)
    text(" , ", STEP, END)
    step(digit_1, task.operator, digit_2, task.carry_sign, carry, "=")
    entries.append(("-", minus, (STEP,)))
    step(tens, ones, " , A->", digit, " , C->", carried)
    text("END", END)
    text("\n", STEP, END)
    text(RESULT_MARK, CLOSE)
    digits(result, num_digits + 1, " ", RESULT)
    text("\n", RESULT)
    literals, registers, kinds = zip(*entries, strict=True)
    return Template(
        np.array([alphabet.encode(c)[0] if c else -1 for c in literals], np.int32),
        np.array(registers, np.int32),
        np.array([[kind in shown for shown in kinds] for kind in range(6)]),
    )


def render(task: ColumnTask, template: Template, line: Line) -> tuple[jax.Array, jax.Array]:
    """A line's tokens [B, K] and which of them are shown, bool [B, K]."""
    value_B, digit_B, carry_B = _value(task, line)
    tens_B, ones_B = jnp.abs(value_B) // 10, jnp.abs(value_B) % 10
    single = (
        jnp.zeros_like(value_B),
        line.carry_B,
        *line.column_Bx2.T,
        jnp.where(value_B < 0, 0, -1),
        jnp.where(tens_B > 0, tens_B, -1),
        ones_B,
        digit_B,
        carry_B,
    )
    registers_BxR = jnp.concatenate(
        [
            line.operands_Bx2xN.reshape(len(value_B), -1),
            line.total_BxN,
            _result(task, line),
            jnp.stack(single, axis=1),
        ],
        axis=1,
    )
    value_BxK = registers_BxR[:, template.register_K]
    tokens_BxK = jnp.where(template.literal_K[None] >= 0, template.literal_K[None], value_BxK + alphabet.FIRST_DIGIT_ID)
    return tokens_BxK, (value_BxK >= 0) & jnp.asarray(template.kinds_6xK)[line.kind_B]


def _result(task: ColumnTask, line: Line) -> jax.Array:
    """The result's digits [B, N + 1]: the total after the last carry, if there is one."""
    with_carry = jnp.concatenate([line.carry_B[:, None], line.total_BxN], axis=1)
    without = jnp.pad(line.total_BxN, ((0, 0), (0, 1)), constant_values=-1)
    if task.larger_first or task.repeats_second:
        # Only these can have zeros in front, which the result leaves out but for a last one.
        zeros_B = jnp.cumprod(line.total_BxN == 0, axis=1).sum(axis=1)
        zeros_B = jnp.minimum(zeros_B, (line.total_BxN >= 0).sum(axis=1) - 1).clip(0)
        behind = zeros_B[:, None] + jnp.arange(without.shape[1])[None]
        without = jnp.take_along_axis(without, behind, axis=1, mode="fill", fill_value=-1)
    return jnp.where((line.carry_B > 0)[:, None], with_carry, without)
