from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cascade.checkpoints.files import save_network
from cascade.checkpoints.load import FAMILIES, Family, load_any
from cascade.errors import UserError
from stages.autoencoder_kl import AutoencoderKLConfig
from stages.controlnet import ControlNetConfig
from stages.previewer import PreviewerConfig
from stages.semantic_compressor import CompressorConfig
from stages.stage_a import StageAConfig
from stages.stage_b import StageBConfig
from stages.stage_b_v2 import StageBV2Config
from stages.stage_c import StageCConfig
from stages.stage_c_v2 import StageCV2Config
from stages.unet.config import UNetConfig


def family_of(config: type) -> Family:
    """The family of the networks with this configuration."""
    [found] = [family for family in FAMILIES if family.config is config]
    return found


# Heads are 64 wide, as in every published network, so that shapes alone tell their number.
SMALL: dict[type[Any], Any] = {
    StageAConfig: StageAConfig(
        channels=(8, 16), encoder_blocks=(1, 1), decoder_blocks=(2, 1), codebook_size=32
    ),
    StageBConfig: StageBConfig(
        cond_channels=24,
        hidden_channels=(16, 64),
        num_heads=(0, 1),
        down_blocks=(1, 2),
        up_blocks=(2, 1),
        up_repeats=(2, 1),
        text_pooled_channels=20,
        dropout=(0.0, 0.0),
    ),
    StageCConfig: StageCConfig(
        cond_channels=24,
        hidden_channels=(64, 64),
        num_heads=(1, 1),
        down_blocks=(1, 2),
        up_blocks=(2, 1),
        text_channels=20,
        text_pooled_channels=12,
        image_channels=10,
    ),
    StageBV2Config: StageBV2Config(
        cond_channels=16,
        hidden_channels=(16, 64),
        num_heads=(0, 1),
        num_blocks=(1, 2),
        reads_compressed=(False, True),
        text_channels=20,
        dropout=(0.1, 0.1),
    ),
    StageCV2Config: StageCV2Config(hidden_channels=64, num_blocks=2, num_heads=1, text_channels=20),
    CompressorConfig: CompressorConfig(),
    PreviewerConfig: PreviewerConfig(channels=(8, 8, 4)),
    ControlNetConfig: ControlNetConfig(out_channels=(2, 4) * 4, feature_channels=8),
    UNetConfig: UNetConfig(
        channels=(64, 128),
        num_heads=(1, 2),
        down_depths=((0,), (2,)),
        mid_depth=1,
        up_depths=((1, 2), (0, 0)),
        text_channels=20,
        text_pooled_channels=12,
    ),
    AutoencoderKLConfig: AutoencoderKLConfig(channels=(32, 64), scale=0.7),
}
CASES = [
    pytest.param(family, layout, id=f"{family.kind}-{family.generation}-{layout}")
    for family in FAMILIES
    for layout in family.to_layout
]


def random_network(family: Family) -> Any:
    torch.manual_seed(0)
    network = family.network(SMALL[family.config])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    return network.eval()


def contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.contiguous().clone() for key, value in state.items()}


def assert_same(loaded: nn.Module, network: nn.Module) -> None:
    own, other = network.state_dict(), loaded.state_dict()
    assert own.keys() == other.keys()
    for key, value in own.items():
        assert torch.equal(value, other[key]), key


def without_dropout(config: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if name != "dropout"}


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_a_file_of_any_layout_loads_by_its_content_and_not_by_its_name(
    family: Family, layout: str, tmp_path: Path
) -> None:
    network = random_network(family)
    state = contiguous(family.to_layout[layout](network.state_dict(), network.config))
    save_file(state, tmp_path / "some_name.safetensors")
    # Read by AutoencoderKL alone, whose scale no tensor tells.
    [(published, loaded)] = load_any(tmp_path / "some_name.safetensors", scale=0.7)
    # SD's and SDXL's networks have diffusers' names here.
    is_ours = state.keys() == network.state_dict().keys() and layout == "diffusers"
    assert (published.kind, published.layout) == (family.kind, "ours" if is_ours else layout)
    assert without_dropout(published.config) == without_dropout(network.config)
    assert_same(loaded, network)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_understood(prefix: str, tmp_path: Path) -> None:
    family = family_of(StageCConfig)
    network = random_network(family)
    state = contiguous(family.to_layout["original"](network.state_dict(), network.config))
    save_file({prefix + key: value for key, value in state.items()}, tmp_path / "x.safetensors")
    [(_, loaded)] = load_any(tmp_path / "x.safetensors")
    assert_same(loaded, network)


