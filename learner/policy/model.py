"""The policy as the learner runs it: loading a causal language model, and log-probs of given tokens."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from common.config.run import ModelConfig, OptimizerConfig
from learner.policy.batching import MicroBatch


class PolicyError(RuntimeError):
    """A model that can't be loaded; the message names it and says why."""


def load_policy(config: ModelConfig) -> nn.Module:
    """The causal language model of `config.path`, on the CPU, without dropout.

    Dropout would make the learner's log-probs differ from those that were sampled from. Raises PolicyError.
    """
    try:
        settings = AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        for name in list(vars(settings)):
            if name.endswith(("dropout", "pdrop")):
                setattr(settings, name, 0.0)
        model = AutoModelForCausalLM.from_pretrained(
            config.path,
            config=settings,
            revision=config.revision,
            dtype=getattr(torch, config.dtype),
            trust_remote_code=config.trust_remote_code,
        )
    except Exception as error:
        # transformers raises anything from OSError to KeyError here, some of which can't be sent to the driver.
        raise PolicyError(
            f"can't load model {config.path!r} as a causal language model: {type(error).__name__}: {error}"
        ) from None
    return cast(nn.Module, model)


def response_logprobs(model: Any, batch: MicroBatch) -> Tensor:
    """Log-probs of the predicted tokens at their own temperatures, [B, T - first - 1], float32; 0 where masked.

    Only positions that predict a response go through the head and the softmax over the vocabulary.
    """
    width = batch.token_ids.shape[1]
    positions = torch.arange(batch.first, width - 1, device=batch.token_ids.device)
    logits = model(input_ids=batch.token_ids, logits_to_keep=positions, use_cache=False).logits
    chosen = token_logprobs(logits[batch.mask], batch.targets[batch.mask], batch.temperatures[batch.mask])
    logprobs = torch.zeros_like(batch.behaviour_logprobs).masked_scatter(batch.mask, chosen)
    # Every parameter takes part in the graph of an empty micro-batch too: ZeRO waits for their gradients.
    return logprobs if bool(batch.mask.any()) else logprobs + 0.0 * logits.float().sum()


def token_logprobs(logits: Tensor, tokens: Tensor, temperatures: Tensor) -> Tensor:
    """`log_softmax(logits / temperature)` at `tokens`, [tokens]; logits are [tokens, vocabulary]."""
    scaled = logits.float() / temperatures[:, None]
    return torch.log_softmax(scaled, dim=-1).gather(-1, tokens[:, None])[:, 0]


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0): linear warm-up, then the schedule to `total_steps`.

    The warm-up's first step is not 0, and the last step of a falling schedule is not either.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    done = min((step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1), 1.0)
    if config.schedule == "linear":
        return config.learning_rate * (1.0 - done)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))
