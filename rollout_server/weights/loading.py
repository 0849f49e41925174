"""Loading weights in vLLM's workers: from a file on their machine, or as they come from the learner's GPU.

Run with vllm 0.32; what comes from GPU to GPU has not run.

Registered with vLLM's weight-transfer engines when this module is imported, which `worker_extension` does in every
worker. One file is mapped by every worker of a replica.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
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
from common.weights.checksum import combined, device_digest, type_name

BACKEND = "e3rl"

Sums = tuple[int, list[int]]
"""`held_sum` of what was read, and of each part of what is held."""


@dataclass
class InitInfo(WeightTransferInitInfo):
    """How vLLM's own engine of a transport starts; a file needs no start."""

    transport: str
    info: dict[str, Any]


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Where the safetensors file is, or what vLLM's own engine of a transport is to receive."""

    path: str | None = None
    transport: str | None = None
    info: dict[str, Any] = field(default_factory=dict)


class CheckedWeightTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads weights with vLLM's layerwise reload, and sums up what it read and what the model then holds.

    They are read from a safetensors file, or received by vLLM's engine for `nccl` or `ipc`. On CPU vLLM packs a
    layer's weights when they are complete and drops the plain ones, so the sum is taken from each layer at that moment,
    and from what is left in place at the end. `sums`: `held_sum` of what was read, and of each part of what is
    held; None after a failed update.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    _transport: Any = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Join the learner's group, after leaving the one of an earlier update."""
        self.shutdown()
        transport = _vllm_engine(init_info.transport)(self.config, self.vllm_config, self.device, _Watched(self))
        transport.init_transfer_engine(transport.parse_init_info(init_info.info))
        self._transport = transport

    def start_weight_update(self) -> None:
        self.sums: Sums | None = None
        self._read = 0
        self._received: dict[str, tuple[str, tuple[int, ...], str]] = {}
        self._sums = _LayerSums()
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        for layer in self.model.modules():
            method = getattr(layer, "quant_method", None)
            if method is not None and hasattr(method, "process_weights_after_loading"):
                self._sums.watch(layer, method)
        try:
            if update_info.path is not None:
                model: Any = self.model
                model.load_weights(self._tensors(update_info.path))
            else:
                transport = self._transport
                if transport is None:
                    raise RuntimeError(f"no group was joined for {update_info.transport}")
                transport.receive_weights(transport.parse_update_info(update_info.info))
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
        self.sums = self._read % 2**64, self._sums.parts(self.model)

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
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.shutdown()

    def checksum(self) -> str:
        """Of what was received from device to device."""
        return combined(self._received)

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """Load tensors that vLLM's engine of a transport has received; a worker's share of the sums."""
        model: Any = self.model
        return model.load_weights(self._watched(weights))

    def _watched(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            self._received[name] = type_name(tensor.dtype), tuple(tensor.shape), device_digest(tensor)
            self._read += held_sum([tensor])
            yield name, tensor

    def _tensors(self, path: str) -> Iterator[tuple[str, torch.Tensor]]:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                self._read += held_sum([tensor])
                yield name, tensor


class _Watched(torch.nn.Module):
    """Stands for the model where vLLM's engine of a transport loads what it has received."""

    def __init__(self, engine: CheckedWeightTransfer) -> None:
        super().__init__()
        self._load = engine.load

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        return self._load(weights)


def _vllm_engine(transport: str) -> Any:
    if transport == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        return NCCLWeightTransferEngine
    if transport == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

        return IPCWeightTransferEngine
    raise ValueError(f"no transport {transport!r} goes from device to device")


class _LayerSums:
    """Sums of layers, each taken when the layer's weights are complete and not yet packed."""

    def __init__(self) -> None:
        self._sums: dict[torch.nn.Module, list[int]] = {}
        self._restore: list[Callable[[], None]] = []

    def watch(self, layer: torch.nn.Module, method: Any) -> None:
        """Take the sum of `layer` whenever `method` is about to process its weights."""
        if "process_weights_after_loading" in vars(method):
            return
        original = method.process_weights_after_loading

        def process(module: torch.nn.Module) -> None:
            self._sums[module] = [held_sum([p.data]) for p in module.parameters(recurse=False)]
            original(module)

        method.process_weights_after_loading = process
        self._restore.append(lambda: delattr(method, "process_weights_after_loading"))

    def restore(self) -> None:
        while self._restore:
            self._restore.pop()()

    def parts(self, model: torch.nn.Module) -> list[int]:
        """Of the whole model: watched layers as they were complete, the others as they are, each tensor once."""
        parts: list[int] = []
        seen: set[int] = set()
        for layer in model.modules():
            if layer in self._sums:
                parts += self._sums[layer]
                seen.update(p.data_ptr() for p in layer.parameters(recurse=False))
        for parameter in model.parameters():
            if parameter.numel() and parameter.data_ptr() not in seen:
                seen.add(parameter.data_ptr())
                parts.append(held_sum([parameter.data]))
        return parts


def _repack_tied_head(model: torch.nn.Module) -> None:
    """On CPU a reload leaves the packed output head of tied embeddings as it was: pack it again."""
    head: Any = getattr(model, "lm_head", None)
    if current_platform.is_cpu() and hasattr(head, "quant_method"):
        head.quant_method.process_weights_after_loading(head)


WeightTransferEngineFactory.register_engine(BACKEND, CheckedWeightTransfer)
