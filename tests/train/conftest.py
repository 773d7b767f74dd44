"""A tiny data set, a cache of it and tiny run files: training in seconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from PIL import Image

from cascade.checkpoints.files import read_metadata
from cascade.checkpoints.part_files import weights_hash
from train.__main__ import main as train_main
from train.data.__main__ import main as data_main
from train.data.precompute import precompute
from train.data.write import WriteOptions, write_shards
from train.distill.bias_curve import BiasCurve, BiasPoint
from train.distill.picture_teacher import PictureTeacher, PictureTeacherConfig
from train.encode import FrozenPaths

COLORS = ["red", "green", "blue", "black"]
SHAPES = ["apple", "fish", "hat"]


def write_source(folder: Path, count: int = 12, side: int = 32) -> Path:
    """A folder of plain pictures with two wordings each."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        color, shape = COLORS[number % 4], SHAPES[number % 3]
        Image.new("RGB", (side, side), color).save(folder / f"{number:02d}.png")
        captions = [f"a {color} {shape}", f"one {shape}, {color}"]
        rows.append({"file": f"{number:02d}.png", "captions": captions, "split": "train"})
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of twelve 32 px pictures with captions.jsonl."""
    return write_source(tmp_path / "source")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The pattern of shards of twelve 32 px pictures."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(WriteOptions(source=write_source(folder / "source"), out=folder, name="tiny"))
    return f"{folder}/*.tar"


@pytest.fixture(scope="session")
def uneven_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The pattern of five shards of 13, 5, 20, 1 and 23 pictures."""
    folder = tmp_path_factory.mktemp("uneven")
    for number, count in enumerate((13, 5, 20, 1, 23)):
        source = write_source(folder / f"source{number}", count)
        write_shards(WriteOptions(source=source, out=folder, name=f"part{number}"))
    return f"{folder}/*.tar"


