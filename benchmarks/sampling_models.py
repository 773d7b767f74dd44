"""The models of ``benchmarks/sampling.py``: their networks, and the same ones in diffusers.

Published models have random weights of a seed; the demonstration has its own. Networks are made
without memory and filled in their number format. diffusers' network is built over the very same
tensors: where a tensor of ours is several of theirs, as key and value are, theirs are views of it.
So each weight is in memory once, and one part of a model at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from cascade.checkpoints.files import build_on_meta, load_network
from cascade.config import from_dict
from cascade.errors import UserError
from cascade.pipelines.spec import SPEC_FILE, load_spec
from cascade.pipelines.unet_spec import UNetSampling, UNetSpec
from cascade.tools.convert import family_for
from cascade.tools.convert_unet import autoencoder_config_of, unet_config_of
from cascade.tools.diffusers_names import diffusers_config
from stages.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from stages.stage_a import StageA, StageAConfig
from stages.stage_b import StageB, StageBConfig
from stages.stage_b_v2 import StageBV2, StageBV2Config
from stages.stage_c import StageC, StageCConfig
from stages.stage_c_v2 import StageCV2, StageCV2Config
from stages.unet.config import UNetConfig
from stages.unet.unet import UNet

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "weights" / "demo"
_DEMO_KOALA = ROOT / "configs" / "demo_koala" / "unet.yaml"
_DEMO_KOALA_AUTOENCODER = ROOT / "weights" / "demo-koala" / "autoencoder_kl.safetensors"
_STD = 0.02
_GAMMA_STD = 0.5
_NOISE_VALUES = (1 << 22) + 15  # odd: no two rows of a matrix are the same

Build = Callable[[int, torch.device, torch.dtype], Any]
"""Makes a network of a seed, on a device, in a number format."""


@dataclass(frozen=True)
class CascadeModel:
    """A cascade to measure."""

    title: str
    stage_c: StageCConfig | StageCV2Config
    stage_b: StageBConfig | StageBV2Config
    stage_a: StageAConfig
    pixels_per_cell: float = 42.67
    """Pixels along a side of a Stage C latent cell."""
    steps_c: int = 20
    steps_b: int = 10
    guidance_c: float = 4.0
    guidance_b: float = 1.0
    """1 is off, as diffusers' pipelines have it unless told otherwise."""
    tokens: int = 77
    size: int | None = None
    """Its one picture size in pixels; None: it makes any."""
    folder: Path | None = None
    """Where its weights are; None: they are random."""
    random: frozenset[str] = frozenset()
    """Its networks that are random although it has a folder."""

    def builders(self) -> dict[str, Build]:
        """Return what makes each of its networks."""
        kinds: dict[str, type[nn.Module]] = {
            "stage_c": StageCV2 if isinstance(self.stage_c, StageCV2Config) else StageC,
            "stage_b": StageBV2 if isinstance(self.stage_b, StageBV2Config) else StageB,
            "stage_a": StageA,
        }
        return {
            name: partial(random_network, kind, getattr(self, name))
            if self.folder is None or name in self.random
            else partial(_loaded, self.folder / f"{name}.safetensors", kind)
            for name, kind in kinds.items()
        }


@dataclass(frozen=True)
class UNetModel:
    """A U-Net with its autoencoder to measure."""

    title: str
    unet: UNetConfig
    sampling: UNetSampling
    autoencoder: AutoencoderKLConfig
    tokens: int = 77
    size: int | None = None
    autoencoder_file: Path | None = None
    """Where the autoencoder's weights are; None: they are random, as the U-Net's always are."""

    def builders(self) -> dict[str, Build]:
        """Return what makes each of its networks."""
        autoencoder: Build = partial(random_network, AutoencoderKL, self.autoencoder)
        if self.autoencoder_file is not None:
            autoencoder = partial(_loaded, self.autoencoder_file, AutoencoderKL)
        return {"unet": partial(random_network, UNet, self.unet), "autoencoder": autoencoder}


Model = CascadeModel | UNetModel


def _stable_cascade(title: str, stage_c: StageCConfig, stage_b: StageBConfig) -> CascadeModel:
    return CascadeModel(title, stage_c, stage_b, StageAConfig.v3())


def comparable(config: StageCConfig) -> StageCConfig:
    """Return a Stage C of the same size that diffusers has as well: it knows no QK-norm."""
    return replace(config, qk_norm=False)


def _demo() -> CascadeModel:
    """Return the demonstration: its networks' files say their sizes.

    Where its Stage C is none that diffusers has, one of its size with random weights stands for it.
    """
    if not (DEMO / SPEC_FILE).is_file():
        raise UserError(f"{DEMO}: the demonstration's model is not there; leave 'demo' out")
    spec = load_spec(DEMO)
    kinds = {"stage_c": StageC, "stage_b": StageB, "stage_a": StageA}
    configs: Any = {
        name: load_network(DEMO / f"{name}.safetensors", expect=kind).config
        for name, kind in kinds.items()
    }
    own, configs["stage_c"] = configs["stage_c"], comparable(configs["stage_c"])
    is_own = own == configs["stage_c"]
    return CascadeModel(
        "the demonstration" if is_own else "the demonstration (Stage C random, without QK-norm)",
        **configs,
        random=frozenset() if is_own else frozenset({"stage_c"}),
        pixels_per_cell=spec.pixels_per_stage_c_cell,
        steps_c=spec.stage_c.steps,
        steps_b=spec.stage_b.steps,
        guidance_c=spec.stage_c.guidance,
        guidance_b=spec.stage_b.guidance,
        tokens=36,
        size=spec.image_size,
        folder=DEMO,
    )


