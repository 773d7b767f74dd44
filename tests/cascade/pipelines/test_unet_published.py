"""What published U-Nets are sampled with, told by their shapes, names and schedulers."""

from __future__ import annotations

from typing import Any

import pytest

from cascade.errors import UserError
from cascade.pipelines.unet_published import advice_for, lora_advice, sampling_of
from cascade.pipelines.unet_spec import UNetSampling
from stages.unet.config import UNetConfig

SDXL = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
"""As SDXL's folder has it."""
TURBO = {**SDXL, "_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}


def found(
    config: UNetConfig, name: str = "x", scheduler: dict[str, Any] | None = None
) -> tuple[UNetSampling, list[str]]:
    advice = advice_for(config, name, scheduler)
    is_sdxl = config.text_pooled_channels is not None
    return sampling_of(advice, is_sdxl, scheduler, "scheduler_config.json")


@pytest.mark.parametrize(
    ("config", "name", "scheduler", "expected"),
    [
        (UNetConfig.sdxl(), "x", SDXL, ("euler", 50, 5.0, "leading", "epsilon")),
        (UNetConfig.koala_700m(), "x", SDXL, ("euler", 10, 3.5, "trailing", "epsilon")),
        (UNetConfig.koala_1b(), "x", None, ("euler", 10, 3.5, "trailing", "epsilon")),
        (UNetConfig.ssd_1b(), "x", SDXL, ("euler", 25, 9.0, "leading", "epsilon")),
        (UNetConfig.sdxl(), "x", TURBO, ("euler_ancestral", 1, 1.0, "trailing", "epsilon")),
        (
            UNetConfig.sdxl(),
            "models--stabilityai--sdxl-turbo",
            None,
            ("euler_ancestral", 1, 1.0, "trailing", "epsilon"),
        ),
        (
            UNetConfig.sdxl(),
            "sdxl_lightning_4step_unet.safetensors",
            SDXL,
            ("euler", 4, 1.0, "trailing", "epsilon"),
        ),
        (
            UNetConfig.sdxl(),
            "sdxl_lightning_1step_unet_x0.safetensors",
            SDXL,
            ("euler", 1, 1.0, "trailing", "x0"),
        ),
        (UNetConfig.sd15(), "x", None, ("ddim", 50, 7.5, "leading", "epsilon")),
        (
            UNetConfig.sd21(),
            "x",
            {**SDXL, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
            ("ddim", 50, 7.5, "leading", "v"),
        ),
    ],
)
def test_published_models_bring_their_makers_advice(
    config: UNetConfig, name: str, scheduler: Any, expected: tuple[Any, ...]
) -> None:
    sampling, notices = found(config, name, scheduler)
    own = (sampling.sampler, sampling.steps, sampling.guidance, sampling.spacing)
    assert (*own, sampling.prediction) == expected
    assert notices == [] and not sampling.ends_clean


def test_what_is_not_here_is_said_and_never_silent() -> None:
    pndm = {**SDXL, "_class_name": "PNDMScheduler"}
    assert found(UNetConfig.sd15(), "x", pndm)[1] == [
        "its scheduler, PNDMScheduler, is not here: ddim is"
    ]
    karras = {**SDXL, "use_karras_sigmas": True}
    assert "use_karras_sigmas True" in found(UNetConfig.sdxl(), "x", karras)[1][0]
    for change in ({"beta_schedule": "linear"}, {"rescale_betas_zero_snr": True}):
        with pytest.raises(UserError, match=r"^scheduler_config\.json: .*noise schedule"):
            found(UNetConfig.sdxl(), "x", {**SDXL, **change})
    with pytest.raises(UserError, match="prediction_type 'flow'"):
        found(UNetConfig.sdxl(), "x", {**SDXL, "prediction_type": "flow"})


def test_what_files_leave_out_is_diffusers_default() -> None:
    bare = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}
    sampling, _ = found(UNetConfig.sd15(), "x", bare)
    assert (sampling.beta_start, sampling.beta_end) == (0.0001, 0.02)
    assert sampling.ends_clean and sampling.steps_offset == 0 and sampling.spacing == "leading"


@pytest.mark.parametrize(
    ("config", "name", "sampler", "steps", "spacing"),
    [
        (UNetConfig.sdxl(), "sdxl_lightning_4step_lora.safetensors", "euler", 4, "trailing"),
        (UNetConfig.sdxl(), "sdxl_lightning_8step_lora.safetensors", "euler", 8, "trailing"),
        (UNetConfig.sdxl(), "sdxl_lcm_lora.safetensors", "lcm", 4, "leading"),
        (UNetConfig.sd15(), "lcm-lora-sdv1-5.safetensors", "lcm", 4, "leading"),
    ],
)
def test_distilled_loras_are_sampled_by_their_names(
    config: UNetConfig, name: str, sampler: str, steps: int, spacing: str
) -> None:
    advice = lora_advice(config, name)
    assert advice is not None
    sampling = advice.sampling
    assert (sampling.sampler, sampling.steps, sampling.guidance) == (sampler, steps, 1.0)
    assert (sampling.spacing, sampling.prediction) == (spacing, "epsilon")


def test_other_loras_leave_the_sampling_as_it_is() -> None:
    assert lora_advice(UNetConfig.sdxl(), "pixel-art-xl.safetensors") is None
    assert lora_advice(UNetConfig.sd15(), "sdxl_lightning_4step_lora.safetensors") is None
