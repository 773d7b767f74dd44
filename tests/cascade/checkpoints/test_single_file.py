"""Single files of SD and SDXL: all their networks, whatever wraps them, and nothing left over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cascade.checkpoints.autoencoder_kl import autoencoder_kl_to_original
from cascade.checkpoints.files import CLASS_KEY, CONFIG_KEY
from cascade.checkpoints.load import load_any
from cascade.checkpoints.single_file import (
    AUTOENCODER,
    SD1_TEXT,
    SD2_TEXT,
    SDXL_TEXT,
    SDXL_TEXT_2,
    UNET,
    with_prefix,
)
from cascade.checkpoints.text_tower import text_config, text_from_original, text_to_original
from cascade.checkpoints.unet import unet_to_original
from cascade.config import to_dict
from cascade.errors import UserError
from cascade.text.towers import TEXT_PREFIX, TextTowerConfig, build_text_tower
from stages.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from stages.unet.unet import UNet
from tests.stages.unet.toys import PUBLISHED, toy_of

State = dict[str, Tensor]

VAE = AutoencoderKLConfig(channels=(32, 64), blocks_per_level=1)
CLIP_L = TextTowerConfig(64, 2, 1, 96, 40, 12, None, "quick_gelu", 39)
OPEN_CLIP = TextTowerConfig(128, 3, 2, 96, 40, 12, 72, "gelu", 39)


def random_state(network: nn.Module, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(one.shape, generator=generator)
        for key, one in network.state_dict().items()
    }


def text_state(config: TextTowerConfig, seed: int) -> State:
    """Under transformers' published names."""
    state = random_state(build_text_tower(config), seed)
    bare = ("text_model.", "text_projection.")
    return {n if n.startswith(bare) else TEXT_PREFIX + n: one for n, one in state.items()}


def networks(name: str) -> tuple[UNet, AutoencoderKL]:
    return UNet(toy_of(PUBLISHED[name], 40)), AutoencoderKL(VAE)


def single_file(name: str) -> tuple[State, dict[str, str], dict[str, State]]:
    """Return a file's tensors, its metadata, and each network's tensors under our names."""
    unet, vae = networks(name)
    ours = {"unet": random_state(unet, 1), "autoencoder_kl": random_state(vae, 2)}
    file = with_prefix(unet_to_original(ours["unet"], unet.config), UNET)
    file |= with_prefix(autoencoder_kl_to_original(ours["autoencoder_kl"], VAE), AUTOENCODER)
    # Heads, groups and sizes of toys are none that shapes tell.
    metadata = {
        f"{CLASS_KEY}.unet": "UNet",
        f"{CONFIG_KEY}.unet": json.dumps(to_dict(unet.config)),
    }
    return file, metadata, ours


