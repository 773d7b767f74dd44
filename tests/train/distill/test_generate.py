"""The data factory: what it makes depends neither on who makes it nor on how often it is killed."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cascade.checkpoints.files import atomic_path
from cascade.errors import UserError
from cascade.evaluate.generate import (
    Item,
    MakerOptions,
    PictureMaker,
    Refused,
    item_seed,
    make_files,
)
from cascade.launchers import Part, alone
from cascade.pipelines.finite import BlankPictureError, NonFiniteError
from tests.unet_models import save_tiny
from train.data.beside import find_beside, trusted_beside
from train.data.config import DataConfig
from train.data.latents import PrecomputeOptions, precompute_shards
from train.data.shards import ShardReader
from train.distill.__main__ import main
from train.distill.factory import Factory
from train.distill.generate_config import GenerateConfig
from train.distill.generated_set import TWIN, is_done, state_of
from train.distill.prompts import read_prompts
from train.distill.teacher_cost import read_teacher_cost
from train.encode import FrozenPaths

WORDS = ["red apple", "blue fish", "green hat", "blue apple", "red fish", "green apple", "red hat"]


@pytest.fixture(scope="module")
def unet_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("teachers") / "sdxl", "sdxl")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("# words\n" + "\n".join(word for word in WORDS) + "\n\n")
    return path


def config(teacher: Path, prompts: Path, out: Path, **values: object) -> GenerateConfig:
    plain = {"steps": 1, "shard_size": 3, "device": "cpu"}
    return GenerateConfig(str(teacher), str(prompts), str(out), **{**plain, **values})  # type: ignore[arg-type]


def command(teacher: Path, prompts: Path, out: Path, *more: str) -> list[str]:
    words = ["generate", "--teacher", str(teacher), "--prompts", str(prompts), "--out", str(out)]
    return [*words, "--steps", "1", "--shard-size", "3", "--device", "cpu", *more]


def samples_of(out: Path) -> dict[str, dict[str, bytes]]:
    """Key -> members, of all shards; no key may come twice."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(out.glob("*.tar")):
        mine: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                data = tar.extractfile(member)
                assert data is not None and kind not in mine.get(key, {})
                mine.setdefault(key, {})[kind] = data.read()
        assert not set(mine) & set(found)
        found |= mine
    return found


def pictures_of(out: Path) -> dict[str, bytes]:
    return {key: members["png"] for key, members in samples_of(out).items()}


@pytest.mark.parametrize("kind", ["cascade", "unet"])
def test_a_set_holds_every_picture_with_what_made_it(
    kind, tiny_model, unet_teacher, prompts, tmp_path, capsys
):
    teacher = tiny_model if kind == "cascade" else unet_teacher
    out = tmp_path / "set"
    assert main(command(teacher, prompts, out, "--pictures-per-prompt", "2", "--seed", "5")) == 0
    assert "14 pictures of 7 prompts in 5 shards" in capsys.readouterr().out
    samples = samples_of(out)
    assert list(samples) == [f"teacher-{number:08d}" for number in range(14)]
    for number, (key, members) in enumerate(samples.items()):
        prompt = WORDS[number // 2]
        row = json.loads(members["json"])
        made_by = row["made_by"]
        assert row["captions"] == [prompt] and members["txt"].decode() == prompt
        assert made_by["seed"] == item_seed(5, prompt, number % 2)
        assert made_by["settings"]["unet" if kind == "unet" else "stage_c"]["steps"] == 1
        assert {"weights", "licence", "commit", "teacher", "negative_prompt"} <= set(made_by), key
    # A single picture of sample.py's pipeline, by the seed that the json names.
    maker = PictureMaker(MakerOptions(str(teacher), steps=1, device="cpu"))
    row = json.loads(samples["teacher-00000003"]["json"])
    [(_, again)] = maker.make([Item("x", row["captions"][0], row["made_by"]["seed"])])
    assert not isinstance(again, Refused)
    stored = Image.open(io.BytesIO(samples["teacher-00000003"]["png"]))
    assert np.array_equal(np.array(stored), np.array(again.image))
    # It is a set that a run can train on.
    assert len(list(ShardReader(f"{out}/*.tar"))) == 14


def test_two_processes_make_the_files_that_one_makes(unet_teacher, prompts, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    Factory(config(unet_teacher, prompts, one), Part()).run()
    for rank in range(2):
        report = Factory(config(unet_teacher, prompts, two), Part(rank, 2, rank)).run()
        assert report.shards == (2, 1)[rank]
    tars = [
        {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))} for out in (one, two)
    ]
    assert tars[0] == tars[1] and len(tars[0]) == 3
    # A third process with other numbers finds nothing to do, and loads nothing.
    factory = Factory(config(unet_teacher, prompts, two), Part(0, 3))
    factory.maker.load = None  # type: ignore[assignment,method-assign]
    assert factory.run().shards == 0


