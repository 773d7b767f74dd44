"""A loss weight that follows the loss itself: every noise level ends up weighing the same.

Stable Cascade's trainers use it instead of P2 (StableCascade, gdf/loss_weights.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from train.losses.denoising import Noised

_LOG_SNR_RANGE = (-10.0, 10.0)
_BUCKETS = 300
_DECAY = 0.99
_WEIGHT_RANGE = (1e-7, 1e7)


class AdaptiveWeight(nn.Module):
    """Keeps a moving average of the loss in 300 parts of the log-SNR axis; the weight is 1 over it.

    A batch's losses in one part count as their mean, over all ranks and micro-batches, so the
    same global batch gives the same weights by any split. The averages are buffers: a run that
    goes on has them.
    """

    losses: Tensor
    edges: Tensor

    def __init__(self) -> None:
        """Start with a loss of 1 everywhere."""
        super().__init__()
        edges = torch.linspace(*_LOG_SNR_RANGE, _BUCKETS - 1)
        self.register_buffer("losses", torch.ones(_BUCKETS))
        self.register_buffer("edges", edges, persistent=False)
        # No buffers: DistributedDataParallel would give every rank the first one's.
        self._sums, self._counts = torch.zeros(_BUCKETS), torch.zeros(_BUCKETS)

    def forward(self, log_snr: Tensor) -> Tensor:
        """Return the weights (B,) at log-SNRs (B,)."""
        return (1.0 / self.losses[self._bucket(log_snr)]).clamp(*_WEIGHT_RANGE)

    def reweigh(
        self,
        noised: Noised,
        errors: Tensor,
        log_snr: Tensor,
        *,
        ends_step: bool,
        summed: Callable[[Tensor], Tensor],
    ) -> Noised:
        """Return the batch with its weights, and learn from its errors.

        Args:
            noised: The batch.
            errors: Of each sample without weights, (B,), detached.
            log_snr: Of each sample, (B,).
            ends_step: Whether this micro-batch is the last of its step.
            summed: Returns the sum of a tensor over all ranks.
        """
        weighted = replace(noised, weight=self(log_snr))
        self.note(log_snr, errors)
        if ends_step:
            self.follow(summed)
        return weighted

    @torch.no_grad()
    def note(self, log_snr: Tensor, errors: Tensor) -> None:
        """Take the unweighted losses (B,) of a micro-batch; those that are not finite are not."""
        finite = errors.isfinite()
        buckets, counted = self._bucket(log_snr)[finite], errors.float()[finite]
        device = self.losses.device
        self._sums, self._counts = self._sums.to(device), self._counts.to(device)
        self._sums.index_add_(0, buckets, counted)
        self._counts.index_add_(0, buckets, torch.ones_like(counted))

    @torch.no_grad()
    def follow(self, summed: Callable[[Tensor], Tensor]) -> None:
        """Move the averages towards what was noted since the last call; once a step."""
        sums, counts = summed(self._sums), summed(self._counts)
        means = sums / counts.clamp(min=1.0)
        followed = self.losses * _DECAY + means * (1.0 - _DECAY)
        self.losses.copy_(torch.where(counts > 0, followed, self.losses))
        self._sums, self._counts = torch.zeros_like(sums), torch.zeros_like(counts)

    def _bucket(self, log_snr: Tensor) -> Tensor:
        return torch.searchsorted(self.edges, log_snr.float().contiguous())
