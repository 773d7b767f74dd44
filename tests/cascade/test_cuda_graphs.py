"""Recorded passes. A CPU has no graphs; a tape of operators stands in, which reads and writes the
same tensors at each replay, as a graph does: what Python did while it recorded is not done again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cascade.cuda_graphs import CudaGraphs, check_graphs
from cascade.errors import UserError
from cascade.pipelines.cascade import CascadePipeline
from cascade.pipelines.compiling import use_cuda_graphs
from cascade.pipelines.unet import UNetPipeline
from cascade.pipelines.unet_plan import UNetSettings
from tests.unet_models import save_tiny


class Tape(TorchDispatchMode):
    """Notes operators, and does them again over the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tree_leaves(made)))
        return made

    def replay(self) -> None:
        for func, args, kwargs, made in self.calls:
            for old, new in zip(made, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Tapes:
    """Records passes in place of a GPU, and counts them."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        self.recorded += 1
        with Tape() as tape:
            out = run()
        return tape.replay, out


@pytest.fixture
def tapes() -> Tapes:
    return Tapes()


def test_a_cascade_draws_the_same_pictures_from_recordings(tiny_model: Path, tapes: Tapes) -> None:
    pipeline = CascadePipeline(tiny_model, device="cpu", dtype="float32")
    runs: list[dict[str, Any]] = [
        dict(prompt="a red apple", seed=1, steps_c=4, steps_b=3),
        dict(prompt="a blue fish", seed=2, steps_c=4, steps_b=3),
        dict(prompt="a red apple", seed=1, steps_c=4, steps_b=3, guidance_b=3.0),
        dict(prompt="a hat", seed=3, steps_c=4, steps_b=2, guidance_interval=(0.3, 0.8)),
        dict(prompt=["a red apple", "a blue fish"], seed=1, steps_c=3, steps_b=2, batch_size=2),
        dict(prompt="a red apple", seed=1, steps_c=4, steps_b=3, width=48, height=64),
        dict(prompt="a red apple", seed=1, steps_c=4, steps_b=3, sampler="ddpm"),
    ]
    plain = [pipeline(**run, progress=False).pixels for run in runs]
    pipeline.graphs = CudaGraphs(tapes)
    for run, expected in zip(runs, plain, strict=True):
        torch.testing.assert_close(pipeline(**run, progress=False).pixels, expected)
    # Both stages; Stage B with guidance, which is its pass of two pictures as well; Stage C without
    # guidance; Stage C of two pictures; both of another size.
    first = tapes.recorded
    assert first == 2 + 1 + 1 + 1 + 2
    for run, expected in zip(runs, plain, strict=True):
        torch.testing.assert_close(pipeline(**run, progress=False).pixels, expected)
    assert tapes.recorded == first, "what is known is not recorded again"
    pipeline.graphs = None
    assert torch.equal(pipeline(**runs[0], progress=False).pixels, plain[0])


@pytest.mark.parametrize("kind", ["sdxl", "sd"])
def test_a_unet_draws_the_same_pictures_from_recordings(
    kind: Any, tmp_path: Path, tapes: Tapes
) -> None:
    pipeline = UNetPipeline(save_tiny(tmp_path / "model", kind), device="cpu", dtype="float32")
    runs = [
        ("a red apple", UNetSettings(seed=1, steps=4)),
        ("a blue fish", UNetSettings(seed=2, steps=5)),
        ("a hat", UNetSettings(seed=3, steps=4, guidance=1.0)),
    ]
    plain = [pipeline(prompt, settings, progress=False).pixels for prompt, settings in runs]
    pipeline.graphs = CudaGraphs(tapes)
    for (prompt, settings), expected in zip(runs, plain, strict=True):
        found = pipeline(prompt, settings, progress=False).pixels
        torch.testing.assert_close(found, expected)
    assert tapes.recorded == 2, "with guidance and without; the number of steps is nothing to it"


class Shifted(nn.Module):
    """As a stage: latents, a time, a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        told, rows = cond
        return self.weight * x + t[:, None] + told + rows["a"]


def given(rows: int = 1) -> tuple[Tensor, Tensor, Any]:
    """(x, t, cond); one row of the condition is there for all."""
    return (
        torch.randn(rows, 3),
        torch.rand(rows),
        (torch.randn(1, 3).expand(rows, 3), {"a": torch.randn(rows, 3)}),
    )


@torch.inference_mode()
def test_each_call_sees_its_own_inputs_and_keeps_its_result(tapes: Tapes) -> None:
    network, graphs = Shifted(), CudaGraphs(tapes)
    calls = [given(2) for _ in range(4)]
    run = graphs.of(network)
    found = [run(*call) for call in calls]
    for one, call in zip(found, calls, strict=True):
        torch.testing.assert_close(one, network(*call))
    x, t, cond = calls[-1]
    x.add_(1)  # in place: the same tensor with other values
    torch.testing.assert_close(run(x, t, cond), network(x, t, cond))
    t.mul_(2)
    torch.testing.assert_close(run(x, t, cond), network(x, t, cond))
    torch.testing.assert_close(found[0], network(*calls[0]))
    assert tapes.recorded == 1


@torch.inference_mode()
def test_what_steps_share_is_copied_once(tapes: Tapes, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    plain = torch._foreach_copy_

    def counting(there: list[Tensor], here: list[Tensor]) -> None:
        copied.append(len(here))
        plain(there, here)

    monkeypatch.setattr(torch, "_foreach_copy_", counting)
    network, graphs = Shifted(), CudaGraphs(tapes)
    x, t, (told, rows) = given()
    run = graphs.of(network)
    for row in (rows, {"a": torch.randn(1, 3)}, {"a": torch.randn(1, 3)}):
        cond = (told, row)
        torch.testing.assert_close(run(x, t, cond), network(x, t, cond))
    assert copied == [3, 3], "x, t and the row of the step; not what is told in all of them"


@torch.inference_mode()
def test_weights_count_as_they_are(tapes: Tapes) -> None:
    network, graphs = Shifted(), CudaGraphs(tapes)
    call = given()
    graphs.of(network)(*call)
    network.weight.mul_(3)
    torch.testing.assert_close(graphs.of(network)(*call), network(*call))
    assert tapes.recorded == 1, "written over in place"
    network.weight = nn.Parameter(torch.tensor(7.0))
    torch.testing.assert_close(graphs.of(network)(*call), network(*call))
    assert tapes.recorded == 2, "a tensor elsewhere"
    network.compile(backend="eager")
    torch.testing.assert_close(graphs.of(network)(*call), network(*call))
    assert tapes.recorded == 3, "compiled since"


@torch.inference_mode()
def test_shapes_that_nobody_asks_for_are_forgotten(tapes: Tapes) -> None:
    network, graphs = Shifted(), CudaGraphs(tapes)
    run = graphs.of(network)
    for rows in (*range(1, 9), 1, 9, 1):
        call = given(rows)
        torch.testing.assert_close(run(*call), network(*call))
    assert tapes.recorded == 9
    run(*given(2))
    assert tapes.recorded == 10, "of eight shapes two was the one asked for longest ago"


def test_what_has_no_graphs_is_one_line(tiny_model: Path, tapes: Tapes) -> None:
    pipeline = CascadePipeline(tiny_model, device="cpu")
    with pytest.raises(UserError, match="needs a CUDA GPU, and pictures are made on cpu"):
        use_cuda_graphs(pipeline)
    gpu = torch.device("cuda")
    for offload, vram in (("model", None), (None, 4.0)):
        with pytest.raises(UserError, match="leave --offload and --vram out"):
            check_graphs(gpu, offload, vram)
    check_graphs(gpu, "none", None)
    pipeline.graphs = CudaGraphs(tapes)
    pipeline.place(offload="sequential")
    with pytest.raises(UserError, match="CUDA graphs need all weights to stay on the device"):
        pipeline("a red apple", progress=False)

    def refuse(run: Callable[[], Tensor]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with pytest.raises(UserError, match=r"leave them out: operation not permitted .* capturing$"):
        CudaGraphs(refuse).of(Shifted())(*given())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_draws_the_same_pictures_from_graphs(tiny_model: Path, dtype: str) -> None:
    pipeline = CascadePipeline(tiny_model, device="cuda", dtype=dtype)
    runs: list[dict[str, Any]] = [
        dict(prompt="a red apple", seed=1, steps_c=4, steps_b=3),
        dict(prompt="a blue fish", seed=2, steps_c=5, steps_b=3),
        dict(prompt="a hat", seed=3, guidance_interval=(0.3, 0.8), width=48),
    ]
    plain = [pipeline(**run, progress=False).pixels for run in runs]
    use_cuda_graphs(pipeline)
    for _ in range(2):
        for run, expected in zip(runs, plain, strict=True):
            found = pipeline(**run, progress=False).pixels
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
