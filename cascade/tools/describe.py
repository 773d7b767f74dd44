"""Says what files of weights are: stage, generation, layout, sizes, origin, licence."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from cascade.checkpoints.detect import Published
from cascade.checkpoints.detect_unet import autoencoder_kl_layout
from cascade.checkpoints.files import CLASS_KEY
from cascade.checkpoints.load import build, identify
from cascade.checkpoints.readers import Opened, is_entry, open_weights, read_json
from cascade.checkpoints.said import said_in
from cascade.errors import UserError
from cascade.pipelines.spec import CONVERTED_SPEC_FILE, SPEC_FILE, CascadeSpec, load_spec
from cascade.pipelines.unet_files import written_in
from cascade.pipelines.unet_published import advice_for
from cascade.pipelines.unet_spec import (
    UNET_SPEC_FILE,
    UNET_TEACHER_KEY,
    UNetSpec,
    learned_prediction,
    load_unet_spec,
)
from cascade.tools.average import AVERAGE_KEY
from stages.autoencoder_kl import AutoencoderKLConfig
from stages.semantic_compressor import CompressorConfig
from stages.stage_a import StageAConfig

LICENCES = {
    "v2": "MIT (Würstchen v2)",
    "v3": "Stability AI's non-commercial community licence (Stable Cascade)",
}
"""Licences of the published weights, by generation."""

# Sizes that tell published weights from ones trained elsewhere: parameters -> name on the hub.
_PUBLISHED = {
    18_406_894: "Paella VQGAN f4, of Würstchen and of Stable Cascade",
    20_198_000: "dome272/wuerstchen, inside model_v2_stage_b.pt",
    20_197_968: "stabilityai/stable-cascade, effnet_encoder",
    993_636_896: "warp-ai/wuerstchen-prior",
    1_055_365_280: "warp-ai/wuerstchen",
    3_589_103_632: "stabilityai/stable-cascade, stage_c",
    1_030_785_040: "stabilityai/stable-cascade, stage_c_lite",
    1_562_941_136: "stabilityai/stable-cascade, stage_b",
    699_471_248: "stabilityai/stable-cascade, stage_b_lite",
    3_979_651: "stabilityai/stable-cascade, previewer",
    54_255_776: "stabilityai/stable-cascade, controlnet/canny",
    54_256_424: "stabilityai/stable-cascade, controlnet/inpainting",
    203_491_584: "stabilityai/stable-cascade, controlnet/super_resolution",
}


_NO_LICENCE = "unknown; ask whoever gave it to you"
_SIZES = (
    "channels",
    "blocks",
    "heads",
    "repeats",
    "size",
    "depths",
    "depth",
    "layers",
    "window",
    "activation",
    "scale",
)
_TITLES = {
    "stage_a": "Stage A",
    "stage_a_fast": "fast decoder of Stage A",
    "stage_b": "Stage B",
    "stage_c": "Stage C",
    "unet": "U-Net",
    "autoencoder_kl": "AutoencoderKL",
    "text_encoder": "text encoder",
}


@dataclass(frozen=True)
class Description:
    """What one network's weights are."""

    where: str
    network: str
    layout: str
    sizes: str
    compression: str
    parameters: int
    """Learned values; buffers of norms not counted."""
    dtypes: str
    """Number formats with the share of values in each."""
    megabytes: float
    """Of 10^6 bytes."""
    origin: str
    licence: str
    predicts: str = ""
    """What a U-Net that was trained or cut here outputs; empty if its file does not say."""
    problem: str = ""
    """Why it can't be loaded; empty if it can."""

    def lines(self) -> Iterator[str]:
        """Yield the description, a line a fact."""
        yield f"{self.where}"
        yield f"  network     {self.network}"
        yield f"  layout      {self.layout}"
        yield f"  parameters  {self.parameters:,} ({self.megabytes:,.1f} MB, {self.dtypes})"
        yield f"  sizes       {self.sizes}"
        if self.compression:
            yield f"  compression {self.compression}"
        if self.predicts:
            yield f"  predicts    {self.predicts}"
        yield f"  origin      {self.origin}"
        yield f"  licence     {self.licence}"
        if self.problem:
            yield f"  incomplete  {self.problem}"


def describe_path(path: Path) -> list[Description]:
    """Describe a file, a folder of one network, or every network under a model folder.

    Raises:
        UserError: If nothing there is a network of a cascade.
    """
    if not path.is_dir():
        return [_describe(opened) for opened in open_weights(path)]
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and not file.name.startswith(".") and is_entry(file)
    ]
    described: list[Description] = []
    passed_over: list[str] = []
    for file in files:
        try:
            described += [_describe(opened) for opened in open_weights(file)]
        except UserError as error:
            passed_over.append(str(error))
    if not described:
        reason = passed_over[0] if passed_over else f"{path}: no weights in it"
        raise UserError(reason)
    return described


