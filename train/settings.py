"""What all training runs share: where they write, how long they last, how they step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class RunConfig:
    """One run: its folder, length, precision and bookkeeping."""

    out: str
    """Folder of the run: checkpoints, logs, exported weights."""
    max_steps: int
    """Optimizer steps after which training ends."""
    seed: int = 0
    """Seeds weights, data order, noise and dropout."""
    max_minutes: float | None = None
    """Wall-clock limit of this start of the run; a later ``--resume`` goes on."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "bf16-mixed"
    """Lightning's precision; weights and optimizer state stay float32 in the mixed ones."""
    log_every_steps: int = 50
    """Steps between rows of ``metrics.csv`` and points of TensorBoard's curves."""
    wandb_project: str | None = None
    """Weights & Biases project that the run also reports to; needs the package ``wandb``."""
    checkpoint_every_steps: int = 500
    """Steps between resumable checkpoints and exports of the averaged weights."""
    export_at_steps: tuple[int, ...] = ()
    """Steps after which the averaged weights are also kept in ``OUT/exports/step=N``, so that what
    a run had learned by then can be judged later."""
    keep_checkpoints: int = 2
    """Resumable checkpoints kept: should the newest be damaged, the one before goes on."""
    ema_decay: float = 0.999
    """Decay of the averaged weights; warmed up as ``(1 + n) / (10 + n)``."""
    max_skipped_steps: int = 20
    """Steps in a row whose gradients may be not finite: such a step is left out and counted; one
    more ends the run, and its batch is kept for inspection."""
    threads: int | None = None
    """CPU threads of torch; None leaves torch's default."""
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    """Where to train; "auto" takes a GPU when there is one."""
    devices: int = 1
    """Devices on each machine. Started plainly, a run starts the other processes itself; under
    torchrun or SLURM it takes the place that it is given."""
    num_nodes: int = 1
    """Machines."""
    accumulate: int = 1
    """Micro-batches of ``data.batch_size`` whose gradients make one step. From memory the same
    global batch, by any split into devices and micro-batches, gives the same steps up to rounding;
    a stream in exact mode does by any split into devices, and of a resampled one each rank draws
    its own samples."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Several devices: ``ddp`` keeps the whole network on each; ``fsdp`` (FSDP2) cuts weights,
    gradients, optimizer states and the average into a part a device, block by block. Checkpoints
    and exports are the same files by either, so a run may go on with the other."""
    activation_checkpointing: bool = False
    """Keep only what enters each block and compute the rest again in the backward pass: about a
    third more time, far less memory. Stage B and Stage C; the recomputed operations count in the
    ledger's FLOPs."""
    compile: bool = False
    """torch.compile of each block of the networks, which takes minutes at the first steps; the
    ledger counts them apart, as ``compile``."""
    ema_offload: bool = False
    """Keep the averaged weights in the CPU's memory; the weights go there once a step."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Number format of the exported weights."""
    trainer: dict[str, bool | int | float | str | None] = field(default_factory=dict)
    """Further options of Lightning's Trainer by its names, such as ``profiler: simple`` or
    ``deterministic: true``. What another key of the run decides is refused here."""

    def __post_init__(self) -> None:
        """Check the values that would fail late."""
        counts = ("max_steps", "log_every_steps", "checkpoint_every_steps", "keep_checkpoints")
        if self.max_skipped_steps < 0:
            raise ValueError(f"max_skipped_steps is {self.max_skipped_steps}; 0 allows none")
        for name in (*counts, "devices", "num_nodes", "accumulate", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; at least 1 is needed")
        beyond = [step for step in self.export_at_steps if not 1 <= step <= self.max_steps]
        if beyond:
            raise ValueError(
                f"export_at_steps holds {beyond[0]}; the run makes steps 1 to {self.max_steps}"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it lies in [0, 2^32)")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"max_minutes is {self.max_minutes}; it must be positive")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay is {self.ema_decay}; it lies in [0, 1)")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with a warm-up and a decay."""

    lr: float = 1e-4
    """Peak learning rate (1e-4 in the Würstchen recipes)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices and kernels; vectors get none."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    warmup_fraction: float | None = None
    """Part of the run that is the warm-up, in place of ``warmup_steps``: for runs of any length."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After the warm-up: constant, or a decay that ends at ``max_steps``."""
    decay_from: float = 0.0
    """Fraction of the run after which the decay starts (0.8: constant until then)."""
    final_lr_fraction: float = 0.0
    """Learning rate at the end as a fraction of the peak."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    name: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """``muon`` steps hidden matrices with Muon and the rest with AdamW; ``adamw8bit`` keeps AdamW's
    two states in 8 bits (needs the package torchao)."""
    muon_lr: float = 0.01
    """Learning rate of the matrices when ``name`` is muon."""
    fused: bool | None = None
    """One kernel for all of AdamW's step, on CPUs two to five times as fast; null: on CUDA devices
    and CPUs."""
    offload: bool = False
    """AdamW's states and its step on the CPU: 8 bytes a parameter less on the device, at the price
    of moving gradients and weights once a step. Raise ``run.accumulate`` to make steps rarer."""

    def __post_init__(self) -> None:
        """Refuse what would train nothing or fail late."""
        for name in ("lr", "muon_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.offload and self.name != "adamw":
            raise ValueError(f"offload is set but name is {self.name}; only adamw can be offloaded")
        if self.fused is not None and self.name != "adamw":
            raise ValueError(f"fused is set but name is {self.name}; only adamw has a fused kernel")
        if self.warmup_fraction is not None and not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"warmup_fraction={self.warmup_fraction} lies in [0, 1)")
        if min(self.warmup_steps, self.weight_decay, self.grad_clip) < 0:
            raise ValueError(
                f"warmup_steps={self.warmup_steps}, weight_decay={self.weight_decay} and "
                f"grad_clip={self.grad_clip} must not be negative"
            )
        if not (0 <= self.decay_from <= 1 and 0 <= self.final_lr_fraction <= 1):
            raise ValueError(
                f"decay_from={self.decay_from} and final_lr_fraction={self.final_lr_fraction} "
                "lie in [0, 1]"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} lie in [0, 1)")

    def warmup(self, max_steps: int) -> int:
        """Return the steps of warm-up of a run of so many."""
        if self.warmup_fraction is None:
            return self.warmup_steps
        return round(self.warmup_fraction * max_steps)


EXPORT_KEYS = ("train_steps", "train_samples", "train_seconds")
"""Metadata of an exported file that says what it cost."""
