"""The receiving side of `host`: a file in this machine's shared memory."""

import os

from common.machine import boot_id
from common.weights.updates import HostUpdate
from common.weights.weight_file import verify
from rollout_server.weights.receiver import Arrived, NotReachable


def receive(update: HostUpdate, deadline: float) -> Arrived:
    """Find the file that the learner wrote, and compare it with what the learner sent.

    Raises:
        NotReachable: it is another machine's.
        DamagedWeights: it is not what was sent.
    """
    try:
        file = os.open(update.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotReachable(_elsewhere(update)) from None
    try:
        state = os.fstat(file)
    finally:
        os.close(file)
    if (state.st_dev, state.st_ino) != update.file_id or boot_id() != update.boot_id:
        raise NotReachable(_elsewhere(update))
    verify(update.path, update.checksum, in_memory=True)
    return Arrived({"path": update.path}, update.checksum)


def _elsewhere(update: HostUpdate) -> str:
    where = "this machine" if boot_id() == update.boot_id else "another machine"
    return (
        f"the learner, on {where}, put weights of version {update.version} into shared memory that this replica does "
        "not share. sync.transport 'host' is for replicas that share /dev/shm with the learner; set sync.transport to "
        "'disk' (with a directory that all machines see) or to 'gloo' (over the network)"
    )
