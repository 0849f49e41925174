"""What the pool says when it cannot do what it is asked for. Every message is fit for a client: it holds no path."""


class NoReplicaReady(Exception):
    """No replica generates now. `final`: none ever will again; all were given up."""

    def __init__(self, message: str, *, final: bool) -> None:
        super().__init__(message)
        self.final = final


class StartFailed(Exception):
    """A replica did not start at first; the message is that of `error`."""

    def __init__(self, number: int, error: Exception) -> None:
        super().__init__(str(error) or type(error).__name__)
        self.number = number
        self.error = error


class VersionNotNewer(Exception):
    """Weights cannot have this version: one that is newer, or the same with other weights, has been served."""


class WeightsNotLoaded(Exception):
    """Some replicas do not hold the weights; the message says what each of them said.

    `may_come`: they are being restarted, and get these weights or newer ones before they serve.
    """

    def __init__(self, message: str, *, may_come: bool) -> None:
        super().__init__(message)
        self.may_come = may_come
