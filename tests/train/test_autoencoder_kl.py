"""What is the autoencoder's own in training: its posterior, its scale, what it starts from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from cascade.checkpoints.autoencoder_kl import autoencoder_kl_to_original
from cascade.checkpoints.files import load_network, save_network
from cascade.config import load_yaml
from cascade.errors import UserError, run_main
from stages.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from train.callbacks.checkpoints import newest_checkpoint
from train.data.open import open_data
from train.systems.autoencoder_kl import AutoencoderKLRun, RunningDeviation

SIZES = AutoencoderKLConfig(channels=(8, 16), blocks_per_level=1, norm_groups=4, scale=0.7)


def exported(run) -> AutoencoderKL:
    return load_network(run.out / "autoencoder_kl.safetensors", expect=AutoencoderKL)


def refusal(run, capsys, *arguments: object) -> str:
    assert run_main(lambda: run.start(*arguments)) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def start(tmp_path):
    """Somebody's autoencoder, with a scale of its own."""
    torch.manual_seed(5)
    network = AutoencoderKL(SIZES)
    save_network(tmp_path / "start.safetensors", network)
    return network, str(tmp_path / "start.safetensors")


def test_the_deviation_of_all_values_is_that_of_unequal_batches_around_one_mean():
    spread = RunningDeviation(0.999)
    values = (
        torch.randn(400, 64) * 3 + 2 + torch.randn(400, 1)
    )  # each batch about a mean of its own
    for batch in values:
        spread.update(batch.mean(), (batch - batch.mean()).square().mean())
    assert spread.deviation == pytest.approx(values.std().item(), rel=0.03)
    assert int(spread.updates) == 400


def test_a_large_mean_costs_the_deviation_no_digits():
    spread = RunningDeviation(0.99)
    for _ in range(50):
        spread.update(torch.tensor(10_000.0), torch.tensor(0.25))
    assert spread.deviation == pytest.approx(0.5, rel=1e-5)


def test_what_was_long_ago_weighs_nothing_and_what_is_not_finite_counts_nothing():
    spread = RunningDeviation(0.9)
    for variance in [100.0] * 50 + [4.0] * 200:
        spread.update(torch.tensor(1.0), torch.tensor(variance))
    assert spread.deviation == pytest.approx(2.0, rel=1e-4)
    before = spread.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    spread.update(torch.tensor(float("nan")), torch.tensor(1.0))
    spread.update(torch.tensor(0.0), torch.tensor(float("inf")))
    assert all(torch.equal(value, spread.state_dict()[key]) for key, value in before.items())


def test_exported_latents_have_a_deviation_of_one(make_run):
    # The rate ends near zero, so that the averaged weights are the trained ones.
    optim = {"lr": 3e-3, "schedule": "cosine", "decay_from": 0.3}
    run = make_run("autoencoder_kl", optim=optim, data={"batch_size": 12}, crop=32)
    assert run.start("--run.max_steps", 40, "--run.ema_decay", 0.8) == 0
    network = exported(run)
    assert network.config.scale != AutoencoderKLConfig().scale
    loader = open_data(load_yaml(AutoencoderKLRun, run.config).data).loader_from(0, 0, 1)
    pixels = next(iter(loader)).require("pixels")
    latents = network.encode(pixels, torch.randn_like)
    assert latents.std().item() == pytest.approx(1.0, abs=0.1)
    state = torch.load(newest_checkpoint(run.out), weights_only=True)["state_dict"]
    assert 1 / state["spread.variance"].sqrt().item() == pytest.approx(network.config.scale)
    assert int(state["spread.updates"]) == 40


