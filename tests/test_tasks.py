"""Subtraction and multiplication: texts written by hand, what they draw and refuse, and a task of another kind."""

import dataclasses
import itertools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from policies import SCRIPT_MODEL, scripted_policy

from ckl_jax import tasks
from ckl_jax.checkpoint.store import Model
from ckl_jax.config import FinetuneConfig
from ckl_jax.errors import ConfigError
from ckl_jax.rl.program import make_program
from ckl_jax.rollout import generation
from ckl_jax.rollout.trajectory import Sampling
from ckl_jax.tasks import alphabet, catalog, problems
from ckl_jax.tasks.catalog import task_named
from ckl_jax.tasks.columns import ADDITION, MULTIPLICATION, SUBTRACTION

SUBTRACTED = """
<scratch>
[5,0,2] - [4,9,7] , A=[] , C=0 , 2-7-0=-5 , A->5 , C->1
[5,0] - [4,9] , A=[5] , C=1 , 0-9-1=-10 , A->0 , C->1
[5] - [4] , A=[0,5] , C=1 , 5-4-1=0 , A->0 , C->0
[] - [] , A=[0,0,5] C=0 , END
</scratch>
5
"""
MULTIPLIED = """
<scratch>
[3,5,7] T [8] , A=[] , C=0 , 7T8+0=56 , A->6 , C->5
[3,5] T [8] , A=[6] , C=5 , 5T8+5=45 , A->5 , C->4
[3] T [8] , A=[5,6] , C=4 , 3T8+4=28 , A->8 , C->2
[] T [8] , A=[8,5,6] C=2 , END
</scratch>
2 8 5 6
"""


def rng():
    return np.random.default_rng(0)


def test_the_texts_are_those_written_by_hand():
    assert SUBTRACTION.prompt_text(SUBTRACTION.problem(502, 497)) == "Input:\n502-497\nTarget:"
    assert SUBTRACTION.answer_text(SUBTRACTION.problem(502, 497)) == SUBTRACTED
    assert MULTIPLICATION.prompt_text(MULTIPLICATION.problem(357, 8)) == "Input:\n357T8\nTarget:"
    assert MULTIPLICATION.answer_text(MULTIPLICATION.problem(357, 8)) == MULTIPLIED


@pytest.mark.parametrize("task", [ADDITION, SUBTRACTION, MULTIPLICATION], ids=lambda task: task.name)
def test_the_result_is_the_operations_and_the_scratchpads_list_has_its_digits(task):
    operation = {"addition": int.__add__, "subtraction": int.__sub__, "multiplication": int.__mul__}[task.name]
    for problem in task.short_problems(rng(), 300, 4):
        answer = task.answer_text(problem)
        result = operation(problem.a, problem.b)
        assert answer.endswith(f"</scratch>\n{' '.join(str(result))}\n")
        end = answer.split("\n")[-4]
        listed, carry = end.split("A=[")[1].split("] C=")[0], end.split("C=")[1][0]
        assert int(carry + listed.replace(",", "")) == result
        alphabet.encode(task.prompt_text(problem) + answer)


@pytest.mark.parametrize("digits", [1, 2])
def test_no_answer_is_longer_than_the_longest(digits):
    for task in (SUBTRACTION, MULTIPLICATION):
        pairs = itertools.product(range(10**digits), range(10 if task.repeats_second else 10**digits))
        lengths = [len(task.answer_text(task.problem(a, b))) for a, b in pairs if not task.larger_first or b <= a]
        assert max(lengths) == task.max_answer_length(digits, extra=0)


def test_three_digits_borrow_nearly_everywhere_in_the_longest_subtraction():
    longest = max(
        len(SUBTRACTION.answer_text(SUBTRACTION.problem(a, b))) for a in range(900, 1000) for b in range(100, a + 1, 3)
    )
    assert (
        longest
        <= SUBTRACTION.max_answer_length(3, extra=0)
        == len(SUBTRACTION.answer_text(SUBTRACTION.problem(900, 199)))
    )


def test_problems_keep_to_what_the_operation_takes():
    for draw in (SUBTRACTION.identical_problems, SUBTRACTION.varying_problems, SUBTRACTION.short_problems):
        assert all(problem.b <= problem.a for problem in draw(rng(), 200, 3))
    drawn = MULTIPLICATION.rl_problems(rng(), 300, 4, 3)
    assert {len(str(problem.a)) for problem in drawn} == {4}
    assert {problem.b for problem in drawn} == set(range(1, 10))
    lengths = [len(str(problem.a)) for problem in MULTIPLICATION.short_problems(rng(), 600, 3)]
    np.testing.assert_allclose(np.bincount(lengths)[1:] / 600, 1 / 3, atol=0.06)


@pytest.mark.parametrize(
    ("task", "a", "b", "said"),
    [
        (SUBTRACTION, 3, 4, "b: got 4, allowed is at most a = 3, which subtraction starts with"),
        (MULTIPLICATION, 3, 10, "b: got 10, allowed is one digit with multiplication"),
        (SUBTRACTION, -1, 0, r"a: got -1, allowed is an integer from 0 to below 10\^18"),
    ],
)
def test_other_operands_are_refused(task, a, b, said):
    with pytest.raises(ConfigError, match=f"^{said}"):
        task.problem(a, b)
    with pytest.raises(ConfigError, match=f"^{said}"):
        problems.pack(task, [tasks.Problem(a, b)], 2, 1)


