from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cascade.pipelines.memory import Footprint, Workload, footprints, peak_bytes
from cascade.pipelines.memory_plan import GIB, RESERVE, pick_plan
from cascade.pipelines.placement import Dtypes
from cascade.pipelines.spec import StageSampling
from stages.stage_a import StageA, StageAConfig
from stages.stage_b import StageB, StageBConfig
from stages.stage_b_v2 import StageBV2, StageBV2Config
from stages.stage_c import StageC, StageCConfig
from stages.stage_c_v2 import StageCV2, StageCV2Config

AS_PUBLISHED = Workload(
    StageSampling(steps=20, guidance=4.0, rescale=0.7, shift=2.0),
    StageSampling(steps=10, guidance=1.1, rescale=0.7),
    stage_c_size=(24, 24),
    latent_shape=(4, 256, 256),
)
"""Stable Cascade at 1024 x 1024, one picture, guided in both stages."""


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, device="meta", dtype=dtype)


def test_the_peak_is_what_is_alive_at_once() -> None:
    def run() -> None:
        first = meta(1000)  # 4000 bytes
        second = first + 1  # 8000
        del first  # 4000
        view = second.view(10, 100)[1:]  # a view takes nothing
        third = view.double()  # 4000 + 7200
        del second, view, third
        meta(2000)

    assert peak_bytes(run) == 4000 + 7200


def test_weights_that_were_there_before_are_not_counted() -> None:
    with torch.device("meta"):
        linear = nn.Linear(100, 10)
    assert peak_bytes(lambda: linear(meta(5, 100))) == 4 * (5 * 100 + 5 * 10)


def test_attention_has_no_table_of_all_pairs() -> None:
    def run() -> None:
        query = meta(1, 2, 4096, 64)
        F.scaled_dot_product_attention(query, query, query)

    assert peak_bytes(run) == 2 * 4 * 2 * 4096 * 64


def encoder(width: int, pooled: int, layers: int, dtype: torch.dtype) -> Any:
    """What is read of a text encoder, with bigG's shape at width 1280."""
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        projection_dim=pooled,
        vocab_size=49408,
    )
    with torch.device("meta"):
        model = CLIPTextModelWithProjection(config).to(dtype)
    return SimpleNamespace(
        model=model, window=77, length=77, hidden_channels=width, pooled_channels=pooled
    )


