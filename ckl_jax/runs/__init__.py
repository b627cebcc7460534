"""A run's directory: its config, metrics and checkpoints, its lock, its progress, and copies of its records."""

from ckl_jax.runs.directory import RunDirectory

__all__ = ["RunDirectory"]
