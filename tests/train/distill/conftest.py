"""Small teachers, as objects and as files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cascade.checkpoints.files import save_network
from stages.unet.config import UNetConfig
from stages.unet.unet import UNet
from tests.reference.unet_toys import spread
from tests.stages.unet.toys import toy_of

MIDDLING = UNetConfig(
    channels=(8, 16),
    num_heads=(1, 2),
    down_depths=((0, 0), (3, 2)),
    mid_depth=2,
    up_depths=((1, 2, 1), (0, 0, 0)),
    text_channels=6,
    text_pooled_channels=5,
    size_channels=4,
    norm_groups=4,
)
"""All that can be removed but a whole level, as small as can be."""


def _network(config: UNetConfig) -> UNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return spread(UNet(config))


@pytest.fixture
def middling() -> UNet:
    return _network(MIDDLING)


@pytest.fixture
def middling_file(tmp_path: Path, middling: UNet) -> Path:
    path = tmp_path / "middling.safetensors"
    save_network(path, middling)
    return path


def _file(folder: Path, config: UNetConfig, name: str) -> Path:
    path = folder / f"{name}.safetensors"
    save_network(path, _network(toy_of(config, 20)))
    return path


@pytest.fixture(scope="session")
def sdxl_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow SDXL with all its depths."""
    return _file(tmp_path_factory.mktemp("sdxl"), UNetConfig.sdxl(), "teacher")


@pytest.fixture(scope="session")
def sd_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow SD 1.5 with all its depths."""
    return _file(tmp_path_factory.mktemp("sd"), UNetConfig.sd15(), "teacher")
