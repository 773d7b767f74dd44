"""Building blocks of Stage B and Stage C, of both generations.

All take and return ``(B, C, H, W)`` tensors in channels-last memory, so that the view as tokens
``(B, H, W, C)``, in which norms and projections work, costs nothing.

Reference: Woo et al., 2023, ConvNeXt V2, arXiv:2301.00808; Pernias et al., 2023,
arXiv:2306.00637, section 3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from stages.linear import Linear, dense, linear
from stages.overwrite import add, gelu, may_overwrite

NORM_EPS = 1e-6


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of ``(B, C, H, W)``, without gain and shift."""

    def __init__(self, channels: int) -> None:
        """Take the number of channels."""
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized tensor; statistics are float32 inside the kernel."""
        tokens = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        if not torch.compiler.is_compiling() and unpack_dual(x).tangent is not None:
            tokens = _layer_norm(tokens)
        else:
            tokens = F.layer_norm(tokens, (self.channels,), eps=NORM_EPS)
        return tokens.permute(0, 3, 1, 2)


def _layer_norm(x: Tensor) -> Tensor:
    """Return ``x`` normalized over its last axis, of operations with one derivative each.

    The forward-mode derivative of torch's own layer norm is computed in another order while a
    ``TorchDispatchMode`` is active, as ``FlopCounter`` is: a step that is counted, as the first one
    of a resumed run is, would differ from one that is not.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return (centred * (variance + NORM_EPS).rsqrt()).to(x.dtype)


class GlobalResponseNorm(nn.Module):
    """Scale each channel by its share of the energy over the picture, on ``(B, H, W, C)``.

    Reference: ConvNeXt V2, arXiv:2301.00808, section 3.3.
    """

    def __init__(self, channels: int) -> None:
        """Start as the identity."""
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, own: bool = False) -> Tensor:
        """Return ``gamma * x * n + beta + x``; the energies are summed in float32.

        Args:
            x: ``(B, H, W, C)``.
            own: ``x`` is given away, and may be written over.
        """
        if own and may_overwrite(x):
            return _norm_in_place(x, self.gamma, self.beta)
        # A graph knows no tangents; and asking would break it.
        if not torch.compiler.is_compiling() and unpack_dual(x).tangent is not None:
            return _response_norm(x, self.gamma, self.beta)
        return _ResponseNorm.apply(x, self.gamma, self.beta)


