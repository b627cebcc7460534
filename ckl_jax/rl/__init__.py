"""A round of reinforcement learning: collect, loss, updates, tests, and what runs there are.

Pure functions under jit; nothing here reads or writes a file.
"""
