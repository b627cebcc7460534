"""Answers written by hand instead of by a policy, as ``critical.Generations``."""

import jax.numpy as jnp
import numpy as np

from ckl_jax import tasks
from ckl_jax.analysis.critical import Generations
from ckl_jax.rollout.trajectory import answer_mask
from ckl_jax.tasks import alphabet
from ckl_jax.tasks import problems as problems_lib
from ckl_jax.tasks.columns import ADDITION

DIGITS, MAX_PRETRAIN_DIGITS = 3, 2
PROBLEM = tasks.Problem(123, 45)
RIGHT = ADDITION.answer_text(PROBLEM)
COMMA = ADDITION.critical_tokens(PROBLEM, MAX_PRETRAIN_DIGITS)[1].index
SUM = RIGHT.index("=8") + 1


def made(problem, texts, certainty=None):
    """Answers to one problem of up to 3 digits for a model of N = 2.

    Args:
      certainty: [B, T'] for the first T' characters; 1 elsewhere. The policy has probability J for what it writes.
    """
    packed = problems_lib.pack(ADDITION, [problem] * len(texts), DIGITS, MAX_PRETRAIN_DIGITS)
    length = max(map(len, texts)) + 5
    answers_BxT = np.stack([alphabet.encode(text.ljust(length, alphabet.PAD)) for text in texts]).astype(np.int32)
    indices, recorded = problems_lib.critical_indices(jnp.asarray(answers_BxT), packed)
    certainty_BxT = np.ones(answers_BxT.shape, np.float32)
    if certainty is not None:
        certainty_BxT[:, : np.shape(certainty)[1]] = certainty
    probabilities_BxTxV = np.repeat((1 - certainty_BxT)[..., None] / (alphabet.VOCAB_SIZE - 1), alphabet.VOCAB_SIZE, 2)
    np.put_along_axis(probabilities_BxTxV, answers_BxT[..., None], certainty_BxT[..., None], axis=2)
    return Generations(
        answers_BxT,
        np.array(answer_mask(jnp.asarray(answers_BxT))),
        np.array(problems_lib.reward(jnp.asarray(answers_BxT), packed.results_BxR.astype(np.int32))),
        certainty_BxT,
        1 - certainty_BxT,
        probabilities_BxTxV,
        probabilities_BxTxV,
        np.where(recorded, indices, -1),
        np.array(problems_lib.critical_characters(packed)),
        (packed.critical_Bx3x2xC >= 0).sum(axis=(1, 2, 3)),
    )


def sure_except(by_index):
    """Certainty [1, T] of the right answer: 1, but for the given characters."""
    certainty = np.ones((1, len(RIGHT)))
    for index, value in by_index.items():
        certainty[0, index] = value
    return certainty


def replaced(text, index, character):
    return text[:index] + character + text[index + 1 :]
