"""Drafts: how an episode goes on if it calculates its columns faithfully from its own text.

A guess for speculative decoding, computed on the device from the generated characters alone. A policy that dropped a
digit goes on with the shorter list, and so does its draft. A draft is never trusted: ``ckl_jax.rollout.speculative``
compares it with what the policy samples.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ckl_jax.rollout import scratchpad_lines as lines
from ckl_jax.rollout.scratchpad_lines import DONE, HEADER, SHORTEST_STEP, STEP, Line
from ckl_jax.tasks import alphabet
from ckl_jax.tasks.columns import ColumnTask
from ckl_jax.tasks.task import Task

# A substituted character should not move an answer, a few that match elsewhere should: 0.6 lies between.
_TAIL, _STAYING = 8, 0.6
_EQUALS, _ARROW = (alphabet.VOCABULARY.index(character) for character in "=>")


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
    template = lines.template_of(task, current.total_BxN.shape[1])

    def write(line, _):
        return lines.advance(task, line, *lines.outcome(task, line)), lines.render(task, template, line)

    _, (tokens_JxBxK, shown_JxBxK) = jax.lax.scan(write, current, length=4 + window // SHORTEST_STEP)
    tokens_BxK, shown_BxK = (jnp.swapaxes(x, 0, 1).reshape(batch, -1) for x in (tokens_JxBxK, shown_JxBxK))
    width = lines.longest_line(current.total_BxN.shape[1]) + window
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
    bracket_BxT = line_start_BxT & (text_BxT == alphabet.OPENING_ID)
    base_B = jnp.where(bracket_BxT, columns_BxT, -1).max(axis=1)
    before_B = jnp.where(bracket_BxT & (columns_BxT < base_B[:, None]), columns_BxT, -1).max(axis=1)
    starts_2B = jnp.concatenate([before_B, base_B])
    read = _read(_line_at(jnp.tile(text_BxT, (2, 1)), starts_2B, lines.longest_line(num_digits)), num_digits)
    previous, base = (
        jax.tree.map(lambda x, half=half: x.reshape(2, batch, *x.shape[1:])[half], read) for half in (0, 1)
    )
    expected = lines.select(before_B >= 0, lines.advance(task, *_complete(task, previous, first)), first)
    line, digit_B, carry_B = _complete(task, base, expected)

    after = lines.advance(task, line, digit_B, carry_B)
    lines_begun_B = (newline_BxT & (columns_BxT >= base_B[:, None])).sum(axis=1)
    current = lines.select(
        lines_begun_B == 0,
        line,
        lines.select(lines_begun_B == 1, after, lines.advance(task, after, *lines.outcome(task, after))),
    )
    current = current._replace(kind_B=jnp.where(lines_begun_B > 2, DONE, current.kind_B))
    header_B = newline_BxT.sum(axis=1) < 2
    current = lines.select(base_B >= 0, current, first._replace(kind_B=jnp.where(header_B, HEADER, STEP)))
    return current, jnp.where(header_B, 0, jnp.where(newline_BxT, columns_BxT + 1, 0).max(axis=1))


class _Read(NamedTuple):
    """What a written line says, -1 for what it does not say; ``yields_Bx2``: the digit and the carry after arrows."""

    lists_Bx3xN: jax.Array
    closed_Bx3: jax.Array
    carry_B: jax.Array
    yields_Bx2: jax.Array


def _read(line_BxM: jax.Array, num_digits: int) -> _Read:
    opened_BxM, closed_BxM, equals_BxM, arrows_BxM = (
        jnp.cumsum(line_BxM == mark, axis=1) for mark in (alphabet.OPENING_ID, alphabet.CLOSING_ID, _EQUALS, _ARROW)
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
    line = lines.step_line(
        task, lists_Bx3xN[:, :2], lists_Bx3xN[:, 2], jnp.where(read.carry_B >= 0, read.carry_B, expected.carry_B)
    )
    yields_Bx2 = jnp.where(read.yields_Bx2 >= 0, read.yields_Bx2, jnp.stack(lines.outcome(task, line), axis=1))
    return line, yields_Bx2[:, 0], yields_Bx2[:, 1]


def _digits(tokens: jax.Array) -> jax.Array:
    return jnp.where(alphabet.is_digit(tokens), tokens - alphabet.FIRST_DIGIT_ID, -1)


def _line_at(text_BxT: jax.Array, start_B: jax.Array, width: int) -> jax.Array:
    """The text [B, width] from a column on, up to the line's end and ``PAD_ID`` after it."""
    padded = jnp.pad(text_BxT, ((0, 0), (0, width)))
    line = jnp.take_along_axis(padded, jnp.maximum(start_B, 0)[:, None] + jnp.arange(width)[None], axis=1)
    return jnp.where(jnp.cumsum(line == alphabet.NEWLINE_ID, axis=1) == 0, line, alphabet.PAD_ID)
