"""Publishing a policy: from the learner's ranks to every replica."""

from common.interfaces import Rollouts
from learner.policy.group import LearnerGroup
from learner.run.errors import PartError, part


async def publish(learner: LearnerGroup, rollouts: Rollouts, version: int, deadline_seconds: float) -> int:
    """Push the learner's weights to all replicas as `version`; returns the bytes of one copy."""
    with part("weight sync"):
        update = await learner.export_weights(version)
        try:
            report = await rollouts.sync(update, deadline_seconds)
        finally:
            await learner.release_weights(update)
    if report.version != version:
        raise PartError("weight sync", f"replicas hold version {report.version}, not {version}")
    return report.bytes
