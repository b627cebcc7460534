"""Packing, reward and critical positions against plain-Python judges of the generated text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckl_jax import tasks
from ckl_jax.rollout import trajectory
from ckl_jax.tasks import alphabet, problems
from ckl_jax.tasks.columns import ADDITION

DIGITS = 4
LENGTH = ADDITION.max_answer_length(DIGITS, extra=12)
RIGHT = ADDITION.answer_text(tasks.Problem(1234, 5678))
PACKED = problems.pack(ADDITION, [tasks.Problem(1234, 5678)], DIGITS, 2)
TOKENS = ADDITION.critical_tokens(tasks.Problem(1234, 5678), 2)
judge_on_device = jax.jit(problems.reward)
mask_on_device = jax.jit(trajectory.answer_mask)
find_critical = jax.jit(problems.critical_indices)
overlong_on_device = jax.jit(problems.overlong_mask)


def as_array(*texts):
    return jnp.stack([alphabet.encode(text.ljust(LENGTH, alphabet.PAD)[:LENGTH]) for text in texts]).astype(jnp.int32)


def rewards(problem, *texts):
    packed = problems.pack(ADDITION, [problem] * len(texts), DIGITS, 2)
    return judge_on_device(as_array(*texts), packed.results_BxR).tolist()


def judge(problem, text):
    _, mark, after = text.split(alphabet.PAD)[0][:LENGTH].partition("</scratch>\n")
    line, newline, _ = after.partition("\n")
    return float(bool(mark) and bool(newline) and line == " ".join(str(problem.a + problem.b)))


@functools.cache
def right_documents():
    pairs = [(0, 0), (5, 7), (99, 1), (9999, 9999), (1234, 5678), (7, 1000)]
    return [(tasks.Problem(a, b), ADDITION.answer_text(tasks.Problem(a, b))) for a, b in pairs]


@st.composite
def damaged_answers(draw):
    problem, text = draw(st.sampled_from(right_documents()))
    characters = st.text(alphabet.VOCABULARY, max_size=3)
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(text)) | st.integers(max(0, len(text) - 22), len(text)))
        text = text[:at] + draw(characters) + text[at + draw(st.integers(0, 2)) :]
    return problem, text[: draw(st.none() | st.integers(0, len(text)))]


@pytest.mark.parametrize("case", right_documents(), ids=lambda case: f"{case[0].a}+{case[0].b}")
def test_the_reward_is_1_on_the_right_answer_and_0_on_its_damages(case):
    problem, right = case
    scratchpad, mark, result = right.partition(tasks.RESULT_MARK)
    damages = [
        right[:-1],
        right[:-1] + alphabet.PAD + "\n",
        right[:-2] + "\n",
        scratchpad + mark + "\n" + result,
        scratchpad + mark + " " + result,
        scratchpad + mark + "0 " + result,
        scratchpad + mark + result[:-1] + " \n",
        scratchpad + "</scratch>" + result,
        scratchpad + result,
        scratchpad + mark,
        scratchpad + mark + mark + result,
        "",
        result,
        "\n" * LENGTH,
    ]
    accepted = [right, right + right, mark + result, scratchpad[:9] + "C=7\n" + mark + result, scratchpad[:12] + right]
    assert [judge(problem, text) for text in accepted + damages] == [1.0] * len(accepted) + [0.0] * len(damages)
    found = rewards(problem, *accepted, *damages)
    assert found == [1.0] * len(accepted) + [0.0] * len(damages)


def test_the_reward_of_each_row_is_judged_by_its_own_result():
    packed = problems.pack(ADDITION, [problem for problem, _ in right_documents()], DIGITS, 2)
    answers = as_array(*(text for _, text in right_documents()))
    assert judge_on_device(answers, packed.results_BxR).all()
    assert not judge_on_device(answers, jnp.roll(packed.results_BxR, 1, axis=0)).any()


def test_a_result_line_that_the_length_limit_cuts_gets_no_reward():
    problem, text = right_documents()[3]
    encoded, packed = alphabet.encode(text).astype(np.int32), problems.pack(ADDITION, [problem], DIGITS, 2)
    assert problems.reward(encoded[None], packed.results_BxR).tolist() == [1.0]
    assert problems.reward(encoded[None, :-1], packed.results_BxR).tolist() == [0.0]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(damaged_answers())
def test_the_reward_agrees_with_a_plain_python_judge(case):
    problem, text = case
    assert rewards(problem, text) == [judge(problem, text)]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(damaged_answers(), st.text(alphabet.VOCABULARY, min_size=1) | st.just(RIGHT))
def test_characters_after_the_end_change_neither_reward_nor_mask(case, garbage):
    problem, text = case
    mask = mask_on_device(as_array(text))
    ended = alphabet.decode(as_array(text)[0])[: int(mask.sum())]
    replaced = ended + (garbage * LENGTH)[: LENGTH - len(ended)]
    np.testing.assert_array_equal(mask_on_device(as_array(replaced)), mask)
    assert rewards(problem, replaced) == rewards(problem, text)


def test_the_mask_ends_with_the_newline_of_the_result_or_the_first_padding():
    texts = [RIGHT, RIGHT[:-1], "", RIGHT[:20] + alphabet.PAD + RIGHT, "1" * LENGTH]
    lengths = [len(RIGHT), len(RIGHT), 1, 21, LENGTH]
    mask = mask_on_device(as_array(*texts))
    np.testing.assert_array_equal(mask, np.arange(LENGTH)[None] < np.array(lengths)[:, None])


def test_pack_pads_prompts_on_the_left_and_results_on_the_right():
    packed = problems.pack(ADDITION, [tasks.Problem(7, 95), tasks.Problem(999, 999)], 3, 2)
    assert packed.prompts_BxP.shape == (2, ADDITION.max_prompt_length(3))
    assert alphabet.decode(packed.prompts_BxP[0]) == ADDITION.prompt_text(tasks.Problem(7, 95)).rjust(22, alphabet.PAD)
    assert packed.prompt_lengths_B.tolist() == [19, 22]
    assert [alphabet.decode(row) for row in packed.results_BxR] == ["1 0 2\n%%", "1 9 9 8\n"]
    assert [alphabet.decode(row) for row in packed.lists_Bx3x2xJ[0, :, 1]] == ["[9,5]%%", "[9]%%%%", "%%%%%%%"]
    assert packed.episodes_B.tolist() == [0, 1]


def test_the_shapes_depend_on_digits_and_count_alone():
    first, second = (problems.pack(ADDITION, [tasks.Problem(n, 0)] * 3, 5, 3) for n in (1, 99999))
    assert [x.shape for x in jax.tree.leaves(first)] == [x.shape for x in jax.tree.leaves(second)]
    assert first.critical_Bx3x2xC.shape == (3, 3, 2, 4)


def test_pack_refuses_too_long_operands_and_an_empty_list():
    for bad in ([tasks.Problem(1, 1000)], [tasks.Problem(1, 1), tasks.Problem(1000, 1)]):
        with pytest.raises(ValueError, match="problems: got 'an operand of 4 digits'"):
            problems.pack(ADDITION, bad, 3, 2)
    with pytest.raises(ValueError, match="problems: got 0"):
        problems.pack(ADDITION, [], 3, 2)


def slot(token):
    return token.step - 1, token.operand - 1, 2 * (token.gap_index - 1) + ("comma", "digit").index(token.name[4:])


def recorded_indices(text, packed=PACKED, row=0):
    """{slot: index in the text} of what is recorded."""
    indices, recorded = (np.array(x)[row] for x in find_critical(as_array(*[text] * len(packed.episodes_B)), packed))
    assert (indices[~recorded] == 0).all()
    return {tuple(at): int(indices[tuple(at)]) for at in np.argwhere(recorded).tolist()}


@pytest.mark.parametrize("max_pretrain_digits", [2, 3])
def test_on_right_answers_every_critical_token_is_recorded_where_it_stands(max_pretrain_digits):
    cases = [(1234, 5678), (1234, 56), (7, 9999), (999, 1000), (12, 34), (0, 0)]
    packed = problems.pack(ADDITION, [tasks.Problem(a, b) for a, b in cases], DIGITS, max_pretrain_digits)
    texts = [ADDITION.answer_text(tasks.Problem(a, b)) for a, b in cases]
    indices, recorded = (np.array(x) for x in find_critical(as_array(*texts), packed))
    characters = np.array(problems.critical_characters(packed))
    for row, ((a, b), text) in enumerate(zip(cases, texts, strict=True)):
        tokens = ADDITION.critical_tokens(tasks.Problem(a, b), max_pretrain_digits)
        assert recorded[row].sum() == len(tokens)
        for token in tokens:
            assert recorded[row][slot(token)]
            assert indices[row][slot(token)] == token.index
            assert text[token.index] == token.character == alphabet.decode([characters[row][slot(token)]])
    assert recorded[0].sum() == {2: 2 * (4 + 4 + 3), 3: 2 * (2 + 2 + 2)}[max_pretrain_digits]


def list_start(step, operand):
    line = sum(len(line) + 1 for line in RIGHT.split("\n")[: step + 1])
    return line if operand == 1 else line + RIGHT[line:].index("+") + 2


def test_a_miscopied_character_stops_what_follows_it_in_that_operand_only():
    for step in (1, 2, 3):
        for operand, text in enumerate(ADDITION.operand_lists(tasks.Problem(1234, 5678))[step - 1], start=1):
            for position, wrong in ((p, w) for p in range(len(text)) for w in "=0"):
                at = list_start(step, operand) + position
                assert RIGHT[at] == text[position]
                expected = {
                    slot(t): t.index
                    for t in TOKENS
                    if t.operand != operand or (t.step, t.position_in_list) <= (step, position)
                }
                assert recorded_indices(RIGHT[:at] + wrong + RIGHT[at + 1 :]) == expected


@pytest.mark.parametrize("replacement", ["[1,2,3]", "[1,2,2,3,4]", "[]", ""])
def test_a_list_of_wrong_length_leaves_the_other_operand_recorded_where_it_shifts_to(replacement):
    at, shift = list_start(1, 1), len(replacement) - len("[1,2,3,4]")
    text = RIGHT[:at] + replacement + RIGHT[at + len("[1,2,3,4]") :]
    found = recorded_indices(text)
    others = {slot(t): t.index + shift for t in TOKENS if t.operand == 2}
    assert {at: index for at, index in found.items() if at[1] == 1} == others
    same = [
        t for t in TOKENS if (t.operand, t.step) == (1, 1) and text[at:].startswith("[1,2,3,4]"[: t.position_in_list])
    ]
    assert {at: index for at, index in found.items() if at[1] == 0} == {slot(t): t.index for t in same}


def test_wrong_sums_elsewhere_do_not_stop_the_recording():
    lines = RIGHT.split("\n")
    for i in (2, 3, 4):
        head, tail = lines[i].split(" , A=")
        lines[i] = head + " , A=" + "".join("5" if c.isdigit() else c for c in tail)
    text = "\n".join(lines)
    assert text != RIGHT
    assert recorded_indices(text) == {slot(t): t.index for t in TOKENS}


def test_lines_are_found_where_the_generated_text_puts_them():
    lines = RIGHT.split("\n")
    lines[0], lines[1], lines[2], lines[3] = "an", "<s>", lines[2] + "+1+1", lines[3][:-9]
    text = "\n".join(lines)
    shift = {1: -4, 2: 0, 3: -9}
    expected = {slot(t): t.index + shift[t.step] for t in TOKENS}
    assert recorded_indices(text) == expected
    assert all(text[expected[slot(t)]] == t.character for t in TOKENS)


def test_the_second_operand_is_looked_for_in_its_own_line():
    """Else the next line's would be taken for it, a shorter list, and thus for one that was miscopied."""
    lines = RIGHT.split("\n")
    lines[2] = lines[2].split(" + ")[0]
    found = recorded_indices("\n".join(lines))
    assert lines[2] == "[1,2,3,4]"
    assert {operand for _, operand, *_ in found} == {0}
    assert min(found.values()) == min(t.index for t in TOKENS)


