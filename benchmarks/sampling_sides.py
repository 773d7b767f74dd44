"""What runs on each side in ``benchmarks/sampling.py``: our loops, and diffusers' pipelines' loops.

Ours are the functions that the pipelines call: ``sample_stage_c``, ``sample_stage_b``,
``sample_unet``, ``decode_pixels``. diffusers' do what its pipelines do after the text is encoded:
the same steps, guidance as one batch of two, latents in the network's number format, its own
scheduler. Cascades are sampled by DDPM on the cosine path and told the time itself, U-Nets by
Euler's method, on both sides: diffusers' cascades have no other way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.sampling_models import CascadeModel, UNetModel
from cascade.cuda_graphs import CudaGraphs
from cascade.diffusion.samplers import OnStep
from cascade.evaluate.flops import FlopCounter
from cascade.pipelines.finite import check_finite
from cascade.pipelines.sampling import Prompted, sample_stage_b, sample_stage_c
from cascade.pipelines.spec import StageSampling
from cascade.pipelines.tiles import decode_pixels
from cascade.pipelines.unet_sampling import UNetPrompted, sample_unet
from cascade.rng import PictureNoise
from cascade.text.encoder import TextFeatures
from stages.autoencoder_kl import AutoencoderKL
from stages.conditions import concat
from stages.stage_a import StageA
from stages.stage_b import StageBCondition
from stages.stage_b_v2 import StageBV2, StageBV2Condition
from stages.stage_c import StageCCondition
from stages.stage_c_v2 import StageCV2, StageCV2Condition
from stages.unet.config import NUM_SIZES
from stages.unet.unet import UNet, UNetCondition

HERE, THEIRS = "here", "diffusers"
HERE_COMPILED, THEIRS_COMPILED = "here, compiled", "diffusers, compiled"
HERE_GRAPHS = "here, graphs"
_TIME, _TIMESTEP = 0.6, 601.0

Shape = tuple[int, int, int]
"""Channels, height and width."""
Mark = Callable[[], None]
"""Called after each step of a loop."""
Wrap = Callable[[Any], Any]
"""Compiles a callable, or leaves it as it is."""


@dataclass(frozen=True)
class Side:
    """What a side does."""

    predict: Callable[[], Tensor]
    """One prediction, or one decoding, of what all sides are given."""
    loop: Callable[[int, Mark | None], Tensor]
    """All steps: their number, and what is called after each."""


@dataclass(frozen=True)
class Drawn:
    """What the networks of a part are given."""

    seed: int
    batch_size: int
    shape: Shape
    """Of a picture's latents."""
    x: Tensor
    text: Prompted
    stage_c_latents: Tensor | None = None


def draw(
    network: Any,
    shape: Shape,
    tokens: int,
    seed: int,
    batch_size: int,
    like: Tensor,
    stage_c_shape: Shape | None = None,
) -> Drawn:
    """Draw latents and text states, on the device and in the number format of ``like``."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        if like.is_meta:
            return torch.empty(size, device="meta")
        return torch.randn(size, generator=generator).to(like)

    config = network.config
    hidden = getattr(config, "text_channels", None) or 1
    pooled = getattr(config, "text_pooled_channels", None) or 1
    sides = [
        TextFeatures(randn(batch_size, tokens, hidden), randn(batch_size, pooled)) for _ in range(2)
    ]
    latents = None if stage_c_shape is None else randn(batch_size, *stage_c_shape)
    x = randn(batch_size, *shape)
    return Drawn(seed, batch_size, shape, x, Prompted(*sides), latents)


# Stage C and Stage B


def cascade_shapes(model: CascadeModel, px: int) -> tuple[Shape, Shape]:
    """Return the shapes of a square picture's latents of Stage C and Stage B."""
    cells = max(1, math.ceil(px / model.pixels_per_cell - 1e-3))
    stage_a = model.stage_a
    side = px // stage_a.downscale
    return (model.stage_c.latent_channels, cells, cells), (stage_a.latent_channels, side, side)


