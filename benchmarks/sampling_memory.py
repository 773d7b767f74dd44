"""Whose memory a side works in: ours as ``sample.py`` asks for it, diffusers' as programs get it.

Both sides run in one process, so that the settings change hands with them. Linux and glibc alone
have any; elsewhere all sides have the system's.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from benchmarks.sampling_sides import THEIRS, THEIRS_COMPILED
from cascade.cpu_memory import (
    M_MMAP_THRESHOLD,
    M_TRIM_THRESHOLD,
    VARIABLE,
    set_malloc,
    tune_cpu_memory,
)

MEMORIES = {
    "own": "each side as its programs ask for it",
    "shared": "as sample.py asks for it",
    "plain": "as any program asks for it",
}
_PR_SET_THP_DISABLE = 41  # sys/prctl.h
_MIB = 2**20
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class SideMemory:
    """Hands the settings over."""

    def __init__(self, mode: str) -> None:
        """Take one of ``MEMORIES``; there is something to hand over only where it was asked for."""
        asked = sys.platform.startswith("linux") and os.environ.get(VARIABLE) == "1"
        self._hands_over = mode == "own" and asked

    def give(self, side: str) -> None:
        """Set what a side has; what others have freed goes back to the system."""
        if not self._hands_over:
            return
        is_theirs = side in (THEIRS, THEIRS_COMPILED)
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)
        # Where all memory comes in huge pages, a program that asks for none has them as well.
        given_to_all = _HUGE_PAGES.is_file() and "[always]" in _HUGE_PAGES.read_text()
        library.prctl(_PR_SET_THP_DISABLE, int(is_theirs and not given_to_all), 0, 0, 0)
        tune_cpu_memory()
        if is_theirs:
            # What glibc's own thresholds come to, once blocks of all sizes have been freed.
            set_malloc(M_MMAP_THRESHOLD, 32 * _MIB)
            set_malloc(M_TRIM_THRESHOLD, 64 * _MIB)
