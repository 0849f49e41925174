"""Hand-made rollouts for tests: trajectories of given segments, with random tokens and log-probs."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from common.packed import Group, pack, unpack
from common.threshold import GroupStatistics, History
from common.trajectory import Attempt, Judgement, Prompt, Trajectory, Verdict, VersionSpan

PROMPT_TOKENS = (10, 20, 30, 40)


def judgement(uncertainty: float) -> Judgement:
    """A judgement of which only the uncertainty matters."""
    return Judgement(
        uncertainty=uncertainty,
        base=uncertainty,
        extreme=0.0,
        gradient=0.0,
        baseline=None,
        penalty=1.0,
        modulation=1.0,
        threshold=None,
        statistics=GroupStatistics(0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        history=History(),
        erased_tokens_before=0,
    )


def attempt_of(
    token_ids: Sequence[int],
    *,
    segment: int,
    start: int,
    number: int = 0,
    verdict: Verdict = "accepted",
    logprobs: Sequence[float] | None = None,
    temperature: float = 1.0,
    version: int = 0,
    uncertainty: float | None = None,
) -> Attempt:
    """An attempt of these tokens. `logprobs`: -0.5 each unless given; the signal is their cross-entropy."""
    values = [-0.5] * len(token_ids) if logprobs is None else list(logprobs)
    return Attempt(
        segment=segment,
        attempt=number,
        start=start,
        end=start + len(token_ids),
        token_ids=list(token_ids),
        logprobs=values,
        behaviour_logprobs=values,
        signal=[-value for value in values],
        temperature=temperature,
        versions=[VersionSpan(start=0, end=len(token_ids), version=version)],
        verdict=verdict,
        judgement=None if uncertainty is None else judgement(uncertainty),
    )


def attempt(rng: np.random.Generator, segment: int, start: int, length: int, **options: Any) -> Attempt:
    """An attempt with random tokens below 256 and log-probs between -6 and -0.1; `options` are `attempt_of`'s."""
    logprobs = rng.uniform(-6.0, -0.1, length).tolist()
    tokens = rng.integers(0, 256, length).tolist()
    return attempt_of(tokens, segment=segment, start=start, logprobs=logprobs, **options)


def trajectory(
    attempts: Sequence[Attempt], *, reward: float | None, sample: int = 0, prompt_id: str = "p0"
) -> Trajectory:
    """A response to `PROMPT_TOKENS`."""
    return Trajectory(
        prompt_id=prompt_id,
        group_id=prompt_id,
        sample=sample,
        seed=sample,
        prompt_token_ids=list(PROMPT_TOKENS),
        attempts=list(attempts),
        erasable=True,
        finish_reason="stop",
        reward=reward,
    )


def random_trajectory(
    rng: np.random.Generator,
    *,
    sample: int,
    reward: float,
    segments: int = 3,
    prompt_id: str = "p0",
    temperature: float = 1.0,
    judged: bool = True,
) -> Trajectory:
    """A response of segments of 2 to 7 tokens, about half of them generated twice.

    Of two attempts the second is accepted; in every third segment the first is, as where the best one is kept.
    """
    attempts, start = [], 0
    for segment in range(segments):
        erased = int(rng.random() < 0.5)
        accepted = 0 if segment % 3 == 2 else erased
        for number in range(erased + 1):
            length = int(rng.integers(2, 8))
            attempts.append(
                attempt(
                    rng,
                    segment,
                    start,
                    length,
                    number=number,
                    verdict="accepted" if number == accepted else "erased",
                    temperature=temperature,
                    uncertainty=float(rng.uniform(0.1, 3.0)) if judged else None,
                )
            )
        start = attempts[accepted - erased - 1].end
    return trajectory(attempts, reward=reward, sample=sample, prompt_id=prompt_id)


def random_groups(seed: int, groups: int, size: int, *, segments: int = 3) -> list[Group]:
    """Groups with mixed 0 and 1 rewards and mixed temperatures."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(groups):
        name = f"p{index}"
        members = [
            random_trajectory(
                rng,
                sample=sample,
                reward=float((sample + index) % 3 == 0),
                segments=int(rng.integers(1, segments + 1)),
                prompt_id=name,
                temperature=1.0 if sample % 2 else 0.7,
            )
            for sample in range(size)
        ]
        prompt = Prompt(id=name, text="", token_ids=list(PROMPT_TOKENS))
        made.append(Group(prompt, [pack(member) for member in members]))
    return made


def unpacked(group: Group) -> list[Trajectory]:
    """The group's responses as lists."""
    return [unpack(response) for response in group.trajectories]


def changed(group: Group, change: Callable[[Trajectory], Trajectory]) -> Group:
    """The group with `change` of each of its responses."""
    return Group(group.prompt, [pack(change(response)) for response in unpacked(group)])


def with_rewards(group: Group, rewards: Sequence[float | None]) -> Group:
    """The group with other rewards."""
    return Group(group.prompt, [replace(t, reward=r) for t, r in zip(group.trajectories, rewards, strict=True)])


def recorded_near(policy: Any, groups: Sequence[Group], *, noise: float = 0.2, seed: int = 0) -> list[Group]:
    """`groups` with the behaviour log-probs that a policy near `policy` would have recorded for their tokens."""
    generator = torch.Generator().manual_seed(seed)

    def recorded(response: Trajectory) -> Trajectory:
        attempts = []
        for one in response.attempts:
            earlier = [a for a in response.attempts if a.verdict == "accepted" and a.segment < one.segment]
            kept = list(response.prompt_token_ids) + [token for a in earlier for token in a.token_ids]
            with torch.no_grad():
                logits = policy(input_ids=torch.tensor([kept + one.token_ids])).logits[0]
            rows = (logits[len(kept) - 1 : -1] / one.temperature).log_softmax(-1)
            logprobs = rows.gather(-1, torch.tensor(one.token_ids)[:, None])[:, 0]
            noisy = logprobs + noise * torch.randn(logprobs.shape, generator=generator)
            attempts.append(one.model_copy(update={"behaviour_logprobs": noisy.tolist()}))
        return response.model_copy(update={"attempts": attempts})

    return [changed(group, recorded) for group in groups]
