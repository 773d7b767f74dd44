"""From text states to a U-Net's latents."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cascade.cuda_graphs import CudaGraphs
from cascade.diffusion.samplers import OnStep
from cascade.pipelines.prompts import PromptStates
from cascade.pipelines.sampling import Start, sample_latents
from cascade.pipelines.unet_plan import SizeCondition
from cascade.pipelines.unet_spec import UNetSampling
from cascade.placed import example_of
from cascade.rng import PictureNoise
from stages.unet.unet import UNet, UNetCondition


@dataclass(frozen=True)
class UNetPrompted:
    """What a U-Net is told of B pictures, and of what guidance leads each of them away from."""

    cond: UNetCondition
    uncond: UNetCondition


def told_of(
    states: PromptStates,
    states_2: PromptStates | None,
    prompts: list[str],
    negative_prompt: str,
    sizes: SizeCondition | None,
    *,
    empty_is_zeros: bool,
) -> UNetPrompted:
    """Return what a U-Net is told of prompts.

    Args:
        states: Of the text encoder, or of SDXL's first.
        states_2: Of SDXL's second, whose pooled states the U-Net reads as well; None: it reads
            the first one's, if it reads any.
        prompts: One for each picture.
        negative_prompt: Of all of them.
        sizes: What SDXL is told of sizes.
        empty_is_zeros: Whether an empty negative prompt is zeros in place of text states.
    """
    first = states.pair(prompts, negative_prompt)
    sides = [first.text, first.negative]
    zeros = empty_is_zeros and not negative_prompt.strip()
    if sizes is None:
        hidden = [side.hidden for side in sides]
        uncond = torch.zeros_like(hidden[1]) if zeros else hidden[1]
        return UNetPrompted(UNetCondition(hidden[0]), UNetCondition(uncond))
    told = torch.tensor(sizes.values(), device=first.text.hidden.device).expand(len(prompts), -1)
    if states_2 is None:
        conds = [UNetCondition(one.hidden, one.pooled, told) for one in sides]
    else:
        second = states_2.pair(prompts, negative_prompt)
        conds = []
        for one, two in zip(sides, (second.text, second.negative), strict=True):
            hidden_both = torch.cat([one.hidden, two.hidden], dim=-1)  # (B, L, D_1 + D_2)
            conds.append(UNetCondition(hidden_both, two.pooled, told))
    cond, other = conds
    if zeros:
        assert other.text_pooled is not None
        no_text = torch.zeros_like(other.text_hidden), torch.zeros_like(other.text_pooled)
        other = UNetCondition(*no_text, told)
    return UNetPrompted(cond, other)


def sample_unet(
    network: UNet,
    sampling: UNetSampling,
    prompted: UNetPrompted,
    noise: PictureNoise,
    latent_shape: tuple[int, int, int],
    *,
    start: Start | None = None,
    graphs: CudaGraphs | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw a U-Net's latents of B prompts.

    Args:
        network: The U-Net; device and number format are those of its weights.
        sampling: Sampler, steps, guidance.
        prompted: What it is told.
        noise: One seed for each picture.
        latent_shape: Channels, height and width of the latents.
        start: A picture to start from: its strength is the share of the steps that are walked, the
            last ones, and it is noised to where the first of them lies.
        graphs: Records and replays the network's passes.
        on_step: Called after each step.

    Returns:
        ``(B, 4, H/8, W/8)`` float32.

    Raises:
        NonFiniteError: Naming the step.
    """
    weight = example_of(network)
    cond, uncond = (_moved(one, weight) for one in (prompted.cond, prompted.uncond))
    conds = (cond, uncond)
    x = noise.randn(latent_shape)
    if start is None:
        walk, x = sampling.walk(), sampling.first_noise(x)
    else:
        walk = sampling.walk(start.strength)
        start = replace(start, strength=1.0)  # of these times, whose first is where it starts
    return sample_latents(
        "the U-Net",
        network,
        walk,
        network.prepare,
        conds,
        noise,
        x,
        start=start,
        graphs=graphs,
        on_step=on_step,
    )


def _moved(cond: UNetCondition, weight: Tensor) -> UNetCondition:
    sizes, pooled = cond.sizes, cond.text_pooled
    return UNetCondition(
        cond.text_hidden.to(weight),
        None if pooled is None else pooled.to(weight),
        None if sizes is None else sizes.to(weight.device),
    )
