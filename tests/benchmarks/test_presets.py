"""Each preset fits the device that it is for, by the figures that the benchmark computes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import presets
from stages.stage_c import StageC, StageCCondition, StageCConfig

TINY = StageCConfig(
    cond_channels=32,
    hidden_channels=(32, 32),
    num_heads=(2, 2),
    down_blocks=(2, 3),
    up_blocks=(3, 2),
    text_channels=1280,
    image_channels=None,
    dropout=0.0,
    time_conds=(),
)


def test_there_is_a_preset_for_each_size_of_memory() -> None:
    named = [(one.network, one.device_gib) for one in presets.load_presets()]
    assert named == [
        *(("lite", size) for size in (12, 24, 48, 80)),
        *(("full", s) for s in (24, 48, 80)),
    ]


@pytest.mark.parametrize("preset", presets.load_presets(), ids=lambda one: one.path.stem)
def test_a_preset_s_weights_gradients_states_and_average_fit(preset, monkeypatch) -> None:
    # The activations of the published sizes take a while: the script itself counts them.
    monkeypatch.setattr(presets, "kept_bytes", lambda *_, **__: 0)
    needed = presets.memory_of(preset)
    assert needed.total < 0.85 * preset.device_gib * presets.GIB
    count = 3_589_103_632 if preset.network == "full" else 1_030_785_040
    assert needed.casts == 2 * count
    if preset.run.strategy == "ddp":
        assert needed.weights == needed.gradients == 4 * count


def test_what_is_kept_is_counted_as_autograd_keeps_it() -> None:
    """Beside the same network on the CPU in bfloat16, where every tensor has an address."""
    with torch.device("meta"):
        meta = StageC(TINY).to(torch.bfloat16)
    counted = [presets.kept_bytes(meta, batch, recompute=False) for batch in (2, 4)]
    assert counted[1] == pytest.approx(2 * counted[0], rel=0.02)
    network, held = StageC(TINY).to(torch.bfloat16), {}
    weights = {one.untyped_storage().data_ptr() for one in network.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    latents, t, cond = presets._inputs(2, "cpu", torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        network(latents, t, dataclasses.replace(cond))
    real = sum(v.untyped_storage().nbytes() for k, v in held.items() if k not in weights)
    assert counted[0] == pytest.approx(real, rel=0.15)
    assert isinstance(cond, StageCCondition)
    recomputed = presets.kept_bytes(meta, 2, recompute=True)
    assert recomputed < 0.5 * counted[0]
