from __future__ import annotations

import math

import pytest
import torch

from stages.embeddings import time_embedding, timestep_embedding


def test_it_is_sines_then_cosines_of_ten_thousand_t():
    t = torch.tensor([0.0, 0.25, 1.0])
    embedded = time_embedding(t, 8)
    assert embedded.shape == (3, 8) and embedded.dtype == torch.float32
    for row, time in zip(embedded, t.tolist(), strict=True):
        angles = [time * 10_000 * 10_000 ** (-k / 3) for k in range(4)]
        expected = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
        torch.testing.assert_close(row, expected, atol=2e-3, rtol=0)


def test_zero_is_zeros_then_ones():
    expected = torch.tensor([[0.0] * 32 + [1.0] * 32])
    assert torch.equal(time_embedding(torch.zeros(1), 64), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_time_is_refused(dtype):
    with pytest.raises(ValueError, match="float32"):
        time_embedding(torch.zeros(1, dtype=dtype), 64)


def test_rounding_the_time_would_lose_it():
    """Why it is refused: upstream rounds first, and the first step's time becomes another."""
    t = torch.tensor([0.9936, 0.6])
    exact = time_embedding(t, 64)
    rounded = time_embedding(t.bfloat16().float(), 64)
    similarity = torch.nn.functional.cosine_similarity(exact, rounded)
    assert (similarity < 0.9).all()


def test_double_precision_times_are_embedded_in_double_precision() -> None:
    t = torch.tensor([0.25, 0.5], dtype=torch.float64)
    found = time_embedding(t, 8)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), time_embedding(t.float(), 8), atol=2e-3, rtol=0)


def test_close_times_differ():
    embedded = time_embedding(torch.linspace(0, 1, 101), 64)
    distances = torch.cdist(embedded, embedded) + 10 * torch.eye(101)
    assert distances.min() > 0.1


# Timesteps and sizes


def test_a_timestep_is_cosines_then_sines():
    values = torch.tensor([0.0, 17.5, 999.0])
    embedded = timestep_embedding(values, 8)
    assert embedded.shape == (3, 8) and embedded.dtype == torch.float32
    for row, value in zip(embedded, values.tolist(), strict=True):
        angles = [value * 10_000 ** (-k / 4) for k in range(4)]
        expected = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=0)


def test_whole_numbers_of_thousands_are_told_apart():
    sizes = torch.arange(4000, 4100)
    embedded = timestep_embedding(sizes, 256)
    assert torch.equal(embedded, timestep_embedding(sizes.double(), 256))
    assert (torch.cdist(embedded, embedded) + 10 * torch.eye(100)).min() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_timesteps_are_refused(dtype):
    with pytest.raises(ValueError, match="float32"):
        timestep_embedding(torch.zeros(1, dtype=dtype), 64)
