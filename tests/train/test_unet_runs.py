"""U-Nets from data alone and from a teacher: what a step learns from, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cascade.adapters.lora import LoraConfig, attach_lora, merge_lora
from cascade.adapters.lora_files import LoraFile
from cascade.checkpoints.files import load_network, read_metadata, save_network
from cascade.config import from_dict, load_yaml
from cascade.errors import UserError
from cascade.images import open_image
from cascade.pipelines.unet_spec import UNET_DIFFUSION_KEY, UNET_TEACHER_KEY
from cascade.text.encoder import TextConfig
from cascade.tools.describe import describe_path
from stages.unet.compress import PUBLISHED, Recipe, plan_student
from stages.unet.config import UNetConfig
from stages.unet.inherit import inherit
from stages.unet.unet import UNet
from train.assemble_unet import AssembleUNetConfig, assemble_unet
from train.callbacks.checkpoints import newest_checkpoint
from train.data.__main__ import main as data_main
from train.data.cached import CachedBatch
from train.data.paired import joined
from train.distill.plans import plan_metadata, read_plan
from train.distill.teacher import FrozenTeacher
from train.draws import StepDraws
from train.losses.distillation import (
    FeatureConfig,
    SitePair,
    feature_losses,
    output_loss,
    site_pairs,
)
from train.losses.unet_denoising import (
    UNetDiffusionConfig,
    noise_unet_batch,
    published_unet_errors,
)
from train.systems.unet import UNetRun, UNetSystem

SAMPLES = 2000
KINDS = ("raw", "ema")
TINY_SDXL = UNetConfig(
    channels=(32, 64, 128),
    num_heads=(1, 2, 4),
    text_channels=64,
    text_pooled_channels=32,
    size_channels=8,
    norm_groups=8,
)
"""Facts 1.3: the tiny test pair's teacher."""


def batch_of(count: int, side: int = 4, **parts: torch.Tensor) -> CachedBatch:
    parts = {
        "autoencoder_mean": torch.ones(count, 4, side, side),
        "autoencoder_std": torch.full((count, 4, side, side), 0.5),
        "text_hidden": torch.ones(count, 3, 16),
        "text_pooled": torch.ones(count, 12),
    } | parts
    return CachedBatch(captions=["a"] * count, groups=torch.arange(count), **parts)


def system_of(made, **changes: object) -> UNetSystem:
    run = load_yaml(UNetRun, made.config)
    null = torch.zeros(3, 16), torch.zeros(12)
    return UNetSystem(run, null, 4)


# Noise


def test_timesteps_are_all_of_them_or_those_of_a_teachers_grid_and_the_network_is_told_them():
    x0 = torch.randn(SAMPLES, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    drawn = noise_unet_batch(x0, UNetDiffusionConfig(), StepDraws(0, 0)).network_time
    assert drawn.min() < 10 and drawn.max() > 990
    assert torch.equal(drawn, drawn.round())
    assert abs(drawn.mean() - 499.5) < 4 * 289 / SAMPLES**0.5
    grid = UNetDiffusionConfig(timesteps=(999, 749, 499, 249))
    drawn = noise_unet_batch(x0, grid, StepDraws(0, 0)).network_time
    counts = {int(t): int((drawn == t).sum()) for t in drawn.unique()}
    assert sorted(counts) == [249, 499, 749, 999]
    assert min(counts.values()) > SAMPLES / 5


def test_noised_latents_are_those_of_the_published_schedule():
    from diffusers import DDPMScheduler

    reference = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v"
    )
    x0 = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    draws = StepDraws(3, 5)
    noised = noise_unet_batch(x0, UNetDiffusionConfig("v"), draws)
    noise, timesteps = draws.normal("noise", x0.shape), noised.network_time.long()
    assert torch.allclose(noised.x_t, reference.add_noise(x0, noise, timesteps), atol=1e-6)
    assert torch.allclose(noised.target, reference.get_velocity(x0, noise, timesteps), atol=1e-6)


