"""What every transport's sending side does, on learner rank 0, and the parameters that it is given."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from common.weights.updates import WeightUpdate
from common.weights.weight_file import ParameterShape, WrittenWeights


class Gather(Protocol):
    """Makes the whole of a parameter available while the context is open; a collective call under ZeRO-3."""

    def __call__(self, name: str) -> AbstractContextManager[Tensor]: ...


@dataclass(frozen=True, slots=True)
class Parameters:
    """The policy's parameters in the order in which all ranks gather them; iterating gathers one at a time."""

    shapes: Sequence[ParameterShape]
    gather: Gather

    def __iter__(self) -> Iterator[tuple[ParameterShape, Tensor]]:
        for shape in self.shapes:
            with self.gather(shape.name) as tensor:
                yield shape, tensor

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)


class Publisher(Protocol):
    """Publishes one version after the other. A version stays readable until `keep_only` names a later one.

    What `begin` returns lacks its checksum, which `publish` returns.
    """

    def begin(self, version: int, parameters: Parameters) -> WeightUpdate:
        """Make ready. Replicas may begin to receive what this returns if it `streams`."""
        ...

    def publish(self, version: int, parameters: Parameters) -> WrittenWeights:
        """Gather and send."""
        ...

    def keep_only(self, version: int) -> None:
        """Every replica holds `version`: forget all others."""
        ...

    def discard(self, version: int) -> None:
        """Nobody is to load `version`, or to go on doing so."""
        ...

    def close(self) -> None:
        """Forget all versions; may be called twice."""
        ...
