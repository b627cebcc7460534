"""Prioritized KL for RL fine-tuning of language models, in JAX."""