def test_the_scale_is_the_initial_weights_unless_it_is_to_be_measured(make_run, start):
    _, path = start
    kept = make_run("autoencoder_kl", "kept", init_from=path, model=None)
    assert kept.start("--run.max_steps", 2) == 0
    assert exported(kept).config == SIZES
    measured = make_run("autoencoder_kl", "measured", init_from=path, model=None)
    assert measured.start("--run.max_steps", 2, "--measure_scale", "true") == 0
    assert exported(measured).config.scale not in (SIZES.scale, AutoencoderKLConfig().scale)
    given = make_run("autoencoder_kl", "given", measure_scale=False)
    assert given.start("--run.max_steps", 2, "--model.scale", 0.5) == 0
    assert exported(given).config.scale == 0.5


def test_a_run_starts_with_weights_of_ours_and_of_diffusers(make_run, start, tmp_path):
    network, path = start
    from diffusers import AutoencoderKL as Theirs

    theirs = Theirs(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16],
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.7,
    )
    theirs.load_state_dict(network.state_dict())
    theirs.save_pretrained(tmp_path / "theirs")
    for number, name in enumerate((path, str(tmp_path / "theirs"))):
        run = make_run("autoencoder_kl", f"run{number}", init_from=name, model=None)
        assert run.start("--run.max_steps", 1, "--optim.lr", 1e-9) == 0
        found = exported(run)
        assert found.config == SIZES
        for key, value in network.state_dict().items():
            torch.testing.assert_close(found.state_dict()[key], value, atol=1e-6, rtol=1e-5)


def test_another_scale_than_the_initial_weights_is_refused(make_run, start, tmp_path, capsys):
    network, path = start
    run = make_run("autoencoder_kl", init_from=path)
    line = refusal(run, capsys)
    assert f"model.scale is 0.18215 but {path} was trained with 0.7; set that, or leave" in line
    assert not (run.out / "checkpoints").exists()
    assert run.start("--model.scale", 0.7, "--run.max_steps", 1) == 0
    original = tmp_path / "original.safetensors"
    state = autoencoder_kl_to_original(network.state_dict(), network.config)
    save_file({key: value.contiguous() for key, value in state.items()}, original)
    silent = make_run("autoencoder_kl", "silent", init_from=str(original), model=None)
    assert "no tensor tells an autoencoder's scale" in refusal(silent, capsys)
    other = tmp_path / "other.safetensors"
    save_network(other, AutoencoderKL(replace(SIZES, channels=(8, 8))))
    wide = make_run("autoencoder_kl", "wide", init_from=str(other))
    line = refusal(wide, capsys, "--model.scale", 0.7)
    assert "another KL autoencoder than model says: channels is (8, 8) there and (8, 16)" in line


def test_the_decoder_sees_a_sample_of_the_posterior_and_not_its_mean(make_run, monkeypatch):
    seen: list[torch.Tensor] = []
    decode, posterior = AutoencoderKL.decode, AutoencoderKL.posterior
    means: list[torch.Tensor] = []

    def note(self, pixels):
        found = posterior(self, pixels)
        means.append(found.mean.detach())
        # A deviation of one: of the random start's own it could hardly be told.
        return replace(found, log_variance=0 * found.log_variance)

    monkeypatch.setattr(AutoencoderKL, "posterior", note)
    monkeypatch.setattr(
        AutoencoderKL, "decode", lambda self, z: seen.append(z.detach()) or decode(self, z)
    )
    run = make_run("autoencoder_kl", data={"batch_size": 12})
    assert run.start("--run.max_steps", 2) == 0
    scale = AutoencoderKLConfig().scale
    noises = [latents / scale - mean for latents, mean in zip(seen, means, strict=True)]
    assert all(noise.std().item() == pytest.approx(1.0, abs=0.1) for noise in noises)
    assert not torch.allclose(noises[0], noises[1], atol=0.1)


def test_a_posterior_that_is_not_finite_ends_in_a_line(make_run):
    optim = {"grad_clip": 0.0, "lr": 1e30, "warmup_steps": 0}
    run = make_run("autoencoder_kl", optim=optim, run={"checkpoint_every_steps": 100})
    with pytest.raises(UserError, match="gradients that are not finite"):
        run.start("--run.max_steps", 50)
