"""What silencing a U-Net's inner blocks changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.unet_levels import inner_blocks, main, measure
from cascade.checkpoints.files import save_network
from stages.unet.config import UNetConfig
from stages.unet.unet import UNet
from tests.reference.unet_toys import spread
from train.distill.calibration import calibrate

CONFIG = UNetConfig(
    channels=(8, 16),
    num_heads=(1, 2),
    down_depths=((0, 0), (1, 1)),
    mid_depth=1,
    up_depths=((1, 1, 1), (0, 0, 0)),
    text_channels=6,
    text_pooled_channels=5,
    size_channels=4,
    norm_groups=4,
)


@pytest.fixture
def network() -> UNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return spread(UNet(CONFIG)).eval()


def test_a_level_that_nobody_reads_changes_nothing_and_one_that_is_read_does(network: UNet) -> None:
    calibration = calibrate("random", CONFIG, count=4, latent_size=8)
    assert list(inner_blocks(network)) == ["mid_block", "up_blocks.0"]
    found = measure(network, calibration)
    assert all(change > 1e-6 and deviation > 0 for change, deviation in found.values())
    # Of the stream from below, the last block's first layers read nothing any more.
    resnet = network.get_submodule("up_blocks.1.resnets.0")
    with torch.no_grad():
        for name in ("conv1", "conv_shortcut"):
            resnet.get_submodule(name).weight[:, :16] = 0
        # Groups of the norm would mix the stream with the skip.
        resnet.get_submodule("norm1").num_groups = 3
    found = measure(network, calibration)
    assert all(change == 0 for change, _ in found.values())


def test_a_table_names_blocks_data_and_machine(network: UNet, tmp_path: Path, capsys) -> None:
    path = tmp_path / "unet.safetensors"
    save_network(path, network, dtype=torch.bfloat16)
    assert main([str(path), "--calibration", "random", "--count", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines[2:4]] == ["mid_block", "up_blocks.0"]
    assert "2 random latents" in lines[-1] and "commit" in lines[-1]
