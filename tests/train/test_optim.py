from __future__ import annotations

import copy
import itertools
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from cascade.errors import UserError
from train.callbacks.checkpoints import newest_checkpoint
from train.optim import (
    MuonWithAdamW,
    learning_rate_factor,
    make_optimizer,
    orthogonalize,
    require_low_bit,
    split_by_decay,
)
from train.settings import OptimConfig, RunConfig


def factors(steps: int = 100, **values: object) -> list[float]:
    factor = learning_rate_factor(OptimConfig(**values), steps)
    return [factor(step) for step in range(steps + 1)]


def test_the_rate_warms_up_from_above_zero_to_its_peak():
    values = factors(warmup_steps=10)
    assert values[0] == pytest.approx(0.1)
    assert values[9] == values[10] == values[100] == 1.0
    assert factors(warmup_steps=0)[0] == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_rate_falls_from_where_it_should_to_its_final_share(schedule):
    values = factors(
        warmup_steps=10, schedule=schedule, decay_from=0.5, final_lr_fraction=0.2
    )  # fmt: skip
    assert values[10:51] == [1.0] * 41
    assert all(a > b for a, b in itertools.pairwise(values[50:]))
    assert values[75] == pytest.approx(0.6)
    assert values[100] == pytest.approx(0.2)
    late = learning_rate_factor(OptimConfig(schedule=schedule, final_lr_fraction=0.2), 100)
    assert late(1000) == pytest.approx(0.2)


def test_a_cosine_leaves_its_ends_slower_than_a_line():
    cosine, line = (factors(warmup_steps=0, schedule=kind) for kind in ("cosine", "linear"))
    assert cosine[5] > line[5]
    assert cosine[95] < line[95]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.big = nn.Linear(32, 48)
        self.small = nn.Linear(48, 4)
        self.conv = nn.Conv2d(4, 4, 3)
        self.gain = nn.Parameter(torch.ones(1, 1, 1, 8))
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Parameter(torch.ones(40, 40), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.small(torch.tanh(self.big(x)))
        h = h + self.conv(h[..., None, None].expand(-1, -1, 3, 3))[..., 0, 0]
        return h.sum(1) * self.gain.sum() * self.scale


def test_only_matrices_and_kernels_decay():
    network = Small()
    matrices, vectors = split_by_decay(network.parameters())
    assert {id(p) for p in matrices} == {
        id(m.weight) for m in (network.big, network.small, network.conv)
    }
    biases = [m.bias for m in (network.big, network.small, network.conv)]
    assert {id(p) for p in vectors} == {id(p) for p in [*biases, network.gain, network.scale]}
    optimizer, _ = make_optimizer(network.parameters(), OptimConfig(weight_decay=0.3), 10)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    network = Small()
    config = OptimConfig(name="muon", weight_decay=0.3)
    optimizer, _ = make_optimizer(network.parameters(), config, 10)
    muon = [group for group in optimizer.param_groups if group["muon"]]
    assert [[p is network.big.weight for p in group["params"]] for group in muon] == [[True]]
    assert [g["decay"] for g in optimizer.param_groups] == [0.3, 0.3, 0.0]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 8


def test_a_hidden_kernel_steps_as_the_matrix_that_it_is():
    torch.manual_seed(0)
    kernel, depthwise = (
        nn.Conv2d(32, 48, 3, bias=False),
        nn.Conv2d(48, 48, 3, groups=48, bias=False),
    )
    first = nn.Conv2d(4, 48, 3, bias=False)
    matrix = nn.Linear(32 * 9, 48, bias=False)
    matrix.weight.data.copy_(kernel.weight.flatten(1))
    config = OptimConfig(name="muon", warmup_steps=0)
    layers = nn.ModuleList([kernel, depthwise, first, matrix])
    optimizer, _ = make_optimizer(layers.parameters(), config, 10)
    [muon] = [group["params"] for group in optimizer.param_groups if group["muon"]]
    assert {id(one) for one in muon} == {id(kernel.weight), id(matrix.weight)}
    before = kernel.weight.detach().clone()
    for _ in range(3):
        grad = torch.randn(kernel.weight.shape)
        kernel.weight.grad, matrix.weight.grad = grad, grad.flatten(1).clone()
        optimizer.step()
    assert torch.equal(kernel.weight.flatten(1), matrix.weight)
    assert not torch.equal(kernel.weight, before)


@pytest.mark.parametrize("shape", [(32, 32), (32, 96), (96, 32)])
def test_orthogonalize_keeps_directions_and_evens_out_their_sizes(shape):
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    sizes = torch.logspace(0, -1, min(shape))
    result = orthogonalize(u @ torch.diag(sizes) @ v)
    assert result.shape == shape
    assert result.dtype == torch.float32
    values = torch.linalg.svdvals(result)
    assert 0.6 < values.min() <= values.max() < 1.3
    inner = u.T @ result @ v.T
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 0.1


def test_muon_s_adamw_part_steps_as_torch_s():
    torch.manual_seed(0)
    network, reference = nn.Linear(8, 8), nn.Linear(8, 8)
    reference.load_state_dict(network.state_dict())
    config = OptimConfig(name="muon", lr=1e-2, weight_decay=0.1)
    ours = MuonWithAdamW(network.parameters(), config)
    groups = [{"params": [reference.weight], "weight_decay": 0.1},
              {"params": [reference.bias], "weight_decay": 0.0}]  # fmt: skip
    theirs = torch.optim.AdamW(groups, lr=1e-2, betas=config.betas)
    for step in range(5):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        for module, optimizer in ((network, ours), (reference, theirs)):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(network.weight, reference.weight)
    torch.testing.assert_close(network.bias, reference.bias)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_optimizer_s_state_survives_its_state_dict(name):
    torch.manual_seed(0)
    config = OptimConfig(name=name, lr=1e-2, warmup_steps=3, schedule="cosine")

    def run(network: Small, optimizer, schedule, steps: range) -> None:
        for step in steps:
            x = torch.randn(4, 32, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()
            schedule.step()

    network = Small()
    optimizer, schedule = make_optimizer(network.parameters(), config, 10)
    run(network, optimizer, schedule, range(4))
    saved = copy.deepcopy([part.state_dict() for part in (network, optimizer, schedule)])
    run(network, optimizer, schedule, range(4, 8))
    other = Small()
    again = (other, *make_optimizer(other.parameters(), config, 10))
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)
    run(*again, range(4, 8))
    for (key, value), found in zip(network.state_dict().items(), other.parameters(), strict=True):
        assert torch.equal(value, found), key


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (OptimConfig, {"lr": 0.0}, "lr is 0.0"),
        (OptimConfig, {"warmup_steps": -1}, "warmup_steps=-1"),
        (OptimConfig, {"decay_from": 80.0}, "decay_from=80.0"),
        (OptimConfig, {"betas": (0.9, 1.0)}, "betas"),
        (RunConfig, {"max_steps": 0}, "max_steps is 0"),
        (RunConfig, {"log_every_steps": 0}, "log_every_steps is 0"),
        (OptimConfig, {"name": "muon", "offload": True}, "only adamw can be offloaded"),
        (OptimConfig, {"name": "adamw8bit", "fused": True}, "only adamw has a fused kernel"),
        (RunConfig, {"seed": -1}, "seed is -1"),
        (RunConfig, {"max_minutes": 0.0}, "max_minutes is 0.0"),
        (RunConfig, {"ema_decay": 1.0}, "ema_decay is 1.0"),
    ],
)
def test_values_that_would_fail_late_are_refused(cls, values, message):
    needed = {"out": "x", "max_steps": 1} if cls is RunConfig else {}
    with pytest.raises(ValueError, match=message):
        cls(**{**needed, **values})


