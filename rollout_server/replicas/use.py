"""What a replica's engine is doing: what is taken of what it has, and whether it gets on."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineUse:
    """`steps`: of the engine so far. Slots are the monitor's: one for each monitored response that is generated."""

    steps: int = 0
    slots: int = 0
    slots_in_use: int = 0
    kv_blocks: int = 0
    kv_blocks_in_use: int = 0

    @classmethod
    def of(cls, counters: dict[str, int]) -> "EngineUse":
        """What an engine's counters say of it."""
        return cls(**{name: counters[name] for name in cls.__slots__ if name in counters})
