"""From requests to groups: what the driver asks of the rollout side."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import cast

from common.config.run import RunConfig
from common.interfaces import Rollouts
from common.packed import Group, PackedResponse
from common.trajectory import Prompt, ResponseRequest

GRACE_SECONDS = 30.0
Stream = AsyncGenerator[PackedResponse, None]


async def generate_groups(
    rollouts: Rollouts,
    config: RunConfig,
    prompts: Sequence[Prompt],
    requests: Sequence[Sequence[ResponseRequest]],
    finished: Callable[[PackedResponse], None] = lambda trajectory: None,
    grace_seconds: float = GRACE_SECONDS,
) -> list[Group]:
    """All responses, in the order of the requests, whatever the order in which they finish.

    `prompts` and `requests` go together. `finished` gets each response as it arrives. The rollout side watches over its
    replicas; here the next response is waited for no longer than that watch and `grace_seconds`. Raises TimeoutError
    that says how many responses are missing, and RuntimeError if the rollout side ends early or answers what was not
    asked for.
    """
    wanted = {(r.group_id, r.sample) for group in requests for r in group}
    found: dict[tuple[str, int], PackedResponse] = {}
    seconds = config.rollout.engine.response_seconds + grace_seconds
    clock = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(seconds) as deadline:
            # Leaving early must end the generator at once, so that its requests are cancelled.
            async with aclosing(cast(Stream, rollouts.generate(requests))) as trajectories:
                async for trajectory in trajectories:
                    found[trajectory.group_id, trajectory.sample] = trajectory
                    finished(trajectory)
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
