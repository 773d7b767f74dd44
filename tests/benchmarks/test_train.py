"""The training benchmark does the same work on both sides."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from benchmarks import train
from cascade.errors import UserError
from cascade.tools.diffusers_names import diffusers_config
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
    dropout=0.0,
)


@pytest.mark.parametrize("in_turn", [[], ["--in-turn"]])
def test_both_sides_begin_with_the_same_loss_and_a_ratio_is_printed(
    in_turn: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "config_of", lambda _: TINY)
    words = ["--batch-size", "2", "--blocks", "2", "--steps", "1", "--device", "cpu"]
    train.main([*words, *in_turn])
    printed = capsys.readouterr().out
    assert "seed 0, commit " in printed and "peak in bfloat16" in printed
    rows = {
        name: re.search(rf"^{name} .*?([\d.]+)$", printed, re.M) for name in ("here", "diffusers")
    }
    losses = [float(row[1]) for row in rows.values() if row is not None]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert re.search(r"ratio here / diffusers: [\d.]+", printed)


def test_the_published_lite_size_is_the_one_that_is_timed() -> None:
    assert train.config_of("lite") == replace(StageCConfig.lite(), dropout=0.0)
    assert train.config_of("demo").hidden_channels == (256,)


@pytest.mark.parametrize("size", train.SIZES)
def test_diffusers_has_a_network_of_each_size(size: str) -> None:
    config = train.config_of(size)
    assert not config.qk_norm
    assert diffusers_config(config)["_class_name"] == "StableCascadeUNet"


@pytest.mark.parametrize("arguments", [["--sizes", "demo,huge"], ["--steps", "0"]])
def test_bad_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(UserError, match="--"):
        train.parse(arguments)
