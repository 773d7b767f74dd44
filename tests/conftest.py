"""Fixtures that several packages' tests share; no test reaches for the network."""

from __future__ import annotations

import os
import socket
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: one thread each is fastest
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch import nn

from cascade.checkpoints.files import save_network
from cascade.pipelines.spec import CascadeSpec, StageSampling, save_spec
from stages.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from stages.previewer import Previewer, PreviewerConfig
from stages.semantic_compressor import CompressorConfig, SemanticCompressor, TrunkStage
from stages.stage_a import StageA, StageAConfig
from stages.stage_b import StageB, StageBConfig
from stages.stage_c import StageC, StageCConfig
from stages.unet.config import UNetConfig
from stages.unet.unet import UNet

pytest_plugins = ["tests.fake_hub"]

TEXT_CHANNELS, TEXT_POOLED, WINDOW = 16, 12, 16
CAPTIONS = ["a 3D render of a red apple", "a flat icon of a blue fish", "a photo of a green hat"]


_LOOPBACK = ("127.", "::1", "localhost")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may leave this machine: only loopback and local sockets connect."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and not str(address[0]).startswith(_LOOPBACK):
            raise AssertionError(f"a test reached for the network: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder with random weights: 32 px pictures, Stage C on 2 x 2. Do not change."""
    folder = tmp_path_factory.mktemp("tiny")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, network in _networks().items():
            _randomize(network)
            save_network(folder / f"{name}.safetensors", network)
        _save_text(folder / "text")
    spec = CascadeSpec(
        name="tiny",
        image_size=32,
        pixels_per_stage_c_cell=16.0,
        size_multiple=8,
        min_size=16,
        max_size=64,
        stage_c=StageSampling(steps=3, guidance=2.0),
        stage_b=StageSampling(steps=2, guidance=1.1),
    )
    save_spec(spec, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher U-Net of SDXL's kind and its autoencoder, for the tiny model's text. Do not change.

    32 px pictures have latents of 8 x 8.
    """
    folder = tmp_path_factory.mktemp("tiny_unet")
    teacher = UNetConfig(
        channels=(8, 16, 16),
        num_heads=(1, 2, 2),
        down_depths=((0, 0), (1, 1), (3, 3)),
        mid_depth=3,
        up_depths=((3, 3, 3), (1, 1, 1), (0, 0, 0)),
        text_channels=TEXT_CHANNELS,
        text_pooled_channels=TEXT_POOLED,
        size_channels=4,
        norm_groups=4,
    )
    autoencoder = AutoencoderKLConfig(
        channels=(8, 8, 16), blocks_per_level=1, norm_groups=4, scale=0.7
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        networks = {"unet": UNet(teacher), "autoencoder_kl": AutoencoderKL(autoencoder)}
        for name, network in networks.items():
            _randomize(network)
            save_network(folder / f"{name}.safetensors", network)
    return folder


def _networks() -> dict[str, nn.Module]:
    stage_c = StageCConfig(
        cond_channels=16,
        hidden_channels=(16, 16),
        num_heads=(2, 2),
        down_blocks=(1, 1),
        up_blocks=(1, 1),
        text_channels=TEXT_CHANNELS,
        text_pooled_channels=TEXT_POOLED,
        image_channels=None,
        time_conds=(),
    )
    stage_b = StageBConfig(
        cond_channels=16,
        hidden_channels=(8, 16),
        num_heads=(0, 2),
        down_blocks=(1, 1),
        up_blocks=(1, 1),
        up_repeats=(1, 1),
        text_pooled_channels=TEXT_POOLED,
        pixel_condition=False,
        dropout=(0.0, 0.0),
        time_conds=(),
    )
    compressor = CompressorConfig(
        stem_channels=8,
        stages=(TrunkStage("fused", 2, 3, 2, 8, 1), TrunkStage("mb", 2, 3, 4, 16, 1)),
        head_channels=16,
        input_fraction=1.0,
    )
    stage_a = StageAConfig(
        channels=(8, 16), encoder_blocks=(1, 1), decoder_blocks=(1, 1), codebook_size=16
    )
    return {
        "stage_c": StageC(stage_c),
        "stage_b": StageB(stage_b),
        "compressor": SemanticCompressor(compressor),
        "stage_a": StageA(stage_a),
        "previewer": Previewer(PreviewerConfig(channels=(8, 8))),
    }


def _randomize(network: nn.Module) -> None:
    """Give zero-initialised weights values, so that all of the network has a say."""
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.2)


def _save_text(folder: Path) -> None:
    from transformers.models.clip.configuration_clip import CLIPConfig
    from transformers.models.clip.modeling_clip import CLIPModel

    from cascade.text.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(CAPTIONS, 320, WINDOW)
    tokenizer.save_pretrained(folder)
    common = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = CLIPConfig(
        text_config={
            **common,
            "hidden_size": TEXT_CHANNELS,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": WINDOW,
            "projection_dim": TEXT_POOLED,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**common, "hidden_size": 16, "image_size": 32, "patch_size": 16},
        projection_dim=TEXT_POOLED,
    )
    CLIPModel(config).save_pretrained(folder)
