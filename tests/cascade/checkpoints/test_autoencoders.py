from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cascade.checkpoints.autoencoders import (
    compressor_from_original,
    compressor_to_original,
    previewer_from_original,
    previewer_to_original,
    stage_a_from_diffusers,
    stage_a_from_original,
    stage_a_to_diffusers,
    stage_a_to_original,
)
from stages.previewer import Previewer, PreviewerConfig
from stages.semantic_compressor import CompressorConfig, SemanticCompressor, TrunkStage
from stages.stage_a import StageA, StageAConfig

BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
TINY_A = StageAConfig(channels=(8, 16), decoder_blocks=(3, 1), codebook_size=32, scale=0.3764)


def meta_state(network_class: type[nn.Module], config: object) -> dict[str, Tensor]:
    with torch.device("meta"):
        return network_class(config).state_dict()


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def random_state(network: nn.Module) -> dict[str, Tensor]:
    """Weights in which every tensor differs from every other and from its neutral value."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, tensor in network.state_dict().items():
        if not tensor.is_floating_point():
            state[key] = torch.randint(1, 1000, tensor.shape, generator=generator)
        elif "running_var" in key:
            state[key] = torch.rand(tensor.shape, generator=generator) + 0.5
        else:
            fan_in = max(1, tensor[0].numel()) if tensor.ndim > 1 else 4
            state[key] = torch.randn(tensor.shape, generator=generator) / fan_in**0.5
    return state


def assert_same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


# Stage A


@pytest.mark.reference
@pytest.mark.parametrize(("height", "width"), [(16, 16), (28, 36)])
def test_stage_a_equals_the_diffusers_network(height, width):
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    theirs = PaellaVQModel(embed_dim=16, bottleneck_blocks=3, num_vq_embeddings=32).eval()
    theirs.load_state_dict(random_state(theirs))
    ours = StageA(TINY_A).eval()
    ours.load_state_dict(stage_a_from_diffusers(theirs.state_dict(), TINY_A))
    torch.manual_seed(1)
    pixels = torch.rand(2, 3, height, width)
    with torch.no_grad():
        expected = theirs.encode(pixels).latents / theirs.config.scale_factor
        latents = ours.encode(pixels)
        assert (latents - expected).abs().max() < 1e-5 * expected.std()
        latents = torch.randn(2, 4, height // 4, width // 4)
        expected = theirs.decode(latents * theirs.config.scale_factor).sample
        assert (ours.decode(latents) - expected).abs().max() < 1e-5 * expected.std()
        quantized = theirs.decode(latents, force_not_quantize=False).sample
        actual = ours.decoder(ours.quantizer(latents).quantized)
        assert (actual - quantized).abs().max() < 1e-5 * quantized.std()


@pytest.mark.reference
def test_stage_a_has_every_key_and_shape_of_the_diffusers_network():
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    with torch.device("meta"):
        theirs = PaellaVQModel().state_dict()
    ours = meta_state(StageA, StageAConfig())
    assert shapes(stage_a_to_diffusers(ours, StageAConfig())) == shapes(theirs)
    assert shapes(stage_a_from_diffusers(theirs, StageAConfig())) == shapes(ours)


@pytest.mark.parametrize(
    ("to_theirs", "from_theirs"),
    [
        (stage_a_to_original, stage_a_from_original),
        (stage_a_to_diffusers, stage_a_from_diffusers),
    ],
)
def test_stage_a_weights_survive_the_way_there_and_back(to_theirs, from_theirs):
    state = random_state(StageA(TINY_A))
    theirs = to_theirs(state, TINY_A)
    assert len(theirs) == len(state)
    assert_same_tensors(from_theirs(theirs, TINY_A), state)


def test_stage_a_has_the_published_keys():
    published = shapes(stage_a_to_original(meta_state(StageA, StageAConfig()), StageAConfig()))
    assert len(published) == 122
    expected = {"in_block.1.weight": (192, 12, 1, 1), "in_block.1.bias": (192,)}
    expected |= _published_block("down_blocks.0", 192)
    expected |= {"down_blocks.1.weight": (384, 192, 4, 4), "down_blocks.1.bias": (384,)}
    expected |= _published_block("down_blocks.2", 384)
    expected |= {"down_blocks.3.0.weight": (4, 384, 1, 1)}
    expected |= _batch_norm("down_blocks.3.1", 4)
    expected |= {"vquantizer.codebook.weight": (8192, 4)}
    expected |= {"up_blocks.0.0.weight": (384, 4, 1, 1), "up_blocks.0.0.bias": (384,)}
    for index in range(1, 13):
        expected |= _published_block(f"up_blocks.{index}", 384)
    expected |= {"up_blocks.13.weight": (384, 192, 4, 4), "up_blocks.13.bias": (192,)}
    expected |= _published_block("up_blocks.14", 192)
    expected |= {"out_block.0.weight": (12, 192, 1, 1), "out_block.0.bias": (12,)}
    assert published == expected


def _published_block(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gammas": (6,),
        f"{prefix}.depthwise.1.weight": (width, 1, 3, 3),
        f"{prefix}.depthwise.1.bias": (width,),
        f"{prefix}.channelwise.0.weight": (4 * width, width),
        f"{prefix}.channelwise.0.bias": (4 * width,),
        f"{prefix}.channelwise.2.weight": (width, 4 * width),
        f"{prefix}.channelwise.2.bias": (width,),
    }


def _batch_norm(prefix: str, width: int, affine: bool = True) -> dict[str, tuple[int, ...]]:
    names = BATCH_NORM if affine else BATCH_NORM[2:]
    return {f"{prefix}.{name}": () if "tracked" in name else (width,) for name in names}


# Semantic compressor


def _conv_norm(prefix: str, out: int, into: int, kernel: int) -> dict[str, tuple[int, ...]]:
    """A torchvision Conv2dNormActivation."""
    return {f"{prefix}.0.weight": (out, into, kernel, kernel)} | _batch_norm(f"{prefix}.1", out)


def _torchvision_features() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of torchvision's ``efficientnet_v2_s().features``, from its naming scheme.

    Rows: first block's input, expansion, output, blocks, whether depthwise with squeeze.
    """
    rows = [
        (24, 1, 24, 2, False),
        (24, 4, 48, 4, False),
        (48, 4, 64, 4, False),
        (64, 4, 128, 6, True),
        (128, 6, 160, 9, True),
        (160, 6, 256, 15, True),
    ]
    keys = _conv_norm("0", 24, 3, 3)
    for stage, (width, expansion, out, blocks, squeeze) in enumerate(rows, start=1):
        for index in range(blocks):
            into = out if index else width
            hidden, block = into * expansion, f"{stage}.{index}.block"
            if squeeze:
                squeezed = into // 4
                keys |= _conv_norm(f"{block}.0", hidden, into, 1)
                keys |= _conv_norm(f"{block}.1", hidden, 1, 3)
                keys |= {f"{block}.2.fc1.weight": (squeezed, hidden, 1, 1)}
                keys |= {f"{block}.2.fc1.bias": (squeezed,)}
                keys |= {f"{block}.2.fc2.weight": (hidden, squeezed, 1, 1)}
                keys |= {f"{block}.2.fc2.bias": (hidden,)}
                keys |= _conv_norm(f"{block}.3", out, hidden, 1)
            elif expansion == 1:
                keys |= _conv_norm(f"{block}.0", out, into, 3)
            else:
                keys |= _conv_norm(f"{block}.0", hidden, into, 3)
                keys |= _conv_norm(f"{block}.1", out, hidden, 1)
    return keys | _conv_norm("7", 1280, 256, 1)


