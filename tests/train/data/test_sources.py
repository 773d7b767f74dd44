"""Shards from files, from a server on this machine, from commands, and through fsspec."""

from __future__ import annotations

import gzip
import itertools
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cascade.errors import UserError, run_main
from train.data.__main__ import main
from train.data.beside import write_beside
from train.data.config import DataConfig
from train.data.open import open_data
from train.data.sources import (
    PieceReader,
    expand_shards,
    fetched,
    open_stream,
    scheme_of,
    shard_title,
    sibling,
    stamp,
    why_whole_alone,
)
from train.data.transport import SourceError, shown

from .conftest import write_set


class Server(ThreadingHTTPServer):
    """Serves a folder, with pieces; it can be told to break answers off or to be busy."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.break_after: int | None = None
        self.busy = 0
        self.pieces = True
        self.asked: list[str] = []
        self.authorized: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        self.server.asked.append(self.path)
        self.server.authorized.append(self.headers.get("Authorization"))
        path = self.server.folder / self.path.partition("?")[0].strip("/")
        if self.server.busy > 0:
            self.server.busy -= 1
            self.send_error(503)
            return
        if not path.is_file():
            self.send_error(404)
            return
        data, code = path.read_bytes(), 200
        piece = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if piece and self.server.pieces:
            last = int(piece[2]) + 1 if piece[2] else len(data)
            data, code = data[int(piece[1]) : last], 206
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", str(path.stat().st_mtime_ns))
        self.end_headers()
        if body:
            cut = self.server.break_after
            self.wfile.write(data if cut is None else data[:cut])
            if cut is not None and len(data) > cut:
                self.close_connection = True


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Three shards of 26 pictures on a server, and no waiting between tries."""
    write_set(tmp_path / "web", [10, 9, 7], sizes=[(40, 40)])
    monkeypatch.setattr("train.data.transport._FIRST_WAIT_S", 0.001)
    server = Server(tmp_path / "web")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def config(shards: str, **values: object) -> DataConfig:
    return DataConfig(**{"shards": shards, "batch_size": 4, "size": 32, **values})


def keys(data_config: DataConfig, count: int, start: int = 0) -> list[list[str]]:
    loader = open_data(data_config).loader_from(start, 0, 1)
    return [batch.keys for batch in itertools.islice(loader, count)]


@pytest.mark.parametrize("mode", ["exact", "resampled"])
@pytest.mark.parametrize("workers", [0, 1])
def test_shards_of_a_server_give_the_batches_of_the_same_files(served, mode, workers):
    web = config(served.url + "/{00000..00002}.tar", mode=mode, workers=workers)
    files = config(f"{served.folder}/*.tar", mode=mode, workers=workers)
    assert keys(web, 9) == keys(files, 9)
    assert keys(web, 9)[5:] == keys(web, 4, start=5)


def test_an_index_beside_the_shards_of_a_server_is_used(served, tmp_path, monkeypatch):
    for shard in (tmp_path / "web").glob("*.tar"):
        write_beside(shard)

    def scanned(*_: object) -> None:
        raise AssertionError("a shard was looked through")

    monkeypatch.setattr("train.data.index_store.index_of", scanned)
    found = keys(config(served.url + "/{00000..00002}.tar", mode="exact"), 3)
    assert len(set(itertools.chain(*found))) == 12


def test_an_answer_that_breaks_off_goes_on_where_it_broke(served):
    whole = (served.folder / "00001.tar").read_bytes()
    served.break_after = len(whole) // 3
    with open_stream(f"{served.url}/00001.tar") as stream:
        assert stream.read() == whole
    assert served.asked.count("/00001.tar") >= 3


def test_a_busy_server_is_asked_again_and_a_missing_shard_is_named(served):
    served.busy = 2
    assert stamp(f"{served.url}/00001.tar").startswith(
        str((served.folder / "00001.tar").stat().st_size)
    )
    with pytest.raises(SourceError, match=r"/none\.tar: HTTP 404"):
        open_stream(f"{served.url}/none.tar")
    served.busy = 100
    with pytest.raises(SourceError, match="HTTP 503"):
        stamp(f"{served.url}/00001.tar")


def test_a_server_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr("train.data.transport._FIRST_WAIT_S", 0.001)
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/.*: .*refused"):
        open_data(config("http://127.0.0.1:9/a.tar", mode="exact"))


def test_exact_mode_refuses_a_server_without_pieces_and_resampled_does_not(served):
    served.pieces = False
    shards = served.url + "/{00000..00002}.tar"
    with pytest.raises(UserError, match="gives no pieces of files"):
        keys(config(shards, mode="exact"), 1)
    assert len(keys(config(shards, mode="resampled"), 3)) == 3
    assert why_whole_alone(f"{served.url}/00000.tar") == "their server gives no pieces of files"
    served.pieces = True
    assert why_whole_alone(f"{served.url}/00000.tar") is None
    assert why_whole_alone(f"{served.url}/none.tar") is None  # who opens it says so


def test_a_shard_that_vanishes_does_not_stop_a_resampled_run(served, caplog):
    shards = served.url + "/{00000..00002}.tar"
    data = open_data(config(shards, mode="resampled", block_shards=1, max_broken_share=1.0))
    (served.folder / "00002.tar").unlink()  # the probe had the first and the middle one
    seen = {
        k.split("/")[0] for b in itertools.islice(data.loader_from(0, 0, 1), 20) for k in b.keys
    }
    assert seen == {"00000", "00001"}
    assert re.search(r"a shard that can't be read: http://[^ ]*/00002\.tar: HTTP 404", caplog.text)


