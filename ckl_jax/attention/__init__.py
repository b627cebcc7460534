"""Attention inside a document: plain, fused for a TPU, and against a cache of keys and values."""
