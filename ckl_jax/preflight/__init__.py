"""What a command would compute on a machine that is not here: memory, arithmetic and traffic of every program.

``chips`` are the machines, ``programs`` what each command compiles, ``hlo`` reads a compiled program, ``verdict`` says
whether it fits and how fast it can be. This may import everything else; nothing imports it.
"""
