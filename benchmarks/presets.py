"""What each preset of ``configs/presets`` needs and does, for Stage C at the published sizes.

    python benchmarks/presets.py

Memory is computed without a GPU: weights, gradients, optimizer states and average by counting, and
what the backward pass keeps by a forward pass on torch's meta device, in the dtypes of CUDA's
autocast. Where there is a CUDA device, presets for one device that fit it are run as well.
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cascade.command import Parser, parse_all  # noqa: E402
from cascade.compiled import blocks_of, compile_blocks  # noqa: E402
from cascade.errors import UserError, run_main  # noqa: E402
from cascade.evaluate.provenance import commit, machine  # noqa: E402
from stages.stage_c import StageC, StageCCondition, StageCConfig  # noqa: E402
from train.data.config import DataConfig  # noqa: E402
from train.optim import make_optimizer, require_low_bit  # noqa: E402
from train.settings import OptimConfig, RunConfig  # noqa: E402

FOLDER = ROOT / "configs" / "presets"
GIB = 2**30
CUDA_GIB = 0.75
"""What the CUDA context and cuBLAS take."""
SIDE, TOKENS = 24, 77
"""Stage C's latents of 1024 px, and CLIP's tokens."""
WARM_UP, STEPS = 2, 5


@dataclass(frozen=True)
class Preset:
    """A preset file and the network that it is for."""

    path: Path
    run: RunConfig
    optim: OptimConfig
    data: DataConfig

    @property
    def network(self) -> str:
        """``lite`` (1.0B) or ``full`` (3.6B), as the file's name says."""
        return "full" if self.path.stem.endswith("_full") else "lite"

    @property
    def device_gib(self) -> int:
        """Memory of the device that it is for."""
        return int(self.path.stem.split("gb")[0])

    @property
    def config(self) -> StageCConfig:
        """The network's sizes; without dropout, whose masks add a byte an element."""
        whole = StageCConfig.full() if self.network == "full" else StageCConfig.lite()
        return dataclasses.replace(whole, dropout=0.0)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the fullest moment of a step."""

    weights: int
    gradients: int
    states: int
    average: int
    casts: int
    """bfloat16 copies of the weights that autocast keeps until the forward pass ends."""
    activations: int

    @property
    def total(self) -> int:
        """Their sum: gradients of earlier micro-batches are there while the next one is kept."""
        return sum(dataclasses.astuple(self))


def load_presets(folder: Path = FOLDER) -> list[Preset]:
    """Read every preset, the smallest device first."""
    presets = []
    for path in folder.glob("*.yaml"):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        presets.append(
            Preset(
                path,
                RunConfig(out="", max_steps=1, **values["run"]),
                OptimConfig(**values["optim"]),
                DataConfig(shards="", **values["data"]),
            )
        )
    return sorted(presets, key=lambda one: (one.network == "full", one.device_gib))


def memory_of(preset: Preset) -> Memory:
    """Compute what a preset needs."""
    with torch.device("meta"):
        network = StageC(preset.config).to(torch.bfloat16)
    count = sum(one.numel() for one in network.parameters())
    devices = preset.run.devices * preset.run.num_nodes
    parts = devices if preset.run.strategy == "fsdp" else 1
    state_bytes = {"adamw": 8.0, "adamw8bit": 2.0 + 8.0 / 256, "muon": 8.0}[preset.optim.name]
    if preset.optim.offload:
        state_bytes = 0.0
    unsharded = 0
    if parts > 1:  # the block at work, and the next one on its way, with their gradients
        largest = max(
            sum(one.numel() for one in block.parameters()) for block in blocks_of(network)
        )
        unsharded = 2 * largest
    return Memory(
        weights=4 * (count // parts + unsharded),
        gradients=4 * (count // parts + unsharded),
        states=int(state_bytes * (count // parts)),
        average=0 if preset.run.ema_offload else 4 * (count // parts),
        casts=2 * count,
        activations=kept_bytes(
            network, preset.data.batch_size, recompute=preset.run.activation_checkpointing
        ),
    )


def kept_bytes(network: StageC, batch: int, *, recompute: bool) -> int:
    """Return what the backward pass of a network on the meta device keeps beside its weights.

    With ``recompute``: what enters each block, and all of the one that is computed again.
    """
    weights = {one.untyped_storage()._cdata for one in network.parameters()}
    kept: dict[int, Tensor] = {}
    blocks: list[tuple[int, int]] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no address comes twice
        return tensor

    def total() -> int:
        return sum(one.untyped_storage().nbytes() for one in kept.values())

    begun: list[int] = []
    handles = []
    for block in blocks_of(network):
        handles.append(block.register_forward_pre_hook(lambda *_: begun.append(total())))

        def end(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            blocks.append((total() - begun.pop(), inputs[0].nbytes))

        handles.append(block.register_forward_hook(end))
    with (
        mock.patch("stages.layers.attend", _flash_attention),
        mock.patch.object(F, "layer_norm", _float_layer_norm(F.layer_norm)),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        network(*_inputs(batch, device="meta", dtype=torch.bfloat16))
    for handle in handles:
        handle.remove()
    if not recompute:
        return total()
    outside = total() - sum(inside for inside, _ in blocks)
    return outside + sum(entering for _, entering in blocks) + max(inside for inside, _ in blocks)


class _Flash(torch.autograd.Function):
    """Keeps what the flash kernel keeps; the meta device would choose the plain formula."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    return _Flash.apply(query, key, value)


