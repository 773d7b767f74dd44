"""A protocol: everything that a figure depends on beside the model, in one file, with a hash.

The hash is over the file's content and over what it stands for: the prompts that were read, the
reference pictures, the weights of the measuring networks, and the versions of the metrics' code.
Figures of unlike hashes are not compared; the message names the key that differs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cascade.config import load_yaml, to_dict
from cascade.errors import UserError
from cascade.evaluate.features import NetworkKind
from cascade.evaluate.picture_sets import Format
from cascade.evaluate.prompts import (
    Prompt,
    checked,
    draw,
    hash_of,
    inline_prompts,
    prompts_hash,
    read_prompts,
)
from cascade.evaluate.resize import Filter

Metric = Literal[
    "frechet",
    "kernel",
    "precision_recall",
    "mmd",
    "clip_score",
    "retrieval",
    "attributes",
    "psnr",
    "ssim",
    "lpips",
]
VERSIONS: Mapping[str, int] = {
    "frechet": 2,
    "kernel": 2,
    "precision_recall": 1,
    "mmd": 1,
    "clip_score": 1,
    "retrieval": 1,
    "attributes": 1,
    "psnr": 1,
    "ssim": 1,
    "lpips": 1,
}
"""Of the code of each metric; a change of its figures raises the number and so the hash."""
SSIM_WINDOW = 11
"""Pixels of a side that SSIM looks at together."""
PAIRED: frozenset[str] = frozenset({"psnr", "ssim", "lpips"})
"""Metrics of a picture and its original: the reference holds a picture of each key."""
PROMPTED: frozenset[str] = frozenset({"clip_score", "retrieval", "attributes"})
ASKING: frozenset[str] = frozenset({"retrieval", "attributes"})
"""Metrics that read what a prompt asks for beside its text."""
BY_FEATURES: frozenset[str] = frozenset({"frechet", "kernel", "precision_recall"})
"""Metrics on the feature network; ``mmd`` and the prompted ones are on the CLIP."""
REFERRED: frozenset[str] = BY_FEATURES | PAIRED | {"mmd"}
"""Metrics that need reference pictures."""
DIGITS = 12


@dataclass(frozen=True)
class PromptSource:
    """Where the prompts are from; a file or folder is an argument of the command."""

    inline: tuple[str, ...] = ()
    """The prompts themselves; empty: they come from a file or from shards."""
    sha256: str | None = None
    """What their hash must be; None: any. The hash goes into the figures in either case."""
    count: int | None = None
    """Prompts drawn from the list; None: all."""
    draw_seed: int = 0
    """Ranks the prompts for the draw, together with their keys."""

    def __post_init__(self) -> None:
        """Refuse a draw of nothing."""
        if self.count is not None and self.count < 1:
            raise ValueError(f"count is {self.count}; at least 1 prompt is needed")


@dataclass(frozen=True)
class CascadeSampling:
    """How a cascade makes the pictures; None is the model's own value."""

    steps_c: int | None = None
    steps_b: int | None = None
    guidance_c: float | None = None
    guidance_b: float | None = None
    sampler: str | None = None


@dataclass(frozen=True)
class UNetSampling:
    """How a U-Net makes the pictures; None is the model's own value."""

    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    spacing: str | None = None


@dataclass(frozen=True)
class Yardstick:
    """A network that measures; its files are an argument of the command."""

    kind: NetworkKind
    name: str
    """What figures call it."""
    weights: str | None = None
    """First hex digits of its weights' hash; None: whatever the user gives."""

    def check(self, weights: str, where: str) -> None:
        """Refuse weights that are not those of the protocol.

        Raises:
            UserError: If the hash is another.
        """
        if self.weights is not None and not weights.startswith(self.weights):
            raise UserError(
                f"{where}: its weights have the hash {weights}, but the protocol measures with "
                f"{self.name}, {self.weights}"
            )


