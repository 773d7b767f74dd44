"""How a new Stage C learns, key by key, unless its run says otherwise.

Together they are the recipe that won ``benchmarks/RECIPES.md``. A run that gives some keys of a
section keeps these values for the others, but for those that mean nothing beside what it gives: a
rate for Muon is none for AdamW, flow matching's path is none for epsilon. Beside such a key the
others have the published values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cascade.config import DependentDefaults
from stages.stage_c import StageCConfig
from train.losses.denoising import DiffusionConfig
from train.settings import OptimConfig

_PATH = ("prediction", "schedule")


@dataclass(frozen=True)
class StageCDiffusion(DiffusionConfig, DependentDefaults):
    """Flow matching on the linear path, more of the middle times."""

    prediction: Literal["epsilon", "v", "x0", "flow"] = "flow"
    schedule: Literal["cosine", "linear"] = "linear"
    weight: Literal["p2", "min_snr", "constant", "adaptive"] = "constant"
    draw: Literal["uniform", "logit_normal", "official", "noisy"] = "logit_normal"
    stratified: bool = False

    @classmethod
    def defaults_beside(cls, given: Mapping[str, object]) -> Mapping[str, object]:
        """Return the published ones beside another prediction or schedule."""
        own = all(given.get(name, getattr(cls, name)) == getattr(cls, name) for name in _PATH)
        return {} if own else vars(DiffusionConfig())


@dataclass(frozen=True)
class StageCOptim(OptimConfig, DependentDefaults):
    """Muon for matrices, at rates for networks of about a million parameters.

    Larger ones want smaller rates.
    """

    lr: float = 3e-3
    warmup_steps: int = 30
    name: Literal["adamw", "adamw8bit", "muon"] = "muon"
    muon_lr: float = 0.02

    @classmethod
    def defaults_beside(cls, given: Mapping[str, object]) -> Mapping[str, object]:
        """Return the published ones beside another optimizer."""
        return {} if given.get("name", cls.name) == cls.name else vars(OptimConfig())


@dataclass(frozen=True)
class NewStageC(StageCConfig):
    """Sizes of a Stage C that is trained here from the start."""

    qk_norm: bool = True

    def plain(self) -> StageCConfig:
        """Return the same sizes as the network and its file know them."""
        return StageCConfig(**vars(self))
