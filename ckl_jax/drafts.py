"""Drafts: how an episode goes on if it calculates its columns faithfully from its own text.

A guess for speculative decoding, computed on the device from the generated characters alone. A policy that dropped a
digit goes on with the shorter list, and so does its draft. A draft is never trusted: ``ckl_jax.speculative`` compares
it with what the policy samples.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ckl_jax import alphabet
from ckl_jax.columns import ColumnTask
from ckl_jax.tasks import RESULT_MARK, Task

HEADER, STEP, END, CLOSE, RESULT, DONE = range(6)
SHORTEST_STEP = len("[1] + [] , A=[] , C=0 , 1+0+0=1 , A->1 , C->0\n")
# A substituted character should not move an answer, a few that match elsewhere should: 0.6 lies between.
_TAIL, _STAYING = 8, 0.6
_ZERO = alphabet.VOCABULARY.index("0")
_OPEN, _CLOSE, _EQUALS, _ARROW = (alphabet.VOCABULARY.index(character) for character in "[]=>")


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


class _Template(NamedTuple):
    """Every character K that some line may have: a literal or the register's digit, shown if the register has one."""

    literal_K: np.ndarray
    register_K: np.ndarray
    kinds_6xK: np.ndarray


def draft(task: Task, lists_Bx2xJ: jax.Array, answers_BxT: jax.Array, known_B: jax.Array, window: int) -> jax.Array:
    """The next ``window`` characters of each answer: int32 [B, window], ``PAD_ID`` after its end.

    Args:
      task: arithmetic by columns; another has no drafts.
      lists_Bx2xJ: the right operand lists of scratchpad step 1 (``Problems.lists_Bx3x2xJ[:, 0]``).
      answers_BxT: generated characters.
      known_B: how many of them count.
    """
    assert isinstance(task, ColumnTask)
    batch = answers_BxT.shape[0]
    columns_BxT = jnp.broadcast_to(jnp.arange(answers_BxT.shape[1])[None], answers_BxT.shape)
    text_BxT = jnp.where(columns_BxT < known_B[:, None], answers_BxT, alphabet.PAD_ID)
    newline_BxT = text_BxT == alphabet.NEWLINE_ID
    current, start_B = _current_line(task, lists_Bx2xJ, text_BxT, newline_BxT, columns_BxT)
    template = _template(task, current.total_BxN.shape[1])

    def write(line, _):
        return _advance(task, line, *_outcome(task, line)), _render(task, template, line)

    _, (tokens_JxBxK, shown_JxBxK) = jax.lax.scan(write, current, length=4 + window // SHORTEST_STEP)
    tokens_BxK, shown_BxK = (jnp.swapaxes(x, 0, 1).reshape(batch, -1) for x in (tokens_JxBxK, shown_JxBxK))
    width = _longest_line(current.total_BxN.shape[1]) + window
    target_BxK = jnp.where(shown_BxK, jnp.cumsum(shown_BxK, axis=1) - 1, width)
    empty_BxR = jnp.full((batch, width), alphabet.PAD_ID, jnp.int32)
    rendered_BxR = empty_BxR.at[jnp.arange(batch)[:, None], target_BxK].set(tokens_BxK, mode="drop")
    offset_B = _align(text_BxT, known_B, known_B - start_B, rendered_BxR)
    following_BxW = offset_B[:, None] + jnp.arange(window)[None]
    return jnp.take_along_axis(rendered_BxR, following_BxW, axis=1, mode="fill", fill_value=alphabet.PAD_ID)


def _align(text_BxT: jax.Array, known_B: jax.Array, written_B: jax.Array, rendered_BxR: jax.Array) -> jax.Array:
    """Where in the rendered lines each answer stands: after as many characters as its line has, or, where characters
    were left out or repeated, where the last few match best, the last one counting most."""
    back_I = jnp.arange(_TAIL)[None]
    tail_BxI = jnp.take_along_axis(text_BxT, (known_B[:, None] - 1 - back_I).clip(0), axis=1)
    tail_BxI = jnp.where(back_I < written_B[:, None], tail_BxI, -1)
    before = jnp.pad(rendered_BxR, ((0, 0), (_TAIL, 0)), constant_values=-2)
    width = rendered_BxR.shape[1]
    matches = [before[:, _TAIL - 1 - i : _TAIL - 1 - i + width] == tail_BxI[:, i : i + 1] for i in range(_TAIL)]
    distance_BxR = jnp.abs(jnp.arange(width)[None] - written_B[:, None])
    scores_BxR = sum(0.5**i * match for i, match in enumerate(matches)) - 1e-4 * distance_BxR
    return (scores_BxR + jnp.where(distance_BxR == 0, _STAYING, 0.0)).argmax(axis=1)


def _current_line(task: ColumnTask, lists_Bx2xJ, text_BxT, newline_BxT, columns_BxT) -> tuple[Line, jax.Array]:
    """The line that each answer is writing, and the column of its first character."""
    given_Bx2xN = _digits(lists_Bx2xJ[:, :, 1::2].astype(jnp.int32))
    batch, _, num_digits = given_Bx2xN.shape
    zeros_B, nothing_BxN = jnp.zeros(batch, jnp.int32), jnp.full((batch, num_digits), -1)
    first = Line(zeros_B + STEP, given_Bx2xN, nothing_BxN, zeros_B)

    # The last line that starts like a step, and the one before it.
    line_start_BxT = jnp.pad(newline_BxT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    bracket_BxT = line_start_BxT & (text_BxT == _OPEN)
    base_B = jnp.where(bracket_BxT, columns_BxT, -1).max(axis=1)
    before_B = jnp.where(bracket_BxT & (columns_BxT < base_B[:, None]), columns_BxT, -1).max(axis=1)
    starts_2B = jnp.concatenate([before_B, base_B])
    read = _read(_line_at(jnp.tile(text_BxT, (2, 1)), starts_2B, _longest_line(num_digits)), num_digits)
    previous, base = (
        jax.tree.map(lambda x, half=half: x.reshape(2, batch, *x.shape[1:])[half], read) for half in (0, 1)
    )
    expected = _select(before_B >= 0, _advance(task, *_complete(task, previous, first)), first)
    line, digit_B, carry_B = _complete(task, base, expected)

    after = _advance(task, line, digit_B, carry_B)
    lines_begun_B = (newline_BxT & (columns_BxT >= base_B[:, None])).sum(axis=1)
    current = _select(
        lines_begun_B == 0, line, _select(lines_begun_B == 1, after, _advance(task, after, *_outcome(task, after)))
    )
    current = current._replace(kind_B=jnp.where(lines_begun_B > 2, DONE, current.kind_B))
    header_B = newline_BxT.sum(axis=1) < 2
    current = _select(base_B >= 0, current, first._replace(kind_B=jnp.where(header_B, HEADER, STEP)))
    return current, jnp.where(header_B, 0, jnp.where(newline_BxT, columns_BxT + 1, 0).max(axis=1))


def _longest_line(num_digits: int) -> int:
    return 6 * num_digits + 60


def _digits(tokens: jax.Array) -> jax.Array:
    return jnp.where((tokens >= _ZERO) & (tokens <= _ZERO + 9), tokens - _ZERO, -1)


def _select(condition_B: jax.Array, yes: Line, no: Line) -> Line:
    def where(x, y):
        return jnp.where(condition_B.reshape(-1, *[1] * (x.ndim - 1)), x, y)

    return jax.tree.map(where, yes, no)


def _line_at(text_BxT: jax.Array, start_B: jax.Array, width: int) -> jax.Array:
    """The text [B, width] from a column on, up to the line's end and ``PAD_ID`` after it."""
    padded = jnp.pad(text_BxT, ((0, 0), (0, width)))
    line = jnp.take_along_axis(padded, jnp.maximum(start_B, 0)[:, None] + jnp.arange(width)[None], axis=1)
    return jnp.where(jnp.cumsum(line == alphabet.NEWLINE_ID, axis=1) == 0, line, alphabet.PAD_ID)


class _Read(NamedTuple):
    """What a written line says, -1 for what it does not say; ``yields_Bx2``: the digit and the carry after arrows."""

    lists_Bx3xN: jax.Array
    closed_Bx3: jax.Array
    carry_B: jax.Array
    yields_Bx2: jax.Array


def _read(line_BxM: jax.Array, num_digits: int) -> _Read:
    opened_BxM, closed_BxM, equals_BxM, arrows_BxM = (
        jnp.cumsum(line_BxM == mark, axis=1) for mark in (_OPEN, _CLOSE, _EQUALS, _ARROW)
    )
    digits_BxM = _digits(line_BxM)
    which_3 = jnp.arange(3)[None, :, None]
    inside_Bx3xM = (opened_BxM[:, None] == which_3 + 1) & (closed_BxM[:, None] == which_3) & (digits_BxM >= 0)[:, None]
    rank_Bx3xM = jnp.where(inside_Bx3xM, jnp.cumsum(inside_Bx3xM, axis=2) - 1, -1)
    at_slot = rank_Bx3xM[:, :, None] == jnp.arange(num_digits)[None, None, :, None]
    lists_Bx3xN = jnp.where(at_slot, digits_BxM[:, None, None], -1).max(axis=3)
    before_BxM = jnp.pad(line_BxM[:, :-1], ((0, 0), (1, 0)))

    def digit_after(mark, marks_BxM, which):
        return jnp.where((before_BxM == mark) & (marks_BxM == which), digits_BxM, -1).max(axis=1)

    yields = [digit_after(_ARROW, arrows_BxM, which) for which in (1, 2)]
    closed_Bx3 = closed_BxM[:, -1:] > jnp.arange(3)[None]
    return _Read(lists_Bx3xN, closed_Bx3, digit_after(_EQUALS, equals_BxM, 2), jnp.stack(yields, axis=1))


def _complete(task: ColumnTask, read: _Read, expected: Line) -> tuple[Line, jax.Array, jax.Array]:
    """A step's line as far as it is written and the expected one beyond; then the digit and the carry it yields."""
    beyond_Bx3xN = jnp.concatenate([expected.operands_Bx2xN, expected.total_BxN[:, None]], axis=1)
    lists_Bx3xN = jnp.where((read.lists_Bx3xN >= 0) | read.closed_Bx3[..., None], read.lists_Bx3xN, beyond_Bx3xN)
    line = _step(
        task, lists_Bx3xN[:, :2], lists_Bx3xN[:, 2], jnp.where(read.carry_B >= 0, read.carry_B, expected.carry_B)
    )
    yields_Bx2 = jnp.where(read.yields_Bx2 >= 0, read.yields_Bx2, jnp.stack(_outcome(task, line), axis=1))
    return line, yields_Bx2[:, 0], yields_Bx2[:, 1]


def _step(task: ColumnTask, operands_Bx2xN: jax.Array, total_BxN: jax.Array, carry_B: jax.Array) -> Line:
    used = operands_Bx2xN[:, : 1 if task.repeats_second else 2]
    kind_B = jnp.where((used >= 0).any(axis=(1, 2)), STEP, END)
    return Line(kind_B, operands_Bx2xN, total_BxN, carry_B)


def _value(task: ColumnTask, line: Line) -> tuple[jax.Array, jax.Array, jax.Array]:
    x_B, y_B = line.column_Bx2.T
    return task.outcome(x_B, y_B, line.carry_B)


def _outcome(task: ColumnTask, line: Line) -> tuple[jax.Array, jax.Array]:
    """The digit and the carry that a step yields."""
    return _value(task, line)[1:]


def _advance(task: ColumnTask, line: Line, digit_B: jax.Array, carry_B: jax.Array) -> Line:
    """The line after this one, which yields that digit and that carry."""
    kept_Bx2xN = jnp.pad(line.operands_Bx2xN[:, :, 1:], ((0, 0), (0, 0), (0, 1)), constant_values=-1) >= 0
    if task.repeats_second:
        kept_Bx2xN = kept_Bx2xN.at[:, 1].set(True)
    shifted_BxN = jnp.concatenate([digit_B[:, None], line.total_BxN[:, :-1]], axis=1)
    following = _step(task, jnp.where(kept_Bx2xN, line.operands_Bx2xN, -1), shifted_BxN, carry_B)
    return _select(line.kind_B == STEP, following, line._replace(kind_B=jnp.minimum(line.kind_B + 1, DONE)))


@functools.cache
def _template(task: ColumnTask, num_digits: int) -> _Template:
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
    return _Template(
        np.array([alphabet.encode(c)[0] if c else -1 for c in literals], np.int32),
        np.array(registers, np.int32),
        np.array([[kind in shown for shown in kinds] for kind in range(6)]),
    )


def _render(task: ColumnTask, template: _Template, line: Line) -> tuple[jax.Array, jax.Array]:
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
    tokens_BxK = jnp.where(template.literal_K[None] >= 0, template.literal_K[None], value_BxK + _ZERO)
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
