"""The segment monitor in vLLM's terms: one module for each of its interfaces for logits processors."""