def network_and_optimizer(config: OptimConfig):
    torch.manual_seed(3)
    network = nn.Linear(128, 64)
    return network, *make_optimizer(network.parameters(), config, 10)


def test_adamw_is_fused_unless_it_shall_not_be_and_steps_alike():
    ends = []
    for fused, expected in ((None, True), (True, True), (False, False)):
        network, optimizer, _ = network_and_optimizer(OptimConfig(lr=1e-2, fused=fused))
        assert bool(optimizer.param_groups[0]["fused"]) is expected
        for _ in range(3):
            network(torch.ones(2, 128)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(network.weight.detach())
    assert torch.equal(ends[0], ends[1])
    torch.testing.assert_close(ends[0], ends[2], rtol=1e-5, atol=1e-6)
    elsewhere = nn.Linear(4, 4, device="meta")  # a kind of device whose kernel nobody has tried
    optimizer, _ = make_optimizer(elsewhere.parameters(), OptimConfig(), 10)
    assert not optimizer.param_groups[0]["fused"]


def test_a_fused_step_under_a_loss_scale_is_clipped_like_any_other():
    ends = []
    for fused, scaled in ((True, True), (True, False), (False, True)):
        network, optimizer, _ = network_and_optimizer(OptimConfig(lr=1e-2, fused=fused))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for _ in range(3):
            scaler.scale(network(torch.ones(2, 128)).square().sum()).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        ends.append(network.weight.detach())
    torch.testing.assert_close(ends[0], ends[1])
    torch.testing.assert_close(ends[0], ends[2])


def test_an_offloaded_adamw_steps_as_adamw_and_follows_its_schedule():
    config = OptimConfig(lr=1e-2, warmup_steps=3, weight_decay=0.1)
    runs = [network_and_optimizer(config), network_and_optimizer(replace(config, offload=True))]
    for _ in range(5):
        for network, optimizer, schedule in runs:
            network(torch.ones(2, 128)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    (plain, adamw, _), (offloaded, ours, _) = runs
    torch.testing.assert_close(plain.state_dict(), offloaded.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(adamw.state_dict(), ours.state_dict(), rtol=0, atol=0)
    assert not ours.state, "nothing is kept for the device"


def test_without_torchao_8_bit_states_are_refused_in_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.delitem(sys.modules, "torchao.optim", raising=False)
    require_low_bit(OptimConfig())
    with pytest.raises(UserError, match=r"optim.name is adamw8bit.*pip install torchao"):
        require_low_bit(OptimConfig(name="adamw8bit"))


def test_a_run_with_8_bit_states_goes_on_to_the_bit(make_run):
    pytest.importorskip("torchao", reason="optional: pip install torchao")
    optim = {"name": "adamw8bit"}
    model = {"hidden_channels": [64], "num_heads": [2], "down_blocks": [1], "up_blocks": [1]}
    whole, halves = (make_run("stage_c", name, optim=optim, model=model) for name in ("a", "b"))
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step
        assert whole.start("--run.max_steps", 4) == 0
        assert halves.start("--run.max_steps", 2) == 0
        assert halves.start("--run.max_steps", 4, "--resume") == 0
    one, two = (
        torch.load(newest_checkpoint(run.out), weights_only=True) for run in (whole, halves)
    )
    states = one["optimizer_states"][0]["state"].values()
    for key, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][key]), key
    assert any(type(v).__name__ == "OptimState8bit" for state in states for v in state.values())