def test_launchers_tell_a_process_its_share(monkeypatch):
    assert Part.of_environment() == Part(0, 1, 0)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert Part.of_environment() == Part(5, 8, 1)
    assert Part(1, 3).of(range(8)) == range(1, 8, 3)
    monkeypatch.setenv("WORLD_SIZE", "1")
    # sbatch tells its script as well how many tasks the job may start: that is one process.
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert Part.of_environment() == Part(0, 1, 0)
    # srun tells each of the processes that it has started.
    for name, value in {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}.items():
        monkeypatch.setenv(name, value)
    assert Part.of_environment() == Part(2, 4, 0)
    assert "PATH" in alone(os.environ)
    with monkeypatch.context() as other:
        other.setattr(os, "environ", alone(os.environ))
        assert Part.of_environment() == Part(0, 1, 0)
    with pytest.raises(UserError, match="part 4/4"):
        Part(4, 4)
    # A process that is told how many there are, but not which it is, must not take the first share.
    monkeypatch.delenv("SLURM_PROCID")
    with pytest.raises(UserError, match=r"SLURM_PROCID is not set: .* or unset its variables"):
        Part.of_environment()
    monkeypatch.setenv("WORLD_SIZE", "four")
    with pytest.raises(UserError, match="WORLD_SIZE is 'four': "):
        Part.of_environment()


def test_the_batch_size_changes_a_picture_by_rounding_alone(unet_teacher, prompts, tmp_path):
    maker = PictureMaker(MakerOptions(str(unet_teacher), device="cpu"))
    items = [Item(f"k{n}", word, n) for n, word in enumerate(WORDS)]
    together = [made for _, made in maker.make(items, batch_size=4)]
    alone = [made for _, made in maker.make(items[::-1])][::-1]
    for one, other in zip(together, alone, strict=True):
        assert not isinstance(one, Refused) and not isinstance(other, Refused)
        assert torch.allclose(one.pixels, other.pixels, atol=1e-5)
    [(_, single)] = maker.make(items[3:4])
    assert torch.equal(single.pixels, alone[3].pixels)  # type: ignore[union-attr]


def test_files_that_are_there_are_not_made_again(unet_teacher, tmp_path):
    maker = PictureMaker(MakerOptions(str(unet_teacher), steps=1, device="cpu"))
    items = [Item(f"k{n}", word, n) for n, word in enumerate(WORDS)]
    assert make_files(maker, items, tmp_path, Part(0, 2)) == []
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == ["k0", "k2", "k4", "k6"]
    (tmp_path / "k2.png").write_bytes(b"left as it is")
    make_files(maker, items, tmp_path, Part())
    assert len(list(tmp_path.glob("*.png"))) == 7
    assert (tmp_path / "k2.png").read_bytes() == b"left as it is"


def test_an_index_lies_beside_each_shard(unet_teacher, prompts, tmp_path):
    assert main(command(unet_teacher, prompts, tmp_path / "out")) == 0
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert shards
    kept = {key for shard in shards for key in trusted_beside(str(shard)).keys}
    assert kept == set(samples_of(tmp_path / "out"))


