"""The published recipes of U-Nets: each one runs as it stands, with nothing but sizes changed."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cascade.adapters.lora_files import LoraFile
from cascade.checkpoints.files import load_network, read_metadata, save_network
from cascade.checkpoints.load import build
from cascade.checkpoints.part_files import find_network
from stages.unet.config import UNetConfig
from stages.unet.unet import UNet
from tests.fake_hub import Hub, read_files
from tests.reference import unet_toys
from tests.stages.unet.toys import toy_of
from tests.train.conftest import write_source
from train.__main__ import main as train_main
from train.data.write import WriteOptions, write_shards
from train.distill.__main__ import main as distill_main

FOLDER = Path(__file__).parents[2] / "configs" / "published_unet"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SMALLER = {
    "run.max_steps": 2,
    "run.devices": 1,
    "run.accumulate": 1,
    "run.accelerator": "cpu",
    "data.size": 16,
    "data.batch_size": 2,
    "data.workers": 0,
}
SDXL = replace(toy_of(UNetConfig.sdxl(), 20), text_channels=40)
MODELS = {
    "stabilityai/stable-diffusion-xl-base-1.0": SDXL,
    "CompVis/stable-diffusion-v1-4": toy_of(UNetConfig.sd15(), 20),
    "SG161222/Realistic_Vision_V4.0_noVAE": toy_of(UNetConfig.sd15(), 20),
    "nota-ai/bk-sdm-small": toy_of(UNetConfig.bk_small(), 20),
    "segmind/tiny-sd": toy_of(UNetConfig.sd_tiny(), 20),
}
TEACHER_FILE = "sdxl_lightning_4step_unet.safetensors"


def header(name: str) -> str:
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


@pytest.fixture
def place(name: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the data that a configuration names; its models are on the hub."""
    config = (FOLDER / f"{name}.yaml").read_text()
    for model, sizes in MODELS.items():
        if model in config:
            kind = "sdxl" if sizes is SDXL else "sd"
            monkeypatch.setattr(unet_toys, kind.upper(), sizes)
            folder = tmp_path / "hub" / model
            folder.parent.mkdir(parents=True, exist_ok=True)
            unet_toys.save_pipeline(folder, kind)
            hub.repositories[model] = read_files(folder)
    place = tmp_path / "place"
    for shards in {*re.findall(r"shards: (.*)/\*\.tar", config)}:
        source = write_source(tmp_path / shards.replace("/", "_"), side=16)
        write_shards(WriteOptions(source=source, out=place / shards, name="tiny"))
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    if TEACHER_FILE in config:
        teacher = find_network(tmp_path / "hub" / next(iter(MODELS)), "unet")
        save_network(place / TEACHER_FILE, build(teacher.opened, teacher.published))
    return place


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_with_its_student_made_as_its_header_says(name: str, place: Path) -> None:
    said = re.search(r"python (-m train\.distill make-student .*?/\w+) Source:", header(name))
    if name.startswith("unet_kd"):
        assert said is not None
        assert distill_main(shlex.split(said[1])[2:]) == 0
    kind = "unet_kd" if name.startswith("unet_kd") else "unet"
    overrides = [word for key, value in SMALLER.items() for word in (f"--{key}", str(value))]
    config = str(FOLDER / f"{name}.yaml")
    assert train_main([kind, "--config", config, *overrides]) == 0
    [out] = Path("runs/published").glob("unet_*")
    if name == "unet_lora_sdxl":
        unet = UNet(SDXL)
        fitted = LoraFile(out / "lora.safetensors").fit({"unet": unet})
        assert len(fitted["unet"]) == 70 * 8
        return
    trained = load_network(out / "unet.safetensors", expect=UNet)
    assert ("cascade_student" in read_metadata(out / "unet.safetensors")) == (kind == "unet_kd")
    if kind == "unet_kd":
        recipe = name.removeprefix("unet_kd_")
        wanted: UNetConfig = getattr(UNetConfig, recipe)()
        depths = ("down_depths", "mid_depth", "up_depths")
        for key in depths:
            assert getattr(trained.config, key) == getattr(wanted, key)
        start = load_file(f"runs/published/{recipe}/student.safetensors")
        moved = [
            not value.equal(start[key].to(value)) for key, value in trained.state_dict().items()
        ]
        assert sum(moved) > 0.5 * len(moved)
