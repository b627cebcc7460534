import sys

if sys.argv[:1] == ["-m"]:  # As in ckl_jax.
    from ckl_jax.runtime import startup

    startup.before_imports("jax", "matplotlib")
