from __future__ import annotations

import pytest
import torch
from torch import nn

from cascade.pipelines.finite import NonFiniteError
from cascade.pipelines.tiles import decode_pixels, decode_tiles, encode_latents, encode_tiles
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
