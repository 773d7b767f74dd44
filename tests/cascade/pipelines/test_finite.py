from __future__ import annotations

import pytest
import torch

from cascade.pipelines.finite import (
    BlankPictureError,
    NonFiniteError,
    check_finite,
    check_not_black,
)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_stage_step_and_dtype_are_named(bad: float) -> None:
    values = torch.tensor([1.0, bad])
    with pytest.raises(NonFiniteError, match=r"Stage C, step 3 of 20 \(bfloat16\): 50\.0%"):
        check_finite(values, "Stage C", torch.bfloat16, step=2, num_steps=20)


def test_the_cure_for_float16_is_another_dtype() -> None:
    with pytest.raises(NonFiniteError, match=r"Stage A .*--dtype bfloat16 or float32"):
        check_finite(torch.tensor(float("nan")), "Stage A", torch.float16)


def test_finite_values_pass() -> None:
    check_finite(torch.tensor([1e30, -1e30]), "Stage C", torch.float32)


def test_a_black_picture_is_never_a_success() -> None:
    pixels = torch.full((2, 3, 4, 4), 0.5)
    check_not_black(pixels, torch.float32)
    pixels[1] = 0.0
    with pytest.raises(BlankPictureError, match="entirely black"):
        check_not_black(pixels, torch.float32)
    pixels[1, 0, 0, 0] = 1.0
    check_not_black(pixels, torch.float32)
