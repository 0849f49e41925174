"""What vLLM's workers can do beyond vLLM: called by the engine through `collective_rpc`. Run with vllm 0.32."""

from typing import TYPE_CHECKING, Any

from rollout_server.vllm_v1 import SegmentMonitorProcessor
from rollout_server.weight_transfer import HostWeightTransfer

WORKER_EXTENSION = "rollout_server.worker_extension.WorkerExtension"


class WorkerExtension:
    """Mixed into vLLM's worker class by `worker_extension_cls`."""

    if TYPE_CHECKING:
        model_runner: Any
        weight_transfer_engine: Any
        _weight_update_active: bool

    def e3rl_release(self, aborted: list[tuple[int, str]]) -> None:
        """Forget aborted submissions, given as (uid, group)."""
        self._e3rl_processor().release(aborted)

    def e3rl_counters(self) -> dict[str, int]:
        """What the monitor holds; see `SegmentMonitorProcessor.counters`."""
        return self._e3rl_processor().counters()

    def e3rl_priors(self) -> dict[str, list[list[float]]]:
        """Statistics of earlier groups, to be kept in a checkpoint."""
        return self._e3rl_processor().priors()

    def e3rl_restore_priors(self, priors: dict[str, list[list[float]]]) -> None:
        """Take over the statistics of a checkpoint."""
        self._e3rl_processor().restore_priors(priors)

    def e3rl_weights_loaded(self, version: int) -> str | None:
        """The weights that were loaded last are `version`. Returns their checksum; None after a failed update."""
        engine: HostWeightTransfer = self.weight_transfer_engine
        self._e3rl_processor().version = version
        return engine.checksum

    def e3rl_non_finite(self, uid: int) -> int | None:
        """See `SegmentMonitorProcessor.non_finite`."""
        return self._e3rl_processor().non_finite(uid)

    def e3rl_zero_new_blocks(self) -> None:
        """Get ready to clear KV blocks as `rollout_server.scheduling` says; on CPU the runner always is."""
        runner = self.model_runner
        if runner.device.type != "cpu" and not hasattr(runner, "_kv_block_zeroer"):
            runner._init_kv_zero_meta()

    def e3rl_abandon_weight_update(self) -> None:
        """Close an update that was not finished, if there is one, so that the next one can start."""
        if self._weight_update_active:
            self._weight_update_active = False
            engine: HostWeightTransfer = self.weight_transfer_engine
            engine.abandon()
            engine.reset_weight_update_target()

    def _e3rl_processor(self) -> SegmentMonitorProcessor:
        for processor in self.model_runner.input_batch.logitsprocs.all:
            if isinstance(processor, SegmentMonitorProcessor):
                return processor
        raise RuntimeError("this engine runs without the segment monitor")
