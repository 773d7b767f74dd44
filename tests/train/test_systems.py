"""What a system draws for each sample, and which networks learn when."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.recipes import read_recipes
from cascade.config import load_yaml
from cascade.errors import UserError
from stages.semantic_compressor import SemanticCompressor
from stages.stage_c import StageCCondition
from train.callbacks.checkpoints import newest_checkpoint
from train.data.cached import CachedBatch
from train.draws import StepDraws
from train.systems.adversarial import random_crops
from train.systems.clip import random_crop
from train.systems.clip_features import FrozenClipFeatures
from train.systems.stage_a import StageARun, StageASystem
from train.systems.stage_b import StageBRun, StageBSystem, corrupt_latents
from train.systems.stage_c import StageCRun, StageCSystem

SAMPLES = 4000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(count: int, **parts: torch.Tensor) -> CachedBatch:
    return CachedBatch(
        captions=["a"] * count,
        groups=torch.arange(count),
        pixels=parts.pop("pixels", torch.rand(count, 3, 8, 8, generator=generator())),
        **parts,
    )


def null_text(length: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((length, 16), -1.0), torch.full((12,), -1.0)


def shares(draw: torch.Tensor, rate: float) -> bool:
    """Whether a share of samples is the rate within four standard deviations."""
    return abs(draw.float().mean().item() - rate) < 4 * (rate * (1 - rate) / len(draw)) ** 0.5


def test_stage_c_drops_captions_sample_by_sample_at_its_rate(make_run):
    run = load_yaml(StageCRun, make_run("stage_c", caption_dropout=0.1).config)
    system = StageCSystem(run, null_text())
    ones = {"text_hidden": torch.ones(SAMPLES, 3, 16), "text_pooled": torch.ones(SAMPLES, 12)}
    cond = system.condition(batch_of(SAMPLES, **ones), StepDraws(0, 0))
    dropped = cond.text_pooled[:, 0] < 0
    assert shares(dropped, 0.1)
    signs = torch.where(dropped, -1.0, 1.0)
    assert torch.equal(cond.text_hidden, signs.view(-1, 1, 1).expand(-1, 3, 16))
    assert torch.equal(cond.text_pooled, signs.view(-1, 1).expand(-1, 12))


def test_stage_c_is_told_of_its_own_picture_at_its_rate_half_of_them_without_a_caption(make_run):
    model = {**config_of_stage_c(make_run), "image_channels": 5}
    made = make_run("stage_c", name="image", caption_dropout=0.0, image_share=0.3, model=model)
    system = StageCSystem(load_yaml(StageCRun, made.config), null_text())
    ones = {"text_hidden": torch.ones(SAMPLES, 3, 16), "text_pooled": torch.ones(SAMPLES, 12)}
    embeds = torch.randn(SAMPLES, 5, generator=generator(1))
    cond = system.condition(batch_of(SAMPLES, image_embeds=embeds, **ones), StepDraws(0, 0))
    assert cond.image.shape == (SAMPLES, 1, 5)
    given = cond.image[:, 0].any(dim=1)
    assert shares(given, 0.3)
    assert torch.equal(cond.image[given, 0], embeds[given])
    dropped = cond.text_pooled[:, 0] < 0
    assert not dropped[~given].any()
    assert shares(dropped[given], 0.5)


def test_masks_hide_the_same_number_of_positions_until_their_end(make_run):
    run = load_yaml(StageCRun, make_run("stage_c", mask_share=0.3, mask_until=0.5).config)
    system = StageCSystem(run, null_text())
    latents = torch.zeros(6, 16, 4, 5)
    visible = system.visible(latents, StepDraws(0, 1))
    assert visible.shape == (6, 1, 4, 5)
    assert (visible == 0).flatten(1).sum(dim=1).tolist() == [6] * 6
    assert len({tuple(one.flatten().tolist()) for one in visible}) == 6
    parts = [system.visible(latents[:3], StepDraws(0, 1, rank=r, world=2)) for r in (0, 1)]
    assert torch.equal(torch.cat(parts), visible)
    assert system.visible(latents, StepDraws(0, 2)) is None  # of 4 steps, after half
    small = system.visible(torch.zeros(2, 16, 1, 1), StepDraws(0, 0))
    assert small.all(), "one position stays"


def test_a_masked_position_says_nothing_of_its_input_but_its_neighbours_do(make_run):
    run = load_yaml(StageCRun, make_run("stage_c").config)
    system = StageCSystem(run, null_text()).eval()
    torch.nn.init.normal_(system.network.out.weight)
    x = torch.randn(1, 16, 4, 4, generator=generator())
    other = x.clone()
    other[..., 1, 2] += 3.0
    cond = StageCCondition(torch.ones(1, 3, 16), torch.ones(1, 12))
    t, visible = torch.tensor([0.5]), torch.ones(1, 1, 4, 4)
    with torch.no_grad():
        assert not torch.equal(system.network(x, t, cond), system.network(other, t, cond))
        visible[..., 1, 2] = 0
        hidden = [system.network(one, t, cond, visible) for one in (x, other)]
    assert torch.equal(*hidden)


@pytest.mark.parametrize(
    "sections",
    [
        {"mask_share": 0.5},
        {"model": {"qk_norm": True}},
        {"diffusion": {"prediction": "flow", "schedule": "linear", "draw": "logit_normal"}},
        {"diffusion": {"prediction": "v", "zero_terminal_snr": True, "weight": "min_snr"}},
    ],
    ids=str,
)
def test_each_modern_switch_trains(sections, make_run):
    made = make_run("stage_c", **sections)
    assert made.start() == 0
    losses = made.losses()
    assert len(losses) == 4 and all(0 < loss < 100 for loss in losses)


def test_a_picture_for_a_network_that_takes_none_is_refused(make_run):
    with pytest.raises(UserError, match=r"image_share is 0\.3 but model\.image_channels is null"):
        load_yaml(StageCRun, make_run("stage_c", image_share=0.3).config)


def test_stage_b_learns_on_a_finished_compressors_latents(make_run, tiny_model):
    file = tiny_model / "compressor.safetensors"
    made = make_run("stage_b", compressor=None, frozen_compressor=str(file))
    before = file.read_bytes()
    assert made.start() == 0
    assert (made.out / "stage_b.safetensors").is_file()
    assert not (made.out / "compressor.safetensors").exists()
    assert file.read_bytes() == before
    system = StageBSystem(load_yaml(StageBRun, made.config), null_text())
    latents = torch.randn(8, 16, 2, 2, generator=generator(1))
    batch = batch_of(8, stage_c_latents=latents, text_pooled=torch.ones(8, 12))
    cond = system.condition(batch, StepDraws(0, 0))
    kept = (cond.stage_c_latents == latents).flatten(1).all(dim=1)
    assert kept.any() and not kept.all()


@pytest.mark.parametrize("both", [False, True])
def test_stage_b_needs_one_compressor(make_run, both):
    sections = {"frozen_compressor": "x.safetensors"} if both else {"compressor": None}
    with pytest.raises(UserError, match="one of the two"):
        load_yaml(StageBRun, make_run("stage_b", **sections).config)


def config_of_stage_c(make_run) -> dict:
    return yaml.safe_load(make_run("stage_c", name="sizes").config.read_text())["model"]


def test_stage_b_drops_captions_and_conditions_each_on_its_own_draw(make_run, monkeypatch):
    run = load_yaml(
        StageBRun,
        make_run("stage_b", caption_dropout=0.2, condition_dropout=0.1, condition_noise=0.0).config,
    )
    system = StageBSystem(run, null_text())
    monkeypatch.setattr(
        SemanticCompressor, "encode", lambda self, pixels: torch.ones(len(pixels), 16, 2, 2)
    )
    pooled = torch.ones(SAMPLES, 12)
    cond = system.condition(batch_of(SAMPLES, text_pooled=pooled), StepDraws(0, 0))
    no_text, no_latents = cond.text_pooled[:, 0] < 0, cond.stage_c_latents[:, 0, 0, 0] == 0
    assert shares(no_text, 0.2)
    assert shares(no_latents, 0.1)
    assert shares(no_text & no_latents, 0.02)


def test_conditions_are_zeroed_noised_or_left_alone_sample_by_sample():
    latents = torch.ones(SAMPLES, 16, 2, 2)
    result = corrupt_latents(latents, drop=0.1, noise=0.3, noise_t=0.5, draws=StepDraws(0, 0))
    flat = result.flatten(1)
    zero, same = (flat == 0).all(1), (flat == 1).all(1)
    assert shares(zero, 0.1)
    assert shares(~zero & ~same, 0.9 * 0.3)
    noised = flat[~zero & ~same]
    spread = noised.std(dim=1)
    assert spread.min() < 0.1 and 0.6 < spread.max() < 1.2  # each at its own time
    assert noised.mean().item() == pytest.approx(0.9, abs=0.05)
    whole = corrupt_latents(latents, drop=0.0, noise=0.0, noise_t=0.5, draws=StepDraws(0, 0))
    assert torch.equal(whole, latents)


def test_stage_b_teaches_the_compressor(make_run):
    run = load_yaml(StageBRun, make_run("stage_b").config)
    system = StageBSystem(run, null_text())
    system.log = lambda *_, **__: None
    system._trainer = types.SimpleNamespace(
        global_step=0, global_rank=0, world_size=1, accumulate_grad_batches=1
    )
    for parameter in system.network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    batch = batch_of(
        4,
        pixels=torch.rand(4, 3, 32, 32, generator=generator()),
        stage_a_latents=torch.randn(4, 4, 8, 8, generator=generator()),
        text_pooled=torch.randn(4, 12, generator=generator()),
    )
    system.training_step(batch, 0).backward()
    gradient = sum(p.grad.abs().sum() for p in system.compressor.parameters() if p.grad is not None)
    assert gradient > 0
    assert set(system.exported_networks()) == {"stage_b", "compressor"}


def parameters_of(run) -> dict[str, torch.Tensor]:
    return torch.load(newest_checkpoint(run.out), weights_only=True)["state_dict"]


def test_the_discriminator_starts_at_its_step(make_run):
    run = make_run("stage_a", loss={"adversarial_from_step": 2})
    run.start("--run.max_steps", 2)
    rows = run.metrics()
    assert [float(row["discriminator"]) for row in rows] == [0.0, 0.0]
    assert not any(row.get("adversarial") for row in rows)
    before = {k: v for k, v in parameters_of(run).items() if k.startswith("discriminator.")}
    run.start("--run.max_steps", 3, "--resume")
    [row] = run.metrics(1)
    assert float(row["discriminator"]) > 0
    assert float(row["adversarial"]) != 0
    after = parameters_of(run)
    weights = [key for key in before if key.endswith(("weight", "original", "bias"))]
    assert weights
    assert any(not torch.equal(before[key], after[key]) for key in weights)


def test_an_untouched_discriminator_is_the_seed_s(make_run):
    states = []
    for name, steps in (("one", 1), ("two", 2)):
        run = make_run("stage_a", name, loss={"adversarial_from_step": 10})
        run.start("--run.max_steps", steps)
        states.append(parameters_of(run))
    for key, value in states[0].items():
        if key.startswith("discriminator.") and not key.endswith(("_u", "_v")):
            assert torch.equal(value, states[1][key]), key


def test_the_frozen_clip_gets_no_gradient_but_the_reconstruction_does(clip_folder):
    features = FrozenClipFeatures(str(clip_folder), (0, 1))
    features.train()
    assert not any(module.training for module in features.modules())
    pixels = torch.rand(2, 3, 32, 32, generator=generator(), requires_grad=True)
    first, second = features(pixels)
    assert first.shape == second.shape == (2, 4, 16)
    (first.sum() + second.square().sum()).backward()
    assert pixels.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in features.parameters())
    assert features(torch.rand(1, 3, 50, 70))[0].shape == (1, 3 * 4, 16)


def test_frozen_features_stay_out_of_checkpoints_and_optimizers(make_run):
    run = make_run("stage_a")
    run.start("--run.max_steps", 1)
    assert not [key for key in parameters_of(run) if key.startswith("features.")]
    system = StageASystem(load_yaml(StageARun, run.config))
    optimizers, _ = system.configure_optimizers()
    trained = {
        id(p)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert not trained & {id(p) for p in system.features.parameters()}


def test_without_its_weight_the_perceptual_term_loads_nothing(make_run):
    config = make_run("stage_a", loss={"perceptual": 0.0}, clip=None).config
    assert StageASystem(load_yaml(StageARun, config)).features is None


def test_stage_a_crops_each_picture_elsewhere():
    index = torch.arange(32.0)
    pixels = torch.stack(
        [index.view(-1, 1).expand(32, 32), index.expand(32, 32), 0 * index.expand(32, 32)]
    )
    crops = random_crops(pixels.expand(50, -1, -1, -1), 8, StepDraws(0, 0))
    assert crops.shape == (50, 3, 8, 8)
    tops, lefts = crops[:, 0, 0, 0], crops[:, 1, 0, 0]
    assert len(tops.unique()) > 10 and len(lefts.unique()) > 10
    assert 0 <= tops.min() and tops.max() <= 24
    assert torch.equal(crops[:, 0, 7, 0] - tops, torch.full((50,), 7.0))
    assert random_crops(pixels[None], 32, StepDraws(0, 0)).shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match="crop is 33 but the pictures are 32x32"):
        random_crops(pixels[None], 33, StepDraws(0, 0))


def test_clip_crops_one_square_of_the_asked_share():
    pixels = torch.rand(2, 3, 40, 40, generator=generator())
    sizes = {random_crop(pixels, 0.5, generator(seed)).shape[-2:] for seed in range(30)}
    assert all(20 <= rows == columns <= 40 for rows, columns in sizes)
    assert len(sizes) > 5
    assert random_crop(pixels, 1.0, generator()).shape == pixels.shape


def test_a_finished_compressor_sees_another_size_in_every_step(make_run, tiny_model, monkeypatch):
    seen = []
    forward = SemanticCompressor.forward
    monkeypatch.setattr(
        SemanticCompressor, "forward", lambda self, p: seen.append(p.shape) or forward(self, p)
    )
    run = make_run(
        "stage_b",
        data={"mode": "exact", "size": 48, "folder": None},
        compressor=None,
        frozen_compressor=str(tiny_model),
        compressor_input=[0.4, 1.0],
    )
    assert run.start("--run.max_steps", 6) == 0
    sides = {shape[-1] for shape in seen}
    assert sides == {16, 32}  # multiples of its stride, 16
    assert all(shape[-1] == shape[-2] and shape[0] == 4 for shape in seen)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"compressor_input": [0.5, 1.0]}, "compressor_input is set but the compressor is trained"),
        ({"compressor_input": [0.9, 0.5]}, r"compressor_input is \[0.9, 0.5\]; 0 < low"),
        (
            {"compressor_input": [0.5, 1.0], "compressor": None, "frozen_compressor": "tiny"},
            "drawn anew in every step, which cached latents can't follow",
        ),
    ],
)
def test_a_compressor_s_size_that_can_t_be_drawn_is_refused(
    sections, message, make_run, tiny_model
):
    if sections.get("frozen_compressor") == "tiny":
        sections = {**sections, "frozen_compressor": str(tiny_model)}
    with pytest.raises(UserError, match=message):
        make_run("stage_b", **sections).start()


def test_a_new_run_of_stage_c_learns_by_the_recipe_that_won(make_run):
    made = make_run("stage_c")
    values = yaml.safe_load(made.config.read_text())
    del values["optim"]
    made.config.write_text(yaml.safe_dump(values))
    run = load_yaml(StageCRun, made.config)
    best = load_yaml(StageCRun, "configs/recipes/stage_c_modern.yaml")
    assert (run.diffusion, run.optim) == (best.diffusion, best.optim)
    base, recipes = "configs/recipes/stage_c_published.yaml", "configs/recipes/switches.yaml"
    winner = "flow, logit-normal, Muon, QK-norm"
    with open(recipes) as file:
        listed = yaml.safe_load(file)["recipes"]
    overrides = {**listed["flow, logit-normal"]["set"], **listed["flow, logit-normal, Muon"]["set"]}
    overrides |= listed[winner]["set"]
    won = load_yaml(StageCRun, base, [f"{key}={value}" for key, value in overrides.items()])
    assert won.diffusion == best.diffusion and won.model == best.model
    for name in ("name", "lr", "muon_lr", "warmup_steps", "schedule"):
        assert getattr(won.optim, name) == getattr(best.optim, name)


def test_the_demonstration_s_budget_is_given_to_the_published_recipe():
    compared = read_recipes(Path("configs/demo/switches.yaml"))
    runs = [
        load_yaml(
            StageCRun, compared.base, [f"{key}={value}" for key, value in one.options.items()]
        )
        for one in compared.recipes
    ]
    published = load_yaml(StageCRun, "configs/recipes/stage_c_published.yaml")
    assert runs[0].diffusion == published.diffusion
    for name in ("name", "betas", "weight_decay", "schedule"):
        assert getattr(runs[0].optim, name) == getattr(published.optim, name)
    assert [run.run.max_steps for run in runs] == [2000, 2000, 1100, 667]
    assert all(run.diffusion == runs[1].diffusion for run in runs[1:])
