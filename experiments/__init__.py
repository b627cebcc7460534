"""The paper's figures and tables, one command each: ``python -m experiments.<name>``.

A file is a command. A folder with a ``__main__`` is a command with rooms. ``common`` is what several figures share;
``results`` is what was published.
"""

import sys

if sys.argv[:1] == ["-m"]:  # As in ckl_jax.
    from ckl_jax.runtime import startup

    startup.before_imports("jax", "matplotlib")
