"""What a run will need and how long its steps will take, by arithmetic: memory by part, seconds by phase.

`shape` reads a model's sizes, `hardware` a machine's, `assumptions` says what neither does, `setup` where parts are.
One formula a part: `memory`, `work`, `generation`, `training`, `transfer`. `capacity` puts them together. The dry run
and `learner.plan` use them. Imports `common`, and of `learner` only what costs no engine.
"""
