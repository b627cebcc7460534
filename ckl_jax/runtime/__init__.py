"""The machine: its devices, hosts, paths, signals and streams, and how a command starts and ends.

Imports nothing but ``ckl_jax.errors`` and ``ckl_jax.fields``; ``startup`` and ``xla_cpu`` come before JAX, so nothing
is re-exported here.
"""
