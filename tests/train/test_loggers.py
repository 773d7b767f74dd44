"""What TensorBoard and Weights & Biases are told."""

from __future__ import annotations

import io
import itertools
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from cascade.errors import run_main
from train.__main__ import main

PROMPTS = ["a red circle", "a dog"]


class Reported:
    """A run of wandb's as far as Lightning and ours use one."""

    def __init__(self) -> None:
        self.began: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.noted: dict[str, Any] = {}
        self.config = self

    def update(self, values: dict[str, Any], *, allow_val_change: bool) -> None:
        assert allow_val_change, "a run that goes on may have other values"
        self.noted |= values

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


class FakeError(Exception):
    """``wandb.errors.Error``."""


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Reported:
    """Stand for the package, which is no part of the tests: it brings fourteen others."""
    reported = Reported()
    modules = {
        name: ModuleType(name)
        for name in ("wandb", "wandb.errors", "wandb.sdk", "wandb.sdk.lib", "wandb.wandb_run")
    }

    def init(**settings: Any) -> Reported:
        reported.began.append(settings)
        return reported

    for name, value in (("init", init), ("run", None), ("Image", lambda picture, **_: picture)):
        setattr(modules["wandb"], name, value)
    modules["wandb.errors"].Error = FakeError  # type: ignore[attr-defined]
    modules["wandb.sdk.lib"].RunDisabled = type("RunDisabled", (), {})  # type: ignore[attr-defined]
    modules["wandb.wandb_run"].Run = type("Run", (), {})  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    return reported


def refusal(run, capsys, *arguments: object) -> str:
    words = [run.kind, "--config", str(run.config), *map(str, arguments)]
    assert run_main(lambda: main(words)) == 2
    return capsys.readouterr().err.splitlines()[-1]


def events(path: Path) -> Iterator[Event]:
    """Read a file of TensorBoard's: each event with its length before it and two checksums."""
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def drawing_run(make_run, tiny_model):
    pictures = {"model": str(tiny_model), "prompts": PROMPTS, "every_steps": 2}
    return make_run("stage_c", pictures=pictures)


def test_weights_and_biases_have_one_run_with_losses_pictures_and_configuration(
    wandb, make_run, tiny_model
):
    run = drawing_run(make_run, tiny_model)
    asked = ("--run.wandb_project", "mine")
    assert run.start("--run.max_steps", 2, *asked) == 0
    assert wandb.noted["optim"]["lr"] == 1e-2
    assert run.start("--run.max_steps", 4, "--run.log_every_steps", 2, "--resume", *asked) == 0
    first, second = wandb.began
    assert first["project"] == second["project"] == "mine" and first["name"] == run.out.name
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert first["dir"] == str(run.out)
    steps = [row["trainer/global_step"] for row in wandb.rows if "loss" in row]
    assert len(steps) == 3  # after steps 1, 2 and 4
    assert wandb.noted["run"]["log_every_steps"] == 2
    shown = {
        (kind, row["trainer/global_step"]): row[f"pictures/{kind}"][0]
        for row, kind in itertools.product(wandb.rows, ("raw", "ema"))
        if f"pictures/{kind}" in row
    }
    assert sorted(shown) == [("ema", 2), ("ema", 4), ("raw", 2), ("raw", 4)]
    assert shown["raw", 2].width > shown["raw", 2].height  # both prompts side by side


def test_tensorboard_shows_the_curves_the_pictures_and_the_configuration(make_run, tiny_model):
    run = drawing_run(make_run, tiny_model)
    run.start("--run.max_steps", 2)
    [file] = (run.out / "tensorboard").rglob("events.out.tfevents.*")
    said = {(one.tag, event.step): one for event in events(file) for one in event.summary.value}
    assert said["loss", 1].HasField("simple_value")
    assert any(name.startswith("mse_t/") for name, _ in said)
    for kind in ("raw", "ema"):
        with Image.open(io.BytesIO(said[f"pictures/{kind}", 2].image.encoded_image_string)) as seen:
            kept = Image.open(run.out / "pictures" / f"step_0000002_{kind}.png")
            assert np.array_equal(np.asarray(seen), np.asarray(kept))
    [text] = [one for (name, _), one in said.items() if name.startswith("config")]
    assert "      max_steps: 2\n" in text.tensor.string_val[0].decode()


def test_weights_and_biases_that_can_t_be_reached_is_one_line(wandb, make_run, capsys, monkeypatch):
    def refused(**_: Any) -> None:
        raise FakeError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(sys.modules["wandb"], "init", refused)
    line = refusal(make_run("stage_c"), capsys, "--run.wandb_project", "mine")
    assert line.startswith("error: run.wandb_project is mine: No API key configured. Use `wandb")
    assert "WANDB_MODE=offline" in line


def test_weights_and_biases_without_its_package_is_one_line(make_run, capsys, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    line = refusal(make_run("stage_c"), capsys, "--run.wandb_project", "mine")
    assert "pip install wandb" in line
