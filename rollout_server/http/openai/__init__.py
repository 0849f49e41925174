"""OpenAI's API: requests, answers and errors in its shapes, and how responses become them. Nothing here does I/O."""
