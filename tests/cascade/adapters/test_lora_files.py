"""Files of LoRAs by everybody's names: what is read, written and refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cascade.adapters.lora import TEXT_TARGETS, LoraConfig, attach_lora, attach_updates
from cascade.adapters.lora_files import LoraFile
from cascade.adapters.lora_names import flat
from cascade.adapters.lora_write import Naming, save_lora, write_lora
from cascade.checkpoints.files import on_meta
from cascade.errors import UserError
from cascade.pipelines.unet_parts import UNetParts
from stages.unet.config import UNetConfig
from stages.unet.unet import UNet
from tests.lora_toys import lora_of, same_updates, updates_of
from tests.unet_models import tiny_model

EVERY_KIND = ("to_q", "to_out.0", "ff.net.2", "conv1", "conv_shortcut", "proj_in", "conv")
EVERY_KIND += ("time_emb_proj", "linear_1", "conv_in", "conv_out")


@pytest.fixture(scope="module")
def sdxl() -> UNetParts:
    return tiny_model("sdxl")[1]


@pytest.fixture(scope="module")
def sd() -> UNetParts:
    return tiny_model("sd")[1]


def unet_file(path: Path, tensors: dict[str, Tensor], metadata: dict | None = None) -> LoraFile:
    save_file(tensors, path, metadata=metadata)
    return LoraFile(path)


@pytest.mark.parametrize("kind", ["sdxl", "sd"])
def test_from_peft_to_kohya_and_back_every_bit_stays(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    parts: UNetParts = request.getfixturevalue(kind)
    updates, config = lora_of(parts, EVERY_KIND), parts.unet.config
    naming: Naming
    for number, naming in enumerate(("peft", "kohya", "peft")):
        path = tmp_path / f"{number}.safetensors"
        write_lora(path, updates, naming, unet=config)
        read = LoraFile(path).fit(parts.updatable)
        assert all(same_updates(read[part], updates[part]) for part in parts.updatable)
        updates = read
    first, last = (load_file(tmp_path / f"{number}.safetensors") for number in (0, 2))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[key], last[key]) for key in first)


def test_names_are_those_that_were_published(
    sdxl: UNetParts, sd: UNetParts, tmp_path: Path
) -> None:
    """Names taken from published files and from diffusers' and kohya's sources."""
    path = tmp_path / "x.safetensors"
    write_lora(path, lora_of(sdxl, EVERY_KIND), "peft", unet=sdxl.unet.config)
    names = set(load_file(path))
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert f"unet.{attention}.lora_A.weight" in names
    text = "text_model.encoder.layers.0.self_attn.q_proj"
    assert f"text_encoder.{text}.lora_B.weight" in names
    assert f"text_encoder_2.{text}.lora_B.weight" in names
    write_lora(path, lora_of(sdxl, EVERY_KIND), "kohya", unet=sdxl.unet.config)
    names = set(load_file(path))
    for name in (
        "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0",
        "lora_unet_input_blocks_0_0",
        "lora_unet_input_blocks_1_0_in_layers_2",
        "lora_unet_input_blocks_1_0_emb_layers_1",
        "lora_unet_input_blocks_2_0_op",
        "lora_unet_output_blocks_1_2_conv",
        "lora_unet_time_embed_0",
        "lora_unet_label_emb_0_0",
        "lora_unet_out_2",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_1_self_attn_q_proj",
    ):
        ends = {f"{name}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")}
        assert ends <= names, name
    write_lora(path, lora_of(sd, EVERY_KIND), "kohya", unet=sd.unet.config)
    names = set(load_file(path))
    for name in (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q",
        "lora_unet_down_blocks_0_resnets_0_conv1",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    ):
        assert {f"{name}.lora_down.weight", f"{name}.alpha"} <= names


def test_kohyas_names_of_sdxl_itself_are_those_of_its_scripts() -> None:
    from cascade.checkpoints.unet import unet_original_layers

    layers = unet_original_layers(UNetConfig.sdxl())
    block = "down_blocks.1.attentions.0"
    assert flat(layers[f"{block}.proj_in"]) == "input_blocks_4_1_proj_in"
    query = f"{block}.transformer_blocks.0.attn1.to_q"
    assert flat(layers[query]) == "input_blocks_4_1_transformer_blocks_0_attn1_to_q"


def old_names(name: str, end: str) -> str:
    before, last = name.rsplit(".", 1) if not name.endswith("to_out.0") else (name[:-9], "to_out")
    return f"{before}.processor.{last}_lora.{end}.weight"


def text_names(name: str, end: str) -> str:
    return f"{name}.lora_linear_layer.{end}.weight"


def very_old_text_names(name: str, end: str) -> str:
    before, last = name.rsplit(".", 1)
    return f"{before}.to_{last.replace('_proj', '')}_lora.{end}.weight"


PEFT_ENDS = {"down": "lora_A", "up": "lora_B"}


@pytest.mark.parametrize(
    ("part", "name_of"),
    [
        ("unet", lambda name, end: f"unet.{name}.lora.{end}.weight"),
        ("unet", lambda name, end: f"unet.{name}.{PEFT_ENDS[end]}.default.weight"),
        ("unet", lambda name, end: "unet." + old_names(name, end)),
        ("unet", old_names),
        ("unet", lambda name, end: f"lora_unet_{flat(name)}.lora_{end}.weight"),
        ("text_encoder", lambda name, end: "text_encoder." + text_names(name, end)),
        ("text_encoder", lambda name, end: "text_encoder." + very_old_text_names(name, end)),
        ("text_encoder", lambda name, end: f"lora_te_{flat(name)}.lora_{end}.weight"),
    ],
)
def test_older_names_are_read(
    part: str, name_of: Callable[[str, str], str], sdxl: UNetParts, tmp_path: Path
) -> None:
    network = sdxl.updatable[part]  # type: ignore[index]
    ends = ("to_q", "to_out.0") if part == "unet" else TEXT_TARGETS
    updates = updates_of(network, ends, alpha=4)
    tensors = {}
    for path, update in updates.items():
        name = path if part == "unet" else "text_model." + path.removeprefix("text_model.")
        tensors[name_of(name, "down")] = update.down
        tensors[name_of(name, "up")] = update.up
    read = unet_file(tmp_path / "x.safetensors", tensors).fit(sdxl.updatable)
    # Without an alpha it is the rank, here 4.
    assert list(read) == [part] and same_updates(read[part], updates)  # type: ignore[index]


def test_pefts_own_folder_is_read_with_its_settings(sdxl: UNetParts, tmp_path: Path) -> None:
    updates = updates_of(sdxl.unet, ("to_q", "to_v"))
    prefix = "base_model.model."
    tensors = {f"{prefix}{path}.lora_A.weight": one.down for path, one in updates.items()}
    tensors |= {f"{prefix}{path}.lora_B.weight": one.up for path, one in updates.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"alpha stands in adapter_config.json, which is not"):
        LoraFile(tmp_path).fit(sdxl.updatable)
    settings = {"r": 4, "lora_alpha": 27, "alpha_pattern": {"attn2.to_q": 9}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    read = LoraFile(tmp_path).fit(sdxl.updatable)["unet"]
    assert {one.alpha for path, one in read.items() if path.endswith("attn2.to_q")} == {9.0}
    assert {one.alpha for path, one in read.items() if not path.endswith("attn2.to_q")} == {27.0}
    settings = {"r": 4, "lora_alpha": 8, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    read = LoraFile(tmp_path).fit(sdxl.updatable)["unet"]
    assert {one.alpha for one in read.values()} == {16.0}  # 8 / sqrt(4) is 16 / 4


def test_a_matrix_may_be_written_as_a_convolution_and_the_reverse(
    sd: UNetParts, tmp_path: Path
) -> None:
    updates = updates_of(sd.unet, ("to_q", "proj_in"), alpha=4)  # proj_in is a convolution here
    tensors = {}
    for path, one in updates.items():
        for end, value in (("down", one.down), ("up", one.up)):
            other = value[:, :, None, None] if value.ndim == 2 else value[:, :, 0, 0]
            tensors[f"lora_unet_{flat(path)}.lora_{end}.weight"] = other.contiguous()
    read = unet_file(tmp_path / "x.safetensors", tensors).fit(sd.updatable)
    assert same_updates(read["unet"], updates)


def test_what_was_trained_is_saved_and_goes_on(sdxl: UNetParts, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet(sdxl.unet.config)
        adapter = attach_lora(unet, LoraConfig(rank=4, alpha=27.5))
    for layer in adapter.layers.values():
        torch.nn.init.normal_(layer.up)
    path = tmp_path / "x.safetensors"
    save_lora(path, {"unet": unet}, naming="kohya", metadata={"steps": "3"})
    read = LoraFile(path).fit({"unet": unet})["unet"]
    assert same_updates(read, adapter.updates())
    adapter.detach()
    assert same_updates(attach_updates(unet, read).updates(), read)
    save_lora(path, {"unet": unet}, dtype=torch.float16)
    assert {one.dtype for one in load_file(path).values()} == {torch.float16}


LAYER = "lora_unet_mid_block_attentions_0_proj_in"
DOWN, UP = f"{LAYER}.lora_down.weight", f"{LAYER}.lora_up.weight"
GOOD = {DOWN: torch.ones(2, 64), UP: torch.ones(64, 2)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({DOWN: GOOD[DOWN]}, f"{DOWN} lacks its up"),
        ({**GOOD, "x.weight": torch.ones(2)}, "2 of its 3 tensors are a LoRA's; the others: x.w"),
        ({"x.weight": torch.ones(2)}, "none of its 1 tensors is a LoRA's; .*--unet"),
        ({f"{LAYER}.hada_w1_a": torch.ones(2, 2)}, "a LoHa, by lora_unet_mid"),
        ({f"{LAYER}.lokr_w1": torch.ones(2, 2)}, "a LoKr, by lora_unet_mid"),
        ({**GOOD, f"{LAYER}.dora_scale": torch.ones(64, 1)}, "a DoRA, by lora_unet_mid"),
        ({**GOOD, f"{LAYER}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "a LoRA of another form"),
        ({f"{LAYER}.diff": torch.ones(64, 64)}, "full differences of weights"),
        ({**GOOD, DOWN: torch.ones(2, 32)}, "1 have another shape, the first .*2x32 and 64x2, wh"),
        ({**GOOD, UP: torch.ones(64, 3)}, "1 have another shape, the first .*2x64 and 64x3, wher"),
        ({**GOOD, DOWN: torch.ones(2, 64, dtype=torch.int32)}, "torch.int32, no fractions"),
        ({**GOOD, DOWN: torch.ones(128)}, "is 128, which no LoRA's is"),
        ({**GOOD, f"{LAYER}.alpha": torch.ones(3)}, "alpha is 3, which no LoRA's is"),
        ({**GOOD, f"{LAYER}.alpha": torch.tensor(float("nan"))}, "alpha is nan, no number"),
        (
            {**GOOD, "lora_unet_middle_block_1_proj_in.lora_down.weight": torch.ones(2, 64)}
            | {"lora_unet_middle_block_1_proj_in.lora_up.weight": torch.ones(64, 2)},
            "update one layer; keep one of them",
        ),
        (
            {key.replace("mid_block", "mid_bloc"): value for key, value in GOOD.items()},
            "another model: none of its 1 layers is here, .* the first that is not",
        ),
        (
            {key.replace("mid_block", "single_blocks"): value for key, value in GOOD.items()}
            | {f"transformer.x.lora_{end}.weight": torch.ones(2, 2) for end in "AB"},
            "one without a U-Net, such as SD 3 or Flux",
        ),
    ],
)
def test_what_is_no_lora_of_the_model_is_one_line(
    tensors: dict[str, Tensor], message: str, sdxl: UNetParts, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        unet_file(tmp_path / "x.safetensors", tensors).fit(sdxl.updatable)
    assert re.search(message, str(error.value)) and str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "no valid JSON"),
        ("[]", "no JSON object"),
        ('{"unet.lora_alpha": "many"}', "no readable alpha"),
        ('{"unet.lora_alpha": 1e999}', "an alpha of inf"),
        ('{"unet.alpha_pattern": [1]}', "no readable alpha"),
        ('{"unet.alpha_pattern": {"a.*b": 3}}', "plain names are known here"),
    ],
)
def test_broken_settings_are_one_line(
    settings: str, message: str, sdxl: UNetParts, tmp_path: Path
) -> None:
    metadata = {"lora_adapter_metadata": settings}
    with pytest.raises(UserError, match=message):
        unet_file(tmp_path / "x.safetensors", GOOD, metadata).fit(sdxl.updatable)


def test_a_lora_of_sdxl_on_sd_1_is_told_by_its_text(tmp_path: Path) -> None:
    with on_meta():
        unet, other = UNet(UNetConfig.bk_tiny()), UNet(UNetConfig.koala_700m())
    path = tmp_path / "x.safetensors"
    write_lora(path, {"unet": updates_of(other, ("to_k",))}, "kohya", unet=other.config)
    message = (
        r"made for a U-Net whose text is 2048 wide \(SDXL\); this one's is 768 wide \(SD 1.x\)"
    )
    with pytest.raises(UserError, match=message):
        LoraFile(path).fit({"unet": unet})
