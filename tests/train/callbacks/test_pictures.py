"""Pictures while a stage learns: the same training with them and without."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cascade.checkpoints.files import load_network
from cascade.errors import UserError
from cascade.images import open_image
from cascade.pipelines.cascade import CascadePipeline
from stages.stage_c import StageC
from train.callbacks.checkpoints import newest_checkpoint

PROMPTS = ["a red hat", "one fish, green", "a blue apple"]


@pytest.mark.parametrize("kind", ["stage_c", "stage_b"])
def test_pictures_are_drawn_of_both_weights_and_change_nothing(kind, make_run, tiny_model):
    plain = make_run(kind, "plain", model={"dropout": 0.2} if kind == "stage_c" else {})
    plain.start()
    pictures = {"model": str(tiny_model), "prompts": PROMPTS, "every_steps": 2, "seed": 7}
    drawing = make_run(
        kind, "drawing", pictures=pictures, model={"dropout": 0.2} if kind == "stage_c" else {}
    )
    drawing.start()
    names = sorted(path.name for path in (drawing.out / "pictures").iterdir())
    steps = ("0000002", "0000004")
    assert names == sorted(f"step_{step}_{one}.png" for step in steps for one in ("ema", "raw"))
    one, two = (load_file(run.out / f"{kind}.safetensors") for run in (plain, drawing))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    grids = {name: open_image(drawing.out / "pictures" / name) for name in names}
    assert grids[names[0]].size == (2 * 32 + 4, 2 * 32 + 4)
    assert len({grid.tobytes() for grid in grids.values()}) == 4


def test_the_averaged_weights_pictures_are_those_of_the_export(make_run, tiny_model):
    pictures = {"model": str(tiny_model), "prompts": PROMPTS[:1], "seed": 7}
    learned = {"prediction": "epsilon", "weight": "p2"}  # as the model's own
    run = make_run("stage_c", pictures=pictures, diffusion=learned)
    run.start()
    pipeline = CascadePipeline.from_folder(tiny_model, device="cpu")
    pipeline.stage_c = load_network(run.out / "stage_c.safetensors", expect=StageC)
    expected = pipeline(PROMPTS[0], seed=7, progress=False).pictures[0]
    drawn = open_image(run.out / "pictures" / "step_0000004_ema.png")
    assert drawn.tobytes() == expected.tobytes()


def test_a_model_whose_stages_do_not_fit_is_refused_before_the_first_step(make_run, tmp_path):
    missing = {"model": str(tmp_path / "nowhere"), "prompts": PROMPTS}
    with pytest.raises(UserError, match="nowhere"):
        make_run("stage_c", "missing", pictures=missing).start()


def test_no_prompts_are_refused(make_run, tiny_model):
    with pytest.raises(UserError, match="prompts has 0 entries"):
        make_run("stage_c", pictures={"model": str(tiny_model), "prompts": []}).start()


def test_a_picture_that_fails_is_grey_and_ends_nothing(make_run, tiny_model, monkeypatch, caplog):
    monkeypatch.setattr(
        "cascade.pipelines.cascade.check_not_black",
        lambda *_: (_ for _ in ()).throw(UserError("entirely black")),
    )
    run = make_run("stage_c", pictures={"model": str(tiny_model), "prompts": PROMPTS})
    assert run.start() == 0
    assert "no picture of 'a red hat': entirely black" in caplog.text
    assert open_image(run.out / "pictures" / "step_0000004_ema.png").getpixel((0, 0)) == (128,) * 3


def test_a_stage_that_learns_otherwise_than_the_lent_one_is_sampled_its_own_way(
    make_run, tiny_model
):
    pictures = {"model": str(tiny_model), "prompts": PROMPTS[:1], "seed": 7}
    run = make_run(
        "stage_c", pictures=pictures, diffusion={"prediction": "flow", "schedule": "linear"}
    )
    run.start()
    pipeline = CascadePipeline.from_folder(tiny_model, device="cpu")
    flow = replace(pipeline.spec.stage_c, prediction="flow", schedule="linear")
    pipeline.spec = replace(pipeline.spec, stage_c=flow)
    pipeline.stage_c = load_network(run.out / "stage_c.safetensors", expect=StageC)
    expected = pipeline(PROMPTS[0], seed=7, progress=False).pictures[0]
    drawn = open_image(run.out / "pictures" / "step_0000004_ema.png")
    assert drawn.tobytes() == expected.tobytes()


def test_who_tells_a_run_to_end_does_not_wait_for_pictures(
    make_run, tiny_model, shards, cache, monkeypatch
):
    """Neither for those of the end, nor for the rest of those that are being drawn."""
    pictures = {"model": str(tiny_model), "prompts": PROMPTS, "every_steps": 2}
    validation = {"shards": shards, "folder": str(cache), "every_steps": 3, "samples": 8}
    run = make_run("stage_c", pictures=pictures, validation=validation, run={"max_steps": 1000})
    drawn = []

    def draw(self, network, prompt, seed):
        drawn.append(prompt)
        os.kill(os.getpid(), signal.SIGTERM)
        return Image.new("RGB", (32, 32))

    monkeypatch.setattr("train.callbacks.drawing.CascadeDrawing.draw", draw)
    assert run.start() == 0
    assert drawn == PROMPTS[:1]
    assert list((run.out / "pictures").iterdir()) == []
    assert not (run.out / "validation.jsonl").exists()
    newest = newest_checkpoint(run.out)
    assert newest is not None and newest.name in ("step=2.ckpt", "step=3.ckpt")
