from __future__ import annotations

import pytest
import torch

from cascade.pipelines.finite import (
    BlankPictureError,
    FiniteSteps,
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


@pytest.mark.parametrize("count", [1, 49, 103, 4 * 28 * 28])
def test_steps_elsewhere_are_checked_when_all_are_done_and_finite_ones_pass(count: int) -> None:
    steps = FiniteSteps("Stage B", torch.float16, torch.device("cuda"))
    for step in range(3):
        steps.see(torch.ones(count), step, 3)
    steps.check()
    damaged = torch.ones(2, count)
    damaged[0, 0] = float("inf")
    steps.see(damaged, 3, 5)
    steps.see(torch.full((2, count), float("nan")), 4, 5)
    with pytest.raises(NonFiniteError, match=r"Stage B, step 4 of 5 \(float16\): .* not finite"):
        steps.check()


def test_steps_on_a_cpu_are_checked_at_once() -> None:
    steps = FiniteSteps("Stage B", torch.float32, torch.device("cpu"))
    with pytest.raises(NonFiniteError, match="step 1 of 2"):
        steps.see(torch.tensor([float("nan")]), 0, 2)
