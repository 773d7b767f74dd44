"""A Stage C on an autoencoder's latents as a model: ``python -m train.assemble_latent --config F``.

Checks that the parts fit and that Stage C is sampled as it was trained; writes the folder whole or
not at all, and loads it once.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cascade.checkpoints.files import atomic_folder, load_network, read_metadata, save_network
from cascade.checkpoints.part_files import find_network
from cascade.command import Parser
from cascade.config import load_yaml, parse_overrides
from cascade.errors import UserError, run_main
from cascade.pipelines.latent import LatentPipeline, LatentSpec, save_latent_spec
from cascade.pipelines.trained import check_as_trained, trained_stage
from stages.stage_c import StageC
from train.assemble import text_sources
from train.encode import load_frozen

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AssembleLatentConfig:
    """Where the trained parts lie, and how the whole is sampled."""

    spec: LatentSpec
    """Becomes ``latent.json``."""
    stage_c: str
    autoencoder_kl: str
    """A file, a folder, or a model here or on the hub: written in float32."""
    text: str
    """Folder of the text encoder."""


def assemble_latent(config: AssembleLatentConfig, out: Path) -> None:
    """Write the model folder, whole or not at all.

    Raises:
        UserError: A part is missing, is another network's, or does not fit the others; the folder
            is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: not empty; name a new folder")
    sources = {"stage_c.safetensors": Path(config.stage_c)}
    sources |= text_sources(config.text)
    for path in sources.values():
        if not path.is_file():
            raise UserError(f"{path}: not there; train it first")
    load_network(config.stage_c, expect=StageC)
    autoencoder = find_network(config.autoencoder_kl, "autoencoder_kl")
    trained = trained_stage(read_metadata(config.stage_c), config.stage_c)
    check_as_trained(config.spec.stage_c, trained, config.stage_c, "spec.stage_c.")
    with atomic_folder(out) as temporary:
        (temporary / "text").mkdir()
        for name, path in sources.items():
            shutil.copyfile(path, temporary / name)
        network = load_frozen(autoencoder, "cpu")
        path = temporary / "autoencoder_kl.safetensors"
        save_network(path, network, metadata=autoencoder.told)
        save_latent_spec(config.spec, temporary)
        try:
            LatentPipeline(temporary, device="cpu")
        except UserError as error:
            raise UserError(_by_the_config(str(error), temporary, config)) from error


def _by_the_config(message: str, folder: Path, config: AssembleLatentConfig) -> str:
    """Return what is wrong with the parts in a folder by the configuration's names of them."""
    parts = {
        "latent.json": "spec",
        "stage_c.safetensors": f"stage_c {config.stage_c}",
        "autoencoder_kl.safetensors": f"autoencoder_kl {config.autoencoder_kl}",
        "text": f"text {config.text}",
    }
    for name, key in parts.items():
        message = message.replace(str(folder / name), key)
    together = ", ".join(key for key in parts.values() if key != "spec")
    return message.replace(str(folder), together)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, assemble, say what was written."""
    parser = Parser(prog="python -m train.assemble_latent", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file of the model")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    options, rest = parser.parse_known_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = load_yaml(AssembleLatentConfig, options.config, parse_overrides(rest))
    assemble_latent(config, options.out)
    _log.info("wrote %s", options.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
