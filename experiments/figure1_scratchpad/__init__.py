"""Figure 1: ``__main__`` has the model answer one problem, ``drawing`` draws the answer."""
