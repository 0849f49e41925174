"""The segment monitor, without vLLM.

`core` holds the state, `boundaries` says where segments end, `judge` and `host` have the verdict, `layout` the columns.
"""

from rollout_server.monitor.backends.core import SegmentMonitor
from rollout_server.monitor.layout import Field, Judged, SlotSpec

__all__ = ["Field", "Judged", "SegmentMonitor", "SlotSpec"]