def test_passwords_and_signatures_are_sent_and_never_shown(served):
    address = served.url.replace("//", "//me:secret@") + "/00000.tar?X-Signature=abc"
    stamp(address)
    assert served.authorized[-1] == "Basic bWU6c2VjcmV0"
    assert served.asked[-1].endswith("?X-Signature=abc")
    assert "secret" not in shown(address) and "abc" not in shown(address)
    missing = address.replace("00000", "none")
    with pytest.raises(SourceError) as caught:
        stamp(missing)
    assert "secret" not in str(caught.value) and "abc" not in str(caught.value)
    assert shard_title(address) == "00000"


def test_check_reads_a_server_s_shards(served, capsys):
    code = main(["check", served.url + "/{00000..00002}.tar", "--size", "32", "--samples", "5"])
    assert code == 0
    assert "3, the first 5 samples of each" in capsys.readouterr().out


def test_a_command_is_refused_without_the_flag_and_never_run(tmp_path, several_shapes, capsys):
    ran = tmp_path / "ran"
    shards = f"pipe:touch {ran}; cat {several_shapes.replace('*', '00004')}"
    for mode in ("exact", "resampled"):
        with pytest.raises(UserError, match=r"would run a command; .*allow_pipe"):
            open_data(config(shards, mode=mode))
    assert run_main(lambda: main(["check", shards, "--size", "32"])) == 2
    command = ["precompute", "--shards", shards, "--shards-out", str(tmp_path / "o")]
    assert run_main(lambda: main([*command, "--size", "32", "--text", "x"])) == 2
    assert capsys.readouterr().err.count("would run a command") >= 1
    assert not ran.exists()
    with pytest.raises(UserError, match=r"from its beginning; use data\.mode resampled"):
        open_data(config(shards, mode="exact", allow_pipe=True))
    assert len(keys(config(shards, mode="resampled", allow_pipe=True), 3)) == 3
    assert ran.exists()


def test_a_command_that_fails_is_named():
    with pytest.raises(UserError, match=r"pipe:exit 3: the command failed \(3\)"):
        open_data(config("pipe:exit 3", mode="resampled", allow_pipe=True))


def test_objects_are_read_through_fsspec(several_shapes):
    import fsspec

    files = fsspec.filesystem("memory")
    for name in expand_shards(several_shapes):
        files.pipe(f"/bucket/{Path(name).name}", Path(name).read_bytes())
    assert len(expand_shards("memory://bucket/*.tar")) == 5
    for mode in ("exact", "resampled"):
        ours = keys(config("memory://bucket/*.tar", mode=mode), 6)
        assert ours == keys(config(several_shapes, mode=mode), 6)


def test_pieces_of_objects_are_asked_for_as_s3fs_takes_them(monkeypatch):
    class Bucket:
        """Its arguments are those of s3fs: not the same as of fsspec's own file systems."""

        def cat_file(self, path, version_id=None, start=None, end=None):
            assert version_id is None
            return bytes(range(100))[start:end]

    monkeypatch.setattr("train.data.sources._filesystem", lambda address: Bucket())
    assert PieceReader().read("s3://b/a.tar", 3, 4) == bytes([3, 4, 5, 6])


def test_a_packed_shard_is_unpacked_where_it_is_read_whole(several_shapes, tmp_path):
    [plain] = expand_shards(several_shapes.replace("*", "00004"))
    packed = tmp_path / "00004.tar.gz"
    packed.write_bytes(gzip.compress(Path(plain).read_bytes()))
    with fetched(str(packed)) as file:
        assert file.read() == Path(plain).read_bytes()
    assert keys(config(str(packed), mode="resampled"), 3) == keys(
        config(plain, mode="resampled"), 3
    )
    with pytest.raises(UserError, match="not a whole tar file: it is no tar file"):
        open_data(config(str(packed), mode="exact"))


def test_pieces_are_read_with_few_files_open(several_shapes):
    reader, files = PieceReader(max_open=2), expand_shards(several_shapes)
    for name in files * 2:
        assert reader.read(name, 3, 5) == Path(name).read_bytes()[3:8]
        assert len(reader._files) <= 2
    with pytest.raises(SourceError, match="has changed since it was indexed"):
        reader.read(files[0], 10**9, 5)


def test_patterns_addresses_and_names():
    assert expand_shards("http://x/{08..10}.tar::pipe:cat {1..2}") == [
        "http://x/08.tar", "http://x/09.tar", "http://x/10.tar", "pipe:cat 1", "pipe:cat 2"
    ]  # fmt: skip
    with pytest.raises(UserError, match="twice; name each shard once"):
        expand_shards("http://x/a.tar::http://x/a.tar")
    with pytest.raises(UserError, match="addresses of kind ftp:// are not read"):
        scheme_of("ftp://x/a.tar")
    assert sibling("http://u:p@x/d/a.tar?k=1", "b") == "http://u:p@x/d/b?k=1"
    assert sibling("/d/a.tar", "b") == "/d/b"
    assert sibling("pipe:cat x", "b") is None


def test_a_changed_shard_is_indexed_anew(tmp_path):
    shards = write_set(tmp_path / "a", [8], sizes=[(40, 40)])
    assert open_data(config(shards, mode="exact")).digest
    first = keys(config(shards, mode="exact"), 2)
    write_set(tmp_path / "a", [12], sizes=[(40, 40)])
    assert {k for b in keys(config(shards, mode="exact"), 3) for k in b} > {
        k for b in first for k in b
    }
