"""Episodes as arrays: what every way to generate them gives, and the noise that makes all ways give the same.

The noise of a sampled character is a function of (key, episode, position in the answer) alone, so that every correct
algorithm, batching and device layout draws the same characters.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ckl_jax.checks import require_integers, require_temperature
from ckl_jax.config import ModelConfig
from ckl_jax.errors import is_integer, require
from ckl_jax.model import forward
from ckl_jax.tasks import alphabet
from ckl_jax.tasks import problems as problems_lib
from ckl_jax.tasks.problems import Array, Problems


class Trajectory(NamedTuple):
    """B episodes of prompts (P columns) and answers (T columns).

    Attributes:
      tokens_BxL: int32, L = P + T: left padding, prompt, answer, ``PAD_ID`` after the end.
      positions_BxL: absolute position of each character in its episode.
      segments_BxL: 0 on the left padding, 1 from the prompt on.
      log_probs_BxT: log pi of each generated character at the sampling temperature, 0 after the end.
      mask_BxT: True on generated characters, the last newline included.
      reward_B: 1 for a right result, else 0.
    """

    tokens_BxL: jax.Array
    positions_BxL: jax.Array
    segments_BxL: jax.Array
    log_probs_BxT: jax.Array
    mask_BxT: jax.Array
    reward_B: jax.Array

    @property
    def answers_BxT(self) -> jax.Array:
        return self.tokens_BxL[:, self.tokens_BxL.shape[1] - self.mask_BxT.shape[1] :]


class Sampling(NamedTuple):
    """How answers are drawn.

    Attributes:
      max_length: T, the length limit of the answers.
      temperature: logits are divided by it, above 0. The log-probs are at this temperature too.
      greedy: take the likeliest character instead of sampling.
      given_BxT: characters that the answers start with instead of sampled ones, -1 from where on the policy goes on; at
        most ``max_length`` columns. They belong to the answer: log-probs, end and reward are those of the whole text.
    """

    max_length: int
    temperature: float | jax.Array = 1.0
    greedy: bool = False
    given_BxT: Array | None = None


def gumbel_noise(key: jax.Array, episodes_B: jax.Array, steps_BxT: jax.Array, vocab_size: int) -> jax.Array:
    """Gumbel noise [B, T, V] for the given positions of the answers."""

    def at(episode_key, step):
        return jax.random.gumbel(jax.random.fold_in(episode_key, step), (vocab_size,))

    def row(episode, steps_T):
        return jax.vmap(at, in_axes=(None, 0))(jax.random.fold_in(key, episode), steps_T)

    return jax.vmap(row)(episodes_B, steps_BxT)


def require_possible(config: ModelConfig, problems: Problems, sampling: Sampling) -> None:
    """Raises ConfigError as ``rollout`` says."""
    max_length, given_BxT = sampling.max_length, sampling.given_BxT
    require_temperature(sampling.temperature, note=" (greedy=True for argmax)")
    require(is_integer(max_length) and max_length >= 1, "max_length", max_length, "1 or more")
    total = problems.prompts_BxP.shape[1] + max_length
    require(total <= config.block_size, "block_size", config.block_size, f"at least prompt + answer = {total}")
    if given_BxT is not None:
        require_integers(given_BxT, "given_BxT")
        count = problems.prompts_BxP.shape[0]
        fits = given_BxT.ndim == 2 and given_BxT.shape[0] == count and given_BxT.shape[1] <= max_length
        require(fits, "given_BxT", given_BxT.shape, f"[{count}, up to {max_length}]")
        if not isinstance(given_BxT, jax.core.Tracer) and given_BxT.size:
            numbers = np.asarray(given_BxT)
            low, high = int(numbers.min()), int(numbers.max())
            inside = low >= -1 and high < config.vocab_size
            require(inside, "given_BxT", f"{low}..{high}", f"-1 or a token below {config.vocab_size}")
            holes = (numbers[:, 1:] >= 0) & (numbers[:, :-1] < 0)
            require(not holes.any(), "given_BxT", "a token after -1", "-1 to the end")


def layout(problems: Problems, max_length: int) -> tuple[jax.Array, jax.Array]:
    """Positions and segments [B, P + T] of left-padded prompts and answers, as ``Trajectory`` has them."""
    count, num_prompt = problems.prompts_BxP.shape
    total = num_prompt + max_length
    padding_B = num_prompt - jnp.asarray(problems.prompt_lengths_B)
    columns_BxL = jnp.broadcast_to(jnp.arange(total)[None], (count, total))
    positions_BxL = jnp.maximum(columns_BxL - padding_B[:, None], 0)
    return positions_BxL, (columns_BxL >= padding_B[:, None]).astype(jnp.int32)


def judged(problems: Problems, answers_BxT: jax.Array, log_probs_BxT: jax.Array) -> Trajectory:
    """The trajectory of answers with nothing but ``PAD_ID`` after their end."""
    prompts_BxP = jnp.asarray(problems.prompts_BxP).astype(jnp.int32)
    return Trajectory(
        jnp.concatenate([prompts_BxP, answers_BxT], axis=1),
        *layout(problems, answers_BxT.shape[1]),
        log_probs_BxT,
        answer_mask(answers_BxT),
        problems_lib.reward(answers_BxT, jnp.asarray(problems.results_BxR).astype(jnp.int32)),
    )


def answer_mask(answers_BxT: jax.Array) -> jax.Array:
    """True up to and including the newline after the result line or the first padding token: bool [B, T]."""
    starts_B, found_B = problems_lib.result_start(answers_BxT)
    columns = jnp.arange(answers_BxT.shape[1])[None]
    in_result = found_B[:, None] & (columns >= starts_B[:, None])
    ends = (answers_BxT == alphabet.PAD_ID) | (in_result & (answers_BxT == alphabet.NEWLINE_ID))
    return jnp.cumsum(ends, axis=1) - ends == 0


def score(config: ModelConfig, params: Any, trajectory: Trajectory) -> tuple[jax.Array, jax.Array]:
    """The teacher-forced pass: logits [B, T, V] and hidden states [B, T, D] that predict each answer character."""
    inputs = (trajectory.tokens_BxL, trajectory.positions_BxL, trajectory.segments_BxL)
    output = forward(config, params, *(x[:, :-1] for x in inputs), num_outputs=trajectory.mask_BxT.shape[1])
    return output.logits_BxTxV, output.hidden_BxTxD
