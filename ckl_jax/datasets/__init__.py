"""The scratchpads of a task as a TFDS dataset, and the token stream that pre-training reads."""

from ckl_jax.datasets.scratchpads import Scratchpads, ScratchpadsConfig
from ckl_jax.datasets.stream import (
    TokenStream,
    Windows,
    dataset_directory,
    load_stream,
    sample_documents,
    sample_stream,
)

__all__ = [
    "Scratchpads",
    "ScratchpadsConfig",
    "TokenStream",
    "Windows",
    "dataset_directory",
    "load_stream",
    "sample_documents",
    "sample_stream",
]
