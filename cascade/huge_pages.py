"""Large tensors on CPUs in pages of 2 MB."""

from __future__ import annotations

import os

VARIABLE = "THP_MEM_ALLOC_ENABLE"
"""Of torch, which reads it when it makes the first tensor (c10/core/impl/alloc_cpu.cpp)."""


def ask_for_huge_pages() -> None:
    """Have torch ask Linux for huge pages, unless the environment says otherwise.

    The system gives memory page by page and zeroes each; of a tensor of 84 MB, as a block of Stage
    B makes several, that is 20,000 pages of 4 kB. In pages of 2 MB a block of 320 channels at
    128 x 128 took 0.38 s instead of 0.76 s, published Stage A 7.6 s instead of 13.2 s for 512 px (a
    core of an EPYC, float32), and the peak of memory did not grow. A program calls this before it
    makes any tensor: later it does nothing. Where a system has no such pages, or gives them
    anyway, nothing changes.
    """
    os.environ.setdefault(VARIABLE, "1")