def run_command(words: list[str]) -> None:
    """Run the command in a process of its own, quietly."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    torch.set_num_threads(1)
    main(words)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a fork server and SIGKILL")
def test_kills_at_random_moments_leave_no_duplicate_and_no_gap(unet_teacher, prompts, tmp_path):
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["train.distill.factory"])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ("--pictures-per-prompt", "6", "--steps", "6", "--shard-size", "1")
    assert main(command(unet_teacher, prompts, whole, *more)) == 0
    words = command(unet_teacher, prompts, killed, *more)
    draws, hits = random.Random(1), 0
    for _ in range(4):
        before = len(list(killed.glob("*.tar")))
        process = processes.Process(target=run_command, args=(words,))
        process.start()
        while process.is_alive() and len(list(killed.glob("*.tar"))) == before:
            time.sleep(0.002)
        process.join(draws.uniform(0, 0.05))
        hits += process.is_alive()
        process.kill()
        process.join()
    assert hits >= 2, "the kills must hit the command, or nothing was tested"
    (killed / ".teacher-000041.tar.x.tmp").write_bytes(b"left behind by a kill")
    (killed / "teacher-000041.done.json").unlink(missing_ok=True)
    assert main(command(unet_teacher, prompts, killed, *more)) == 0
    assert pictures_of(killed) == pictures_of(whole) and len(pictures_of(whole)) == 42
    assert not list(killed.glob(".*.tmp"))
    assert state_of(killed, "teacher").samples == 42
    spent = read_teacher_cost(killed / "ledger.jsonl")
    assert spent.samples >= 42 - 4 * 1 and spent.device_seconds > 0


def test_a_shard_that_nothing_vouches_for_is_made_again(unet_teacher, prompts, tmp_path):
    out = tmp_path / "set"
    Factory(config(unet_teacher, prompts, out), Part()).run()
    kept = pictures_of(out)
    cut = out / "teacher-000001.tar"
    cut.write_bytes(cut.read_bytes()[:2000])
    (out / "teacher-000002.done.json").unlink()
    assert not is_done(cut) and is_done(out / "teacher-000000.tar")
    report = Factory(config(unet_teacher, prompts, out), Part()).run()
    assert (report.shards, report.done_before) == (2, 1)
    assert pictures_of(out) == kept


def test_what_a_process_is_at_is_left_alone_by_the_others(unet_teacher, prompts, tmp_path):
    out = tmp_path / "set"
    made = Factory(config(unet_teacher, prompts, out, name="n" * 16), Part(0, 3))
    out.mkdir()
    with atomic_path(made._target(1)) as theirs:  # of the process of part 1
        theirs.write_bytes(b"half a shard")
        made.run()
        assert theirs.is_file()


def test_the_ledger_counts_seconds_and_operations(tiny_model, prompts, tmp_path):
    out = tmp_path / "set"
    factory = Factory(config(tiny_model, prompts, out), Part())
    cost, num_bytes = factory.estimate()
    factory.run()
    rows = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert [row["samples"] for row in rows] == [3, 3, 1]
    assert {row["phase"] for row in rows} == {"teacher"}
    assert {row["teacher"] for row in rows} == {factory.maker.weights_hash}
    total = read_teacher_cost(out / "ledger.jsonl")
    # Seven pictures, and the one by which they were counted.
    assert total.flops == pytest.approx(8 * cost.flops) and cost.flops > 1e5
    assert total.device_seconds == pytest.approx(
        sum(sum(r["seconds"].values()) for r in rows), 1e-3
    )
    more = Factory(config(tiny_model, prompts, out, steps=4), Part()).estimate()[0]
    assert more.flops > 1.2 * cost.flops
    members = samples_of(out)["teacher-00000000"]
    assert num_bytes == sum(map(len, members.values()))
    lines = cost.describe(2**20, 1e-6)
    assert f"{cost.flops / 1e6 * 1e6 / 3600:,.3g} hours" in lines[-1]


def broken_run(maker: PictureMaker, bad: set[int], error: Exception, monkeypatch) -> None:
    """Let batches with one of these seeds fail, as a pipeline's checks do."""
    run = maker._run

    def failing(items, batch_size):
        for first in range(0, len(items), batch_size):
            batch = items[first : first + batch_size]
            if any(item.seed in bad for item in batch):
                raise error
            yield from run(batch, batch_size)

    monkeypatch.setattr(maker, "_run", failing)


