"""Table 1: ``__main__`` states the rules and samples answers, ``counting``, ``verdicts`` and ``tables`` do the rest."""
