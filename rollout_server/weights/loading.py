"""Loading weights that have arrived: vLLM's workers read a safetensors file on their machine. Run with vllm 0.32.

Registered with vLLM's weight-transfer engines when this module is imported, which `worker_extension` does in every
worker. One file is mapped by every worker of a replica.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform

from common.weights import held_sum

BACKEND = "e3rl"


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """A file needs no rendezvous."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """Where the safetensors file is."""

    path: str


class FileWeightTransfer(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """Loads a safetensors file with vLLM's layerwise reload, and sums up what it read and what the model then holds.

    On CPU vLLM packs a layer's weights when they are complete and drops the plain ones, so the sum is taken from each
    layer at that moment, and from what is left in place at the end. `sums`: `held_sum` of what was read and of what is
    held; None after a failed update.
    """

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        self.sums: tuple[int, int] | None = None
        self._read = 0
        self._sums = _LayerSums()
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        for layer in self.model.modules():
            method = getattr(layer, "quant_method", None)
            if method is not None and hasattr(method, "process_weights_after_loading"):
                self._sums.watch(layer, method)
        try:
            model: Any = self.model
            model.load_weights(self._tensors(update_info.path))
        except BaseException:
            # vLLM counts the update as closed now.
            self.abandon()
            raise

    def finish_weight_update(self) -> None:
        try:
            finalize_layerwise_reload(self.model, self.model_config)
        finally:
            self._sums.restore()
        _repack_tied_head(self.model)
        self.sums = self._read % 2**64, self._sums.total(self.model)

    def abandon(self) -> None:
        """After `start_weight_update`, and maybe `receive_weights`: the update will not be finished.

        Layers that have all their new weights keep them, the others get their old ones back.
        """
        try:
            for layer in self.model.modules():
                info = get_layerwise_info(layer)
                info.load_numel = 0
                info.loaded_weights.clear()
            finalize_layerwise_reload(self.model, self.model_config)
        finally:
            self._sums.restore()

    def shutdown(self) -> None:
        pass

    def _tensors(self, path: str) -> Iterator[tuple[str, torch.Tensor]]:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                self._read += held_sum([tensor])
                yield name, tensor


class _LayerSums:
    """Sums of layers, each taken when the layer's weights are complete and not yet packed."""

    def __init__(self) -> None:
        self._sums: dict[torch.nn.Module, int] = {}
        self._restore: list[Callable[[], None]] = []

    def watch(self, layer: torch.nn.Module, method: Any) -> None:
        """Take the sum of `layer` whenever `method` is about to process its weights."""
        if "process_weights_after_loading" in vars(method):
            return
        original = method.process_weights_after_loading

        def process(module: torch.nn.Module) -> None:
            self._sums[module] = held_sum(p.data for p in module.parameters(recurse=False))
            original(module)

        method.process_weights_after_loading = process
        self._restore.append(lambda: delattr(method, "process_weights_after_loading"))

    def restore(self) -> None:
        while self._restore:
            self._restore.pop()()

    def total(self, model: torch.nn.Module) -> int:
        """Of the whole model: watched layers as they were complete, the others as they are, each tensor once."""
        total = 0
        seen: set[int] = set()
        for layer in model.modules():
            if layer in self._sums:
                total += self._sums[layer]
                seen.update(p.data_ptr() for p in layer.parameters(recurse=False))
        for parameter in model.parameters():
            if parameter.numel() and parameter.data_ptr() not in seen:
                seen.add(parameter.data_ptr())
                total += held_sum([parameter.data])
        return total % 2**64


def _repack_tied_head(model: torch.nn.Module) -> None:
    """On CPU a reload leaves the packed output head of tied embeddings as it was: pack it again."""
    head: Any = getattr(model, "lm_head", None)
    if current_platform.is_cpu() and hasattr(head, "quant_method"):
        head.quant_method.process_weights_after_loading(head)


WeightTransferEngineFactory.register_engine(BACKEND, FileWeightTransfer)
