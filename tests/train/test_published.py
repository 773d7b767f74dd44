"""The recipes at the published sizes: what they say, what they build, and that each one runs."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from cascade.checkpoints.autoencoders import trunk
from cascade.checkpoints.files import on_meta, read_metadata
from cascade.checkpoints.load import build
from cascade.checkpoints.part_files import find_network, find_text
from cascade.checkpoints.weight_map import to_theirs
from cascade.config import load_yaml
from cascade.pipelines.cascade import CascadePipeline
from cascade.pipelines.spec import CascadeSpec, StageSampling, save_spec
from cascade.text.encoder import TextConfig
from cascade.text.picture_encoder import PictureEncoder
from cascade.tools.__main__ import main as tools_main
from cascade.tools.convert import convert
from cascade.tools.diffusers_names import diffusers_config
from stages.discriminator import Discriminator
from stages.previewer import Previewer
from stages.semantic_compressor import CompressorConfig, SemanticCompressor, TrunkStage
from stages.stage_a import StageA, StageAConfig
from stages.stage_b import StageB, StageBConfig
from stages.stage_b_v2 import StageBV2
from stages.stage_c import StageC, StageCConfig
from stages.stage_c_v2 import StageCV2
from tests.fake_hub import V3, V3_PRIOR, Hub, read_files
from train import runs
from train.__main__ import KINDS
from train.__main__ import main as train_main
from train.settings import RunConfig

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "published"
V2, V2_PRIOR = "warp-ai/wuerstchen", "warp-ai/wuerstchen-prior"
PHASES = [f"stage_c_v2_phase{phase}" for phase in (1, 2, 3, 4)]

# Parameters of each network that a run trains: FACTS_WUERSTCHEN.md, section 1.
PARAMETERS = {
    "stage_a": (18_406_894,),
    "stage_b_v2_phase1": (1_055_365_280, 20_198_000),
    "stage_b_v2_phase2": (1_055_365_280, 20_198_000),
    "stage_b_v3_full": (1_562_941_136,),
    "stage_b_v3_lite": (699_471_248,),
    **dict.fromkeys(PHASES, (993_636_896,)),
    "stage_c_v3_full": (3_589_103_632,),
    "stage_c_v3_lite": (1_030_785_040,),
    "previewer_v3": (3_979_651,),
}
# Steps and pictures a step: section 3.2 for v2, the authors' files of section 3.4 for v3.
LENGTHS = {
    "stage_a": (500_000, 256),
    "stage_b_v2_phase1": (457_000, 512),
    "stage_b_v2_phase2": (300_000, 128),
    "stage_c_v2_phase1": (500_000, 1536),
    "stage_c_v2_phase2": (364_000, 1536),
    "stage_c_v2_phase3": (4_000, 768),
    "stage_c_v2_phase4": (50_000, 384),
    "stage_b_v3_full": (100_000, 256),
    "stage_b_v3_lite": (10_000, 512),
    "stage_c_v3_full": (100_000, 512),
    "stage_c_v3_lite": (10_000, 1024),
    "finetune_stage_c_lite": (10_000, 1024),
}


def kind_of(name: str) -> str:
    plain = name.removeprefix("finetune_")
    return next(kind for kind in KINDS if plain == kind or plain.startswith(f"{kind}_"))


def run_of(name: str) -> object:
    run_class = getattr(runs, kind_of(name).title().replace("_", "") + "Run")
    return load_yaml(run_class, FOLDER / f"{name}.yaml")


def test_every_recipe_is_one_of_these() -> None:
    found = {path.stem for path in FOLDER.glob("*.yaml")}
    assert found == {*PARAMETERS, "finetune_stage_c_lite"}
    assert found - {"previewer_v3"} == set(LENGTHS)


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_a_recipe_builds_networks_of_the_published_number_of_parameters(name: str) -> None:
    config = run_of(name)
    classes = {
        "stage_a": (StageA,),
        "stage_b": (StageB, StageBV2),
        "stage_c": (StageC, StageCV2),
        "previewer": (Previewer,),
    }[kind_of(name)]
    with on_meta():
        networks = [classes["_v2_" in name](config.sizes)]  # type: ignore[attr-defined]
        if getattr(config, "compressor", None) is not None and kind_of(name) == "stage_b":
            networks.append(SemanticCompressor(config.compressor))  # type: ignore[attr-defined]
    assert tuple(map(count, networks)) == PARAMETERS[name]


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_sizes_are_those_that_the_networks_call_published() -> None:
    assert run_of("stage_a").sizes == StageAConfig.v2()  # type: ignore[attr-defined]
    assert run_of("stage_b_v2_phase1").compressor == CompressorConfig.v2()  # type: ignore[attr-defined]
    assert run_of("stage_b_v3_full").sizes == StageBConfig()  # type: ignore[attr-defined]
    assert run_of("stage_b_v3_lite").sizes == StageBConfig.lite()  # type: ignore[attr-defined]
    assert run_of("stage_c_v3_full").sizes == StageCConfig.full()  # type: ignore[attr-defined]
    assert run_of("stage_c_v3_lite").sizes == StageCConfig.lite()  # type: ignore[attr-defined]
    with on_meta():
        discriminator = Discriminator(run_of("stage_a").discriminator)  # type: ignore[attr-defined]
    # Spectral norm keeps two vectors beside each weight, which are no parameters.
    assert count(discriminator) == 6_271_105


@pytest.mark.parametrize("name", list(LENGTHS))
def test_a_recipe_takes_the_published_steps_of_the_published_batch(name: str) -> None:
    config = run_of(name)
    run: RunConfig = config.run  # type: ignore[attr-defined]
    batch = run.devices * run.num_nodes * run.accumulate * config.data.batch_size  # type: ignore[attr-defined]
    assert (run.max_steps, batch) == LENGTHS[name]


def test_each_phase_starts_from_the_one_before_and_the_script_runs_them_in_order() -> None:
    for one, other in (*pairwise(PHASES), ("stage_b_v2_phase1", "stage_b_v2_phase2")):
        assert run_of(other).init_from == run_of(one).run.out  # type: ignore[attr-defined]
    script = (FOLDER / "make_v2.sh").read_text(encoding="utf-8")
    steps = ["stage_a stage_a", "stage_b_v2_phase", "stage_c_v2_phase$phase", "tools average"]
    places = [script.index(step) for step in steps]
    assert places == sorted(places)
    ends = re.findall(r"runs/published/(\w+)/stage_c\.safetensors", script)
    assert ends == PHASES[2:]


# Each recipe for two steps, with nothing of it changed but sizes

TINY_STAGES = [
    {"kind": "fused", "expand": 2, "kernel": 3, "stride": 2, "out_channels": 8, "layers": 1},
    {"kind": "mb", "expand": 2, "kernel": 3, "stride": 4, "out_channels": 16, "layers": 1},
]
RUN = {"max_steps": 2, "checkpoint_every_steps": 2, "log_every_steps": 1, "devices": 1}
TINY_B = {
    "cond_channels": 16,
    "hidden_channels": [8, 8, 16, 16],
    "num_heads": [0, 0, 2, 2],
    "down_blocks": [1, 1, 1, 1],
    "up_blocks": [1, 1, 1, 1],
    "text_pooled_channels": 12,
}
TINY_C = {
    "cond_channels": 16,
    "hidden_channels": [16, 16],
    "num_heads": [2, 2],
    "down_blocks": [1, 1],
    "up_blocks": [1, 1],
    "text_channels": 16,
    "text_pooled_channels": 12,
    "image_channels": 12,
}
SIZES = {
    "stage_a": {
        "model": {"channels": [8, 16], "decoder_blocks": [1, 1], "codebook_size": 16},
        "discriminator": {"channels": [4, 8]},
        "loss": {"perceptual_layers": [1, 2], "adversarial_from_step": 1},
        "crop": 16,
    },
    "stage_b_v2": {
        "model_v2": {
            "cond_channels": 16,
            "hidden_channels": [8, 16, 16, 16],
            "num_heads": [0, 2, 2, 2],
            "num_blocks": [1, 1, 1, 1],
            "text_channels": 16,
        },
        "compressor": {"stem_channels": 8, "stages": TINY_STAGES, "head_channels": 16},
    },
    "stage_c_v2": {
        "model_v2": {"hidden_channels": 16, "num_blocks": 2, "num_heads": 2, "text_channels": 16}
    },
    "stage_b_v3": {"model": TINY_B},
    "stage_c_v3": {"model": TINY_C},
    "previewer": {"model": {"channels": [8, 8]}},
    "finetune": {},
}


@pytest.fixture
def place(tmp_path: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to train in, with the files that the recipes name, tiny."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "clip-vit-large-patch14").symlink_to(clip_folder)
    stages = tuple(TrunkStage(**stage) for stage in TINY_STAGES)  # type: ignore[arg-type]
    network = SemanticCompressor(CompressorConfig(8, stages, 16, stochastic_depth=0.0))
    own = {f"trunk.{key}": value for key, value in network.trunk.state_dict().items()}
    features = to_theirs(own, trunk("trunk", "features", stages))
    classifier = {"classifier.1.weight": torch.zeros(10, 16), "classifier.1.bias": torch.zeros(10)}
    torch.save({**features, **classifier}, "models/efficientnet_v2_s-dd5fe13b.pth")
    write_pictures(tmp_path / "data" / "published")
    return tmp_path


def write_pictures(folder: Path) -> None:
    """Pictures of several shapes, with the scores by which recipes filter."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(24):
            size = [(96, 96), (96, 64), (64, 96)][number % 3]
            picture = BytesIO()
            Image.new("RGB", size, (10 * number, 200 - 8 * number, 90)).save(picture, "PNG")
            scores = {"aesthetic": 7.0, "pwatermark": 0.1, "punsafe": 0.1}
            members = {"png": picture.getvalue(), "txt": b"a red apple"}
            for ending, data in {**members, "json": json.dumps(scores).encode()}.items():
                member = tarfile.TarInfo(f"{number:03d}.{ending}")
                member.size = len(data)
                tar.addfile(member, BytesIO(data))