def loaded(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for published, network in load_any(path):
        key = published.kind + ("_2" if published.kind in found else "")
        found[key] = network
    return found


def bare(state: State) -> State:
    return {name.removeprefix(TEXT_PREFIX): one for name, one in state.items()}


def assert_same(found: nn.Module, wanted: State) -> None:
    own, wanted = bare(found.state_dict()), bare(wanted)
    assert own.keys() == wanted.keys()
    for key, one in own.items():
        torch.testing.assert_close(one, wanted[key], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["koala_700m", "ssd_1b"])
def test_an_sdxl_file_gives_four_networks(name: str, tmp_path: Path) -> None:
    file, metadata, ours = single_file(name)
    first, second = text_state(CLIP_L, 3), text_state(OPEN_CLIP, 4)
    file |= with_prefix(first, SDXL_TEXT)
    file |= with_prefix(text_to_original(second, OPEN_CLIP), SDXL_TEXT_2)
    file["conditioner.embedders.1.model.logit_scale"] = torch.ones(())
    file[f"{SDXL_TEXT}text_model.embeddings.position_ids"] = torch.arange(12)[None]
    save_file(file, tmp_path / "x.safetensors", metadata)
    found = loaded(tmp_path / "x.safetensors")
    assert list(found) == ["unet", "autoencoder_kl", "text_encoder", "text_encoder_2"]
    for kind in ("unet", "autoencoder_kl"):
        assert_same(found[kind], ours[kind])
    assert_same(found["text_encoder"], first)
    assert_same(found["text_encoder_2"], second)
    assert found["autoencoder_kl"].config.scale == AutoencoderKLConfig.sdxl().scale
    assert found["text_encoder"].config.hidden_act == "quick_gelu"
    assert found["text_encoder_2"].config.hidden_act == "gelu"


@pytest.mark.parametrize("flat", [False, True], ids=["published", "flattened"])
def test_both_key_layouts_of_transformers_are_read(flat: bool, tmp_path: Path) -> None:
    state = text_state(CLIP_L, 3)
    own = bare(state) if flat else state
    save_file(with_prefix(own, SD1_TEXT), tmp_path / "x.safetensors")
    assert_same(loaded(tmp_path / "x.safetensors")["text_encoder"], state)


def test_an_sd_1_file_with_averages_gives_the_averaged_u_net(tmp_path: Path) -> None:
    file, metadata, ours = single_file("bk_base")
    averaged = {key: one + 1 for key, one in ours["unet"].items()}
    config = toy_of(PUBLISHED["bk_base"], 40)
    for key, one in unet_to_original(averaged, config).items():
        file[f"model_ema.diffusion_model{key.replace('.', '')}"] = one
    file |= {"model_ema.decay": torch.ones(()), "betas": torch.ones(8)}
    file["sqrt_one_minus_alphas_cumprod"] = torch.ones(8)
    save_file(file, tmp_path / "x.safetensors", metadata)
    found = loaded(tmp_path / "x.safetensors")
    assert_same(found["unet"], averaged)
    assert found["autoencoder_kl"].config.scale == AutoencoderKLConfig.sd().scale

    first = next(key for key in file if key.startswith("model_ema.diff"))
    del file[first]
    save_file(file, tmp_path / "y.safetensors", metadata)
    with pytest.raises(UserError, match=rf"averaged U-Net .* lacks 1 .*{first[10:]}"):
        load_any(tmp_path / "y.safetensors")


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod."])
def test_wrappers_of_the_file_and_of_its_networks_are_taken_off(
    wrapper: str, tmp_path: Path
) -> None:
    file, metadata, ours = single_file("sd15")
    save_file(with_prefix(file, wrapper), tmp_path / "all.safetensors", metadata)
    wrapped = {
        UNET + wrapper + key[len(UNET) :] if key.startswith(UNET) else key: one
        for key, one in file.items()
    }
    save_file(wrapped, tmp_path / "one.safetensors", metadata)
    for name in ("all", "one"):
        found = loaded(tmp_path / f"{name}.safetensors")
        assert_same(found["unet"], ours["unet"])
        assert_same(found["autoencoder_kl"], ours["autoencoder_kl"])


def test_sd_2_reads_the_states_before_the_last_layer(tmp_path: Path) -> None:
    state = text_state(OPEN_CLIP, 4)
    save_file(with_prefix(text_to_original(state, OPEN_CLIP), SD2_TEXT), tmp_path / "x.safetensors")
    [(published, model)] = load_any(tmp_path / "x.safetensors")
    assert published.config.num_layers == OPEN_CLIP.num_layers - 1
    assert published.config.projection_channels is None
    last = f"encoder.layers.{OPEN_CLIP.num_layers - 1}."
    kept = {k: v for k, v in state.items() if last not in k and "projection" not in k}
    assert_same(model, kept)


def test_what_belongs_to_no_network_is_named(tmp_path: Path) -> None:
    file, metadata, _ = single_file("sd15")
    save_file({**file, "lora.down": torch.ones(2)}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(UserError, match=r"1 tensors belong to no network of SD or SDXL: lora.down"):
        load_any(tmp_path / "x.safetensors")
    save_file({**file, f"{UNET}odd": torch.ones(2)}, tmp_path / "y.safetensors", metadata)
    with pytest.raises(UserError, match=r"y\.safetensors \(unet\).*unexpected: odd"):
        load_any(tmp_path / "y.safetensors")


def test_the_refiner_is_refused_by_name(tmp_path: Path) -> None:
    state = {
        f"{UNET}input_blocks.0.0.weight": torch.ones(384, 4, 3, 3),
        f"{UNET}out.2.weight": torch.ones(4, 384, 3, 3),
        f"{UNET}input_blocks.1.0.out_layers.3.weight": torch.ones(384, 384, 3, 3),
        f"{UNET}input_blocks.1.1.proj_in.weight": torch.ones(384, 384),
        f"{UNET}x.attn2.to_k.weight": torch.ones(384, 1280),
    }
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="refiner"):
        load_any(tmp_path / "x.safetensors")


def test_an_autoencoder_alone_needs_its_scale(tmp_path: Path) -> None:
    vae = AutoencoderKL(VAE)
    state = random_state(vae, 2)
    old = {
        key.replace("to_q", "query")
        .replace("to_k", "key")
        .replace("to_v", "value")
        .replace("to_out.0", "proj_attn"): one
        for key, one in state.items()
    }
    save_file(old, tmp_path / "vae.safetensors")
    with pytest.raises(UserError, match=r"scale; give it: 0\.18215 for SD, 0\.13025 for SDXL"):
        load_any(tmp_path / "vae.safetensors")
    [(published, network)] = load_any(tmp_path / "vae.safetensors", scale=0.5)
    assert published.layout == "diffusers" and network.config.scale == 0.5
    assert_same(network, state)
    # SD's own config.json leaves out what is diffusers' default.
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    assert load_any(tmp_path)[0][0].config.scale == AutoencoderKLConfig.sd().scale


def test_shards_with_an_index_and_a_variant_are_one_u_net(tmp_path: Path) -> None:
    unet, _ = networks("koala_1b")
    state = random_state(unet, 1)
    names = sorted(state)
    shards = [f"diffusion_pytorch_model.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)]
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for shard, half in zip(shards, halves, strict=True):
        save_file({name: state[name] for name in half}, tmp_path / shard)
    index = {name: shard for shard, half in zip(shards, halves, strict=True) for name in half}
    path = tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json"
    path.write_text(json.dumps({"weight_map": index}))
    declared = {"attention_head_dim": list(unet.config.num_heads), "norm_num_groups": 8}
    declared["addition_time_embed_dim"] = 8
    (tmp_path / "config.json").write_text(json.dumps(declared))
    [(published, network)] = load_any(tmp_path)
    assert published.config == unet.config
    assert_same(network, state)


@pytest.mark.reference
def test_open_clips_names_are_those_that_diffusers_reads() -> None:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    config = TextTowerConfig(128, 2, 2, 96, 40, 12, 128, "gelu", 39)
    state = text_state(config, 4)
    model = build_text_tower(config)
    original = with_prefix(text_to_original(state, config), SDXL_TEXT_2)
    theirs = convert_open_clip_checkpoint(model, dict(original), prefix=SDXL_TEXT_2)
    assert {
        k: v for k, v in theirs.items() if not k.endswith("position_ids")
    }.keys() == state.keys()
    for key, one in state.items():
        torch.testing.assert_close(theirs[key], one, rtol=0, atol=0)
    back = text_from_original(text_to_original(state, config), config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_published_text_encoders_have_the_published_sizes() -> None:
    second = TextTowerConfig(1280, 32, 20, 5120, projection_channels=1280, activation="gelu")
    for config, count in ((TextTowerConfig(), 123_060_480), (second, 694_659_840)):
        model = build_text_tower(config)
        assert sum(one.numel() for one in model.parameters()) == count
        shapes = {key: tuple(one.shape) for key, one in model.state_dict().items()}
        if config is second:
            original = text_to_original({k: v for k, v in model.state_dict().items()}, config)
            shapes = {key: tuple(one.shape) for key, one in original.items()}
        assert text_config(shapes, "x") == config
