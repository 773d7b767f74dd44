"""Models by name, against an imitation of the hub on loopback."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sample
from cascade.checkpoints.hub import ModelFiles, resolve
from cascade.checkpoints.hub_choice import Part
from cascade.checkpoints.part_files import find_network, find_text
from cascade.checkpoints.readers import open_weights
from cascade.errors import UserError
from cascade.pipelines.cascade import CascadePipeline
from cascade.pipelines.parts import OwnFolder, open_source
from cascade.pipelines.spec import load_spec
from cascade.pipelines.unet import UNetPipeline
from cascade.pipelines.unet_parts import is_unet
from cascade.pipelines.unet_plan import UNetSettings
from cascade.tools.convert import convert
from tests.fake_hub import COMMIT, LARGE, OLD_COMMIT, V3, V3_PRIOR, Hub, read_files, sha256_of
from tests.unet_models import save_tiny


def weights(files: ModelFiles) -> set[str]:
    """Names of a model's weights, from their folder's name on."""
    assert files.files is not None
    return {
        path.relative_to(path.parents[1]).as_posix() for path in files.files if path.suffix in LARGE
    }


def the_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Names


def test_a_folder_is_itself(tmp_path: Path, hub: Hub) -> None:
    assert resolve(tmp_path) == resolve(str(tmp_path)) == ModelFiles((tmp_path,))
    assert resolve(f"{tmp_path}:lite") == ModelFiles((tmp_path,), lite=True)
    assert not hub.asked


def test_a_folder_whose_name_ends_like_an_option_is_itself(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "model:lite").mkdir()
    assert resolve(tmp_path / "model:lite") == ModelFiles((tmp_path / "model:lite",))


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no revision 'main'"):
        resolve(tmp_path, revision="main")


@pytest.mark.parametrize("model", ["weights", "./some/model", "/some/model", "a/b/c", ":lite"])
def test_a_path_that_is_not_there_asks_nothing_of_the_network(
    model: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        resolve(model)
    assert not hub.asked


def test_a_slip_in_the_name_of_a_local_folder_asks_nothing_of_the_network(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        resolve("weights/dmeo")
    assert not hub.asked


def test_a_file_is_refused_unless_it_holds_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.touch()
    with pytest.raises(UserError, match=r"neither \.safetensors nor \.ckpt; name a model's folder"):
        resolve(path)
    weights_file = tmp_path / "model.safetensors"
    weights_file.touch()
    assert resolve(weights_file) == ModelFiles((tmp_path,), files=frozenset({weights_file}))
    with pytest.raises(UserError, match="which has no revision, variant or size"):
        resolve(weights_file, variant="fp16")


def test_the_home_of_nobody_is_one_line(hub: Hub) -> None:
    with pytest.raises(UserError, match="no such user's home"):
        resolve("~nobody-of-this-name/model")
    assert not hub.asked


@pytest.mark.parametrize("revision", ["..", "a/../b", "", "a b", "x,y", "/etc"])
def test_a_revision_that_is_none_asks_nothing_of_the_network(revision: str, hub: Hub) -> None:
    with pytest.raises(UserError, match="revision"):
        resolve("someone/model", revision=revision)
    assert not hub.asked


def test_two_revisions_of_one_model_are_refused(hub: Hub) -> None:
    with pytest.raises(UserError, match="names one revision"):
        resolve("someone/model@old", revision="main")


# What is downloaded


def test_our_own_layout_is_downloaded_once_and_opened(own: Hub, tiny_model: Path) -> None:
    own.repositories["someone/model"] |= {"run.ckpt": b"x", "text/model.bin": b"x", "notes": b"x"}
    files = resolve("someone/model")
    assert isinstance(open_source(files), OwnFolder)
    asked = own.content()
    assert len(asked) == len(set(asked))
    expected = {
        path for path in read_files(tiny_model) if path.startswith("text/") or "/" not in path
    }
    assert {name.split(":")[1] for name in asked} == expected

    own.asked.clear()
    assert resolve("someone/model") == files
    assert own.asked == [("GET", "/api/models/someone/model/revision/main", None)]


def test_two_repositories_are_one_model_that_makes_a_picture(two: Hub) -> None:
    for name in ("effnet_encoder", "previewer"):
        del two.repositories[V3][f"{name}.safetensors"]
    pipeline = CascadePipeline.from_pretrained(V3, device="cpu")
    output = pipeline("a red apple", seed=0, width=128, height=128, steps_c=1, steps_b=1)
    assert output.pixels.shape == (1, 3, 128, 128)
    assert pipeline.text_encoder_b is pipeline.text_encoder


def test_only_what_is_needed_of_two_repositories_is_downloaded(two: Hub) -> None:
    files = resolve(V3)
    assert weights(files) == {
        "decoder/diffusion_pytorch_model.safetensors",
        "prior/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "image_encoder/model.safetensors",
        "vqgan/diffusion_pytorch_model.safetensors",
        f"{COMMIT}/effnet_encoder.safetensors",
        f"{COMMIT}/previewer.safetensors",
    }
    large = [name for name in two.content() if name.endswith(LARGE)]
    assert len(large) == 7 and f"{V3}:text_encoder/model.safetensors" in large
    assert f"{V3_PRIOR}:prior/diffusion_pytorch_model.safetensors" in large
    assert not any("scheduler" in name or "README" in name for name in two.content())


def test_either_repository_names_the_model(two: Hub) -> None:
    assert resolve(V3_PRIOR).files == resolve(V3).files


def test_the_image_encoder_comes_with_what_prepares_its_pictures(two: Hub) -> None:
    resolve(V3)
    asked = {name.removeprefix(f"{V3_PRIOR}:") for name in two.content()}
    assert {name for name in asked if name.startswith(("image_encoder", "feature_extractor"))} == {
        "image_encoder/config.json",
        "image_encoder/model.safetensors",
        "feature_extractor/preprocessor_config.json",
    }
    assert not any("controlnet" in name for name in asked)


def test_a_cascade_without_an_image_encoder_is_one_too(two: Hub) -> None:
    files = two.repositories[V3_PRIOR]
    kept = {name: files[name] for name in files if "image_" not in name and "extractor" not in name}
    two.repositories[V3_PRIOR] = kept
    assert len(weights(resolve(V3))) == 6


def test_text_encoders_that_differ_are_both_downloaded(two: Hub) -> None:
    two.repositories[V3_PRIOR]["text_encoder/model.safetensors"] += b" "
    resolve(V3)
    asked = [name for name in two.content() if name.endswith("text_encoder/model.safetensors")]
    assert len(asked) == 2


def test_lite_takes_the_small_stages(two: Hub) -> None:
    files = resolve(f"{V3}:lite")
    assert files.lite
    stages = {name for name in weights(files) if name.startswith(("prior", "decoder"))}
    assert stages == {
        "decoder_lite/diffusion_pytorch_model.safetensors",
        "prior_lite/diffusion_pytorch_model.safetensors",
    }
    assert not any("/decoder/" in name or "/prior/" in name for name in two.content())
    assert resolve(V3, lite=True) == files


def test_a_variant_is_taken_where_there_is_one(two: Hub) -> None:
    for name in ("vqgan/diffusion_pytorch_model.bf16.safetensors",):
        del two.repositories[V3][name]
    found = weights(resolve(V3, variant="bf16"))
    assert "decoder/diffusion_pytorch_model.bf16.safetensors" in found
    assert "text_encoder/model.bf16.safetensors" in found
    assert "image_encoder/model.bf16.safetensors" in found
    assert "vqgan/diffusion_pytorch_model.safetensors" in found
    assert len(found) == 7


def test_an_unknown_variant_is_named_with_the_known_ones(two: Hub) -> None:
    with pytest.raises(UserError, match="no variant 'fp8' in it; it has: bf16"):
        resolve(V3, variant="fp8")
    assert not two.content()


def test_variants_of_one_cache_do_not_mix(two: Hub) -> None:
    full = resolve(V3)
    half = resolve(V3, variant="bf16")
    assert full.folders == half.folders
    assert weights(full) == weights(resolve(V3))


def test_a_model_without_smaller_stages_says_so(two: Hub, own: Hub) -> None:
    for name in (V3, V3_PRIOR):
        files = two.repositories[name]
        two.repositories[name] = {k: v for k, v in files.items() if "_lite" not in k}
    with pytest.raises(UserError, match="no smaller stages in it; leave :lite out"):
        resolve(f"{V3}:lite")
    with pytest.raises(UserError, match="leave :lite out"):
        resolve("someone/model:lite")


def test_shards_come_with_their_index_and_all_together(two: Hub) -> None:
    files = two.repositories[V3_PRIOR]
    base = "prior/diffusion_pytorch_model"
    for name in [name for name in files if name.startswith("prior/") and "config" not in name]:
        del files[name]
    shards = [f"{base}-0000{index}-of-00002.safetensors" for index in (1, 2)]
    files[f"{base}.safetensors.index.json"] = b"{}"
    files[shards[0]] = b"one"
    with pytest.raises(UserError, match="prior: not all parts of its weights"):
        resolve(V3)
    files[shards[1]] = b"two"
    resolve(V3)
    asked = {name.split(":")[1] for name in two.content() if "prior/" in name}
    assert asked == {*shards, f"{base}.safetensors.index.json", "prior/config.json"}


def test_pickles_are_taken_only_where_there_is_nothing_else(two: Hub) -> None:
    files = two.repositories[V3]
    for name in [name for name in files if re.fullmatch(r"decoder/.*\.safetensors", name)]:
        del files[name]
    found = weights(resolve(V3))
    assert [name for name in found if name.endswith(".bin")] == [
        "decoder/diffusion_pytorch_model.bin"
    ]


def test_a_repository_of_something_else_is_one_line_and_no_download(hub: Hub) -> None:
    hub.repositories["someone/model"] = {"config.json": b"{}", "model.safetensors": b"x"}
    with pytest.raises(UserError, match=r"neither model\.json nor diffusers' folders") as caught:
        resolve("someone/model")
    the_line(caught)
    hub.repositories["someone/model"] = {"prior/config.json": b"{}", "prior/a.safetensors": b"x"}
    with pytest.raises(UserError, match="no decoder and no text_encoder and no tokenizer and no v"):
        resolve("someone/model")
    assert not hub.content()


def test_one_repository_with_both_pipelines_is_a_model(hub: Hub, two_folders: Path) -> None:
    hub.repositories["someone/model"] = read_files(two_folders)
    source = open_source(resolve("someone/model"))
    assert source.spec.generation == "v3"


def test_a_converted_model_on_the_hub_brings_its_settings(
    hub: Hub, tiny_model: Path, tmp_path: Path
) -> None:
    convert(tiny_model, "diffusers", tmp_path / "out", torch.float32)
    hub.repositories["someone/model"] = read_files(tmp_path / "out")
    assert open_source(resolve("someone/model")).spec == load_spec(tiny_model)


def test_a_variant_of_a_folder_here_is_chosen_too(two_folders: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(two_folders, folder)
    path = folder / "prior" / "prior" / "diffusion_pytorch_model.safetensors"
    shutil.copyfile(path, path.with_name("diffusion_pytorch_model.bf16.safetensors"))
    found = weights(resolve(folder, variant="bf16"))
    assert "prior/diffusion_pytorch_model.bf16.safetensors" in found
    assert "prior/diffusion_pytorch_model.safetensors" not in found
    open_source(resolve(folder, variant="bf16"))


def test_shards_of_a_variant_here_are_opened(tmp_path: Path) -> None:
    shard = "model.bf16-00001-of-00001.safetensors"
    save_file({"a": torch.ones(2)}, tmp_path / shard)
    index = {"weight_map": {"a": shard}}
    (tmp_path / "model.safetensors.index.bf16.json").write_text(json.dumps(index))
    [opened] = open_weights(tmp_path)
    assert opened.tensors["a"].tolist() == [1.0, 1.0]


def test_the_command_takes_a_name(own: Hub, tmp_path: Path) -> None:
    small = ["--steps-c", "1", "--steps-b", "1", "--device", "cpu", "--seed", "0"]
    out = tmp_path / "a.png"
    line = ["--model", "someone/model@old", "--prompt", "a red apple", "--out", str(out), *small]
    assert sample.main(line) == 0
    assert out.is_file()
    assert own.asked[0][1].endswith("/revision/old")


# Revisions


def test_a_pinned_revision_is_asked_for_and_used(own: Hub) -> None:
    files = resolve("someone/model@old")
    assert files.folders[0].name == OLD_COMMIT
    assert own.asked[0][1] == "/api/models/someone/model/revision/old"
    assert all(f"/resolve/{OLD_COMMIT}/" in path for _, path, _ in own.asked[1:])
    assert resolve("someone/model", revision=COMMIT).folders[0].name == COMMIT


def test_both_repositories_can_be_pinned(two: Hub, caplog: pytest.LogCaptureFixture) -> None:
    files = resolve(f"{V3}@old,main")
    assert [folder.name for folder in files.folders] == [OLD_COMMIT, COMMIT]
    assert not caplog.records
    files = resolve(f"{V3}@old")
    assert [folder.name for folder in files.folders] == [OLD_COMMIT, COMMIT]
    assert f"{V3_PRIOR} is not pinned" in caplog.text


def test_an_unknown_revision_is_one_line(own: Hub) -> None:
    with pytest.raises(UserError, match="no revision 'new'") as caught:
        resolve("someone/model@new")
    the_line(caught)


# Without the hub


def test_offline_a_cached_model_works_without_any_connection(
    two: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = resolve(V3)
    two.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve(V3) == files
    assert not two.asked
    with pytest.raises(UserError, match=r"no smaller stages.*as far as the cache has it"):
        resolve(f"{V3}:lite")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set") as caught:
        resolve("someone/model")
    assert "hf download someone/model --local-dir FOLDER`" in the_line(caught)
    assert not two.asked


@pytest.mark.parametrize("how", ["unreachable", "broken"])
def test_a_cached_model_is_used_if_the_hub_does_not_answer(
    how: str, own: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = resolve("someone/model")
    if how == "broken":
        own.status = 503
    else:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert resolve("someone/model") == files
    assert "the copy in the cache is used" in caplog.text


def test_no_network_says_how_to_go_on_offline(no_answer: Hub) -> None:
    with pytest.raises(UserError, match=r"hf download someone/model --local-dir FOLDER`") as caught:
        resolve("someone/model")
    the_line(caught)
    with pytest.raises(UserError, match=r"stable-cascade-prior --local-dir FOLDER/stable-c"):
        resolve(V3)


def test_a_download_that_was_cut_off_is_not_taken_for_the_model(
    own: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.cut = [0] * 100
    with pytest.raises(UserError):
        resolve("someone/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="the cache does not hold it"):
        resolve("someone/model")


# Downloads that fail


def test_a_connection_that_breaks_is_taken_up_where_it_broke(own: Hub) -> None:
    own.cut = [1000]
    assert isinstance(open_source(resolve("someone/model")), OwnFolder)
    ranges = [byte_range for _, _, byte_range in own.asked if byte_range]
    assert len(ranges) == 1 and re.fullmatch(r"bytes=[1-9]\d+-", ranges[0])


def test_the_next_run_resumes_what_was_cut_off(own: Hub) -> None:
    [first] = [name for name in sorted(own.repositories["someone/model"]) if "compressor" in name]
    own.repositories["someone/model"][first] = b"x" * 5000
    own.cut = [2000, *[0] * 6]
    with pytest.raises(UserError, match="run the same command again: it resumes") as caught:
        resolve("someone/model")
    the_line(caught)
    own.cut.clear()
    own.asked.clear()
    files = resolve("someone/model")
    assert (files.folders[0] / first).read_bytes() == b"x" * 5000
    [(_, path, byte_range)] = [asked for asked in own.asked if asked[2]]
    assert path.endswith(first)
    start = int((byte_range or "").removeprefix("bytes=").rstrip("-"))
    assert 1500 <= start <= 2000


def test_a_wrong_hash_is_named_and_nothing_of_it_stays(own: Hub, tmp_path: Path) -> None:
    name = "stage_b.safetensors"
    content = own.repositories["someone/model"][name]
    own.served_instead[name] = b"\0" * len(content)
    with pytest.raises(UserError, match=f"{name} has the wrong hash") as caught:
        resolve("someone/model")
    the_line(caught)
    blobs = tmp_path / "cache" / "models--someone--model" / "blobs"
    assert not [path for path in blobs.iterdir() if path.name.startswith(sha256_of(content))]
    assert not list(blobs.glob("*.incomplete"))
    own.served_instead.clear()
    files = resolve("someone/model")
    assert (files.folders[0] / name).read_bytes() == content


def test_a_cached_file_of_the_wrong_size_is_downloaded_again(
    own: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    path = resolve("someone/model").folders[0] / "stage_c.safetensors"
    whole = path.read_bytes()
    path.resolve().write_bytes(whole[:100])
    own.asked.clear()
    resolve("someone/model")
    assert path.read_bytes() == whole
    assert own.content() == ["someone/model:stage_c.safetensors"]
    assert "damaged in the cache" in caplog.text


def test_a_licence_to_accept_is_one_line(two: Hub) -> None:
    two.gated.add(V3)
    with pytest.raises(UserError, match=r"licence must be accepted.*`hf auth login`") as caught:
        resolve(V3)
    assert f"{two.address}/{V3}" in the_line(caught)


def test_refused_access_is_one_line(own: Hub) -> None:
    own.unauthorized = True
    with pytest.raises(UserError, match=r"refuses access \(403\).*`hf auth login`") as caught:
        resolve("someone/model")
    the_line(caught)


def test_an_unknown_name_is_one_line_with_the_nearest_known_one(hub: Hub) -> None:
    with pytest.raises(UserError, match="stabilityai/stable-cascde: the hub has no such") as caught:
        resolve("stabilityai/stable-cascde")
    assert the_line(caught).endswith(f"did you mean '{V3}'?")
    with pytest.raises(UserError, match="the hub has no such model") as caught:
        resolve("someone/model")
    assert "did you mean" not in the_line(caught)


def test_a_full_disk_is_told_before_and_during_a_download(
    own: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = "cascade.checkpoints.hub_fetch."
    with monkeypatch.context() as patch:
        usage = shutil._ntuple_diskusage(10, 9, 1)
        patch.setattr(fetch + "shutil.disk_usage", lambda place: usage)
        with pytest.raises(UserError, match=r"GB are free at .* HF_HOME") as caught:
            resolve("someone/model")
        the_line(caught)
    assert not own.content()

    def full(*values: object, **settings: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(UserError, match=r"the disk is full at .* it resumes") as caught:
        resolve("someone/model")
    the_line(caught)


def test_a_listing_that_is_none_is_one_line(own: Hub) -> None:
    own.revisions["main"] = "../../elsewhere"
    with pytest.raises(UserError, match="does not answer as a hub does") as caught:
        resolve("someone/model")
    the_line(caught)


# A part of a model


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("stage_a", {"vqgan/diffusion_pytorch_model.safetensors"}),
        ("stage_b", {"decoder/diffusion_pytorch_model.safetensors"}),
        ("stage_c", {"prior/diffusion_pytorch_model.safetensors"}),
        ("text", {"text_encoder/model.safetensors"}),
        ("image_encoder", {"image_encoder/model.safetensors"}),
        ("compressor", {f"{COMMIT}/effnet_encoder.safetensors"}),
        ("previewer", {f"{COMMIT}/previewer.safetensors"}),
    ],
)
def test_of_a_part_nothing_else_is_downloaded(two: Hub, part: Part, expected: set[str]) -> None:
    assert weights(resolve(V3, part=part)) == expected
    large = [name for name in two.content() if name.endswith(LARGE)]
    assert len(large) == 1, large


def test_a_part_that_is_here_needs_no_hub(two: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    files = resolve(V3, part="stage_a")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert weights(resolve(V3, part="stage_a")) == weights(files)
    with pytest.raises(UserError, match="no prior in it"):
        resolve(V3, part="stage_c")


def test_a_part_that_a_model_lacks_is_named(two: Hub, own: Hub) -> None:
    del two.repositories[V3]["effnet_encoder.safetensors"]
    with pytest.raises(UserError, match=r"no effnet_encoder\.safetensors in it"):
        resolve(V3, part="compressor")
    del own.repositories["someone/model"]["previewer.safetensors"]
    with pytest.raises(UserError, match="no previewer beside its"):
        resolve("someone/model", part="previewer")
    assert weights(resolve("someone/model", part="stage_b")) == {f"{COMMIT}/stage_b.safetensors"}


# U-Nets


def test_a_unets_repository_gives_its_networks_once_and_makes_a_picture(
    hub: Hub, tmp_path: Path
) -> None:
    name = "someone/koala"
    files = read_files(save_tiny(tmp_path / "model", "sdxl"))
    weights_file = "unet/diffusion_pytorch_model.safetensors"
    others = {
        "unet/diffusion_pytorch_model.fp16.safetensors": files[weights_file],
        "unet/diffusion_pytorch_model.bin": b"pickle",
        "unet/openvino_model.bin": b"foreign",
        "vae/diffusion_flax_model.msgpack": b"flax",
        "safety_checker/model.safetensors": b"another network",
        "sd_xl_base_1.0.safetensors": b"the same again",
        "README.md": b"card",
    }
    hub.repositories[name] = {**files, **others}
    found = resolve(name)
    assert found.files is not None
    [folder] = found.folders
    assert {path.relative_to(folder).as_posix() for path in found.files} == set(files)
    assert is_unet(found)
    output = UNetPipeline.from_pretrained(name, device="cpu")("a red apple", UNetSettings(seed=1))
    alone = UNetPipeline(tmp_path / "model", device="cpu")("a red apple", UNetSettings(seed=1))
    assert torch.equal(output.pixels, alone.pixels)

    marked = resolve(name, variant="fp16")
    assert marked.files is not None
    names = {path.relative_to(folder).as_posix() for path in marked.files}
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in names and weights_file not in names
    assert "vae/diffusion_pytorch_model.safetensors" in names
    with pytest.raises(UserError, match="no variant 'bf16' in it; it has: fp16"):
        resolve(name, variant="bf16")
    with pytest.raises(UserError, match=f"{name}: a U-Net, which has no smaller stages"):
        resolve(f"{name}:lite")
    del hub.repositories[name]["vae/diffusion_pytorch_model.safetensors"]
    with pytest.raises(UserError, match=f"{name}: vae: not all parts|no vae"):
        resolve(name)


def test_of_a_pipelines_unet_nothing_else_is_downloaded(hub: Hub, own: Hub, tmp_path: Path) -> None:
    name = "someone/koala"
    hub.repositories[name] = read_files(save_tiny(tmp_path / "model", "sdxl"))
    found = find_network(name, "unet")
    assert found.path.name == "diffusion_pytorch_model.safetensors"
    asked = {path for path in hub.content() if path.endswith(LARGE)}
    assert asked == {f"{name}:unet/diffusion_pytorch_model.safetensors"}
    assert find_network(name, "autoencoder_kl").path.parent.name == "vae"
    asked = {path for path in hub.content() if path.endswith(LARGE)}
    assert f"{name}:vae/diffusion_pytorch_model.safetensors" in asked and len(asked) == 2
    assert find_text(name, 24).folder.name == "text_encoder_2"
    # A safety checker's config speaks of a text tower, which is not there.
    checker = {"architectures": ["StableDiffusionSafetyChecker"], "text_config": {}}
    own = json.loads((tmp_path / "model" / "text_encoder" / "config.json").read_text())
    (tmp_path / "model" / "safety_checker").mkdir()
    content = json.dumps(checker | {"text_config": own})
    (tmp_path / "model" / "safety_checker" / "config.json").write_text(content)
    assert find_text(tmp_path / "model", own["hidden_size"]).folder.name == "text_encoder"
    with pytest.raises(UserError, match="a U-Net's pipeline, which has no stage_c"):
        find_network(name, "stage_c")
    for part, folder in (("unet", "unet"), ("autoencoder_kl", "vae")):
        with pytest.raises(UserError, match=f"no folder {folder} beside a model_index"):
            find_network("someone/model", part)


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_no_model(name: str) -> None:
    with pytest.raises(UserError, match="the name is empty"):
        resolve(name)
