"""The newest weights of a pool: which version may come next, and what a replica that comes back has to load."""

from typing import Protocol

from common.weights import WeightUpdate
from rollout_server.replicas.errors import VersionNotNewer

MAX_VERSION = 2**63 - 1
MAX_REASON_CHARACTERS = 500


class Kept(Protocol):
    """Weights that can be loaded again, whatever becomes of the checkpoint that they are from."""

    def path(self) -> str:
        """Where a replica finds the file now."""
        ...


class Newest:
    """`update`: the newest weights that any replica has loaded, or that were published; null: those of the start.

    `kept`: where they are, if not where `update` says. `served`, `tried`: the newest version that any replica has
    loaded, and that any was given.
    """

    def __init__(self) -> None:
        self.update: WeightUpdate | None = None
        self.kept: Kept | None = None
        self.served = 0
        self.tried = 0

    def check(self, version: int | None) -> None:
        """Raises `VersionNotNewer` if weights of this version cannot be the next ones that are served."""
        if version is not None and version < self.served:
            raise VersionNotNewer(f"version {self.served} has been served, and versions never fall: not {version}")

    def number(self, update: WeightUpdate, version: int | None) -> int:
        """The version that `update` gets: `version`, or the next one. Raises `VersionNotNewer`."""
        if version is None:
            if self.tried >= MAX_VERSION:
                raise VersionNotNewer(f"version {MAX_VERSION} was the last one that there is")
            return self.tried + 1
        self.check(version)
        known = self.update
        again = known is not None and (known.version, known.checksum) == (version, update.checksum)
        if version == self.served and not again:
            raise VersionNotNewer(f"version {version} has been served with other weights")
        return version

    def take(self, update: WeightUpdate, kept: Kept | None) -> None:
        """From now on these are the newest."""
        self.update, self.kept = update, kept

    @property
    def to_load(self) -> WeightUpdate | None:
        """What a replica that was just started has to load."""
        if self.update is None or self.kept is None:
            return self.update
        return self.update.model_copy(update={"path": self.kept.path()})


def why_not(error: Exception, update: WeightUpdate | None) -> str:
    """Why something failed, for the operator: one line, without the path of the weights."""
    if isinstance(error, TimeoutError):
        return "not within the deadline"
    text = str(error) if update is None else str(error).replace(update.place, "the file")
    return f"{type(error).__name__}: {' '.join(text.split())[:MAX_REASON_CHARACTERS]}"