def test_min_snr_weighs_noise_levels_and_epsilons_error_is_the_same_for_every_prediction():
    x0 = torch.randn(64, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    weighed = noise_unet_batch(x0, UNetDiffusionConfig(weight="min_snr"), StepDraws(0, 0))
    snr = UNetDiffusionConfig().schedule.log_snr(weighed.t).exp()
    assert torch.allclose(weighed.weight, snr.clamp(max=5.0) / snr)
    errors = []
    for prediction in ("epsilon", "v", "x0"):
        config = UNetDiffusionConfig(prediction)
        noised = noise_unet_batch(x0, config, StepDraws(0, 0))
        alpha, sigma = (value.view(-1, 1, 1, 1) for value in config.schedule(noised.t))
        x0_hat = x0 + 0.1  # one guess, told in three ways
        eps_hat = (noised.x_t - alpha * x0_hat) / sigma
        told = {"epsilon": eps_hat, "v": alpha * eps_hat - sigma * x0_hat, "x0": x0_hat}
        errors.append(published_unet_errors(told[prediction], x0, noised, config))
    expected = ((alpha / sigma) * 0.1).square().flatten()
    for error in errors:
        assert torch.allclose(error, expected, rtol=1e-2, atol=1e-4)


def test_offset_noise_is_the_targets_too_and_a_perturbed_input_is_not():
    x0 = torch.zeros(4, 4, 5, 5)
    plain, offset, perturbed = (
        noise_unet_batch(x0, UNetDiffusionConfig(**options), StepDraws(0, 0))
        for options in ({}, {"noise_offset": 0.5}, {"input_perturbation": 0.5})
    )
    added = offset.target - plain.target
    assert torch.allclose(added, added[:, :, :1, :1].expand_as(added), atol=1e-6)
    assert added.abs().max() > 0.1
    assert torch.equal(perturbed.target, plain.target)
    assert not torch.equal(perturbed.x_t, plain.x_t)


# What a U-Net is told


def test_latents_are_samples_of_the_autoencoders_gaussians_new_ones_at_every_step(make_run):
    system = system_of(make_run("unet"))
    batch = batch_of(SAMPLES)
    latents = system.clean_latents(batch, StepDraws(0, 0))
    assert abs(latents.mean() - 1.0) < 0.01 and abs(latents.std() - 0.5) < 0.01
    assert not torch.equal(latents, system.clean_latents(batch, StepDraws(0, 1)))


def test_captions_are_dropped_and_sizes_are_height_before_width(make_run):
    system = system_of(make_run("unet"))
    sizes = {"original_sizes": torch.tensor([[300, 200]] * 2), "crops": torch.tensor([[7, 9]] * 2)}
    batch = batch_of(2, **sizes)
    cond = system.told(batch, torch.tensor([True, False]))
    assert not cond.text_hidden[0].any() and not cond.text_pooled[0].any()
    assert cond.text_hidden[1].all() and cond.text_pooled[1].all()
    assert cond.sizes.tolist() == [[300, 200, 7, 9, 16, 16]] * 2
    assert system.told(batch_of(1)).sizes.tolist() == [[16, 16, 0, 0, 16, 16]]


@pytest.mark.parametrize("source", ["pictures", "latents"])
def test_two_text_encoders_are_read_from_streams_as_from_a_cache(
    source, make_run, shards, tiny_unet, tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    text, autoencoder = str(tiny_model / "text"), str(tiny_unet / "autoencoder_kl.safetensors")
    if source == "latents":
        words = ["precompute", "--shards", shards, "--shards-out", str(tmp_path / "latents")]
        words += ["--size", "32", "--text", text, "--text-2", text, "--autoencoder", autoencoder]
        assert data_main(words) == 0
        shards = f"{tmp_path}/latents/*.tar"
    model = json.loads(_config(tiny_unet)) | {"text_channels": 32}
    data = {"mode": "exact", "size": 32, "folder": None, "shards": shards}
    run = make_run("unet", model=model, text_2=text, data=data, empty_caption="encoded")
    assert run.start("--run.max_steps", 1) == 0
    assert len(run.losses()) == 1


# Teachers


def test_the_teacher_is_in_no_checkpoint_stays_frozen_and_every_term_is_logged(make_run, tiny_unet):
    run = make_run("unet_kd", caption_dropout=0.5)
    before = (tiny_unet / "unet.safetensors").read_bytes()
    assert run.start() == 0
    row = run.metrics()[0]
    terms = [float(row[name]) for name in ("task", "kd_output", "kd_features")]
    assert min(terms) > 0
    assert float(row["loss"]) == pytest.approx(sum(terms), rel=1e-5)
    sites = [name for name in row if name.startswith("kd/")]
    by_site = [float(row[name]) for name in sites]
    assert len(sites) == 12 and "kd/up_blocks.2" in sites
    assert sum(by_site) == pytest.approx(terms[2], rel=1e-5)
    checkpoint = torch.load(newest_checkpoint(run.out), weights_only=True)
    student = load_network(run.out / "unet.safetensors", expect=UNet)
    assert {key.removeprefix("network.") for key in checkpoint["state_dict"]} == set(
        student.state_dict()
    )
    assert (tiny_unet / "unet.safetensors").read_bytes() == before


def test_a_student_that_lost_nothing_starts_at_its_teachers_output_and_features(
    make_run, tiny_unet, tmp_path
):
    recipe = tmp_path / "nothing.yaml"
    recipe.write_text("remove: []\n")
    run = make_run(
        "unet_kd",
        model=json.loads(_config(tiny_unet)),
        init_from=str(tiny_unet / "unet.safetensors"),
        distill={"recipe": str(recipe)},
    )
    assert run.start("--run.max_steps", 1) == 0
    row = run.metrics()[0]
    assert float(row["kd_output"]) < 1e-10 and float(row["kd_features"]) < 1e-8
    assert float(row["task"]) > 0.1


def _config(folder: Path) -> str:
    from cascade.checkpoints.files import read_metadata

    return read_metadata(folder / "unet.safetensors")["cascade_config"]


def test_a_students_file_says_which_features_it_imitates(make_run, tiny_unet, tmp_path):
    teacher = load_network(tiny_unet / "unet.safetensors", expect=UNet)
    recipe = Recipe(("*_blocks.*.resnets.1", "*.transformer_blocks.2"))
    plan = plan_student(teacher.config, recipe)
    student = UNet(plan.student)
    student.load_state_dict(inherit(teacher.state_dict(), plan)[0])
    path = tmp_path / "student.safetensors"
    cut = {UNET_TEACHER_KEY: json.dumps({"name": "it", "weights_hash": "0123456789ab"})}
    save_network(path, student, metadata={**plan_metadata(plan), **cut})
    run = make_run("unet_kd", model=None, init_from=str(path), distill={"recipe": None})
    assert run.start("--run.max_steps", 2) == 0
    by_recipe = make_run("unet_kd", "named", model=None, init_from=str(path))
    assert by_recipe.start("--run.max_steps", 2) == 0
    assert run.losses() == by_recipe.losses()
    # What was trained says it on: it may be distilled again.
    for trained in (run, by_recipe):
        said = read_metadata(trained.out / "unet.safetensors")
        assert read_plan(said, "unet") == plan
        assert json.loads(said[UNET_DIFFUSION_KEY])["prediction"] == "epsilon"
        assert cut.items() <= said.items()
        [described] = describe_path(trained.out / "unet.safetensors")
        assert described.predicts == "epsilon"
        assert described.origin == "a student of it (weights 0123456789ab), trained with Cascade"
    # So does what was trained on without a teacher, also when that run goes on without the file.
    alone = make_run("unet", "alone", model=None, init_from=str(path))
    assert alone.start("--run.max_steps", 2) == 0
    path.unlink()
    assert alone.start("--run.max_steps", 4, "--resume") == 0
    assert read_plan(read_metadata(alone.out / "unet.safetensors"), "unet") == plan


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("recipe", ["koala_700m", "bk_sdxl_base", "ssd_1b"])
def test_every_pairs_loss_has_a_gradient_in_the_student_also_when_blocks_are_recomputed(
    recipe, recompute
):
    """Facts 7, point 2: features inside checkpoints that have no graph teach nothing."""
    plan = plan_student(TINY_SDXL, PUBLISHED[recipe])
    student, teacher = _randomized(plan.student), _randomized(plan.teacher)
    student.recompute = recompute
    kinds = {
        "koala_700m": FeatureConfig(("self_attention",), sites=_LAST),
        "bk_sdxl_base": FeatureConfig(("block",), leave_out=("mid_block",)),
        "ssd_1b": FeatureConfig(
            ("resnet", "attention"), ("mid_block",), sites={"mid_block": "mid_block"}
        ),
    }
    pairs = site_pairs(kinds[recipe], plan)
    counts = {"koala_700m": 21 + 2, "bk_sdxl_base": 6, "ssd_1b": 15 + 10 + 1}
    assert len(pairs) == counts[recipe]
    inputs = _inputs(plan.teacher)
    with torch.no_grad():
        taught = teacher(*inputs, [pair.teacher for pair in pairs]).features
    found = student(*inputs, [pair.student for pair in pairs]).features
    losses = feature_losses(found, taught, pairs)
    for number, (name, loss) in enumerate(losses.items()):
        student.zero_grad()
        loss.backward(retain_graph=number + 1 < len(losses))
        below = name if "." in name.partition(".")[2] else f"{name}.resnets.0"
        own = dict(student.named_parameters())
        grads = [one.grad for key, one in own.items() if key.startswith(f"{below}.")]
        assert grads and all(grad is not None and bool(grad.any()) for grad in grads), name


_LAST = {"down_blocks.0": "down_blocks.0", "up_blocks.2": "up_blocks.2"}


def _randomized(config: UNetConfig) -> UNet:
    torch.manual_seed(len(config.down_depths[0]))
    network = UNet(config)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    return network


def _inputs(config: UNetConfig):
    from stages.unet.unet import UNetCondition

    generator = torch.Generator().manual_seed(0)
    cond = UNetCondition(
        torch.randn(1, 5, config.text_channels, generator=generator),
        torch.randn(1, config.text_pooled_channels, generator=generator),
        torch.tensor([[64, 64, 0, 0, 64, 64]]),
    )
    return torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([400.0]), cond


def test_feature_losses_are_finite_in_float16_and_normalized_ones_do_not_know_the_scale():
    """Facts 7, point 3: a difference of 300 has a square that float16 does not hold."""
    plan = plan_student(TINY_SDXL, Recipe())
    pairs = site_pairs(FeatureConfig(("block",)), plan)
    theirs = {pair.teacher: torch.full((2, 3), 400.0, dtype=torch.float16) for pair in pairs}
    ours = {pair.student: torch.full((2, 3), 100.0, dtype=torch.float16) for pair in pairs}
    plain = feature_losses(ours, theirs, pairs)
    assert all(loss == 90_000 for loss in plain.values())
    normal = feature_losses(ours, theirs, pairs, normalize=True)
    scaled = [{name: value / 100 for name, value in one.items()} for one in (ours, theirs)]
    again = feature_losses(*scaled, pairs, normalize=True)
    for name, loss in normal.items():
        assert loss == pytest.approx(0.5625) and again[name] == pytest.approx(0.5625, rel=1e-3)


def test_features_of_a_second_set_weigh_as_its_other_losses():
    pairs = (SitePair("a", "b"),)
    ours, theirs = {"a": torch.tensor([[1.0], [3.0]])}, {"b": torch.zeros(2, 1)}
    assert feature_losses(ours, theirs, pairs)["a"] == 5.0
    assert feature_losses(ours, theirs, pairs, torch.tensor([2.0, 0.5]))["a"] == 3.25


def test_text_states_are_those_of_the_networks_kind(make_run):
    """SD reads CLIP's last states, SDXL the last but one; both attend to padding."""
    run = load_yaml(UNetRun, make_run("unet", text_states=None).config)
    assert run.text_read == TextConfig("penultimate", masks_padding=False)
    sd = replace(run, model=replace(run.sizes, text_pooled_channels=None, size_channels=None))
    assert sd.text_read == TextConfig("post_norm", masks_padding=False)
    with pytest.raises(ValueError, match="overflow is chunk"):
        replace(run, text_states=TextConfig(overflow="chunk"))


def test_bk_tinys_and_segmind_tinys_pairs_are_the_published_ones():
    teacher = UNetConfig.sd15()
    plan = plan_student(teacher, PUBLISHED["bk_tiny"])
    inner = "attentions.{}.proj_out"
    bk = FeatureConfig(
        ("block",),
        ("down_blocks.2",),
        {f"down_blocks.2.{inner.format(0)}": f"down_blocks.2.{inner.format(1)}"},
    )
    pairs = {pair.student: pair.teacher for pair in site_pairs(bk, plan)}
    assert pairs == {
        "down_blocks.0": "down_blocks.0",
        "down_blocks.1": "down_blocks.1",
        "down_blocks.2.attentions.0.proj_out": "down_blocks.2.attentions.1.proj_out",
        "up_blocks.0": "up_blocks.1",
        "up_blocks.1": "up_blocks.2",
        "up_blocks.2": "up_blocks.3",
    }
    segmind = FeatureConfig(("block",), sites={"down_blocks.2": "up_blocks.0"})
    pairs = {pair.student: pair.teacher for pair in site_pairs(segmind, plan)}
    assert pairs["down_blocks.2"] == "up_blocks.0" and len(pairs) == 6


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"kinds": ["cross_attention"], "leave_out": ["mid_blok"]}, "did you mean 'mid_block'"),
        ({"sites": {"up_blocks.9": "up_blocks.0"}}, "is no place of the student"),
        ({"sites": {"up_blocks.0": "up_blocks.7"}}, "is no place of the teacher"),
        ({"sites": {"up_blocks.0": "up_blocks.2"}}, "can't imitate the teacher's up_blocks.2"),
        ({"kinds": ["projection"], "leave_out": ["down_blocks", "up_blocks", "mid_block"]}, "no p"),
    ],
)
def test_features_that_are_not_there_are_told_in_one_line(features, message):
    plan = plan_student(TINY_SDXL, PUBLISHED["bk_sdxl_base"])
    with pytest.raises(ValueError, match=message):
        site_pairs(from_dict(FeatureConfig, features, "features"), plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": None}, "distill is missing"),
        ({"distill": {"recipe": "koala_7b"}}, "did you mean 'koala"),
        ({"distill": {"recipe": "koala_700m"}}, "the recipe removes '\\*.transformer_blocks"),
        ({"distill": {"recipe": "bk_sdxl_base"}}, "its student has other sizes"),
        ({"distill": {"recipe": None}}, "distill.recipe is missing"),
        ({"distill": {"teacher": "/none"}}, "/none: no such file or folder"),
        ({"autoencoder": "/none"}, "/none: no such file or folder"),
        ({"model": {"text_channels": 18}}, "its text_channels is 16, the student's 18"),
    ],
    ids=lambda one: str(one)[:40],
)
def test_bad_input_is_told_in_one_line(changes, message, make_run):
    run = make_run("unet_kd", **changes)
    with pytest.raises(UserError, match=message):
        run.start()