@pytest.fixture(scope="session")
def published_files(
    tiny_model: Path, clip_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, bytes]]:
    """Repositories of the hub as the authors keep them, tiny; Stage C is written by diffusers."""
    from diffusers import StableCascadeUNet

    folder = tmp_path_factory.mktemp("hub")
    convert(tiny_model, "diffusers", folder / "diffusers", torch.float32)
    convert(tiny_model, "original", folder / "original", torch.float32)
    prior, decoder = folder / "diffusers" / "prior", folder / "diffusers" / "decoder"
    PictureEncoder.from_folder(clip_folder).save(
        prior / "image_encoder", prior / "feature_extractor"
    )
    sizes = {key: tuple(v) if isinstance(v, list) else v for key, v in TINY_C.items()}
    content = diffusers_config(StageCConfig(**sizes))
    content.pop("_class_name")
    torch.manual_seed(0)
    StableCascadeUNet(**content).save_pretrained(prior / "prior_lite")
    text = {
        path: data
        for path, data in read_files(prior).items()
        if path.startswith(("text_encoder/", "tokenizer/"))
    }
    effnet = (folder / "original" / "effnet_encoder.safetensors").read_bytes()
    return {
        V3: {**read_files(decoder), "effnet_encoder.safetensors": effnet},
        V3_PRIOR: read_files(prior),
        V2: text,
        V2_PRIOR: dict(text),
    }