@dataclass(frozen=True)
class Attribute:
    """Something that prompts ask for, and how a CLIP is asked for each of its values."""

    field: str
    """Name of the attribute among those of a prompt."""
    phrases: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Wordings for each value, with the prompt's attributes in braces. Empty: the prompt itself,
    with each other value that prompts of the list ask for in place of its own."""


@dataclass(frozen=True)
class Protocol:
    """Everything that a figure depends on beside the model."""

    name: str
    """What people call it; not in the hash."""
    prompts: PromptSource
    metrics: tuple[Metric, ...]
    generated_size: int
    """Side of the pictures as they are made, in pixels."""
    size: int
    """Side that generated and real pictures are brought to, and measured at."""
    clip: Yardstick
    """Measures CLIP score, retrieval, attributes and MMD."""
    features: Yardstick
    """Measures Frechet and kernel distance, precision and recall."""
    resize: Filter = "bicubic"
    """Filter of every resize, antialiased; a CLIP's own last resize is that of its folder."""
    crop: Literal["centre_square"] = "centre_square"
    """What becomes of reference pictures that are not square."""
    picture_format: Format = "png"
    """Of the generated pictures' files; pictures in memory are as those of PNG."""
    real_format: Format = "any"
    """Of the reference pictures' files."""
    weights: Literal["raw", "ema"] = "ema"
    """Which weights of the model make the pictures."""
    negative_prompt: str = ""
    seed: int = 0
    """With a prompt's key the seed of its picture, and the source of all draws of the metrics."""
    cascade: CascadeSampling = CascadeSampling()
    unet: UNetSampling = UNetSampling()
    sampling: Literal["same", "own"] = "same"
    """What ``cascade`` and ``unet`` leave to the models. "same": whatever that is, it must be the
    same for all models of a kind, or their figures do not share a table. "own": each as it says of
    itself, such as a model of four steps beside one of twenty."""
    kernel_subsets: int = 100
    kernel_subset_size: int = 1000
    neighbours: int = 3
    """The k of precision and recall."""
    candidates: int = 100
    """Prompts that retrieval chooses among."""
    resamples: int = 20
    """Of the pictures, for the spread of Frechet, kernel and CMMD's distance; 0: none is told."""
    attributes: tuple[Attribute, ...] = ()
    perceptual: Literal["lpips_alex", "lpips_vgg", "clip"] = "clip"
    """What "lpips" measures with; "clip" is no LPIPS, and its figures say so."""
    perceptual_weights: str | None = None
    """First hex digits of the hash of LPIPS' trunk."""

    def __post_init__(self) -> None:
        """Refuse what measures nothing."""
        if not self.metrics:
            raise ValueError("metrics is empty; name at least one")
        for name in ("generated_size", "size", "kernel_subsets", "neighbours"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.kernel_subset_size < 2 or self.candidates < 2 or self.resamples in (1,):
            raise ValueError("kernel_subset_size, candidates and resamples must be at least 2")
        if "ssim" in self.metrics and self.size < SSIM_WINDOW:
            raise ValueError(f"size is {self.size}; ssim needs {SSIM_WINDOW} pixels at the least")
        if self.resamples < 0 or self.seed < 0:
            raise ValueError("resamples and seed must not be negative")
        if self.clip.kind != "clip":
            raise ValueError(f"clip.kind is {self.clip.kind!r}; a CLIP is needed there")
        if "attributes" in self.metrics and not self.attributes:
            raise ValueError("metrics asks for attributes, but attributes names none")

    def read_prompts(self, path: Path | None) -> list[Prompt]:
        """Return the prompts, drawn and checked.

        Args:
            path: The file or folder of shards; None where the protocol holds them itself.

        Raises:
            UserError: If they are missing, broken, too few, or not those of the protocol.
        """
        source = self.prompts
        if source.inline:
            if path is not None:
                raise UserError(f"{path}: the protocol {self.name} holds its prompts itself")
            prompts, where = checked(inline_prompts(source.inline), self.name), self.name
        elif path is None:
            raise UserError(
                f"the protocol {self.name} takes its prompts from a file or from shards: --prompts"
            )
        else:
            prompts, where = read_prompts(path), str(path)
        prompts = draw(prompts, source.count, source.draw_seed, where)
        found = prompts_hash(prompts)
        if source.sha256 is not None and not found.startswith(source.sha256):
            raise UserError(
                f"{where}: the prompts have the hash {found[:DIGITS]}, but the protocol "
                f"{self.name} asks those of {source.sha256[:DIGITS]}"
            )
        return prompts


def load_protocol(path: str | Path, overrides: Sequence[str] = ()) -> Protocol:
    """Read a protocol from a YAML file.

    Raises:
        UserError: For an unknown key, naming the nearest, and for a value that is none.
    """
    return load_yaml(Protocol, path, overrides)


@dataclass(frozen=True)
class Resolved:
    """A protocol with what it stands for: the content of the hash."""

    protocol: Protocol
    prompts_sha256: str
    attributes_sha256: str | None
    """Of what the prompts ask for, where a metric reads it."""
    num_prompts: int
    reference: str | None
    """Fingerprint of the reference pictures as they are measured; None without any."""
    num_reference: int
    features_weights: str | None
    clip_weights: str | None
    perceptual_weights: str | None

    def content(self) -> dict[str, object]:
        """Return everything that the hash is over, as plain values."""
        protocol = to_dict(self.protocol)
        name_free = {key: value for key, value in protocol.items() if key != "name"}
        # The texts are in the hash of the prompts; a result's line need not carry them.
        name_free["prompts"] = {
            "sha256": self.prompts_sha256,
            "attributes": self.attributes_sha256,
            "count": self.num_prompts,
        }
        return {
            **name_free,
            "reference": {"fingerprint": self.reference, "count": self.num_reference},
            "loaded": {
                "features": self.features_weights,
                "clip": self.clip_weights,
                "perceptual": self.perceptual_weights,
            },
            "versions": {name: VERSIONS[name] for name in sorted(self.protocol.metrics)},
        }

    @property
    def hash(self) -> str:
        """The protocol's hash, 12 hex digits of the SHA-256 of its canonical JSON."""
        return content_hash(self.content())


def content_hash(content: Mapping[str, object]) -> str:
    """Return 12 hex digits of the SHA-256 over plain values as canonical JSON."""
    return hash_of(canonical(content))[:DIGITS]


def canonical(content: object) -> str:
    """Return plain values as JSON in one form: sorted keys, no spaces, ASCII."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def flat(content: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return nested values under dotted keys."""
    found: dict[str, object] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


@dataclass(frozen=True)
class Difference:
    """A key in which two protocols differ."""

    key: str
    first: object
    second: object

    def __str__(self) -> str:
        """Name the key and both values."""
        return f"{self.key} is {_short(self.first)} and {_short(self.second)}"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({hash_of(text)[:6]})"


def differences(first: Mapping[str, object], second: Mapping[str, object]) -> list[Difference]:
    """Return the keys in which two protocols' contents differ, in order."""
    a, b = flat(first), flat(second)
    keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    return [Difference(key, a.get(key), b.get(key)) for key in keys]
