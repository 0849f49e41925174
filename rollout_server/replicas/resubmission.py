"""What is left of a group when its replica is lost: generated on another one, from the last judged segments."""

import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence

from common.trajectory import Attempt, ResponseRequest
from rollout_server.replicas.member import Member
from rollout_server.replicas.pool import Pool
from rollout_server.replicas.replica import ReplicaLost

log = logging.getLogger("e3rl.replicas")


async def on_replicas(
    pool: Pool,
    left: Callable[[], int],
    generate: Callable[[Member, int], Awaitable[None]],
    lost: Callable[[ReplicaLost, int], None],
    *,
    waits: bool,
) -> None:
    """Run `generate` on a replica, and again on another one whenever that is lost, until it comes to its end.

    `left`: how many responses there still are to generate. `generate` and `lost` are told how many losses came before;
    `lost` may raise. `waits`: also the first time wait for a replica that is being restarted.

    Raises:
        NoReplicaReady: there is none, and to wait is of no use or not wanted.
    """
    for losses in itertools.count():
        responses = left()
        member = await pool.chosen(responses) if waits or losses else pool.choose(responses)
        restarts = member.restarts
        try:
            await generate(member, losses)
            return
        except ReplicaLost as error:
            pool.lost(member, restarts=restarts)
            lost(error, losses)
        finally:
            pool.leave(member, responses)
        pool.resubmissions += 1
        log.warning("replica %d is lost; what its %d responses lack is generated on another", member.number, left())


def requests_again(known: Sequence[tuple[ResponseRequest, list[Attempt], bool]], number: int) -> list[ResponseRequest]:
    """Requests for what responses lack, as a group of its own: the statistics of the first one are gone.

    `known`: of each response its request, its judged attempts and whether they are all of it. `number`: of the try.
    """
    size = sum(not complete for _, _, complete in known)
    return [
        request.model_copy(
            update={
                "group_id": f"{request.group_id}~{number}",
                "group_size": max(size, 1),
                "resume_from": attempts,
            }
        )
        for request, attempts, _ in known
    ]
