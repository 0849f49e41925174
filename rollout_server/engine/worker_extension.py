"""What vLLM's workers can do beyond vLLM: called by the engine through `collective_rpc`. Run with vllm 0.32."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from rollout_server.engine.scheduling import kv_blocks
from rollout_server.monitor.adapters.vllm_v1 import SegmentMonitorProcessor
from rollout_server.weights.loading import CheckedWeightTransfer, Sums

WORKER_EXTENSION = "rollout_server.engine.worker_extension.WorkerExtension"


class WorkerExtension:
    """Mixed into vLLM's worker class by `worker_extension_cls`."""

    if TYPE_CHECKING:
        model_runner: Any
        weight_transfer_engine: Any
        _weight_update_active: bool

    def e3rl_release(self, aborted: list[tuple[int, str]], over: list[str]) -> None:
        """Forget aborted submissions, given as (uid, group), and groups that are over."""
        self._e3rl_processor().release(aborted, over)

    def e3rl_counters(self) -> dict[str, int]:
        """What the monitor holds, see `SegmentMonitorProcessor.counters`, and requests hold of the KV cache."""
        return self._e3rl_processor().counters() | kv_blocks()

    def e3rl_priors(self) -> dict[str, list[list[float]]]:
        """Statistics of earlier groups, to be kept in a checkpoint."""
        return self._e3rl_processor().priors()

    def e3rl_restore_priors(self, priors: dict[str, list[list[float]]]) -> None:
        """Take over the statistics of a checkpoint."""
        self._e3rl_processor().restore_priors(priors)

    def e3rl_weights_loaded(self, version: int) -> Sums | None:
        """The weights that were loaded last are `version`. Returns `CheckedWeightTransfer.sums`."""
        engine: CheckedWeightTransfer = self.weight_transfer_engine
        self._e3rl_processor().weights_changed(version)
        return engine.sums

    def e3rl_received_checksum(self) -> str:
        """See `CheckedWeightTransfer.checksum`."""
        engine: CheckedWeightTransfer = self.weight_transfer_engine
        return engine.checksum()

    def e3rl_non_finite(self, uid: int) -> int | None:
        """See `SegmentMonitorProcessor.non_finite`."""
        return self._e3rl_processor().non_finite(uid)

    def e3rl_clear_new_blocks(self) -> None:
        """Get ready to clear the KV blocks that `rollout_server.engine.scheduling` names.

        On CPU vLLM's own runner clears those of layers with full attention only.
        """
        runner = self.model_runner
        if runner.device.type == "cpu":
            runner._zero_block_ids = partial(_clear, list(runner.kv_caches))
        elif not hasattr(runner, "_kv_block_zeroer"):
            runner._init_kv_zero_meta()

    def e3rl_abandon_weight_update(self) -> None:
        """Close an update that was not finished, if there is one, so that the next one can start."""
        if self._weight_update_active:
            self._weight_update_active = False
            engine: CheckedWeightTransfer = self.weight_transfer_engine
            engine.abandon()
            engine.reset_weight_update_target()

    def _e3rl_processor(self) -> SegmentMonitorProcessor:
        for processor in self.model_runner.input_batch.logitsprocs.all:
            if isinstance(processor, SegmentMonitorProcessor):
                return processor
        raise RuntimeError("this engine runs without the segment monitor")


def _clear(caches: list[torch.Tensor], blocks: list[int]) -> None:
    """Zero blocks in the KV memory of every layer, `[blocks, ...]` each."""
    index = torch.tensor(blocks)
    for cache in caches:
        cache.index_fill_(0, index, 0)
