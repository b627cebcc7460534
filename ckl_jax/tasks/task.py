"""What a task is: problems of two integers, their texts, the line that is judged, and critical tokens if it knows any.

An episode is a prompt (``Input:⏎357+68⏎Target:``) and an answer that starts and ends with a newline. The answer's line
after ``</scratch>`` is judged: it must be the right result's. The tasks themselves are in ``ckl_jax.tasks.columns``.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import numpy as np

from ckl_jax.errors import is_integer, require

RESULT_MARK = "</scratch>\n"
EXTRA_LENGTH = 100
MAX_DIGITS = 18


@dataclass(frozen=True)
class Problem:
    """Two non-negative integers; whether a task has such a problem, its ``problem`` says."""

    a: int
    b: int

    def __post_init__(self) -> None:
        for name, value in (("a", self.a), ("b", self.b)):
            fits = is_integer(value) and 0 <= value < 10**MAX_DIGITS
            require(fits, name, value, f"an integer from 0 to below 10^{MAX_DIGITS} ({MAX_DIGITS} digits)")
            object.__setattr__(self, name, int(value))  # NumPy's narrow ones overflow where they are added.


@dataclass(frozen=True)
class CriticalToken:
    """One critical token of a right answer (paper, section 3.3; authors' code, steps 1 to 3).

    Attributes:
      step: scratchpad line, counted from 1.
      operand: 1 or 2.
      name: ``n+k_comma`` or ``n+k_digit``.
      gap_index: that k; the list's last element is the gap-th beyond the pre-training length.
      index: position in the task's ``answer_text``.
      character: the right character at that position.
      position_in_list: position inside the bracketed list, the opening bracket being 0.
    """

    step: int
    operand: int
    name: str
    gap_index: int
    index: int
    character: str
    position_in_list: int

    @property
    def slot(self) -> int:
        """Where arrays have it among the tokens of its step and operand, whatever the length of the list."""
        return 2 * (self.gap_index - 1) + self.name.endswith("digit")


@dataclass(frozen=True)
class Task(abc.ABC):
    """The interface of a task; hashable, for it is a static part of compiled programs.

    A subclass says what it draws, its texts, and the problem of the longest texts. A task that knows its critical
    tokens has ``operand_lists`` and ``critical_tokens`` too; the others have none, and nothing is reported of them.
    Texts are of problems that ``problem`` or ``draw`` made.

    Attributes:
      name: word of config, and of a checkpoint's model.json.
      operator: the character between the operands, in the prompt and between the lists of ``operand_lists``.
      has_drafts: ``ckl_jax.rollout.drafts`` can write its answers, so that episodes may be generated speculatively.
      long_operands: which operands (1, 2) may be longer than in pre-training.
    """

    name: str
    operator: str

    @property
    def has_drafts(self) -> bool:
        return False

    @property
    def long_operands(self) -> tuple[int, ...]:
        return (1, 2)

    @abc.abstractmethod
    def problem(self, a: int, b: int) -> Problem:
        """The problem of these operands; raises ConfigError if the task has none."""

    @abc.abstractmethod
    def draw(self, rng: np.random.Generator, digits_a: int, digits_b: int) -> Problem:
        """A problem whose operands have those lengths, as far as the task allows; the digits are uniform."""

    @abc.abstractmethod
    def answer_text(self, problem: Problem) -> str:
        """The right answer, from its first newline to the one after the result."""

    @abc.abstractmethod
    def result_text(self, problem: Problem) -> str:
        """The line that decides the reward, without its newline: at most ``2 * digits + 1`` characters."""

    @abc.abstractmethod
    def longest(self, digits: int) -> Problem:
        """A problem of operands of up to ``digits`` digits whose prompt and answer are as long as any."""

    def prompt_text(self, problem: Problem) -> str:
        """What the policy is given; it ends right after the colon of ``Target:``."""
        return f"Input:\n{problem.a}{self.operator}{problem.b}\nTarget:"

    def operand_lists(self, problem: Problem) -> list[tuple[str, str]]:
        """The two bracketed lists that each scratchpad step starts with, where the task has such."""
        return []

    def critical_tokens(self, problem: Problem, max_pretrain_digits: int) -> list[CriticalToken]:
        """The known critical tokens of the right answer, for a model pre-trained on up to so many digits."""
        possible = is_integer(max_pretrain_digits) and max_pretrain_digits >= 1
        require(possible, "max_pretrain_digits", max_pretrain_digits, "1 or more")
        return []

    def max_prompt_length(self, digits: int) -> int:
        """Characters of the longest prompt with operands of up to ``digits`` digits."""
        return len(self.prompt_text(self._longest(digits)))

    def max_answer_length(self, digits: int, extra: int = EXTRA_LENGTH) -> int:
        """The length limit of an episode: the longest right answer for ``digits`` digits plus ``extra`` characters."""
        return len(self.answer_text(self._longest(digits))) + extra

    def longest_episode(self, digits: int, extra: int = EXTRA_LENGTH) -> int:
        """Characters that a model's block must hold: the longest prompt and the length limit of its answer."""
        return self.max_prompt_length(digits) + self.max_answer_length(digits, extra)

    def identical_problems(self, rng: np.random.Generator, count: int, digits: int) -> list[Problem]:
        """Evaluation problems whose operands both have ``digits`` digits (Table 4)."""
        _check_counts(count, digits)
        return [self.draw(rng, digits, digits) for _ in range(count)]

    def varying_problems(self, rng: np.random.Generator, count: int, digits: int) -> list[Problem]:
        """Evaluation problems with one operand of ``digits`` digits, the other of 1..``digits`` (Table 5)."""
        _check_counts(count, digits)
        return [self._place(rng, digits, int(rng.integers(1, digits + 1))) for _ in range(count)]

    def short_problems(self, rng: np.random.Generator, count: int, digits: int) -> list[Problem]:
        """Problems with both lengths uniform in 1..``digits``: is the old skill kept? (authors' code)."""
        _check_counts(count, digits)
        lengths = rng.integers(1, digits + 1, (count, 2))
        return [self.draw(rng, int(m), int(n)) for m, n in lengths]

    def rl_problems(self, rng: np.random.Generator, count: int, digits: int, max_pretrain_digits: int) -> list[Problem]:
        """RL problems (authors' sampling): one operand, on either side, has ``digits`` digits; the other's length is,
        with probability 1/2, uniform in 1..``max_pretrain_digits``, else in ``max_pretrain_digits + 1``..``digits``.
        """
        _check_counts(count, digits)
        possible = is_integer(max_pretrain_digits) and 1 <= max_pretrain_digits < digits
        require(possible, "max_pretrain_digits", max_pretrain_digits, f"1..{digits - 1} (below digits)")
        problems = []
        for _ in range(count):
            low, high = (1, max_pretrain_digits) if rng.random() < 0.5 else (max_pretrain_digits + 1, digits)
            problems.append(self._place(rng, digits, int(rng.integers(low, high + 1))))
        return problems

    def _place(self, rng: np.random.Generator, digits: int, other_digits: int) -> Problem:
        lengths = (digits, other_digits)
        first = rng.random() < 0.5 or 2 not in self.long_operands
        return self.draw(rng, *(lengths if first else lengths[::-1]))

    def _longest(self, digits: int) -> Problem:
        require_digits(digits)
        return self.longest(digits)


def require_digits(digits: int) -> None:
    """Raises ConfigError unless operands can have that many digits."""
    require(is_integer(digits) and 1 <= digits <= MAX_DIGITS, "digits", digits, f"1..{MAX_DIGITS}")


def draw_number(rng: np.random.Generator, digits: int) -> int:
    """A number of exactly ``digits`` digits; only one of a single digit may start with 0."""
    require_digits(digits)
    return int(rng.integers(0 if digits == 1 else 10 ** (digits - 1), 10**digits))


def _check_counts(count: int, digits: int) -> None:
    require(is_integer(count) and count >= 1, "count", count, "1 or more")
    require_digits(digits)