def test_bad_pictures_are_refused_and_counted_and_their_neighbours_are_not(
    unet_teacher, prompts, tmp_path, monkeypatch
):
    out = tmp_path / "set"
    factory = Factory(config(unet_teacher, prompts, out, batch_size=3, shard_size=7), Part())
    seeds = [item.seed for item in factory.items(0)]
    broken_run(factory.maker, {seeds[1], seeds[5]}, NonFiniteError("nan"), monkeypatch)
    report = factory.run()
    assert report.samples == 5 and report.refused == {"values that are not finite": 2}
    assert [int(key[-2:]) for key in samples_of(out)] == [0, 2, 3, 4, 6]
    done = json.loads((out / "teacher-000000.done.json").read_text())
    named = ["teacher-00000001", "teacher-00000005"]
    assert done["refused"] == {"values that are not finite": named}


def test_a_picture_that_came_before_is_refused(unet_teacher, prompts, tmp_path, monkeypatch):
    out = tmp_path / "set"
    factory = Factory(config(unet_teacher, prompts, out, shard_size=4), Part())
    run = factory.maker._run
    first = factory.items(0)[0]
    # A teacher that has collapsed: all pictures of some prompts are one.
    monkeypatch.setattr(
        factory.maker,
        "_run",
        lambda items, n: run([first if "apple" in one.prompt else one for one in items], n),
    )
    first_part = Factory(config(unet_teacher, prompts, out, shard_size=4), Part(1, 2, 1))
    second = first_part.items(1)
    monkeypatch.setattr(
        first_part.maker,
        "_run",
        lambda items, n: run([first if "apple" in one.prompt else one for one in items], n),
    )
    assert not first_part.run().refused  # its only twin is in the other's shard, which comes first
    assert len(samples_of(out)) == len(second) == 3
    report = factory.run()
    assert report.refused == {TWIN: 2}  # prompts 0, 3 and 5: the last is in the other shard
    state = state_of(out, "teacher")
    assert (state.samples, state.duplicates, state.refused) == (5, 0, {TWIN: 2})
    assert sorted(int(key[-2:]) for key in samples_of(out)) == [0, 1, 2, 4, 6]
    beside = find_beside(str(out / "teacher-000001.tar"))
    assert beside is not None and beside.require_whole() is None and len(beside.index) == 2
    files = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    assert factory.run().done_before == 2  # nothing is left to do, or to leave out
    assert files == {path.name: path.read_bytes() for path in out.glob("*.tar")}
    # One process alone makes the same files.
    alone = Factory(config(unet_teacher, prompts, tmp_path / "alone", shard_size=4), Part())
    monkeypatch.setattr(alone.maker, "_run", factory.maker._run)
    alone.run()
    for name, content in files.items():
        assert (tmp_path / "alone" / name).read_bytes() == content


