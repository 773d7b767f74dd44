"""A small batch on which teacher and student are compared: noised latents, with their text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cascade.checkpoints.files import read_tensors
from cascade.config import did_you_mean, load_yaml
from cascade.diffusion.discrete import NUM_TIMESTEPS, DiscreteSchedule, time_of
from cascade.errors import UserError
from stages.unet.config import NUM_SIZES, UNetConfig
from stages.unet.unet import UNet, UNetCondition

RANDOM = "random"
_NAMES = ("latents", "text_hidden", "text_pooled", "sizes")
_RANDOM_TOKENS = 77
_PIXELS_PER_CELL = 8


@dataclass(frozen=True)
class Calibration:
    """The batch."""

    x_t: Tensor
    """Noised latents, (B, 4, h, w), float32."""
    timesteps: Tensor
    """(B,), float32, spread evenly over the schedule."""
    cond: UNetCondition
    """What the network is told of each."""
    described: str
    """In words, for reports."""

    def predictor(
        self, device: torch.device, dtype: torch.dtype, batch_size: int
    ) -> Callable[[UNet], Tensor]:
        """Return a function that returns a network's output for the batch, in float32 on the CPU.

        Args:
            device: Where the network is.
            dtype: Its number format.
            batch_size: How many latents it is given at once.
        """

        @torch.inference_mode()
        def predict(network: UNet) -> Tensor:
            found = [
                network(
                    self.x_t[start : start + batch_size].to(device, dtype),
                    self.timesteps[start : start + batch_size].to(device),
                    _slice(self.cond, start, start + batch_size, device),
                )
                for start in range(0, len(self.x_t), batch_size)
            ]
            return torch.cat([one.float().cpu() for one in found])

        return predict


def _slice(cond: UNetCondition, start: int, stop: int, device: torch.device) -> UNetCondition:
    def part(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[start:stop].to(device)

    return UNetCondition(
        cond.text_hidden[start:stop].to(device), part(cond.text_pooled), part(cond.sizes)
    )


def calibrate(
    name: str, config: UNetConfig, *, count: int, latent_size: int, seed: int = 0
) -> Calibration:
    """Make a batch.

    Args:
        name: The YAML file of a training of U-Nets, whose cached data is taken; a safetensors file
            with ``latents`` (N, 4, h, w), as diffusion has them,
            ``text_hidden`` (N, L, D) and, for networks as SDXL, ``text_pooled`` (N, P) and
            ``sizes`` (N, 6); or "random".
        config: Sizes of the teacher.
        count: Noised latents in the batch. Those of a file are taken in turn, each at a timestep
            of its own, and the first ones again if there are fewer.
        latent_size: Height and width of random latents.
        seed: Of the noise, and of what is random.

    Raises:
        UserError: There is no such file, or its tensors are not what this teacher is told.
    """
    generator = torch.Generator().manual_seed(seed)
    if name == RANDOM:
        side = latent_size
        given = _random(config, count, side, generator)
        described = (
            f"{count} random latents of {side}x{side} with random text states: less faithful than "
            "latents of pictures with their captions (--calibration FILE)"
        )
    else:
        is_run = Path(name).suffix in (".yaml", ".yml")
        given = _of_run(name, config, count, seed) if is_run else _read(name, config)
        height, width = given["latents"].shape[-2:]
        described = (
            f"{count} noisings of {len(given['latents'])} latents of {height}x{width} of {name}"
        )
    picked = torch.arange(count) % len(given["latents"])
    latents = given["latents"][picked].float()
    timesteps = ((torch.arange(count) + 0.5) * NUM_TIMESTEPS / count).floor()
    alpha, sigma = DiscreteSchedule()(time_of(timesteps))
    noise = torch.randn(latents.shape, generator=generator)
    x_t = alpha[:, None, None, None] * latents + sigma[:, None, None, None] * noise
    pooled, sizes = given.get("text_pooled"), given.get("sizes")
    cond = UNetCondition(
        given["text_hidden"][picked].float(),
        None if pooled is None else pooled[picked].float(),
        None if sizes is None else sizes[picked].float(),
    )
    return Calibration(x_t, timesteps.float(), cond, described)


def _random(
    config: UNetConfig, count: int, side: int, generator: torch.Generator
) -> dict[str, Tensor]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    given = {
        "latents": draw(count, config.in_channels, side, side),
        "text_hidden": draw(count, _RANDOM_TOKENS, config.text_channels),
    }
    if config.text_pooled_channels is not None:
        pixels = float(side * _PIXELS_PER_CELL)
        given["text_pooled"] = draw(count, config.text_pooled_channels)
        given["sizes"] = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]]).repeat(count, 1)
    return given


def _of_run(name: str, config: UNetConfig, count: int, seed: int) -> dict[str, Tensor]:
    """Return the first latents that a training of U-Nets would see, with what it tells of them."""
    # Lightning takes seconds to import.
    from train.draws import StepDraws
    from train.systems.unet import UNetRun
    from train.unet_runs import open_unet_data

    opened = open_unet_data(replace(load_yaml(UNetRun, name), model=config, distill=None))
    if opened.data.encode is not None:
        raise UserError(
            f"{name}: its data is pictures; precompute its latents (data.folder), and calibrate on "
            "those"
        )
    batches = iter(opened.data.loader_from(0, 0, 1))
    parts: dict[str, list[Tensor]] = {}
    taken = 0
    while taken < count:
        batch = next(batches)
        told = opened.system.told(batch)
        values = {
            "latents": opened.system.clean_latents(batch, StepDraws(seed, taken)),
            "text_hidden": told.text_hidden,
            "text_pooled": told.text_pooled,
            "sizes": told.sizes,
        }
        for key, value in values.items():
            if value is not None:
                parts.setdefault(key, []).append(value.float())
        taken += len(batch)
    return {key: torch.cat(values)[:count] for key, values in parts.items()}


def _read(name: str, config: UNetConfig) -> dict[str, Tensor]:
    path = Path(name)
    if not path.is_file():
        hint = did_you_mean(name, [RANDOM])
        raise UserError(f"--calibration {name}: no such file; name one, or {RANDOM}{hint}")
    tensors = read_tensors(path)
    needed: dict[str, tuple[int | None, ...]] = {
        "latents": (config.in_channels, None, None),
        "text_hidden": (None, config.text_channels),
    }
    if config.text_pooled_channels is not None:
        needed |= {"text_pooled": (config.text_pooled_channels,), "sizes": (NUM_SIZES,)}
    unknown = sorted(set(tensors) - set(_NAMES))
    if unknown:
        raise UserError(f"{path}: {unknown[0]}: unknown tensor; valid: {', '.join(_NAMES)}")
    surplus = sorted(set(tensors) - set(needed))
    if surplus:
        raise UserError(f"{path}: {surplus[0]}: this teacher is told the text_hidden alone")
    given = {key: tensors[key] for key in needed if key in tensors}
    return _checked(given, needed, str(path))


def _checked(
    given: Mapping[str, Tensor], needed: Mapping[str, tuple[int | None, ...]], where: str
) -> dict[str, Tensor]:
    count = None
    for key, sides in needed.items():
        wanted = "x".join(["N", *("any" if side is None else str(side) for side in sides)])
        if key not in given:
            raise UserError(f"{where}: no {key} ({wanted}) in it, which this teacher needs")
        shape = given[key].shape
        fits = len(shape) == len(sides) + 1 and all(
            side in (None, found) for side, found in zip(sides, shape[1:], strict=True)
        )
        if not fits or 0 in shape:
            raise UserError(f"{where}: {key} is {'x'.join(map(str, shape))}; needed: {wanted}")
        if not bool(given[key].isfinite().all()):
            raise UserError(f"{where}: {key} holds numbers that are not finite")
        count = len(given[key]) if count is None else count
        if len(given[key]) != count:
            raise UserError(f"{where}: {key} is of {len(given[key])} samples, latents of {count}")
    return dict(given)
