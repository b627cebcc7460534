"""Attention inside a document: plain, fused for a TPU or a GPU, and against a cache of keys and values."""
