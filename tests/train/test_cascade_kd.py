"""Stage C with a U-Net as its teacher: what a step learns from, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cascade.checkpoints.files import load_network, read_metadata
from cascade.config import load_yaml
from cascade.errors import UserError, run_main
from stages.stage_c import StageC
from train.callbacks.checkpoints import newest_checkpoint
from train.cascade_kd_runs import _lesson
from train.data.__main__ import main as data_main
from train.data.cached import CachedBatch
from train.distill.bias_curve import BiasPoint
from train.distill.picture_teacher import PictureTeacher, PictureTeacherConfig
from train.draws import StepDraws
from train.losses.denoising import noise_batch
from train.runs import frozen_of_stage_c, open_stage_c
from train.systems.cascade_kd import CascadeKDRun, CascadeKDSystem

from .conftest import precompute_run, write_curve

ALL = {
    "align": {"weight": 0.5, "hidden_channels": 8},
    "relations": {"weight": 2.0, "min_log_snr": -1.0},
    "estimate": {"weight": 0.25},
}


def system_of(made, *, loaded: bool = True) -> tuple[CascadeKDSystem, CachedBatch]:
    """The system of a run file with its teacher, and a batch of all parts."""
    from dataclasses import replace

    from train.cascade_kd_runs import _with_teacher

    config = load_yaml(CascadeKDRun, made.config)
    frozen = _with_teacher(config, frozen_of_stage_c(config))
    data = open_stage_c(config, replace(frozen, autoencoder=config.teacher.autoencoder))
    lesson, channels = _lesson(config, data)
    torch.manual_seed(0)
    system = CascadeKDSystem(config, data.null_text, lesson, channels)
    with torch.no_grad():
        for parameter in system.network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    if lesson is not None and loaded:
        lesson.load(torch.device("cpu"))
    system.logged = {}
    system.log = lambda name, value, **_: system.logged.__setitem__(name, value)
    return system, next(iter(data.loader_from(0, 0, 1)))


def terms(system: CascadeKDSystem, batch: CachedBatch, step: int = 0) -> dict[str, torch.Tensor]:
    """The terms of a step, by the name that they are logged under."""
    taught(system, batch, step)
    return system.logged


def taught(system: CascadeKDSystem, batch: CachedBatch, step: int = 0) -> torch.Tensor:
    """What the terms of a step add to a loss of nothing."""
    draws = StepDraws(0, step)
    noised = noise_batch(batch.require("stage_c_latents"), system.config.diffusion, draws)
    output = system.predict(noised, system.condition(batch, draws), None)
    return system.taught(torch.zeros(()), batch, noised, output, draws)


# A whole run


def test_every_term_is_logged_the_teacher_is_in_no_file_and_its_seconds_are_its_own(
    make_taught, tiny_unet
):
    before = (tiny_unet / "unet.safetensors").read_bytes()
    run = make_taught(**ALL, captions=True)
    assert run.start() == 0
    rows = run.metrics()
    names = ("task", "kd_align", "kd_relations", "kd_estimate")
    for row in rows[:4]:
        assert float(row["loss"]) == pytest.approx(
            sum(float(row[name]) for name in names), rel=1e-4
        )
        assert 0 < float(row["kd_align"]) < 1 and float(row["task"]) > 0
    for name in names:
        assert max(float(row[name]) for row in rows[:4]) > 0, name
    shares = [float(row["kd_estimate_share"]) for row in rows[:4]]
    assert 0 < max(shares) and min(shares) < 1
    checkpoint = torch.load(newest_checkpoint(run.out), weights_only=True)
    kinds = {key.split(".")[0] for key in checkpoint["state_dict"]}
    assert kinds == {"network", "projector"}
    assert [path.name for path in run.out.glob("*.safetensors")] == ["stage_c.safetensors"]
    load_network(run.out / "stage_c.safetensors", expect=StageC)
    assert (tiny_unet / "unet.safetensors").read_bytes() == before
    ledger = [json.loads(line) for line in (run.out / "ledger.jsonl").read_text().splitlines()]
    seconds = sum(row["seconds"]["teacher"] for row in ledger)
    assert 0 < seconds < sum(sum(row["seconds"].values()) for row in ledger)


def test_without_a_term_it_is_the_training_of_stage_c_to_the_bit(make_taught, make_run):
    taught, plain = make_taught("none"), make_run("stage_c", "plain")
    assert taught.start() == plain.start() == 0
    assert taught.losses() == plain.losses()
    ours, theirs = (load_file(run.out / "stage_c.safetensors") for run in (taught, plain))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ledger = (taught.out / "ledger.jsonl").read_text().splitlines()
    assert all(json.loads(line)["seconds"]["teacher"] == 0 for line in ledger)


def test_a_run_goes_on_where_it_stopped_with_its_projection(make_taught):
    whole, parts = make_taught("whole", **ALL), make_taught("parts", **ALL)
    assert whole.start() == 0
    assert parts.start("--run.max_minutes", 1e-6) == 0
    assert parts.start("--resume") == 0
    ours, theirs = (load_file(run.out / "stage_c.safetensors") for run in (parts, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_term_with_a_projection_is_not_switched_midway(make_taught):
    run = make_taught("align", align=ALL["align"])
    assert run.start("--run.max_steps", 1) == 0
    with pytest.raises(UserError, match=r"--resume: align\.weight is 0\.0 but the run was started"):
        run.start("--resume", "--align.weight", "0.0")


@pytest.mark.parametrize("option", ["activation_checkpointing", "compile"])
def test_neither_recomputing_nor_compiling_changes_what_the_teacher_says(
    option, make_taught, monkeypatch
):
    monkeypatch.setattr("cascade.compiled.COMPILE_BACKEND", "eager")
    plain, other = make_taught("plain", **ALL), make_taught("other", **ALL, run={option: True})
    for run in (plain, other):
        assert run.start("--run.max_steps", 2) == 0
    for name in ("kd_align", "kd_relations", "kd_estimate", "task"):
        values = [[float(row[name]) for row in run.metrics()[:2]] for run in (plain, other)]
        assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-7), name


def test_a_stream_of_pictures_and_shards_of_a_cache_hold_the_features_as_well(
    make_run, shards, tiny_model, tiny_unet, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    config = tmp_path / "of.yaml"
    config.write_text(precompute_run(tiny_unet))
    words = ["precompute", "--shards", shards, "--shards-out", str(tmp_path / "latents")]
    words += ["--size", "32", "--text", str(tiny_model / "text"), "--dtype", "float32"]
    words += ["--compressor", str(tiny_model / "compressor.safetensors")]
    assert data_main([*words, "--teacher-of", str(config)]) == 0
    data = {"mode": "exact", "size": 32, "folder": None}
    losses = []
    for name, source in (("pictures", shards), ("latents", f"{tmp_path}/latents/*.tar")):
        align = {"weight": 0.5, "hidden_channels": 8}
        run = make_run("cascade_kd", name, data={**data, "shards": source}, align=align)
        assert run.start("--run.max_steps", 2) == 0
        losses.append([float(row["kd_align"]) for row in run.metrics()[:2]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# One step


@pytest.mark.parametrize("term", ["align", "relations", "estimate"])
def test_a_terms_gradient_reaches_stage_c_and_never_the_teacher(term, make_taught):
    section = ALL[term] | {"source": "latents"} if term == "align" else ALL[term]
    system, batch = system_of(make_taught(**{term: section}))
    found = taught(system, batch)
    assert found.detach() == system.logged[f"kd_{term}"] > 0  # of the others there is nothing
    found.backward()
    blocks = [p.grad for p in system.network.down_blocks.parameters()]
    assert any(grad is not None and bool(grad.any()) for grad in blocks)
    assert system.lesson is not None
    teacher = system.lesson.teacher
    frozen = [*teacher.unet._network.parameters(), *teacher._loaded().parameters()]
    assert not teacher.unet._network.training and not teacher._loaded().training
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    own = {name.split(".")[0] for name, _ in system.named_parameters()}
    assert own == ({"network", "projector"} if term == "align" else {"network"})


def test_features_from_the_cache_and_of_cached_latents_are_the_same(make_taught):
    found = []
    for source in ("data", "latents"):
        align = {"weight": 1.0, "hidden_channels": 8, "source": source}
        system, batch = system_of(make_taught(source, align=align))
        assert (system.lesson is None) == (source == "data")
        found.append(float(terms(system, batch)["kd_align"].detach()))
    assert found[0] == pytest.approx(found[1], rel=5e-3)  # float16 in the cache


def test_the_teacher_is_asked_above_the_bound_only_and_terms_of_the_rest_are_zero(make_taught):
    bound = {"weight": 1.0, "min_log_snr": 1e3}
    system, batch = system_of(make_taught(relations=bound))
    assert system.lesson is not None
    asked = []
    system.lesson.teacher.ask = lambda *a, **k: asked.append(a)
    assert float(terms(system, batch)["kd_relations"].detach()) == 0.0 and asked == []


def test_a_sample_weighs_the_same_however_many_are_asked_beside_it(make_taught):
    """Noise belongs to a sample's place: raising the bound leaves the others' terms as they are."""
    losses = []
    for number, bound in enumerate((-100.0, 0.0)):
        relations = {"weight": 1.0, "min_log_snr": bound}
        system, batch = system_of(make_taught(f"run{number}", relations=relations))
        losses.append(float(terms(system, batch)["kd_relations"].detach()))
    assert 0 < losses[1] < losses[0]


def test_a_teachers_operations_are_those_of_the_samples_it_is_asked_about(make_taught):
    """Not those of the first step, of which there may have been more or fewer."""
    system, batch = system_of(make_taught(relations={"weight": 1.0, "min_log_snr": 0.0}))
    schedule = system.config.diffusion.noise_schedule()
    asked, by_sample = [], []
    for step in range(6):
        before = system.teacher_flops
        terms(system, batch, step)
        latents = batch.require("stage_c_latents")
        noised = noise_batch(latents, system.config.diffusion, StepDraws(0, step))
        asked.append(int((schedule.log_snr(noised.t) >= 0.0).sum()))
        if asked[-1]:
            by_sample.append((system.teacher_flops - before) / asked[-1])
    assert len(set(asked)) > 1, "another number in each step"
    assert by_sample == pytest.approx([by_sample[0]] * len(by_sample)) and by_sample[0] > 0


# What is refused


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"teacher": None, **ALL}, "align.weight is set but teacher is missing"),
        ({"teacher": {"image_size": 64}}, "image_size is 64 but the pictures are 32x32"),
        ({"align": {"weight": 1, "block": "up"}}, "align.block: 'up' is no block of this Stage C"),
        (
            {"relations": {"weight": 1, "sites": {"down_blocks.0.0": "mid"}}},
            "relations.sites: 'mid' is no place of",
        ),
        ({"align": {"weight": 1, "site": "mid"}}, "site 'mid': no place of"),
        ({"align": {"weight": 1, "timestep": 250}}, "teacher.safetensors: made from pictures"),
        ({"estimate": {"weight": 1, "curve": None}}, "curve is missing: an estimate is a target"),
        ({"align": {"weight": -1}}, "weight=-1"),
    ],
)
def test_a_teacher_that_does_not_fit_is_one_line(sections, message, make_taught, capsys):
    run = make_taught(**{"align": {"weight": 1.0}, **sections})
    assert run_main(lambda: run.start("--run.max_steps", 1)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "another"}, "measured with teacher another, but this run has"),
        ({"compressor": "another"}, "measured with compressor another"),
        ({"captions": True}, "measured with captions True, but this run has False"),
        (
            {"points": (BiasPoint(0, 7.0, 0.5, 0.5), BiasPoint(9, 4.0, 1.0, 1.0))},
            "biased at all noise; leave the term out",
        ),
    ],
)
def test_a_curve_of_something_else_is_refused(
    changes, message, make_taught, tiny_unet, tiny_model, tmp_path, capsys
):
    values = {"captions": False} | changes
    curve = write_curve(tmp_path / "other.json", tiny_unet, tiny_model, **values)
    run = make_taught(estimate={"weight": 1.0, "curve": curve})
    assert run_main(lambda: run.start()) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_teacher_of_other_text_states_is_refused_captions_only(
    make_taught, tiny_unet, tmp_path, capsys
):
    """Without captions any teacher of these pictures will do."""
    from stages.unet.config import UNetConfig
    from stages.unet.unet import UNet

    values = json.loads(read_metadata(tiny_unet / "unet.safetensors")["cascade_config"])
    from cascade.checkpoints.files import save_network
    from cascade.config import from_dict

    wide = UNet(from_dict(UNetConfig, values | {"text_channels": 24}, "test"))
    save_network(tmp_path / "wide.safetensors", wide)
    sections = {"teacher": {"unet": str(tmp_path / "wide.safetensors")}}
    sections["relations"] = {"weight": 1.0}
    run = make_taught("told", captions=True, **sections)
    assert run_main(lambda: run.start("--run.max_steps", 1)) == 2
    assert "reads another text encoder; set teacher_captions false" in capsys.readouterr().err
    assert make_taught("silent", **sections).start("--run.max_steps", 1) == 0


def test_latents_of_another_autoencoder_and_a_teacher_without_its_text_are_refused(
    tiny_unet, tmp_path
):
    from cascade.checkpoints.files import save_network
    from stages.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
    from stages.unet.unet import UNet
    from tests.reference.unet_toys import SD

    other = AutoencoderKLConfig(
        channels=(8, 8), blocks_per_level=1, norm_groups=4, latent_channels=8
    )
    save_network(tmp_path / "autoencoder_kl.safetensors", AutoencoderKL(other))
    unet = str(tiny_unet / "unet.safetensors")
    with pytest.raises(UserError, match=r"latents have 8 channels, but .* takes 4"):
        PictureTeacher(PictureTeacherConfig(unet, str(tmp_path), 32))
    save_network(tmp_path / "unet.safetensors", UNet(SD))
    with pytest.raises(UserError, match=r"teacher.text is missing: .* is of SD's kind"):
        PictureTeacher(PictureTeacherConfig(str(tmp_path), str(tiny_unet), 32))


def test_how_a_teacher_was_trained_is_read_from_its_file(tiny_unet, tmp_path):
    path = tmp_path / "unet.safetensors"
    tensors = load_file(tiny_unet / "unet.safetensors")
    metadata = read_metadata(tiny_unet / "unet.safetensors")
    save_file(tensors, path, metadata | {"cascade_unet_diffusion": json.dumps({"prediction": "v"})})
    config = PictureTeacherConfig(str(path), str(tiny_unet), 32, dtype="float32")
    teacher = PictureTeacher(config)
    assert teacher.diffusion.prediction == "v"
    # v = alpha eps - sigma x0 of a known picture gives that picture back.
    x0, noise = torch.randn(2, 1, 4, 8, 8).unbind(0)
    at = torch.tensor([300.0])
    alpha, sigma = teacher._scales(at)
    x_t = teacher.noised(x0, noise, at)
    assert torch.allclose(teacher.estimate(alpha * noise - sigma * x0, x_t, at), x0, atol=1e-5)


def test_every_recipe_that_is_compared_is_a_run_of_the_terms_that_its_name_says():
    from benchmarks.recipes import ROOT, read_recipes
    from cascade.config import apply_overrides, from_dict, read_yaml

    compared = read_recipes(ROOT / "configs/cascade_kd/switches.yaml")
    assert compared.kind == "cascade_kd"
    terms = {}
    for recipe in compared.recipes:
        values = read_yaml(ROOT / compared.base)
        apply_overrides(values, [f"{key}={value}" for key, value in recipe.options.items()])
        terms[recipe.name] = from_dict(CascadeKDRun, values, recipe.name).terms
    assert terms["no term"] == () and next(iter(terms)) == "no term"
    assert {*terms.values()} == {
        (),
        ("align",),
        ("relations",),
        ("estimate",),
        ("align", "relations"),
        ("align", "relations", "estimate"),
    }
