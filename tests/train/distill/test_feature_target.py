"""Features of clean pictures: those of the picture alone, and as few numbers as are kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cascade.errors import UserError
from train.data.shards import ShardReader
from train.distill.__main__ import main as distill_main
from train.distill.feature_target import Basis, BasisFit, FeatureSource, FeatureTarget
from train.distill.picture_teacher import PictureTeacher, PictureTeacherConfig

SITE = "up_blocks.0.attentions.2.transformer_blocks.2.attn1"


@pytest.fixture
def teacher(tiny_unet) -> PictureTeacherConfig:
    return PictureTeacherConfig(
        str(tiny_unet / "unet.safetensors"),
        str(tiny_unet / "autoencoder_kl.safetensors"),
        32,
        dtype="float32",
    )


@pytest.fixture
def pixels(shards) -> torch.Tensor:
    return torch.stack([sample.pixels for sample in ShardReader(shards)]).float() / 255


def loaded(target: FeatureTarget) -> FeatureSource:
    source = FeatureSource(target)
    source.teacher.load(torch.device("cpu"))
    return source


def test_features_are_of_the_picture_alone_however_batches_are_cut(teacher, pixels):
    source = loaded(FeatureTarget(teacher))
    assert source.site == SITE
    whole = source.of_pixels(pixels[:6])
    assert whole.shape == (6, 16, 2, 2) and whole.dtype == torch.float32
    parts = torch.cat([source.of_pixels(pixels[:1]), source.of_pixels(pixels[1:6])])
    assert torch.allclose(whole, parts, atol=1e-5)
    assert (whole[0] - whole[1]).abs().max() > 1e-3, "two pictures have two features"
    small = loaded(FeatureTarget(teacher, max_side=1)).of_pixels(pixels[:6])
    assert torch.allclose(small, whole.mean(dim=(2, 3), keepdim=True), atol=1e-5)


def test_a_basis_is_that_of_the_principal_components(teacher):
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(5, 5, generator=generator)
    features = torch.einsum("bchw,cd->bdhw", torch.randn(40, 5, 3, 3, generator=generator), mixed)
    features = features + torch.arange(5.0)[:, None, None]
    fit = BasisFit(5)
    for part in features.split(7):
        fit.add(part)
    basis, share = fit.basis(2)
    tokens = features.permute(0, 2, 3, 1).flatten(0, 2)
    centred = tokens - tokens.mean(dim=0)
    _, values, vectors = torch.linalg.svd(centred, full_matrices=False)
    assert torch.allclose(basis.mean, tokens.mean(dim=0), atol=1e-5)
    cosines = (basis.components * vectors[:2].T).sum(dim=0).abs()
    assert torch.allclose(cosines, torch.ones(2), atol=1e-4)
    assert share == pytest.approx(
        float(values[:2].square().sum() / values.square().sum()), rel=1e-4
    )
    projected = basis.project(features)
    assert projected.shape == (40, 2, 3, 3)
    assert projected.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert projected[:, 0].var() > projected[:, 1].var()
    with pytest.raises(UserError, match="--components 6: the features have 5 channels"):
        fit.basis(6)


def test_the_command_measures_a_basis_that_only_its_own_target_takes(
    teacher, shards, pixels, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    out = tmp_path / "basis.safetensors"
    words = ["feature-basis", "--teacher", teacher.unet, "--autoencoder", teacher.autoencoder]
    words += ["--data", shards, "--image-size", "32", "--device", "cpu", "--dtype", "float32"]
    assert distill_main([*words, "--batch-size", "4", "--components", "3", "--out", str(out)]) == 0
    target = FeatureTarget(teacher, basis=str(out))
    source = loaded(target)
    assert source.channels == 3
    plain = loaded(replace(target, basis=None)).of_pixels(pixels[:4])
    basis = Basis.read(out, source)
    assert torch.allclose(source.of_pixels(pixels[:4]), basis.project(plain), atol=1e-5)
    assert source.fingerprint() != FeatureSource(replace(target, basis=None)).fingerprint()
    with pytest.raises(UserError, match="measured with timestep 200, but this target has 100"):
        FeatureSource(replace(target, timestep=100))
    with pytest.raises(UserError, match="no such file; make it with"):
        FeatureSource(replace(target, basis=str(tmp_path / "other.safetensors")))


def test_the_teacher_is_asked_at_the_same_log_snr_and_at_its_cleanest_beyond_that(teacher):
    opened = PictureTeacher(teacher)
    timesteps = torch.tensor([0.0, 10.0, 499.5, 999.0])
    assert torch.allclose(opened.timesteps_at(opened.log_snr(timesteps)), timesteps, atol=0.1)
    assert opened.timesteps_at(torch.tensor([50.0])) == 0.0
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noised = opened.noised(torch.zeros(4, 4, 8, 8), noise, timesteps)
    alpha2 = opened.log_snr(timesteps).sigmoid()
    measured = (noised / noise).flatten(1).mean(dim=1).square()
    assert torch.allclose(measured, 1 - alpha2, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((64, 64), "image_size is 32 but the pictures are 64x64"),
        ((30, 34), "the pictures are 34x30; the teacher's autoencoder needs multiples of 4"),
    ],
)
def test_pictures_that_the_teacher_does_not_know_are_refused(shape, message, teacher):
    with pytest.raises(UserError, match=message):
        PictureTeacher(teacher).check_pictures([(32, 32), shape])


def test_a_site_that_is_none_is_refused(teacher):
    with pytest.raises(UserError, match="its self-attentions are down_blocks"):
        FeatureSource(FeatureTarget(teacher, site="middle"))
