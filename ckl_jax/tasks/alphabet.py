"""The 41 characters of the paper's texts as tokens, one character each; ``%`` is the padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ckl_jax.errors import ConfigError, require

PAD = "%"
VOCABULARY = PAD + "\n +,-/0123456789:<=>ACDEINT[]aceghnprstu"
VOCAB_SIZE = len(VOCABULARY)
PAD_ID = 0
NEWLINE_ID = VOCABULARY.index("\n")
OPENING_ID, CLOSING_ID = VOCABULARY.index("["), VOCABULARY.index("]")
FIRST_DIGIT_ID, LAST_DIGIT_ID = VOCABULARY.index("0"), VOCABULARY.index("9")
MOST_TOKENS = 256  # Tokens are kept as uint8; a converted model may know more than ours.
MOST_SHOWN = 5
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""Shown for a token of a converted model that is none of ours."""

_ID_OF = {character: index for index, character in enumerate(VOCABULARY)}


def encode(text: str) -> np.ndarray:
    """Characters to tokens: uint8 [len(text)]. Raises ConfigError for a character outside ``VOCABULARY``."""
    require(isinstance(text, str), "text", type(text).__name__, "a str")
    unknown = sorted(set(text) - set(VOCABULARY))[:MOST_SHOWN]
    require(not unknown, "text", unknown, f"characters of {VOCABULARY!r}")
    return np.array([_ID_OF[character] for character in text], np.uint8)


def is_digit(tokens: Any) -> Any:
    """Which tokens of an array are digits: bool, of its shape."""
    return (tokens >= FIRST_DIGIT_ID) & (tokens <= LAST_DIGIT_ID)


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
