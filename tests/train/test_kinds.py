"""Each kind of run, from its run file to a network that loads."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from cascade.checkpoints.files import load_network, read_metadata
from cascade.errors import UserError
from cascade.evaluate.clip_scorer import ClipScorer
from cascade.text.encoder import TextConfig, TextEncoder
from stages.autoencoder_kl import AutoencoderKL
from stages.previewer import Previewer
from stages.semantic_compressor import SemanticCompressor
from stages.stage_a import StageA
from stages.stage_b import StageB
from stages.stage_c import StageC
from stages.unet.unet import UNet

# One batch is the whole data set: what is learnt by heart must be learnt. Stage B and C see other
# noise in every step, so a few steps prove little here: test_overfit.py measures on fixed draws.
LEARN = {"data": {"batch_size": 12}, "run": {"log_every_steps": 1, "checkpoint_every_steps": 1000}}
CASES = {
    "clip": (60, 0.6, {"optim": {"lr": 1e-2, "schedule": "constant"}}),
    "stage_a": (60, 0.5, {"loss": {"adversarial_from_step": 1000}, "quantize": 0.0}),
    "autoencoder_kl": (100, 0.5, {"loss": {"adversarial_from_step": 1000, "distance": "mse"}}),
    "compressor": (60, 0.5, {}),
    "stage_b": (60, 0.9, {"diffusion": {"prediction": "v", "weight": "constant"}}),
    "stage_c": (60, 0.8, {"diffusion": {"prediction": "v", "weight": "constant"}}),
    "previewer": (60, 0.3, {}),
    "unet": (60, 0.8, {}),
    "unet_kd": (60, 0.8, {"distill": {"features": {"kinds": ["self_attention"]}}}),
}
NETWORKS = {
    "stage_a": {"stage_a": StageA},
    "autoencoder_kl": {"autoencoder_kl": AutoencoderKL},
    "compressor": {"compressor": SemanticCompressor, "previewer": Previewer},
    "stage_b": {"stage_b": StageB, "compressor": SemanticCompressor},
    "stage_c": {"stage_c": StageC},
    "previewer": {"previewer": Previewer},
    "unet": {"unet": UNet},
    "unet_kd": {"unet": UNet},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(CASES))
def test_a_run_learns_its_batch_and_exports_what_it_learnt(kind, make_run):
    steps, falls_to, sections = CASES[kind]
    run = make_run(kind, **{**LEARN, **sections})
    assert run.start("--run.max_steps", steps) == 0
    losses = run.losses()
    assert len(losses) == steps
    first, last = (sum(part) / 10 for part in (losses[:10], losses[-10:]))
    assert last < falls_to * first, (first, last)
    assert all(math.isfinite(loss) for loss in losses)
    for name, network in NETWORKS.get(kind, {}).items():
        path = run.out / f"{name}.safetensors"
        load_network(path, expect=network)
        metadata = read_metadata(path)
        assert metadata["train_steps"] == str(steps)
        assert metadata["train_samples"] == str(12 * steps)
        assert float(metadata["train_seconds"]) >= 0


def test_an_exported_clip_is_a_text_encoder_and_a_yardstick(make_run):
    run = make_run("clip", run={"export_dtype": "bfloat16"})
    run.start("--run.max_steps", 1)
    features = TextEncoder.from_folder(run.out / "text", TextConfig()).encode(["a red apple", ""])
    assert features.hidden.shape == (2, 12, 16)
    assert features.pooled.shape == (2, 8)
    scorer = ClipScorer.from_folder(run.out / "text")
    assert scorer.embed_pictures(torch.rand(2, 3, 32, 32)).shape == (2, 8)


def test_a_clip_and_a_stage_can_start_from_exported_weights(make_run):
    first = make_run("clip", "first")
    first.start("--run.max_steps", 2)
    second = make_run("clip", "second", init_from=str(first.out / "text"))
    second.start("--run.max_steps", 1, "--optim.lr", 1e-30)
    a, b = (load_file(run.out / "text" / "model.safetensors") for run in (first, second))
    assert all(torch.allclose(a[key], b[key], atol=1e-6) for key in a)
    assert (first.out / "text/tokenizer.json").read_bytes() == (
        second.out / "text/tokenizer.json"
    ).read_bytes()


def test_a_previewer_trained_in_bfloat16_exports_finite_weights(make_run):
    # Clipped, as by default, with the fused step: Lightning refused the two together.
    optim = {"fused": True, "grad_clip": 1.0}
    bfloat16 = {"precision": "bf16-mixed", "export_dtype": "bfloat16"}
    run = make_run("previewer", run=bfloat16, optim=optim)
    assert run.start() == 0
    state = load_file(run.out / "previewer.safetensors")
    assert all(value.isfinite().all() for value in state.values())
    assert run.metrics()[-1]["samples_per_s"]


def test_a_compressors_decoder_sees_noise_of_the_told_size(make_run, monkeypatch):
    seen = []
    forward = Previewer.forward
    monkeypatch.setattr(Previewer, "forward", lambda self, z: seen.append(z) or forward(self, z))
    for noise in (0.0, 0.5):
        run = make_run("compressor", f"noise-{noise}", latent_noise=noise)
        assert run.start("--run.max_steps", 1) == 0
    noise = (seen[1] - seen[0]).detach()
    assert noise.std().item() == pytest.approx(0.5, rel=0.15)
    assert seen[0].std().item() == pytest.approx(1.0, rel=0.2)


def test_a_compressor_and_a_previewer_that_do_not_fit_are_refused(make_run):
    run = make_run("compressor", previewer={"latent_channels": 8})
    with pytest.raises(UserError, match=r"previewer\.latent_channels is 8"):
        run.start()
    run = make_run("compressor", latent_noise=-0.1)
    with pytest.raises(UserError, match="must not be negative"):
        run.start()