def _norm_in_place(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Write the norm of ``x`` over it: the same operations as ``_ResponseNorm`` has."""
    wide, _, _, scale = _statistics(x, gamma)
    torch.addcmul(beta.to(scale.dtype), x, scale, out=wide)
    return wide if wide.dtype == x.dtype else x.copy_(wide)


def _statistics(x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return squares ``(B, H, W, C)``, energies, their mean and ``1 + gamma * n``, in float32."""
    # vector_norm(dtype=float32) is exact too, but 7 times slower on a CPU in bfloat16.
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    squares = x.float().square_() if narrow else x.square()
    energy = squares.sum(dim=(1, 2), keepdim=True).sqrt()  # (B, 1, 1, C)
    mean = energy.mean(dim=-1, keepdim=True) + NORM_EPS  # (B, 1, 1, 1)
    return squares, energy, mean, 1.0 + gamma.to(energy.dtype) * (energy / mean)


def _response_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Return the same of operations that forward-mode differentiation knows."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # The square root of an energy of 0 has no slope; shifted by the least of all numbers it has.
    energy = wide.square().sum(dim=(1, 2), keepdim=True)
    energy = energy.clamp_min(torch.finfo(wide.dtype).tiny).sqrt()  # (B, 1, 1, C)
    share = energy / (energy.mean(dim=-1, keepdim=True) + NORM_EPS)
    return (beta.to(wide) + wide * (1.0 + gamma.to(wide) * share)).to(x.dtype)


class _ResponseNorm(torch.autograd.Function):
    """Global response norm with its gradient written out.

    Autograd's own gradient of the norm makes several float32 copies of ``x``, the widest tensor of
    a block: in bfloat16 on a CPU it took as long as both projections. Only one reduction and one
    multiply-add over ``x`` are needed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:  # type: ignore[override]
        _, energy, mean, scale = _statistics(x, gamma)
        ctx.save_for_backward(x, gamma, energy, mean, scale)
        # In float32: rounded to bfloat16, 1 + gamma * n would lose most of a small gamma.
        return torch.addcmul(beta.to(energy.dtype), x, scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        x, gamma, energy, mean, scale = ctx.saved_tensors
        # float() and then sum: sum(dtype=float32) is 3 to 6 times slower on a CPU.
        grad_beta = grad.float().sum(dim=(0, 1, 2))
        grad_scale = (grad * x).float().sum(dim=(1, 2), keepdim=True)  # (B, 1, 1, C)
        grad_gamma = (grad_scale * energy / mean).sum(dim=(0, 1, 2))
        grad_share = grad_scale * gamma.float()
        grad_energy = grad_share / mean
        grad_energy = grad_energy - (grad_share * energy).mean(dim=-1, keepdim=True) / mean**2
        # d energy / d x = x / energy; where the energy is 0, x is 0 as well.
        slope = torch.where(energy > 0, grad_energy / energy, 0.0)
        grad_x = torch.addcmul(grad * scale.to(grad.dtype), x, slope.to(x.dtype))
        return grad_x, grad_gamma.to(gamma.dtype), grad_beta.to(gamma.dtype)


class Folded(NamedTuple):
    """A skip that is linear in few channels, and what a block's first projection makes of it.

    Two linear maps in a row are one: the wide skip need not be made.
    """

    source: Tensor
    """(B, H, W, c): the few channels."""
    weight: Tensor
    """(4C, c)."""
    bias: Tensor
    """(4C,): the projection's own, and what it makes of the first map's."""


class ResBlock(nn.Module):
    """Depthwise convolution, then a channel MLP that may also read a skip."""

    def __init__(
        self,
        channels: int,
        skip_channels: int = 0,
        kernel_size: int = 3,
        dropout: float = 0.0,
    ) -> None:
        """Take the width, that of the skip joined before the MLP, and the kernel."""
        super().__init__()
        self.depthwise = nn.Conv2d(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels
        )
        self.norm = LayerNorm2d(channels)
        self.expand = Linear(channels + skip_channels, 4 * channels)
        self.response_norm = GlobalResponseNorm(4 * channels)
        self.dropout = nn.Dropout(dropout)
        self.project = Linear(4 * channels, channels)

    def fold(self, source: Tensor, mapper: nn.Conv2d) -> Folded:
        """Return what the last channels of the skip come to if they are ``mapper(source)``.

        Args:
            source: ``(B, c, H, W)``, channels-last, in this block's number format.
            mapper: 1x1 convolution with a bias.
        """
        assert mapper.bias is not None
        weight = dense(self.expand)[:, -mapper.out_channels :].float()  # (4C, C_mapped)
        folded = weight @ mapper.weight.flatten(1).float()  # (4C, c)
        bias = torch.addmv(self.expand.bias.float(), weight, mapper.bias.float())
        dtype = self.expand.bias.dtype
        return Folded(source.permute(0, 2, 3, 1), folded.to(dtype), bias.to(dtype))

    def forward(
        self, x: Tensor, skip: Tensor | None = None, folded: Folded | None = None
    ) -> Tensor:
        """Return ``x`` plus the block's change.

        Args:
            x: ``(B, C, H, W)``.
            skip: ``(B, C_skip, H, W)``, or its first channels, if the others are
            folded: into this.
        """
        h = self.norm(self.depthwise(x))
        if skip is not None:
            h = torch.cat([h, skip.to(h.dtype)], dim=1)
        h = h.permute(0, 2, 3, 1)  # (B, H, W, C)
        h = self.expand(h) if folded is None else self._expand_folded(h, folded)
        h = self.response_norm(gelu(h), own=True)
        h = self.project(self.dropout(h))
        return add(h.permute(0, 3, 1, 2), x)

    def _expand_folded(self, h: Tensor, folded: Folded) -> Tensor:
        """(B, H, W, C) -> (B, H, W, 4C); both maps are summed within one kernel."""
        wide = linear(h, dense(self.expand)[:, : h.shape[-1]], folded.bias)
        flat = torch.addmm(wide.flatten(0, 2), folded.source.flatten(0, 2), folded.weight.t())
        return flat.view_as(wide)


class KeysValues(NamedTuple):
    """What an attention block asks of a condition's tokens: the same at every sampling step."""

    joined: Tensor
    """(B, M, 2C): keys, then values."""


class Attention(nn.Module):
    """Multi-head attention of a picture's tokens to themselves and to a condition's."""

    def __init__(
        self, channels: int, num_heads: int, dropout: float = 0.0, qk_norm: bool = False
    ) -> None:
        """Take the width; ``num_heads`` must divide it.

        ``qk_norm`` brings queries and keys of each head to unit mean square, times a learned gain:
        logits can't grow without bound. Reference: Dehghani et al., 2023, arXiv:2302.05442,
        section 3; RMS as in Esser et al., 2024, arXiv:2403.03206, section 5.3.2.
        """
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide channels={channels}")
        self.num_heads = num_heads
        self.query = Linear(channels, channels)
        self.key_value = Linear(channels, 2 * channels)
        self.out = Linear(channels, channels)
        self.dropout = dropout
        width = channels // num_heads
        self.query_norm = nn.RMSNorm(width, eps=NORM_EPS) if qk_norm else None
        self.key_norm = nn.RMSNorm(width, eps=NORM_EPS) if qk_norm else None

    def forward(self, tokens: Tensor, context: Tensor | KeysValues | None) -> Tensor:
        """Attend.

        Args:
            tokens: ``(B, L, C)``; they ask, and they are asked.
            context: ``(B, M, C)``, asked as well, or its keys and values.

        Returns:
            ``(B, L, C)``.
        """
        query = self._heads(self.query(tokens))  # (B, N, L, C / N)
        if isinstance(context, KeysValues):
            asked = torch.cat([self.key_value(tokens), context.joined], dim=1)
        else:
            both = (
                tokens if context is None else torch.cat([tokens, context.to(tokens.dtype)], dim=1)
            )
            asked = self.key_value(both)  # (B, L + M, 2C)
        key, value = (self._heads(part) for part in asked.chunk(2, dim=-1))
        if self.query_norm is not None and self.key_norm is not None:
            wide = torch.promote_types(value.dtype, torch.float32)
            query = _rms_norm(query.to(wide), self.query_norm).to(value.dtype)
            key = _rms_norm(key.to(wide), self.key_norm).to(value.dtype)
        dropout = self.dropout if self.training else 0.0
        attended = attend(query, key, value, dropout)
        return self.out(attended.transpose(1, 2).flatten(2))

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _rms_norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """Norm the last axis in the format of ``x``; torch warns of a gain in another one."""
    assert norm.weight is not None
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), NORM_EPS)


