"""Faults of every kind, at random moments of a training run on a cluster of several nodes (`make chaos`)."""
