from __future__ import annotations

import dataclasses
import io
import itertools
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

from cascade.checkpoints.files import file_hash, load_network
from cascade.errors import UserError
from cascade.text.encoder import TextConfig, TextEncoder
from cascade.text.picture_encoder import PictureEncoder
from stages.semantic_compressor import SemanticCompressor
from stages.stage_a import StageA
from train.data.__main__ import main
from train.data.cached import (
    CachedBatch,
    cached_loader,
    load_cache,
    load_pictures,
)
from train.data.config import DataConfig
from train.data.precompute import precompute
from train.data.read import Served
from train.encode import FrozenPaths, text_hash


def config(shards: str, **values: object) -> DataConfig:
    return DataConfig(**{"shards": shards, "batch_size": 4, **values})


def take(shards: str, count: int, *, start_step: int = 0, **values: object) -> list[CachedBatch]:
    settings = config(shards, **values)
    loader = cached_loader(load_cache(settings, {}), settings, start_step=start_step)
    return list(itertools.islice(loader, count))


def test_a_batch_depends_on_seed_and_step_alone(shards):
    first = take(shards, 8)
    for start in (1, 3, 5):
        for batch, other in zip(first[start:], take(shards, 8 - start, start_step=start),
                                strict=True):  # fmt: skip
            assert batch.captions == other.captions
            assert torch.equal(batch.pixels, other.pixels)
    other_seed = take(shards, 8, seed=1)
    assert [b.captions for b in first] != [b.captions for b in other_seed]


def test_every_epoch_shows_every_picture_once_in_a_new_order(shards):
    pictures = load_pictures(shards)
    orders = []
    for epoch in range(3):
        batches = take(shards, 3, start_step=3 * epoch)
        pixels = torch.cat([batch.pixels for batch in batches])
        groups = torch.cat([batch.groups for batch in batches]).tolist()
        assert sorted(groups) == sorted(pictures.groups.tolist())
        assert pixels.shape == (12, 3, 32, 32)
        assert 0 <= pixels.min() <= pixels.max() == 1
        orders.append(groups)
    assert orders[0] != orders[1] != orders[2]


def test_what_an_epoch_has_over_comes_before_the_next_one(shards):
    pictures = load_pictures(shards)
    seen = torch.cat([batch.groups for batch in take(shards, 12, batch_size=5)]).tolist()
    for epoch in range(5):
        assert sorted(seen[12 * epoch : 12 * epoch + 12]) == sorted(pictures.groups.tolist())


