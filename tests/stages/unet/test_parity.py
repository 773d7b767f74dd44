"""Our U-Net is diffusers' on the same weights: numbers, features, keys and shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stages.unet.config import UNetConfig
from stages.unet.unet import UNet, UNetCondition

pytestmark = pytest.mark.reference

TOLERANCE = 1e-5
"""Largest difference allowed, as a share of the standard deviation of what is compared."""


def off_by(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return float((ours - theirs).abs().max() / theirs.std())


def call(theirs: nn.Module, x: Tensor, timesteps: Tensor, cond: UNetCondition) -> Tensor:
    added = None
    if cond.text_pooled is not None:
        added = {"text_embeds": cond.text_pooled, "time_ids": cond.sizes}
    sample: Tensor = theirs(x, timesteps, cond.text_hidden, added_cond_kwargs=added).sample
    return sample


@pytest.fixture
def pair(
    toy: UNetConfig, diffusers_unet: Callable[..., nn.Module], randomise: Callable[..., None]
) -> tuple[UNet, nn.Module]:
    """A network of ours and of diffusers with the same weights, none of them renamed."""
    ours, theirs = UNet(toy).eval(), diffusers_unet(toy)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (11, 13)], ids=["even", "odd"])
def test_predictions_and_every_site_equal_those_of_diffusers(
    pair: tuple[UNet, nn.Module], condition: Callable[..., Any], size: tuple[int, int]
) -> None:
    """A site is what a forward hook on diffusers' module of the same name sees."""
    ours, theirs = pair
    cond = condition(ours.config)
    x, timesteps = torch.randn(2, 4, *size), torch.tensor([981.0, 0.25])
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return keep

    for name in ours.sites:
        theirs.get_submodule(name).register_forward_hook(hook(name))
    expected = call(theirs, x, timesteps, cond)
    output = ours(x, timesteps, cond, features=ours.sites)

    assert off_by(output.prediction, expected) < TOLERANCE
    assert output.features.keys() == seen.keys()
    for name, feature in output.features.items():
        assert off_by(feature, seen[name]) < TOLERANCE, name


def test_gradients_equal_those_of_diffusers(
    pair: tuple[UNet, nn.Module], condition: Callable[..., Any]
) -> None:
    ours, theirs = pair
    cond = condition(ours.config)
    x, timesteps, target = (
        torch.randn(2, 4, 8, 8),
        torch.tensor([500.0, 7.0]),
        torch.randn(2, 4, 8, 8),
    )
    (ours(x, timesteps, cond) - target).square().mean().backward()
    (call(theirs, x, timesteps, cond) - target).square().mean().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        expected = gradients[name].grad
        assert parameter.grad is not None and expected is not None, name
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm() + 1e-9, name


def test_keys_and_shapes_at_full_size_are_those_of_diffusers(
    published: UNetConfig, diffusers_unet: Callable[..., nn.Module]
) -> None:
    with torch.device("meta"):
        ours, theirs = UNet(published), diffusers_unet(published)
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    # Too small to be seen in random numbers, and not too small for trained ones.
    assert epsilons(ours) == epsilons(theirs)


def epsilons(network: nn.Module) -> dict[str, float]:
    norms = (nn.GroupNorm, nn.LayerNorm)
    return {name: part.eps for name, part in network.named_modules() if isinstance(part, norms)}
