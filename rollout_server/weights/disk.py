"""The receiving side of `disk`: a file in a directory that this machine shares with the learner's."""

from common.weights.updates import DiskUpdate
from common.weights.weight_file import verify
from rollout_server.weights.receiver import Arrived


def receive(update: DiskUpdate, deadline: float) -> Arrived:
    """Compare the file with what was sent.

    Raises:
        DamagedWeights: it is not what was sent.
        OSError: it cannot be read.
    """
    try:
        verify(update.path, update.checksum)
    except FileNotFoundError:
        raise FileNotFoundError(f"{update.path} is not there: does this machine see that directory?") from None
    return Arrived({"path": update.path}, update.checksum)