def test_any_split_into_ranks_and_windows_draws_the_same(shards):
    def seen(size: int, world: int) -> list[str]:
        settings = config(shards, batch_size=size)
        cache = load_cache(settings, {})
        loaders = [
            iter(cached_loader(cache, settings, rank=rank, world=world)) for rank in range(world)
        ]
        batches = [next(one) for _ in range(30 // (size * world)) for one in loaders]
        return [caption for batch in batches for caption in batch.captions]

    assert seen(5, 1) == seen(5, 2) == seen(1, 3) == seen(10, 1)


def test_a_batch_is_pinned_as_a_whole(shards, monkeypatch):
    pinned = []
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda self, *_: pinned.append(self.shape) or self.clone()
    )
    [batch] = take(shards, 1)
    shapes = {one.shape for one in vars(batch).values() if isinstance(one, torch.Tensor)}
    assert Served(batch).pin_memory().batch is batch and set(pinned) == shapes


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, None])
def test_a_damaged_part_of_a_cache_is_one_line(content, shards, cache, parts, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    part = copy / "text.safetensors"
    part.write_bytes(part.read_bytes()[:-20] if content is None else content)
    with pytest.raises(UserError, match=r"text\.safetensors: damaged .*make the cache again"):
        load_cache(config(shards, folder=str(copy)), parts)


def test_all_wordings_of_a_picture_are_drawn(shards):
    captions = {caption for batch in take(shards, 30) for caption in batch.captions}
    pictures = load_pictures(shards)
    assert captions == {caption for wordings in pictures.captions for caption in wordings}


def test_pictures_with_the_same_captions_are_one_group(shards):
    pictures = load_pictures(shards)
    assert len(set(pictures.captions)) == len(pictures.groups.unique()) == 12


def test_ranks_see_different_pictures_and_together_all(shards):
    settings = config(shards, batch_size=3)
    cache = load_cache(settings, {})
    ranks = [
        list(itertools.islice(cached_loader(cache, settings, rank=rank, world=2), 2))
        for rank in range(2)
    ]
    groups = [batch.groups for batches in ranks for batch in batches]
    assert sorted(torch.cat(groups).tolist()) == list(range(12))


def test_a_batch_larger_than_the_data_set_is_refused(shards):
    with pytest.raises(UserError, match=r"batch_size is 13 on 1 device\(s\).* hold 12 pictures"):
        take(shards, 1, batch_size=13)
    with pytest.raises(ValueError, match="batch_size is 0"):
        config(shards, batch_size=0)


@pytest.fixture
def parts(tiny_model: Path) -> dict[str, str]:
    return {
        "text": text_hash(tiny_model / "text"),
        "stage_a": file_hash(tiny_model / "stage_a.safetensors"),
        "stage_c": file_hash(tiny_model / "compressor.safetensors"),
    }


def test_the_cache_holds_what_encoding_gives(shards, cache, parts, tiny_model):
    settings = config(shards, folder=str(cache))
    loaded = load_cache(settings, parts)
    batch = next(iter(cached_loader(loaded, settings)))
    with torch.inference_mode():
        stage_a = load_network(tiny_model / "stage_a.safetensors", expect=StageA)
        compressor = load_network(tiny_model / "compressor.safetensors", expect=SemanticCompressor)
        encoder = TextEncoder.from_folder(tiny_model / "text", TextConfig())
        features = encoder.encode(batch.captions)
        null = encoder.null()
        for name, expected in (
            ("stage_a_latents", stage_a.encode(batch.pixels)),
            ("stage_c_latents", compressor.encode(batch.pixels)),
            ("text_hidden", features.hidden),
            ("text_pooled", features.pooled),
        ):
            found = batch.require(name)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3, msg=name)
    assert loaded.null_text is not None
    torch.testing.assert_close(loaded.null_text[0].float(), null.hidden[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(loaded.null_text[1].float(), null.pooled[0], rtol=2e-3, atol=2e-3)


def test_picture_embeddings_are_cached_as_the_picture_tower_gives_them(
    shards, clip_folder, tmp_path
):
    assert main(["precompute", "--shards", shards, "--out", str(tmp_path), "--image",
                 str(clip_folder)]) == 0  # fmt: skip
    settings = config(shards, folder=str(tmp_path))
    cache = load_cache(settings, {"image": text_hash(clip_folder)})
    batch = next(iter(cached_loader(cache, settings)))
    expected = PictureEncoder.from_folder(clip_folder)(batch.pixels)
    torch.testing.assert_close(batch.require("image_embeds"), expected, rtol=2e-3, atol=2e-3)


def test_a_part_that_was_not_asked_for_is_named(shards):
    [batch] = take(shards, 1)
    with pytest.raises(ValueError, match="the batch has no text_hidden"):
        batch.require("text_hidden")


def test_other_weights_are_refused(shards, cache, parts):
    with pytest.raises(UserError, match=r"stage_a\.safetensors: made from .* but .* has .*0000"):
        load_cache(config(shards, folder=str(cache)), {**parts, "stage_a": "000000000000"})


def test_other_pictures_are_refused(source, tmp_path, cache, parts):
    (source / "11.png").unlink()
    main(["write", "--from", str(source), "--out", str(tmp_path / "shards")])
    with pytest.raises(UserError, match=r"text\.safetensors: made from pictures .* again") as error:
        load_cache(config(f"{tmp_path}/shards/*.tar", folder=str(cache)), parts)
    assert "\n" not in str(error.value)


def test_other_pixels_of_the_same_names_are_refused(shards, tmp_path, tiny_model):
    """As those of two subjects, whose captions are all "a photo of sks dog"."""
    pictures = load_pictures(shards)
    (tmp_path / "same").mkdir()
    [original] = Path(shards).parent.glob("*.tar")
    copy = tmp_path / "same" / original.name
    with tarfile.open(original) as source, tarfile.open(copy, "w") as target:
        for member in source:
            file = source.extractfile(member)
            assert file is not None
            data = file.read()
            if member.name.endswith(".png"):
                with Image.open(io.BytesIO(data)) as image:
                    buffer = io.BytesIO()
                    ImageOps.invert(image.convert("RGB")).save(buffer, format="PNG")
                data = buffer.getvalue()
                member.size = len(data)
            target.addfile(member, io.BytesIO(data))
    others = str(copy)
    assert load_pictures(others).fingerprint() == pictures.fingerprint()
    path, folder = tiny_model / "stage_a.safetensors", tmp_path / "cache"
    precompute(others, folder, FrozenPaths(stage_a=str(path)))
    expect = {"stage_a": file_hash(path)}
    assert len(load_cache(config(others, folder=str(folder)), expect).pictures) == len(pictures)
    with pytest.raises(UserError, match="other pictures of the same names"):
        load_cache(config(shards, folder=str(folder)), expect)


def test_the_fingerprint_knows_keys_captions_and_size(shards):
    pictures = load_pictures(shards)
    renamed = dataclasses.replace(pictures, keys=[*pictures.keys[:-1], "x"])
    reworded = dataclasses.replace(pictures, captions=[*pictures.captions[:-1], ("x",)])
    smaller = dataclasses.replace(pictures, pixels=pictures.pixels[..., :16])
    prints = {p.fingerprint() for p in (pictures, renamed, reworded, smaller)}
    assert len(prints) == 4


def test_a_missing_part_or_folder_says_what_to_do(shards, cache, parts, tmp_path):
    with pytest.raises(UserError, match=r"data\.folder: this run trains on a cache"):
        load_cache(config(shards), parts)
    with pytest.raises(UserError, match=r"text\.safetensors: not there; .*train.data precompute"):
        load_cache(config(shards, folder=str(tmp_path)), parts)


def test_text_states_read_in_another_way_are_another_cache(shards, tiny_model, tmp_path, parts):
    text = str(tiny_model / "text")
    arguments = ["precompute", "--shards", shards, "--out", str(tmp_path), "--text", text]
    assert main([*arguments, "--text-hidden", "post_norm", "--text-pad-to", "10"]) == 0
    assert load_file(tmp_path / "text.safetensors")["text_hidden"].shape == (25, 10, 16)
    settings = config(shards, folder=str(tmp_path))
    with pytest.raises(UserError, match=f"weights {parts['text']}/post_norm/10"):
        load_cache(settings, {"text": parts["text"]})
    wanted = text_hash(text, TextConfig(hidden="post_norm", pad_to=10))
    assert wanted != text_hash(text, TextConfig("post_norm", "chunk", pad_to=10))
    assert load_cache(settings, {"text": wanted}).null_text is not None


def test_a_network_that_does_not_fit_the_pictures_is_refused(source, tmp_path, tiny_model):
    main(["write", "--from", str(source), "--out", str(tmp_path / "shards"), "--size", "30"])
    with pytest.raises(UserError, match="does not take these pictures"):
        precompute(
            f"{tmp_path}/shards/*.tar",
            tmp_path / "cache",
            FrozenPaths(stage_a=str(tiny_model / "stage_a.safetensors")),
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {},
            "name a network: --text, --image, .*--autoencoder or --teacher-of",
        ),
        ({"text": "/none", "batch_size": 0}, "--batch-size 0"),
        ({"text": "/none", "device": "cudaa"}, "device 'cudaa'"),
        ({"text": "/none"}, "/none: no such file or folder"),
        ({"stage_a": "/none.safetensors"}, "/none.safetensors: no such file or folder"),
    ],
)
def test_bad_precompute_options_are_refused(arguments, message, shards, tmp_path):
    with pytest.raises(UserError, match=message):
        options = {k: v for k, v in arguments.items() if k in ("batch_size", "device")}
        paths = {k: v for k, v in arguments.items() if k not in options}
        precompute(shards, tmp_path, FrozenPaths(**paths), **options)
