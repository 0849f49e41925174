"""Training: driver, DeepSpeed ranks, advantages and objectives, data and rewards, sending side of weight sync.

Imports `common`, DeepSpeed, transformers and Ray; never `rollout_server`, except through Ray actor handles.
"""
