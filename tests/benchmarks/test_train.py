"""The training benchmark does the same work on both sides."""

from __future__ import annotations

import re

import pytest

from benchmarks import train
from cascade.errors import UserError
from stages.stage_c import StageCConfig

pytest.importorskip("diffusers")

TINY = StageCConfig(
    cond_channels=32,
    hidden_channels=(32,),
    num_heads=(1,),
    down_blocks=(1,),
    up_blocks=(1,),
    text_channels=16,
    text_pooled_channels=16,
    image_channels=16,
    time_conds=(),
)


def test_both_sides_begin_with_the_same_loss_and_a_ratio_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "config_of", lambda _: TINY)
    train.main(["--batch-size", "2", "--blocks", "1", "--steps", "1", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "seed 0, commit " in printed and "peak in bfloat16" in printed
    rows = {
        name: re.search(rf"^{name} .*?([\d.]+)$", printed, re.M) for name in ("here", "diffusers")
    }
    losses = [float(row[1]) for row in rows.values() if row is not None]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert re.search(r"ratio here / diffusers: [\d.]+", printed)


def test_the_published_lite_size_is_the_one_that_is_timed() -> None:
    assert train.config_of("lite") == StageCConfig.lite()
    assert train.config_of("demo").hidden_channels == (256,)


@pytest.mark.parametrize("arguments", [["--sizes", "demo,huge"], ["--steps", "0"]])
def test_bad_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(UserError, match="--"):
        train.parse(arguments)
