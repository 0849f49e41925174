"""Tasks that the project makes itself: problems generated from a seed, whose every step can be verified.

`chain` is the demo's task, chains of single-digit arithmetic. A task module knows problems, prompts and how
to check a response, as text; it knows nothing of tokenizers, models or rollouts. It may be imported by
anything in `learner`, and imports only the standard library.
"""

from learner.environments.tasks.chain import SPLITS, ChainCheck, ChainProblem, Split, check, generate, parse_prompt

__all__ = ["SPLITS", "ChainCheck", "ChainProblem", "Split", "check", "generate", "parse_prompt"]
