from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cascade.control import control_maps, control_signal
from cascade.pipelines.memory import Footprint, PictureWork, Workload, footprints
from cascade.pipelines.memory_peak import peak_bytes
from cascade.pipelines.memory_plan import GIB, RESERVE, pick_plan
from cascade.pipelines.placement import Dtypes
from cascade.pipelines.spec import StageSampling
from cascade.pipelines.tiles import encode_latents
from cascade.text.picture_encoder import PictureEncoder, PicturePreprocessing
from stages.controlnet import ControlNet, ControlNetConfig
from stages.semantic_compressor import EFFICIENTNET_V2_S, CompressorConfig, SemanticCompressor
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


WHOLE = (1024, 1024)
READINGS = {
    "variation": PictureWork(embedded=(4000, 4000)),  # a photograph, cut to a square
    "img2img": PictureWork(compressed=WHOLE, starts=frozenset({"stage_c"})),
    "inpaint": PictureWork(
        compressed=WHOLE, encoded=WHOLE, starts=frozenset({"stage_c", "stage_b"})
    ),
    "reconstruct": PictureWork(compressed=WHOLE, idle=frozenset({"stage_c"})),
    "reconstruct through Stage A": PictureWork(
        encoded=WHOLE, idle=frozenset({"text", "stage_c", "stage_b"})
    ),
    "edges": PictureWork(control=ControlNetConfig.canny(), controlled=WHOLE),
    "holes": PictureWork(
        compressed=WHOLE,
        encoded=WHOLE,
        control=ControlNetConfig.inpainting(),
        controlled=WHOLE,
        starts=frozenset({"stage_c", "stage_b"}),
    ),
    "super-resolution": PictureWork(
        compressed=(512, 512), control=ControlNetConfig.super_resolution(), controlled=WHOLE
    ),
}


def readers(dtype: torch.dtype) -> dict[str, nn.Module]:
    """The published compressor, and CLIP's ViT-L/14, without values."""
    from transformers.models.clip.configuration_clip import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        projection_dim=768,
        patch_size=14,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        tower = CLIPVisionModelWithProjection(config).to(dtype)
    half = (0.5, 0.5, 0.5)
    return {
        "compressor": on_meta(SemanticCompressor, CompressorConfig.v3(), dtype),
        "image_encoder": PictureEncoder(tower, PicturePreprocessing(224, half, half, "bicubic")),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", READINGS)
def test_the_promise_holds_with_pictures_as_input(name: str) -> None:
    """As above: lite in 8 GB and the full one in 12 GB, of 10^9 bytes, at 1024 x 1024."""
    half = torch.bfloat16
    for title, config_c, config_b, gigabytes in (
        ("lite", StageCConfig.lite(), StageBConfig.lite(), 8),
        ("full", StageCConfig.full(), StageBConfig.full(), 12),
    ):
        sizes = footprints(
            on_meta(StageC, config_c, half),
            on_meta(StageB, config_b, half),
            on_meta(StageA, StageAConfig.v3(), half),
            {"text": encoder(1280, 1280, 32, half)},
            Dtypes.same(half),
            replace(AS_PUBLISHED, picture=READINGS[name]),
            readers(half),
        )
        budget = gigabytes * 10**9
        plan = pick_plan(sizes, budget, [1], what=f"1024x1024 {name}")
        assert 0 < plan.peak <= budget
        assert set(plan.peaks) == {part for part, size in sizes.items() if not size.idle}
        print(f"{title}: {plan.describe()}")
        for part in ("image_encoder", "compressor", "controlnet", "stage_a_encoder"):
            if part in sizes:
                size = sizes[part]
                assert size.weights >= size.layer > 0 and size.working > 0
                tiles = {side: round(one / GIB, 3) for side, one in (size.tiled or {}).items()}
                print(
                    f"  {part}: weights {size.weights / GIB:.3f}, largest layer "
                    f"{size.layer / GIB:.3f}, working {size.working / GIB:.3f} {tiles or ''}"
                )


def test_the_footprints_of_a_prompt_alone_are_what_they_were() -> None:
    """What reads a picture changes those of the stages only where it leaves something to them."""
    workload = replace(AS_PUBLISHED, stage_c_size=(2, 2), latent_shape=(4, 16, 16))
    stage_c, stage_b = (
        on_meta(StageC, STAGE_C, torch.float32),
        on_meta(StageB, STAGE_B, torch.float32),
    )
    plain = small(stage_c, stage_b, workload)
    assert set(plain) == {"text", "stage_c", "stage_b", "stage_a"}
    maps = ControlNetConfig(blocks=(0,), out_channels=(32,), stages=EFFICIENTNET_V2_S[:2])
    work = PictureWork(control=maps, controlled=(64, 64), encoded=(64, 64))
    led = small(stage_c, stage_b, replace(workload, picture=work))
    kept = 4 * 32 * 2 * 2
    assert led["text"] == plain["text"]
    assert led["stage_c"].working == plain["stage_c"].working + 3 * kept
    assert led["stage_b"].working == plain["stage_b"].working + kept
    assert led["stage_a_encoder"].weights == plain["stage_a"].weights
    begun = replace(workload, picture=PictureWork(starts=frozenset({"stage_c", "stage_b"})))
    started = small(stage_c, stage_b, begun)
    assert started["stage_c"].working > plain["stage_c"].working
    assert started["stage_b"].working > plain["stage_b"].working


def measured(run: Callable[[], object]) -> int:
    """Bytes that a GPU's allocator gave at once, beyond what there was."""
    with torch.inference_mode():
        run()  # libraries take their workspaces the first time
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
    return int(torch.cuda.max_memory_allocated() - before)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [None, 32])
@pytest.mark.parametrize("part", ["stage_a_encoder", "compressor", "controlnet"])
def test_a_gpu_takes_what_was_computed_for_reading(part: str, tile: int | None) -> None:
    half, size = torch.bfloat16, (512, 512)
    work = PictureWork(
        compressed=size, encoded=size, controlled=size, control=ControlNetConfig.inpainting()
    )
    workload = replace(
        AS_PUBLISHED, stage_c_size=(12, 12), latent_shape=(4, 128, 128), picture=work
    )
    sizes = footprints(
        on_meta(StageC, STAGE_C, half),
        on_meta(StageB, STAGE_B, half),
        on_meta(StageA, StageAConfig(), half),
        {"text": encoder(64, 64, 2, half)},
        Dtypes.same(half),
        workload,
        readers(half),
    )
    pixels, device = torch.rand(1, 3, *size), torch.device("cuda")
    run: Callable[[], object]
    if part == "stage_a_encoder":
        stage_a = StageA(StageAConfig()).to(device, half).eval()
        run = partial(encode_latents, stage_a, pixels, device, half, tile)
        tiles = sizes[part].tiled or {}
        computed = sizes[part].working if tile is None else tiles[tile]
    elif part == "compressor":
        compressor = SemanticCompressor(CompressorConfig.v3()).to(device, half).eval()
        run = lambda: compressor.encode(pixels.to(device)).float()  # noqa: E731
        computed = sizes[part].working
    else:
        control = ControlNet(ControlNetConfig.inpainting()).to(device, half).eval()

        def run() -> None:
            mask, config = torch.ones(1, 1, *size, device=device), control.config
            signal = control_signal(config, pixels.to(device), (12, 12), mask=mask)
            control_maps(control, signal.to(half))

        computed = sizes[part].working
    taken = measured(run)
    assert 0.4 * computed <= taken <= computed + RESERVE // 2


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
