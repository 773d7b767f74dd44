"""What files of LoRAs call their tensors: PEFT's and diffusers' names, and kohya's.

PEFT and diffusers write the path of a layer, ``unet.down_blocks.0.attentions.0.proj_in``, behind it
``.lora_A.weight`` and ``.lora_B.weight``; older diffusers other ends, some of them through the
attention's ``processor``. kohya's scripts write underscores for the path's dots, and of SDXL the
path in the authors' own layout: ``lora_unet_input_blocks_4_1_proj_in.lora_down.weight``. There an
underscore may have been a dot or not, so such a name is looked up among those of the network.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from cascade.text.towers import TEXT_PREFIX

Part = Literal["unet", "text_encoder", "text_encoder_2"]
PARTS: tuple[Part, ...] = ("unet", "text_encoder", "text_encoder_2")
TITLES: Mapping[Part, str] = {
    "unet": "U-Net",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
}
"""A network's name in diffusers' folders and files, and in words."""
Role = Literal["down", "up", "alpha"]
PEFT_PREFIX = "base_model.model."
"""What PEFT itself puts before a network's own paths; diffusers takes it off."""

_KOHYA: Mapping[str, Part] = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_ENDS: tuple[tuple[re.Pattern[str], Role], ...] = (
    (re.compile(r"\.lora_A(\.\w+)?\.weight$"), "down"),
    (re.compile(r"\.lora_B(\.\w+)?\.weight$"), "up"),
    (re.compile(r"(\.lora_|[._]lora\.|\.lora_linear_layer\.)down\.weight$"), "down"),
    (re.compile(r"(\.lora_|[._]lora\.|\.lora_linear_layer\.)up\.weight$"), "up"),
    (re.compile(r"([._]lora)?\.alpha$"), "alpha"),
)
_OTHERS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.(dora_scale|lora_magnitude_vector)"), "a DoRA"),
    (re.compile(r"\.hada_[wt]\d"), "a LoHa"),
    (re.compile(r"\.lokr_[wt]\d"), "a LoKr"),
    (re.compile(r"\.oft_|\.boft_"), "an OFT"),
    (re.compile(r"\.lora_mid\.|\.lora_embedding_"), "a LoRA of another form"),
    (re.compile(r"\.(on_input|ia3_l|vera_lambda)"), "an IA3 or VeRA"),
    (re.compile(r"\.(diff|diff_b|w_norm|b_norm|set_weight)$"), "full differences of weights"),
    (re.compile(r"\.lora_[AB](\.\w+)?\.bias$|\.lora_(up|down)\.bias$"), "a LoRA with biases"),
)
"""Names of what is no plain LoRA, which is told from one by them alone."""
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""What old versions of diffusers called the projections of a text encoder."""


@dataclass(frozen=True)
class Name:
    """What a tensor's name says."""

    part: Part
    layer: str
    """Path of the layer; with underscores in place of dots if ``is_flat``."""
    role: Role
    is_flat: bool = False
    """Whether it is kohya's."""
    is_raw: bool = False
    """Whether it is PEFT's own, without the part, whose alpha stands in another file."""


def other_kind(keys: Iterable[str]) -> tuple[str, str] | None:
    """Return the first name that no plain LoRA has, and what has it; None: there is none."""
    for key in keys:
        for pattern, what in _OTHERS:
            if pattern.search(key):
                return key, what
    return None


def parse(key: str) -> Name | None:
    """Take a tensor's name apart; None: it is no LoRA's."""
    for pattern, role in _ENDS:
        match = pattern.search(key)
        if match is not None:
            return _name(key[: match.start()], role)
    return None


def _name(layer: str, role: Role) -> Name:
    for prefix, part in _KOHYA.items():
        if layer.startswith(prefix):
            return Name(part, layer.removeprefix(prefix), role, is_flat=True)
    is_raw = layer.startswith(PEFT_PREFIX)
    layer = layer.removeprefix(PEFT_PREFIX).replace(".processor.", ".")
    for one in PARTS:
        if layer.startswith(f"{one}."):
            path = layer.removeprefix(f"{one}.").removeprefix(PEFT_PREFIX)
            return Name(one, _modern(one, path), role)
    text = layer.startswith((TEXT_PREFIX, "encoder.layers.", "text_projection"))
    only: Part = "text_encoder" if text else "unet"
    return Name(only, _modern(only, layer), role, is_raw=is_raw)


def _modern(part: Part, path: str) -> str:
    """Return the path of a layer that older versions of diffusers called by another name."""
    before, _, last = path.rpartition(".")
    if part == "unet":
        return f"{path}.0" if last == "to_out" else path
    if last in _OLD_TEXT and before.endswith("self_attn"):
        path = f"{before}.{_OLD_TEXT[last]}"
    return published_path(part, path)


def published_path(part: Part, path: str) -> str:
    """Return the path of a layer as files have it: some versions of transformers leave a part out.

    Args:
        part: The network.
        path: Path within it.
    """
    if part == "unet" or path.startswith((TEXT_PREFIX, "text_projection")):
        return path
    return TEXT_PREFIX + path


def flat(path: str) -> str:
    """Return a path as kohya writes it."""
    return path.replace(".", "_")


def kohya_prefix(part: Part, has_two_texts: bool) -> str:
    """Return what kohya puts before a layer of a network.

    Args:
        part: The network.
        has_two_texts: Whether the model has two text encoders, as SDXL, which numbers them.
    """
    if part == "text_encoder":
        return "lora_te1_" if has_two_texts else "lora_te_"
    return "lora_unet_" if part == "unet" else "lora_te2_"
