"""What one training step has to do: responses, tokens, floating-point operations, bytes."""

import math
from dataclasses import dataclass

from common.config.erasure import DelimiterSegmentation
from common.config.run import SENTINEL_STEPS, RunConfig
from learner.planning.assumptions import Assumptions
from learner.planning.shape import ModelShape

ERASURE_STEPS = 2
"""Engine steps that an erasure loses, its sentinel included: measured by `make bench`."""


@dataclass(frozen=True, slots=True)
class Work:
    """Of one step. Lengths are means. `engine_tokens`: engine steps of one response, the mean over treatments."""

    responses: int
    prompt_tokens: float
    response_tokens: float
    generated_tokens: float
    erased_tokens: float
    erasures: float
    engine_steps: float
    sequences: float
    sequence_tokens: float
    trained_tokens: float
    predicted_tokens: float

    @property
    def committed_tokens(self) -> float:
        return self.generated_tokens - self.erased_tokens


def step_work(config: RunConfig, assumptions: Assumptions) -> Work:
    """`trained_tokens`: of prompts and responses, with padding; `predicted_tokens`: those that carry loss."""
    rollout, responses = config.rollout, config.responses_per_step
    prompt = assumptions.mean_prompt_tokens or float(rollout.max_prompt_tokens)
    response = assumptions.mean_response_tokens or float(rollout.max_response_tokens)
    erased = _erased_tokens(config, assumptions, response)
    treated = config.treated_per_group * rollout.groups_per_step
    erasures = treated * erased / segment_tokens(config)
    generated = responses * response + treated * erased
    learner = config.learner
    sequences = responses * assumptions.signal_share
    tokens, predicted = sequences * (prompt + response), sequences * response
    if learner.advantage.erased_weight > 0.0:
        # Each erased attempt is a sequence of its own, on the prefix that stood before it: half a response on average.
        sequences += erasures * assumptions.signal_share
        tokens += assumptions.signal_share * (erasures * (prompt + response / 2) + treated * erased)
        predicted += assumptions.signal_share * treated * erased
    return Work(
        responses=responses,
        prompt_tokens=prompt,
        response_tokens=response,
        generated_tokens=generated,
        erased_tokens=treated * erased,
        erasures=erasures,
        engine_steps=generated / responses + SENTINEL_STEPS + ERASURE_STEPS * erasures / responses,
        sequences=sequences,
        sequence_tokens=tokens / sequences,
        trained_tokens=tokens / (1.0 - assumptions.padding_share),
        predicted_tokens=predicted,
    )


def _erased_tokens(config: RunConfig, assumptions: Assumptions, response: float) -> float:
    """Of one erasable response."""
    erasure = config.rollout.erasure
    if config.rollout.treatment.kind != "erasure" or erasure.max_erasures == 0:
        return 0.0
    share = assumptions.erased_share
    return min(response * share / (1.0 - share), float(erasure.erased_token_limit(config.rollout.max_response_tokens)))


def segment_tokens(config: RunConfig) -> float:
    """Of a segment, the mean; where text decides, the middle between its shortest and its longest."""
    segmentation = config.rollout.erasure.segmentation
    if isinstance(segmentation, DelimiterSegmentation):
        longest = min(segmentation.max_length, config.rollout.max_response_tokens)
        return (min(segmentation.min_length, longest) + longest) / 2
    return float(min(segmentation.length, config.rollout.max_response_tokens))


def attention_operations(shape: ModelShape, context: float) -> float:
    """Of one token's forward pass that attends to `context` others: with the keys, and with the values."""
    return 4.0 * shape.layers * shape.heads * shape.head_dim * context


def training_operations(config: RunConfig, shape: ModelShape, work: Work) -> float:
    """Of a step, all ranks: forward and backward (twice the forward), recomputation of activations, other forwards.

    These are the reference policy's, and the policy's own for `old_logprobs: recomputed`.
    """
    learner = config.learner
    body = 2.0 * (shape.multiplied - shape.head_parameters) + attention_operations(shape, work.sequence_tokens / 2)
    head = 2.0 * shape.head_parameters
    passes = 3 + (learner.objective.kl_coefficient > 0.0) + (learner.old_logprobs == "recomputed")
    # A layer is computed again up to what its last product needs.
    again = body - 2.0 * shape.layers * shape.hidden * shape.intermediate if learner.gradient_checkpointing else 0.0
    return work.trained_tokens * (body * passes + again) + work.predicted_tokens * head * passes


def microbatches(config: RunConfig, work: Work) -> int:
    """Of one rank in a step."""
    learner = config.learner
    each = work.sequences / (learner.minibatches_per_step * learner.ranks)
    fit = max(int(learner.tokens_per_microbatch // work.sequence_tokens), 1)
    return learner.minibatches_per_step * math.ceil(each / fit)