def test_an_unknown_task_is_refused_and_the_known_ones_are_named():
    assert [task_named(name).name for name in catalog.TASKS] == list(catalog.TASKS)
    assert get_args(catalog.TaskName) == tuple(catalog.TASKS)
    allowed = r" \| ".join(catalog.TASKS)
    with pytest.raises(ConfigError, match=rf"^task: got 'division', allowed is {allowed}$"):
        task_named("division")


def test_critical_tokens_lie_in_the_lists_that_are_longer_than_in_pretraining():
    found = MULTIPLICATION.critical_tokens(MULTIPLICATION.problem(357, 8), 2)
    assert [(token.step, token.operand, token.character) for token in found] == [
        (1, 1, "7"),
        (1, 1, ","),
        (2, 1, "5"),
        (2, 1, ","),
        (3, 1, "3"),
    ]
    assert all(MULTIPLIED[token.index] == token.character for token in found)
    found = SUBTRACTION.critical_tokens(SUBTRACTION.problem(502, 497), 2)
    assert {(token.step, token.operand) for token in found} == set(itertools.product((1, 2, 3), (1, 2)))
    assert all(SUBTRACTED[token.index] == token.character for token in found)


@pytest.mark.parametrize(("task", "pair"), [(SUBTRACTION, (502, 497)), (MULTIPLICATION, (357, 8))])
def test_the_device_judges_an_answer_and_meets_its_critical_tokens(task, pair):
    right = task.answer_text(task.problem(*pair))
    packed = problems.pack(task, [task.problem(*pair)], 3, 2)
    answers_1xT = jnp.asarray(alphabet.encode(right)[None].astype(np.int32))
    assert problems.reward(answers_1xT, jnp.asarray(packed.results_BxR).astype(jnp.int32)).tolist() == [1]
    assert problems.reward(answers_1xT.at[0, -2].add(1), jnp.asarray(packed.results_BxR)).tolist() == [0]
    indices, recorded = problems.critical_indices(answers_1xT, packed)
    expected = sorted(token.index for token in task.critical_tokens(task.problem(*pair), 2))
    assert sorted(np.asarray(indices)[np.asarray(recorded)].tolist()) == expected
    characters = np.asarray(problems.critical_characters(packed))[np.asarray(recorded)]
    assert sorted(alphabet.decode(characters)) == sorted(right[index] for index in expected)


@dataclasses.dataclass(frozen=True)
class Maximum(tasks.Task):
    """The larger of two numbers, without a scratchpad: a task that someone else writes."""

    def problem(self, a, b):
        return tasks.Problem(a, b)

    def draw(self, rng, digits_a, digits_b):
        return tasks.Problem(tasks.draw_number(rng, digits_a), tasks.draw_number(rng, digits_b))

    def answer_text(self, problem):
        return f"\n{tasks.RESULT_MARK}{self.result_text(problem)}\n"

    def result_text(self, problem):
        return str(max(problem.a, problem.b))

    def longest(self, digits):
        return tasks.Problem(10**digits - 1, 10**digits - 1)


def test_a_task_of_another_kind_is_generated_and_judged_without_critical_tokens_or_drafts():
    task = Maximum("maximum", ">")
    assert problems.pack(task, task.varying_problems(rng(), 200, 4), 4, 2).prompts_BxP.shape[0] == 200
    packed = problems.pack(task, [task.problem(3, 7), task.problem(8, 1)], 1, 1)
    params = scripted_policy(task.answer_text(task.problem(3, 7)), len(task.prompt_text(task.problem(3, 7))))
    sampling = Sampling(task.max_answer_length(1, 2), temperature=0.01)
    generated = generation.generate(SCRIPT_MODEL, params, packed, jax.random.key(0), sampling)
    assert generated.trajectory.reward_B.tolist() == [1, 0]
    assert not problems.critical_indices(generated.trajectory.answers_BxT, packed)[1].any()
    with pytest.raises(ConfigError, match=r"^drafter: got None, allowed is one: maximum has no drafts of its own"):
        generation.generate(SCRIPT_MODEL, params, packed, jax.random.key(0), sampling, how="speculative")


def test_a_speculative_rollout_of_a_task_without_drafts_is_refused_before_anything_runs():
    model = Model(SCRIPT_MODEL, 1, {}, Maximum("maximum", ">"))
    assert make_program(FinetuneConfig(), model).task == model.task
    with pytest.raises(ConfigError) as error:
        make_program(FinetuneConfig(rollout="speculative"), model)
    assert str(error.value) == "rollout: got 'speculative', allowed is auto or plain: maximum has no drafts"


class ShortPrompts(Maximum):
    """Says that its longest prompt is shorter than it is."""

    def longest(self, digits):
        return tasks.Problem(10**digits - 1, 0)


def test_a_task_that_is_wrong_about_its_longest_prompt_is_told_so():
    said = r"^task: got 'short with a prompt of 28 characters', allowed is one whose longest\(\) has the longest prompt"
    with pytest.raises(ConfigError, match=said):
        problems.pack(ShortPrompts("short", ">"), [tasks.Problem(123456, 654321)], 6, 5)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint64])
def test_a_problem_of_numpys_integers_is_that_of_pythons(dtype):
    for task, b in ((ADDITION, 77), (SUBTRACTION, 77), (MULTIPLICATION, 7)):
        problem, same = tasks.Problem(dtype(99), dtype(b)), tasks.Problem(99, b)
        assert problem == same
        assert task.answer_text(problem) == task.answer_text(same)
        assert task.problem(dtype(99), dtype(b)) == task.problem(99, b)
