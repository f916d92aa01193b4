"""How good a model is: loss on held-out rows, answers, and their score."""
