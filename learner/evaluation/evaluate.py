"""Avg@k and Pass@k on held-out problems, under plain and under erasable sampling."""

from collections.abc import Sequence
from math import comb
from statistics import fmean
from typing import Literal

from common.config import StrictModel
from common.config.run import RunConfig
from common.packed import Group
from common.seeds import derive_seed
from common.trajectory import Prompt, ResponseRequest
from learner.environments.step_checks import StepCounts, checks_steps
from learner.loop.step_metrics import erase_rate
from learner.loop.treatment import is_success

Mode = Literal["plain", "erasable"]
MODES: tuple[Mode, ...] = ("plain", "erasable")


class Evaluation(StrictModel):
    """One evaluation. `k`: responses per problem, of which every one counts for Avg@k and Pass@k.

    Some rewards count as 0: `reward_timeouts` were not ready in time, `reward_errors` failed, and
    `reward_unusable_answers` had a reference answer that nothing can be compared with. `cascade_rate` is null for a
    task whose steps can't be checked; `recovered_rate` also under plain sampling.
    """

    step: int
    mode: Mode
    problems: int
    k: int
    avg_at_k: float
    pass_at_k: float
    mean_reward: float
    reward_timeouts: int = 0
    reward_errors: int = 0
    reward_unusable_answers: int = 0
    cascade_rate: float | None
    recovered_rate: float | None
    generated_tokens: int
    erased_tokens: int
    erasures: int
    erase_rate: float
    seconds: float


def evaluation_requests(config: RunConfig, prompts: Sequence[Prompt], mode: Mode) -> list[list[ResponseRequest]]:
    """A group for each problem. Erasable: all responses are, with the run's policy; plain: exactly plain vLLM.

    The seeds are the same at every evaluation, so that before and after differ by the policy alone.
    """
    k = config.evaluation.responses_per_problem
    return [
        [
            ResponseRequest(
                prompt_id=prompt.id,
                group_id=f"evaluation-{mode}-{prompt.id}",
                group_size=k,
                sample=sample,
                seed=derive_seed(config.evaluation.seed, "evaluation", prompt.id, sample),
                prompt_token_ids=prompt.token_ids,
                max_tokens=config.rollout.max_response_tokens,
                temperature=config.rollout.temperature,
                stop=config.rollout.stop,
                policy=config.rollout.erasure if mode == "erasable" else None,
                attempt_texts=checks_steps(config),
                erasable=mode == "erasable",
            )
            for sample in range(k)
        ]
        for prompt in prompts
    ]


def evaluate_groups(
    step: int,
    mode: Mode,
    k: int,
    groups: Sequence[Group],
    counts: StepCounts | None,
    seconds: float,
    reward_timeouts: int = 0,
    reward_errors: int = 0,
    reward_unusable_answers: int = 0,
    *,
    success_threshold: float,
) -> Evaluation:
    """The figures of one evaluation's rewarded groups. `counts`: null where steps can't be checked."""
    responses = [trajectory for group in groups for trajectory in group.trajectories]
    successes = [sum(is_success(t.reward, success_threshold) for t in group.trajectories) for group in groups]
    return Evaluation(
        step=step,
        mode=mode,
        problems=len(groups),
        k=k,
        avg_at_k=fmean(is_success(t.reward, success_threshold) for t in responses),
        pass_at_k=fmean(
            pass_at_k(len(group.trajectories), count, k) for group, count in zip(groups, successes, strict=True)
        ),
        mean_reward=fmean(t.reward or 0.0 for t in responses),
        reward_timeouts=reward_timeouts,
        reward_errors=reward_errors,
        reward_unusable_answers=reward_unusable_answers,
        cascade_rate=None if counts is None else counts.cascade_rate,
        recovered_rate=counts.recovered_rate if counts is not None and mode == "erasable" else None,
        generated_tokens=sum(t.generated_tokens for t in responses),
        erased_tokens=sum(t.erased_tokens for t in responses),
        erasures=sum(t.erasures for t in responses),
        erase_rate=erase_rate(responses),
        seconds=seconds,
    )


def pass_at_k(responses: int, successes: int, k: int) -> float:
    """Probability that k of the responses, drawn without replacement, hold a success. Unbiased for k <= responses.

    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.
    """
    if not 1 <= k <= responses:
        raise ValueError(f"pass@{k} needs at least {k} responses, there are {responses}")
    return 1.0 - comb(responses - successes, k) / comb(responses, k)
