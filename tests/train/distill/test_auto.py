from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cascade.checkpoints.files import load_network, save_network
from cascade.diffusion.discrete import DiscreteSchedule, time_of
from cascade.errors import UserError
from stages.unet.attention import TransformerBlock
from stages.unet.compress import Recipe, StudentPlan, plan_student
from stages.unet.unet import UNet
from tests.train.distill.conftest import MIDDLING
from train.distill import auto
from train.distill.__main__ import main
from train.distill.auto import Bench, Budget, choose_recipe, parse_parameters, parse_share
from train.distill.calibration import Calibration, calibrate
from train.distill.latency import compare_seconds, shares_of_modules

CPU = torch.device("cpu")
BLOCK = "up_blocks.0.attentions.1.transformer_blocks.0"


def _bench(calibration: Calibration | None = None) -> Bench:
    given = calibration or calibrate("random", MIDDLING, count=3, latent_size=4)
    return Bench(given, CPU, torch.float32, batch_size=2, repeats=1)


def _count(network: UNet) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _silence(network: UNet, name: str) -> None:
    """Let a transformer block add nothing."""
    block = network.get_submodule(name)
    with torch.no_grad():
        for last in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]):
            last.weight.zero_()
            last.bias.zero_()


def test_a_block_that_adds_nothing_is_removed_first(middling):
    _silence(middling, BLOCK)
    choice = choose_recipe(middling, Budget(parameters=_count(middling) - 1), _bench())
    assert choice.recipe == Recipe((BLOCK,))
    assert choice.importance[1].split()[0] == BLOCK
    assert choice.importance[1].split()[-1] == "removed"
    assert "output error before any training: 0.0000" in choice.summary[1]


def test_a_teacher_that_uses_little_of_itself_is_told(middling, monkeypatch):
    """A student of a part of it answers the same: the teacher was not trained well."""
    half = Budget(parameters=round(0.5 * _count(middling)))
    healthy = choose_recipe(middling, half, _bench())
    assert not any("hardly uses" in line for line in healthy.summary)
    monkeypatch.setattr(auto, "_IDLE_KEPT", 0.95)  # these blocks are a small share of the toy
    budget = Budget(parameters=round(0.95 * _count(middling)))
    names = [name for name, one in middling.named_modules() if isinstance(one, TransformerBlock)]
    for name in names:
        _silence(middling, name)
    choice = choose_recipe(middling, budget, _bench())
    [warning] = [line for line in choice.summary if "hardly uses" in line]
    assert "was it trained well?" in warning


def test_the_budget_is_met_by_the_file_and_the_choice_is_the_same_again(middling_file, tmp_path):
    whole = _count(load_network(middling_file, expect=UNet))
    arguments = ["make-student", "--teacher", str(middling_file), "--recipe", "auto"]
    arguments += ["--max-params", "60%", "--calibration", "random", "--latent-size", "4"]
    for name in ("one", "two"):
        assert main([*arguments, "--out", str(tmp_path / name)]) == 0
    texts = [(tmp_path / name / "recipe.yaml").read_text() for name in ("one", "two")]
    assert texts[0] == texts[1]
    student = load_network(tmp_path / "one" / "student.safetensors", expect=UNet)
    assert 0.3 * whole < _count(student) <= 0.6 * whole
    report = (tmp_path / "one" / "report.txt").read_text()
    assert "less faithful" in report and "error per 1M" in report
    assert "the nearest hand-made recipe, bk_" in report
    # The recipe that was chosen is one like any other.
    again = ["--recipe", str(tmp_path / "one" / "recipe.yaml"), "--out", str(tmp_path / "three")]
    assert main([*arguments[:3], *again]) == 0
    one, three = (load_file(tmp_path / n / "student.safetensors") for n in ("one", "three"))
    assert one.keys() == three.keys()


def test_a_new_teacher_cannot_be_measured():
    new = UNet(MIDDLING).eval()
    half = sum(one.numel() for one in new.parameters()) // 2
    with pytest.raises(UserError, match="predicts zeros alone"):
        choose_recipe(new, Budget(parameters=half), _bench())


def test_a_budget_that_no_student_meets_is_refused(middling):
    with pytest.raises(UserError, match="no student meets 100: the smallest student"):
        choose_recipe(middling, Budget(parameters=100), _bench())


# Latency


def _share(network: UNet, plan: StudentPlan) -> float:
    kept = set(plan.origins.values())
    return sum(share for path, share in _shares(network).items() if path in kept)


def _shares(network: UNet) -> Mapping[str, float]:
    """Parameters as if they were time."""
    paths = plan_student(network.config, Recipe()).origins
    found = dict.fromkeys(["", *paths], 0.0)
    for name, parameter in network.named_parameters():
        path = name.rpartition(".")[0]
        while path not in paths:
            path = path.rpartition(".")[0]
        found[path] += parameter.numel() / _count(network)
    return found


def test_a_student_that_is_slower_than_estimated_is_cut_further(middling, monkeypatch):
    whole = _count(middling)
    # The first student is half again as slow as estimated, the second is not.
    asked = [(1.0, 0.9), (1.0, 0.55)]
    monkeypatch.setattr(auto, "compare_seconds", lambda *given: asked.pop(0))
    monkeypatch.setattr(auto, "shares_of_modules", lambda network, *rest: _shares(network))
    choice = choose_recipe(middling, Budget(latency=0.6), _bench())
    assert not asked
    assert "% of time" in choice.importance[0]
    assert "its duration: 55.0% of the teacher's 1.000 s for 3 latents of 4x4" in choice.summary[-1]
    plan = plan_student(MIDDLING, choice.recipe)
    assert _share(middling, plan) <= 0.6 * 0.6 / 0.9
    assert whole > _count(UNet(plan.student))


