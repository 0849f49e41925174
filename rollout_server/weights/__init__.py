"""The receiving side of weight sync: transports into vLLM's workers, and checkpoint directories as updates."""
