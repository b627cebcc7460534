"""Which answers are shown, as results.json keeps them, and the page and the picture made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ckl_jax.analysis import critical, plots, report
from ckl_jax.analysis.critical import Generations
from ckl_jax.analysis.report import Character, Scratchpad, Section
from ckl_jax.tasks import alphabet
from ckl_jax.tasks.task import Problem, Task
from experiments.common.figure import Results

LIKELIEST = 5
NUMBERS = ("certainty", "entropy", "probability", "reference_probability")
MARKS = ("critical", "deviates")
INTRODUCTION = (
    "The model writes its calculations as scratchpads, one character at a time. The stronger the colour, the less "
    "certain the pre-trained model is of the next character. Most characters follow from the ones before and have no "
    "colour.",
    "Boxed are the critical tokens: where a list of digits longer than any in pre-training has to be copied to its "
    "end. A model that closes the list too early there has lost a digit, and with it the answer.",
    "An answer is right or wrong by its result alone. A right one may still leave the right scratchpad on the way.",
)


def scratchpad(task: Task, found: Generations, problem: Problem, row: int) -> Scratchpad:
    """The answer of one row, ready to be shown."""
    text, right = found.text(row), task.answer_text(problem)
    deviation = critical.first_deviation(text, right)
    probabilities_TxV, ref_probabilities_TxV = found.probabilities_BxTxV[row], found.ref_probabilities_BxTxV[row]
    best_TxK = np.argsort(-probabilities_TxV, axis=1)[:, :LIKELIEST]
    likeliest = [alphabet.decode(best_K, beyond=alphabet.UNKNOWN) for best_K in best_TxK]
    shares_TxK = np.take_along_axis(probabilities_TxV, best_TxK, axis=1)
    critical_T = found.critical_BxT[row]
    characters = tuple(
        Character(
            character,
            certainty=float(found.certainty_BxT[row, t]),
            entropy=float(found.entropy_BxT[row, t]),
            probability=float(probabilities_TxV[t, token]),
            reference_probability=float(ref_probabilities_TxV[t, token]),
            likeliest=tuple(zip(likeliest[t], shares_TxK[t].tolist(), strict=True)),
            critical=bool(critical_T[t]),
            deviates=t == deviation,
        )
        for t, (character, token) in enumerate(zip(text, found.answers_BxT[row], strict=False))
    )
    title = f"{problem.a} {task.operator} {problem.b} = {task.result_text(problem).replace(' ', '')}"
    return Scratchpad(title, bool(found.reward_B[row] > 0), _note(text, right, deviation, characters), characters)


def _note(text: str, right: str, deviation: int | None, characters: Sequence[Character]) -> str:
    if deviation is None:
        return "Every character is as in the right answer."
    written, wanted = (_named(x[deviation]) if deviation < len(x) else "its end" for x in (text, right))
    where = ", a critical token" if deviation < len(text) and characters[deviation].critical else ""
    return f"Leaves the right answer at character {deviation}{where}: {written} instead of {wanted}."


def _named(character: str) -> str:
    return {"\n": "a newline", " ": "a space"}.get(character, f"“{character}”")


def section(name: str, task: Task, found: Generations, problems: Sequence[Problem], examples: int) -> Section:
    """The first right answers beside the first wrong ones; what has no counterpart comes last."""
    rows = (np.flatnonzero(found.reward_B > 0)[:examples], np.flatnonzero(found.reward_B == 0)[:examples])
    right, wrong = ([scratchpad(task, found, problems[row], row) for row in some] for some in rows)
    paired = min(len(right), len(wrong))
    pads = [pad for pair in zip(right, wrong, strict=False) for pad in pair]
    solved = int(found.reward_B.sum())
    note = f"{solved} of {len(problems)} sampled answers are right. Shown are the first right and the first wrong ones."
    return Section(name, note, (*pads, *right[paired:], *wrong[paired:]))


def one_of_each(shown: Section) -> list[Scratchpad]:
    """The section's first right and first wrong scratchpad, as far as it has them."""
    first = {pad.right: pad for pad in reversed(shown.scratchpads)}
    return [first[right] for right in (True, False) if right in first]


def stored(pad: Scratchpad) -> dict[str, Any]:
    """What page and picture show of an answer: marks as indices, numbers of four digits a character."""
    values = {name: [_rounded(getattr(character, name)) for character in pad.characters] for name in NUMBERS}
    marks = {name: [i for i, c in enumerate(pad.characters) if getattr(c, name)] for name in MARKS}
    pairs = [pair for character in pad.characters for pair in character.likeliest]
    likeliest = {
        "likeliest": "".join(other for other, _ in pairs),
        "likeliest_probability": [_rounded(probability) for _, probability in pairs],
    }
    told = {"problem": pad.title, "right": pad.right, "note": pad.note, "text": pad.text}
    return {**told, **marks, **values, **likeliest}


def restored(shown: dict[str, Any]) -> Scratchpad:
    """The answer that ``stored`` was given."""
    pairs = list(zip(shown["likeliest"], shown["likeliest_probability"], strict=True))
    each = len(pairs) // max(len(shown["text"]), 1)
    characters = tuple(
        Character(
            character,
            **{name: shown[name][index] for name in NUMBERS},
            likeliest=tuple(pairs[each * index : each * (index + 1)]),
            **{name: index in shown[name] for name in MARKS},
        )
        for index, character in enumerate(shown["text"])
    )
    return Scratchpad(shown["problem"], shown["right"], shown["note"], characters)


def _rounded(number: float) -> float:
    return float(f"{number:.4g}")


def sections(results: Results) -> list[Section]:
    """What is shown of each policy."""
    policies = results["policies"].items()
    return [Section(name, found["note"], tuple(map(restored, found["shown"]))) for name, found in policies]


def page(results: Results) -> str:
    base = results["max_pretrain_digits"]
    title = f"Where a model pre-trained on {base} digits is unsure when it calculates with {base + 1} digits"
    return report.page(title, INTRODUCTION, sections(results))


def draw(results: Results) -> Figure:
    return plots.scratchpads([(part.title, one_of_each(part)) for part in sections(results)])