def cascade_condition(network: Any, given: Drawn, guided: bool) -> Any:
    """Return what a network of a cascade is told, with the unconditional half if guided."""
    latents = given.stage_c_latents
    conds: list[Any] = []
    for text, told in ((given.text.text, latents), (given.text.negative, None)):
        if latents is not None:
            told = torch.zeros_like(latents) if told is None else told
            if isinstance(network, StageBV2):
                conds.append(StageBV2Condition(told, text.hidden))
            else:
                conds.append(StageBCondition(told, text.pooled))
        elif isinstance(network, StageCV2):
            conds.append(StageCV2Condition(text.hidden))
        else:
            conds.append(StageCCondition(text.hidden, text.pooled))
    return concat(conds) if guided else conds[0]


def cascade_prepare(network: Any, given: Drawn, guided: bool) -> Any:
    """Let a network of a cascade compute what does not change from step to step."""
    cond = cascade_condition(network, given, guided)
    return network.prepare(cond, *(() if given.stage_c_latents is None else (given.shape[1:],)))


def cascade_here(
    network: Any, given: Drawn, guidance: float, graphs: CudaGraphs | None = None
) -> Side:
    """Return our side of Stage C or Stage B."""
    guided = guidance != 1
    prepared = cascade_prepare(network, given, guided)

    def loop(steps: int, mark: Mark | None) -> Tensor:
        sampling = StageSampling(
            "ddpm", steps, guidance, time_input="raw", last_step="mean", prediction="epsilon"
        )
        seeds = _seeds(given)
        if given.stage_c_latents is None:
            noise = PictureNoise(seeds, "stage_c")
            size = given.shape[1:]
            return sample_stage_c(
                network,
                sampling,
                given.text,
                noise,
                size,
                graphs=graphs,
                on_step=_on_step(mark),
            )
        return sample_stage_b(
            network,
            sampling,
            given.stage_c_latents,
            given.text,
            PictureNoise(seeds, "stage_b"),
            given.shape,
            graphs=graphs,
            on_step=_on_step(mark),
        )

    run = network if graphs is None else graphs.of(network)
    return Side(lambda: run(_doubled(given.x, guided), _times(given, guided), prepared), loop)


def cascade_there(ours: Any, network: nn.Module, given: Drawn, guidance: float, wrap: Wrap) -> Side:
    """Return diffusers' side of Stage C or Stage B; ``ours`` tells which network it is."""
    from diffusers import DDPMWuerstchenScheduler

    call = wrap(network)
    guided = guidance != 1
    device, dtype = given.x.device, given.x.dtype

    def told() -> dict[str, Any]:
        """Join what the network is told, once a loop, as the pipelines do."""
        sides = [given.text.text, given.text.negative][: 2 if guided else 1]
        hidden = torch.cat([one.hidden for one in sides])
        pooled = torch.cat([one.pooled[:, None] for one in sides])  # (B, 1, P)
        latents = given.stage_c_latents
        if latents is not None:
            both = [latents, torch.zeros_like(latents)][: 2 if guided else 1]
            if isinstance(ours, StageBV2):
                return {"effnet": torch.cat(both), "clip": hidden}
            return {"effnet": torch.cat(both), "clip_text_pooled": pooled, "return_dict": False}
        if isinstance(ours, StageCV2):
            return {"c": hidden}
        image = None
        if ours.config.image_channels is not None:
            image = pooled.new_zeros(len(pooled), 1, ours.config.image_channels)
        return {
            "clip_text": hidden,
            "clip_text_pooled": pooled,
            "clip_img": image,
            "return_dict": False,
        }

    def predict(x: Tensor, ratio: Tensor, cond: dict[str, Any]) -> Tensor:
        out = call(x, ratio, **cond)
        predicted: Tensor = out[0] if isinstance(out, tuple) else out
        return predicted

    def loop(steps: int, mark: Mark | None) -> Tensor:
        cond = told()
        scheduler: Any = DDPMWuerstchenScheduler()
        scheduler.set_timesteps(steps, device=device)
        generator = torch.Generator(device).manual_seed(given.seed)
        x = torch.randn(given.x.shape, generator=generator, device=device, dtype=dtype)
        for t in scheduler.timesteps[:-1]:
            _begin_step(device)
            ratio = t.expand(len(x)).to(dtype)
            both = torch.cat([ratio] * 2) if guided else ratio
            predicted = predict(_doubled(x, guided), both, cond)
            if guided:
                text, uncond = predicted.chunk(2)
                predicted = torch.lerp(uncond, text, guidance)
            x = scheduler.step(predicted, ratio, x, generator=generator).prev_sample
            if mark is not None:
                mark()
        return x

    def first() -> Tensor:
        _begin_step(device)
        times = _times(given, guided).to(dtype)
        return predict(_doubled(given.x, guided), times, told()).clone()

    return Side(first, loop)


