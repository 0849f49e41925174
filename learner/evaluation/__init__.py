"""Accuracy on held-out problems, and comparisons with baselines."""
