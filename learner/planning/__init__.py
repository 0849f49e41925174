"""What a run will need and how long its steps will take, by arithmetic: memory by part, seconds by phase.

`shape` reads a model's sizes, `hardware` a machine's, `assumptions` what neither says; `memory`, `work` and `phases` hold
one formula a part; `capacity` puts them together. The dry run and `learner.plan` both use them. Nothing here starts an
engine. Imports `common`, and of `learner` only constants and readers.
"""
