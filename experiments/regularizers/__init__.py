"""Compares every regularizer: ``__main__`` trains, ``methods`` lists them, ``results`` counts, tells and draws."""
