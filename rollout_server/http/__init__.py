"""The HTTP endpoint: OpenAI's API with erasable generation, over the engine that training uses.

Imports `common`, the engine in `rollout_server`, FastAPI and Ray; never `learner`. Nothing is imported here, so that
`python -m rollout_server --help` is fast.
"""
