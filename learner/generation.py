"""From requests to rewarded groups: everything between the rollout side and the learner."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import cast

from common.config.run import RunConfig
from common.interfaces import Rollouts
from common.stops import text_before_stop
from common.trajectory import Group, Prompt, ResponseRequest, Trajectory
from learner.rewards import RewardItem, Rewards
from learner.step_checks import Decoder

GRACE_SECONDS = 30.0
Stream = AsyncGenerator[Trajectory, None]


async def generate_groups(
    rollouts: Rollouts,
    config: RunConfig,
    prompts: Sequence[Prompt],
    requests: Sequence[Sequence[ResponseRequest]],
    grace_seconds: float = GRACE_SECONDS,
) -> list[Group]:
    """All responses, in the order of the requests, whatever the order in which they finish.

    `prompts` and `requests` go together. The rollout side watches over its replicas; here the next response is waited
    for no longer than that watch and `grace_seconds`. Raises TimeoutError that says how many responses are missing,
    and RuntimeError if the rollout side ends early or answers what was not asked for.
    """
    wanted = {(r.group_id, r.sample) for group in requests for r in group}
    found: dict[tuple[str, int], Trajectory] = {}
    seconds = config.rollout.engine.response_seconds + grace_seconds
    clock = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(seconds) as deadline:
            # Leaving early must end the generator at once, so that its requests are cancelled.
            async with aclosing(cast(Stream, rollouts.generate(requests))) as trajectories:
                async for trajectory in trajectories:
                    found[trajectory.group_id, trajectory.sample] = trajectory
                    deadline.reschedule(clock() + seconds)
    except TimeoutError as error:
        raise TimeoutError(
            f"{len(wanted) - len(found)} of {len(wanted)} responses are missing, and none arrived within {seconds:g} s"
        ) from error
    if found.keys() != wanted:
        missing, strange = len(wanted - found.keys()), len(found.keys() - wanted)
        raise RuntimeError(f"{missing} of {len(wanted)} responses are missing, {strange} were not asked for")
    return [
        Group(prompt=prompt, trajectories=[found[r.group_id, r.sample] for r in group])
        for prompt, group in zip(prompts, requests, strict=True)
    ]


async def reward_groups(
    rewards: Rewards, groups: Sequence[Group], decoder: Decoder, stops: Sequence[str] = ()
) -> tuple[list[Group], int]:
    """The groups with every response's text and reward, and how many rewards were not ready in time (and are 0).

    The text is the decoding of the committed tokens, special ones left out, up to the stop string
    that ended the response.
    """
    responses = [(group.prompt, t) for group in groups for t in group.trajectories]
    decoded = decoder.batch_decode([t.token_ids for _, t in responses], skip_special_tokens=True)
    texts = [text_before_stop(text, stops) for text in decoded]
    items = [
        RewardItem(prompt.id, prompt.text, text, prompt.answer)
        for (prompt, _), text in zip(responses, texts, strict=True)
    ]
    scores = await rewards.score(items)
    finished = (
        t.model_copy(update={"text": text, "reward": reward})
        for (_, t), text, reward in zip(responses, texts, scores.values, strict=True)
    )
    rewarded = [
        Group(prompt=group.prompt, trajectories=[next(finished) for _ in group.trajectories]) for group in groups
    ]
    return rewarded, scores.timeouts