def _times(given: Drawn, guided: bool) -> Tensor:
    """Return the time of the compared predictions.

    diffusers tells its networks times in their number format, where 0 is the only one whose waves
    16 bits hold: at others the two would be told different times.
    """
    time = _TIME if given.x.dtype == torch.float32 else 0.0
    return torch.full((len(given.x) * (2 if guided else 1),), time, device=given.x.device)


def _doubled(x: Tensor, guided: bool) -> Tensor:
    return torch.cat([x, x]) if guided else x


def _seeds(given: Drawn) -> list[int]:
    return [given.seed + index for index in range(given.batch_size)]


def _on_step(mark: Mark | None) -> OnStep | None:
    """Watch steps only where that was asked for: nothing is called in a loop on the clock."""
    return None if mark is None else lambda _: mark()


def _begin_step(device: torch.device) -> None:
    """Tell CUDA graphs of a compiled network that its last outputs are used up."""
    if device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()


# U-Nets


def unet_condition(network: Any, given: Drawn, px: int) -> UNetPrompted:
    """Return what a U-Net is told of the prompts and of none."""
    sizes = None
    if network.config.text_pooled_channels is not None:
        told = torch.tensor([px, px, 0.0, 0.0, px, px], device=given.x.device)
        sizes = told.expand(given.batch_size, NUM_SIZES)
    conds = [
        UNetCondition(one.hidden, None if sizes is None else one.pooled, sizes)
        for one in (given.text.text, given.text.negative)
    ]
    return UNetPrompted(*conds)


def unet_here(
    network: Any, model: UNetModel, given: Drawn, px: int, graphs: CudaGraphs | None = None
) -> Side:
    """Return our side of a U-Net."""
    prompted = unet_condition(network, given, px)
    prepared = network.prepare(concat([prompted.cond, prompted.uncond]))
    times = torch.full((2 * given.batch_size,), _TIMESTEP, device=given.x.device)

    def loop(steps: int, mark: Mark | None) -> Tensor:
        sampling = replace(model.sampling, steps=steps)
        noise = PictureNoise(_seeds(given), "unet")
        return sample_unet(
            network,
            sampling,
            prompted,
            noise,
            given.shape,
            graphs=graphs,
            on_step=_on_step(mark),
        )

    run = network if graphs is None else graphs.of(network)
    return Side(lambda: run(_doubled(given.x, True), times, prepared), loop)