def test_a_student_that_never_gets_fast_enough_is_refused(middling, monkeypatch):
    monkeypatch.setattr(auto, "compare_seconds", lambda *given: (1.0, 1.0))
    monkeypatch.setattr(auto, "shares_of_modules", lambda network, *rest: _shares(network))
    with pytest.raises(UserError, match=r"after 8 choices the student still takes 100\.0%"):
        choose_recipe(middling, Budget(latency=0.99), _bench())


def test_each_modules_share_of_the_time_is_measured_and_nothing_is_left_behind(middling):
    predict = _bench().calibration.predictor(CPU, torch.float32, 3)
    shares = shares_of_modules(middling, lambda: predict(middling), CPU, 2)
    assert set(shares) == {"", *plan_student(MIDDLING, Recipe()).origins}
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) >= 0
    assert all(shares[name] > 0 for name in ("mid_block.resnets.0", BLOCK, "conv_in"))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in middling.modules())


def test_durations_are_the_fastest_of_calls_made_in_turn():
    calls: list[str] = []

    def call(name: str, seconds: float) -> None:
        calls.append(name)
        # Only the last one of each is fast.
        time.sleep(seconds if len(calls) > 4 else 10 * seconds)

    one, other = compare_seconds(lambda: call("a", 0.002), lambda: call("b", 0.02), CPU, 2)
    assert calls == ["a", "b"] * 3
    assert 0.002 <= one and 0.02 <= other < 0.2


# What is asked


@pytest.mark.parametrize(
    ("text", "expected"),
    [("700M", 700_000_000), ("1.2b", 1_200_000_000), ("30%", 600_000_000), ("12345", 12345)],
)
def test_numbers_of_parameters_are_read(text, expected):
    assert parse_parameters(text, 2_000_000_000) == expected


@pytest.mark.parametrize("text", ["many", "-3", "3B", "100%", "0", "700 MB"])
def test_other_numbers_of_parameters_are_refused(text):
    with pytest.raises(UserError, match="--max-params"):
        parse_parameters(text, 2_000_000_000)


def test_shares_are_read():
    assert parse_share("50%") == parse_share("0.5") == 0.5
    for text in ("half", "0", "150%", "1"):
        with pytest.raises(UserError, match="--max-latency"):
            parse_share(text)


# The calibration batch


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(2, 4, 4, 6, generator=generator),
        "text_hidden": torch.randn(2, 7, 6, generator=generator),
        "text_pooled": torch.randn(2, 5, generator=generator),
        "sizes": torch.full((2, 6), 32.0),
    }


def test_a_file_is_noised_at_timesteps_spread_over_the_schedule(tensors, tmp_path, middling):
    path = tmp_path / "calibration.safetensors"
    save_file(tensors, path)
    found = calibrate(str(path), MIDDLING, count=5, latent_size=64)
    assert found.timesteps.tolist() == [100, 300, 500, 700, 900]
    alpha, _ = DiscreteSchedule()(time_of(found.timesteps))
    noise_0 = found.x_t[0] - alpha[0] * tensors["latents"][0]
    assert noise_0.std() < 0.5  # at timestep 100 there is little of it
    assert torch.equal(found.cond.text_hidden[2], tensors["text_hidden"][0])
    choice = choose_recipe(middling, Budget(parameters=_count(middling) - 1), _bench(found))
    assert f"5 noisings of 2 latents of 4x6 of {path}" in choice.summary[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": None}, "no latents"),
        ({"text_pooled": None}, r"no text_pooled \(Nx5\) in it"),
        ({"text_hidden": torch.zeros(2, 7, 8)}, "text_hidden is 2x7x8; needed: Nxanyx6"),
        ({"sizes": torch.zeros(3, 6)}, "sizes is of 3 samples, latents of 2"),
        ({"latents": torch.full((2, 4, 4, 4), torch.nan)}, "not finite"),
        ({"captions": torch.zeros(2)}, "captions: unknown tensor; valid: latents"),
    ],
)
def test_a_file_of_other_tensors_is_refused(tensors, tmp_path, change, message):
    path = tmp_path / "calibration.safetensors"
    changed = {**tensors, **change}
    save_file({key: value for key, value in changed.items() if value is not None}, path)
    with pytest.raises(UserError, match=message):
        calibrate(str(path), MIDDLING, count=2, latent_size=4)


def test_a_calibration_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"rando: no such file; .* did you mean 'random'\?"):
        calibrate("rando", MIDDLING, count=2, latent_size=4)


def test_the_teacher_is_measured_in_float32_and_inherited_in_its_own_format(middling, tmp_path):
    path: Path = tmp_path / "half.safetensors"
    save_network(path, middling, dtype=torch.float16)
    arguments = ["make-student", "--teacher", str(path), "--recipe", "auto", "--max-params", "90%"]
    arguments += ["--calibration", "random", "--latent-size", "4", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    state = load_file(tmp_path / "out" / "student.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert "float32 on cpu" in (tmp_path / "out" / "report.txt").read_text()
