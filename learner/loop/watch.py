"""Warnings of a run that still runs but has stopped to learn: metrics that cross the thresholds of `warnings`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common import metrics as names
from common.config.run import WarningsConfig

REPEAT_STEPS = 50
"""A warning that lasts is repeated after so many steps."""


@dataclass(frozen=True, slots=True)
class _Limit:
    setting: str
    metric: str
    above: bool
    meaning: str


_LIMITS = (
    _Limit("truncated_share", names.TRUNCATED_SHARE, True, "of the responses were cut off at max_response_tokens"),
    _Limit("repeated_share", names.REPEATED_SHARE, True, "of the text is repetition of what the response said before"),
    _Limit("entropy", names.ENTROPY, False, "nats of entropy are left in the policy: it samples the same every time"),
    _Limit(
        "drop_bias",
        names.DROP_BIAS,
        True,
        "more of the responses that took something back were dropped as too old than of the others: training comes to "
        "see less of what erasure does",
    ),
    _Limit("reward_spread", names.REWARD_SPREAD, False, "is how far a group's rewards differ: nothing to learn from"),
)


class Watch:
    """Compares each step's metrics with the thresholds, and remembers which of them were crossed before."""

    def __init__(self, config: WarningsConfig) -> None:
        self._config = config
        self._since: dict[str, int] = {}

    def check(self, step: int, metrics: Mapping[str, Any]) -> list[str]:
        """What to tell of this step: thresholds that it crosses or goes on to, and those that it is past.

        After the first step that crosses one, only every `REPEAT_STEPS`-th is told.
        """
        told = []
        for limit in _LIMITS:
            threshold: float | None = getattr(self._config, limit.setting)
            value = metrics.get(limit.metric)
            if threshold is None or value is None:
                continue
            crossed = value > threshold if limit.above else value < threshold
            since = self._since.get(limit.setting)
            setting = f"warnings.{limit.setting} is {threshold:g}"
            if crossed:
                first = self._since.setdefault(limit.setting, step)
                if (step - first) % REPEAT_STEPS == 0:
                    lasting = f", since step {first}" if step > first else ""
                    told.append(f"warning, step {step}: {value:.3g} {limit.meaning} ({setting}{lasting})")
            elif since is not None:
                del self._since[limit.setting]
                told.append(f"step {step}: {limit.metric} is {value:.3g} again ({setting})")
        return told

    @property
    def active(self) -> int:
        """How many thresholds the last step crossed."""
        return len(self._since)