def test_an_answer_that_stops_is_recorded_up_to_its_first_padding():
    for cut in range(0, list_start(3, 2) + 9, 2):
        assert recorded_indices(RIGHT[:cut]) == {slot(t): t.index for t in TOKENS if t.index <= cut}


def test_a_critical_token_beyond_the_length_limit_is_not_recorded():
    answers = as_array(RIGHT)
    for cut in (TOKENS[0].index, TOKENS[0].index + 1):
        _, recorded = problems.critical_indices(answers[:, :cut], PACKED)
        assert int(recorded.sum()) == sum(t.index < cut for t in TOKENS)


def test_the_critical_mask_is_true_where_a_token_is_recorded_and_nowhere_else():
    comma = min(t.index for t in TOKENS if t.operand == 2)
    assert RIGHT[comma - 1 : comma + 1] == "6,"
    of_first = {t.index for t in TOKENS if t.operand == 1}
    cases = {
        RIGHT: {t.index for t in TOKENS},
        RIGHT[:comma] + "]" + RIGHT[comma + 1 :]: of_first | {comma},
        RIGHT[: comma - 1] + "0" + RIGHT[comma:]: of_first,
        RIGHT[:comma]: {t.index for t in TOKENS if t.index <= comma},
        RIGHT[: min(of_first) - 1]: set(),
        "": set(),
        "[1,2,3,4]" * 20: set(),
    }
    packed = problems.pack(ADDITION, [tasks.Problem(1234, 5678)] * len(cases), DIGITS, 2)
    found_BxT = np.array(jax.jit(problems.critical_mask)(as_array(*cases), packed))
    assert found_BxT.dtype == bool
    for row, (text, expected) in enumerate(cases.items()):
        assert set(np.flatnonzero(found_BxT[row])) == expected, text


