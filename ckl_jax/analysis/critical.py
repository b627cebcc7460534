"""Critical tokens in a model's own answers: where they are met, how sure it is of them, what they decide."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ckl_jax import rollout, tasks
from ckl_jax.certainty import CertaintyKind, certainty, entropy_of
from ckl_jax.checkpoint.store import Model
from ckl_jax.config import ModelConfig
from ckl_jax.errors import require
from ckl_jax.fields import NonNegativeInt, PositiveFloat, require_fields
from ckl_jax.tasks import alphabet
from ckl_jax.tasks import problems as problems_lib
from ckl_jax.tasks.problems import Problems

BATCH = 100
Place = tuple[int, int, int]


@dataclass(frozen=True)
class Measuring:
    """How answers are sampled, and how certainty is measured on them."""

    temperature: PositiveFloat = 1.0
    """Sampling temperature."""
    certainty: CertaintyKind = "negentropy"
    """J, the model's certainty of its next token; of the pre-trained one where the answers are another policy's."""
    certainty_temperature: PositiveFloat = 1.0
    """Temperature of that model's distribution inside J."""
    extra_length: NonNegativeInt = tasks.EXTRA_LENGTH
    """Characters that an answer may be longer than the longest right one."""
    seed: NonNegativeInt = 0
    """Of sampling, and of what is drawn."""

    def __post_init__(self) -> None:
        require_fields(self)


class Generations(NamedTuple):
    """A policy's answers to B problems, as arrays of the host.

    Attributes:
      answers_BxT: int32, ``PAD_ID`` after the end.
      mask_BxT: True on generated characters, the one that ends the episode included.
      reward_B: 1 for a right result, else 0.
      certainty_BxT, entropy_BxT: of the reference, at the certainty's temperature; meaningless after the end.
      probabilities_BxTxV, ref_probabilities_BxTxV: of policy and reference at the sampling temperature, likewise.
      indices_Bx3x2xC: where in the answer each critical token is met; -1 where none is recorded.
      right_Bx3x2xC: the right character there.
      expected_B: how many critical tokens a right answer has.
    """

    answers_BxT: np.ndarray
    mask_BxT: np.ndarray
    reward_B: np.ndarray
    certainty_BxT: np.ndarray
    entropy_BxT: np.ndarray
    probabilities_BxTxV: np.ndarray
    ref_probabilities_BxTxV: np.ndarray
    indices_Bx3x2xC: np.ndarray
    right_Bx3x2xC: np.ndarray
    expected_B: np.ndarray

    def text(self, row: int) -> str:
        """The answer of a row up to its end."""
        return alphabet.decode(self.answers_BxT[row][self.mask_BxT[row]], beyond=alphabet.UNKNOWN)

    def first(self, count: int) -> "Generations":
        """The first answers alone."""
        return Generations(*(array[:count] for array in self))

    @property
    def recorded_Bx3x2xC(self) -> np.ndarray:
        return self.indices_Bx3x2xC >= 0

    @property
    def critical_BxT(self) -> np.ndarray:
        """True at the recorded critical tokens."""
        marked_BxT = np.zeros(self.mask_BxT.shape, bool)
        marked_BxT[np.nonzero(self.recorded_Bx3x2xC)[0], self.indices_Bx3x2xC[self.recorded_Bx3x2xC]] = True
        return marked_BxT

    def at_critical(self, values_BxT: np.ndarray) -> np.ndarray:
        """Values [B, T, ...] at the critical tokens [B, 3, 2, C, ...]; only those of recorded ones mean anything."""
        rows = np.arange(len(values_BxT)).reshape(-1, 1, 1, 1)
        return values_BxT[rows, self.indices_Bx3x2xC]

    @property
    def wrong_critical_B(self) -> np.ndarray:
        """How many recorded critical tokens each answer has wrong."""
        wrong = self.at_critical(self.answers_BxT) != self.right_Bx3x2xC
        return (self.recorded_Bx3x2xC & wrong).sum(axis=(1, 2, 3))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), static_argnames="max_length")
def _answer(
    config: ModelConfig,
    ref_config: ModelConfig | None,
    how: Measuring,
    params: Any,
    ref_params: Any,
    problems: Problems,
    key,
    *,
    max_length,
) -> tuple[Any, ...]:
    """The fields of ``Generations``, in their order. Without ``ref_config`` the policy is its own reference."""
    trajectory, logits_BxTxV, *_ = rollout.generate(
        config, params, problems, key, rollout.Sampling(max_length, how.temperature), with_scores=True
    )
    assert logits_BxTxV is not None
    ref_logits_BxTxV = logits_BxTxV if ref_config is None else rollout.score(ref_config, ref_params, trajectory)[0]
    indices, recorded = problems_lib.critical_indices(trajectory.answers_BxT, problems)
    return (
        trajectory.answers_BxT,
        trajectory.mask_BxT,
        trajectory.reward_B,
        certainty(ref_logits_BxTxV, how.certainty, how.certainty_temperature),
        entropy_of(jax.nn.log_softmax(ref_logits_BxTxV / how.certainty_temperature)),
        jax.nn.softmax(logits_BxTxV / how.temperature),
        jax.nn.softmax(ref_logits_BxTxV / how.temperature),
        jnp.where(recorded, indices, -1),
        problems_lib.critical_characters(problems),
        (jnp.asarray(problems.critical_Bx3x2xC) >= 0).sum(axis=(1, 2, 3)),
    )