def _float_layer_norm(layer_norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """CUDA's autocast norms in float32, and what follows is cast back."""

    def run(x: Tensor, shape: Sequence[int], *, eps: float) -> Tensor:
        return layer_norm(x.float(), shape, eps=eps).to(x.dtype)

    return run


def _inputs(count: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, StageCCondition]:
    cond = StageCCondition(
        text_hidden=torch.randn(count, TOKENS, 1280, device=device, dtype=dtype),
        text_pooled=torch.randn(count, 1280, device=device, dtype=dtype),
    )
    latents = torch.randn(count, 16, SIDE, SIDE, device=device, dtype=dtype)
    return latents, torch.rand(count, device=device), cond


def measure(preset: Preset) -> tuple[float, float]:
    """Train some steps on the GPU; return peak GiB and pictures a second."""
    require_low_bit(preset.optim)
    device = "cuda"
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    network = StageC(preset.config).to(device)
    network.recompute = preset.run.activation_checkpointing
    if preset.run.compile:
        compile_blocks(network)
    optimizer, _ = make_optimizer(network.parameters(), preset.optim, STEPS)
    home = "cpu" if preset.run.ema_offload else device
    average = {k: v.to(home, copy=True) for k, v in network.state_dict().items()}
    inputs = _inputs(preset.data.batch_size, device, torch.float32)
    began_s = 0.0
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            torch.cuda.synchronize()
            began_s = time.perf_counter()
        for _ in range(preset.run.accumulate):
            with torch.autocast(device, torch.bfloat16):
                loss = (network(*inputs).float() - inputs[0]).square().mean()
            (loss / preset.run.accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for key, value in network.state_dict().items():
                average[key].lerp_(value.to(home), 0.001)
    torch.cuda.synchronize()
    pictures = STEPS * preset.run.accumulate * preset.data.batch_size
    rate = pictures / (time.perf_counter() - began_s)
    return torch.cuda.max_memory_allocated() / GIB, rate


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = Parser(description="Compute, and measure where it can be, what each preset needs.")
    parser.add_argument("--seed", type=int, default=0)
    options = parse_all(parser, sys.argv[1:] if argv is None else argv)
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = torch.cuda.get_device_properties(0).total_memory / GIB if device.type == "cuda" else 0.0
    day = datetime.date.today().isoformat()
    print(f"seed {options.seed}, commit {commit()}, {machine(device)}, {day}")
    columns = "weights gradients states EMA casts activations CUDA needed".split()
    head = ["preset", "Stage C", "devices", "pictures a step", *columns, "peak GiB", "pictures/s"]
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    wrong = []
    for preset in load_presets():
        needed = memory_of(preset)
        needed_gib = needed.total / GIB + CUDA_GIB
        if needed_gib > preset.device_gib:
            wrong.append(f"{preset.path.name} needs {needed_gib:.1f} GiB")
        devices = preset.run.devices * preset.run.num_nodes
        peak = rate = "not measured"
        if devices == 1 and there > needed_gib:
            found = measure(preset)
            peak, rate = f"{found[0]:.1f}", f"{found[1]:.1f}"
        samples = devices * preset.run.accumulate * preset.data.batch_size
        parts = [f"{part / GIB:.1f}" for part in dataclasses.astuple(needed)]
        figures = [*parts, f"{CUDA_GIB}", f"{needed_gib:.1f}", peak, rate]
        row = [preset.path.stem, preset.network, str(devices), str(samples), *figures]
        print(f"| {' | '.join(row)} |")
    if not there:
        print("no CUDA device here: memory is computed, nothing is measured")
    if wrong:
        raise UserError("; ".join(wrong))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