def test_a_teacher_that_makes_nothing_is_one_line(unet_teacher, tmp_path, monkeypatch):
    many = tmp_path / "many.txt"
    many.write_text("\n".join(f"prompt {number}" for number in range(40)))
    factory = Factory(config(unet_teacher, many, tmp_path / "set", shard_size=30), Part())
    seeds = {item.seed for shard in range(2) for item in factory.items(shard)}
    broken_run(factory.maker, seeds, BlankPictureError("black"), monkeypatch)
    with pytest.raises(UserError, match=r"first 16 pictures are of no use \(16 entirely black\)"):
        factory.run()
    assert not list((tmp_path / "set").glob("*.tar"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--seed", "1"), "other settings: seed is 1 here and 0 there"),
        (("--steps", "2"), "unet.steps is 2 here and 1 there"),
        (("--size", "24"), "width is 24 here and 16 there; height is 24 here"),
        (("--shard-size", "4"), "shard_size is 4 here and 3 there"),
        (("--limit", "3"), r"prompts is '3 \(\w+\)' here and '7 \(\w+\)' there"),
        (("--dtype", "bfloat16"), "dtype is 'bfloat16' here and 'float32' there"),
        (("--keep-latents",), "keep_latents is True here and False there"),
    ],
)
def test_a_folder_of_other_settings_is_refused_by_the_name_of_the_setting(
    unet_teacher, prompts, tmp_path_factory, more, message, tmp_path
):
    out = tmp_path / "set"
    factory = Factory(config(unet_teacher, prompts, out), Part())
    from train.distill.generated_set import claim

    out.mkdir()
    claim(out, {"settings": factory.settings()})
    with pytest.raises(UserError, match=message):
        main(command(unet_teacher, prompts, out, *more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--size", "17"), "size 17x17: .* makes multiples of 2 pixels; the nearest is 18x18"),
        (("--size", "4096"), "width 4096: this model makes 8 to 64 pixels"),
        (("--size", "48"), "learned 16x16 and makes odd pictures"),
        (("--size", "large"), "size is 'large'"),
        (("--prompts", "/none.txt"), "/none.txt: no such file of prompts"),
        (("--prompts", "/none/*.tar"), "no shard matches"),
        (("--column", "text"), "--column text: .* has none"),
        (("--steps-b", "2"), "steps_b: .* is a U-Net, which has none"),
        (("--device-tflops", "3"), "goes with --estimate"),
        (("--part", "2/2"), "part 2/2"),
        (("--part", "two"), "write I/N"),
        (("--pictures-per-prompt", "0"), "pictures_per_prompt is 0"),
        (("--name", "a b"), "name is 'a b'"),
        (("--name", "n" * 17), "1 to 16 letters"),
        (("--teacher", "/none"), "/none"),
        (("--sampler", "eulr"), "did you mean 'euler'"),
    ],
)
def test_what_can_not_be_made_is_one_line_before_anything_is(
    unet_teacher, prompts, tmp_path, more, message
):
    out = tmp_path / "set"
    with pytest.raises(UserError, match=message):
        main(command(unet_teacher, prompts, out, *more))
    assert not out.exists()


def test_a_teacher_whose_text_encoder_does_not_fit_is_one_line(prompts, tmp_path):
    sdxl, sd = (save_tiny(tmp_path / kind, kind) for kind in ("sdxl", "sd"))
    words = command(sdxl, prompts, tmp_path / "set", "--unet", str(sd / "unet"))
    with pytest.raises(UserError) as caught:
        main(words)
    assert "text" in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "set").glob("*.tar"))


def test_missing_options_and_unknown_keys_are_named(prompts, tmp_path):
    with pytest.raises(UserError, match="--teacher: missing"):
        main(["generate", "--prompts", str(prompts), "--out", "x"])
    path = tmp_path / "teacher.yaml"
    path.write_text("teacher: x\nprompt: y\n")
    with pytest.raises(UserError, match="prompt: unknown key; did you mean 'prompts'"):
        main(["generate", "--config", str(path), "--prompts", str(prompts), "--out", "x"])


