"""An imitation of the Hugging Face hub on loopback, and cascades on it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import load_file, save_file

from cascade.tools.convert import convert

V3, V3_PRIOR = "stabilityai/stable-cascade", "stabilityai/stable-cascade-prior"
COMMIT = "1" * 40
OLD_COMMIT = "2" * 40
LARGE = (".safetensors", ".bin")


class Hub:
    """Repositories as dictionaries, and what was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.revisions = {"main": COMMIT, COMMIT: COMMIT, "old": OLD_COMMIT, OLD_COMMIT: OLD_COMMIT}
        self.gated: set[str] = set()
        self.asked: list[tuple[str, str, str | None]] = []
        self.cut: list[int] = []
        """For each request for content to come, the bytes after which the connection closes."""
        self.served_instead: dict[str, bytes] = {}
        self.unauthorized = False
        self.status: int | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def log_message(self, *values: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def content(self) -> list[str]:
        """Paths of files whose content was asked for, as ``name:path``."""
        found = []
        for method, path, _ in self.asked:
            match = re.fullmatch(r"/(.+/.+)/resolve/[^/]+/(.+)", path)
            if method == "GET" and match:
                found.append(f"{match[1]}:{match[2]}")
        return found

    def answer(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        byte_range = request.headers.get("Range")
        self.asked.append((request.command, path, byte_range))
        if self.status is not None:
            return send(request, self.status, {}, b"")
        listing = re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = listing or file
        assert match is not None, f"{path}: nothing that a client should ask for"
        if self.unauthorized:
            return send(request, 403, {}, b"")
        if match[1] not in self.repositories:
            return send(request, 404, {"X-Error-Code": "RepoNotFound"}, b"")
        if match[2] not in self.revisions:
            return send(request, 404, {"X-Error-Code": "RevisionNotFound"}, b"")
        commit, files = self.revisions[match[2]], self.repositories[match[1]]
        if listing:
            siblings = [sibling(name, content) for name, content in files.items()]
            body = {"id": match[1], "sha": commit, "siblings": siblings}
            return send(request, 200, {"Content-Type": "application/json"}, json.dumps(body))
        if match[1] in self.gated:
            return send(request, 401, {"X-Error-Code": "GatedRepo"}, b"")
        body = self.served_instead.get(match[3], files[match[3]])
        headers = {"ETag": f'"{sha256_of(files[match[3]])}"', "X-Repo-Commit": commit}
        status, start = 200, 0
        if byte_range:
            start = int(byte_range.removeprefix("bytes=").split("-")[0])
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        cut = self.cut.pop(0) if with_body and self.cut else None
        send(request, status, headers, body[start:], cut=cut, with_body=with_body)


def send(
    request: BaseHTTPRequestHandler,
    status: int,
    headers: dict[str, str],
    body: bytes | str,
    *,
    cut: int | None = None,
    with_body: bool = True,
) -> None:
    body = body.encode() if isinstance(body, str) else body
    if cut == 0:
        request.close_connection = True
        return
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    if with_body and request.command != "HEAD":
        request.wfile.write(body if cut is None else body[:cut])
    request.close_connection = cut is not None


def sibling(name: str, content: bytes) -> dict[str, Any]:
    git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    sibling: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git}
    if name.endswith(LARGE):
        sibling["lfs"] = {"size": len(content), "sha256": sha256_of(content), "pointerSize": 130}
    return sibling


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub and an empty cache."""
    import huggingface_hub

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    constants = "huggingface_hub.constants."
    monkeypatch.setattr(constants + "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants + "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants + "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants + "DOWNLOAD_CHUNK_SIZE", 256)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    huggingface_hub.close_session()
    imitation = Hub()
    monkeypatch.setenv("HF_ENDPOINT", imitation.address)
    yield imitation
    imitation.close()


@pytest.fixture
def no_answer(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub that nobody can reach."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return hub


@pytest.fixture(scope="session")
def two_folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole cascade as the two pipeline folders of diffusers, with nothing of ours beside it."""
    folder = tmp_path_factory.mktemp("published") / "tiny"
    convert(tiny_model, "diffusers", folder, torch.float32)
    (folder / "cascade.json").unlink()
    for path in folder.rglob("diffusion_pytorch_model.safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt"})
    return folder


@pytest.fixture
def two(hub: Hub, two_folders: Path) -> Hub:
    """The tiny cascade as the hub has Stable Cascade, large files beside it included."""
    for name, part in ((V3, "decoder"), (V3_PRIOR, "prior")):
        files = read_files(two_folders / part)
        for path in [path for path in files if path.endswith(".safetensors")]:
            files[path.replace(".safetensors", ".bf16.safetensors")] = b"half " + files[path]
            files[path.replace(".safetensors", ".bin")] = b"pickle"
        for path in [path for path in files if path.startswith(f"{part}/")]:
            files[path.replace(f"{part}/", f"{part}_lite/")] = b"lite " + files[path]
        files["README.md"] = b"# a model"
        hub.repositories[name] = files
    for path in ("stage_c.safetensors", "comfyui_checkpoints/stage_b.safetensors"):
        hub.repositories[V3][path] = b"gigabytes"
    for path in ("effnet_encoder.safetensors", "previewer.safetensors", "controlnet/a.safetensors"):
        hub.repositories[V3][path] = f"not of this test: {path}".encode()
    hub.repositories[V3_PRIOR] |= {
        "image_encoder/model.safetensors": b"a gigabyte",
        "image_encoder/model.bf16.safetensors": b"half a gigabyte",
        "image_encoder/config.json": b'{"model_type": "clip_vision_model"}',
        "feature_extractor/preprocessor_config.json": b'{"size": 224}',
    }
    return hub


def read_files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def own(hub: Hub, tiny_model: Path) -> Hub:
    """A model of our own layout on the hub."""
    hub.repositories["someone/model"] = read_files(tiny_model)
    return hub
