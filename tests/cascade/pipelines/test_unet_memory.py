"""What the parts of a U-Net's pipeline take, and the plans that follow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cascade.checkpoints.files import on_meta
from cascade.errors import UserError
from cascade.pipelines.memory_plan import GIB, pick_plan
from cascade.pipelines.placement import UNetDtypes
from cascade.pipelines.unet_memory import UNetWorkload, unet_footprints
from cascade.pipelines.unet_parts import UNetParts
from cascade.pipelines.unet_spec import UNetSampling
from cascade.text.towers import TextTowerConfig, build_text_tower
from stages.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from stages.unet.config import UNetConfig
from stages.unet.unet import UNet

HALF = UNetDtypes(torch.float16, torch.float32, torch.float16)
SECOND = TextTowerConfig(1280, 32, 20, 5120, projection_channels=1280, activation="gelu")


@pytest.fixture(scope="module")
def koala() -> UNetParts:
    def encoder(config: TextTowerConfig) -> Any:
        model = build_text_tower(config).half()
        return SimpleNamespace(model=model, hidden_channels=config.channels, window=77)

    with on_meta():
        unet = UNet(UNetConfig.koala_700m()).half()
        autoencoder = AutoencoderKL(AutoencoderKLConfig.sdxl())
    return UNetParts(unet, autoencoder, encoder(TextTowerConfig()), encoder(SECOND))


@pytest.mark.slow
def test_guidance_and_size_are_counted_and_small_cards_get_stages(koala: UNetParts) -> None:
    def sizes(side: int, guidance: float) -> Any:
        work = UNetWorkload(UNetSampling(guidance=guidance), (4, side, side), 77)
        return unet_footprints(koala, HALF, work)

    full, unguided, small = sizes(128, 3.5), sizes(128, 1.0), sizes(64, 3.5)
    assert full["unet"].weights == 2 * 782_822_724
    assert full["autoencoder"].weights == 4 * 83_653_863
    assert 1.6 < full["unet"].working / unguided["unet"].working < 2.2
    assert 3.0 < full["unet"].working / small["unet"].working < 5.0
    assert 3.5 < full["autoencoder"].working / small["autoencoder"].working < 4.5

    assert pick_plan(full, 8 * GIB, [1]).offload == "none"
    tight = pick_plan(full, 6 * GIB, [1])
    assert tight.way("text_2") == "stage" and tight.way("unet") == "stay"
    assert "the stages stay" in tight.describe() and "the second text" in tight.describe()
    tiles = full["autoencoder"].tiled
    # 640 px a side, of 1024: the margin is computed too.
    assert set(tiles) == {96, 64} and small["autoencoder"].tiled == {}
    assert 0.36 < tiles[64] / full["autoencoder"].working < 0.45
    assert tight.tile is None
    with pytest.raises(UserError, match="needs at least"):
        pick_plan(full, 1 * GIB, [1])
    lower = pick_plan(full, int(3.5 * GIB), [1])
    assert lower.tile in (96, 64) and "the autoencoder in tiles of" in lower.describe()