def test_our_own_file_loads_too_and_keeps_what_shapes_do_not_tell(tmp_path: Path) -> None:
    family = family_of(StageCConfig)
    config = StageCConfig(
        cond_channels=24,
        hidden_channels=(24,),
        num_heads=(4,),
        down_blocks=(1,),
        up_blocks=(1,),
        text_channels=20,
        text_pooled_channels=12,
        dropout=0.25,
    )
    network = family.network(config)
    save_network(tmp_path / "ours.safetensors", network)
    [(published, loaded)] = load_any(tmp_path / "ours.safetensors")
    assert (published.layout, published.config) == ("ours", config)
    assert_same(loaded, network)


def test_shards_with_an_index_are_one_network(tmp_path: Path) -> None:
    family = family_of(StageCConfig)
    network = random_network(family)
    state = contiguous(family.to_layout["diffusers"](network.state_dict(), network.config))
    names = sorted(state)
    shards = {
        "diffusion_pytorch_model-00001-of-00002.safetensors": names[::2],
        "diffusion_pytorch_model-00002-of-00002.safetensors": names[1::2],
    }
    for shard, keys in shards.items():
        save_file({key: state[key] for key in keys}, tmp_path / shard)
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for path in (index, tmp_path):
        [(_, loaded)] = load_any(path)
        assert_same(loaded, network)


def test_a_folder_declares_what_shapes_do_not_tell(tmp_path: Path) -> None:
    family = family_of(StageCConfig)
    config = StageCConfig(
        cond_channels=24,
        hidden_channels=(32, 32),
        num_heads=(2, 4),
        down_blocks=(1, 1),
        up_blocks=(1, 1),
        text_channels=20,
        text_pooled_channels=12,
    )
    network = family.network(config)
    state = contiguous(family.to_layout["diffusers"](network.state_dict(), config))
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": [2, 4]}))
    [(published, _)] = load_any(tmp_path)
    assert published.config.num_heads == (2, 4)


def test_wuerstchens_stage_b_file_holds_two_networks(tmp_path: Path) -> None:
    stage_b, compressor = family_of(StageBV2Config), family_of(CompressorConfig)
    networks = {"state_dict": random_network(stage_b)}
    torch.manual_seed(0)
    networks["effnet_state_dict"] = compressor.network(CompressorConfig.v2())
    families = {"state_dict": stage_b, "effnet_state_dict": compressor}
    content = {
        name: families[name].to_layout["original"](network.state_dict(), network.config)
        for name, network in networks.items()
    }
    torch.save(content, tmp_path / "model_v2_stage_b.pt")
    loaded = {
        published.kind: network for published, network in load_any(tmp_path / "model_v2_stage_b.pt")
    }
    assert loaded.keys() == {"stage_b", "compressor"}
    assert_same(loaded["stage_b"], networks["state_dict"])
    assert_same(loaded["compressor"], networks["effnet_state_dict"])


def test_averaged_weights_win_over_the_raw_ones(tmp_path: Path) -> None:
    family = family_of(StageCV2Config)
    network = random_network(family)
    averaged = family.to_layout["original"](network.state_dict(), network.config)
    raw = {key: torch.zeros_like(value) for key, value in averaged.items()}
    torch.save({"state_dict": raw, "ema_state_dict": averaged}, tmp_path / "prior.pt")
    [(_, loaded)] = load_any(tmp_path / "prior.pt")
    assert_same(loaded, network)


@pytest.mark.parametrize("change", ["missing", "unexpected", "misshapen"])
def test_the_first_keys_that_do_not_fit_are_named(change: str, tmp_path: Path) -> None:
    family = family_of(StageCConfig)
    network = random_network(family)
    state = contiguous(family.to_layout["original"](network.state_dict(), network.config))
    key = "down_blocks.0.0.channelwise.4.bias"
    if change == "missing":
        del state[key]
    elif change == "unexpected":
        key = "down_blocks.0.0.something.bias"
        state[key] = torch.zeros(3)
    else:
        state[key] = torch.zeros(7)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=rf"x\.safetensors.* {change}.*{key.replace('.', '[.]')}"):
        load_any(tmp_path / "x.safetensors")


def test_another_kind_than_expected_is_refused(tmp_path: Path) -> None:
    family = family_of(StageAConfig)
    network = random_network(family)
    save_network(tmp_path / "x.safetensors", network)
    with pytest.raises(UserError, match="holds a stage_a, but stage_c is needed"):
        load_any(tmp_path / "x.safetensors", expect=("stage_c",))


def test_a_number_format_can_be_asked_for(tmp_path: Path) -> None:
    network = random_network(family_of(StageAConfig))
    save_network(tmp_path / "x.safetensors", network)
    [(_, loaded)] = load_any(tmp_path / "x.safetensors", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
