"""Figure 1: one addition's scratchpad, every generated character coloured by the model's certainty.

    python -m experiments.figure1_scratchpad
    python -m experiments.figure1_scratchpad --a 999999 --b 1 --temperature 1 --seed 3

The pre-trained model writes the answer to operands longer than it was trained on. The colour is its certainty J:
1 minus the entropy of its next character over log V. Boxes are the critical tokens that it came to with that operand's
digits copied rightly so far; their numbers lead to the table below, with the probability of the right character. A
triangle is where the text first leaves the right answer.

The default operands show the paper's case with the shipped model: at the critical comma of operand 2 in step 1, where
J has its minimum over the whole answer, it closes the list a digit too early, copies on without a doubt, and ends with
a wrong result. They were picked for it: most of this model's wrong answers first go wrong elsewhere
(``experiments.freed_pressure``). It takes seconds.
"""

from __future__ import annotations

import functools
import pathlib
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ckl_jax import tasks
from ckl_jax.analysis.critical import exactly
from ckl_jax.certainty import certainty
from ckl_jax.checkpoint.shipped import SHIPPED_TINY
from ckl_jax.checkpoint.store import Model, fingerprint, load_model
from ckl_jax.checks import MOST_SEED, require_temperature
from ckl_jax.config import ModelConfig
from ckl_jax.errors import require
from ckl_jax.rollout.generation import generate
from ckl_jax.rollout.trajectory import Sampling
from ckl_jax.runtime import cli
from ckl_jax.tasks import alphabet
from ckl_jax.tasks import problems as problems_lib
from ckl_jax.tasks.problems import Problems
from experiments.common.claims import Claim, as_json
from experiments.common.figure import Results, publish
from experiments.figure1_scratchpad.drawing import draw, legend

COMMAND = "experiments.figure1_scratchpad"


@dataclass(frozen=True)
class Figure1Command:
    """Figure 1: a generated scratchpad coloured by the certainty of the model that wrote it."""

    checkpoint: pathlib.Path = SHIPPED_TINY
    """Pre-trained model: a directory with params/ and model.json; default: the tiny one that ships with the package."""
    a: int = 788400
    """First operand; it or the other has more digits than the model was pre-trained on."""
    b: int = 756689
    """Second operand."""
    temperature: float | None = None
    """Sampling temperature; None: the likeliest character (greedy)."""
    seed: int = 0
    """Of the sampling; no effect when greedy."""
    out: pathlib.Path = pathlib.Path("runs/figure1")
    """Directory of results.json, figure1.png and figure1.svg; an earlier call's are replaced."""
    plot_only: bool = False
    """Claim and figure again from results.json."""

    def __post_init__(self) -> None:
        require(0 <= self.seed <= MOST_SEED, "seed", self.seed, f"at least 0, at most {MOST_SEED}")
        if self.temperature is not None:
            require_temperature(self.temperature, note=", or None")
        for name, value in (("a", self.a), ("b", self.b)):
            longest = tasks.MAX_DIGITS
            require(0 <= value < 10**longest, name, value, f"an integer from 0, of at most {longest} digits")


@functools.partial(jax.jit, static_argnums=0, static_argnames=("max_length", "greedy"))
def _write(config: ModelConfig, params: Any, problems: Problems, key, *, max_length, temperature, greedy):
    verified = generate(
        config,
        params,
        problems,
        key,
        Sampling(max_length, temperature, greedy),
        how="plain",
        with_scores=True,
    )
    trajectory = verified.trajectory
    return trajectory, verified.logits_BxTxV, problems_lib.critical_indices(trajectory.answers_BxT, problems)


