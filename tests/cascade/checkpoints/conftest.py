"""What the tests of rename tables share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

Shapes = dict[str, tuple[int, ...]]


def _randomise(network: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim in (2, 4) else 16
            if parameter.shape[:3] == (1, 1, 1):  # a response norm's scale or shift
                fan_in = 16
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / max(fan_in, 1) ** 0.5)


@pytest.fixture
def randomise() -> Callable[..., None]:
    """Give every parameter a value of its own, the zero-initialised ones too."""
    return _randomise


@pytest.fixture
def shapes() -> Callable[[dict[str, Tensor]], Shapes]:
    """Names and shapes of a state."""
    return lambda state: {key: tuple(tensor.shape) for key, tensor in state.items()}


@pytest.fixture
def as_original() -> Callable[[Shapes], Shapes]:
    """Turn the names and shapes of a diffusers network into those of the authors' own files."""

    def convert(theirs: Shapes) -> Shapes:
        found: Shapes = {}
        for key, shape in theirs.items():
            if ".to_q." in key:
                fused = key.replace("to_q.", "attn.in_proj_")
                found[fused] = (3 * shape[0], *shape[1:])
            elif ".to_k." not in key and ".to_v." not in key:
                found[key.replace("to_out.0.", "attn.out_proj.")] = shape
        return found

    return convert


@pytest.fixture
def assert_same_tensors() -> Callable[[dict[str, Tensor], dict[str, Tensor]], None]:
    """Two states hold the same names and the same numbers, bit by bit."""

    def check(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
        assert first.keys() == second.keys()
        for key in first:
            assert first[key].dtype == second[key].dtype, key
            assert torch.equal(first[key], second[key]), key

    return check