def exactly(config: ModelConfig) -> ModelConfig:
    """The config in the arithmetic that RL has by default, whatever pre-training had: J close to 1 needs it."""
    return dataclasses.replace(config, dtype="float32", precision="highest")


def require_room(model: Model, digits: int, extra_length: int) -> None:
    """Raises ConfigError where episodes of that many digits do not fit into the model's block."""
    room = model.config.block_size
    shortest = model.task.longest_episode(digits, 0)
    require(shortest <= room, "digits", digits, f"what fits the block: {shortest} characters (block_size = {room})")
    total = model.task.longest_episode(digits, extra_length)
    require(total <= room, "extra_length", extra_length, f"at most {extra_length - total + room} (block_size = {room})")


def sample(
    policy: Model,
    problems: Sequence[tasks.Problem],
    digits: int,
    how: Measuring,
    reference: Model | None = None,
    named: str = "reference",
) -> Generations:
    """The policy's sampled answers to problems of up to ``digits`` digits.

    Args:
      reference: whose certainty is measured, a model of the same N, task and vocabulary; default: the policy itself.
      named: the option that it came by, for the error.

    Raises:
      ConfigError: the reference has another N, task or vocabulary, or an episode does not fit into a block.
    """
    for model in (policy, reference or policy):
        require_room(model, digits, how.extra_length)
    if reference is not None:
        kinds = [(m.max_pretrain_digits, m.task.name, m.config.vocab_size) for m in (reference, policy)]
        require(kinds[0] == kinds[1], named, kinds[0], f"the policy's N, task and size of the vocabulary, {kinds[1]}")
    packed = problems_lib.pack(policy.task, problems, digits, policy.max_pretrain_digits)
    parts = [
        jax.device_get(
            _answer(
                exactly(policy.config),
                None if reference is None else exactly(reference.config),
                how,
                policy.params,
                None if reference is None else reference.params,
                problems_lib.rows(packed, start, BATCH),
                jax.random.key(how.seed),
                max_length=policy.task.max_answer_length(digits, how.extra_length),
            )
        )
        for start in range(0, len(problems), BATCH)
    ]
    return Generations(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def certainty_gaps(certainty_BxT: np.ndarray, mask_BxT: np.ndarray) -> np.ndarray:
    """Delta J: certainty of each character minus the mean certainty of the others of its answer: float64 [B, T].

    NaN where the mask is False, and in answers of one character.
    """
    same = mask_BxT.shape == certainty_BxT.shape
    require(same, "mask", mask_BxT.shape, f"the shape of the certainty, {certainty_BxT.shape}")
    sure_BxT = np.where(mask_BxT, certainty_BxT, 0.0).astype(np.float64)
    others_Bx1 = mask_BxT.sum(axis=1, keepdims=True) - 1
    mean_of_others = (sure_BxT.sum(axis=1, keepdims=True) - sure_BxT) / np.maximum(others_Bx1, 1)
    return np.where(mask_BxT & (others_Bx1 > 0), sure_BxT - mean_of_others, np.nan)


def mean_where(values_BxK: np.ndarray, selected_BxK: np.ndarray) -> np.ndarray:
    """Mean of the selected values of each row that are not NaN: float64 [B], NaN where there is none."""
    selected_BxK = selected_BxK & ~np.isnan(values_BxK)
    count_B = selected_BxK.sum(axis=1)
    sums_B = np.where(selected_BxK, values_BxK, 0.0).sum(axis=1, dtype=np.float64)
    return np.where(count_B > 0, sums_B / np.maximum(count_B, 1), np.nan)


def places(text: str) -> list[Place]:
    """Where each character stands in the scratchpad's grammar: (line, word of the line, character of the word).

    Words end with their space, lines with their newline, so that the places of a step's operands, sum, carry and
    column compare between answers whatever the lengths of their words.
    """
    line = word = position = 0
    found = []
    for character in text:
        found.append((line, word, position))
        if character == "\n":
            line, word, position = line + 1, 0, 0
        elif character == " ":
            word, position = word + 1, 0
        else:
            position += 1
    return found


def first_deviation(written: str, right: str) -> int | None:
    """Index of the first character that is not as in the right text, or where one of the two ends; None if equal."""
    for index, (one, other) in enumerate(zip(written, right, strict=False)):
        if one != other:
            return index
    return None if len(written) == len(right) else min(len(written), len(right))
