"""The baselines that `--compare` runs after a run."""

from common.config import RunConfig, variant
from learner.run.errors import InputError

BASELINES = ("grpo", "temperature_control")


def comparison_baselines(config: RunConfig) -> list[RunConfig]:
    """The configurations of the baselines. Raises InputError or ConfigError for a run that can't be compared."""
    schedule = config.learner.optimizer.schedule
    if schedule != "constant":
        raise InputError(
            f"--compare needs learner.optimizer.schedule: constant, not {schedule}: for the same tokens the baselines "
            "take other numbers of steps, and so their learning rates would differ"
        )
    return [variant(config, preset, f"{config.name}-{preset}") for preset in BASELINES]