def _describe(opened: Opened) -> Description:
    config = Path(opened.where).parent / "config.json"
    if config.is_file() and str(read_json(config).get("model_type", "")).startswith("clip"):
        return _describe_clip(opened, read_json(config))
    published, unknown = _identified(opened)
    parameters = count_parameters(opened.tensors)
    origin = "trained with Cascade" if opened.metadata.get("train_steps") else "unknown"
    if AVERAGE_KEY in opened.metadata:
        origin = f"an average: {opened.metadata[AVERAGE_KEY]}"
    licence = _NO_LICENCE
    known = _PUBLISHED.get(parameters)
    if known is not None:
        sizes = f"the published sizes: {known}"
        origin = f"{origin}; {sizes}" if AVERAGE_KEY in opened.metadata else sizes
        licence = LICENCES.get(published.generation or "", "MIT (code and weights of Würstchen)")
    if published.kind == "unet" and (advice := advice_for(published.config, opened.where)):
        origin = f"the published shape: {advice.title}"
        licence = advice.licence or licence
    if UNET_TEACHER_KEY in opened.metadata:
        teacher = said_in(opened.metadata, UNET_TEACHER_KEY, opened.where)
        name, weights = (teacher.get(key, "unknown") for key in ("name", "weights_hash"))
        cut = f"a student of {name} (weights {weights})"
        origin = cut if origin == "unknown" else f"{cut}, {origin}"
    spec = _spec_of(opened)
    if spec is not None:
        origin = spec.name if origin == "unknown" else f"{spec.name}, {origin}"
        licence = spec.licence or licence
    generation = "" if published.generation is None else f", {published.generation}"
    return Description(
        where=opened.where,
        network=_TITLES.get(published.kind, published.kind) + generation,
        layout=published.layout,
        sizes=_sizes(published.config),
        compression=_compression(published.config),
        parameters=parameters,
        dtypes=_dtypes(opened.tensors),
        megabytes=sum(one.num_bytes for one in opened.tensors.stored.values()) / 1e6,
        origin=origin,
        licence=licence,
        predicts=learned_prediction(opened.metadata, opened.where) or "",
        problem=_problem(opened, published) or unknown,
    )


def _identified(opened: Opened) -> tuple[Published, str]:
    """Tell what the tensors are, and what nobody tells of them: an autoencoder's scale."""
    is_kl = autoencoder_kl_layout(opened.shapes) is not None
    if not is_kl or opened.declared or CLASS_KEY in opened.metadata:
        return identify(opened), ""
    opened.declared["scaling_factor"] = AutoencoderKLConfig.sd().scale
    published = identify(opened)
    where = "no tensor tells its scale"
    scales = f"{AutoencoderKLConfig.sd().scale} for SD, {AutoencoderKLConfig.sdxl().scale} for SDXL"
    return published, f"{where}, which a config.json beside it would: {scales}"


def _spec_of(opened: Opened) -> CascadeSpec | UNetSpec | None:
    """Return the settings of the model that weights belong to: in their file, or near it."""
    if (written := written_in(opened)) is not None:
        return written
    folders = list(Path(opened.where).absolute().parents)[:3]
    for depth, folder in enumerate(folders):
        names = (SPEC_FILE, CONVERTED_SPEC_FILE) if depth < 2 else (CONVERTED_SPEC_FILE,)
        for name in names:
            if (folder / name).is_file():
                return load_spec(folder, name)
        if depth == 1 and (folder / UNET_SPEC_FILE).is_file():
            return load_unet_spec(folder)
    return None


def _problem(opened: Opened, published: Published) -> str:
    """Say why the tensors make no whole network; none of them is read."""
    try:
        build(opened, published, device="meta")
    except UserError as error:
        return str(error).removeprefix(f"{opened.where}: ")
    return ""


def _describe_clip(opened: Opened, config: Mapping[str, Any]) -> Description:
    """Describe a folder of transformers: CLIP's text tower, its picture tower, or both."""
    kinds = {"clip_text_model": "text encoder", "clip_vision_model": "image encoder"}
    network = kinds.get(str(config["model_type"]), "CLIP: text and image encoder")
    towers = [config.get(f"{name}_config", config) for name in ("text", "vision")]
    towers = towers[:1] if towers[0] is towers[1] else towers
    sizes = [
        f"{name} {tower[name]}"
        for tower in towers
        for name in ("hidden_size", "num_hidden_layers", "max_position_embeddings", "image_size")
        if name in tower
    ]
    spec = _spec_of(opened)
    return Description(
        where=opened.where,
        network=network,
        layout="transformers",
        sizes=", ".join(sizes) or "see its config.json",
        compression="",
        parameters=count_parameters(opened.tensors),
        dtypes=_dtypes(opened.tensors),
        megabytes=sum(one.num_bytes for one in opened.tensors.stored.values()) / 1e6,
        origin="unknown" if spec is None else spec.name,
        licence=(spec.licence if spec is not None else "") or _NO_LICENCE,
    )


def count_parameters(tensors: Mapping[str, Tensor]) -> int:
    """Return the number of learned values: all but the statistics of batch norms."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return sum(t.numel() for name, t in tensors.items() if not name.endswith(statistics))


def _dtypes(tensors: Mapping[str, Tensor]) -> str:
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    total = max(1, sum(counts.values()))
    shares = [
        name if count == total else f"{name} {100 * count / total:.3g} %"
        for name, count in counts.most_common()
        if count > total / 1000 or len(counts) == 1
    ]
    return ", ".join(shares)


def _sizes(config: Any) -> str:
    """Return the sizes that are not the defaults of a published network, or all main ones."""
    shown = [
        (field.name, getattr(config, field.name))
        for field in fields(config)
        if field.name.endswith(_SIZES)
    ]
    return ", ".join(f"{name} {_short(value)}" for name, value in shown)


def _short(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    nested = any(isinstance(part, tuple) for part in value)
    return (" " if nested else "/").join(_short(part) for part in value)


def _compression(config: Any) -> str:
    if isinstance(config, (StageAConfig, AutoencoderKLConfig)):
        return f"{config.downscale} pixels a latent cell along each side"
    if isinstance(config, CompressorConfig):
        side = 2 * math.prod(stage.stride for stage in config.stages) / config.input_fraction
        values = 3 * side**2 / config.latent_channels
        return f"{side:.2f} pixels a latent cell along each side, {values:.0f} values into one"
    return ""
