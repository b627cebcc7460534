"""Problems as fixed-shape arrays: what the device needs to generate, judge and look at critical tokens.

All prompts end in the same column (they are padded on the left), so column t of every answer is its t-th character.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ckl_jax.errors import is_integer, require
from ckl_jax.tasks import alphabet
from ckl_jax.tasks.task import RESULT_MARK, Problem, Task

STEPS = 3
MEASURED = 1
Array = np.ndarray | jax.Array


@flax.struct.dataclass
class Problems:
    """Arrays of B problems (uint8 tokens, int32 numbers).

    Attributes:
      prompts_BxP: padded with ``PAD_ID`` on the left.
      prompt_lengths_B: characters of each prompt.
      results_BxR: the right result line with its newline, padded on the right.
      lists_Bx3x2xJ: the right operand lists of scratchpad steps 1 to 3, padded on the right.
      critical_Bx3x2xC: position in its list of each critical token, -1 where there is none. Slot C is
        ``2 * (k - 1)`` for ``n+k_comma`` and ``2 * (k - 1) + 1`` for ``n+k_digit``.
      episodes_B: identity of each episode for the sampling noise: two rows of one problem and one identity get one
        answer, so a group of answers to a problem needs identities of its own.
      task: what they are problems of; a static part, no array.
    """

    prompts_BxP: Array
    prompt_lengths_B: Array
    results_BxR: Array
    lists_Bx3x2xJ: Array
    critical_Bx3x2xC: Array
    episodes_B: Array
    task: Task = flax.struct.field(pytree_node=False)


def pack(task: Task, problems: Sequence[Problem], digits: int, max_pretrain_digits: int) -> Problems:
    """Problems of up to ``digits`` digits as arrays whose shapes depend on task, ``digits`` and the count alone.

    Raises:
      ConfigError: no problem, or an operand longer than ``digits``.
    """
    require(len(problems) > 0, "problems", len(problems), "1 or more")
    foreign = next((problem for problem in problems if not isinstance(problem, Problem)), None)
    require(foreign is None, "problems", foreign, "tasks.Problem")
    possible = is_integer(max_pretrain_digits) and max_pretrain_digits >= 1
    require(possible, "max_pretrain_digits", max_pretrain_digits, "1 or more")
    longest = max(len(str(max(problem.a, problem.b))) for problem in problems)
    require(longest <= digits, "problems", f"an operand of {longest} digits", f"up to {digits} digits")
    count, slots = len(problems), 2 * max(0, digits - max_pretrain_digits)
    prompts_BxP = np.full((count, task.max_prompt_length(digits)), alphabet.PAD_ID, np.uint8)
    results_BxR = np.full((count, 2 * (digits + 1)), alphabet.PAD_ID, np.uint8)
    lists_Bx3x2xJ = np.full((count, STEPS, 2, 2 * digits + 1), alphabet.PAD_ID, np.uint8)
    critical_Bx3x2xC = np.full((count, STEPS, 2, slots), -1, np.int32)
    lengths_B = np.zeros(count, np.int32)
    for row, problem in enumerate(problems):
        problem = task.problem(problem.a, problem.b)
        prompt = alphabet.encode(task.prompt_text(problem))
        result = alphabet.encode(task.result_text(problem) + "\n")
        _require_room(task, "prompt", prompt, prompts_BxP.shape[1])
        _require_room(task, "result", result, results_BxR.shape[1])
        lengths_B[row] = len(prompt)
        prompts_BxP[row, -len(prompt) :] = prompt
        results_BxR[row, : len(result)] = result
        for step, pair in enumerate(task.operand_lists(problem)[:STEPS]):
            for operand, text in enumerate(pair):
                lists_Bx3x2xJ[row, step, operand, : len(text)] = alphabet.encode(text)
        for token in task.critical_tokens(problem, max_pretrain_digits):
            critical_Bx3x2xC[row, token.step - 1, token.operand - 1, token.slot] = token.position_in_list
    episodes_B = np.arange(count, dtype=np.int32)
    return Problems(prompts_BxP, lengths_B, results_BxR, lists_Bx3x2xJ, critical_Bx3x2xC, episodes_B, task)


def _require_room(task: Task, what: str, tokens: np.ndarray, room: int) -> None:
    allowed = f"one whose longest() has the longest prompt, and results of at most 2 * digits + 1 (here: {room})"
    require(len(tokens) <= room, "task", f"{task.name} with a {what} of {len(tokens)} characters", allowed)


def rows(problems: Problems, start: int, count: int) -> Problems:
    """At most ``count`` of the problems, from number ``start`` on; their identities for the noise stay."""
    return jax.tree.map(lambda x: x[start : start + count], problems)


def measured_on(seed: int, digits: int) -> np.random.Generator:
    """Draws the problems that a model is measured on, for each seed and number of digits its own.

    They are apart from those of RL's rounds, which two numbers give (seed and round): a policy may have learned these.
    """
    return np.random.default_rng([seed, digits, MEASURED])


def reward(answers_BxT: jax.Array, results_BxR: jax.Array) -> jax.Array:
    """1 where the line after ``</scratch>`` equals the right result, else 0: float32 [B].

    Args:
      answers_BxT: generated answers; what stands after their end (the line's newline or ``PAD_ID``) does not count.
        The line counts only with its newline.
      results_BxR: from ``Problems``.
    """
    padding_BxT = answers_BxT == alphabet.PAD_ID
    answers_BxT = jnp.where(jnp.cumsum(padding_BxT, axis=1) == 0, answers_BxT, alphabet.PAD_ID)
    starts_B, found_B = result_start(answers_BxT)
    width = results_BxR.shape[1]
    padded = jnp.pad(answers_BxT, ((0, 0), (0, width)), constant_values=alphabet.PAD_ID)
    line_BxR = jnp.take_along_axis(padded, starts_B[:, None] + jnp.arange(width)[None], axis=1)
    right_BxR = (line_BxR == results_BxR) | (results_BxR == alphabet.PAD_ID)
    return (found_B & right_BxR.all(axis=1)).astype(jnp.float32)


def result_start(answers_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Index of the first character after the first ``</scratch>`` line, and whether there is one: [B], [B]."""
    mark = alphabet.encode(RESULT_MARK).astype(np.int32)
    padded = jnp.pad(answers_BxT, ((0, 0), (0, len(mark))), constant_values=alphabet.PAD_ID)
    length = answers_BxT.shape[1]
    hits_BxT = jnp.stack([padded[:, i : i + length] == mark[i] for i in range(len(mark))]).all(axis=0)
    return hits_BxT.argmax(axis=1) + len(mark), hits_BxT.any(axis=1)


def critical_indices(answers_BxT: jax.Array, problems: Problems) -> tuple[jax.Array, jax.Array]:
    """Where the policy's own answers meet critical tokens.

    The t-th line is found in the generated text itself, and the second operand behind the line's first operator. A
    critical token counts only while that operand's lists were copied rightly up to it, in this step and the steps
    before (authors' code).

    Returns:
      indices_Bx3x2xC: index in the answer (0 where not recorded), recorded_Bx3x2xC: bool.
    """
    batch, length = answers_BxT.shape
    newline_BxT = answers_BxT == alphabet.NEWLINE_ID
    lines_BxT = jnp.cumsum(newline_BxT, axis=1)
    operator_BxT = answers_BxT == alphabet.VOCABULARY.index(problems.task.operator)
    columns = jnp.arange(length)
    starts = []
    for step in range(STEPS):
        of_line_BxT = lines_BxT == step + 2
        line_B = jnp.where(of_line_BxT & newline_BxT, columns[None], length).min(axis=1) + 1
        operator_B = jnp.where(of_line_BxT & operator_BxT, columns[None], length).min(axis=1)
        starts.append(jnp.stack([line_B, operator_B + 2], axis=1))
    starts_Bx3x2 = jnp.stack(starts, axis=1)
    width = problems.lists_Bx3x2xJ.shape[3]
    at_Bx3x2xJ = starts_Bx3x2[..., None] + jnp.arange(width)[None, None, None]
    padded = jnp.pad(answers_BxT, ((0, 0), (0, width + 3)), constant_values=alphabet.PAD_ID)
    written = jnp.take_along_axis(padded, at_Bx3x2xJ.reshape(batch, -1), axis=1).reshape(at_Bx3x2xJ.shape)
    right_Bx3x2xJ = (written == problems.lists_Bx3x2xJ) | (problems.lists_Bx3x2xJ == alphabet.PAD_ID)
    all_right_Bx3x2 = right_Bx3x2xJ.all(axis=3)
    earlier_right = jnp.cumprod(all_right_Bx3x2, axis=1)[:, :-1].astype(bool)
    earlier_Bx3x2 = jnp.concatenate([jnp.ones((batch, 1, 2), bool), earlier_right], axis=1)
    prefix_Bx3x2xJ = jnp.cumprod(right_Bx3x2xJ, axis=3).astype(bool)
    position = jnp.asarray(problems.critical_Bx3x2xC)
    before = jnp.take_along_axis(prefix_Bx3x2xJ, jnp.maximum(position - 1, 0), axis=3)
    indices = starts_Bx3x2[..., None] + position
    recorded = (position >= 0) & before & earlier_Bx3x2[..., None] & (indices < length)
    return jnp.where(recorded, indices, 0), recorded


def critical_mask(answers_BxT: jax.Array, problems: Problems) -> jax.Array:
    """True where a recorded critical token stands (see ``critical_indices``), or what is written in its place.

    Args:
      answers_BxT: the policy's own.

    Returns:
      bool [B, T].
    """
    batch, length = answers_BxT.shape
    indices_BxNx1, recorded_BxNx1 = (x.reshape(batch, -1, 1) for x in critical_indices(answers_BxT, problems))
    return ((indices_BxNx1 == jnp.arange(length)[None, None]) & recorded_BxNx1).any(axis=1)


def overlong_mask(answers_BxT: jax.Array, digits: int) -> jax.Array:
    """True where a list, or the result after ``</scratch>``, has come to ``digits`` digits, this character included.

    With the N of a pre-trained model: where a number becomes as long as its longest operands were, or longer, whatever
    the policy has written there. The bracket that ends a list belongs to it.

    Returns:
      bool [B, T].
    """
    length = answers_BxT.shape[1]
    columns = jnp.arange(length)[None]
    opening_BxT, closing_BxT = answers_BxT == alphabet.OPENING_ID, answers_BxT == alphabet.CLOSING_ID
    digit_BxT = alphabet.is_digit(answers_BxT)
    starts_B, found_B = result_start(answers_BxT)
    in_result_BxT = found_B[:, None] & (columns >= starts_B[:, None])

    def latest(where_BxT, values_BxT):
        return jax.lax.cummax(jnp.where(where_BxT, values_BxT, -1), axis=1)

    opened_BxT, closed_BxT = latest(opening_BxT, columns), latest(closing_BxT, columns)
    in_list_BxT = opened_BxT > jnp.pad(closed_BxT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    count_BxT = jnp.cumsum(digit_BxT, axis=1)
    begins_BxT = opening_BxT | (found_B[:, None] & (columns == starts_B[:, None] - 1))
    return (in_list_BxT | in_result_BxT) & (count_BxT - latest(begins_BxT, count_BxT) >= digits)


def critical_characters(problems: Problems) -> jax.Array:
    """The right character at each critical token: int32 [B, 3, 2, C]."""
    at = jnp.maximum(jnp.asarray(problems.critical_Bx3x2xC), 0)
    return jnp.take_along_axis(jnp.asarray(problems.lists_Bx3x2xJ), at, axis=3).astype(jnp.int32)
