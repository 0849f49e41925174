"""The receiving side of the `host` backend: weights from a safetensors file in shared memory. Run with vllm 0.32.

Registered with vLLM's weight-transfer engines when this module is imported, which `worker_extension` does in every
worker. One file is written once and mapped by every worker of every replica.
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

from common.weights import weight_checksum

HOST_BACKEND = "e3rl_host"


@dataclass
class HostInitInfo(WeightTransferInitInfo):
    """The `host` backend needs no rendezvous."""


@dataclass
class HostUpdateInfo(WeightTransferUpdateInfo):
    """Where the safetensors file is."""

    path: str


class HostWeightTransfer(WeightTransferEngine[HostInitInfo, HostUpdateInfo]):
    """Loads a safetensors file with vLLM's layerwise reload, and takes the checksum of what the model then holds.

    On CPU vLLM packs a layer's weights when they are complete and drops the plain ones, so the checksum is taken
    from each layer at that moment, and from what is left in place at the end.
    """

    init_info_cls = HostInitInfo
    update_info_cls = HostUpdateInfo

    def init_transfer_engine(self, init_info: HostInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        self.checksum: str | None = None
        self._sums = _LayerSums()
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: HostUpdateInfo) -> None:
        for layer in self.model.modules():
            method = getattr(layer, "quant_method", None)
            if method is not None and hasattr(method, "process_weights_after_loading"):
                self._sums.watch(layer, method)
        try:
            model: Any = self.model
            model.load_weights(_tensors(update_info.path))
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
        self.checksum = self._sums.checksum(self.model)

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


class _LayerSums:
    """Checksums of layers, each taken when the layer's weights are complete and not yet packed."""

    def __init__(self) -> None:
        self._sums: dict[torch.nn.Module, str] = {}
        self._restore: list[Callable[[], None]] = []

    def watch(self, layer: torch.nn.Module, method: Any) -> None:
        """Take the checksum of `layer` whenever `method` is about to process its weights."""
        if "process_weights_after_loading" in vars(method):
            return
        original = method.process_weights_after_loading

        def process(module: torch.nn.Module) -> None:
            self._sums[module] = weight_checksum(p.data for p in module.parameters(recurse=False))
            original(module)

        method.process_weights_after_loading = process
        self._restore.append(lambda: delattr(method, "process_weights_after_loading"))

    def restore(self) -> None:
        while self._restore:
            self._restore.pop()()

    def checksum(self, model: torch.nn.Module) -> str:
        """Of the whole model: watched layers as they were complete, the others as they are, each tensor once."""
        total = 0
        seen: set[int] = set()
        for layer in model.modules():
            if layer in self._sums:
                total += int(self._sums[layer], 16)
                seen.update(p.data_ptr() for p in layer.parameters(recurse=False))
        for parameter in model.parameters():
            if parameter.numel() and parameter.data_ptr() not in seen:
                seen.add(parameter.data_ptr())
                total += int(weight_checksum([parameter.data]), 16)
        return f"{total % 2**64:016x}"


def _tensors(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            yield name, file.get_tensor(name)


def _repack_tied_head(model: torch.nn.Module) -> None:
    """On CPU a reload leaves the packed output head of tied embeddings as it was: pack it again."""
    head: Any = getattr(model, "lm_head", None)
    if current_platform.is_cpu() and hasattr(head, "quant_method"):
        head.quant_method.process_weights_after_loading(head)


WeightTransferEngineFactory.register_engine(HOST_BACKEND, HostWeightTransfer)
