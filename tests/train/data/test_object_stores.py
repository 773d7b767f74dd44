"""Shards in s3 and gs: the real clients against stores on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import fsspec
import pytest
from fsspec.registry import _registry
from gcsfs.core import GCSFileSystem

from cascade.errors import UserError
from train.data.open import open_data
from train.data.sources import PieceReader, expand_shards, fetched, open_stream, stamp
from train.data.transport import SourceError

from .test_sources import config, keys

DATE = "Sun, 22 Nov 2026 00:00:00 GMT"
DATE_ISO = "2026-11-22T00:00:00.000Z"


class Store(ThreadingHTTPServer):
    """A bucket of a folder's files, told in the words of S3 (XML) or of Google's (JSON)."""

    def __init__(self, folder: Path, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.files = {f"sets/{file.name}": file.read_bytes() for file in folder.iterdir()}
        self.pieces: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Store
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def say(self, status: int, body: bytes, kind: str = "application/json", **more: str) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Last-Modified": DATE}
        for name, value in (headers | more).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def give(self, name: str) -> None:
        """Send an object, or the piece of it that was asked for."""
        whole, asked = self.server.files[name], self.headers.get("Range")
        tag = {"ETag": f'"{hashlib.md5(whole).hexdigest()}"'}
        if asked is None:
            return self.say(200, whole, "application/x-tar", **tag)
        self.server.pieces.append(asked)
        first, last = asked.removeprefix("bytes=").split("-")
        piece = whole[int(first) : int(last) + 1 if last else None]
        if not piece:
            return self.say(416, b"", "text/plain")
        told = f"bytes {first}-{int(first) + len(piece) - 1}/{len(whole)}"
        return self.say(206, piece, "application/x-tar", Content_Range=told, **tag)


class S3(Answers):
    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        bucket, _, name = unquote(asked.path).lstrip("/").partition("/")
        if bucket != "bucket":
            return self.missing("NoSuchBucket")
        if name:
            return self.give(name) if name in self.server.files else self.missing("NoSuchKey")
        prefix = parse_qs(asked.query).get("prefix", [""])[0]
        rows = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>{DATE_ISO}</LastModified>"
            f"<ETag>&quot;{hashlib.md5(body).hexdigest()}&quot;</ETag><Size>{len(body)}</Size>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
            for name, body in sorted(self.server.files.items())
            if name.startswith(prefix)
        )
        listing = (
            '<?xml version="1.0"?><ListBucketResult '
            'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>bucket</Name>'
            f"<IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
        )
        return self.say(200, listing.encode(), "application/xml")

    def missing(self, code: str) -> None:
        words = f"<Error><Code>{code}</Code><Message>not there</Message></Error>"
        self.say(404, words.encode(), "application/xml")


class Google(Answers):
    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        start = "/storage/v1/b/bucket"
        path = asked.path.removeprefix("/download")
        name = unquote(path.removeprefix(f"{start}/o").lstrip("/"))
        words = parse_qs(asked.query)
        if path == f"{start}/o":
            prefix = words.get("prefix", [""])[0]
            items = [self.row(one) for one in sorted(self.server.files) if one.startswith(prefix)]
            return self.say(200, json.dumps({"kind": "storage#objects", "items": items}).encode())
        if not path.startswith(f"{start}/o/") or name not in self.server.files:
            return self.say(404, b'{"error": {"code": 404, "message": "not there"}}')
        if words.get("alt") == ["media"]:
            return self.give(name)
        return self.say(200, json.dumps(self.row(name)).encode())

    def row(self, name: str) -> dict[str, str]:
        body = self.server.files[name]
        dates = {"updated": DATE_ISO, "timeCreated": DATE_ISO}
        tag = hashlib.md5(body).hexdigest()
        return {"name": name, "bucket": "bucket", "size": str(len(body)), "etag": tag, **dates}


@pytest.fixture(params=["s3", "gs"])
def store(
    request, several_shapes: str, monkeypatch, tmp_path: Path
) -> Iterator[tuple[Store, str, str]]:
    """A store with the shards, how its shards are named, and the folder that it was made of."""
    handler = S3 if request.param == "s3" else Google
    server = Store(Path(several_shapes).parent, handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    if request.param == "s3":
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    else:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        # The class that asks by gRPC what kind of bucket this is would wait for ever.
        monkeypatch.setitem(_registry, "gs", GCSFileSystem)
        # What FSSPEC_GS_TOKEN=anon sets; without it Google's servers are asked who we are.
        monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    fsspec.get_filesystem_class(request.param).clear_instance_cache()
    yield server, f"{request.param}://bucket/sets/*.tar", several_shapes
    server.shutdown()
    server.server_close()
    fsspec.get_filesystem_class(request.param).clear_instance_cache()


def test_shards_are_found_and_read_as_those_of_a_folder(store) -> None:
    server, pattern, folder = store
    shards = expand_shards(pattern)
    assert [Path(one).name for one in shards] == [Path(one).name for one in expand_shards(folder)]
    assert all(one.startswith(pattern.partition("*")[0]) for one in shards)
    for mode in ("exact", "resampled"):
        assert keys(config(pattern, mode=mode), 6) == keys(config(folder, mode=mode), 6)
    assert server.pieces, "an exact run reads samples, not shards"


def test_a_piece_a_shard_and_its_stamp(store) -> None:
    _, pattern, folder = store
    address, file = expand_shards(pattern)[0], Path(expand_shards(folder)[0])
    assert PieceReader().read(address, 3, 5) == file.read_bytes()[3:8]
    with open_stream(address) as stream, fetched(address) as whole:
        assert stream.read() == whole.read() == file.read_bytes()
    told = stamp(address)
    assert str(file.stat().st_size) in told and hashlib.md5(file.read_bytes()).hexdigest() in told


def test_what_is_not_there_is_named(store) -> None:
    _, pattern, _ = store
    absent = pattern.replace("*", "absent")
    with pytest.raises(SourceError, match=r"sets/absent\.tar"):
        PieceReader().read(absent, 0, 5)
    with pytest.raises(UserError, match=r"sets/absent\.tar"):
        open_data(config(absent, mode="exact"))
    with pytest.raises(UserError, match="no shard matches"):
        expand_shards(pattern.replace("sets", "other"))


@pytest.mark.slow
def test_workers_read_from_stores_that_this_process_has_used(store) -> None:
    """The clients' loops and connections do not outlive a fork."""
    _, pattern, folder = store
    PieceReader().read(expand_shards(pattern)[0], 0, 512)
    for mode in ("exact", "resampled"):
        ours = keys(config(pattern, mode=mode, workers=2), 6)
        assert ours == keys(config(folder, mode=mode, workers=2), 6)