def on_meta(network: type[nn.Module], config: Any, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        return network(config).to(dtype)


STAGE_C = StageCConfig(
    cond_channels=32,
    hidden_channels=(32, 32),
    num_heads=(2, 2),
    down_blocks=(1, 3),
    up_blocks=(3, 1),
    text_channels=64,
    text_pooled_channels=64,
)
STAGE_B = StageBConfig(
    cond_channels=32,
    hidden_channels=(16, 32),
    num_heads=(0, 2),
    down_blocks=(3, 1),
    up_blocks=(2, 3),
    up_repeats=(1, 3),
    dropout=(0.0, 0.0),
    text_pooled_channels=64,
)
STAGE_A = StageAConfig(channels=(16, 32), decoder_blocks=(3, 2), codebook_size=16)


def small(stage_c: Any, stage_b: Any, workload: Workload) -> dict[str, Footprint]:
    return footprints(
        stage_c,
        stage_b,
        on_meta(StageA, STAGE_A, torch.float32),
        {"text": encoder(64, 64, 2, torch.float32)},
        Dtypes.same(torch.float32),
        workload,
    )


def full_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cascade.pipelines.memory._DEPTHS", ())


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["v3", "v2"])
def test_two_blocks_a_level_need_what_all_of_them_need(
    generation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if generation == "v3":
        stage_c = on_meta(StageC, STAGE_C, torch.float32)
        stage_b = on_meta(StageB, STAGE_B, torch.float32)
    else:
        stage_c = on_meta(
            StageCV2,
            StageCV2Config(hidden_channels=32, num_blocks=3, num_heads=2, text_channels=64),
            torch.float32,
        )
        stage_b = on_meta(
            StageBV2,
            StageBV2Config(
                cond_channels=32,
                hidden_channels=(16, 32),
                num_heads=(0, 2),
                num_blocks=(3, 4),
                reads_compressed=(False, True),
                dropout=(0.0, 0.0),
                text_channels=64,
            ),
            torch.float32,
        )
    workload = replace(AS_PUBLISHED, stage_c_size=(6, 6), latent_shape=(4, 64, 64))
    shallow = small(stage_c, stage_b, workload)
    full_depth(monkeypatch)
    deep = small(stage_c, stage_b, workload)
    for part in ("stage_c", "stage_b", "stage_a"):
        assert shallow[part].working == pytest.approx(deep[part].working, rel=0.01), part
        assert shallow[part].weights == deep[part].weights


def test_weights_are_counted_whole_and_by_the_layer() -> None:
    sizes = small(
        on_meta(StageC, STAGE_C, torch.float32),
        on_meta(StageB, STAGE_B, torch.float32),
        replace(AS_PUBLISHED, stage_c_size=(2, 2), latent_shape=(4, 16, 16)),
    )
    stage_c = on_meta(StageC, STAGE_C, torch.float32)
    assert sizes["stage_c"].weights == 4 * sum(p.numel() for p in stage_c.parameters())
    # The largest layer: the pooled state to four tokens, or the image embedding.
    assert sizes["stage_c"].layer == 4 * (768 * 32 * 4 + 32 * 4)
    # A block of Stage A comes as a whole.
    block = next(m for m in on_meta(StageA, STAGE_A, torch.float32).decoder.levels[0].blocks)
    assert sizes["stage_a"].layer == 4 * sum(p.numel() for p in block.parameters())


def published(stage_c: StageCConfig, stage_b: StageBConfig) -> dict[str, Footprint]:
    half = torch.bfloat16
    return footprints(
        on_meta(StageC, stage_c, half),
        on_meta(StageB, stage_b, half),
        on_meta(StageA, StageAConfig.v3(), half),
        {"text": encoder(1280, 1280, 32, half)},
        Dtypes.same(half),
        AS_PUBLISHED,
    )


@pytest.mark.slow
def test_the_promise_stable_cascade_lite_in_8_gb_and_the_full_one_in_12_gb() -> None:
    """At 1024 x 1024 in bfloat16; gigabytes of 10^9 bytes, the smaller reading."""
    lite = published(StageCConfig.lite(), StageBConfig.lite())
    full = published(StageCConfig.full(), StageBConfig.full())
    assert lite["stage_c"].weights == 2 * 1_030_785_040
    assert full["stage_c"].weights == 2 * 3_589_103_632
    for name, sizes, gigabytes in (("lite", lite, 8), ("full", full, 12)):
        budget = gigabytes * 10**9
        plan = pick_plan(sizes, budget, [1], what="1024x1024")
        assert plan.peak <= budget
        print(f"{name}: {plan.describe()}")
        for part, size in sizes.items():
            tiles = {side: round(one / GIB, 3) for side, one in (size.tiled or {}).items()}
            print(
                f"  {part}: weights {size.weights / GIB:.3f}, largest layer "
                f"{size.layer / GIB:.3f}, working {size.working / GIB:.3f} {tiles or ''}"
            )
    # What the promise does not say: a card of 8 GiB is enough for the full one stage by stage.
    assert pick_plan(full, 8 * GIB, [1]).offload == "model"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_takes_what_was_computed(dtype: torch.dtype) -> None:
    """The working memory of Stage A and Stage B, measured as the allocator counts it."""
    from cascade.pipelines.tiles import decode_pixels

    network = StageA(StageAConfig()).to("cuda", dtype).eval()
    latents = torch.randn(1, 4, 128, 128, device="cuda")
    with torch.inference_mode():
        decode_pixels(network, latents, dtype)  # libraries take their workspaces the first time
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        decode_pixels(network, latents, dtype)
        measured = torch.cuda.max_memory_allocated() - before
    twin = on_meta(StageA, StageAConfig(), dtype).eval()
    computed = peak_bytes(lambda: decode_pixels(twin, meta(1, 4, 128, 128), dtype))
    assert measured <= computed + RESERVE // 2
    assert measured >= 0.5 * computed