def test_without_longer_numbers_than_in_pretraining_no_token_is_critical():
    packed = problems.pack(ADDITION, [tasks.Problem(1234, 5678)], DIGITS, DIGITS)
    assert not problems.critical_mask(as_array(RIGHT), packed).any()


def overlong(text, digits):
    """Indices of the characters of lists and results from their so many-th digit on, in plain Python."""
    found, count, within = set(), 0, False
    for index, character in enumerate(text):
        in_result = "</scratch>\n" in text[:index]
        if character == "[" or text.find("</scratch>\n") == index - len("</scratch>\n") >= 0:
            count = 0
        within = within or character == "["
        count += character.isdigit()
        if (within or in_result) and count >= digits:
            found.add(index)
        within = within and character != "]"
    return found


@pytest.mark.parametrize("digits", [1, 2, 4, 9])
def test_overlong_is_what_stands_in_a_list_or_result_from_its_nth_digit_on(digits):
    texts = [
        RIGHT,
        *(text for _, text in right_documents()),
        "",
        "[1,2,3,4]" * 20,
        "1234]5[6,[7,8]]9",
        "</scratch>\n[1,2]34\n",
    ]
    found_BxT = np.array(overlong_on_device(as_array(*texts), digits))
    assert found_BxT.dtype == bool
    for row, text in enumerate(texts):
        assert set(np.flatnonzero(found_BxT[row][: len(text)])) == overlong(text[:LENGTH], digits), text
    if digits == 4:
        spared = "".join(x if marked or x == "\n" else "." for x, marked in zip(RIGHT, found_BxT[0], strict=False))
        assert RIGHT.split("\n")[2].startswith("[1,2,3,4] + [5,6,7,8] , A=[] , ")
        assert spared.split("\n")[2].startswith(".......4]..........8].........")
        assert RIGHT.endswith("6 9 1 2\n")
        assert spared.endswith("......2\n")


@settings(deadline=None, max_examples=50)
@given(damaged_answers(), st.integers(1, 5))
def test_overlong_places_agree_with_plain_python_on_damaged_answers(case, digits):
    text = case[1].split(alphabet.PAD)[0][:LENGTH]
    (found_T,) = np.array(overlong_on_device(as_array(text), digits))
    assert set(np.flatnonzero(found_T[: len(text)])) == overlong(text, digits)
