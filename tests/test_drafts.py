"""Drafts against the task's own texts, after right and wrong beginnings."""

import json
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckl_jax import tasks
from ckl_jax.rollout import drafts
from ckl_jax.tasks import alphabet
from ckl_jax.tasks import problems as problems_lib
from ckl_jax.tasks.columns import ADDITION, MULTIPLICATION, SUBTRACTION

GOLDEN = json.loads((pathlib.Path(__file__).parent / "data" / "scratchpads.json").read_text())
DIGITS, LENGTH, WINDOW, ROWS = 9, 700, 80, 64
draft = jax.jit(drafts.draft, static_argnums=(0, 4))


def drafted(pair, texts, task=ADDITION):
    """The draft's characters after each of a problem's texts, padding stripped."""
    lists = problems_lib.pack(task, [tasks.Problem(*pair)] * ROWS, DIGITS, 2).lists_Bx3x2xJ[:, 0]
    drafted = []
    for start in range(0, len(texts), ROWS):
        answers, known = np.zeros((ROWS, LENGTH), np.int32), np.zeros(ROWS, np.int32)
        group = texts[start : start + ROWS]
        for row, text in enumerate(group):
            answers[row, : len(text)] = alphabet.encode(text)
            known[row] = len(text)
        tokens = np.array(draft(task, lists, answers, known, WINDOW))[: len(group)]
        drafted += [alphabet.decode(row).rstrip(alphabet.PAD) for row in tokens]
    return drafted


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['a']}+{case['b']}")
def test_after_every_right_beginning_the_draft_is_the_golden_texts_next_window(case):
    a, b = case["a"], case["b"]
    answer = ADDITION.answer_text(tasks.Problem(a, b))
    lengths = range(0, len(answer) + 1, 1 if len(answer) < 500 else 7)
    got = drafted((a, b), [answer[:length] for length in lengths])
    assert got == [answer[length : length + WINDOW] for length in lengths]


@pytest.mark.parametrize(
    ("task", "a", "b"),
    [
        (SUBTRACTION, 7, 7),
        (SUBTRACTION, 900, 199),
        (SUBTRACTION, 5020, 4987),
        (SUBTRACTION, 100200, 99),
        (MULTIPLICATION, 0, 9),
        (MULTIPLICATION, 999, 9),
        (MULTIPLICATION, 3700, 0),
        (MULTIPLICATION, 100203, 4),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_other_tasks_are_drafted_to_their_end_from_every_right_beginning(task, a, b):
    answer = task.answer_text(task.problem(a, b))
    got = drafted((a, b), [answer[:length] for length in range(len(answer) + 1)], task)
    assert got == [answer[length : length + WINDOW] for length in range(len(answer) + 1)]


def test_what_is_borrowed_or_carried_wrongly_goes_into_the_next_line():
    line = "\n<scratch>\n[3,5,7] - [6,8] , A=[] , C=0 , 7-8-0=-1 , A->9 , C->0\n"
    assert drafted((357, 68), [line], SUBTRACTION)[0].startswith("[3,5] - [6] , A=[9] , C=0 , 5-6-0=-1 , A->9 , C->1\n")
    line = "\n<scratch>\n[3,5,7] T [8] , A=[] , C=0 , 7T8+0=56 , A->6 , C->4\n"
    got = drafted((357, 8), [line], MULTIPLICATION)[0]
    assert got.startswith("[3,5] T [8] , A=[6] , C=4 , 5T8+4=44 , A->4 , C->4\n[3] T [8]")


def continued(text, right_a, b, own_a):
    """A text that leaves ``right_a + b`` for ``own_a + b`` at its end, and what a faithful draft says next."""
    own = ADDITION.answer_text(tasks.Problem(own_a, b))
    assert own.startswith(text)
    assert not ADDITION.answer_text(tasks.Problem(right_a, b)).startswith(text)
    return own[len(text) : len(text) + WINDOW]


@pytest.mark.parametrize(
    ("a", "own_a", "cut"),
    [
        (123456, 12345, "[1,2,3,4,5]"),
        (123456, 12346, "[1,2,3,4,6]"),
        (123456, 123466, "[1,2,3,4,6"),
        (123456, 12346, "[1,2,3,4,6] + [7,8] , A=[] , C=0 , 6+8+0=14 , A->4 , C->1\n"),
        (123456, 12346, "[1,2,3,4,6] + [7,8] , A=[] , C=0 , 6+8+0=14 , A->4 , C->1\n[1,2,3"),
    ],
)
def test_a_policy_that_miscopied_a_list_is_expected_to_go_on_with_its_own(a, own_a, cut):
    text = f"\n<scratch>\n{cut}"
    assert drafted((a, 78), [text]) == [continued(text, a, 78, own_a)]


def test_a_wrong_digit_or_carry_that_was_written_goes_into_the_next_line():
    line = "\n<scratch>\n[3,5,7] + [6,8] , A=[] , C=0 , 7+8+0=15 , A->9 , C->0\n"
    assert drafted((357, 68), [line])[0].startswith("[3,5] + [6] , A=[9] , C=0 , 5+6+0=11 , A->1 , C->1\n[3] + []")


def test_the_result_repeats_the_end_lines_list_and_nothing_follows():
    wrong = (
        ADDITION.answer_text(tasks.Problem(357, 68)).replace("A=[4,2,5] C=0", "A=[4,7,5] C=0").removesuffix("4 2 5\n")
    )
    got = drafted((357, 68), [wrong, wrong + "4 7", wrong + "4 7 5\n"])
    assert got == ["4 7 5\n", " 5\n", ""]


def test_a_carry_out_of_the_last_column_leads_the_result():
    answer = ADDITION.answer_text(tasks.Problem(99, 1))
    start = answer.index("</scratch>")
    assert drafted((99, 1), [answer[:start]]) == ["</scratch>\n1 0 0\n"]


@given(st.lists(st.integers(0, alphabet.VOCAB_SIZE - 1), min_size=30, max_size=120))
@settings(max_examples=50, deadline=None)
def test_any_text_gets_some_draft_of_the_vocabularys_characters(tokens):
    answers = np.zeros((ROWS, LENGTH), np.int32)
    answers[0, : len(tokens)] = tokens
    lists = problems_lib.pack(ADDITION, [tasks.Problem(123456, 78)] * ROWS, DIGITS, 2).lists_Bx3x2xJ[:, 0]
    result = np.array(draft(ADDITION, lists, answers, np.full(ROWS, len(tokens), np.int32), WINDOW))
    assert result.shape == (ROWS, WINDOW)
    assert result.min() >= 0
    assert result.max() < alphabet.VOCAB_SIZE