@pytest.fixture
def on_hub(hub: Hub, published_files: dict[str, dict[str, bytes]]) -> Hub:
    hub.repositories |= {name: dict(files) for name, files in published_files.items()}
    return hub


def train(name: str, *more: str) -> Path:
    """Run a recipe for two steps on a CPU, other sizes in place of its own."""
    config = run_of(name)
    data, run = config.data, config.run  # type: ignore[attr-defined]
    side = 48 if data.size == 768 else 64
    sections: dict[str, dict[str, object]] = {
        "run": {**RUN, "accelerator": "cpu", "accumulate": min(2, run.accumulate)},
        "data": {"size": side, "batch_size": 2, "workers": 0},
    }
    if data.filters.min_size:
        sections["data"]["filters.min_size"] = side
    if data.buckets is not None and data.buckets.shapes:
        sections["data"]["buckets.shapes"] = [[48, 80], [80, 48]]
        sections["data"]["buckets.step"] = 16
    elif data.buckets is not None:
        sections["data"]["buckets.step"] = 16
    sizes = next(value for key, value in SIZES.items() if name.startswith(key))
    words = []
    for section, values in {**sections, **sizes}.items():
        keys = values.items() if isinstance(values, dict) else [(None, values)]
        for key, value in keys:
            path = section if key is None else f"{section}.{key}"
            words += [f"--{path}", json.dumps(value)]
    config_file = str(FOLDER / f"{name}.yaml")
    assert train_main([kind_of(name), "--config", config_file, *words, *more]) == 0
    out = Path(run.out)
    assert (out / "done").is_file()
    return out


