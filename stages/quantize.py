"""Vector quantisation: each latent vector is replaced by the nearest of a learned set of codes.

Stage A uses it only while it is trained; Stage B works on the continuous latents.

Reference: van den Oord et al., 2017, arXiv:1711.00937, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows of the distance matrix are computed in pieces of this many elements (16 MiB of float32): the
# whole of it would be gigabytes for one training batch, and a piece that fits in cache is faster.
_DISTANCE_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class QuantizerOutput:
    """What the quantizer made of its input."""

    quantized: Tensor
    """(B, D, H, W), the nearest codes; its gradient goes unchanged to the input."""
    indices: Tensor
    """(B, H, W) int64, which code was taken."""
    codebook_loss: Tensor
    """Scalar float32: moves the codes towards the latents."""
    commitment_loss: Tensor
    """Scalar float32: moves the latents towards their codes; weighted 0.25 as published."""


class VectorQuantizer(nn.Module):
    """A codebook of ``num_codes`` vectors of ``dim`` values."""

    def __init__(self, num_codes: int, dim: int) -> None:
        """Draw the codes from N(0, 1), like the batch-normed latents that they must cover.

        Args:
            num_codes: Size of the codebook, at least 1.
            dim: Channels of a latent.

        Raises:
            ValueError: If a size is not positive.
        """
        super().__init__()
        if num_codes < 1 or dim < 1:
            raise ValueError(f"num_codes={num_codes} and dim={dim} must both be at least 1")
        self.num_codes = num_codes
        self.dim = dim
        self.codebook = nn.Parameter(torch.randn(num_codes, dim))

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantise latents (B, D, H, W); distances and losses are computed in float32."""
        indices = self.nearest(z)
        with torch.autocast(z.device.type, enabled=False):
            z32 = z.float()
            codes = self.codes(indices).float()
            codebook_loss = F.mse_loss(codes, z32.detach())
            commitment_loss = F.mse_loss(z32, codes.detach())
            quantized = z32 + (codes - z32).detach()  # straight-through estimator
        return QuantizerOutput(quantized.to(z.dtype), indices, codebook_loss, commitment_loss)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Index of the nearest code in L2 distance: (B, D, H, W) -> (B, H, W) int64."""
        batch, _, height, width = z.shape
        vectors = self._vectors(z)
        with torch.autocast(z.device.type, enabled=False):
            codebook = self.codebook.float()
            # |z - e|^2 = |z|^2 - 2 (z.e - |e|^2 / 2), and |z|^2 is the same for every code.
            half_norms = codebook.square().sum(1).mul(-0.5)
            rows = max(1, _DISTANCE_ELEMENTS // self.num_codes)
            indices = torch.cat(
                [torch.addmm(half_norms, v, codebook.t()).argmax(1) for v in vectors.split(rows)]
            )
        return indices.view(batch, height, width)

    def codes(self, indices: Tensor) -> Tensor:
        """Look codes up: (B, H, W) int64 -> (B, D, H, W) in channels_last memory."""
        return F.embedding(indices, self.codebook).permute(0, 3, 1, 2)

    @torch.no_grad()
    def reseed_unused(
        self, z: Tensor, counts: Tensor, generator: torch.Generator | None = None
    ) -> int:
        """Move codes that nothing uses onto latents of the current batch.

        A code that is nobody's nearest gets no gradient and would stay dead for ever.

        Args:
            z: Latents before quantisation, (B, D, H, W).
            counts: (num_codes,), how often each code was taken since the last call.
            generator: Source of the random choice of latents, on the CPU.

        Returns:
            How many codes were replaced.

        Raises:
            ValueError: If ``counts`` does not have one entry per code.
        """
        if counts.shape != (self.num_codes,):
            raise ValueError(f"counts has shape {tuple(counts.shape)}, not ({self.num_codes},)")
        unused = (counts == 0).nonzero().squeeze(1).to(self.codebook.device)
        if len(unused) == 0:
            return 0
        vectors = self._vectors(z)
        # Without replacement while there are enough latents: two equal codes would be one.
        picks = torch.randperm(len(vectors), generator=generator)[: len(unused)]
        repeats = -(-len(unused) // len(picks))
        picks = picks.repeat(repeats)[: len(unused)].to(z.device)
        self.codebook[unused] = vectors[picks].to(self.codebook)
        return len(unused)

    def _vectors(self, z: Tensor) -> Tensor:
        """(B, D, H, W) -> (B * H * W, D) float32."""
        if z.ndim != 4 or z.shape[1] != self.dim:
            raise ValueError(f"latents of shape {tuple(z.shape)} do not fit (B, {self.dim}, H, W)")
        return z.detach().permute(0, 2, 3, 1).reshape(-1, self.dim).float()