def attend(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    """Attend with the fastest kernel; logits and softmax are float32 in all of them.

    Args:
        query: ``(B, N, L, C / N)``.
        key: ``(B, N, M, C / N)``.
        value: ``(B, N, M, C / N)``.
        dropout: Share of the attention weights to drop.

    Returns:
        ``(B, N, L, C / N)``.
    """
    if not short_on_cpu(query, key):
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    # Autocast would cast back to bfloat16.
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), dropout_p=dropout
        ).to(query.dtype)


def short_on_cpu(query: Tensor, key: Tensor) -> bool:
    """Return whether attention is faster in float32 than in bfloat16, casts included.

    On CPUs the bfloat16 kernel loses to the float32 one on short sequences: forward and backward
    of 4 heads of 64, 36 tokens to 76, took 97 ms against 40 ms (batch 256, 2 cores).
    """
    short = query.shape[-2] * key.shape[-2] <= 256 * 256
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and short


class AttnBlock(nn.Module):
    """Self and cross attention in one: keys and values are the picture's and the text's tokens."""

    def __init__(
        self,
        channels: int,
        cond_channels: int,
        num_heads: int,
        dropout: float = 0.0,
        qk_norm: bool = False,
    ) -> None:
        """Take the widths of the picture's and of the condition's tokens."""
        super().__init__()
        self.norm = LayerNorm2d(channels)
        self.cond_mapper = Linear(cond_channels, channels)
        self.attention = Attention(channels, num_heads, dropout, qk_norm)

    def keys_values(self, cond_tokens: Tensor) -> KeysValues:
        """Return what is asked of a condition's tokens, ``(B, M, C_cond)``."""
        return KeysValues(self.attention.key_value(self.cond_mapper(F.silu(cond_tokens))))

    def forward(self, x: Tensor, cond: Tensor | KeysValues) -> Tensor:
        """Return ``x`` plus what its tokens learnt.

        Args:
            x: ``(B, C, H, W)``.
            cond: The condition's tokens, ``(B, M, C_cond)``, or what this block asks of them.
        """
        height, width = x.shape[-2:]
        context = cond if isinstance(cond, KeysValues) else self.cond_mapper(F.silu(cond))
        tokens = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, H * W, C)
        attended = self.attention(tokens, context)
        return add(attended.unflatten(1, (height, width)).permute(0, 3, 1, 2), x)


