"""LoRAs beside diffusers: the same names lead to the same layers, and to the same weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cascade.adapters.lora import TEXT_TARGETS
from cascade.adapters.lora_files import LoraFile
from cascade.adapters.lora_metadata import METADATA_KEY
from cascade.adapters.lora_names import Part
from cascade.adapters.lora_write import write_lora
from cascade.checkpoints.files import read_metadata
from cascade.pipelines.placement import UNetDtypes
from cascade.pipelines.unet_lora import LoraChoice
from cascade.pipelines.unet_parts import UNetParts, open_unet_source
from cascade.text.towers import TEXT_PREFIX
from tests.lora_toys import lora_of, updates_of
from tests.reference.unet_toys import save_pipeline

pytestmark = pytest.mark.reference

FLOAT32 = UNetDtypes(torch.float32, torch.float32, torch.float32)
CPU = torch.device("cpu")
ENDS = ("to_q", "to_out.0", "conv1", "conv2", "conv_shortcut", "proj_in", "proj_out", "ff.net.2")
ENDS += ("ff.net.0.proj", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")
KINDS = pytest.mark.parametrize("kind", ["sdxl", "sd"])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipelines")
    for kind in ("sdxl", "sd"):
        save_pipeline(root / kind, kind)
    return root


def parts_of(folder: Path, *loras: LoraChoice) -> UNetParts:
    return open_unet_source(folder, None, loras).load(CPU, FLOAT32)


@KINDS
def test_diffusers_makes_our_peft_names_of_our_kohya_names(
    kind: str, root: Path, tmp_path: Path
) -> None:
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )
    from diffusers.utils.state_dict_utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    parts = parts_of(root / kind)
    updates, config = lora_of(parts, ENDS), parts.unet.config
    for naming in ("peft", "kohya"):
        write_lora(tmp_path / f"{naming}.safetensors", updates, naming, unet=config)  # type: ignore[arg-type]
    theirs = load_file(tmp_path / "kohya.safetensors")
    layers = len(config.down_depths[0])
    theirs = _maybe_map_sgm_blocks_to_diffusers(theirs, SimpleNamespace(layers_per_block=layers))
    converted, alphas = _convert_non_diffusers_lora_to_diffusers(theirs)
    of_unet = {key: one for key, one in converted.items() if key.startswith("unet.")}
    of_text = {key: one for key, one in converted.items() if key not in of_unet}
    renamed = convert_unet_state_dict_to_peft(of_unet)
    renamed |= convert_state_dict_to_peft(convert_state_dict_to_diffusers(of_text))
    ours = load_file(tmp_path / "peft.safetensors")
    assert renamed.keys() == ours.keys()
    assert all(torch.equal(renamed[key], ours[key]) for key in ours)
    assert len(alphas) == len(ours) // 2


@KINDS
def test_diffusers_unet_with_the_formula_by_hand_predicts_the_same(
    kind: str, root: Path, tmp_path: Path
) -> None:
    from diffusers import UNet2DConditionModel

    parts = parts_of(root / kind)
    updates = lora_of(parts, ENDS)
    path = tmp_path / "x.safetensors"
    write_lora(path, updates, "kohya", unet=parts.unet.config)
    theirs = UNet2DConditionModel.from_pretrained(root / kind / "unet").eval()
    for name, one in updates["unet"].items():
        layer: Any = theirs.get_submodule(name)
        product = torch.einsum("or,r...->o...", one.up.flatten(1), one.down)
        layer.weight.data += 0.7 * one.alpha / one.rank * product
    merged = parts_of(root / kind, LoraChoice(path, 0.7)).unet
    own = merged.state_dict()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(own[name], value, atol=1e-6, rtol=1e-5)


def with_peft() -> Any:
    return pytest.importorskip("peft", reason="peft is no dependency: its own check is extra")


@KINDS
@pytest.mark.parametrize("naming", ["peft", "kohya"])
def test_diffusers_merges_our_files_to_the_same_weights(
    kind: str, naming: Any, root: Path, tmp_path: Path
) -> None:
    with_peft()
    from diffusers import DiffusionPipeline

    parts = parts_of(root / kind)
    path = tmp_path / "x.safetensors"
    # Of a text encoder whose alphas differ, diffusers 0.42 loses those of kohya's files: it looks
    # for them one name too high, and PEFT warns.
    updates = lora_of(parts, ENDS, odd_ones=("unet",))
    write_lora(path, updates, naming, unet=parts.unet.config)
    pipeline = DiffusionPipeline.from_pretrained(root / kind)
    pipeline.unet.register_to_config(layers_per_block=1)  # its converter knows no list
    pipeline.load_lora_weights(str(path))
    pipeline.fuse_lora(lora_scale=0.7)
    pipeline.unload_lora_weights()
    merged = parts_of(root / kind, LoraChoice(path, 0.7)).updatable
    for part, network in merged.items():
        theirs, plain = getattr(pipeline, part).state_dict(), parts.updatable[part].state_dict()
        own = network.state_dict()
        assert own.keys() == theirs.keys()
        assert any(not torch.equal(plain[key], own[key]) for key in own)
        for key, value in theirs.items():
            torch.testing.assert_close(own[key], value, atol=1e-6, rtol=1e-5)


def test_a_file_that_diffusers_saved_is_read_with_its_alphas(root: Path, tmp_path: Path) -> None:
    peft = with_peft()
    from diffusers import StableDiffusionXLPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers

    pipeline = StableDiffusionXLPipeline.from_pretrained(root / "sdxl")
    pipeline.unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=9, target_modules=["to_q", "to_v"]))
    pipeline.text_encoder_2.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"])
    )
    layers = {
        name: peft.get_peft_model_state_dict(getattr(pipeline, name))
        for name in ("unet", "text_encoder_2")
    }
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=layers["unet"],
        text_encoder_2_lora_layers=convert_state_dict_to_diffusers(layers["text_encoder_2"]),
        **_collate_lora_metadata(
            {"unet": pipeline.unet, "text_encoder_2": pipeline.text_encoder_2}
        ),
    )
    assert METADATA_KEY in read_metadata(tmp_path / "pytorch_lora_weights.safetensors")
    parts = parts_of(root / "sdxl")
    read = LoraFile(tmp_path).fit(parts.updatable)
    told: list[tuple[Part, tuple[str, ...], float]] = [
        ("unet", ("to_q", "to_v"), 9.0),
        ("text_encoder_2", TEXT_TARGETS[:1], 3.0),
    ]
    assert read.keys() == {part for part, _, _ in told}
    for part, ends, alpha in told:
        assert read[part].keys() == updates_of(parts.updatable[part], ends).keys()
        assert {one.alpha for one in read[part].values()} == {alpha}
        for path, one in read[part].items():
            state = layers[part]
            name = path if f"{path}.lora_A.weight" in state else path.removeprefix(TEXT_PREFIX)
            assert torch.equal(one.down, state[f"{name}.lora_A.weight"])
