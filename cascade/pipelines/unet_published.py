"""How published U-Nets are sampled: what their folders say, and what their makers advise.

A folder of diffusers names a scheduler, which says how far apart timesteps lie and what the
network predicts; the number of steps and the strength of guidance stand on model cards, and are
told here by the shape of the network, or by the model's name where shapes are the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cascade.errors import UserError
from cascade.pipelines.unet_spec import SPACINGS, UNetSampler, UNetSampling
from stages.unet.config import UNetConfig

_SAMPLERS: Mapping[str, UNetSampler] = {
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "LCMScheduler": "lcm",
}
_PREDICTIONS: Mapping[str, str] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
_LINSPACE_BY_DEFAULT = ("Euler", "DPMSolver")
# What changes pictures and is not here, with the value that switches it off.
_OFF: Mapping[str, Any] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "thresholding": False,
    "clip_sample": False,
    "euler_at_final": False,
    "interpolation_type": "linear",
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "solver_order": 2,
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
}


@dataclass(frozen=True)
class Advice:
    """What the makers of a model advise."""

    title: str
    shape: UNetConfig
    sampling: UNetSampling
    names: str = ""
    """What names of models of this shape look like; empty: any."""
    image_size: int | None = None
    """None: what the folder says."""
    licence: str = ""


_TRAILING = UNetSampling(spacing="trailing", steps=10, guidance=3.5)
_SD = UNetSampling("ddim", steps=50, guidance=7.5)
_SEGMIND = UNetSampling(steps=25, guidance=9.0)
_OPENRAIL, _OPENRAIL_PP = "CreativeML OpenRAIL-M", "CreativeML OpenRAIL++-M"
_KOALA = "OpenRAIL++-M for non-commercial use, else ask its makers"
_TURBO = UNetSampling("euler_ancestral", steps=1, guidance=1.0, spacing="trailing")

ADVICE: tuple[Advice, ...] = (
    Advice("KOALA-1B", UNetConfig.koala_1b(), _TRAILING, licence=_KOALA),
    Advice("KOALA-700M", UNetConfig.koala_700m(), _TRAILING, licence=_KOALA),
    Advice("SSD-1B", UNetConfig.ssd_1b(), _SEGMIND, licence="Apache-2.0"),
    Advice("Segmind-Vega", UNetConfig.vega(), _SEGMIND, licence="Apache-2.0"),
    Advice(
        "SDXL-Turbo",
        UNetConfig.sdxl(),
        _TURBO,
        names="sdxl[-_]turbo|sd_xl_turbo",
        image_size=512,
        licence="Stability AI's non-commercial community licence",
    ),
    *(
        Advice(
            f"SDXL-Lightning of {steps} steps",
            UNetConfig.sdxl(),
            UNetSampling(
                steps=steps,
                guidance=1.0,
                spacing="trailing",
                prediction="x0" if steps == 1 else "epsilon",
            ),
            names=f"lightning_{steps}step",
            licence=_OPENRAIL_PP,
        )
        for steps in (1, 2, 4, 8)
    ),
    Advice("SDXL", UNetConfig.sdxl(), UNetSampling(), licence=_OPENRAIL_PP),
    Advice("SD 1.x", UNetConfig.sd15(), _SD, licence=_OPENRAIL),
    Advice("BK-SDM-Base", UNetConfig.bk_base(), _SD, licence=_OPENRAIL),
    Advice("BK-SDM-Small", UNetConfig.bk_small(), _SD, licence=_OPENRAIL),
    Advice("BK-SDM-Tiny", UNetConfig.bk_tiny(), _SD, licence=_OPENRAIL),
    Advice("SD 2.x", UNetConfig.sd21(), _SD, licence=_OPENRAIL_PP),
    Advice("BK-SDM-v2-Base", UNetConfig.bk_v2_base(), _SD, licence=_OPENRAIL),
    Advice("BK-SDM-v2-Small", UNetConfig.bk_v2_small(), _SD, licence=_OPENRAIL),
    Advice("BK-SDM-v2-Tiny", UNetConfig.bk_v2_tiny(), _SD, licence=_OPENRAIL),
)
"""Of several that fit, the first; the sampler and the spacing of a folder's scheduler go before."""

LORA_ADVICE: tuple[Advice, ...] = (
    *(
        Advice("LCM-LoRA", shape, UNetSampling("lcm", 4, 1.0), names="lcm[-_]?lora|lora[-_]?lcm")
        for shape in (UNetConfig.sdxl(), UNetConfig.ssd_1b(), UNetConfig.sd15())
    ),
    *(advice for advice in ADVICE if advice.names),
)
"""The same for the names of LoRAs: distilled networks are published as LoRAs of their base too."""


