"""The task: adding two integers with a scratchpad, one character per token (paper, section 3.1 and appendix A).

An episode is a prompt (``Input:⏎357+68⏎Target:``) and an answer that starts and ends with a newline. The texts equal
the ones of the authors' template character by character, and so do the critical tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ckl_jax.errors import ConfigError, is_integer, require

PAD = "%"
VOCABULARY = PAD + "\n +,-/0123456789:<=>ACDEINT[]aceghnprstu"
VOCAB_SIZE = len(VOCABULARY)
PAD_ID = 0
NEWLINE_ID = VOCABULARY.index("\n")
RESULT_MARK = "</scratch>\n"
EXTRA_LENGTH = 100
MAX_DIGITS = 18
MOST_SHOWN = 5
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""Shown for a token of a converted model that is none of ours."""

_ID_OF = {character: index for index, character in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class Problem:
    """An addition ``a + b`` of two non-negative integers."""

    a: int
    b: int

    def __post_init__(self) -> None:
        for name, value in (("a", self.a), ("b", self.b)):
            fits = is_integer(value) and 0 <= value < 10**MAX_DIGITS
            require(fits, name, value, f"an integer from 0 to below 10^{MAX_DIGITS} ({MAX_DIGITS} digits)")


@dataclass(frozen=True)
class CriticalToken:
    """One critical token of a right answer (paper, section 3.3; authors' code, steps 1 to 3).

    Attributes:
      step: scratchpad line, counted from 1.
      operand: 1 or 2.
      name: ``n+k_comma`` or ``n+k_digit``.
      gap_index: that k; the list's last element is the gap-th beyond the pre-training length.
      index: position in ``answer_text(a, b)``.
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


def encode(text: str) -> np.ndarray:
    """Characters to tokens: uint8 [len(text)]. Raises ConfigError for a character outside ``VOCABULARY``."""
    require(isinstance(text, str), "text", type(text).__name__, "a str")
    unknown = sorted(set(text) - set(VOCABULARY))[:MOST_SHOWN]
    require(not unknown, "text", unknown, f"characters of {VOCABULARY!r}")
    return np.array([_ID_OF[character] for character in text], np.uint8)


def decode(tokens: Sequence[int] | np.ndarray, *, beyond: str = "") -> str:
    """Tokens [T] to characters.

    Args:
      beyond: what stands for each token of ``VOCAB_SIZE`` and more, which a converted model may know; "": none may be.

    Raises:
      ConfigError: a token outside ``0..VOCAB_SIZE-1``; or, with ``beyond``, below 0.
    """
    try:
        tokens_T = np.asarray(tokens)
    except ValueError as error:
        raise ConfigError("tokens: got rows of several lengths, allowed is one axis of integers") from error
    whole = tokens_T.ndim == 1 and (not tokens_T.size or np.issubdtype(tokens_T.dtype, np.integer))
    require(whole, "tokens", f"shape {tokens_T.shape} of {tokens_T.dtype}", "one axis of integers")
    if tokens_T.size:
        low, high = tokens_T.min(), tokens_T.max()
        inside = low >= 0 and (high < VOCAB_SIZE or beyond != "")
        require(bool(inside), "tokens", f"{low}..{high}", f"0..{VOCAB_SIZE - 1} (the vocabulary)")
    return "".join(VOCABULARY[token] if token < VOCAB_SIZE else beyond for token in tokens_T)


def prompt_text(a: int, b: int) -> str:
    """What the policy is given; it ends right after the colon of ``Target:``."""
    Problem(a, b)
    return f"Input:\n{a}+{b}\nTarget:"


def answer_text(a: int, b: int) -> str:
    """The right answer: a scratchpad line per digit of the longer operand, then the result's digits."""
    Problem(a, b)
    lines, _ = _scratchpad(a, b)
    result = " ".join(str(a + b))
    return "\n<scratch>\n" + "".join(line + "\n" for line in lines) + RESULT_MARK + result + "\n"


def result_text(a: int, b: int) -> str:
    """The line that decides the reward: the result's digits separated by spaces, without the newline."""
    return " ".join(str(a + b))


def _bracket(digits: Sequence[int]) -> str:
    return "[" + ",".join(map(str, digits)) + "]"


def _scratchpad(a: int, b: int) -> tuple[list[str], list[tuple[str, str]]]:
    """The scratchpad's lines, and each step's two operand lists as they are printed at the line's start."""
    digits_a, digits_b = [int(c) for c in str(a)], [int(c) for c in str(b)]
    total: list[int] = []
    carry, lines, lists = 0, [], []
    while digits_a or digits_b:
        last_a, last_b = (digits_a[-1] if digits_a else 0), (digits_b[-1] if digits_b else 0)
        column = last_a + last_b + carry
        lists.append((_bracket(digits_a), _bracket(digits_b)))
        lines.append(
            f"{lists[-1][0]} + {lists[-1][1]} , A={_bracket(total)} , C={carry} , "
            f"{last_a}+{last_b}+{carry}={column} , A->{column % 10} , C->{column // 10}"
        )
        total = [column % 10, *total]
        carry, digits_a, digits_b = column // 10, digits_a[:-1], digits_b[:-1]
    lines.append(f"[] + [] , A={_bracket(total)} C={carry} , END")
    return lines, lists


def operand_lists(a: int, b: int) -> list[tuple[str, str]]:
    """The two bracketed digit lists that each scratchpad step starts with, the closing line left out."""
    return _scratchpad(a, b)[1]


def critical_tokens(a: int, b: int, max_pretrain_digits: int) -> list[CriticalToken]:
    """The critical tokens of the right answer for a model pre-trained on up to ``max_pretrain_digits`` digits.

    In steps 1, 2 and 3, for each operand longer than that by ``gap`` > 0: the last ``2 * gap`` characters before the
    closing bracket of the operand's list, ordered from the bracket backwards.
    """
    Problem(a, b)
    possible = is_integer(max_pretrain_digits) and max_pretrain_digits >= 1
    require(possible, "max_pretrain_digits", max_pretrain_digits, "1 or more")
    lines, lists = _scratchpad(a, b)
    found = []
    line_start = len("\n<scratch>\n")
    for step, (line, (list_a, list_b)) in enumerate(zip(lines[:3], lists[:3], strict=False), start=1):
        list_starts = (line_start, line_start + len(list_a) + len(" + "))
        for operand, (value, text, start) in enumerate(zip((a, b), (list_a, list_b), list_starts, strict=True), 1):
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


def _require_digits(digits: int) -> None:
    require(is_integer(digits) and 1 <= digits <= MAX_DIGITS, "digits", digits, f"1..{MAX_DIGITS}")


def max_prompt_length(digits: int) -> int:
    """Characters of the longest prompt with operands of up to ``digits`` digits."""
    _require_digits(digits)
    return len(prompt_text(10**digits - 1, 10**digits - 1))


def max_answer_length(digits: int, extra: int = EXTRA_LENGTH) -> int:
    """The length limit of an episode: the longest right answer for ``digits`` digits plus ``extra`` characters."""
    _require_digits(digits)
    return len(answer_text(10**digits - 1, 10**digits - 1)) + extra


def _draw(rng: np.random.Generator, digits: int) -> int:
    return int(rng.integers(0 if digits == 1 else 10 ** (digits - 1), 10**digits))


def problem_of_lengths(rng: np.random.Generator, digits_a: int, digits_b: int) -> Problem:
    """A problem whose operands have exactly those lengths; only a 1-digit number may start with 0."""
    for digits in (digits_a, digits_b):
        _require_digits(digits)
    return Problem(_draw(rng, digits_a), _draw(rng, digits_b))


def _check_counts(count: int, digits: int) -> None:
    require(is_integer(count) and count >= 1, "count", count, "1 or more")
    _require_digits(digits)


def identical_problems(rng: np.random.Generator, count: int, digits: int) -> list[Problem]:
    """Evaluation problems whose operands both have ``digits`` digits (Table 4)."""
    _check_counts(count, digits)
    return [problem_of_lengths(rng, digits, digits) for _ in range(count)]


def varying_problems(rng: np.random.Generator, count: int, digits: int) -> list[Problem]:
    """Evaluation problems with one operand of ``digits`` digits, the other of 1..``digits`` (Table 5)."""
    _check_counts(count, digits)
    return [_place(rng, digits, int(rng.integers(1, digits + 1))) for _ in range(count)]


def short_problems(rng: np.random.Generator, count: int, digits: int) -> list[Problem]:
    """Problems with both lengths uniform in 1..``digits``: is the old skill kept? (authors' code)."""
    _check_counts(count, digits)
    lengths = rng.integers(1, digits + 1, (count, 2))
    return [problem_of_lengths(rng, int(m), int(n)) for m, n in lengths]


def rl_problems(rng: np.random.Generator, count: int, digits: int, max_pretrain_digits: int) -> list[Problem]:
    """RL problems (authors' sampling): one operand, on either side, has ``digits`` digits; the other's length is,
    with probability 1/2, uniform in 1..``max_pretrain_digits``, else in ``max_pretrain_digits + 1``..``digits``.
    """
    _check_counts(count, digits)
    possible = is_integer(max_pretrain_digits) and 1 <= max_pretrain_digits < digits
    require(possible, "max_pretrain_digits", max_pretrain_digits, f"1..{digits - 1} (below digits)")
    problems = []
    for _ in range(count):
        low, high = (1, max_pretrain_digits) if rng.random() < 0.5 else (max_pretrain_digits + 1, digits)
        problems.append(_place(rng, digits, int(rng.integers(low, high + 1))))
    return problems


def _place(rng: np.random.Generator, digits: int, other_digits: int) -> Problem:
    lengths = (digits, other_digits)
    return problem_of_lengths(rng, *(lengths if rng.random() < 0.5 else lengths[::-1]))