@pytest.mark.parametrize(
    ("config", "count"), [(CompressorConfig.v3(), 784), (CompressorConfig.v2(), 786)]
)
def test_the_compressor_has_the_published_keys(config, count):
    published = compressor_to_original(meta_state(SemanticCompressor, config), config)
    expected = {f"backbone.{key}": shape for key, shape in _torchvision_features().items()}
    expected |= {"mapper.0.weight": (16, 1280, 1, 1)}
    expected |= _batch_norm("mapper.1", 16, affine=config.affine)
    assert shapes(published) == expected
    assert len(published) == count


@pytest.mark.parametrize("config", [CompressorConfig.v3(), CompressorConfig.v2()])
def test_compressor_keys_survive_the_way_there_and_back(config):
    state = meta_state(SemanticCompressor, config)
    # Values would be slow at this size: each tensor is marked by its own place in the list.
    marked = {key: torch.tensor(index) for index, key in enumerate(state)}
    there = compressor_to_original(marked, config)
    assert_same_tensors(compressor_from_original(there, config), marked)


def _published_layer(into: int, out: int, kernel: int, stride: int, groups: int) -> nn.Sequential:
    conv = nn.Conv2d(into, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out, eps=1e-3), nn.SiLU())


class _PublishedGate(nn.Module):
    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(x, 1)
        return self.fc2(nn.functional.silu(self.fc1(pooled))).sigmoid() * x


class _PublishedBlock(nn.Module):
    def __init__(self, *layers: nn.Module, residual: bool) -> None:
        super().__init__()
        self.block, self.residual = nn.Sequential(*layers), residual

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.residual else self.block(x)


