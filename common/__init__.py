"""What rollout server and learner share: configuration, the trajectory schema, reference mathematics, seeds.

Imported by `rollout_server`, `learner` and tests; imports neither of them, nor Ray, vLLM or DeepSpeed.
"""
