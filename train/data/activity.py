"""What each data worker does at the moment, visible to the training process."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch.utils.data import get_worker_info

_WIDTH = 240


class Activity:
    """A line of text for each worker, in memory that processes share."""

    def __init__(self, workers: int) -> None:
        """Make room for so many workers; without any, the training process itself reads."""
        self._texts = torch.zeros((max(1, workers), _WIDTH), dtype=torch.uint8).share_memory_()
        self._since = torch.zeros(max(1, workers), dtype=torch.float64).share_memory_()

    def say(self, text: str) -> None:
        """Say what this process does now."""
        info = get_worker_info()
        worker = info.id if info is not None else 0
        data = text.encode("utf-8", "replace")[-_WIDTH:].ljust(_WIDTH, b"\0")
        self._texts.numpy()[worker] = np.frombuffer(data, np.uint8)
        self._since.numpy()[worker] = time.time()

    def lines(self) -> list[str]:
        """Return for each worker what it does and for how many seconds."""
        now, found = time.time(), []
        for worker, (row, since) in enumerate(zip(self._texts, self._since.tolist(), strict=True)):
            text = bytes(row.tolist()).rstrip(b"\0").decode("utf-8", "replace")
            said = f"{text} for {max(0.0, now - since):.0f} s" if text else "has not begun"
            found.append(f"worker {worker}: {said}")
        return found
