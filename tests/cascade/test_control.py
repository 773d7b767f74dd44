from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cascade.control import (
    canny_edges,
    canny_signal,
    control_kind,
    control_maps,
    control_signal,
    inpainting_signal,
    super_resolution_signal,
)
from cascade.errors import UserError
from stages.conditions import concat
from stages.controlnet import ControlNet, ControlNetConfig
from stages.semantic_compressor import CompressorConfig, SemanticCompressor, TrunkStage
from stages.stage_c import StageCCondition

STAGES = (TrunkStage("fused", 1, 3, 1, 6, 1), TrunkStage("fused", 2, 3, 2, 8, 1))
SMALL = {"blocks": (0, 2), "out_channels": (8, 12), "feature_channels": 10, "stem_channels": 6}
CANNY = ControlNetConfig(in_channels=1, stages=STAGES, **SMALL)
INPAINTING = ControlNetConfig(in_channels=4, stages=STAGES, **SMALL)
SUPER_RESOLUTION = ControlNetConfig(
    in_channels=16, bottleneck="large", residual_channels=6, residual_blocks=1, **SMALL
)


def picture(levels: Tensor) -> Tensor:
    """Pixels that become exactly these levels."""
    return (levels.float() / 255)[None]


def drawn(edges: Tensor) -> list[str]:
    return ["".join("#" if value else "." for value in row) for row in edges[0, 0].tolist()]


def square(size: int = 12, start: int = 4, end: int = 8) -> Tensor:
    pixels = torch.zeros(1, 3, size, size)
    pixels[..., start:end, start:end] = 1.0
    return pixels


# Edges


def test_a_squares_edges_are_its_outline():
    """Half a pixel off at two sides: of two equal gradients beside each other the first counts."""
    assert drawn(canny_edges(square(14, 4, 10))) == [
        "..............",
        "..............",
        "..............",
        ".....####.....",
        "....#....#....",
        "...#.....#....",
        "...#.....#....",
        "...#.....#....",
        "...#.....#....",
        "....######....",
        "..............",
        "..............",
        "..............",
        "..............",
    ]


def test_edges_equal_those_of_opencv():
    """Drawn by ``cv2.Canny(levels, 100, 200)`` of OpenCV 5.0."""
    y, x = torch.meshgrid(torch.arange(16), torch.arange(20), indexing="ij")
    red = torch.where((x - 8) ** 2 + (y - 7) ** 2 < 30, 210, 30)
    green = (12 * x).clamp(max=255)
    blue = torch.where(x + 2 * y > 40, 250, 20) + ((x - y).abs() < 2) * 25
    assert drawn(canny_edges(picture(torch.stack([red, green, blue.clamp(max=255)])))) == [
        "....................",
        ".......###..........",
        ".....##...##........",
        "....##.....##.......",
        "...##.#.....##......",
        "...#...#.....#......",
        "..#.....#....#......",
        "..#......#...#......",
        "..#.......#..#......",
        "...#.......#.#......",
        "...##.......##......",
        "....##.....##.....##",
        ".....#######....##..",
        "..............##....",
        "............##......",
        "...........#........",
    ]


def test_an_even_picture_has_no_edges_not_even_at_its_border():
    assert not canny_edges(torch.full((2, 3, 9, 7), 0.8)).any()


def test_a_weak_edge_counts_where_it_goes_on_from_a_strong_one():
    levels = torch.zeros(1, 10, 12)
    levels[:, :, 6:] = 40  # Sobel's dx is 4 times a step: 160, between the thresholds
    assert not canny_edges(picture(levels)).any()
    levels[:, :5, 6:] = 60
    levels[:, 4, 6:] = 50  # 240 above, 200 in between, 160 below
    edges = canny_edges(picture(levels))[0, 0]
    assert edges[0, 5] and edges[9, 5]
    assert not canny_edges(picture(levels), low=180)[0, 0, 9].any()


def test_two_edges_do_not_lend_each_other_their_strength():
    levels = torch.zeros(1, 8, 24)
    levels[:, :, 5:] = 40
    levels[:, :, 16:] = 140
    edges = canny_edges(picture(levels))[0, 0]
    assert edges[:, 15].all() and edges.sum() == 8


def test_the_channel_of_the_largest_gradient_counts():
    levels = torch.zeros(3, 8, 8)
    levels[2, :, 4:] = 60
    assert canny_edges(picture(levels))[0, 0, :, 3].all()
    assert not canny_edges(picture(levels.mean(0, keepdim=True))).any()


def test_a_blur_removes_specks_and_keeps_outlines():
    pixels = square(24, 8, 16)
    pixels[..., 3, 3] = 1.0
    assert canny_edges(pixels)[..., :6, :6].any()
    blurred = canny_edges(pixels, blur_sigma=1.4)
    assert not blurred[..., :6, :6].any()
    assert blurred[..., 6:18, 6:18].any()
    assert not canny_edges(torch.full((1, 3, 9, 9), 0.5), blur_sigma=1.4).any()


