"""How a CPU's memory is asked for: tensors are made and dropped all the time.

The system gives memory page by page and zeroes each, which in a virtual machine takes 7 us a page
of 4 kB: of the 84 MB that a block of Stage B works on at 128 x 128 these are 20,000 pages.
"""

from __future__ import annotations

import ctypes
import os
import sys

VARIABLE = "THP_MEM_ALLOC_ENABLE"
"""Of torch, which reads it when it makes the first tensor (c10/core/impl/alloc_cpu.cpp)."""

# Names and numbers of glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_MMAP_MAX = -4
_MIB = 2**20


def tune_cpu_memory() -> None:
    """Have large tensors in pages of 2 MB, and the memory of smaller ones kept for the next.

    A program that draws calls this before it makes any tensor: later the first half does nothing.
    Tensors of 32 MB and more, which glibc maps one by one, are given in huge pages, unless the
    environment says otherwise; those below lie in its heap, of which up to 512 MB that are free at
    its end are not given back. On a core of an EPYC, float32, a block of 320 channels at 128 x 128
    took 0.38 s instead of 0.76 s with the first half; the second keeps what it would cost tensors
    of 2 to 32 MB, which are asked for anew in huge pages otherwise. Peaks of memory grow by 0 to 4
    percent. Where a system or a C library has no such settings, nothing changes.
    """
    os.environ.setdefault(VARIABLE, "1")
    set_malloc(M_MMAP_THRESHOLD, 32 * _MIB)  # the most that it takes
    set_malloc(M_TRIM_THRESHOLD, 512 * _MIB)


def set_malloc(option: int, value: int) -> bool:
    """Set one of glibc's options of ``mallopt``; return whether this system's C library did."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # a static program; musl, which has no such settings
        return False
    return bool(mallopt(option, value))
