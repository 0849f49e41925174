"""Checkpoints of a run: written while the next step generates, complete or absent, none of weights that have moved."""

import asyncio
import logging

from common.config.run import RunConfig
from common.manifest import write_manifest
from learner.loop.driver_state import DriverState, newest_state, save_state
from learner.planning.memory import CHECKPOINT_COPIES
from learner.policy.group import LearnerGroup
from learner.run.display import Display
from learner.run.errors import DiskFullError, PartError, part
from learner.run.run_directory import RunDirectory, replacing, require_space

log = logging.getLogger(__name__)


class Checkpoints:
    """Writes what the learner holds, with the driver's state beside it.

    `held_step`: the step whose weights the learner holds; None while it has none, or is in the middle of a step.
    `weight_bytes`: of one copy of the weights. Their owner sets both.
    """

    def __init__(self, config: RunConfig, directory: RunDirectory, learner: LearnerGroup, display: Display) -> None:
        self._config = config
        self._directory = directory
        self._learner = learner
        self._display = display
        self._saving: asyncio.Task[None] | None = None
        self.held_step: int | None = None
        self.weight_bytes = 0

    async def load(self, state: DriverState) -> None:
        """Give the learner the weights of `state`."""
        with part("checkpoint"):
            if state.step:
                await self._learner.load_checkpoint(self._directory.checkpoint(state.step) / "learner")
        self.held_step = state.step

    def stays(self, step: int) -> bool:
        """Whether that of `step` is not replaced by the next one."""
        every = self._config.checkpoint.every_steps
        return every > 0 and step % every == 0

    def begin(self, state: DriverState) -> None:
        """Write one while other things go on, if one is due. The learner must not train until it is `finished`."""
        if self.stays(state.step) or self._config.checkpoint.latest:
            self._saving = asyncio.create_task(self._write(state))

    async def finished(self) -> None:
        """Wait for the one that is being written, and raise what went wrong with it."""
        saving, self._saving = self._saving, None
        if saving is not None:
            await saving

    async def write(self, state: DriverState) -> None:
        """Write one of the last finished step, if the learner holds that step and there is none yet.

        The first evaluation changes the state of step 0, of which there may be one from before it.
        """
        await self.finished()
        written = state.step in self._directory.checkpoint_steps() and newest_state(self._directory) == state
        if self.held_step != state.step or written:
            return
        self._display.phase(f"writing the checkpoint of step {state.step}")
        await self._write(state)

    async def rescue(self, state: DriverState, error: PartError) -> None:
        """Keep the last finished step after a failure elsewhere; not on a full disk or by a failed learner."""
        if state.step == 0 or isinstance(error, DiskFullError) or error.part in ("learner", "checkpoint"):
            return
        try:
            await self.write(state)
        except PartError as second:
            # The first failure is the one to report.
            log.exception("no checkpoint after the failure of %s: %s", error.part, second)

    async def cancel(self) -> None:
        """Give up the one that is being written."""
        if self._saving is not None:
            self._saving.cancel()
            await asyncio.gather(self._saving, return_exceptions=True)

    async def _write(self, state: DriverState) -> None:
        settings, path = self._config.checkpoint, self._directory.checkpoint(state.step)
        require_space(path, CHECKPOINT_COPIES[self._config.model.dtype] * self.weight_bytes)
        with part("checkpoint", state.step), replacing(path) as partial:
            partial.mkdir()
            await self._learner.save_checkpoint(partial / "learner")
            save_state(partial, state)
            await asyncio.to_thread(write_manifest, partial)
        with part("checkpoint", state.step):
            self._directory.delete_old_checkpoints(settings.every_steps, settings.keep)
