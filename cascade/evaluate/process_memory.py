"""The memory of this process, as Linux counts it."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # man 5 proc: "reset the peak resident set size to the current value"


@dataclass(frozen=True)
class Memory:
    """Bytes that are resident: in this machine's memory, not merely in an address space."""

    peak: int
    """The most since the process began, or since ``reset_peak``."""
    anonymous: int
    """Of now: what belongs to this process alone."""
    mapped: int
    """Of now: pages of files (memory-mapped weights, libraries), which the system can drop."""

    @property
    def resident(self) -> int:
        """Both together, of now."""
        return self.anonymous + self.mapped


def is_measurable() -> bool:
    """Return whether this system tells a process's memory and lets it reset the peak."""
    return _STATUS.is_file() and _CLEAR.is_file()


def measure() -> Memory:
    """Return this process's memory."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)

    def size(name: str) -> int:
        return int(lines[name].split()[0]) * 1024

    return Memory(size("VmHWM"), size("RssAnon"), size("RssFile") + size("RssShmem"))


def reset_peak() -> None:
    """Make the peak of memory that of now."""
    gc.collect()
    _CLEAR.write_text(_RESET_PEAK)
