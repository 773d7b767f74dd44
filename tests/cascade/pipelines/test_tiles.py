from __future__ import annotations

import pytest
import torch
from torch import nn

from cascade.pipelines.finite import NonFiniteError
from cascade.pipelines.tiles import (
    blended_margin,
    decode_blended,
    decode_pixels,
    decode_tiles,
    encode_blended,
    encode_latents,
    encode_tiles,
)
from stages.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig, DiagonalGaussian
from stages.stage_a import StageA, StageAConfig


def make(**sizes: tuple[int, ...]) -> StageA:
    torch.manual_seed(0)
    network = StageA(StageAConfig(codebook_size=4, **sizes)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():  # new blocks are the identity: give them a say
                nn.init.normal_(parameter, std=0.5)
    return network


SHAPES = [
    {"channels": (4, 8), "encoder_blocks": (1, 1), "decoder_blocks": (12, 1)},  # depth as published
    {"channels": (4, 8), "encoder_blocks": (1, 1), "decoder_blocks": (2, 4)},
    {"channels": (4, 4, 8), "encoder_blocks": (0, 0, 0), "decoder_blocks": (1, 3, 2)},
    {"channels": (4,), "encoder_blocks": (1,), "decoder_blocks": (3,)},
]


@pytest.mark.parametrize("sizes", SHAPES)
def test_a_pixel_depends_on_cells_within_the_reach_and_on_the_farthest_of_them(
    sizes: dict[str, tuple[int, ...]],
) -> None:
    network = make(**sizes).double()
    reach, scale = network.config.decoder_reach, network.downscale
    side = 2 * reach + 5
    latents = torch.randn(1, 4, side, side, dtype=torch.float64).requires_grad_()
    cell = reach + 2
    rows = slice(cell * scale, (cell + 1) * scale)
    network.decode(latents)[0, :, rows, rows].square().sum().backward()
    assert latents.grad is not None
    touched = latents.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert (int(touched.min()), int(touched.max())) == (cell - reach, cell + reach)


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("tile", [5, 16])
def test_tiles_equal_the_whole_picture(sizes: dict[str, tuple[int, ...]], tile: int) -> None:
    network = make(**sizes)
    latents = torch.randn(2, 4, 37, 21)
    with torch.inference_mode():
        whole = network.decode(latents)
        tiled = decode_tiles(network, latents, tile)
    assert float((tiled - whole).abs().max()) <= 1e-5 * float(whole.abs().max())


def test_a_tile_larger_than_the_picture_is_the_picture_bit_by_bit() -> None:
    network = make(**SHAPES[0])
    latents = torch.randn(1, 4, 20, 24)
    with torch.inference_mode():
        assert torch.equal(
            decode_pixels(network, latents, torch.float32, tile=24),
            decode_pixels(network, latents, torch.float32),
        )


def test_a_tile_that_is_not_finite_is_an_error_with_its_number_format() -> None:
    network = make(**SHAPES[1])
    latents = torch.zeros(1, 4, 24, 24)
    latents[0, 0, -1, -1] = float("inf")
    with pytest.raises(NonFiniteError, match=r"Stage A \(float32\)"), torch.inference_mode():
        decode_pixels(network, latents, torch.float32, tile=8)


# The encoder


CPU = torch.device("cpu")
ENCODERS = [
    {"channels": (4, 8), "encoder_blocks": (1, 1), "decoder_blocks": (1, 1)},  # as published
    {"channels": (4, 8), "encoder_blocks": (3, 2), "decoder_blocks": (1, 1)},
    {"channels": (4, 4, 8), "encoder_blocks": (2, 0, 1), "decoder_blocks": (1, 1, 1)},
    {"channels": (4,), "encoder_blocks": (3,), "decoder_blocks": (1,)},
]


def test_the_published_encoder_reaches_two_cells() -> None:
    assert StageAConfig().encoder_reach == 2


@pytest.mark.parametrize("sizes", ENCODERS)
def test_a_latent_depends_on_cells_within_the_reach_and_on_the_farthest_of_them(
    sizes: dict[str, tuple[int, ...]],
) -> None:
    network = make(**sizes).double()
    reach, scale = network.config.encoder_reach, network.downscale
    cell = reach + 2
    side = (2 * reach + 5) * scale
    pixels = torch.rand(1, 3, side, side, dtype=torch.float64).requires_grad_()
    network.encode(pixels)[0, :, cell, cell].square().sum().backward()
    assert pixels.grad is not None
    rows = pixels.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten() // scale
    assert (int(rows.min()), int(rows.max())) == (cell - reach, cell + reach)


@pytest.mark.parametrize("sizes", ENCODERS)
@pytest.mark.parametrize("tile", [3, 16])
def test_latents_of_tiles_equal_those_of_the_whole_picture(
    sizes: dict[str, tuple[int, ...]], tile: int
) -> None:
    network = make(**sizes)
    with torch.no_grad():  # as a trained batch norm: it must not look at the tile
        for norm in (one for one in network.modules() if isinstance(one, nn.BatchNorm2d)):
            nn.init.uniform_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    pixels = torch.rand(2, 3, 37 * network.downscale, 21 * network.downscale)
    with torch.inference_mode():
        whole = encode_latents(network, pixels, CPU, torch.float32)
        tiled = encode_latents(network, pixels, CPU, torch.float32, tile)
        alone = encode_latents(network, pixels[:1], CPU, torch.float32)
        assert torch.equal(encode_tiles(network, pixels[:1], CPU, torch.float32, 64), alone)
    assert whole.shape == (2, 4, 37, 21)
    assert float((tiled - whole).abs().max()) <= 1e-5 * float(whole.abs().max())


def test_latents_of_a_tile_that_are_not_finite_are_an_error_with_their_number_format() -> None:
    network = make(**ENCODERS[0])
    pixels = torch.zeros(1, 3, 96, 96)
    pixels[0, 0, -1, -1] = float("inf")
    with pytest.raises(NonFiniteError, match=r"Stage A's encoder \(float32\)"):
        encode_latents(network, pixels, CPU, torch.float32, tile=8)


# AutoencoderKL, whose tiles are blended


class Enlarging(AutoencoderKL):
    """Decodes each cell by itself."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(latents[:, :3], scale_factor=float(self.downscale))


class Averaging(AutoencoderKL):
    """Decodes to the mean of what it sees: tiles have nothing in common with each other."""

    seen: list[tuple[int, ...]]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(latents.shape))
        side = [size * self.downscale for size in latents.shape[-2:]]
        return latents.mean().expand(1, 3, *side)


TINY = AutoencoderKLConfig(channels=(8, 16), blocks_per_level=1, norm_groups=4)
SIZES = [(37, 21), (16, 16), (17, 40), (33, 8), (1, 50)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tile", [3, 8, 16])
def test_the_shares_of_blended_tiles_are_one_together(size: tuple[int, int], tile: int) -> None:
    latents = torch.randn(2, 4, *size)
    found = decode_blended(Enlarging(TINY), latents, tile)
    torch.testing.assert_close(found, Enlarging(TINY).decode(latents), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_blended_tiles_have_no_seam_and_none_is_larger_than_was_computed(
    size: tuple[int, int],
) -> None:
    network, tile = Averaging(TINY), 8
    network.seen = []
    latents = torch.arange(float(size[0] * size[1])).view(1, 1, *size).expand(1, 4, -1, -1)
    found = decode_blended(network, latents, tile)[0, 0]
    most = tile + 2 * blended_margin(tile)
    assert all(max(shape[-2:]) <= most for shape in network.seen)
    assert len(network.seen) == -(-size[0] // tile) * -(-size[1] // tile)
    spread = float(found.max() - found.min())
    jumps = max(float(found.diff(dim=dim).abs().max()) for dim in (0, 1) if found.shape[dim] > 1)
    # Two neighbours are mixed across two margins; a cut would jump by their whole difference.
    assert jumps <= spread / (2 * blended_margin(tile) * network.downscale) + 1e-3 * spread


def test_a_picture_no_larger_than_a_tile_is_decoded_as_a_whole() -> None:
    torch.manual_seed(0)
    network, latents = AutoencoderKL(TINY).eval(), torch.randn(2, 4, 16, 12)
    with torch.inference_mode():
        whole = torch.cat([network.decode(one) for one in latents.split(1)])
        assert torch.equal(decode_blended(network, latents, 16), whole)


def test_blended_tiles_of_a_random_autoencoder_are_near_the_whole_picture() -> None:
    # Not equal: group norms and attention look at all that they are given.
    torch.manual_seed(0)
    network = AutoencoderKL(TINY).eval()
    latents = torch.randn(1, 4, 75, 50) * TINY.scale
    with torch.inference_mode():
        whole, tiled = network.decode(latents), decode_blended(network, latents, 32)
    assert whole.shape == tiled.shape == (1, 3, 150, 100)
    away = (tiled - whole).abs().mean() / whole.std()
    # diffusers' tiles of this size are 7 to 9 % of a deviation away on such networks.
    assert 0 < float(away) < 0.12


class Shrinking(AutoencoderKL):
    """Encodes each cell by itself."""

    def posterior(self, pixels: torch.Tensor) -> DiagonalGaussian:
        cells = nn.functional.avg_pool2d(pixels, self.downscale)
        mean = torch.cat([cells, -cells[:, :1]], dim=1)
        return DiagonalGaussian(mean, -2 * mean)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tile", [3, 8, 16])
def test_the_shares_of_blended_encoder_tiles_are_one_together(
    size: tuple[int, int], tile: int
) -> None:
    network = Shrinking(TINY)
    pixels = torch.randn(1, 3, *(side * network.downscale for side in size))
    found = encode_blended(network, pixels, torch.device("cpu"), tile)
    whole = network.posterior(pixels)
    torch.testing.assert_close(found.mean, whole.mean, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.log_variance, whole.log_variance, atol=1e-6, rtol=1e-6)


def test_a_picture_no_larger_than_a_tile_is_encoded_as_a_whole() -> None:
    torch.manual_seed(0)
    network, pixels = AutoencoderKL(TINY).eval(), torch.rand(1, 3, 32, 24)
    with torch.inference_mode():
        whole = network.posterior(pixels)
        found = encode_blended(network, pixels, torch.device("cpu"), 16)
    assert torch.equal(found.mean, whole.mean)
    assert torch.equal(found.log_variance, whole.log_variance)


def test_blended_encoder_tiles_of_a_random_autoencoder_are_near_the_whole_picture() -> None:
    torch.manual_seed(0)
    network, pixels = AutoencoderKL(TINY).eval(), torch.rand(1, 3, 150, 100)
    with torch.inference_mode():
        whole = network.posterior(pixels)
        tiled = encode_blended(network, pixels, torch.device("cpu"), 32)
    assert whole.mean.shape == tiled.mean.shape == (1, 4, 75, 50)
    away = (tiled.mean - whole.mean).abs().mean() / whole.mean.std()
    assert 0 < float(away) < 0.12
