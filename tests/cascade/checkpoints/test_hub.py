from __future__ import annotations

from pathlib import Path

import pytest

from cascade.checkpoints.hub import resolve
from cascade.errors import UserError


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that were asked of the hub, which answers none."""
    asked: list[str] = []

    def no_network(repo_id: str, **settings: object) -> str:
        asked.append(repo_id)
        raise ConnectionError("name or service not known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    return asked


def test_a_folder_is_itself(tmp_path: Path, downloads: list[str]) -> None:
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path
    assert not downloads


def test_a_hub_id_without_a_network_says_how_to_go_on_offline(downloads: list[str]) -> None:
    with pytest.raises(UserError, match=r"hf download someone/model --local-dir") as caught:
        resolve("someone/model")
    assert downloads == ["someone/model"]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["weights", "./some/model", "/some/model", "a/b/c"])
def test_a_path_that_is_not_there_asks_nothing_of_the_network(
    model: str, downloads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        resolve(model)
    assert not downloads


def test_a_slip_in_the_name_of_a_local_folder_asks_nothing_of_the_network(
    downloads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        resolve("weights/dmeo")
    assert not downloads


def test_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(UserError, match="name the model's folder"):
        resolve(path)


def test_the_home_of_nobody_is_one_line(downloads: list[str]) -> None:
    with pytest.raises(UserError, match="no such user's home"):
        resolve("~nobody-of-this-name/model")
    assert not downloads