def test_a_teacher_speaks_in_its_own_number_format_under_autocast(tiny_unet):
    teacher = FrozenTeacher(str(tiny_unet / "unet.safetensors"), "float32")
    teacher.load(torch.device("cpu"))
    inputs = _inputs(teacher.config)
    plain = teacher(*inputs, ["mid_block"])
    with torch.autocast("cpu", torch.bfloat16):
        under = teacher(*inputs, ["mid_block"])
    assert torch.equal(plain.prediction, under.prediction)
    assert plain.features["mid_block"].dtype == torch.float32
    assert not plain.prediction.requires_grad


def test_the_outputs_distance_is_weighed_as_the_task_is():
    """Facts 7, point 8: with min-SNR, others dropped the distillation."""
    one, other = torch.zeros(3, 4, 2, 2), torch.ones(3, 4, 2, 2)
    weight = torch.tensor([0.5, 1.0, 3.0])
    assert output_loss(one, other, weight) == pytest.approx(1.5)


def test_a_student_learns_from_shards_of_cached_latents_and_a_wrong_cache_is_refused(
    make_run, tiny_unet, tiny_model, shards, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    words = ["precompute", "--shards", shards, "--shards-out", str(tmp_path / "latents")]
    words += ["--size", "32", "--batch-size", "5", "--text", str(tiny_model / "text")]
    words += ["--text-sees-padding", "--dtype", "float32"]
    assert data_main([*words, "--autoencoder", str(tiny_unet / "autoencoder_kl.safetensors")]) == 0
    data = {"shards": f"{tmp_path}/latents/*.tar", "mode": "exact", "size": 32, "folder": None}
    states = {"hidden": "pre_norm", "masks_padding": False}
    cached = make_run("unet_kd", "cached", data=data, text_states=states)
    assert cached.start() == 0
    online = make_run("unet_kd", "online", data={**data, "shards": shards}, text_states=states)
    assert online.start() == 0
    assert cached.losses() == pytest.approx(online.losses(), rel=1e-3)
    wrong = make_run("unet_kd", "wrong", data=data)  # which reads the text in another way
    with pytest.raises(UserError, match="the cache's text was made with weights"):
        wrong.start()


# LoRA and DreamBooth


def test_a_lora_learns_beside_frozen_weights_and_its_file_is_merged_to_the_same_output(
    make_run, tiny_unet, tmp_path
):
    teacher = tiny_unet / "unet.safetensors"
    lora = {"rank": 2, "alpha": 4.0, "targets": ["to_q", "to_v"]}
    run = make_run("unet", model=None, init_from=str(teacher), lora=lora, caption_dropout=0.0)
    before = teacher.read_bytes()
    assert run.start("--run.max_steps", 4, "--run.ema_decay", 0.0) == 0
    assert teacher.read_bytes() == before
    assert not (run.out / "unet.safetensors").exists()
    state = torch.load(newest_checkpoint(run.out), weights_only=True)["state_dict"]
    assert state and all(".lora." in key for key in state)
    base, trained = (load_network(teacher, expect=UNet) for _ in range(2))
    adapter = attach_lora(trained, LoraConfig(2, 4.0, ("to_q", "to_v")))
    trained.load_state_dict(
        {key.removeprefix("network."): one for key, one in state.items()}, strict=False
    )
    assert any(layer.up.any() for layer in adapter.layers.values())
    inputs = _inputs(base.config)
    with torch.no_grad():
        learned = trained(*inputs)
        assert not torch.allclose(base(*inputs), learned, atol=1e-4)
        updates = LoraFile(run.out / "lora.safetensors").fit({"unet": base})
        merge_lora(base, [(updates["unet"], 1.0)])
        assert torch.allclose(base(*inputs), learned, atol=1e-4)


def test_half_a_lora_run_and_its_resumption_equal_a_whole_run(make_run, tiny_unet):
    options = {"model": None, "init_from": str(tiny_unet / "unet.safetensors"), "lora": {"rank": 2}}
    whole, halves = make_run("unet", "whole", **options), make_run("unet", "halves", **options)
    assert whole.start("--run.max_steps", 4, "--optim.schedule", "constant") == 0
    assert halves.start("--run.max_steps", 2, "--optim.schedule", "constant") == 0
    assert halves.start("--run.max_steps", 4, "--optim.schedule", "constant", "--resume") == 0
    one, other = (load_file(run.out / "lora.safetensors") for run in (whole, halves))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    # The checkpoint's updates are of this strength.
    with pytest.raises(UserError, match=r"lora\.alpha is 4\.0 but the run was started with 16\.0"):
        whole.start("--resume", "--lora.alpha", 4.0)


def test_a_lora_goes_on_over_the_weights_that_it_was_trained_over_alone(
    make_run, tiny_unet, tmp_path
):
    base = tmp_path / "base.safetensors"
    shutil.copy(tiny_unet / "unet.safetensors", base)
    run = make_run("unet", model=None, init_from=str(base), lora={"rank": 2})
    assert run.start("--run.max_steps", 2) == 0
    other = load_network(base, expect=UNet)
    with torch.no_grad():
        other.conv_in.weight.add_(1.0)
    save_network(base, other)
    with pytest.raises(UserError, match="was trained over other weights"):
        run.start("--run.max_steps", 4, "--resume")


def test_a_second_sets_samples_weigh_as_published():
    own, prior = batch_of(2), batch_of(6, autoencoder_mean=torch.zeros(6, 4, 4, 4))
    both = joined(own, prior, 0.5)
    assert len(both) == 8 and both.pixels is None
    losses = torch.tensor([1.0, 3.0, *range(6)])
    weighted = (losses * both.loss_weights).mean()
    assert weighted == pytest.approx(2.0 + 0.5 * 2.5)
    assert torch.equal(both.autoencoder_mean[:2], own.autoencoder_mean)


def test_dreambooth_trains_on_a_subject_beside_its_kind(make_run):
    run = make_run("unet", data={"batch_size": 2})
    config = yaml.safe_load(run.config.read_text())
    data = config["data"]
    config["prior"] = {"shards": data["shards"], "folder": data["folder"], "batch_size": 3}
    run.config.write_text(yaml.safe_dump(config))
    assert run.start() == 0
    rows = (run.out / "ledger.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["samples"] == 4 * 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"rank": 2}}, "init_from is missing"),
        ({"lora": {"rank": 2, "targets": ["to_x"]}, "init_from": "TEACHER"}, "'to_x'"),
        (
            {"lora": {"rank": 5000, "alpha": 4.0, "targets": ["to_q"]}, "init_from": "TEACHER"},
            "lora: rank is 5000, but no layer that it updates has a rank above",
        ),
        ({"prior": {"shards": "/none/*.tar"}}, "/none/"),
    ],
    ids=str,
)
def test_loras_and_priors_that_can_not_be_are_told_in_one_line(
    changes, message, make_run, tiny_unet
):
    text = json.dumps(changes).replace("TEACHER", str(tiny_unet / "unet.safetensors"))
    run = make_run("unet", **json.loads(text))
    with pytest.raises(UserError, match=message):
        run.start()


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_a_u_net_is_drawn_with_and_judged_while_it_learns(
    lora, make_run, tiny_unet, tiny_model, tmp_path
):
    spec = {"name": "tiny", "image_size": 32, "size_multiple": 4, "min_size": 16, "max_size": 64}
    parts = {"unet": "unet", "autoencoder": "autoencoder_kl"}
    model = {
        "spec": {**spec, "sampling": {"steps": 2}},
        "text": str(tiny_model / "text"),
        **{key: str(tiny_unet / f"{name}.safetensors") for key, name in parts.items()},
    }
    assemble_unet(from_dict(AssembleUNetConfig, model, "model"), tmp_path / "model")
    run = make_run("unet", init_from=str(tiny_unet / "unet.safetensors"), lora=lora)
    config = yaml.safe_load(run.config.read_text())
    held_out = {key: config["data"][key] for key in ("shards", "folder")}
    config["validation"] = {**held_out, "every_steps": 2, "samples": 8}
    config["pictures"] = {"model": str(tmp_path / "model"), "prompts": ["a red apple", "a hat"]}
    run.config.write_text(yaml.safe_dump(config))
    plain = make_run("unet", "plain", init_from=str(tiny_unet / "unet.safetensors"), lora=lora)
    assert run.start() == 0 and plain.start() == 0
    assert run.losses() == plain.losses()
    rows = [json.loads(row) for row in (run.out / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[0]["val_loss"] > 0 and rows[0]["val_loss"] != rows[1]["val_loss"]
    raw, ema = (open_image(run.out / "pictures" / f"step_0000004_{kind}.png") for kind in KINDS)
    assert raw.size == ema.size and raw.tobytes() != ema.tobytes()


@pytest.fixture
def v_unet(tiny_unet: Path, tmp_path: Path) -> str:
    """The tiny U-Net, which says that it predicts v."""
    network = load_network(tiny_unet / "unet.safetensors", expect=UNet)
    path = tmp_path / "v.safetensors"
    save_network(path, network, metadata=UNetDiffusionConfig(prediction="v").metadata())
    return str(path)


def test_a_teacher_and_its_student_predict_the_same(make_run, v_unet):
    run = make_run("unet_kd", distill={"teacher": v_unet})
    with pytest.raises(UserError, match=r"it predicts v, the student epsilon: .* to v$"):
        run.start("--run.max_steps", 1)
    assert run.start("--run.max_steps", 1, "--diffusion.prediction", "v") == 0


def test_weights_that_learn_another_prediction_are_told_and_a_lora_can_t(make_run, v_unet, caplog):
    run = make_run("unet", model=None, init_from=v_unet)
    with caplog.at_level("WARNING"):
        assert run.start("--run.max_steps", 1) == 0
    assert "has learned to predict v; this run teaches it epsilon instead" in caplog.text
    lora = make_run("unet", "lora", model=None, init_from=v_unet, lora={"rank": 2})
    with pytest.raises(UserError, match=r"set diffusion\.prediction to v"):
        lora.start("--run.max_steps", 1)


def test_a_student_goes_on_as_a_student_and_is_told_of_another_teacher(
    make_run, tiny_unet, tmp_path, caplog
):
    run = make_run("unet_kd")
    assert run.start("--run.max_steps", 1) == 0
    other = tmp_path / "moved.safetensors"
    shutil.copy(tiny_unet / "unet.safetensors", other)
    assert run.start("--run.max_steps", 2, "--resume", "--distill.teacher", other) == 0
    assert f"distill.teacher is {other} now" in caplog.text
    with pytest.raises(UserError, match=r"another kind \(train unet_kd, this is train unet\)"):
        make_run("unet", "alone").start("--resume", "--run.out", run.out)


def test_a_run_goes_on_with_the_prediction_that_it_was_started_with(make_run):
    run = make_run("unet")
    assert run.start("--run.max_steps", 1) == 0
    message = r"diffusion\.prediction is v but the run was started with epsilon"
    with pytest.raises(UserError, match=message):
        run.start("--run.max_steps", 2, "--resume", "--diffusion.prediction", "v")
    # How its loss is weighed may change.
    assert run.start("--run.max_steps", 2, "--resume", "--diffusion.weight", "min_snr") == 0


@pytest.mark.parametrize("kind", ["unet", "unet_kd"])
def test_weights_that_are_not_finite_are_named(kind, make_run, tiny_unet, tmp_path):
    network = load_network(tiny_unet / "unet.safetensors", expect=UNet)
    with torch.no_grad():
        network.conv_in.weight[0, 0, 0, 0] = float("nan")
    path = str(tmp_path / "broken.safetensors")
    save_network(path, network)
    own = {"init_from": path, "model": None} if kind == "unet" else {"distill": {"teacher": path}}
    with pytest.raises(UserError, match=r"broken.*: 1 numbers of conv_in\.weight are not finite"):
        make_run(kind, **own).start("--run.max_steps", 1)
