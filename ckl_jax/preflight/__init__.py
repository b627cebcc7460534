"""What a command would compute on a machine that is not here: memory, arithmetic and traffic of every program.

``chips`` are the machines, ``programs`` what each command compiles, ``hlo`` reads a compiled program, ``costs`` counts
what it does, with the ``traffic`` of memory and links, ``verdict`` says whether it fits. This may import everything
else; nothing in ``ckl_jax`` imports it.
"""
