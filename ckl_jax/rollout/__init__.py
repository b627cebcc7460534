"""Answers: step by step, or by verifying drafts; what an episode is as arrays.

Imports the model and ``ckl_jax.tasks``, nothing of training.
"""

from ckl_jax.rollout.decoding import rollout
from ckl_jax.rollout.generation import generate
from ckl_jax.rollout.speculative import Verified, speculative_rollout
from ckl_jax.rollout.trajectory import Sampling, Trajectory, score

__all__ = ["Sampling", "Trajectory", "Verified", "generate", "rollout", "score", "speculative_rollout"]
