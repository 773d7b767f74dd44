"""One random generator per picture, so that a picture never depends on its neighbours in a batch.

Noise is drawn on the CPU in float32 and then moved, so that a seed means the same picture on every
device. Each stage has its own stream: more steps in Stage C do not change the noise of Stage B.

Reference: Karras et al., 2024, arXiv:2312.02696 (EDM2) draws with one generator per picture.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from cascade.errors import UserError

MAX_SEED = 2**63 - 1


def check_seed(seed: int) -> int:
    """Return the seed.

    Raises:
        UserError: If it is not a whole number in ``[0, MAX_SEED]``.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed {seed!r}: a seed is a whole number from 0 to {MAX_SEED}")
    return seed


def fresh_seed() -> int:
    """Draw a seed that nobody asked for, short enough to be typed again."""
    return secrets.randbelow(2**32)


class PictureNoise:
    """Standard normal noise for a batch of pictures, each from its own seed."""

    def __init__(self, seeds: Sequence[int], stream: str = "") -> None:
        """Take one seed for each picture; ``stream`` keeps the draws of several users apart.

        Raises:
            UserError: If a seed is out of range.
        """
        self.seeds = tuple(check_seed(seed) for seed in seeds)
        self._generators = [_generator(seed, stream) for seed in self.seeds]

    def randn(self, shape: Sequence[int]) -> Tensor:
        """Draw ``(B, *shape)`` in float32 on the CPU, picture by picture."""
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self._generators])

    def randn_like(self, x: Tensor) -> Tensor:
        """Draw noise with the shape, device and type of ``x``, whose first axis is the pictures.

        Raises:
            ValueError: If ``x`` holds another number of pictures than there are seeds.
        """
        if len(x) != len(self._generators):
            raise ValueError(f"{len(x)} pictures, but {len(self._generators)} seeds")
        drawn = self.randn(x.shape[1:])
        if x.device.type == "cuda":  # from pinned memory the host need not wait for the copy
            drawn = drawn.pin_memory()
        return drawn.to(device=x.device, dtype=x.dtype, non_blocking=True)


def _generator(seed: int, stream: str) -> torch.Generator:
    digest = hashlib.sha256(f"{stream}:{seed}".encode()).digest()
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return generator
