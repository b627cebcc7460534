"""Figure 5: ``__main__`` samples and counts answers, ``shown`` chooses those that are shown and draws them."""
