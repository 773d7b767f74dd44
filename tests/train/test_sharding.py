"""FSDP: two processes train as one, and what they leave behind is one process's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from cascade.errors import run_main
from tests.train.processes import finished
from train.callbacks.checkpoints import newest_checkpoint
from train.sharding import cut_like, gathered, local_part, part_like

STEPS = 4
LEARNING_RATE = 1e-5
SECTIONS = {
    "optim": {"name": "adamw", "lr": LEARNING_RATE, "warmup_steps": 0, "schedule": "constant"},
    "run": {"ema_decay": 0.5, "max_steps": STEPS},
    "model": {"dropout": 0.0},  # drawn by each process for itself
}
SHARDED = ("--run.devices", "2", "--run.strategy", "fsdp")


def start(run, *arguments: object) -> None:
    done = finished(run, *arguments)
    assert done.returncode == 0, done.stderr


def checkpoint_of(run) -> dict:
    newest = newest_checkpoint(run.out)
    assert newest is not None
    return torch.load(newest, weights_only=True)


def gap(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The difference as a share of the way that the weights have gone."""
    assert first.keys() == second.keys()
    gaps = torch.cat([(value - second[key]).flatten() for key, value in first.items()])
    return float(gaps.norm() / torch.full_like(gaps, LEARNING_RATE * STEPS).norm())


@pytest.fixture
def pair(make_run, tiny_model: Path):
    """A run of one process and the same for two, each with half of the batch."""

    def make(**more):
        sections = {key: {**SECTIONS.get(key, {}), **value} for key, value in more.items()}
        # Of zeros, gradients are rounding errors.
        start_from = {"init_from": str(tiny_model / "stage_c.safetensors")}
        data = more.get("data", {})
        whole, halves = (
            make_run(
                "stage_c",
                name,
                **{**SECTIONS, **sections, **start_from, "data": {**data, "batch_size": size}},
            )
            for name, size in (("whole", 4), ("halves", 2))
        )
        return whole, halves

    return make


@pytest.mark.slow
def test_two_sharded_processes_train_as_one_and_either_goes_on_from_the_other(
    pair, tiny_model: Path, shards: str, cache: Path
) -> None:
    pictures = {"model": str(tiny_model), "prompts": ["a", "b", "c"], "every_steps": STEPS}
    more = {"validation": {"shards": shards, "folder": str(cache), "every_steps": STEPS}}
    more |= {"posthoc_ema": {"every_steps": STEPS, "lengths": [0.05, 0.1]}}
    whole, halves = pair(pictures=pictures, **more)
    assert whole.start() == 0
    start(halves, *SHARDED)
    assert halves.losses() == pytest.approx(whole.losses(), rel=1e-4)
    ours, theirs = checkpoint_of(whole), checkpoint_of(halves)
    assert gap(ours["state_dict"], theirs["state_dict"]) < 0.1
    averages = [one["callbacks"]["WeightAverage"]["averages"]["stage_c"] for one in (ours, theirs)]
    assert gap(*averages) < 0.1
    exported = [load_file(run.out / "stage_c.safetensors") for run in (whole, halves)]
    assert gap(*exported) < 0.1
    # The average and the export are whole tensors of one thing.
    assert all(torch.equal(value, exported[1][key]) for key, value in averages[1].items())
    [state], [sharded] = ours["optimizer_states"], theirs["optimizer_states"]
    assert state["param_groups"] == sharded["param_groups"]
    for number, entry in state["state"].items():
        for name, value in entry.items():
            assert value.shape == sharded["state"][number][name].shape
    looks = [json.loads((run.out / "validation.jsonl").read_text()) for run in (whole, halves)]
    for kind in ("val_loss", "val_loss_raw"):
        assert looks[1][kind] == pytest.approx(looks[0][kind], rel=1e-4)
    lengths = [
        load_file(run.out / "ema/stage_c_0.1_00000004.safetensors") for run in (whole, halves)
    ]
    for key, value in lengths[0].items():
        torch.testing.assert_close(value, lengths[1][key], rtol=1e-2, atol=1e-4)
    names = {path.name for path in (whole.out / "pictures").iterdir()}
    assert names == {path.name for path in (halves.out / "pictures").iterdir()} and len(names) == 2
    more = ["--resume", "--run.max_steps", STEPS + 2]
    assert halves.start(*more, "--data.batch_size", 4) == 0
    assert whole.start(*more) == 0
    ends = [
        [float(row["loss"]) for row in run.metrics(1) if row["loss"]] for run in (whole, halves)
    ]
    assert len(ends[0]) == 2 and ends[1] == pytest.approx(ends[0], rel=1e-4)


@pytest.mark.slow
def test_a_sharded_run_of_muon_goes_on_to_the_bit_as_one_process_would(
    make_run, uneven_latents: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    data = {"mode": "exact", "size": 32, "folder": None, "shards": uneven_latents}
    optim = {**SECTIONS["optim"], "name": "muon", "muon_lr": LEARNING_RATE}
    # Wide enough for matrices that Muon steps; the odd width does not divide into two parts.
    model = {"hidden_channels": [33], "num_heads": [3], "cond_channels": 33, "dropout": 0.0}
    model |= {"down_blocks": [1], "up_blocks": [1]}
    more = {"optim": optim, "run": SECTIONS["run"], "model": model}
    runs = [
        make_run("stage_c", name, data={**data, "batch_size": size}, **more)
        for name, size in (("whole", 4), ("halves", 2), ("stopped", 2))
    ]
    whole, halves, stopped = runs
    assert whole.start() == 0
    start(halves, *SHARDED)
    start(stopped, *SHARDED, "--run.max_steps", 2)
    start(stopped, *SHARDED, "--resume")
    assert halves.losses() == pytest.approx(whole.losses(), rel=1e-4)
    ours, again = checkpoint_of(halves), checkpoint_of(stopped)
    for section in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(ours[section], again[section], rtol=0, atol=0)
    assert gap(checkpoint_of(whole)["state_dict"], ours["state_dict"]) < 0.2
    one, two = (load_file(run.out / "stage_c.safetensors") for run in (halves, stopped))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("stage_a", {}, "this network is stepped by two optimizers; use run.strategy ddp"),
        ("previewer", {}, "batch norms would see each device's part"),
        ("clip", {}, "a number by itself can't be cut"),
        (
            "stage_c",
            {"optim": {"name": "adamw", "offload": True}},
            "optim.offload is for one device's",
        ),
        ("stage_c", {"run": {"precision": "16-mixed"}}, "use bf16-mixed or 32-true"),
    ],
)
def test_what_fsdp_would_do_wrong_is_refused_in_a_line(
    kind, changes, message, make_run, capsys
) -> None:
    run = make_run(kind, **{"data": {"batch_size": 2}, **changes})
    assert run_main(lambda: run.start(*SHARDED)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_average_on_the_cpu_and_parts_of_tensors_are_those_of_whole_ones() -> None:
    """One rank of a mesh: what is put together again is what was cut."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    try:
        mesh = init_device_mesh("cpu", (1,))
        whole = torch.randn(5, 3)
        own = distribute_tensor(whole, mesh, [Shard(0)])
        assert torch.equal(part_like(whole, own).to_local(), whole)
        assert torch.equal(gathered(cut_like(local_part(own), own)), whole)
        assert torch.equal(gathered({"a": [own, 3]})["a"][0], whole)
    finally:
        torch.distributed.destroy_process_group()
