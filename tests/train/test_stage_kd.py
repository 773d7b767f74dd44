"""The cascade's smaller students: a Stage B of a larger one, and a fast decoder of Stage A."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
from cascade.checkpoints.files import load_network, read_metadata, save_network
from cascade.errors import UserError, run_main
from cascade.pipelines.cascade import CascadePipeline
from cascade.pipelines.parts import open_source
from cascade.pipelines.tiles import decode_pixels
from cascade.tools.describe import describe_path
from stages.stage_a_fast import FastDecodedStageA, StageAFast, StageAFastConfig
from stages.stage_b import StageB, StageBConfig
from tests.train.conftest import config_in
from train.callbacks.checkpoints import newest_checkpoint
from train.distill.thinned import spread_blocks, thinned
from train.systems.stage_b_kd import block_pairs, last_blocks

BIG = StageBConfig(
    cond_channels=16,
    hidden_channels=(8, 16),
    num_heads=(0, 2),
    down_blocks=(1, 5),
    up_blocks=(3, 1),
    up_repeats=(1, 1),
    text_pooled_channels=12,
    pixel_condition=False,
    dropout=(0.0, 0.0),
    time_conds=(),
)


# Stage B


@pytest.mark.parametrize(
    ("student", "teacher", "chosen"),
    [(3, 5, (0, 2, 4)), (1, 5, (0,)), (2, 3, (0, 2)), (4, 4, (0, 1, 2, 3)), (3, 2, (0, 1))],
)
def test_a_student_begins_with_every_nth_block_the_first_and_last_among_them(
    student, teacher, chosen
):
    assert spread_blocks(student, teacher) == chosen


def test_what_a_student_takes_over_is_of_its_own_blocks_and_shapes():
    teacher = StageB(BIG)
    small = replace(BIG, down_blocks=(1, 3), up_blocks=(2, 1), text_pooled_channels=10)
    student = StageB(small)
    found = thinned(student.state_dict(), small, teacher.state_dict(), BIG)
    weights = teacher.state_dict()
    key = "residual.depthwise.weight"
    for ours, theirs in (
        ("down_blocks.1.1", "down_blocks.1.2"),
        ("up_blocks.0.1", "up_blocks.0.2"),
    ):
        assert torch.equal(found.state[f"{ours}.{key}"], weights[f"{theirs}.{key}"])
    assert found.left == ("pooled_mapper.weight",)
    assert "pooled_mapper.weight" in found.summary
    with pytest.raises(UserError, match="the student has 1 levels and the teacher 2"):
        one = StageBConfig(
            hidden_channels=(8,), num_heads=(0,), down_blocks=(1,), up_blocks=(1,),
            up_repeats=(1,), dropout=(0.0,),
        )  # fmt: skip
        thinned({}, one, weights, BIG)


def test_blocks_are_paired_level_by_level_or_as_named():
    small = replace(BIG, down_blocks=(1, 2), up_blocks=(2, 1))
    assert block_pairs({}, small, BIG) == (
        ("down_blocks.0.0", "down_blocks.0.0"),
        ("down_blocks.1.1", "down_blocks.1.4"),
        ("up_blocks.0.1", "up_blocks.0.2"),
        ("up_blocks.1.0", "up_blocks.1.0"),
    )
    assert len(last_blocks(StageBConfig.lite())) == 8
    with pytest.raises(ValueError, match=r"'down_blocks.1.4' is no block of the student"):
        block_pairs({"down_blocks.1.4": "down_blocks.1.4"}, small, BIG)


def test_a_student_that_lost_nothing_starts_at_its_teachers_outputs_and_features(
    make_run, tiny_model
):
    before = (tiny_model / "stage_b.safetensors").read_bytes()
    taught = {"output_weight": 1.0, "feature_weight": 1.0, "task_weight": 0.5}
    run = make_run("stage_b_kd", teacher=taught)
    assert run.start() == 0
    rows = run.metrics()
    assert float(rows[0]["kd_output"]) < 1e-10 and float(rows[0]["kd_features"]) < 1e-10
    assert float(rows[3]["kd_output"]) > 1e-6 and float(rows[0]["task"]) > 0.01
    for row in rows[:4]:
        terms = sum(float(row[name]) for name in ("task", "kd_output", "kd_features"))
        assert float(row["loss"]) == pytest.approx(terms, rel=1e-4)
    keys = torch.load(newest_checkpoint(run.out), weights_only=True)["state_dict"]
    assert {key.split(".")[0] for key in keys} == {"network"}
    assert (tiny_model / "stage_b.safetensors").read_bytes() == before
    ledger = [json.loads(line) for line in (run.out / "ledger.jsonl").read_text().splitlines()]
    assert sum(row["seconds"]["teacher"] for row in ledger) > 0


@pytest.mark.parametrize("recompute", [False, True])
def test_a_student_of_other_widths_learns_through_projections_that_are_not_kept(
    recompute, make_run, tiny_model
):
    sizes = config_in(tiny_model / "stage_b.safetensors") | {"hidden_channels": [8, 24]}
    taught = {"feature_weight": 1.0, "init": False, "hidden_channels": 8}
    options = {"activation_checkpointing": recompute}
    run = make_run("stage_b_kd", model=sizes, teacher=taught, run=options)
    assert run.start() == 0
    assert [path.name for path in run.out.glob("*.safetensors")] == ["stage_b.safetensors"]
    keys = torch.load(newest_checkpoint(run.out), weights_only=True)["state_dict"]
    projected = {key.split(".")[1] for key in keys if key.startswith("projectors.")}
    assert projected == {"down_blocks_1_0", "up_blocks_0_0"}
    assert load_network(run.out / "stage_b.safetensors", expect=StageB).config.hidden_channels == (
        8,
        24,
    )


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"teacher": None}, "teacher is missing: name the larger Stage B"),
        ({"teacher": {"network": "nowhere"}}, "nowhere: no such file"),
        ({"diffusion": {"prediction": "v"}}, "was trained with epsilon: set that"),
        (
            {"teacher": {"feature_weight": 1.0, "blocks": {"up": "up"}}},
            "teacher.blocks: 'up' is no block of the student",
        ),
        ({"teacher": {"task_weight": 0.0}}, "one must be positive"),
        (
            {"frozen_compressor": None, "compressor": {}},
            "compressor is trained: the teacher knows the latents of a finished one alone",
        ),
    ],
)
def test_a_teacher_of_another_kind_is_one_line(sections, message, make_run, capsys):
    run = make_run("stage_b_kd", **sections)
    assert run_main(lambda: run.start("--run.max_steps", 1)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


# The fast decoder


def test_the_fast_decoder_learns_from_stage_as_decoder_and_the_pictures(make_run):
    run = make_run("stage_a_decoder", run={"max_steps": 30, "checkpoint_every_steps": 30})
    assert run.start() == 0
    rows = run.metrics()
    names = ("pixels", "kd_pixels", "perceptual")
    for row in rows[:3]:
        terms = sum(float(row[name]) for name in names)
        assert float(row["loss"]) == pytest.approx(terms, rel=1e-4) and terms > 0
    assert run.losses()[-1] < 0.8 * run.losses()[0]
    keys = torch.load(newest_checkpoint(run.out), weights_only=True)["state_dict"]
    assert {key.split(".")[0] for key in keys} == {"network"}
    fast = load_network(run.out / "stage_a_fast.safetensors", expect=StageAFast)
    assert fast.config == StageAFastConfig(channels=(8, 8), blocks=(1, 1))
    again = make_run("stage_a_decoder", "again", init_from=str(run.out))
    assert again.start("--run.max_steps", 1) == 0
    assert again.losses()[0] < 0.8 * run.losses()[0]
    [described] = describe_path(run.out / "stage_a_fast.safetensors")
    assert described.network.startswith("fast decoder of Stage A") and not described.problem


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"channels": [8], "blocks": [1]}, "the fast decoder has upscale 2, but"),
        ({"latent_channels": 8}, "the fast decoder has latent_channels 8, but"),
    ],
)
def test_a_decoder_of_other_latents_is_refused(model, message, make_run, capsys):
    run = make_run("stage_a_decoder", model=model)
    assert run_main(lambda: run.start()) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def fast_model(tiny_model, tmp_path) -> Path:
    """The tiny model with a fast decoder beside its networks."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    torch.manual_seed(0)
    fast = StageAFast(StageAFastConfig(channels=(8, 8), blocks=(1, 1)))
    save_network(folder / "stage_a_fast.safetensors", fast)
    return folder