@pytest.mark.slow
def test_the_recipe_of_v2_runs_from_stage_a_to_the_average(place: Path, on_hub: Hub) -> None:
    train("stage_a")
    for name in ("stage_b_v2_phase1", "stage_b_v2_phase2", *PHASES):
        out = train(name)
    ends = [str(Path("runs/published") / name / "stage_c.safetensors") for name in PHASES[2:]]
    words = ["average", *ends, "--weights", "0.5", "0.5", "--out", "stage_c_v2.safetensors"]
    assert tools_main(words) == 0
    assert read_metadata("stage_c_v2.safetensors")["cascade_class"] == "StageCV2"
    assert (out / "stage_c.safetensors").is_file()
    for name in ("stage_b", "compressor"):
        one, two = (
            load_file(f"runs/published/stage_b_v2_phase{phase}/{name}.safetensors")
            for phase in (1, 2)
        )
        assert one.keys() == two.keys()
        assert any(not torch.equal(value, two[key]) for key, value in one.items())
    fetched = {name.split(":")[1] for name in on_hub.content()}
    assert all(path.startswith(("text_encoder/", "tokenizer/")) for path in fetched)
    assert_makes_a_picture(place)


def assert_makes_a_picture(place: Path) -> None:
    """What the recipe of v2 trained is a cascade as soon as it lies in one folder."""
    model = place / "v2"
    model.mkdir()
    (place / "stage_c_v2.safetensors").rename(model / "stage_c.safetensors")
    trained = place / "runs" / "published"
    for path in ("stage_a/stage_a", "stage_b_v2_phase2/stage_b", "stage_b_v2_phase2/compressor"):
        shutil.copy(trained / f"{path}.safetensors", model)
    encoder = find_text(V2_PRIOR)
    for name in ("text", "text_b"):
        shutil.copytree(encoder.folder, model / name)
        shutil.copytree(encoder.tokenizer, model / name, dirs_exist_ok=True)
    sampling = StageSampling(steps=2, guidance=2.0, time_input="raw", last_step="mean")
    spec = CascadeSpec(
        name="tiny-v2",
        image_size=128,
        pixels_per_stage_c_cell=42.67,
        size_multiple=64,
        generation="v2",
        stage_c_scale=42.0,
        stage_c_shift=1.0,
        stage_c=sampling,
        stage_b=sampling,
        text=TextConfig(hidden="post_norm"),
        text_b=TextConfig(hidden="post_norm"),
    )
    save_spec(spec, model)
    pipeline = CascadePipeline.from_folder(model, device="cpu")
    output = pipeline("a red apple", seed=0)
    assert output.pictures[0].size == (128, 128)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in LENGTHS if "_v3_" in n] + ["previewer_v3"])
def test_a_recipe_of_v3_runs(name: str, place: Path, on_hub: Hub) -> None:
    out = train(name)
    assert (out / f"{kind_of(name)}.safetensors").is_file()


@pytest.mark.slow
def test_published_weights_are_fine_tuned_at_their_own_size(place: Path, on_hub: Hub) -> None:
    out = train("finetune_stage_c_lite", "--optim.lr", "1e-9")
    tuned = load_file(out / "stage_c.safetensors")
    assert read_metadata(out / "stage_c.safetensors")["cascade_class"] == "StageC"
    fetched = {name.split(":")[1] for name in on_hub.content()}
    assert not any(path.startswith(("prior/", "decoder/", "vqgan/")) for path in fetched)
    found = find_network("stabilityai/stable-cascade:lite", "stage_c")
    assert found.published.config.num_heads == (2, 2)
    weights = build(found.opened, found.published).state_dict()
    assert tuned.keys() == weights.keys()
    for key, value in weights.items():
        torch.testing.assert_close(tuned[key], value, atol=1e-6, rtol=1e-4)
