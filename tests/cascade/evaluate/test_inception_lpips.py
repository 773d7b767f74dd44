"""Published yardsticks without their weights: names, shapes, and the maths around them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cascade.errors import UserError
from cascade.evaluate.features import FeatureNetwork, load_inception
from cascade.evaluate.inception import Inception
from cascade.evaluate.lpips import Lpips, PatchDistance
from cascade.evaluate.resize import resize, to_levels
from cascade.evaluate.weight_files import read_state
from cascade.text.picture_encoder import PictureEncoder


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_inception_has_the_published_parameters_and_names() -> None:
    with torch.device("meta"):
        network = Inception()
    # torchvision's 27,161,264 without the auxiliary head and the classifier.
    assert sum(p.numel() for p in network.parameters()) == 21_785_568
    state = network.state_dict()
    assert state["Mixed_5b.branch5x5_2.conv.weight"].shape == (64, 48, 5, 5)
    assert state["Mixed_6e.branch7x7dbl_5.bn.running_var"].shape == (192,)
    assert state["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = Inception().state_dict()
    # As published: with a classifier, without the counters of batches.
    state = {key: value for key, value in state.items() if "num_batches" not in key}
    torch.save({**state, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    return path


def test_other_weights_than_the_published_never_make_a_fid(inception_file: Path) -> None:
    network = load_inception(inception_file, "bicubic", torch.device("cpu"))
    features = network.embed(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert features.shape == (1, 2048) and features.dtype == torch.float32
    assert not network.makes_fid
    assert network.label("FID", "Frechet distance").startswith("Frechet distance (Inception pt_")
    published = FeatureNetwork("Inception", "6726825d0af5", 2048, network.embed)
    assert published.label("FID", "Frechet distance") == "FID"
    demo = FeatureNetwork("demo CLIP", "6726825d0af5", 192, network.embed)
    assert demo.label("FID", "Frechet distance") == "Frechet distance (demo CLIP)"


def test_files_that_are_no_inception_are_refused_in_a_line(tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(2)}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(b"no weights")
    torch.save({"epoch": 3}, tmp_path / "c.pth")
    for name, words in (
        ("a.pth", "does not fit Inception"),
        ("b.pth", "not a readable file"),
        ("c.pth", "not a plain table"),
        ("none.pth", "no such file"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            Inception.from_file(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, ("raise SystemExit('ran')",))

    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="not a readable file"):
        read_state(tmp_path / "evil.pth")


@pytest.mark.parametrize("size", [20, 77])
def test_the_resize_is_pillows_in_floating_point(size: int) -> None:
    pixels = (rand(1, 3, 50, 50) * 255).round()
    channels = [Image.fromarray(plane.numpy()).resize((size, size), 3) for plane in pixels[0]]
    wanted = torch.from_numpy(np.stack([np.asarray(channel) for channel in channels]))
    torch.testing.assert_close(resize(pixels, size, "bicubic")[0], wanted, rtol=0, atol=2e-3)
    assert resize(pixels, 50, "bicubic") is pixels


def test_overshoot_is_clamped_to_the_levels_of_8_bits() -> None:
    assert to_levels(torch.tensor([-3.0, 0.6, 254.5, 300.0])).tolist() == [0, 1, 254, 255]


def alexnet_file(folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Lpips("alex")
    state = {f"features.{key}": value for key, value in network.features.state_dict().items()}
    torch.save({**state, "classifier.1.weight": torch.zeros(2)}, folder / "alexnet.pth")
    heads = {
        f"lin{i}.model.1.weight": rand(1, width, 1, 1, seed=i)
        for i, width in enumerate((64, 192, 384, 256, 256))
    }
    torch.save(heads, folder / "heads.pth")
    return folder / "alexnet.pth"


def test_lpips_is_the_weighted_distance_of_unit_features(tmp_path: Path) -> None:
    network = Lpips.from_file(alexnet_file(tmp_path), tmp_path / "heads.pth")
    assert network.trunk == "alex"
    x, y = rand(2, 3, 64, 64), rand(2, 3, 64, 64, seed=1)
    found = network(x, y)
    torch.testing.assert_close(network(x, x), torch.zeros(2))
    torch.testing.assert_close(network(y, x), found)
    torch.testing.assert_close(network(x[:1], y[:1]), found[:1])
    # By hand: slices of the trunk, channels of unit length, heads, mean over places.
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    a, b = ((2 * one - 1 - shift) / scale for one in (x, y))
    wanted, slot = torch.zeros(2), 0
    with torch.inference_mode():
        for layer in network.features:
            a, b = layer(a), layer(b)
            if isinstance(layer, nn.ReLU):
                apart = (a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)) ** 2
                wanted += (apart * network.heads[slot].view(1, -1, 1, 1)).sum(1).mean((1, 2))
                slot += 1
    assert slot == 5
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_heads_that_torchmetrics_carries_fit(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    network = Lpips.from_file(alexnet_file(tmp_path))
    assert all(bool((head >= 0).all()) for head in network.heads)  # as the authors trained them
    with torch.device("meta"):
        vgg = Lpips("vgg")
    assert vgg.features[28].weight.shape == (512, 512, 3, 3)


def test_the_distance_between_a_clips_patches_is_zero_for_a_picture_and_itself() -> None:
    distance = PatchDistance(PictureEncoder.from_folder("weights/demo/text"))
    x = rand(2, 3, 96, 96)
    torch.testing.assert_close(distance(x, x), torch.zeros(2))
    near, far = (x + 0.02).clamp(0, 1), rand(2, 3, 96, 96, seed=1)
    assert bool((distance(x, near) < distance(x, far)).all())
    torch.testing.assert_close(distance(x, far), distance(far, x))
