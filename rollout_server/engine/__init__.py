"""The erasable engine: vLLM's, with responses that are rolled back to the start of an uncertain segment.

Others use `engine`. `rollback` erases, `progress` knows how far a response is, `sampling` and `stopping` say how it is
sampled and where it ends; the rest is about vLLM. May import `common` and `rollout_server.monitor`.
"""
