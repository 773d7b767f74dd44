"""U-Nets and their autoencoder: the original layout both ways, and shapes read from tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cascade.checkpoints.autoencoder_kl import (
    autoencoder_kl_from_diffusers,
    autoencoder_kl_from_original,
    autoencoder_kl_to_original,
)
from cascade.checkpoints.detect_unet import autoencoder_kl_config, unet_config, unet_layout
from cascade.checkpoints.files import on_meta, read_tensors
from cascade.checkpoints.mapped import StoredTensors
from cascade.checkpoints.single_file import AUTOENCODER, UNET, part_of, with_prefix
from cascade.checkpoints.unet import unet_from_original, unet_to_original
from cascade.errors import UserError
from stages.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from stages.unet.config import UNetConfig
from stages.unet.unet import UNet
from tests.stages.unet.toys import PUBLISHED, diffusers_arguments, toy_of

State = dict[str, Tensor]
Same = Callable[[State, State], None]

VAE = AutoencoderKLConfig(
    channels=(8, 16, 24), blocks_per_level=1, latent_channels=3, norm_groups=4, scale=0.5
)
ENTRIES = {
    "sdxl": (9, 9),
    "ssd_1b": (9, 9),
    "vega": (9, 9),
    "koala_1b": (6, 6),
    "koala_700m": (6, 6),
    "sd15": (12, 12),
    "bk_base": (8, 8),
    "bk_small": (8, 8),
    "bk_tiny": (6, 6),
}
"""Input and output entries of the original layout: the facts, section 5."""


def state_of(network: nn.Module, seed: int = 0) -> State:
    """Weights of which no two tensors are alike."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(value.shape, generator=generator)
        for key, value in network.state_dict().items()
    }


def shapes_of(state: State) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def on_meta_of(network: type[Any], config: Any) -> State:
    with on_meta():
        state: State = network(config).state_dict()
    return state


# The original layout


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_round_trip_gives_the_very_same_tensors(name: str, assert_same_tensors: Same) -> None:
    config = toy_of(PUBLISHED[name], 40)
    state = state_of(UNet(config))
    assert_same_tensors(unet_from_original(unet_to_original(state, config), config), state)


@pytest.mark.reference
@pytest.mark.parametrize("name", PUBLISHED)
def test_diffusers_reads_what_we_write_as_original(name: str, assert_same_tensors: Same) -> None:
    """Their converter, which knows nothing of our tables, gives back every tensor."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = toy_of(PUBLISHED[name], 40)
    state = state_of(UNet(config))
    written = with_prefix(unet_to_original(state, config), UNET)
    arguments = diffusers_arguments(config)
    arguments["layers_per_block"] = arguments["layers_per_block"][0]
    assert_same_tensors(convert_ldm_unet_checkpoint(written, arguments), state)


@pytest.mark.parametrize("name", ENTRIES)
def test_original_files_have_the_published_number_of_entries(name: str) -> None:
    config = PUBLISHED[name]
    original = unet_to_original(on_meta_of(UNet, config), config)
    for way, count in zip(("input_blocks", "output_blocks"), ENTRIES[name], strict=True):
        found = {key.split(".")[1] for key in original if key.startswith(way)}
        assert found == {str(number) for number in range(count)}


def test_resampling_is_behind_what_the_entry_has() -> None:
    """Diffusers reads it wherever it is; the authors' own code does not."""
    for config, names in (
        (UNetConfig.sd15(), {"2.1", "5.2", "8.2"}),
        (UNetConfig.bk_base(), {"1.1", "3.2", "5.2"}),
        (UNetConfig.sdxl(), {"2.2", "5.2"}),
    ):
        original = unet_to_original(on_meta_of(UNet, config), config)
        found = {key for key in original if key.endswith(".conv.weight")}
        assert found == {f"output_blocks.{name}.conv.weight" for name in names}


def test_well_known_names_of_sdxl() -> None:
    original = unet_to_original(on_meta_of(UNet, UNetConfig.sdxl()), UNetConfig.sdxl())
    for name, shape in {
        "label_emb.0.0.weight": (1280, 2816),
        "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "input_blocks.4.1.proj_in.weight": (640, 640),
        "middle_block.1.transformer_blocks.9.attn2.to_k.weight": (1280, 2048),
        "output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        "out.2.bias": (4,),
    }.items():
        assert tuple(original[name].shape) == shape


def test_layers_with_and_without_attention_in_one_level(assert_same_tensors: Same) -> None:
    """No published network has them; a student whose layers were chosen one by one may."""
    config = replace(
        toy_of(UNetConfig.bk_tiny()),
        down_depths=((0, 1), (2,), (1,)),
        up_depths=((1, 0), (0, 1), (1, 0, 2)),
    )
    state = state_of(UNet(config))
    original = unet_to_original(state, config)
    assert_same_tensors(unet_from_original(original, config), state)
    found = unet_config(shapes_of(original), "x", {"norm_num_groups": 8, "attention_head_dim": 4})
    assert found == config


def test_a_missing_tensor_is_named() -> None:
    config = toy_of(UNetConfig.bk_tiny())
    original = unet_to_original(state_of(UNet(config)), config)
    del original["out.2.bias"]
    with pytest.raises(UserError, match=r"1 missing: out\.2\.bias"):
        unet_from_original(original, config)


