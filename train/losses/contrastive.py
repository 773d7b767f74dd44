"""The contrastive loss of the demonstration CLIP."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def contrastive_loss(logits_per_picture: Tensor, groups: Tensor) -> Tensor:
    """Return the symmetric cross-entropy over pictures and captions, a scalar.

    Pictures of one group share their captions, so all pairs within a group are positives: the
    target of a row is uniform over them. With all groups distinct it is CLIP's loss.

    Args:
        logits_per_picture: Scaled similarities, shape ``(B, B)``, pictures by captions.
        groups: Group of each pair, shape ``(B,)``.

    Reference: Radford et al., 2021, arXiv:2103.00020, figure 3.
    """
    positives = (groups[:, None] == groups[None, :]).float()  # (B, B)
    targets = positives / positives.sum(dim=1, keepdim=True)
    logits = logits_per_picture.float()
    return 0.5 * (F.cross_entropy(logits, targets) + F.cross_entropy(logits.t(), targets))
