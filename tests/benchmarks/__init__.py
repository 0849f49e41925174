"""Benchmarks: ratios measured in one run against what a user would pick instead. `make bench` runs them all."""