# The shape, read from tensors


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_shape_is_read_from_its_tensors(name: str) -> None:
    """In both layouts, with nothing declared."""
    config = PUBLISHED[name]
    state = on_meta_of(UNet, config)
    original = unet_to_original(state, config)
    assert (unet_layout(state), unet_layout(original)) == ("ours", "original")
    assert unet_config(shapes_of(state), "x") == config
    assert unet_config(shapes_of(original), "x") == config


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_declared_is_believed(name: str) -> None:
    config = toy_of(PUBLISHED[name], 40)
    shapes = shapes_of(on_meta_of(UNet, config))
    assert unet_config(shapes, "x", diffusers_arguments(config)) == config


def test_what_is_no_u_net_is_refused() -> None:
    shapes = shapes_of(on_meta_of(UNet, UNetConfig.bk_tiny()))
    with pytest.raises(UserError, match=r"x: no U-Net of SD or SDXL; its first tensors: a, b"):
        unet_config({"b": (1,), "a": (1,)}, "x")
    with pytest.raises(UserError, match=r"x: .* lacks 'down_blocks\.1\.resnets\.0\.conv2"):
        unet_config({k: v for k, v in shapes.items() if "1.resnets.0.conv2" not in k}, "x")
    without_up = {key: value for key, value in shapes.items() if "up_blocks.1." not in key}
    with pytest.raises(UserError, match=r"x: a U-Net that is not known here: .*on the way up"):
        unet_config(without_up, "x")


def test_the_refiner_is_refused() -> None:
    refiner = replace(UNetConfig.sd21(), channels=(384, 768, 1536, 1536), num_heads=(6, 12, 24, 24))
    with pytest.raises(UserError, match="refiner"):
        unet_config(shapes_of(on_meta_of(UNet, refiner)), "x")


# The autoencoder


def test_the_autoencoder_returns_the_same(assert_same_tensors: Same) -> None:
    state = state_of(AutoencoderKL(VAE))
    original = autoencoder_kl_to_original(state, VAE)
    assert original["encoder.mid.attn_1.q.weight"].shape == (24, 24, 1, 1)
    assert original["decoder.up.2.block.0.conv1.weight"].shape == (24, 24, 3, 3)
    assert_same_tensors(autoencoder_kl_from_original(original, VAE), state)


@pytest.mark.reference
def test_diffusers_reads_the_autoencoder_that_we_write(assert_same_tensors: Same) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    state = state_of(AutoencoderKL(VAE))
    written = with_prefix(autoencoder_kl_to_original(state, VAE), AUTOENCODER)
    declared = {"down_block_types": [""] * 3, "up_block_types": [""] * 3, "layers_per_block": 1}
    assert_same_tensors(convert_ldm_vae_checkpoint(written, declared), state)


def test_old_names_of_the_attention_are_taken(assert_same_tensors: Same) -> None:
    state = state_of(AutoencoderKL(VAE))
    old = dict(state)
    for new, name in (
        ("to_q", "query"),
        ("to_k", "key"),
        ("to_v", "value"),
        ("to_out.0", "proj_attn"),
    ):
        old = {key.replace(f".{new}.", f".{name}."): value for key, value in old.items()}
    assert old.keys() != state.keys()
    assert_same_tensors(autoencoder_kl_from_diffusers(old, VAE), state)
    assert_same_tensors(autoencoder_kl_from_diffusers(state, VAE), state)
    del old["decoder.mid_block.attentions.0.query.bias"]
    with pytest.raises(UserError, match="1 missing: decoder"):
        autoencoder_kl_from_diffusers(old, VAE)


@pytest.mark.parametrize(
    "config",
    [
        AutoencoderKLConfig.sd(),
        AutoencoderKLConfig.sdxl(),
        AutoencoderKLConfig(blocks_per_level=1, quant_convs=False, latent_channels=16),
    ],
)
def test_the_autoencoders_shape_is_read_from_its_tensors(config: AutoencoderKLConfig) -> None:
    state = on_meta_of(AutoencoderKL, config)
    for found in (state, autoencoder_kl_to_original(state, config)):
        assert autoencoder_kl_config(shapes_of(found), "x", scale=config.scale) == config
    declared = {"scaling_factor": 1.5, "shift_factor": 0.25}
    expected = replace(config, scale=1.5, shift=0.25)
    assert autoencoder_kl_config(shapes_of(state), "x", declared) == expected


def test_an_autoencoder_without_a_scale_is_refused() -> None:
    shapes = shapes_of(on_meta_of(AutoencoderKL, VAE))
    with pytest.raises(UserError, match=r"0\.18215 for SD, 0\.13025 for SDXL"):
        autoencoder_kl_config(shapes, "x")
    with pytest.raises(UserError, match="no AutoencoderKL: it lacks"):
        autoencoder_kl_config({"a": (1,)}, "x", scale=1.0)


# A single file


def test_a_single_file_is_taken_apart_without_reading_it(
    tmp_path: Any, assert_same_tensors: Same
) -> None:
    config = toy_of(UNetConfig.koala_700m())
    unet, autoencoder = state_of(UNet(config)), state_of(AutoencoderKL(VAE))
    path = tmp_path / "model.safetensors"
    save_file(
        with_prefix(unet_to_original(unet, config), UNET)
        | with_prefix(autoencoder_kl_to_original(autoencoder, VAE), AUTOENCODER),
        path,
    )
    opened = read_tensors(path)
    parts = part_of(opened, UNET), part_of(opened, AUTOENCODER)
    assert all(isinstance(part, StoredTensors) for part in parts)
    assert_same_tensors(unet_from_original(parts[0], config), unet)
    assert_same_tensors(autoencoder_kl_from_original(parts[1], VAE), autoencoder)
