"""Weights to publish, and what a replica receives of them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from safetensors.torch import load_file
from torch import Tensor

from common.weights import WeightUpdate
from common.weights.weight_file import ParameterShape
from learner.weights.publisher import Parameters, Publisher
from rollout_server.weights.receivers import Receivers


def parameters_of(tensors: Mapping[str, Tensor]) -> Parameters:
    """These tensors as a rank gives them to its publisher."""

    @contextmanager
    def gather(name: str) -> Iterator[Tensor]:
        yield tensors[name]

    return Parameters([ParameterShape(n, tuple(t.shape), t.dtype) for n, t in tensors.items()], gather)


def parameters(version: int, size: int = 5) -> Parameters:
    """Two tensors whose every value is the version."""
    return parameters_of({name: torch.full((size, 3), float(version)) for name in ("a", "b")})


def published(publisher: Publisher, version: int, size: int = 5) -> WeightUpdate:
    """The update of `parameters`, complete."""
    given = parameters(version, size)
    update = publisher.begin(version, given)
    return update.model_copy(update={"checksum": publisher.publish(version, given).checksum})


async def received(update: WeightUpdate) -> dict[str, Tensor]:
    """The tensors that a replica would load."""
    async with Receivers().receiving(update, 10.0) as arrived:
        assert not update.checksum or arrived.checksum == update.checksum
        return {name: tensor.clone() for name, tensor in load_file(arrived.update_info["path"]).items()}