def test_edges_do_not_depend_on_the_batch():
    pixels = torch.cat([square(), torch.rand(2, 3, 12, 12)])
    edges = canny_edges(pixels)
    for index in range(3):
        assert torch.equal(edges[index], canny_edges(pixels[index : index + 1])[0])


def test_the_signal_of_edges_has_the_size_of_the_picture():
    pixels = square(96, 30, 60)
    signal = canny_signal(pixels)
    assert signal.shape == (1, 1, 96, 96)
    assert signal.min() == 0 and 0 < signal.max() <= 1
    assert signal[..., 28:62, 28:62].sum() == signal.sum()
    assert torch.equal(canny_signal(pixels, size=None), canny_edges(pixels))
    assert canny_signal(torch.rand(1, 3, 40, 24)).shape == (1, 1, 40, 24)


# The other signals


def test_the_signal_of_a_hole_is_the_picture_with_a_white_hole_and_the_hole():
    pixels = 0.5 * torch.rand(2, 3, 6, 8)
    mask = torch.zeros(2, 1, 6, 8)
    mask[..., 2:4, 3:5] = 1
    signal = inpainting_signal(pixels, mask)
    assert signal.shape == (2, 4, 6, 8)
    assert torch.equal(signal[:, 3:], mask)
    assert (signal[:, :3, 2:4, 3:5] == 1).all()
    keep = (mask == 0).expand(-1, 3, -1, -1)
    assert torch.equal(signal[:, :3][keep], pixels[keep])


def tiny_compressor() -> SemanticCompressor:
    return SemanticCompressor(
        CompressorConfig(stem_channels=6, stages=STAGES, head_channels=8)
    ).eval()


@torch.no_grad()
def test_the_signal_of_a_small_picture_repeats_each_of_its_cells():
    compressor = tiny_compressor()
    pixels = torch.rand(1, 3, 32, 24)
    latents = compressor.encode(pixels)
    signal = super_resolution_signal(compressor.encode, pixels)
    assert signal.shape == (1, 16, 2 * latents.shape[2], 2 * latents.shape[3])
    for down in range(2):
        for right in range(2):
            assert torch.equal(signal[..., down::2, right::2], latents)


# For a ControlNet


@torch.no_grad()
def test_every_controlnet_gets_the_signal_that_it_wants():
    pixels, mask = torch.rand(1, 3, 50, 70), torch.ones(1, 1, 50, 70)
    for config, kind in (
        (CANNY, "canny"),
        (INPAINTING, "inpainting"),
        (SUPER_RESOLUTION, "super_resolution"),
    ):
        assert control_kind(config) == kind
        signal = control_signal(config, pixels, (6, 8), mask=mask, encode=tiny_compressor().encode)
        maps = ControlNet(config).eval()(signal)
        assert maps[0] is not None
        if kind != "super_resolution":
            assert signal.shape[-2:] == (24, 32)
            assert maps[0].shape == (1, 8, 6, 8)


def test_published_signals_have_the_size_that_the_compressor_reads():
    signal = control_signal(ControlNetConfig.canny(), torch.rand(1, 3, 512, 512), (24, 24))
    assert signal.shape == (1, 1, 768, 768)


def test_what_is_missing_is_said():
    pixels = torch.rand(1, 3, 16, 16)
    with pytest.raises(UserError, match="needs a mask"):
        control_signal(INPAINTING, pixels, (4, 4))
    with pytest.raises(UserError, match="needs the compressor"):
        control_signal(SUPER_RESOLUTION, pixels, (4, 4))
    with pytest.raises(UserError, match=r"512 channels: known are 1 \(canny\)"):
        control_signal(ControlNetConfig.identity(), pixels, (4, 4))


@torch.no_grad()
def test_both_halves_of_a_guided_step_carry_maps_that_join():
    torch.manual_seed(0)
    network = ControlNet(CANNY).eval()
    for projection in network.projections:
        torch.nn.init.normal_(projection.out.weight)
    signal = torch.rand(2, 1, 24, 32)
    told, untold = control_maps(network, signal, unconditional="zeros")
    assert untold[0] is not None and told[0] is not None and told[1] is None
    assert torch.equal(untold[0], network(torch.zeros(2, 1, 24, 32))[0])
    weaker, _ = control_maps(network, signal, 0.25)
    torch.testing.assert_close(weaker[2], 0.25 * told[2])
    same = control_maps(network, signal)  # as the published notebook samples
    assert torch.equal(same[0][0], same[1][0])
    text = torch.zeros(2, 4, 6), torch.zeros(2, 5)
    joined = concat(
        [StageCCondition(*text, control=told), StageCCondition(*text, control=untold)]
    ).control
    assert joined is not None and len(joined) == 3 and joined[1] is None
    assert torch.equal(joined[2], torch.cat([told[2], untold[2]]))
