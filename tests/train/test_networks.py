"""Blocks recomputed and compiled: the same steps, the same keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cascade.compiled import blocks_of
from cascade.errors import run_main
from stages.stage_b import StageB, StageBCondition, StageBConfig
from stages.stage_c import StageC, StageCCondition, StageCConfig
from stages.stage_c_v2 import StageCV2, StageCV2Condition, StageCV2Config
from train.callbacks.checkpoints import newest_checkpoint
from train.networks import plain_copy


def stage_c(**changes: object) -> StageC:
    torch.manual_seed(0)
    sizes = {"hidden_channels": (8, 16), "num_heads": (2, 2), "down_blocks": (1, 2)}
    config = {"cond_channels": 8, "up_blocks": (2, 1), "text_channels": 6, "dropout": 0.3}
    more = {"text_pooled_channels": 6, "image_channels": None, "time_conds": ()}
    network = StageC(StageCConfig(**{**sizes, **config, **more, **changes}))
    nn.init.normal_(network.out.weight)  # of zeros, no gradient comes through
    return network


def gradients(network: nn.Module, *inputs: object) -> list[torch.Tensor]:
    torch.manual_seed(7)  # of dropout
    network.zero_grad()
    network(*inputs).square().mean().backward()
    return [one.grad.clone() for one in network.parameters() if one.grad is not None]


def inputs_of(kind: type) -> tuple[nn.Module, tuple[object, ...]]:
    hidden, pooled = torch.randn(2, 5, 6), torch.randn(2, 6)
    if kind is StageC:
        cond = StageCCondition(text_hidden=hidden, text_pooled=pooled)
        return stage_c(), (torch.randn(2, 16, 4, 4), torch.rand(2), cond)
    if kind is StageCV2:
        sizes = {"hidden_channels": 16, "num_heads": 2, "num_blocks": 2, "text_channels": 6}
        network = StageCV2(StageCV2Config(**sizes, dropout=0.3))
        nn.init.normal_(network.out.weight)
        cond = StageCV2Condition(text_hidden=hidden)
        return network, (torch.randn(2, 16, 4, 4), torch.rand(2), cond)
    sizes = {"hidden_channels": (8, 16), "num_heads": (0, 2), "down_blocks": (1, 1)}
    more = {"up_blocks": (1, 1), "up_repeats": (2, 1), "dropout": (0.0, 0.3)}
    text = {"cond_channels": 8, "text_pooled_channels": 6}
    network = StageB(StageBConfig(**sizes, **more, **text))
    nn.init.normal_(network.out.weight)
    cond = StageBCondition(stage_c_latents=torch.randn(2, 16, 2, 2), text_pooled=pooled)
    return network, (torch.randn(2, 4, 8, 8), torch.rand(2), cond)


@pytest.mark.parametrize("kind", [StageB, StageC, StageCV2])
def test_recomputed_blocks_give_the_same_gradients_to_the_bit_with_dropout_on(kind) -> None:
    torch.manual_seed(1)
    network, inputs = inputs_of(kind)
    kept = gradients(network, *inputs)
    kept_bytes = saved_bytes(network, *inputs)
    network.recompute = True
    again = gradients(network, *inputs)
    assert any(float(one.abs().max()) > 0 for one in kept)
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))
    assert saved_bytes(network, *inputs) < 0.7 * kept_bytes


def saved_bytes(network: nn.Module, *inputs: object) -> int:
    """What autograd keeps between forward and backward, weights included."""
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)  # a freed address must not be counted as another's
        return tensor

    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        network(*inputs)
    return sum(storages.values())


def test_the_blocks_of_a_network_are_the_entries_of_its_lists() -> None:
    kinds = [type(block).__name__ for block in blocks_of(stage_c())]
    assert kinds.count("StageCBlock") == 6 and set(kinds) == {"StageCBlock", "LevelChange"}


def test_a_plain_copy_has_the_tensors_of_its_state_and_leaves_the_network_alone() -> None:
    network = stage_c()
    state = {key: value + 1 for key, value in network.state_dict().items()}
    before = {key: value.clone() for key, value in network.state_dict().items()}
    copy = plain_copy(network, state)
    assert type(copy) is StageC and copy.config == network.config
    assert all(copy.state_dict()[key].data_ptr() == one.data_ptr() for key, one in state.items())
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in before.items())


def kept_state(run) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(run.out)
    assert newest is not None
    return torch.load(newest, weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stage_c", "stage_a", "unet_kd"])
def test_a_compiled_run_learns_the_same_and_keeps_clean_keys(kind, make_run, monkeypatch) -> None:
    # dynamo's part alone: the code generator's takes minutes here, and its sums are others.
    monkeypatch.setattr("cascade.compiled.COMPILE_BACKEND", "eager")
    torch._dynamo.reset()  # else what another test has compiled takes no time
    plain, compiled = make_run(kind, "plain"), make_run(kind, "compiled", run={"compile": True})
    assert plain.start("--run.max_steps", 3) == 0
    assert compiled.start("--run.max_steps", 2) == 0
    assert compiled.start("--run.max_steps", 3, "--resume") == 0
    expected, found = kept_state(plain), kept_state(compiled)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(value, found[key])
    for path in plain.out.glob("*.safetensors"):
        assert load_file(path).keys() == load_file(compiled.out / path.name).keys()
    rows = [json.loads(line) for line in (compiled.out / "ledger.jsonl").read_text().splitlines()]
    assert sum(row["seconds"]["compile"] for row in rows) > 0
    whole = [json.loads(line) for line in (plain.out / "ledger.jsonl").read_text().splitlines()]
    if kind != "stage_c":  # what judges a picture, or teaches, is no part of its system
        assert all(row["flops"] is None for row in rows)
    else:
        for row in [*rows, *whole]:
            assert row["flops"] >= 0
        assert sum(row["flops"] for row in rows) == sum(row["flops"] for row in whole) > 0


def test_what_saves_memory_changes_no_bit_of_a_run(make_run, tiny_model: Path) -> None:
    saving = {"activation_checkpointing": True, "ema_offload": True}
    plain = make_run("stage_c", "plain")
    small = make_run("stage_c", "small", run=saving, optim={"name": "adamw", "offload": True})
    assert plain.start("--run.max_steps", 3) == 0
    assert small.start("--run.max_steps", 2) == 0
    # The checkpoint is AdamW's own: the run goes on without what saved memory.
    back = ["--run.activation_checkpointing", "false", "--optim.offload", "false"]
    assert small.start("--run.max_steps", 3, "--resume", *back) == 0
    whole, other = (torch.load(newest_checkpoint(r.out), weights_only=True) for r in (plain, small))
    for section in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(whole[section], other[section], rtol=0, atol=0)
    one, two = (load_file(run.out / "stage_c.safetensors") for run in (plain, small))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_what_has_no_blocks_to_recompute_says_so(make_run, capsys) -> None:
    run = make_run("previewer", run={"activation_checkpointing": True})
    assert run_main(run.start) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "run.activation_checkpointing: the network (Previewer) has no blocks" in line
