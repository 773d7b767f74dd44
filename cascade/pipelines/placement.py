"""Where networks run, and in which number format."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cascade.config import not_among
from cascade.errors import UserError
from cascade.pipelines.spec import CascadeSpec
from stages.int8 import to_int8

_log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ("auto", "cpu", "cuda", "mps")
STABLE_CASCADE = "stable-cascade"
"""Name that Stable Cascade's weights have here, published or converted."""
STAGES = ("stage_c", "stage_b", "stage_a")
"""The networks of a cascade that have a number format of their own."""
UNET_PARTS = ("unet", "autoencoder")
"""The same of a U-Net's pipeline."""

DtypeChoice = str | torch.dtype | Mapping[str, str | torch.dtype]
"""One number format for all stages, or one by stage; those left out are "auto"."""


@dataclass(frozen=True)
class Dtypes:
    """The number format of each stage, and of what runs beside it."""

    stage_c: torch.dtype
    """Stage C, and what reads or writes its latents: the compressor and the previewer."""
    stage_b: torch.dtype
    """Stage B."""
    stage_a: torch.dtype
    """Stage A."""
    text: torch.dtype
    """Published text encoders; a model folder of ours has its own in float32."""

    @classmethod
    def same(cls, dtype: torch.dtype) -> Dtypes:
        """Return one number format for everything."""
        return cls(dtype, dtype, dtype, dtype)

    def of(self, part: str) -> torch.dtype:
        """Return the number format of "stage_c", "compressor", and so on."""
        named = {"stage_b": self.stage_b, "stage_a": self.stage_a, "text": self.text}
        return named.get(part, self.stage_c)

    def __str__(self) -> str:
        """Return the one name, or ``stage_c=...,stage_b=...,stage_a=...``, as ``--dtype`` does."""
        names = {stage: str(self.of(stage)).removeprefix("torch.") for stage in STAGES}
        if len(set(names.values())) == 1:
            return names["stage_c"]
        return ",".join(f"{stage}={name}" for stage, name in names.items())


@dataclass(frozen=True)
class UNetDtypes:
    """The number format of each part of a U-Net's pipeline."""

    unet: torch.dtype
    """The U-Net."""
    autoencoder: torch.dtype
    """Its autoencoder."""
    text: torch.dtype
    """Its text encoders."""

    def __str__(self) -> str:
        """Return the one name, or ``unet=...,autoencoder=...``, as ``--dtype`` does."""
        unet, autoencoder = (
            str(one).removeprefix("torch.") for one in (self.unet, self.autoencoder)
        )
        return unet if unet == autoencoder else f"unet={unet},autoencoder={autoencoder}"


def pick_device(name: str) -> torch.device:
    """Return the device of a name; "auto" takes a GPU if there is one.

    Raises:
        UserError: If there is no such device here.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next((kind for kind, here in available.items() if here), "cpu"))
    kind = name.split(":", 1)[0]
    if kind not in DEVICES[1:]:
        raise not_among("device", name, DEVICES)
    if not available.get(kind, True):
        raise UserError(f"device {name!r}: torch finds none on this machine; use 'auto' or 'cpu'")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r}: {error}") from error
    if kind != "cuda":  # there is one; weights files know it by its plain name
        if device.index:
            raise UserError(f"device {name!r}: there is one {kind}; name it {kind!r}")
        return torch.device(kind)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UserError(f"device {name!r}: this machine has {torch.cuda.device_count()} GPUs")
    return device


def computes_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16, or an easy way around them.

    Elsewhere it is computed in software: on an AMD EPYC without AVX-512 a product and its gradients
    took 27 to 59 times as long as in float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(False)
    if device.type == "cpu":
        is_there = torch.backends.mkldnn.is_available()
        return is_there and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True


def pick_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the number format of a name.

    "auto" is bfloat16 on GPUs that compute in it and float32 elsewhere: never float16, which
    overflows in the published Stage C. A warning tells of bfloat16 that is computed in software.

    Raises:
        UserError: For a name that is none.
    """
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    if name == "auto":
        on_gpu = device.type == "cuda" and computes_bfloat16(device)
        return torch.bfloat16 if on_gpu else torch.float32
    if name not in DTYPES:
        raise not_among("dtype", name, ("auto", *DTYPES))
    if name == "bfloat16" and not computes_bfloat16(device):
        _tell_of_software(device.type)
    return DTYPES[name]


@functools.cache
def _tell_of_software(device: str) -> None:
    """Warn, once."""
    _log.warning(
        "this %s has no instructions for bfloat16 and computes it in software, many times slower "
        "than float32",
        "CPU" if device == "cpu" else "GPU",
    )


