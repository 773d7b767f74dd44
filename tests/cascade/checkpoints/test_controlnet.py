from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cascade.checkpoints.autoencoders import compressor_to_original
from cascade.checkpoints.controlnet import controlnet_from_original, controlnet_to_original
from cascade.checkpoints.detect import detect
from cascade.errors import UserError
from stages.controlnet import PUBLISHED_BLOCKS, ControlNet, ControlNetConfig
from stages.semantic_compressor import CompressorConfig, SemanticCompressor

CANNY, INPAINTING = ControlNetConfig.canny(), ControlNetConfig.inpainting()
SUPER_RESOLUTION, IDENTITY = ControlNetConfig.super_resolution(), ControlNetConfig.identity()
TINY_LARGE = ControlNetConfig(
    in_channels=4,
    bottleneck="large",
    out_channels=(6,) * 8,
    feature_channels=10,
    stem_channels=14,
    residual_channels=6,
    residual_blocks=2,
)
TINY_SIMPLE = ControlNetConfig(
    in_channels=5,
    bottleneck="simple",
    out_channels=(6,) * 8,
    feature_channels=5,
    stem_channels=9,
)


def published_shapes(config: ControlNetConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = controlnet_to_original(ControlNet(config).state_dict(), config)
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def projections(count: int, features: int) -> dict[str, tuple[int, ...]]:
    return {
        f"projections.{index}.{layer}.weight": (width, features, 1, 1)
        for index in range(count)
        for layer, width in ((0, features), (2, 2048))
    }


def convolution(name: str, into: int, out: int, kernel: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into, kernel, kernel), f"{name}.bias": (out,)}


@pytest.mark.parametrize(("config", "channels"), [(CANNY, 1), (INPAINTING, 4)])
def test_edges_and_holes_are_read_by_the_compressors_trunk(config, channels):
    with torch.device("meta"):
        compressor = SemanticCompressor(CompressorConfig()).state_dict()
    trunk = compressor_to_original(compressor, CompressorConfig())
    expected = {
        key: tuple(tensor.shape) for key, tensor in trunk.items() if key.startswith("backbone.")
    }
    expected["backbone.0.0.weight"] = (24, channels, 3, 3)
    assert published_shapes(config) == expected | projections(8, 1280)


def test_super_resolution_has_the_published_keys():
    expected = convolution("backbone.0", 16, 16384, 1) | convolution("backbone.2", 16384, 1024, 1)
    for block in range(3, 11):
        name = f"backbone.{block}.blocks"
        for index in (0, 3):
            expected |= {f"{name}.{index}.weight": (1024,), f"{name}.{index}.bias": (1024,)}
            expected |= convolution(f"{name}.{index + 2}", 1024, 1024, 3)
    expected |= convolution("backbone.11", 1024, 1280, 1)
    assert published_shapes(SUPER_RESOLUTION) == expected | projections(8, 1280)


def test_identity_has_the_published_keys():
    expected = convolution("backbone.0", 512, 2048, 3) | convolution("backbone.2", 2048, 512, 3)
    assert published_shapes(IDENTITY) == expected | projections(64, 512)


class _Norm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [
            layer
            for _ in range(2)
            for layer in (_Norm(width), nn.GELU(), nn.Conv2d(width, width, 3, padding=1))
        ]
        self.blocks = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.blocks(x)


LARGE_BACKBONE = (
    nn.Conv2d(4, 14, 1),
    nn.LeakyReLU(0.2),
    nn.Conv2d(14, 6, 1),
    _Residual(6),
    _Residual(6),
    nn.Conv2d(6, 10, 1),
)
SIMPLE_BACKBONE = (
    nn.Conv2d(5, 9, 3, padding=1),
    nn.LeakyReLU(0.2),
    nn.Conv2d(9, 5, 3, padding=1),
)


@pytest.mark.parametrize(
    ("config", "layers"),
    [(TINY_LARGE, LARGE_BACKBONE), (TINY_SIMPLE, SIMPLE_BACKBONE)],
    ids=["large", "simple"],
)
def test_a_controlnet_equals_its_published_form(config, layers):
    width = config.feature_channels
    projections = nn.ModuleList(
        nn.Sequential(
            nn.Conv2d(width, width, 1, bias=False),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 6, 1, bias=False),
        )
        for _ in range(8)
    )
    theirs = nn.ModuleDict({"backbone": nn.Sequential(*layers), "projections": projections})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    ours = ControlNet(config)
    ours.load_state_dict(controlnet_from_original(theirs.state_dict(), config))
    signal = torch.rand(2, config.in_channels, 5, 7, generator=generator)
    features = theirs["backbone"](signal)
    maps = ours(signal)
    for projection, block in zip(projections, PUBLISHED_BLOCKS, strict=True):
        expected = projection(features)
        assert (maps[block] - expected).abs().max() < 1e-5 * expected.std()
    back = controlnet_to_original(ours.state_dict(), config)
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize("config", [CANNY, SUPER_RESOLUTION], ids=["canny", "super_resolution"])
def test_keys_survive_the_way_there_and_back(config):
    with torch.device("meta"):
        state = ControlNet(config).state_dict()
    # Values would be slow at this size: each tensor is marked by its own place in the list.
    marked = {key: torch.tensor(index) for index, key in enumerate(state)}
    back = controlnet_from_original(controlnet_to_original(marked, config), config)
    assert back == marked


@pytest.mark.parametrize(
    "config",
    [CANNY, INPAINTING, SUPER_RESOLUTION, IDENTITY, TINY_LARGE, TINY_SIMPLE],
    ids=["canny", "inpainting", "super_resolution", "identity", "large", "simple"],
)
def test_a_published_controlnet_is_known_by_its_shapes_alone(config):
    found = detect(published_shapes(config), "file")
    assert (found.kind, found.generation, found.layout) == ("controlnet", "v3", "original")
    assert found.config == config


def test_one_whose_blocks_nothing_tells_is_refused():
    config = ControlNetConfig(blocks=(0, 1), out_channels=(8, 8))
    with pytest.raises(UserError, match=r"x\.safetensors: a ControlNet of 2 projections"):
        detect(published_shapes(config), "x.safetensors")


def test_one_that_lacks_a_tensor_is_refused_naming_it():
    shapes = published_shapes(SUPER_RESOLUTION)
    del shapes["projections.3.2.weight"]
    with pytest.raises(UserError, match=r"lacks 'projections\.3\.2\.weight'"):
        detect(shapes, "x.safetensors")


def test_one_whose_shapes_make_no_network_is_one_line():
    shapes = published_shapes(TINY_SIMPLE)
    shapes["backbone.0.weight"] = (9, 4, 3, 3)
    with pytest.raises(UserError, match=r"^x: looks like .* feature_channels=5 must equal"):
        detect(shapes, "x")
    with pytest.raises(UserError, match=r"^x: looks like"):
        detect(shapes | {"backbone.0.weight": (9,)}, "x")
