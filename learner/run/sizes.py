"""What the settings of a run come to, by arithmetic alone."""

import math

from common.config import RunConfig


def derived_sizes(config: RunConfig) -> list[tuple[str, str]]:
    """What the settings come to, each with its unit and scope."""
    rollout, learner = config.rollout, config.learner
    responses, minibatches = config.responses_per_step, learner.minibatches_per_step
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    fit = learner.tokens_per_microbatch // longest
    most = math.ceil(math.ceil(responses / (minibatches * learner.ranks)) / fit)
    erased = rollout.erasure.erased_token_limit(rollout.max_response_tokens)
    per_step = responses * rollout.max_response_tokens + treated_erasures(config) * erased
    in_all = per_step * config.steps
    if config.token_budget is not None:
        # The step that reaches the budget is finished.
        in_all = min(in_all, config.token_budget - 1 + per_step)
    concurrent = rollout.engine.replicas * rollout.engine.max_concurrent_responses
    evaluation = config.evaluation.problems * config.evaluation.responses_per_problem
    return [
        (
            "responses per step",
            f"{responses} = {rollout.groups_per_step} groups x {rollout.responses_per_group}",
        ),
        (
            "treated responses per group",
            f"{config.treated_per_group}, {rollout.treatment.kind}, while the share applies",
        ),
        (
            "groups under way",
            f"at most {(config.max_staleness + 1) * rollout.groups_per_step} = (max_staleness "
            f"{config.max_staleness} + 1) x {rollout.groups_per_step} groups per step",
        ),
        ("responses at a time", f"{concurrent} on {rollout.engine.replicas} replica(s)"),
        (
            "optimizer steps",
            f"{config.steps * minibatches} = {config.steps} steps x {minibatches} minibatches",
        ),
        ("responses per optimizer step and rank", f"{responses // (minibatches * learner.ranks)} on average"),
        (
            "longest sequence",
            f"{longest} tokens, {fit} to a micro-batch",
        ),
        (
            "micro-batches per step and rank",
            f"at most {minibatches * most} = {minibatches} minibatches x {most}, where all sequences are the longest",
        ),
        ("generated tokens per step", f"at most {per_step:,}, erased ones included"),
        (
            "generated tokens in all",
            f"at most {in_all:,} for training",
        ),
        ("responses per evaluation", f"{evaluation}, plain and erasable each"),
        (
            "GPUs, where there are any",
            f"{rollout.engine.gpus + learner.ranks} = {rollout.engine.replicas} replica(s)"
            + (f" x {rollout.engine.tensor_parallel_size}" if rollout.engine.tensor_parallel_size > 1 else "")
            + f" + {learner.ranks} learner rank(s)",
        ),
    ]


def treated_erasures(config: RunConfig) -> int:
    """Responses of a step that can be erased from."""
    return (
        config.treated_per_group * config.rollout.groups_per_step if config.rollout.treatment.kind == "erasure" else 0
    )