def pick_dtypes(choice: DtypeChoice, device: torch.device) -> Dtypes:
    """Return the number format of every stage.

    Args:
        choice: One for all stages; or ``stage_c=bfloat16,stage_b=float32``, or the same as a
            mapping, where stages that are left out are "auto".
        device: Where the stages compute. On a CPU text encoders stay in float32; elsewhere they
            have Stage C's format.

    Raises:
        UserError: For a stage or a format that there is not.
    """
    by_stage = pick_by_part(choice, device, STAGES)
    text = torch.float32 if device.type == "cpu" else by_stage["stage_c"]
    return Dtypes(**by_stage, text=text)


def round_weights(network: nn.Module, title: str) -> None:
    """Round a network's linear layers to int8.

    Raises:
        UserError: It has none that are large enough.
    """
    if to_int8(network) <= 0:
        raise UserError(f"int8: {title} has no linear layers large enough to gain; leave it out")


def format_said(dtypes: Dtypes | UNetDtypes, int8: bool) -> str:
    """Return what a picture says of the formats that it was computed in."""
    return f"{dtypes}; linear weights int8" if int8 else str(dtypes)


def check_dtype(choice: DtypeChoice, device: torch.device) -> None:
    """Refuse what neither a cascade nor a U-Net's pipeline takes, before it is known which it is.

    Raises:
        UserError: For a part or a format that there is not.
    """
    if isinstance(choice, str) and any(part in choice for part in UNET_PARTS):
        pick_unet_dtypes(choice, device)
    else:
        pick_dtypes(choice, device)


def pick_unet_dtypes(
    choice: DtypeChoice, device: torch.device, *, autoencoder_in_float16: bool = True
) -> tuple[UNetDtypes, list[str]]:
    """Return the number format of every part of a U-Net's pipeline, and what to tell of it.

    Args:
        choice: As of ``pick_dtypes``, of the parts "unet" and "autoencoder".
        device: Where they compute. On a CPU text encoders stay in float32; elsewhere they have the
            U-Net's format.
        autoencoder_in_float16: Whether the autoencoder does not overflow in float16; else it runs
            in float32 there, unless its own format was named.

    Raises:
        UserError: For a part or a format that there is not.
    """
    by_part = pick_by_part(choice, device, UNET_PARTS)
    named = isinstance(choice, Mapping) or (isinstance(choice, str) and "=" in choice)
    named = named and "autoencoder" in choice  # type: ignore[operator]
    notices = []
    if by_part["autoencoder"] == torch.float16 and not autoencoder_in_float16 and not named:
        by_part["autoencoder"] = torch.float32
        notices.append(
            "the autoencoder runs in float32: SDXL's overflows in float16, and pictures turn black"
        )
    text = torch.float32 if device.type == "cpu" else by_part["unet"]
    return UNetDtypes(**by_part, text=text), notices


def pick_by_part(
    choice: DtypeChoice, device: torch.device, parts: Sequence[str]
) -> dict[str, torch.dtype]:
    """Return the number format of every part of a model; see ``pick_dtypes``.

    Raises:
        UserError: For a part or a format that there is not.
    """
    if isinstance(choice, str) and "=" in choice:
        choice = _parse_by_part(choice, parts)
    if not isinstance(choice, Mapping):
        return dict.fromkeys(parts, pick_dtype(choice, device))
    for name in choice:
        if name not in parts:
            raise not_among("dtype of", name, parts)
    return {part: pick_dtype(choice.get(part, "auto"), device) for part in parts}


def _parse_by_part(text: str, parts: Sequence[str]) -> dict[str, str]:
    """Parse ``stage_c=bfloat16,stage_b=float32``."""
    named: dict[str, str] = {}
    for piece in text.split(","):
        part, equals, name = (word.strip() for word in piece.partition("="))
        if not equals or not name or part in named:
            wrong = f"no stage for {part!r}"
            if equals:
                wrong = f"{part} comes twice" if name else f"no format for {part!r}"
            example = f"{parts[0]}=bfloat16,{parts[1]}=float32"
            raise UserError(f"dtype {text!r}: {wrong}; write one format, or {example}")
        named[part] = name
    return named


def refuse_overflow(spec: CascadeSpec, dtypes: Dtypes, folder: Path) -> None:
    """Refuse float16 for the Stage C that is known to overflow in it: Stable Cascade's.

    Stage B and Stage A of the same model run in it.

    Raises:
        UserError: With the reason.
    """
    if spec.name == STABLE_CASCADE and dtypes.stage_c == torch.float16:
        raise UserError(
            f"{folder}: Stable Cascade's Stage C overflows in float16 (its makers say so, and "
            "pictures come out black); take bfloat16 or float32 for stage_c"
        )
