"""Erasable generation on vLLM: segment monitor, rollback, Ray actors and pool, receiving side of weight sync.

Imports `common`, vLLM and Ray; never `learner`.
"""