def unet_there(
    ours: Any, network: nn.Module, model: UNetModel, given: Drawn, px: int, wrap: Wrap
) -> Side:
    """Return diffusers' side of a U-Net."""
    from diffusers import EulerDiscreteScheduler

    call = wrap(network)
    prompted = unet_condition(ours, given, px)
    device, dtype = given.x.device, given.x.dtype
    sampling = model.sampling

    def told(conds: tuple[UNetCondition, UNetCondition]) -> dict[str, Any]:
        cond = concat(conds)
        out: dict[str, Any] = {"encoder_hidden_states": cond.text_hidden, "return_dict": False}
        if cond.text_pooled is not None:
            out["added_cond_kwargs"] = {"text_embeds": cond.text_pooled, "time_ids": cond.sizes}
        return out

    def loop(steps: int, mark: Mark | None) -> Tensor:
        scheduler: Any = EulerDiscreteScheduler(
            beta_start=sampling.beta_start,
            beta_end=sampling.beta_end,
            beta_schedule="scaled_linear",
            timestep_spacing=sampling.spacing,
            steps_offset=sampling.steps_offset,
        )
        cond = told((prompted.uncond, prompted.cond))
        scheduler.set_timesteps(steps, device=device)
        generator = torch.Generator(device).manual_seed(given.seed)
        x = torch.randn(given.x.shape, generator=generator, device=device, dtype=dtype)
        x = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            _begin_step(device)
            both = scheduler.scale_model_input(torch.cat([x] * 2), t)
            uncond, text = call(both, t, **cond)[0].chunk(2)
            predicted = uncond + sampling.guidance * (text - uncond)
            x = scheduler.step(predicted, t, x, return_dict=False)[0]
            if mark is not None:
                mark()
        return x

    def first() -> Tensor:
        _begin_step(device)
        times = torch.full((2 * given.batch_size,), _TIMESTEP, device=device)
        cond = told((prompted.cond, prompted.uncond))
        predicted: Tensor = call(_doubled(given.x, True), times, **cond)[0]
        return predicted.clone()

    return Side(first, loop)


# Decoders


def decoder_here(network: StageA | AutoencoderKL, given: Drawn) -> Side:
    """Return our side of a decoder, as the pipelines decode."""
    dtype = given.x.dtype

    def decode(_steps: int, _mark: Mark | None) -> Tensor:
        if isinstance(network, StageA):
            return decode_pixels(network, given.x, dtype)
        pixels = torch.cat([network.decode(one) for one in given.x.split(1)])
        check_finite(pixels, "the autoencoder", dtype)
        return pixels.clamp(0, 1)

    return Side(lambda: network.decode(given.x), decode)


def decoder_there(ours: StageA | AutoencoderKL, network: Any, given: Drawn, wrap: Wrap) -> Side:
    """Return diffusers' side of a decoder."""
    decode = wrap(network.decode)
    scale = ours.config.scale if isinstance(ours, StageA) else 1 / ours.config.scale

    def first() -> Tensor:
        _begin_step(given.x.device)
        pixels: Tensor = decode(scale * given.x, return_dict=False)[0].clone()
        return pixels if isinstance(ours, StageA) else pixels / 2 + 0.5

    return Side(first, lambda _steps, _mark: first().clamp(0, 1))


# Operations


def loop_flops(network: Any, given: Drawn, guided: bool, steps: int, px: int) -> float:
    """Count what a loop needs at least, on the meta device: what repeats is counted once.

    Args:
        network: Ours, on the meta device.
        given: What it is given, on the meta device.
        guided: Whether each step runs the network twice.
        steps: Steps; of a decoder one.
        px: Side of the picture.
    """
    if isinstance(network, (StageA, AutoencoderKL)):
        with FlopCounter() as counter:
            network.decode(given.x)
        return counter.total
    times = torch.empty(len(given.x) * (2 if guided else 1), device="meta")
    with FlopCounter() as once:
        if isinstance(network, UNet):
            told = unet_condition(network, given, px)
            prepared: Any = network.prepare(concat([told.cond, told.uncond]))
        else:
            prepared = cascade_prepare(network, given, guided)
    with FlopCounter() as each:
        network(_doubled(given.x, guided), times, prepared)
    return once.total + steps * each.total
