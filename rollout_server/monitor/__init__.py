"""The segment monitor: tensors only, no vLLM. `core` holds the state, `judge` the verdict, `layout` the columns."""

from rollout_server.monitor.core import SegmentMonitor
from rollout_server.monitor.layout import Field, Judged, SlotSpec

__all__ = ["Field", "Judged", "SegmentMonitor", "SlotSpec"]