def advice_for(
    shape: UNetConfig, name: str, scheduler: Mapping[str, Any] | None = None
) -> Advice | None:
    """Return what is known of a U-Net of this shape and name, or of this shape alone.

    Args:
        shape: Its sizes.
        name: Names of the model and of its files.
        scheduler: Its ``scheduler_config.json``: SDXL-Turbo's is no other's.
    """
    names_turbo = {"EulerAncestralDiscreteScheduler", "trailing"}
    own = scheduler or {}
    if names_turbo == {own.get("_class_name"), own.get("timestep_spacing")}:
        name = f"{name} sdxl-turbo"
    for advice in ADVICE:
        if advice.shape == shape and re.search(advice.names, name, re.IGNORECASE):
            return advice
    return None


def lora_advice(shape: UNetConfig, name: str) -> Advice | None:
    """Return what is advised for a U-Net of this shape with a LoRA of this file name.

    None: nothing is known, as of the many LoRAs that change what is seen, not how it is sampled.
    """
    for advice in LORA_ADVICE:
        if advice.shape == shape and re.search(advice.names, name, re.IGNORECASE):
            return advice
    return None


def with_lora(sampling: UNetSampling, lora: Advice) -> UNetSampling:
    """Return a U-Net's sampling as a LoRA's makers advise it.

    What the network predicts, and on which noise, is the U-Net's own: a LoRA was trained to that.
    Only one that was distilled to predict something else than epsilon says so.
    """
    advised = lora.sampling
    return replace(
        advised,
        prediction=sampling.prediction if advised.prediction == "epsilon" else advised.prediction,
        beta_start=sampling.beta_start,
        beta_end=sampling.beta_end,
    )


def sampling_of(
    advice: Advice | None, is_sdxl: bool, scheduler: Mapping[str, Any] | None, where: str
) -> tuple[UNetSampling, list[str]]:
    """Return how a published U-Net is sampled, and what to tell of it.

    Args:
        advice: What its makers advise, if that is known.
        is_sdxl: Whether it is of SDXL's kind; else of SD's.
        scheduler: The folder's ``scheduler_config.json``; None: there is none.
        where: The scheduler's file, for errors.

    Raises:
        UserError: For a noise schedule that is not known here.
    """
    if advice is not None:
        sampling = advice.sampling
    else:
        sampling = UNetSampling() if is_sdxl else _SD
    if scheduler is None or (advice is not None and advice.names):
        return sampling, []  # a distilled network in its base's folder has its own ways
    return _as_declared(sampling, scheduler, where)


def _as_declared(
    sampling: UNetSampling, scheduler: Mapping[str, Any], where: str
) -> tuple[UNetSampling, list[str]]:
    name = str(scheduler.get("_class_name", ""))
    notices = []
    sampler = _SAMPLERS.get(name)
    if sampler is None or name == "PNDMScheduler":
        sampler = sampler or sampling.sampler
        notices.append(f"its scheduler, {name or 'which has no name'}, is not here: {sampler} is")
    if scheduler.get("rescale_betas_zero_snr") or scheduler.get("trained_betas"):
        raise UserError(f"{where}: a noise schedule of its own betas, which is not known here")
    schedule = scheduler.get("beta_schedule", "linear")
    if schedule != "scaled_linear" or scheduler.get("num_train_timesteps", 1000) != 1000:
        raise UserError(f"{where}: the noise schedule {schedule!r}; only scaled_linear is known")
    odd = [
        f"{key} {scheduler[key]}"
        for key, off in _OFF.items()
        if key in scheduler and scheduler[key] != off and not _does_not_matter(name, key)
    ]
    if odd:
        notices.append(f"its scheduler asks for {', '.join(odd)}, which is not here")
    linspace = name.startswith(_LINSPACE_BY_DEFAULT)
    spacing = scheduler.get("timestep_spacing", "linspace" if linspace else "leading")
    prediction = _PREDICTIONS.get(str(scheduler.get("prediction_type", "epsilon")))
    if spacing not in SPACINGS or prediction is None:
        raise UserError(
            f"{where}: timestep_spacing {spacing!r} and prediction_type "
            f"{scheduler.get('prediction_type')!r}; one of them is not known here"
        )
    if sampling.spacing == "trailing" and sampler.startswith("euler"):
        # Few-step models: their makers' advice outweighs a file that was copied from SDXL's.
        spacing = "trailing"
    try:
        return (
            replace(
                sampling,
                sampler=sampler,
                spacing=spacing,
                steps_offset=int(scheduler.get("steps_offset", 0)),
                prediction=prediction,  # type: ignore[arg-type]
                beta_start=float(scheduler.get("beta_start", 0.0001)),
                beta_end=float(scheduler.get("beta_end", 0.02)),
                ends_clean=bool(scheduler.get("set_alpha_to_one", True)),
            ),
            notices,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from error


def _does_not_matter(scheduler: str, key: str) -> bool:
    """Tell what files carry on from another scheduler, whose class does not look at it."""
    if key == "clip_sample":
        return scheduler not in ("DDIMScheduler", "LCMScheduler")
    if key in ("original_inference_steps", "timestep_scaling"):
        return scheduler != "LCMScheduler"
    solver = ("euler_at_final", "algorithm_type", "solver_type", "solver_order")
    if key in (*solver, "final_sigmas_type", "lower_order_final", "use_lu_lambdas"):
        return scheduler != "DPMSolverMultistepScheduler"
    return False