@pytest.mark.parametrize("affine", [False, True])
def test_the_compressor_equals_its_published_form(affine):
    config = CompressorConfig(
        stem_channels=8,
        stages=(
            TrunkStage("fused", 1, 3, 1, 8, 1),
            TrunkStage("fused", 2, 3, 2, 12, 2),
            TrunkStage("mb", 2, 3, 2, 12, 2),
        ),
        head_channels=20,
        latent_channels=4,
        affine=affine,
    )
    layer = _published_layer

    def linear(into: int, out: int) -> nn.Sequential:
        return layer(into, out, 1, 1, 1)[:2]

    def fused(into: int, stride: int) -> _PublishedBlock:
        layers = layer(into, 2 * into, 3, stride, 1), linear(2 * into, 12)
        return _PublishedBlock(*layers, residual=stride == 1)

    def depthwise(stride: int) -> _PublishedBlock:
        layers = layer(12, 24, 1, 1, 1), layer(24, 24, 3, stride, 24), _PublishedGate(24, 3)
        return _PublishedBlock(*layers, linear(24, 12), residual=stride == 1)

    backbone = nn.Sequential(
        layer(3, 8, 3, 2, 1),
        nn.Sequential(_PublishedBlock(layer(8, 8, 3, 1, 1), residual=True)),
        nn.Sequential(fused(8, 2), fused(12, 1)),
        nn.Sequential(depthwise(2), depthwise(1)),
        layer(12, 20, 1, 1, 1),
    )
    mapper = nn.Sequential(nn.Conv2d(20, 4, 1, bias=False), nn.BatchNorm2d(4, affine=affine))
    theirs = nn.ModuleDict({"backbone": backbone, "mapper": mapper}).eval()
    theirs.load_state_dict(random_state(theirs))
    ours = SemanticCompressor(config).eval()
    ours.load_state_dict(compressor_from_original(theirs.state_dict(), config))
    pixels = torch.rand(2, 3, 33, 47, generator=torch.Generator().manual_seed(2))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    expected = mapper(backbone(normalised))
    assert (ours(pixels) - expected).abs().max() < 1e-5 * expected.std()


# Previewer


def test_the_previewer_has_the_published_keys():
    config = PreviewerConfig()
    published = previewer_to_original(meta_state(Previewer, config), config)
    expected = {}
    convolutions = [
        (512, 16, 1, 512),
        (512, 512, 3, 512),
        (512, 256, 2, 256),  # transposed: input first
        (256, 256, 3, 256),
        (256, 128, 2, 128),
        (128, 128, 3, 128),
        (128, 128, 2, 128),
        (128, 128, 3, 128),
    ]
    for index, (first, second, kernel, out) in enumerate(convolutions):
        expected[f"blocks.{3 * index}.weight"] = (first, second, kernel, kernel)
        expected[f"blocks.{3 * index}.bias"] = (out,)
        expected |= _batch_norm(f"blocks.{3 * index + 2}", out)
    expected |= {"blocks.24.weight": (3, 128, 1, 1), "blocks.24.bias": (3,)}
    assert shapes(published) == expected
    assert len(published) == 58


def test_the_previewer_equals_its_published_form():
    torch.manual_seed(0)
    config = PreviewerConfig(latent_channels=4, channels=(12, 8))
    ours = Previewer(config).eval()
    ours.load_state_dict(random_state(ours))
    layers: list[nn.Module] = []
    for conv in (
        nn.Conv2d(4, 12, 1),
        nn.Conv2d(12, 12, 3, padding=1),
        nn.ConvTranspose2d(12, 8, 2, stride=2),
        nn.Conv2d(8, 8, 3, padding=1),
    ):
        layers += [conv, nn.GELU(), nn.BatchNorm2d(conv.out_channels)]
    theirs = nn.ModuleDict({"blocks": nn.Sequential(*layers, nn.Conv2d(8, 3, 1))}).eval()
    theirs.load_state_dict(previewer_to_original(ours.state_dict(), config))
    latents = torch.randn(2, 4, 5, 3)
    torch.testing.assert_close(ours(latents), theirs["blocks"](latents))
    back = previewer_from_original(theirs.state_dict(), config)
    assert_same_tensors(back, dict(ours.state_dict()))


# Strictness


@pytest.mark.parametrize(
    ("convert", "network", "config"),
    [
        (stage_a_to_original, StageA, TINY_A),
        (compressor_to_original, SemanticCompressor, CompressorConfig()),
        (previewer_to_original, Previewer, PreviewerConfig()),
    ],
)
def test_missing_and_left_over_keys_are_refused(convert, network, config):
    state = dict(meta_state(network, config))
    with pytest.raises(ValueError, match="nobody_knows_me"):
        convert(state | {"nobody_knows_me": torch.zeros(1)}, config)
    first = next(iter(state))
    del state[first]
    with pytest.raises(ValueError):
        convert(state, config)
