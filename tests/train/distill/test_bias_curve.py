"""Where a teacher's estimates are biased: measured on one whose bias is known, written, trusted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from cascade.errors import UserError, run_main
from train.data.cached import CachedBatch
from train.distill.__main__ import main as distill_main
from train.distill.bias_curve import BiasCurve, BiasPoint, measure_bias
from train.distill.picture_teacher import PictureTeacher, PictureTeacherConfig

CURVE = BiasCurve(
    teacher="t",
    compressor="c",
    captions=False,
    pictures=8,
    roundtrip_ratio=1.0,
    roundtrip_distance=0.0,
    points=(
        BiasPoint(0, 6.0, 0.99, 0.01),
        BiasPoint(200, 2.0, 0.91, 0.1),
        BiasPoint(500, 0.0, 0.71, 0.4),
        BiasPoint(900, -4.0, 1.01, 1.8),  # an estimate that is noise
        BiasPoint(999, -5.0, 2.0, 3.0),
    ),
)


def test_an_estimate_is_trusted_where_the_ratio_is_near_1_and_not_again_where_it_comes_back():
    log_snr = torch.tensor([9.0, 6.0, 2.0, 1.95, 0.0, -4.0, -9.0])
    assert CURVE.trusted(log_snr, 0.9).tolist() == [True] * 4 + [False] * 3
    wide = replace(CURVE, points=(replace(CURVE.points[0], ratio=1.2), *CURVE.points[1:]))
    assert not wide.trusted(log_snr, 0.9).any(), "too wide a spread is biased as well"
    assert CURVE.trusted(log_snr, 0.01).tolist() == [True] * 6 + [False]


class Shrinking(PictureTeacher):
    """A teacher whose latents are its pixels, and whose estimate is a known share of the truth."""

    def __init__(self) -> None:
        self.truth = torch.zeros(0)

    def fingerprint(self) -> str:
        return "shrinking"

    def check_pictures(self, shapes) -> None:
        assert list(shapes) == [(8, 8)]

    def latents(self, pixels):
        self.truth = pixels
        return pixels

    def pixels(self, latents):
        return latents

    def noised(self, latents, noise, timesteps):
        assert noise.std() > 0.5
        return latents + noise

    def ask(self, x_t, timesteps, text=None, wanted=()):
        return x_t, {}

    def estimate(self, predicted, x_t, timesteps):
        return self.truth * (1 - timesteps / 1000).view(-1, 1, 1, 1)

    def log_snr(self, timesteps):
        return -timesteps / 100


def test_the_ratio_of_an_estimate_of_a_known_share_is_that_share():
    generator = torch.Generator().manual_seed(0)
    batches = [
        CachedBatch(["a"] * 4, torch.arange(4), torch.rand(4, 3, 8, 8, generator=generator))
        for _ in range(3)
    ]
    curve = measure_bias(
        Shrinking(),
        lambda pixels: 3.0 * pixels - 1.5,
        batches,
        [500, 0, 250],
        compressor="c",
        captions=False,
    )
    assert [point.timestep for point in curve.points] == [0, 250, 500]
    assert [point.ratio for point in curve.points] == pytest.approx([1.0, 0.75, 0.5], abs=1e-6)
    assert curve.points[0].distance == 0 and curve.roundtrip_ratio == 1.0
    # |s x - x|^2 / var x with x uniform in [0, 1]: (1 - s)^2 * (1/3) / (1/12)
    assert curve.points[2].distance == pytest.approx(0.25 * 4, rel=0.1)
    assert curve.pictures == 12


def test_a_file_reads_back_and_what_is_no_curve_is_refused(tmp_path: Path):
    CURVE.write(tmp_path / "curve.json")
    assert BiasCurve.read(tmp_path / "curve.json") == CURVE
    with pytest.raises(UserError, match="no such file; measure it with"):
        BiasCurve.read(tmp_path / "none.json")
    values = json.loads((tmp_path / "curve.json").read_text())
    values["points"] = values["points"][:1]
    (tmp_path / "curve.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="two or more, rising"):
        BiasCurve.read(tmp_path / "curve.json")


@pytest.mark.parametrize("damage", [{"ratio": float("nan")}, {"ratio": -1.0}, {"log_snr": 1e999}])
def test_a_number_that_nobody_measured_is_refused_where_it_is_read(damage, tmp_path: Path):
    CURVE.write(tmp_path / "curve.json")
    values = json.loads((tmp_path / "curve.json").read_text())
    values["points"][1] |= damage
    (tmp_path / "curve.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=rf"curve\.json: .*{next(iter(damage))}"):
        BiasCurve.read(tmp_path / "curve.json")


def test_estimates_without_any_spread_are_trusted_nowhere():
    flat = replace(CURVE, points=tuple(replace(one, ratio=0.0) for one in CURVE.points))
    assert not flat.trusted(torch.tensor([6.0, 0.0]), 0.5).any()


@pytest.fixture
def words(tiny_model, tiny_unet, shards, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    words = ["--teacher", str(tiny_unet / "unet.safetensors")]
    words += ["--autoencoder", str(tiny_unet / "autoencoder_kl.safetensors")]
    words += ["--data", shards, "--image-size", "32", "--device", "cpu", "--batch-size", "4"]
    return [*words, "--pictures", "8", "--dtype", "float32"]


def test_the_command_writes_the_curve_and_draws_it(words, tiny_model, tiny_unet, tmp_path, capsys):
    out = tmp_path / "new" / "curve.png"
    command = ["reencode-bias", *words, "--compressor", str(tiny_model / "compressor.safetensors")]
    command += ["--timesteps", "0", "300", "900", "--out", str(out)]
    assert distill_main([*command, "--text", str(tiny_model / "text")]) == 0
    curve = BiasCurve.read(out.with_suffix(".json"))
    assert curve.captions and curve.pictures == 8
    assert [point.timestep for point in curve.points] == [0, 300, 900]
    assert all(0 < point.ratio < 100 for point in curve.points)
    snrs = [point.log_snr for point in curve.points]
    assert snrs == sorted(snrs, reverse=True)
    assert "timestep 300" in capsys.readouterr().out
    colors = Image.open(out).convert("RGB").getcolors(1 << 20)
    assert colors is not None and {(31, 95, 168), (180, 84, 26)} <= {color for _, color in colors}
    config = PictureTeacherConfig(
        str(tiny_unet / "unet.safetensors"),
        str(tiny_unet / "autoencoder_kl.safetensors"),
        32,
        dtype="float32",
    )
    assert curve.teacher == PictureTeacher(config).fingerprint()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--image-size", "64"], ""),
        (["--timesteps", "5"], "a curve has two or more"),
        (["--timesteps", "5", "1000"], "timestep 1000: timesteps lie in 0 to 999"),
        (["--pictures", "0"], "--pictures 0: must be 1 or more"),
        (["--data", "nowhere/*.tar"], "nowhere"),
    ],
)
def test_a_slip_is_one_line(changed, message, words, tiny_model, tmp_path, capsys):
    command = ["reencode-bias", *words, "--compressor", str(tiny_model / "compressor.safetensors")]
    command += ["--out", str(tmp_path / "curve.json"), "--timesteps", "0", "500", *changed]
    code = run_main(lambda: distill_main(command))
    if not message:  # pictures are brought to the size that the teacher was trained on
        assert code == 0
        return
    err = capsys.readouterr().err
    assert code == 2 and message in err and err.splitlines()[-1].startswith("error: ")
