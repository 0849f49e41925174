"""Pydantic models of every request and answer: strict, with bounds on every number and examples."""
