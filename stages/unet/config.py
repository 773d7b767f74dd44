"""Sizes of the U-Nets: the published teachers and every published student.

A student is a teacher with resnets, attentions, transformer blocks, the middle or a whole level
left out, so one table of depths describes them all.

Reference: Rombach et al., 2022, arXiv:2112.10752 (SD); Podell et al., 2023, arXiv:2307.01952
(SDXL); Kim et al., 2023, BK-SDM, arXiv:2305.15798; Lee et al., 2023, KOALA, arXiv:2312.04005; Gupta
et al., 2024, SSD-1B and Segmind-Vega, arXiv:2401.02677.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

Depths = tuple[tuple[int, ...], ...]
"""By level in running order, for each resnet the transformer blocks after it; 0: no attention."""

NUM_SIZES = 6
"""SDXL is told original height and width, top and left of the crop, target height and width."""


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a U-Net; the defaults are SDXL (2,567,463,684 parameters)."""

    in_channels: int = 4
    """Channels of the noised latents."""
    out_channels: int = 4
    """Channels of the prediction."""
    channels: tuple[int, ...] = (320, 640, 1280)
    """Width by level, finest first. Every level after the first halves height and width."""
    num_heads: tuple[int, ...] = (5, 10, 20)
    """Attention heads by level (the published configurations call it attention_head_dim)."""
    down_depths: Depths = ((0, 0), (2, 2), (10, 10))
    """Transformer blocks after each resnet on the way down, finest level first."""
    mid_depth: int | None = 10
    """Transformer blocks between the two resnets of the middle; 0: the middle is one resnet;
    None: there is no middle."""
    up_depths: Depths = ((10, 10, 10), (2, 2, 2), (0, 0, 0))
    """Transformer blocks after each resnet on the way up, deepest level first. A level has one
    resnet more than on the way down, since every resnet reads one skip."""
    text_channels: int = 2048
    """Width of the text model's hidden states."""
    text_pooled_channels: int | None = 1280
    """Width of the pooled text; None: the network is told neither it nor the six sizes."""
    size_channels: int | None = 256
    """Size of the embedding of each of the six sizes; None: as ``text_pooled_channels``."""
    linear_projection: bool = True
    """Whether transformers are entered and left by a linear layer; False: by a 1x1 convolution."""
    norm_groups: int = 32
    """Groups of every group norm."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        self._check_levels()
        for width, heads in zip(self.channels, self.num_heads, strict=True):
            if heads < 1 or width % heads:
                raise ValueError(
                    f"num_heads={self.num_heads} does not divide channels={self.channels}"
                )
            if self.norm_groups < 1 or width % self.norm_groups:
                raise ValueError(
                    f"norm_groups={self.norm_groups} does not divide channels={self.channels}"
                )
        if self.channels[0] % 2:
            raise ValueError(f"channels={self.channels}: the first embeds the time and is even")
        if (self.text_pooled_channels is None) != (self.size_channels is None):
            raise ValueError(
                f"text_pooled_channels={self.text_pooled_channels} and "
                f"size_channels={self.size_channels}: give both, or None for both"
            )
        if self.size_channels is not None and self.size_channels % 2:
            raise ValueError(f"size_channels={self.size_channels} must be even")

    def _check_levels(self) -> None:
        levels = len(self.channels)
        for name in ("num_heads", "down_depths", "up_depths"):
            if len(getattr(self, name)) != levels or not levels:
                raise ValueError(
                    f"{name}={getattr(self, name)} and channels={self.channels} must have one "
                    "entry per level"
                )
        for level, (down, up) in enumerate(
            zip(self.down_depths, reversed(self.up_depths), strict=True)
        ):
            if not down or len(up) != len(down) + 1:
                raise ValueError(
                    f"down_depths={self.down_depths} and up_depths={self.up_depths}: level {level} "
                    f"has {len(down)} resnets on the way down, so {len(down) + 1} on the way up, "
                    f"not {len(up)}"
                )
        depths = [depth for blocks in self.down_depths + self.up_depths for depth in blocks]
        if min(depths) < 0 or (self.mid_depth is not None and self.mid_depth < 0):
            raise ValueError(
                f"down_depths={self.down_depths}, mid_depth={self.mid_depth} and "
                f"up_depths={self.up_depths} must not be negative"
            )

    @property
    def time_channels(self) -> int:
        """Width of the embedding of time and sizes that every resnet reads."""
        return 4 * self.channels[0]

    @property
    def num_transformer_blocks(self) -> int:
        """Transformer blocks in all of the network."""
        depths = [depth for blocks in self.down_depths + self.up_depths for depth in blocks]
        return sum(depths) + (self.mid_depth or 0)

    # SDXL and its students

    @classmethod
    def sdxl(cls) -> UNetConfig:
        """Return SDXL base, Turbo and Lightning."""
        return cls()

    @classmethod
    def bk_sdxl_base(cls) -> UNetConfig:
        """Return BK-SDM's removal applied to SDXL (1,717,277,764 parameters): no stack is cut."""
        return cls(
            down_depths=((0,), (2,), (10,)), mid_depth=10, up_depths=((10, 10), (2, 2), (0, 0))
        )

    @classmethod
    def koala_1b(cls) -> UNetConfig:
        """Return KOALA-1B (1,161,184,324 parameters)."""
        return cls(down_depths=((0,), (2,), (6,)), mid_depth=6, up_depths=((6, 6), (2, 2), (0, 0)))

    @classmethod
    def koala_700m(cls) -> UNetConfig:
        """Return KOALA-700M (782,822,724 parameters), which has no middle."""
        return cls(
            down_depths=((0,), (2,), (5,)), mid_depth=None, up_depths=((5, 5), (2, 2), (0, 0))
        )

    @classmethod
    def ssd_1b(cls) -> UNetConfig:
        """Return Segmind's SSD-1B (1,331,334,404 parameters), whose middle is one resnet."""
        return cls(
            down_depths=((0, 0), (2, 2), (4, 4)),
            mid_depth=0,
            up_depths=((4, 4, 10), (2, 1, 1), (0, 0, 0)),
        )

    @classmethod
    def vega(cls) -> UNetConfig:
        """Return Segmind-Vega (745,225,604 parameters), whose middle is one resnet."""
        return cls(
            down_depths=((0, 0), (1, 1), (2, 2)),
            mid_depth=0,
            up_depths=((2, 2, 2), (1, 1, 1), (0, 0, 0)),
        )

    # SD 1.x and its students

    @classmethod
    def sd15(cls) -> UNetConfig:
        """Return SD 1.1 to 1.5 (859,520,964 parameters)."""
        return cls(
            channels=(320, 640, 1280, 1280),
            num_heads=(8, 8, 8, 8),
            down_depths=((1, 1), (1, 1), (1, 1), (0, 0)),
            mid_depth=1,
            up_depths=((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
            text_channels=768,
            text_pooled_channels=None,
            size_channels=None,
            linear_projection=False,
        )

    @classmethod
    def bk_base(cls) -> UNetConfig:
        """Return BK-SDM-Base (579,384,964 parameters)."""
        return replace(
            cls.sd15(),
            down_depths=((1,), (1,), (1,), (0,)),
            up_depths=((0, 0), (1, 1), (1, 1), (1, 1)),
        )

    @classmethod
    def bk_small(cls) -> UNetConfig:
        """Return BK-SDM-Small (482,346,884 parameters): the base without a middle."""
        return replace(cls.bk_base(), mid_depth=None)

    @classmethod
    def bk_tiny(cls) -> UNetConfig:
        """Return BK-SDM-Tiny (323,384,964 parameters): no middle, and the deepest level gone."""
        return replace(
            cls.sd15(),
            channels=(320, 640, 1280),
            num_heads=(8, 8, 8),
            down_depths=((1,), (1,), (1,)),
            mid_depth=None,
            up_depths=((1, 1), (1, 1), (1, 1)),
        )

    @classmethod
    def sd_small(cls) -> UNetConfig:
        """Return Segmind's SD-Small, which has the shape of BK-SDM-Base."""
        return cls.bk_base()

    @classmethod
    def sd_tiny(cls) -> UNetConfig:
        """Return Segmind's SD-Tiny, which has the shape of BK-SDM-Tiny."""
        return cls.bk_tiny()

    # SD 2.x and its students

    @classmethod
    def sd21(cls) -> UNetConfig:
        """Return SD 2.0 and 2.1, of 512 and of 768 pixels (865,910,724 parameters)."""
        return cls.sd15()._as_sd2()

    @classmethod
    def bk_v2_base(cls) -> UNetConfig:
        """Return BK-SDM-v2-Base (583,480,964 parameters)."""
        return cls.bk_base()._as_sd2()

    @classmethod
    def bk_v2_small(cls) -> UNetConfig:
        """Return BK-SDM-v2-Small (485,787,524 parameters)."""
        return cls.bk_small()._as_sd2()

    @classmethod
    def bk_v2_tiny(cls) -> UNetConfig:
        """Return BK-SDM-v2-Tiny (326,825,604 parameters)."""
        return cls.bk_tiny()._as_sd2()

    def _as_sd2(self) -> UNetConfig:
        """Give an SD 1.x shape the text, the heads of 64 and the projections of SD 2.x."""
        heads = tuple(width // 64 for width in self.channels)
        return replace(self, num_heads=heads, text_channels=1024, linear_projection=True)
