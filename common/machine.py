"""Which machine this is."""

from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Of the kernel's start: the same in all containers of a machine, another on every other machine."""
    return _BOOT_ID.read_text(encoding="ascii").strip()