def test_prompts_are_read_from_text_tables_and_shards(tmp_path, several_prompts_tar):
    table = tmp_path / "rows.csv"
    table.write_text('Caption,other\n"a cat, asleep",1\na dog,2\na dog,3\n')
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"prompt": "one", "text": "no"}\n\n{"prompt": "two"}\n')
    assert read_prompts(str(table)) == ["a cat, asleep", "a dog"]
    assert read_prompts(str(table), "other") == ["1", "2", "3"]
    assert read_prompts(str(lines)) == ["one", "two"]
    assert read_prompts(str(lines), limit=1) == ["one"]
    assert read_prompts(str(several_prompts_tar)) == ["first words", "other words", "plain text"]
    import pyarrow
    import pyarrow.parquet

    columns = {"text": ["one", "two", "one"], "n": [1, 2, 3]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    assert read_prompts(str(tmp_path / "rows.parquet")) == ["one", "two"]
    with pytest.raises(UserError, match="column n: the prompt is 1; text is needed"):
        read_prompts(str(tmp_path / "rows.parquet"), "n")
    with pytest.raises(UserError, match="no column 'othr': did you mean 'other'"):
        read_prompts(str(table), "othr")
    lines.write_text("{broken\n")
    with pytest.raises(UserError, match="line 1: not valid JSON"):
        read_prompts(str(lines))
    lines.write_text('{"nothing": "here"}\n')
    with pytest.raises(UserError, match="none of the columns prompt, caption, text, but nothing"):
        read_prompts(str(lines))
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    with pytest.raises(UserError, match="no prompt in it"):
        read_prompts(str(tmp_path / "empty.txt"))


def test_a_shuffled_share_is_one_of_all_prompts_and_the_same_wherever_it_is_drawn(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {n}\n" for n in range(400)))
    share = read_prompts(str(path), limit=20, shuffle=0)
    assert share == read_prompts(str(path), shuffle=0)[:20]
    assert share[:3] == ["prompt 293", "prompt 159", "prompt 237"], "on every machine"
    assert share != read_prompts(str(path), limit=20, shuffle=1)
    assert sorted(read_prompts(str(path), shuffle=0)) == sorted(read_prompts(str(path)))
    path.write_text(path.read_text() + "a new one\n")
    more = read_prompts(str(path), shuffle=0)
    assert [one for one in more if one != "a new one"][:20] == share


def test_captions_of_the_first_shards_are_called_so(
    unet_teacher, several_prompts_tar, tmp_path, capsys
):
    said = "notice: the first 2 captions of the shards, which may all be of one kind"
    for number, (more, told) in enumerate(
        ((["--limit", "2"], True), (["--limit", "2", "--shuffle", "0"], False), ([], False))
    ):
        main(command(unet_teacher, several_prompts_tar, tmp_path / str(number), *more))
        assert (said in capsys.readouterr().out) == told
    with pytest.raises(UserError, match="shuffle is -1; a seed is 0 or more"):
        main(command(unet_teacher, several_prompts_tar, tmp_path / "none", "--shuffle", "-1"))


@pytest.fixture
def several_prompts_tar(tmp_path: Path) -> Path:
    members = [
        ("a.png", b"never opened"),
        ("a.json", json.dumps({"captions": ["first words", "other words"]}).encode()),
        ("b.txt", b"plain text"),
    ]
    path = tmp_path / "captions.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", ["cascade", "unet"])
def test_precompute_takes_what_the_teacher_drew(
    kind, tiny_model, unet_teacher, prompts, tmp_path, monkeypatch
):
    teacher = tiny_model if kind == "cascade" else unet_teacher
    out, size = tmp_path / "set", 32 if kind == "cascade" else 16
    Factory(config(teacher, prompts, out, keep_latents=True), Part()).run()
    frozen = FrozenPaths(autoencoder=str(teacher))
    if kind == "cascade":
        frozen = FrozenPaths(stage_a=str(teacher), compressor=str(teacher))
    data = DataConfig(f"{out}/*.tar", 2, mode="resampled", size=size)

    def cache(name: str, **values: object) -> dict[str, dict[str, bytes]]:
        options = PrecomputeOptions(data, tmp_path / name, frozen, **values)  # type: ignore[arg-type]
        assert precompute_shards(options).samples == 7
        return samples_of(tmp_path / name)

    taken = cache("taken")
    drawn = samples_of(out)
    names = ["stage_a.npy", "stage_c.npy"] if kind == "cascade" else ["autoencoder_mean.npy"]
    for key, members in taken.items():
        assert all(members[name] == drawn[key][name] for name in names)
        if kind == "unet":
            assert not np.load(io.BytesIO(members["autoencoder_std.npy"])).any()
    # What was drawn is what the autoencoder makes of the picture, but for its losses; and it
    # is not taken for another network's.
    monkeypatch.setattr("train.data.latents.DRAWN_KEY", "of another network")
    encoded = cache("encoded")
    assert all(encoded[key][name] != taken[key][name] for key in taken for name in names)
