"""What a run starts from: weights in every layout, sizes taken from them, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cascade.checkpoints.autoencoders import trunk
from cascade.checkpoints.files import load_network
from cascade.checkpoints.load import FAMILIES, build
from cascade.checkpoints.part_files import find_network
from cascade.checkpoints.weight_map import to_theirs
from cascade.errors import UserError, run_main
from cascade.tools.convert import convert
from cascade.tools.diffusers_names import diffusers_config
from stages.previewer import Previewer
from stages.semantic_compressor import CompressorConfig, SemanticCompressor
from stages.stage_a import StageA
from stages.stage_b_v2 import StageBV2
from stages.stage_c import StageC, StageCConfig
from stages.stage_c_v2 import StageCV2, StageCV2Config
from tests.fake_hub import V3, Hub, read_files
from train.encode import FrozenPaths, find_stage_a
from train.initial import start_compressor_from, start_from

# Heads of 64, as in every published network: a file of the authors does not say how many.
STAGE_C = StageCConfig(
    cond_channels=16,
    hidden_channels=(64, 64),
    num_heads=(1, 1),
    down_blocks=(1, 2),
    up_blocks=(2, 1),
    text_channels=16,
    text_pooled_channels=12,
    image_channels=6,
)
STAGE_C_V2 = StageCV2Config(hidden_channels=64, num_blocks=2, num_heads=1, text_channels=16)
NETWORKS = {StageCConfig: StageC, StageCV2Config: StageCV2}
NO_SIZES = {"model": None, "optim": {"name": "adamw", "lr": 1e-9}}


def save_as(layout: str, network: torch.nn.Module, folder: Path) -> Path:
    """Write a network as others do: nothing in the file tells that it is ours."""
    family = next(one for one in FAMILIES if one.network is type(network))
    state = family.to_layout[layout](network.state_dict(), network.config)
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "original":
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "stage.safetensors")
        return folder / "stage.safetensors"
    from diffusers import StableCascadeUNet
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior

    content = diffusers_config(network.config)
    theirs = {"StableCascadeUNet": StableCascadeUNet, "WuerstchenPrior": WuerstchenPrior}
    written = theirs[content.pop("_class_name")](**content)
    written.load_state_dict(state)
    written.save_pretrained(folder)
    return folder


def random_network(sizes: StageCConfig | StageCV2Config) -> torch.nn.Module:
    torch.manual_seed(3)
    network = NETWORKS[type(sizes)](sizes)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


def assert_started_from(run, network: torch.nn.Module) -> None:
    """A step at a rate of nothing leaves the weights that a run starts with."""
    exported = load_network(run.out / "stage_c.safetensors", expect=type(network))
    assert exported.config == network.config
    for key, value in network.state_dict().items():
        torch.testing.assert_close(exported.state_dict()[key], value, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("sizes", [STAGE_C, STAGE_C_V2], ids=["v3", "v2"])
def test_a_run_takes_weights_and_sizes_of_others_layouts(layout, sizes, make_run, tmp_path):
    network = random_network(sizes)
    path = save_as(layout, network, tmp_path / "theirs")
    run = make_run("stage_c", init_from=str(path), **NO_SIZES)
    assert run.start("--run.max_steps", 1) == 0
    assert_started_from(run, network)
    noted = yaml.safe_load((run.out / "config.yaml").read_text())
    section = "model_v2" if sizes is STAGE_C_V2 else "model"
    assert noted[section]["num_heads"] == json.loads(json.dumps(sizes.num_heads))


@pytest.mark.parametrize("diffusion", [{}, {"prediction": "epsilon"}])
def test_a_run_tells_that_it_teaches_other_than_its_weights_learned(
    diffusion, make_run, tmp_path, caplog
):
    path = save_as("original", random_network(STAGE_C), tmp_path / "theirs")
    run = make_run("stage_c", init_from=str(path), diffusion=diffusion, **NO_SIZES)
    assert run.start("--run.max_steps", 1) == 0
    told = [one.getMessage() for one in caplog.records if "was not trained with" in one.msg]
    assert len(told) == (0 if diffusion else 1)
    if told:
        assert "prediction flow, schedule linear, as this run is" in told[0]
        assert told[0].endswith("set diffusion: {prediction: epsilon, schedule: cosine}")
    assert run.start("--run.max_steps", 2, "--resume") == 0
    again = [one for one in caplog.records if "was not trained with" in one.msg]
    assert len(again) == len(told), "a run that goes on has weights of its own"


def test_a_run_that_goes_on_needs_its_initial_weights_no_more(make_run, tmp_path):
    path = save_as("original", random_network(STAGE_C), tmp_path / "theirs")
    run = make_run("stage_c", init_from=str(path), **NO_SIZES)
    assert run.start("--run.max_steps", 1) == 0
    path.unlink()
    assert run.start("--run.max_steps", 2, "--resume") == 0
    assert load_network(run.out / "stage_c.safetensors", expect=StageC).config == STAGE_C


def test_a_run_starts_from_a_run_s_folder_a_model_s_and_the_hub(make_run, tiny_model, hub: Hub):
    hub.repositories["someone/model"] = read_files(tiny_model)
    network = load_network(tiny_model / "stage_c.safetensors", expect=StageC)
    for number, name in enumerate((str(tiny_model), "someone/model")):
        run = make_run("stage_c", f"run{number}", init_from=name, **NO_SIZES)
        assert run.start("--run.max_steps", 1) == 0
        assert_started_from(run, network)
    assert [name for name in hub.content() if name.endswith(".safetensors")] == [
        "someone/model:stage_c.safetensors"
    ]
    again = make_run("stage_c", "again", init_from=str(run.out), **NO_SIZES)
    assert again.start("--run.max_steps", 1) == 0
    assert_started_from(again, network)


@pytest.mark.parametrize(("kind", "network"), [("stage_a", StageA), ("previewer", Previewer)])
def test_other_networks_take_the_sizes_of_their_weights_too(kind, network, make_run, tiny_model):
    run = make_run(kind, init_from=str(tiny_model), model=None)
    assert run.start("--run.max_steps", 1) == 0
    start = load_network(tiny_model / f"{kind}.safetensors", expect=network)
    assert load_network(run.out / f"{kind}.safetensors", expect=network).config == start.config


def test_frozen_networks_come_from_the_hub_in_a_stream(make_run, two: Hub, tiny_model, tmp_path):
    convert(tiny_model, "original", tmp_path / "original", torch.float32)
    effnet = (tmp_path / "original" / "effnet_encoder.safetensors").read_bytes()
    two.repositories[V3]["effnet_encoder.safetensors"] = effnet
    data = {"mode": "exact", "size": 32, "folder": None, "index_folder": str(tmp_path / "index")}
    frozen = {"text": V3, "stage_a": V3, "stage_a_scale": 0.43, "frozen_compressor": V3}
    run = make_run("stage_b", data=data, compressor=None, **frozen)
    assert run.start("--run.max_steps", 1) == 0
    large = {name.split(":")[1] for name in two.content() if name.endswith(".safetensors")}
    assert large == {
        "text_encoder/model.safetensors",
        "vqgan/diffusion_pytorch_model.safetensors",
        "effnet_encoder.safetensors",
    }


def refusal(run, capsys, *arguments: object) -> str:
    assert run_main(lambda: run.start(*arguments)) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_weights_of_another_network_are_one_line(make_run, tmp_path, tiny_model, capsys):
    v3 = str(save_as("original", random_network(STAGE_C), tmp_path / "v3"))
    v2 = str(save_as("original", random_network(STAGE_C_V2), tmp_path / "v2"))
    other = str(tiny_model / "stage_b.safetensors")
    (tmp_path / "folder").mkdir()
    cut = tmp_path / "cut.safetensors"
    shutil.copy(tiny_model / "stage_c.safetensors", cut)
    with open(cut, "r+b") as file:
        file.truncate(3000)
    for start, arguments, message in (
        (v3, [], "another Stage C than model says: hidden_channels is (64, 64) there and (16, 16)"),
        (v2, [], "a Stage C of v2, which model does not describe; give its sizes as model_v2"),
        (other, [], "holds a Stage B, but a Stage C is needed"),
        (other, ["--model", "null"], "holds a Stage B, but a Stage C is needed"),
        (str(tmp_path / "folder"), [], "holds no weights of a Stage C"),
        (str(tmp_path / "none"), [], "none: no such file or folder; check the path"),
        ("runs/none/stage_c.safetensors", [], "no such file or folder; check the path"),
        (str(cut), [], "cut.safetensors"),
        (v2, ["--model", "null", "--image_share", "0.1"], "Stage C of Würstchen v2 takes no pict"),
        (v2, ["--model", "null", "--mask_share", "0.1"], "Stage C of Würstchen v2 takes no mask"),
        ("null", ["--model", "null"], "model or model_v2 is missing: name the network's sizes"),
        ("null", ["--model_v2", "{}"], "model is given and model_v2 too"),
    ):
        run = make_run("stage_c", init_from=None if start == "null" else start)
        line = refusal(run, capsys, *arguments)
        assert message in line, line
        assert not (run.out / "stage_c.safetensors").exists()


def test_a_published_stage_a_must_be_told_its_scale(tiny_model, tmp_path, make_run, capsys):
    network = load_network(tiny_model / "stage_a.safetensors", expect=StageA)
    path = str(save_as("original", network, tmp_path / "theirs"))
    with pytest.raises(UserError, match=r"set stage_a_scale: 0\.43"):
        find_stage_a(path, None)
    assert find_stage_a(path, 0.3764).published.config.scale == 0.3764
    own = str(tiny_model / "stage_a.safetensors")
    with pytest.raises(UserError, match=r"stage_a_scale is 0\.3764 but .* was trained with 0\.43"):
        find_stage_a(own, 0.3764)
    hashes = [FrozenPaths(stage_a=path, stage_a_scale=s).hashes() for s in (0.43, 0.3764)]
    assert hashes[0] != hashes[1]
    line = refusal(make_run("stage_a", init_from=path, model=None), capsys)
    assert "give the model section, whose scale is 0.43" in line


def test_heads_are_compared_only_where_the_file_tells_them(tmp_path):
    sizes = StageCV2Config(hidden_channels=64, num_blocks=1, num_heads=4, text_channels=16)
    network = random_network(sizes)
    start_from(StageCV2(sizes), str(save_as("original", network, tmp_path / "a")), "stage_c")
    theirs = str(save_as("diffusers", network, tmp_path / "b"))
    start_from(StageCV2(sizes), theirs, "stage_c", "model_v2")
    others = StageCV2(
        StageCV2Config(hidden_channels=64, num_blocks=1, num_heads=2, text_channels=16)
    )
    with pytest.raises(UserError, match="another Stage C than model_v2 says"):
        start_from(others, theirs, "stage_c", "model_v2")


def test_a_dropout_of_ones_own_is_no_other_network(tmp_path):
    start = save_as("diffusers", random_network(STAGE_C), tmp_path / "theirs")
    network = StageC(replace(STAGE_C, dropout=0.3))
    start_from(network, str(start), "stage_c")
    assert network.config.dropout == 0.3


# The compressor


def tiny_compressor(tiny_model: Path) -> CompressorConfig:
    return load_network(tiny_model / "compressor.safetensors", expect=SemanticCompressor).config


def test_a_compressor_starts_with_the_trunk_that_imagenet_taught(tiny_model, tmp_path):
    sizes = tiny_compressor(tiny_model)
    taught, learning = SemanticCompressor(sizes), SemanticCompressor(sizes)
    own = {f"trunk.{key}": value for key, value in taught.trunk.state_dict().items()}
    features = to_theirs(own, trunk("trunk", "features", sizes.stages))
    assert "features.0.0.weight" in features
    path = tmp_path / "efficientnet.pth"
    torch.save({**features, "classifier.1.weight": torch.zeros(3, 16)}, path)
    mapper = learning.mapper.weight.detach().clone()
    start_compressor_from(learning, str(path))
    for key, value in taught.trunk.state_dict().items():
        assert torch.equal(learning.trunk.state_dict()[key], value), key
    assert torch.equal(learning.mapper.weight, mapper)
    assert all(parameter.requires_grad for parameter in learning.parameters())

    del features["features.0.0.weight"]
    torch.save({**features, "features.0.0.weight": torch.zeros(9, 3, 3, 3)}, path)
    with pytest.raises(
        UserError, match=r"compressor_init_from .*: does not fit Trunk: 1 misshapen"
    ):
        start_compressor_from(learning, str(path))


def test_a_compressor_starts_with_another_s_weights(tiny_model):
    learning = SemanticCompressor(tiny_compressor(tiny_model))
    start_compressor_from(learning, str(tiny_model))
    found = find_network(tiny_model, "compressor")
    expected = build(found.opened, found.published).state_dict()
    assert all(torch.equal(v, learning.state_dict()[key]) for key, v in expected.items())


def test_stage_b_s_joint_compressor_needs_a_start_beside_the_stage_b(make_run, tiny_model, capsys):
    start = str(tiny_model / "stage_b.safetensors")
    run = make_run("stage_b", init_from=start)
    assert "name its weights as compressor_init_from" in refusal(run, capsys)
    run = make_run("stage_b", "both", init_from=start, compressor_init_from=str(tiny_model))
    assert run.start("--run.max_steps", 1) == 0
    run = make_run(
        "stage_b", "frozen", compressor_init_from="x", compressor=None, frozen_compressor="x"
    )
    assert "no compressor is trained" in refusal(run, capsys)


def test_stage_b_of_v2_takes_the_latents_that_the_compressor_itself_gives(make_run, tiny_model):
    """Shifted and scaled for Stage C, and brought back for Stage B."""
    from cascade.config import load_yaml
    from train.data.cached import CachedBatch
    from train.draws import StepDraws
    from train.systems.stage_b import StageBRun, StageBSystem

    sizes = {"hidden_channels": [8, 8], "num_heads": [0, 1], "num_blocks": [1, 1]}
    sizes |= {"reads_compressed": [False, True], "dropout": [0.0, 0.0]}
    sizes |= {"cond_channels": 8, "text_channels": 16}
    made = make_run(
        "stage_b",
        model=None,
        model_v2=sizes,
        compressor=None,
        frozen_compressor="x",
        condition_dropout=0.0,
        condition_noise=0.0,
        caption_dropout=0.5,
    )
    config = load_yaml(StageBRun, made.config)
    system = StageBSystem(config, (torch.zeros(3, 16), torch.zeros(12)), CompressorConfig.v2())
    assert isinstance(system.network, StageBV2)
    raw = torch.randn(64, 16, 2, 2)
    batch = CachedBatch(
        captions=["a"] * 64,
        groups=torch.arange(64),
        pixels=torch.rand(64, 3, 8, 8),
        stage_c_latents=(raw + 1) / 42,
        text_hidden=torch.ones(64, 3, 16),
    )
    cond = system.condition(batch, StepDraws(0, 0))
    torch.testing.assert_close(cond.stage_c_latents, raw, atol=1e-5, rtol=1e-5)
    told = cond.text_hidden.flatten(1).mean(dim=1)
    assert set(told.tolist()) == {0.0, 1.0}


def test_pictures_that_stage_b_of_v2_can_t_halve_are_refused(make_run, tiny_model, capsys):
    sizes = {"hidden_channels": [8, 8], "num_heads": [0, 1], "num_blocks": [1, 1]}
    sizes |= {"reads_compressed": [False, True], "dropout": [0.0, 0.0]}
    sizes |= {"cond_channels": 8, "text_channels": 16}
    run = make_run("stage_b", model=None, model_v2=sizes)
    assert run.start("--run.max_steps", 2) == 0
    assert load_file(run.out / "stage_b.safetensors")
    data = {"mode": "exact", "size": 24, "folder": None}
    run = make_run("stage_b", "odd", model=None, model_v2=sizes, data=data)
    assert "24x24; this Stage B needs multiples of 16 px" in refusal(run, capsys)
