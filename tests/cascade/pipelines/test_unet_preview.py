"""Previews of U-Nets: colours of latents, and when they come."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cascade.errors import UserError
from cascade.images import pixels_to_images
from cascade.pipelines.results import Interrupted, Preview
from cascade.pipelines.unet import UNetPipeline
from cascade.pipelines.unet_plan import UNetSettings
from cascade.pipelines.unet_preview import SD, SDXL, colours_of
from stages.autoencoder_kl import AutoencoderKLConfig
from tests.unet_models import save_tiny


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> UNetPipeline:
    return UNetPipeline(save_tiny(tmp_path_factory.mktemp("unets") / "x", "sdxl"), device="cpu")


def test_colours_are_those_of_the_sources() -> None:
    # As diffusers' documentation has them: a row a colour, levels of 255.
    weights = torch.tensor([[60.0, -60, 25, -70], [60, -5, 15, -50], [60, 10, -5, -35]])
    biases = torch.tensor([150.0, 140, 130])
    latents = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    levels = torch.einsum("...lxy,rl->...rxy", latents, weights) + biases[:, None, None]
    torch.testing.assert_close(SDXL.pixels(latents), levels / 255)
    one = torch.zeros(1, 4, 1, 1)
    one[0, 2] = 2.0  # of levels from -1 to 1
    wanted = (torch.tensor([-0.158, 0.189, 0.264]) * 2 + 1) / 2
    torch.testing.assert_close(SD.pixels(one).flatten(), wanted)


def test_an_autoencoder_trained_anew_has_no_previews(sdxl: UNetPipeline) -> None:
    assert colours_of(AutoencoderKLConfig.sd(), "x") is SD
    assert colours_of(AutoencoderKLConfig.sdxl(), "x") is SDXL
    own = replace(AutoencoderKLConfig.sd(), scale=0.9)
    with pytest.raises(UserError, match=r"x: no previews: its latents, scaled by 0\.9, are"):
        colours_of(own, "x")
    kept = sdxl.autoencoder.config
    sdxl.autoencoder.config = own
    try:
        with pytest.raises(UserError, match="no previews"):
            sdxl("a hat", on_preview=lambda preview: None)
    finally:
        sdxl.autoencoder.config = kept


def test_previews_come_while_the_unet_runs_at_its_end_and_change_nothing(
    sdxl: UNetPipeline,
) -> None:
    seen: list[Preview] = []
    settings = UNetSettings(seed=7, steps=5)
    output = sdxl("a hat", settings, on_preview=seen.append, preview_every=2)
    assert [preview.step for preview in seen] == [2, 4, 5]
    assert all(preview.num_steps == 5 and preview.indices == (0,) for preview in seen)
    # The last step's estimate is what Euler returns, and the autoencoder decodes.
    [last] = pixels_to_images(SDXL.pixels(output.latents))
    assert seen[-1].images[0].tobytes() == last.tobytes()
    assert torch.equal(sdxl("a hat", settings).pixels, output.pixels)
    with pytest.raises(UserError, match="preview_every 0 must be at least 1"):
        sdxl("a hat", settings, preview_every=0)


def test_ctrl_c_in_a_preview_keeps_what_is_finished(sdxl: UNetPipeline) -> None:
    def stop_in_the_second(preview: Preview) -> None:
        if preview.indices == (1,):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        sdxl("a hat", UNetSettings(seed=7, num_images=3), on_preview=stop_in_the_second)
    assert [picture.seed for picture in caught.value.finished] == [7]