def test_a_pipeline_decodes_with_it_where_asked_whole_and_in_tiles(fast_model, tiny_model):
    plain = CascadePipeline.from_folder(fast_model, device="cpu")
    fast = CascadePipeline(open_source(fast_model, fast_decoder=True), device="cpu")
    assert isinstance(fast.stage_a, FastDecodedStageA)
    latents = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    network = load_network(fast_model / "stage_a_fast.safetensors", expect=StageAFast)
    with torch.no_grad():
        whole = fast.decode(latents)
        assert torch.allclose(whole, network(latents).clamp(0, 1), atol=1e-5)
        assert not torch.allclose(whole, plain.decode(latents), atol=0.01)
        tiles = decode_pixels(fast.stage_a, latents, torch.float32, tile=16)
    assert torch.allclose(tiles, whole, atol=1e-5)
    assert plain._source.weights_hash() == open_source(tiny_model).weights_hash()
    assert fast._source.weights_hash() != plain._source.weights_hash()


def test_sample_py_takes_it_and_a_model_without_one_is_refused(
    fast_model, tiny_model, tmp_path, capsys
):
    words = ["--prompt", "a red apple", "--seed", "1", "--device", "cpu", "--out"]
    for name, more in (("plain", []), ("fast", ["--fast-decoder"])):
        out = str(tmp_path / f"{name}.png")
        assert sample.main([*words, out, "--model", str(fast_model), *more]) == 0
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "fast.png").read_bytes()
    refused = [*words, str(tmp_path / "no.png"), "--model", str(tiny_model), "--fast-decoder"]
    assert run_main(lambda: sample.main(refused)) == 2
    assert "this model has no fast decoder" in capsys.readouterr().err.splitlines()[-1]


def test_memory_is_planned_with_the_decoder_that_runs(fast_model):
    from cascade.pipelines.memory import weight_bytes

    plain = CascadePipeline.from_folder(fast_model, device="cpu")
    fast = CascadePipeline(open_source(fast_model, fast_decoder=True), device="cpu")
    saved = sum(p.numel() for p in plain.stage_a.decoder.parameters())
    added = sum(p.numel() for p in fast.stage_a.decoder.parameters())
    found = [weight_bytes(one.stage_a)[0] for one in (plain, fast)]
    size = next(plain.stage_a.parameters()).element_size()
    assert found[1] - found[0] == size * (added - saved)


def test_a_file_of_another_network_is_refused(fast_model, tiny_model):
    path = fast_model / "stage_a_fast.safetensors"
    stage_a = tiny_model / "stage_a.safetensors"
    save_file(load_file(stage_a), path, read_metadata(stage_a))
    with pytest.raises(UserError, match="holds a StageA, but a StageAFast is needed"):
        CascadePipeline(open_source(fast_model, fast_decoder=True), device="cpu")