class Modulation(NamedTuple):
    """What a ``TimestepBlock`` does at one time."""

    factor: Tensor
    """(B or 1, C, 1, 1): 1 + scale."""
    shift: Tensor
    """(B or 1, C, 1, 1)."""


class TimestepBlock(nn.Module):
    """Scale and shift channels by what embedded scalars say: the time, and any others, summed."""

    def __init__(self, channels: int, time_channels: int, extra: tuple[str, ...] = ()) -> None:
        """Start as the identity; ``extra`` names further scalar conditions."""
        super().__init__()
        self.mapper = Linear(time_channels, 2 * channels)
        self.extra_mappers = nn.ModuleDict(
            {name: Linear(time_channels, 2 * channels) for name in extra}
        )

    def modulation(self, embeddings: Tensor) -> Modulation:
        """Return what this block does at a time.

        Args:
            embeddings: ``(B, 1 + num_extra, time_channels)``: the time's first, then the extras in
                the order of their names.
        """
        scale, shift = self._scale_shift(embeddings)
        return Modulation(1 + scale, shift.contiguous())  # a view would keep both halves

    def forward(self, x: Tensor, time: Tensor | Modulation) -> Tensor:
        """Modulate.

        Args:
            x: ``(B, C, H, W)``.
            time: Embeddings as ``modulation`` takes them, or what it made of them.
        """
        if isinstance(time, Modulation):
            return torch.addcmul(time.shift, x, time.factor)
        scale, shift = self._scale_shift(time)
        return x * (1 + scale.to(x.dtype)) + shift.to(x.dtype)

    def _scale_shift(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Map embeddings, and sum them: each ``(B, C, 1, 1)``."""
        total = self.mapper(embeddings[:, 0].to(self.mapper.weight.dtype))  # (B, 2C)
        for index, mapper in enumerate(self.extra_mappers.values(), start=1):
            total = total + mapper(embeddings[:, index].to(self.mapper.weight.dtype))
        scale, shift = total[:, :, None, None].chunk(2, dim=1)
        return scale, shift


def run(module: nn.Module, *inputs: Any, recompute: bool) -> Any:
    """Call a module; with ``recompute``, keep only its inputs until the gradient is asked for.

    The module is then run again in the backward pass. Whatever it returns has its gradient, also
    what is no part of the network's own output.
    """
    if recompute and torch.is_grad_enabled():
        # The reentrant kind gives no gradient where the inputs need none.
        return checkpoint(module, *inputs, use_reentrant=False)
    return module(*inputs)


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every Linear and Conv2d, as published.

    Time modulations start as the identity. Transposed convolutions keep PyTorch's own start.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    # In a second pass: modules() gives a block before the layers inside it.
    for block in module.modules():
        if isinstance(block, TimestepBlock):
            for parameter in block.parameters():
                nn.init.zeros_(parameter)


def scale_residual_outputs(module: nn.Module, num_blocks: int) -> None:
    """Shrink the last projection of every ResBlock by ``1 / sqrt(num_blocks)``."""
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, ResBlock):
                layer.project.weight.mul_(num_blocks**-0.5)