def answer(model: Model, a: int, b: int, *, temperature: float | None = None, seed: int = 0) -> dict[str, Any]:
    """The model's answer to its task's problem of ``a`` and ``b`` with, per character, certainty and probability.

    Probabilities are at the sampling temperature (1 when greedy), J at 1. ``critical`` are the critical tokens that the
    answer came to, ``first_deviation`` its first character that differs from the right answer's, or None.

    Raises:
      ConfigError: no operand is longer than the model's N, or the answer does not fit its block.
    """
    base = model.max_pretrain_digits
    digits = len(str(max(a, b)))
    require(digits > base, "a", a, f"an operand (or b) of more than the {base} digits of the model's pre-training")
    problem = model.task.problem(a, b)
    problems = problems_lib.pack(model.task, [problem], digits, base)
    trajectory, logits_1xTxV, (indices, recorded) = _write(
        exactly(model.config),
        model.params,
        problems,
        jax.random.key(seed),
        max_length=model.task.max_answer_length(digits),
        temperature=temperature or 1.0,
        greedy=temperature is None,
    )
    length = int(trajectory.mask_BxT.sum())
    tokens_T, logits_TxV = trajectory.answers_BxT[0, :length], logits_1xTxV[0, :length]
    text, right_text = alphabet.decode(np.asarray(tokens_T), beyond=alphabet.UNKNOWN), model.task.answer_text(problem)
    sure_T = np.asarray(certainty(logits_TxV))
    p_TxV = np.asarray(jax.nn.softmax(logits_TxV / (temperature or 1.0)))
    critical: list[dict[str, Any]] = []
    tokens = model.task.critical_tokens(problem, base)
    for token in tokens:
        where = (0, token.step - 1, token.operand - 1, token.slot)
        if recorded[where]:
            index = int(indices[where])
            critical.append(
                {
                    "step": token.step,
                    "operand": token.operand,
                    "name": token.name,
                    "index": index,
                    "right": token.character,
                    "written": text[index],
                    "probability": float(p_TxV[index, alphabet.VOCABULARY.index(token.character)]),
                    "certainty": float(sure_T[index]),
                }
            )
    critical.sort(key=lambda token: token["index"])
    deviation = next((i for i, (x, y) in enumerate(zip(text, right_text, strict=False)) if x != y), None)
    is_critical = np.isin(np.arange(length), [token["index"] for token in critical])
    return {
        "prompt": model.task.prompt_text(problem),
        "text": text,
        "right_text": right_text,
        "max_pretrain_digits": base,
        "solved": bool(trajectory.reward_B[0]),
        "first_deviation": None
        if deviation is None
        else {"index": deviation, "written": text[deviation], "right": right_text[deviation]},
        "critical": critical,
        "critical_in_right_answer": len(tokens),
        "mean_certainty_critical": float(sure_T[is_critical].mean()) if critical else None,
        "mean_certainty_other": float(sure_T[~is_critical].mean()),
        "certainty": sure_T.tolist(),
        "probability": p_TxV[np.arange(length), np.asarray(tokens_T)].tolist(),
    }


def claims(results: dict[str, Any]) -> list[Claim]:
    """The picture's message in numbers; one addition decides nothing."""
    sure = results["certainty"]
    least = min(range(len(sure)), key=sure.__getitem__)
    at_least = "a critical token" if least in {token["index"] for token in results["critical"]} else "no critical token"
    critical, others = results["mean_certainty_critical"], results["mean_certainty_other"]
    shown = "none recorded" if critical is None else f"{critical:.3f}"
    return [
        Claim(
            "Critical tokens are those that the pre-trained model is least certain of",
            "drawn for one addition, no numbers",
            f"J {shown} at critical tokens, {others:.3f} elsewhere; the least certain character is {at_least}",
            (),
            "undecided",
            "an illustration: one addition, whose operands may be picked, decides nothing; figure 5 and table 1 count",
        )
    ]


def measure(command: Figure1Command) -> Results:
    """The model's answer, with what it was made from."""
    model = load_model(command.checkpoint)
    names = ("a", "b", "temperature", "seed")
    config = {"command": COMMAND, **{name: getattr(command, name) for name in names}}
    found = answer(model, command.a, command.b, temperature=command.temperature, seed=command.seed)
    return found | {"config": config | {"checkpoint": fingerprint(model.params)}}


def judge(results: Results) -> Results:
    return {"seeds": [results["config"]["seed"]], "claims": as_json(claims(results))}


def text(results: Results) -> str:
    """The answer, and its critical tokens by operand."""
    return "\n".join([results["text"], *(legend(results, operand) for operand in (1, 2))])


def main(command: Figure1Command) -> None:
    publish(command, COMMAND, "figure1", measure, text, draw, judge=judge)


if __name__ == "__main__":
    cli.run(main, Figure1Command)
