"""Measures speed, memory and what limits them; ``__main__`` has the command and the list of sections.

This file imports nothing: ``process`` is started alone to measure what a program costs from its start.
"""
