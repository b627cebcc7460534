"""Checkpoints: our own (Orbax, with SHA-256 manifests), and GPT-2 files that others made.

What may come from somebody else is read as data, and nothing in it is believed before it is checked.
"""

from ckl_jax.checkpoint.shipped import SHIPPED_TINY
from ckl_jax.checkpoint.store import Model, fingerprint, load_model, save_model

__all__ = ["SHIPPED_TINY", "Model", "fingerprint", "load_model", "save_model"]
