"""Publishing a policy: from the learner's ranks to every replica."""

from common.interfaces import Rollouts
from learner.policy.group import LearnerGroup
from learner.run.errors import PartError, part


async def publish(learner: LearnerGroup, rollouts: Rollouts, version: int, deadline_seconds: float) -> int:
    """Push the learner's weights to all replicas as `version`; returns the bytes of one copy."""
    with part("weight sync"):
        async with learner.publishing(version) as update:
            report = await rollouts.sync(update, deadline_seconds)
    if report.version != version:
        raise PartError("weight sync", f"replicas hold version {report.version}, not {version}")
    return report.bytes
