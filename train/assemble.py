"""Put trained networks together: ``python -m train.assemble --config configs/demo/model.yaml``.

Checks every file, that the parts were trained on each other, and that the model folder loads;
then copies them into the model folder, each file whole or not at all.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from cascade.checkpoints.files import atomic_path, load_network, read_metadata
from cascade.checkpoints.hub import is_hub_name
from cascade.checkpoints.part_files import find_text
from cascade.checkpoints.said import said_in
from cascade.command import Parser
from cascade.config import from_dict, load_yaml, parse_overrides
from cascade.errors import UserError, run_main
from cascade.pipelines.cascade import CascadePipeline
from cascade.pipelines.few_steps import DISTILLED_KEY, as_distilled
from cascade.pipelines.parts import open_source
from cascade.pipelines.spec import (
    FAST_DECODER_FILE,
    FEW_STEPS,
    CascadeSpec,
    StageSampling,
    save_spec,
)
from cascade.pipelines.trained import DIFFUSION_KEY, check_as_trained, trained_stage
from stages.previewer import Previewer
from stages.semantic_compressor import SemanticCompressor
from stages.stage_a import StageA
from stages.stage_a_fast import StageAFast
from stages.stage_b import StageB
from stages.stage_c import StageC

_log = logging.getLogger(__name__)

NETWORKS: dict[str, type[nn.Module]] = {
    "stage_a": StageA,
    "stage_b": StageB,
    "stage_c": StageC,
    "compressor": SemanticCompressor,
    "previewer": Previewer,
}
TEXT_FILES = (
    "config.json",
    "model.safetensors",
    "preprocessor.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""What ``python -m train clip`` exports."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
"""Of a tokenizer on the hub, as far as it has them."""


@dataclass(frozen=True)
class AssembleConfig:
    """Where the trained parts lie, and how the whole is sampled."""

    spec: CascadeSpec
    """Becomes ``model.json``."""
    text: str
    """Folder of the text encoder, or a model on the hub that has one."""
    stage_a: str
    stage_b: str
    stage_c: str
    compressor: str
    previewer: str | None = None
    """Makes previews of Stage C's latents; null: the model has none."""
    stage_a_fast: str | None = None
    """Small decoder of Stage A's latents, for ``--fast-decoder``; null: the model has none."""
    stage_b_few: str | None = None
    """A second Stage B, for few steps, from ``python -m train step_distil``; its file says how it
    is sampled, so that ``spec`` need not."""
    stage_c_few: str | None = None
    """The same of Stage C."""
    max_mb: float | None = None
    """Largest sum of the weight files, in 10^6 bytes."""


def assemble(config: AssembleConfig, out: Path) -> float:
    """Write the model folder and load it once.

    Returns:
        Its weights in 10^6 bytes.

    Raises:
        UserError: A part is missing, is another network's, or does not fit the others; the weights
            are larger than ``max_mb``.
    """
    config = _with_few(config)
    networks = dict(NETWORKS)
    if config.previewer is None:
        del networks["previewer"]
    for name in FEW_STEPS:
        if getattr(config, name) is not None:
            networks[name] = NETWORKS[name.removesuffix("_few")]
    sources = {f"{name}.safetensors": Path(getattr(config, name)) for name in networks}
    for name, network in networks.items():
        load_network(getattr(config, name), expect=network)
    if config.stage_a_fast is not None:
        load_network(config.stage_a_fast, expect=StageAFast)
        sources[FAST_DECODER_FILE] = Path(config.stage_a_fast)
    _check_sampling(config)
    sources |= text_sources(config.text)
    for path in sources.values():
        if not path.is_file():
            raise UserError(f"{path}: not there; train it first")
    total_mb = sum(p.stat().st_size for p in sources.values() if p.suffix == ".safetensors") / 1e6
    if config.max_mb is not None and total_mb > config.max_mb:
        raise UserError(f"the weights are {total_mb:.1f} MB; max_mb allows {config.max_mb:g}")
    (out / "text").mkdir(parents=True, exist_ok=True)
    for name, path in sources.items():
        with atomic_path(out / name) as temporary:
            shutil.copyfile(path, temporary)
    save_spec(config.spec, out)
    pipeline = CascadePipeline.from_folder(out, device="cpu")
    _ = pipeline.compressor  # loaded on first use: here, to check it
    if config.previewer is not None:
        _ = pipeline.previewer
    pipeline.use(frozenset())  # the plain networks, where those for few steps run by themselves
    if config.stage_a_fast is not None:
        CascadePipeline(open_source(out, fast_decoder=True), device="cpu")
    return total_mb


def text_sources(name: str) -> dict[str, Path]:
    """Return the files of a text encoder and its tokenizer by their names in a model folder.

    Args:
        name: A folder that ``python -m train clip`` has written, or a model on the hub.
    """
    if not is_hub_name(name):
        return {f"text/{file}": Path(name) / file for file in TEXT_FILES}
    found = find_text(name)
    files = [found.folder / file for file in ("config.json", "model.safetensors")]
    files += [path for file in _TOKENIZER_FILES if (path := found.tokenizer / file).is_file()]
    return {f"text/{path.name}": path for path in files}


def _with_few(config: AssembleConfig) -> AssembleConfig:
    """Take over what the files of networks for few steps say of their sampling."""
    spec = config.spec
    for name in FEW_STEPS:
        path: str | None = getattr(config, name)
        said: StageSampling | None = getattr(spec, name)
        if path is None and said is not None:
            raise UserError(f"spec.{name} is there but {name} is not; name the network's file")
        if path is None or said is not None:
            continue
        sampling = sampling_said(path)
        if sampling is None or sampling.max_steps is None:
            raise UserError(
                f"{name} {path}: it does not say for how many steps it is; train it with: python "
                f"-m train step_distil, or give spec.{name}"
            )
        few: dict[str, Any] = {name: sampling}
        spec = replace(spec, **few)
    return replace(config, spec=spec)


def sampling_said(path: str) -> StageSampling | None:
    """Return how a distilled network's file says that it is sampled; None: it does not say."""
    metadata = read_metadata(path)
    if DISTILLED_KEY not in metadata:
        return None
    trained = from_dict(StageSampling, said_in(metadata, DIFFUSION_KEY, path), path)
    return as_distilled(trained, metadata, path)


def _check_sampling(config: AssembleConfig) -> None:
    """Refuse to sample a stage in another way than it was trained for."""
    for stage in ("stage_b", "stage_c", *FEW_STEPS):
        path: str | None = getattr(config, stage)
        if path is None:
            continue
        trained = trained_stage(read_metadata(path), path)
        check_as_trained(getattr(config.spec, stage), trained, path, f"spec.{stage}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, assemble, say what was written."""
    parser = Parser(prog="python -m train.assemble", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file of the model")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    options, rest = parser.parse_known_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = load_yaml(AssembleConfig, options.config, parse_overrides(rest))
    total_mb = assemble(config, options.out)
    _log.info("wrote %s: %.1f MB of weights", options.out, total_mb)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
