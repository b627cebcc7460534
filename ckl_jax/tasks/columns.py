"""Addition (the paper's task), subtraction, and multiplication by one digit: column by column, one character per token.

The texts of the addition equal the ones of the authors' template character by character, and so do its critical tokens
(paper, section 3.1 and appendix A). The other two are written in the same style with the same 41 characters, so that J
means the same; they have no multiplication sign, so a ``T`` says "times":

    [3,5] - [6] , A=[9] , C=1 , 5-6-1=-2 , A->8 , C->1
    [3,5] T [8] , A=[6] , C=5 , 5T8+5=45 , A->5 , C->4
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckl_jax.errors import require
from ckl_jax.tasks.task import RESULT_MARK, CriticalToken, Problem, Task, draw_number

HEADER = "\n<scratch>\n"


@dataclass(frozen=True)
class ColumnTask(Task):
    """Arithmetic on the columns of two numbers, the last one first, with a carry.

    A column's value is written out; its last digit is noted in A and its tens are carried (what was borrowed, for a
    value below 0).

    Attributes:
      carry_sign: character before the carry in a written column.
      column: a column's value, of the operands' digits and the carry; of integers or arrays.
      whole: the result, of the operands.
      larger_first: the first operand is at least the second.
      repeats_second: the second operand is one digit, used for every column.
    """

    carry_sign: str
    column: Callable[[Any, Any, Any], Any]
    whole: Callable[[int, int], int]
    larger_first: bool = False
    repeats_second: bool = False

    @property
    def has_drafts(self) -> bool:
        return True

    @property
    def long_operands(self) -> tuple[int, ...]:
        return (1,) if self.repeats_second else (1, 2)

    def problem(self, a: int, b: int) -> Problem:
        made = Problem(a, b)
        require(not self.larger_first or b <= a, "b", b, f"at most a = {a}, which {self.name} starts with")
        require(not self.repeats_second or b < 10, "b", b, f"one digit with {self.name}")
        return made

    def draw(self, rng: np.random.Generator, digits_a: int, digits_b: int) -> Problem:
        a = draw_number(rng, digits_a)
        if self.repeats_second:
            return Problem(a, int(rng.integers(1, 10)))  # Times 0 is right whatever the columns say.
        b = draw_number(rng, digits_b)
        return Problem(max(a, b), min(a, b)) if self.larger_first else Problem(a, b)

    def longest(self, digits: int) -> Problem:
        nines, power = 10**digits - 1, 10 ** (digits - 1)
        if self.larger_first:
            # It borrows in nearly every column, 0-9-1=-10, and the result has as many digits as the operands.
            return Problem(9 * power, 2 * power - 1)
        return Problem(nines, 9 if self.repeats_second else nines)

    def outcome(self, x: Any, y: Any, carry: Any) -> tuple[Any, Any, Any]:
        """A column's value, the digit that it yields and what it carries; of integers or arrays."""
        value = self.column(x, y, carry)
        return value, value % 10, abs(value // 10)

    def answer_text(self, problem: Problem) -> str:
        """The right answer: a scratchpad line per digit of the longer operand, then the result's digits."""
        lines, _ = self._scratchpad(problem)
        return HEADER + "".join(line + "\n" for line in lines) + RESULT_MARK + self.result_text(problem) + "\n"

    def result_text(self, problem: Problem) -> str:
        """The result's digits separated by spaces."""
        return " ".join(str(self.whole(problem.a, problem.b)))

    def operand_lists(self, problem: Problem) -> list[tuple[str, str]]:
        """The two bracketed digit lists that each scratchpad step starts with, the closing line left out."""
        return self._scratchpad(problem)[1]

    def _scratchpad(self, problem: Problem) -> tuple[list[str], list[tuple[str, str]]]:
        """The scratchpad's lines, and each step's two operand lists as they are printed at the line's start."""
        digits_a, digits_b = ([int(digit) for digit in str(number)] for number in (problem.a, problem.b))
        total: list[int] = []
        carry, lines, lists, sign = 0, [], [], f" {self.operator} "
        while digits_a or (digits_b and not self.repeats_second):
            x, y = (digits_a[-1] if digits_a else 0), (digits_b[-1] if digits_b else 0)
            value, digit, carried = self.outcome(x, y, carry)
            lists.append((_bracket(digits_a), _bracket(digits_b)))
            lines.append(
                f"{sign.join(lists[-1])} , A={_bracket(total)} , C={carry} , "
                f"{x}{self.operator}{y}{self.carry_sign}{carry}={value} , A->{digit} , C->{carried}"
            )
            total, carry, digits_a = [digit, *total], carried, digits_a[:-1]
            digits_b = digits_b if self.repeats_second else digits_b[:-1]
        lines.append(f"[]{sign}{_bracket(digits_b)} , A={_bracket(total)} C={carry} , END")
        return lines, lists

    def critical_tokens(self, problem: Problem, max_pretrain_digits: int) -> list[CriticalToken]:
        """The critical tokens of the right answer for a model pre-trained on up to ``max_pretrain_digits`` digits.

        In steps 1, 2 and 3, for each operand longer than that by ``gap`` > 0: the last ``2 * gap`` characters before
        the closing bracket of the operand's list, ordered from the bracket backwards.
        """
        found = super().critical_tokens(problem, max_pretrain_digits)
        lines, lists = self._scratchpad(problem)
        operands = (problem.a, problem.b)
        line_start = len(HEADER)
        for step, (line, (list_a, list_b)) in enumerate(zip(lines[:3], lists[:3], strict=False), start=1):
            list_starts = (line_start, line_start + len(list_a) + len(f" {self.operator} "))
            for operand, (value, text, start) in enumerate(
                zip(operands, (list_a, list_b), list_starts, strict=True), 1
            ):
                gap = len(str(value)) - max_pretrain_digits
                for back in range(max(0, 2 * gap)):
                    position = len(text) - 2 - back
                    if position < 1:
                        break
                    k = gap - back // 2
                    name = f"n+{k}_{'comma' if back % 2 else 'digit'}"
                    found.append(CriticalToken(step, operand, name, k, start + position, text[position], position))
            line_start += len(line) + 1
        return found


def _bracket(digits: Sequence[int]) -> str:
    return "[" + ",".join(map(str, digits)) + "]"


ADDITION = ColumnTask("addition", "+", "+", lambda x, y, carry: x + y + carry, lambda a, b: a + b)
SUBTRACTION = ColumnTask(
    "subtraction", "-", "-", lambda x, y, carry: x - y - carry, lambda a, b: a - b, larger_first=True
)
MULTIPLICATION = ColumnTask(
    "multiplication", "T", "+", lambda x, y, carry: x * y + carry, lambda a, b: a * b, repeats_second=True
)
