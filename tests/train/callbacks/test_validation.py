"""The loss on held-out pictures: what it is, that it repeats, and that looking changes nothing."""

from __future__ import annotations

import gzip
import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cascade.checkpoints.files import load_network
from cascade.config import load_yaml
from cascade.errors import UserError
from stages.stage_c import StageC
from train.callbacks.validation import ValidationConfig
from train.data.config import DataConfig
from train.data.open import open_data
from train.draws import StepDraws
from train.encode import FrozenPaths
from train.systems.stage_c import StageCRun, StageCSystem


def rows_of(run):
    return [json.loads(line) for line in (run.out / "validation.jsonl").read_text().splitlines()]


def held_out(shards, cache, **values):
    return {"shards": shards, "folder": str(cache), "every_steps": 2, "samples": 8, **values}


@pytest.mark.parametrize("kind", ["stage_c", "stage_b"])
def test_looking_changes_nothing_and_is_written_at_every_look(kind, make_run, shards, cache):
    dropout = {"dropout": 0.2} if kind == "stage_c" else {}
    plain = make_run(kind, "plain", model=dropout)
    plain.start()
    looking = make_run(kind, "looking", model=dropout, validation=held_out(shards, cache))
    looking.start()
    one, two = (load_file(run.out / f"{kind}.safetensors") for run in (plain, looking))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    rows = rows_of(looking)
    assert [(row["step"], row["samples"]) for row in rows] == [(2, 8), (4, 16)]
    assert 0 < rows[0]["seconds"] < rows[1]["seconds"]
    assert rows[0]["val_loss"] != rows[1]["val_loss"] != rows[1]["val_loss_raw"]
    ledger = [json.loads(line) for line in (looking.out / "ledger.jsonl").read_text().splitlines()]
    assert sum(row["seconds"]["validation"] for row in ledger) > 0


def test_a_look_is_the_exported_weights_loss_on_the_same_draws(make_run, shards, cache, tiny_model):
    made = make_run("stage_c", validation=held_out(shards, cache, batch_size=3, samples=6))
    made.start()
    run = load_yaml(StageCRun, made.config)
    frozen = FrozenPaths(
        text=str(tiny_model / "text"), compressor=str(tiny_model / "compressor.safetensors")
    )
    data = open_data(run.validation.data(run.data), frozen, pixels=False)
    system = StageCSystem(run, data.null_text)
    system.network = load_network(made.out / "stage_c.safetensors", expect=StageC)
    batches = iter(data.loader_from(0, 0, 1))
    with torch.no_grad():
        errors = [system.validation_errors(next(batches), StepDraws(0, k))[0] for k in range(2)]
    row = rows_of(made)[-1]
    assert row["val_loss"] == pytest.approx(float(torch.cat(errors).mean()), rel=1e-5)
    assert len(row["by_t"]) == 5


def test_a_resumed_run_counts_its_seconds_on_and_looks_alike(make_run, shards, cache):
    validation = held_out(shards, cache)
    whole = make_run("stage_c", "whole", validation=validation)
    whole.start()
    half = make_run("stage_c", "half", validation=validation)
    half.start("--run.max_steps", 2)
    half.start("--resume", "--run.max_steps", 4)
    # The schedule of the first half ends at its own end, so only the first look is the same.
    assert rows_of(half)[0]["step"] == 2
    assert rows_of(half)[-1]["seconds"] > rows_of(half)[0]["seconds"]
    again = make_run("stage_c", "again", validation=validation)
    again.start()
    losses = [[row["val_loss"] for row in rows_of(run)] for run in (whole, again)]
    assert losses[0] == losses[1]


def test_held_out_pictures_of_another_cache_are_refused(make_run, shards, tmp_path):
    run = make_run("stage_c", validation={"shards": shards, "folder": str(tmp_path)})
    with pytest.raises(UserError, match="precompute"):
        run.start()


def test_a_look_at_nothing_is_refused(make_run, shards, cache):
    with pytest.raises(UserError, match="samples is 0"):
        make_run("stage_c", validation=held_out(shards, cache, samples=0)).start()


RESAMPLED = {"batch_size": 4, "size": 32, "mode": "resampled", "allow_pipe": True}


def times_seen(config: DataConfig, pictures: int) -> Counter[str]:
    """Over both ranks, until so many have come."""
    data = open_data(config)
    loaders = [iter(data.loader_from(0, rank, 2)) for rank in range(2)]
    batches = itertools.chain.from_iterable(zip(*loaders, strict=True))
    seen: Counter[str] = Counter()
    while seen.total() < pictures:
        seen.update(next(batches).keys)
    return seen


def test_a_resampled_run_reads_its_held_out_pictures_once_each(uneven_shards, tmp_path, caplog):
    trained = DataConfig(shards="/none/*.tar", block_shards=1, **RESAMPLED)
    validation = ValidationConfig(uneven_shards, seed=3)
    assert validation.data(trained).mode == "exact"
    seen = times_seen(validation.data(trained), 62)
    assert len(seen) == 62 and set(seen.values()) == {1}
    assert "with replacement" not in caplog.text


@pytest.mark.parametrize("trained_mode", ["exact", "resampled"])
@pytest.mark.parametrize("kind", ["pipe", "packed"])
def test_held_out_shards_that_can_t_be_indexed_are_drawn_and_said_to_be(
    kind, trained_mode, shards, tmp_path, caplog
):
    [shard] = Path(shards).parent.glob("*.tar")
    packed = tmp_path / "held-out.tar.gz"
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    held = {"pipe": f"pipe:cat {shard}", "packed": str(packed)}[kind]
    trained = DataConfig(**{"shards": "/none/*.tar", **RESAMPLED, "mode": trained_mode})
    with caplog.at_level("INFO"):
        config = ValidationConfig(held).data(trained)
    assert config.mode == "resampled"
    [line] = [one for one in caplog.messages if "drawn with replacement" in one]
    assert {"pipe": "command", "packed": "packed"}[kind] in line
    assert len(times_seen(config, 24)) == 12


def test_held_out_pictures_fewer_than_a_step_name_their_own_key(make_run, shards):
    data = {"mode": "resampled", "size": 32, "folder": None}
    validation = {"shards": shards, "batch_size": 13}
    run = make_run("stage_c", data=data, validation=validation)
    with pytest.raises(UserError, match=r"^validation: .* hold 12 .*; set validation\.batch_size$"):
        run.start()
