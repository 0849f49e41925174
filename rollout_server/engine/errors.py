"""What can go wrong in an erasable engine. Needs no vLLM, so that others can tell these errors apart."""


class RecordLost(RuntimeError):
    """The engine ended a request, but the monitor's record of why did not arrive, or not in time."""


class WeightSyncError(RuntimeError):
    """Weights did not arrive as they were sent, or not in time. The engine serves nothing until a sync succeeds."""


class EngineClosed(RuntimeError):
    """The engine was closed before it admitted a request."""


class CannotSample(ValueError):
    """vLLM does not sample with these parameters; the message says why."""


class PromptTooLong(ValueError):
    """Prompt and response together do not fit into the model's length."""


class GenerationAborted(RuntimeError):
    """The engine ended a response on purpose: a pause or a sync with mode `abort`, or a sync that failed."""