def _demo_koala() -> UNetModel:
    """Return the demonstration's U-Net, random, with its autoencoder."""
    run = yaml.safe_load(_DEMO_KOALA.read_text(encoding="utf-8"))
    config = from_dict(UNetConfig, run["model"], str(_DEMO_KOALA))
    path = _DEMO_KOALA_AUTOENCODER
    if not path.is_file():
        raise UserError(f"{path}: not there; leave 'demo_koala' out")
    autoencoder = load_network(path, expect=AutoencoderKL).config
    sampling = UNetSampling(spacing="trailing", steps=10, guidance=3.5)
    return UNetModel(
        "the demonstration's U-Net", config, sampling, autoencoder, 36, 128, autoencoder_file=path
    )


_SDXL = UNetSampling(steps=25, guidance=5.0)
_KOALA = UNetSampling(spacing="trailing", steps=10, guidance=3.5)
_KL = AutoencoderKLConfig.sdxl()
MODELS: dict[str, Callable[[], Model]] = {
    "demo": _demo,
    "demo_koala": _demo_koala,
    "wuerstchen_v2": lambda: CascadeModel(
        "Würstchen v2", StageCV2Config.full(), StageBV2Config.full(), StageAConfig.v2()
    ),
    "stable_cascade_lite": lambda: _stable_cascade(
        "Stable Cascade lite", StageCConfig.lite(), StageBConfig.lite()
    ),
    "stable_cascade_full": lambda: _stable_cascade(
        "Stable Cascade full", StageCConfig.full(), StageBConfig.full()
    ),
    "koala_700m": lambda: UNetModel("KOALA-700M", UNetConfig.koala_700m(), _KOALA, _KL),
    "koala_1b": lambda: UNetModel("KOALA-1B", UNetConfig.koala_1b(), _KOALA, _KL),
    "sdxl": lambda: UNetModel("SDXL", UNetConfig.sdxl(), _SDXL, _KL),
}
"""What ``--models`` takes, smallest first."""


# Networks


def _loaded(
    path: Path, kind: type[nn.Module], seed: int, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Load a network; the seed is that of networks that are random."""
    network: nn.Module = load_network(path, expect=kind, device=device, dtype=dtype)
    return network.requires_grad_(False)


def random_network(
    kind: type[nn.Module], config: Any, seed: int, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Return a network of random weights, none of them zero, made in their number format."""
    meta: nn.Module = build_on_meta(kind, config, "the benchmark")
    network = meta.to(dtype).to_empty(device=device)
    state = network.state_dict()
    filled = {tensor.data_ptr() for tensor in state.values()}
    assert all(one.data_ptr() in filled for one in network.buffers()), "a buffer without values"
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn(_NOISE_VALUES, generator=generator, device=device).mul_(_STD).to(dtype)
    start = 0
    for name, tensor in state.items():
        if not tensor.is_floating_point() or name.endswith("running_mean"):
            tensor.zero_()
        elif name.endswith("running_var"):
            tensor.fill_(1.0)
        else:
            start = _fill(tensor, noise, start)
            if name.endswith("gammas"):  # of Stage A: what its blocks have a say by
                tensor.mul_(_GAMMA_STD / _STD)
            elif "norm" in name and name.endswith("weight"):
                tensor.add_(1.0)
            elif isinstance(network, (StageCV2, StageBV2)) and name.startswith("out."):
                tensor.mul_(0.1)  # half of it divides: near zero it would magnify rounding
    return network.eval().requires_grad_(False)


def _fill(tensor: Tensor, noise: Tensor, start: int) -> int:
    """Copy noise, from a place of it and round again; return the next place."""
    values, done = tensor.as_strided((tensor.numel(),), (1,)), 0  # in whatever layout
    while done < len(values):
        part = noise[start : start + len(values) - done]
        values[done : done + len(part)].copy_(part)
        done += len(part)
        start = (start + len(part)) % len(noise)
    return start


def same_in_diffusers(ours: nn.Module) -> nn.Module:
    """Return diffusers' network over our network's own tensors.

    Raises:
        UserError: diffusers is not installed.
    """
    config: Any = ours.config
    if isinstance(ours, UNet):
        content = unet_config_of(config, UNetSpec("benchmark").sample_size)
    elif isinstance(ours, AutoencoderKL):
        content = autoencoder_config_of(config, UNetSpec("benchmark"))
    else:
        content = diffusers_config(config)
    kind = _class_of(content.pop("_class_name"))
    with torch.device("meta"):
        theirs: nn.Module = kind(**content)
    state = family_for(ours).to_layout["diffusers"](ours.state_dict(), config)
    theirs.load_state_dict(state, assign=True)
    return theirs.eval().requires_grad_(False)


def _class_of(name: str) -> Any:
    try:
        import diffusers
        from diffusers.pipelines.deprecated import wuerstchen
        from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import (
            WuerstchenDiffNeXt,
        )
    except ImportError as error:
        raise UserError('diffusers is not installed; pip install -e ".[test]"') from error
    if name == "WuerstchenDiffNeXt":
        return WuerstchenDiffNeXt
    return getattr(diffusers, name, None) or getattr(wuerstchen, name)


def shared_bytes(ours: nn.Module, theirs: nn.Module) -> tuple[int, int]:
    """Return the bytes of their tensors that lie in our memory, and of those that do not."""
    own = {one.untyped_storage().data_ptr() for one in ours.state_dict().values()}
    shared = copied = 0
    for tensor in theirs.state_dict().values():
        size = tensor.numel() * tensor.element_size()
        if tensor.untyped_storage().data_ptr() in own:
            shared += size
        else:
            copied += size
    return shared, copied