@pytest.fixture(scope="session")
def uneven_latents(
    uneven_shards: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The same as shards of Stage C's latents and text states."""
    folder = tmp_path_factory.mktemp("latents")
    words = ["precompute", "--shards", uneven_shards, "--shards-out", str(folder)]
    words += ["--size", "32", "--batch-size", "16", "--text", str(tiny_model / "text")]
    words += ["--compressor", str(tiny_model / "compressor.safetensors")]
    assert data_main(words) == 0
    return f"{folder}/*.tar"


@pytest.fixture(scope="session")
def clip_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's CLIP with the preprocessing of its picture tower."""
    folder = tmp_path_factory.mktemp("clip") / "text"
    shutil.copytree(tiny_model / "text", folder)
    half = [0.5, 0.5, 0.5]
    content = {"image_size": 32, "mean": half, "std": half}
    (folder / "preprocessor.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def cache(
    shards: str, tiny_model: Path, tiny_unet: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A cache of all parts, made by the tiny model."""
    folder = tmp_path_factory.mktemp("cache")
    precompute(
        shards,
        folder,
        FrozenPaths(
            text=str(tiny_model / "text"),
            stage_a=str(tiny_model / "stage_a.safetensors"),
            compressor=str(tiny_model / "compressor.safetensors"),
            autoencoder=str(tiny_unet / "autoencoder_kl.safetensors"),
        ),
        batch_size=5,
    )
    return folder


def config_in(path: Path) -> dict[str, object]:
    """The configuration in an exported network's file."""
    return json.loads(read_metadata(path)["cascade_config"])


@dataclass
class TinyRun:
    """One tiny run file of a kind, and how to start it."""

    kind: str
    out: Path
    config: Path

    def start(self, *arguments: object) -> int:
        return train_main([self.kind, "--config", str(self.config), *map(str, arguments)])

    def metrics(self, version: int = 0) -> list[dict[str, str]]:
        import csv

        with open(self.out / "logs" / f"version_{version}" / "metrics.csv") as file:
            return list(csv.DictReader(file))

    def losses(self) -> list[float]:
        return [float(row["loss"]) for row in self.metrics() if row["loss"]]


MakeRun = Callable[..., TinyRun]


@pytest.fixture
def make_run(
    tmp_path: Path,
    shards: str,
    cache: Path,
    tiny_model: Path,
    tiny_unet: Path,
    clip_folder: Path,
) -> MakeRun:
    """Make a run file of a kind; keyword arguments replace sections' keys."""

    def make(kind: str, name: str = "run", **sections: dict[str, object] | object) -> TinyRun:
        out = tmp_path / name
        config: dict[str, object] = {
            "run": {
                "out": str(out),
                "max_steps": 4,
                "precision": "32-true",
                "log_every_steps": 1,
                "checkpoint_every_steps": 2,
                "ema_decay": 0.5,
                "accelerator": "cpu",
                "export_dtype": "float32",
            },
            "data": {"shards": shards, "batch_size": 4},
            "optim": {"name": "adamw", "lr": 1e-2, "warmup_steps": 2, "schedule": "cosine"},
            **(
                _unet(kind, tiny_unet, tiny_model)
                if kind.startswith("unet")
                else _kind(kind, tiny_model, clip_folder)
            ),
        }
        if kind == "cascade_kd":
            config |= {"teacher": picture_teacher(tiny_unet)}
        if kind not in ("clip", "stage_a", "autoencoder_kl", "compressor", "stage_a_decoder"):
            config["data"] |= {"folder": str(cache)}  # type: ignore[operator]
        for section, values in sections.items():
            inner = config.get(section)
            both = isinstance(inner, dict) and isinstance(values, dict)
            config[section] = {**inner, **values} if both else values  # type: ignore[dict-item]
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return TinyRun(kind, out, path)

    return make


def write_curve(path: Path, unet: Path, model: Path, *, captions: bool = False, **changes) -> str:
    """A measured curve of the tiny networks: trusted down to a log-SNR of about 0."""
    config = PictureTeacherConfig(**picture_teacher(unet))  # type: ignore[arg-type]
    values = {
        "teacher": PictureTeacher(config).fingerprint(),
        "compressor": weights_hash(model / "compressor.safetensors"),
        "captions": captions,
        "pictures": 8,
        "roundtrip_ratio": 1.0,
        "roundtrip_distance": 0.0,
        "points": (BiasPoint(0, 7.0, 0.99, 0.0), BiasPoint(400, -0.3, 0.89, 0.5)),
    }
    BiasCurve(**(values | changes)).write(path)
    return str(path)


@pytest.fixture(scope="session")
def taught_cache(cache, shards, tiny_unet, tmp_path_factory) -> Path:
    """The tiny cache with the teacher's features, made by the command."""
    folder = tmp_path_factory.mktemp("taught") / "cache"
    shutil.copytree(cache, folder)
    run = folder.parent / "run.yaml"
    run.write_text(precompute_run(tiny_unet))
    words = ["precompute", "--shards", shards, "--out", str(folder), "--teacher-of", str(run)]
    assert data_main([*words, "--batch-size", "5"]) == 0
    return folder


def precompute_run(unet: Path) -> str:
    """A run file that names the tiny U-Net as teacher, and nothing else of use."""
    return json.dumps(
        {
            "run": {"out": "x", "max_steps": 1},
            "data": {"shards": "x", "batch_size": 1},
            "text": "x",
            "compressor": "x",
            "init_from": "x",
            "teacher": picture_teacher(unet),
        }
    )


@pytest.fixture
def make_taught(make_run, taught_cache, tiny_unet, tiny_model, tmp_path):
    """Make a run with the terms that are given."""

    def make(name: str = "run", captions: bool = False, **sections):
        curve = write_curve(tmp_path / f"{name}.json", tiny_unet, tiny_model, captions=captions)
        if "estimate" in sections:
            sections["estimate"] = {"curve": curve} | sections["estimate"]
        data = {"folder": str(taught_cache)} | sections.pop("data", {})
        return make_run("cascade_kd", name, data=data, teacher_captions=captions, **sections)

    return make


def picture_teacher(unet: Path) -> dict[str, object]:
    """The tiny U-Net as the teacher of a cascade."""
    return {
        "unet": str(unet / "unet.safetensors"),
        "autoencoder": str(unet / "autoencoder_kl.safetensors"),
        "image_size": 32,
        "dtype": "float32",
    }


def _unet(kind: str, unet: Path, model: Path) -> dict[str, object]:
    """A U-Net as wide as the teacher, or a student of it that has lost blocks of both kinds."""
    teacher = config_in(unet / "unet.safetensors")
    found: dict[str, object] = {
        "model": teacher,
        "autoencoder": str(unet / "autoencoder_kl.safetensors"),
        "text": str(model / "text"),
        "text_states": {"hidden": "pre_norm", "masks_padding": True},
    }
    if kind == "unet_kd":
        fewer = {"down_depths": [[0], [1], [2]], "mid_depth": 2}
        student = {**teacher, **fewer, "up_depths": [[2, 2], [1, 1], [0, 0]]}
        remove = ["*_blocks.*.resnets.1", "*.transformer_blocks.2"]
        recipe = unet / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({"remove": remove}))
        found["model"] = student
        found["distill"] = {
            "teacher": str(unet / "unet.safetensors"),
            "recipe": str(recipe),
            "dtype": "float32",
            "features": {"kinds": ["self_attention"], "sites": {"up_blocks.2": "up_blocks.2"}},
        }
    return found


def _kind(kind: str, model: Path, clip: Path) -> dict[str, object]:
    if kind == "clip":
        sizes = {"text": 16, "vision": 16}
        layers: dict[str, object] = {}
        for tower, width in sizes.items():
            layers |= {f"{tower}_width": width, f"{tower}_layers": 1, f"{tower}_heads": 2}
        more = {"vocab_size": 300, "max_tokens": 12, "image_size": 16, "patch_size": 8}
        return {"model": {**layers, **more, "projection": 8}}
    if kind == "autoencoder_kl":
        sizes = {"channels": [8, 16], "blocks_per_level": 1, "norm_groups": 4}
        return {"model": sizes, **_judged(clip)}
    if kind == "step_distil":
        taught = {"stage": "stage_c", "teacher": str(model), "text": str(model / "text")}
        return {**taught, "compressor": str(model / "compressor.safetensors")}
    if kind == "stage_a_decoder":
        sizes = {"channels": [8, 8], "blocks": [1, 1]}
        judged: dict[str, object] = {"crop": 16, "clip": str(clip)}
        judged |= {"loss": {"perceptual_layers": [1]}, "latent_noise": 0.1}
        return {"model": sizes, "stage_a": str(model / "stage_a.safetensors"), **judged}
    own = {"cascade_kd": "stage_c", "stage_b_kd": "stage_b"}.get(kind, kind)
    networks: dict[str, object] = {"model": config_in(model / f"{own}.safetensors")}
    if kind == "compressor":
        return {**networks, "previewer": config_in(model / "previewer.safetensors")}
    if kind == "stage_a":
        return {**networks, **_judged(clip)}
    if kind == "stage_b":
        compressor = config_in(model / "compressor.safetensors") | {"stochastic_depth": 0.5}
        networks |= {"compressor": compressor, "stage_a": str(model / "stage_a.safetensors")}
    elif kind == "stage_b_kd":
        networks |= {
            "frozen_compressor": str(model / "compressor.safetensors"),
            "stage_a": str(model / "stage_a.safetensors"),
            "teacher": {"network": str(model / "stage_b.safetensors"), "dtype": "float32"},
        }
    else:
        networks |= {"compressor": str(model / "compressor.safetensors")}
    if kind != "previewer":
        networks |= {"text": str(model / "text")}
    return networks


def _judged(clip: Path) -> dict[str, object]:
    """What judges an autoencoder."""
    loss = {"perceptual_layers": [1], "adversarial_from_step": 2}
    return {"discriminator": {"channels": [4, 8]}, "crop": 16, "clip": str(clip), "loss": loss}
