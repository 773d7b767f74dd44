"""Put a trained U-Net together: ``python -m train.assemble_unet --config FILE --out FOLDER``.

Checks that the parts are as wide as each other where they meet; then writes a folder of diffusers,
whole or not at all, and loads it once.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

import torch

from cascade.checkpoints.files import atomic_folder, save_network
from cascade.checkpoints.load import build
from cascade.checkpoints.part_files import find_network
from cascade.checkpoints.said import said_in
from cascade.command import Parser
from cascade.config import load_yaml, parse_overrides
from cascade.errors import UserError, run_main
from cascade.pipelines.trained import check_as_trained
from cascade.pipelines.unet import UNetPipeline
from cascade.pipelines.unet_fit import check_unet_fit
from cascade.pipelines.unet_parts import UNetParts
from cascade.pipelines.unet_spec import UNET_DIFFUSION_KEY, UNetSpec
from cascade.tools.convert_unet import write_unet_folder
from stages.autoencoder_kl import AutoencoderKL
from stages.unet.unet import UNet
from train.encode import load_text

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AssembleUNetConfig:
    """Where the trained parts lie, and how the whole is sampled."""

    spec: UNetSpec
    """Becomes ``pipeline.json``."""
    unet: str
    autoencoder: str
    text: str
    """Folder of the text encoder, or of SDXL's first."""
    text_2: str | None = None
    """SDXL's second."""
    beside: dict[str, str] = field(default_factory=dict)
    """Further U-Nets: name in the folder, without its ending -> file. A teacher lies beside its
    student so, and runs with ``sample.py --unet``."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Number format of the weights."""
    max_mb: float | None = None
    """Largest sum of the weight files, in 10^6 bytes."""


def assemble_unet(config: AssembleUNetConfig, out: Path) -> float:
    """Write the model folder, whole or not at all.

    Returns:
        Its weights in 10^6 bytes.

    Raises:
        UserError: A part is missing, is another network's, or does not fit the others; the weights
            are larger than ``max_mb``; the folder is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: not empty; name a new folder")
    spec, dtype = config.spec, getattr(torch, config.dtype)
    unet = find_network(config.unet, "unet")
    _check_sampling(spec, config.unet, unet.opened.metadata)
    autoencoder = find_network(config.autoencoder, "autoencoder_kl")
    text_2 = None
    if config.text_2 is not None:
        text_2 = load_text(config.text_2, spec.text_2)
    parts = UNetParts(
        unet=cast(UNet, build(unet.opened, unet.published, dtype=torch.float32)),
        autoencoder=cast(
            AutoencoderKL, build(autoencoder.opened, autoencoder.published, dtype=torch.float32)
        ),
        text=load_text(config.text, spec.text),
        text_2=text_2,
    )
    check_unet_fit(parts, config.unet)
    spec = replace(spec, told_sizes=parts.unet.config.text_pooled_channels is not None)
    with atomic_folder(out) as temporary:
        notes = {"unet": unet.told, "vae": autoencoder.told}
        written = write_unet_folder(spec, parts, temporary, dtype, notes, theirs=False)
        for notice in written.notices:
            _log.warning("notice: %s", notice)
        for name, source in config.beside.items():
            beside = find_network(source, "unet")
            _check_sampling(spec, source, beside.opened.metadata)
            network = cast(UNet, build(beside.opened, beside.published, dtype=torch.float32))
            check_unet_fit(replace(parts, unet=network), source)
            path = temporary / f"{name}.safetensors"
            save_network(path, network, dtype=dtype, metadata=beside.told)
        total_mb = sum(path.stat().st_size for path in temporary.rglob("*.safetensors")) / 1e6
        if config.max_mb is not None and total_mb > config.max_mb:
            raise UserError(f"the weights are {total_mb:.1f} MB; max_mb allows {config.max_mb:g}")
        UNetPipeline(temporary, device="cpu")
    return total_mb


def _check_sampling(spec: UNetSpec, path: str, metadata: Mapping[str, str]) -> None:
    """Refuse to sample a U-Net in another way than it was trained for."""
    trained = said_in(metadata, UNET_DIFFUSION_KEY, path)
    check_as_trained(spec.sampling, trained, path, "spec.sampling.")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, assemble, say what was written."""
    parser = Parser(prog="python -m train.assemble_unet", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file of the model")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    options, rest = parser.parse_known_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = load_yaml(AssembleUNetConfig, options.config, parse_overrides(rest))
    total_mb = assemble_unet(config, options.out)
    _log.info("wrote %s: %.1f MB of weights", options.out, total_mb)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
