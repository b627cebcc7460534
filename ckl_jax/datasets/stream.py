"""The dataset read once into one flat token stream, and windows of it as a pure function of a key, on the device."""

import functools
import os
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ckl_jax.datasets.prepared import documents
from ckl_jax.datasets.scratchpads import Scratchpads
from ckl_jax.errors import require
from ckl_jax.runtime import hosts
from ckl_jax.runtime.paths import AnyPath, require_directory, resolved
from ckl_jax.tasks import alphabet


class TokenStream(NamedTuple):
    """``tokens_N`` uint8: all documents (prompt + answer) back to back; ``starts_E`` int32: where each starts."""

    tokens_N: jax.Array | np.ndarray
    starts_E: jax.Array | np.ndarray


class Windows(NamedTuple):
    """A pre-training batch: inputs, targets (the next characters), positions, segments, and the loss mask."""

    inputs_BxT: jax.Array
    targets_BxT: jax.Array
    positions_BxT: jax.Array
    segments_BxT: jax.Array
    mask_BxT: jax.Array


def dataset_directory(data_dir: AnyPath | None) -> pathlib.Path:
    """Where TFDS keeps datasets: ``data_dir``; else TFDS_DATA_DIR; else its default, below the home directory.

    Raises:
      ConfigError: no directory can be there.
    """
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    require_directory(chosen, "data_dir", may_be_read_only=True)
    return resolved(chosen, "data_dir")


def load_stream(
    max_digits: int,
    num_examples: int,
    seed: int = 0,
    split: str = "train",
    data_dir: AnyPath | None = None,
    task: str = "addition",
) -> TokenStream:
    """Prepares the TFDS dataset if it is not there yet and reads a split into host memory.

    Of several processes 0 does, and hands it to the others: they need no dataset, and none is prepared twice.

    Raises:
      ConfigError: an argument is refused, or the dataset is damaged. OSError: it cannot be written.
    """
    require(split in ("train", "test"), "split", split, "train | test")
    return hosts.of_first(lambda: _read_stream(max_digits, num_examples, seed, split, data_dir, task))


def _read_stream(
    max_digits: int, num_examples: int, seed: int, split: str, data_dir: AnyPath | None, task: str
) -> TokenStream:
    directory = str(dataset_directory(data_dir))
    make = functools.partial(Scratchpads, max_digits=max_digits, num_examples=num_examples, seed=seed, task=task)
    return token_stream(documents(lambda: make(data_dir=directory), split))


def token_stream(texts: Iterable[str]) -> TokenStream:
    """Documents back to back, as tokens."""
    encoded = [alphabet.encode(text) for text in texts]
    starts = np.cumsum([0, *map(len, encoded[:-1])])
    return TokenStream(np.concatenate(encoded), starts.astype(np.int32))


def _check_length(stream: TokenStream, window: int) -> None:
    length = stream.tokens_N.shape[0]
    require(
        length > window, "num_documents", len(stream.starts_E), f"more: {length} characters fill no window of {window}"
    )


def sample_stream(stream: TokenStream, key: jax.Array, batch: int, window: int) -> Windows:
    """Windows [batch, window] that start anywhere in the stream, at position 0, attending across documents."""
    _check_length(stream, window)
    last = stream.tokens_N.shape[0] - window
    offsets_B = jax.random.randint(key, (batch,), 0, last)
    text_BxT = jnp.asarray(stream.tokens_N)[offsets_B[:, None] + jnp.arange(window + 1)[None]].astype(jnp.int32)
    positions_BxT = jnp.broadcast_to(jnp.arange(window)[None], (batch, window))
    zeros_BxT = jnp.zeros((batch, window), jnp.int32)
    return Windows(text_BxT[:, :-1], text_BxT[:, 1:], positions_BxT, zeros_BxT, zeros_BxT == 0)


def sample_documents(
    stream: TokenStream, key: jax.Array, batch: int, window: int, block: int, start_share: float = 0.0
) -> Windows:
    """Windows [batch, window] that start with a document, each at a random position of the block.

    Every document is a segment of its own, and the first character of the next document is not predicted.

    Args:
      start_share: how likely a window is at position 0 instead.
    """
    _check_length(stream, window)
    document_key, position_key = jax.random.split(key)
    usable = jnp.searchsorted(jnp.asarray(stream.starts_E), stream.tokens_N.shape[0] - window)
    documents_B = jax.random.randint(document_key, (batch,), 0, usable)
    index_BxT = jnp.asarray(stream.starts_E)[documents_B][:, None] + jnp.arange(window + 1)[None]
    text_BxT = jnp.asarray(stream.tokens_N)[index_BxT].astype(jnp.int32)
    segments_BxT = jnp.searchsorted(jnp.asarray(stream.starts_E), index_BxT, side="right").astype(jnp.int32)
    offsets_B = jax.random.randint(position_key, (batch,), 0, block - window + 1)
    at_start_B = jax.random.bernoulli(jax.random.fold_in(position_key, 0), start_share, (batch,))
    offsets_B = jnp.where(at_start_B, 0, offsets_B)
    positions_BxT = offsets_B[:, None] + jnp.arange(window)[None]
    mask_BxT = segments_BxT[:, 1:] == segments_BxT[:, :-1]
    return Windows(text_BxT[:, :-1], text_BxT[:, 1:], positions_BxT, segments_BxT[:, :-1], mask_BxT)
