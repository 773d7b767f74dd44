"""Brings files from the Hugging Face hub into its cache on this disk, through huggingface_hub.

The cache's layout is huggingface_hub's own, so that other programs share it. Large files are kept
while they are incomplete, whatever interrupts them, and enter the cache only when their hash is the
one that the hub names.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cascade.checkpoints.hub_errors import NoAnswer, endpoint, explain, host, one_line, status_of
from cascade.errors import UserError

_log = logging.getLogger(__name__)

DEFAULT_REVISION = "main"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TIMEOUT_S = 10.0
_SERVER_AT_FAULT = {408, 425, 429, 500, 502, 503, 504}
_TRUE = {"1", "ON", "YES", "TRUE"}
_BLOCK = 1 << 22


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository, as the hub lists it; of a cached one only the identity is known."""

    size: int | None = None
    sha256: str | None = None
    """SHA-256 of the content, for large files."""
    identity: str = ""
    """Equal for files of equal content; empty if unknown."""


@dataclass(frozen=True)
class Listing:
    """What a repository holds at one commit."""

    name: str
    commit: str
    revision: str
    files: dict[str, RemoteFile]
    is_cached: bool
    """Read from this disk, because the hub was not or could not be asked."""

    @property
    def folder(self) -> Path:
        """Where the cache has the files of this commit."""
        return _storage(self.name) / "snapshots" / self.commit


def list_files(name: str, revision: str | None) -> Listing:
    """List a repository's files: as the hub has them, or without it, as the cache has.

    Raises:
        NoAnswer: If there is neither a hub nor a copy in the cache.
        UserError: If the hub has no such repository or revision, or refuses it.
    """
    revision = revision or DEFAULT_REVISION
    if is_offline():
        cached = _cached_listing(name, revision)
        if cached is None:
            raise NoAnswer("HF_HUB_OFFLINE is set, and the cache does not hold it")
        return cached

    from huggingface_hub import HfApi  # heavy, and rarely needed
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi(endpoint=endpoint()).model_info(
            name, revision=revision, files_metadata=True, timeout=_TIMEOUT_S
        )
    except Exception as error:  # the hub's client raises errors of many libraries
        refused = isinstance(error, HfHubHTTPError) and status_of(error) not in _SERVER_AT_FAULT
        if refused:
            raise explain(error, name, revision) from error
        cached = _cached_listing(name, revision)
        if cached is None:
            raise NoAnswer(f"{type(error).__name__}: {one_line(error)}") from error
        _log.warning("%s: the hub does not answer; the copy in the cache is used", name)
        return cached
    if not _COMMIT.fullmatch(info.sha or ""):
        raise UserError(f"{name}: {host()} does not answer as a hub does; check HF_ENDPOINT")
    files = {}
    for sibling in info.siblings or []:
        sha256 = sibling.lfs.sha256 if sibling.lfs is not None else None
        if sha256 is not None and not _SHA256.fullmatch(sha256):
            raise UserError(f"{name}: the hub lists {sibling.rfilename} with a malformed hash")
        identity = sha256 or sibling.blob_id or ""
        files[sibling.rfilename] = RemoteFile(sibling.size, sha256, identity)
    assert info.sha is not None  # matched above
    return Listing(name, info.sha, revision, files, is_cached=False)


def fetch(listing: Listing, paths: Sequence[str]) -> None:
    """Bring files into the cache, those that are not there; a bar shows each on a terminal.

    Raises:
        UserError: If the hub refuses, the connection breaks, a hash is wrong, or the disk is full.
    """
    if listing.is_cached:
        return
    missing = [path for path in paths if not _is_whole(listing, path)]
    with _explained(listing):
        _check_space(listing, missing)
        for path in missing:
            _fetch_file(listing, path)
        # Only now: without the hub, a revision's name leads to a commit that is here as a whole.
        _remember(listing)


def is_offline() -> bool:
    """Return whether the user has forbidden connections to the hub."""
    from huggingface_hub import constants

    named = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return constants.HF_HUB_OFFLINE or any(value.upper() in _TRUE for value in named)


def _is_whole(listing: Listing, path: str) -> bool:
    """Return whether a file is in the cache; one of a wrong size is removed from it."""
    local, size = listing.folder / path, listing.files[path].size
    if not local.is_file():
        return False
    if size is None or local.stat().st_size == size:
        return True
    _log.warning("%s: %s is damaged in the cache; it is downloaded again", listing.name, path)
    local.resolve().unlink()
    local.unlink(missing_ok=True)
    return False


def _fetch_file(listing: Listing, path: str) -> None:
    from huggingface_hub import hf_hub_download

    if listing.files[path].sha256 is not None:
        _fetch_large(listing, path)
    # Small files are downloaded; of a large one that is there this makes the name that leads to it.
    local = hf_hub_download(
        listing.name, path, revision=listing.commit, endpoint=endpoint(), etag_timeout=_TIMEOUT_S
    )
    size = listing.files[path].size
    if size is not None and Path(local).stat().st_size != size:
        Path(local).resolve().unlink()
        Path(local).unlink(missing_ok=True)
        raise UserError(
            f"{listing.name}: {path} came with another size than the hub lists; it was removed "
            "from the cache; run the same command again"
        )


def _fetch_large(listing: Listing, path: str) -> None:
    """Download a file with a known hash, from where an earlier attempt stopped.

    huggingface_hub 1 and later throw an incomplete file away when their process ends.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    file = listing.files[path]
    assert file.sha256 is not None, f"{path} has no hash"
    storage = _storage(listing.name)
    blob = storage / "blobs" / file.sha256
    partial = blob.with_name(f"{file.sha256}.incomplete")
    lock = storage.parent / ".locks" / storage.name / f"{file.sha256}.lock"
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.is_file() and (file.size is None or blob.stat().st_size == file.size):
            return
        url = hf_hub_url(listing.name, path, revision=listing.commit, endpoint=endpoint())
        with open(partial, "ab") as output:
            if file.size is not None and output.tell() > file.size:
                output.truncate(0)
                output.seek(0)
            if file.size is None or output.tell() < file.size:
                http_get(
                    url,
                    output,
                    resume_size=output.tell(),
                    headers={**build_hf_headers(), "Accept-Encoding": "identity"},
                    expected_size=file.size,
                    displayed_filename=path,
                )
        found = _sha256(partial)
        if found != file.sha256:
            partial.unlink()
            raise UserError(
                f"{listing.name}: {path} has the wrong hash ({found[:12]}, where the hub says "
                f"{file.sha256[:12]}); it was removed; run the same command again, and if it "
                "comes back, something on the way to the hub changes files"
            )
        os.replace(partial, blob)


def _check_space(listing: Listing, paths: Sequence[str]) -> None:
    """Refuse at once what the disk can not hold."""
    storage = _storage(listing.name)
    needed = 0
    for file in {listing.files[path] for path in paths}:
        partial = storage / "blobs" / f"{file.sha256}.incomplete"
        there = partial.stat().st_size if file.sha256 and partial.is_file() else 0
        needed += max(0, (file.size or 0) - there)
    place = storage
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{listing.name}: {needed / 1e9:.1f} GB are to be downloaded, and {free / 1e9:.1f} GB "
            f"are free at {place}; free some space, or set HF_HOME to a folder on another disk"
        )


def _remember(listing: Listing) -> None:
    """Note in the cache which commit a branch or tag is."""
    if listing.revision == listing.commit:
        return
    reference = _storage(listing.name) / "refs" / listing.revision
    if reference.is_file() and reference.read_text() == listing.commit:
        return
    reference.parent.mkdir(parents=True, exist_ok=True)
    temporary = reference.with_name(f"{reference.name}.{os.getpid()}.tmp")
    temporary.write_text(listing.commit)
    os.replace(temporary, reference)


def _cached_listing(name: str, revision: str) -> Listing | None:
    """List what the cache has of a repository; None if it has nothing of that revision."""
    storage = _storage(name)
    commit = revision
    if not _COMMIT.fullmatch(revision):
        reference = storage / "refs" / revision
        if not reference.is_file():
            return None
        commit = reference.read_text().strip()
    folder = storage / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not folder.is_dir():
        return None
    files = {
        path.relative_to(folder).as_posix(): RemoteFile(identity=path.resolve().name)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return Listing(name, commit, revision, files, is_cached=True) if files else None


@contextmanager
def _explained(listing: Listing) -> Iterator[None]:
    """Turn what goes wrong during a download into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the hub's client raises errors of many libraries
        raise explain(error, listing.name, listing.revision) from error


def _storage(name: str) -> Path:
    """Return the cache's folder of a repository."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{name.replace('/', '--')}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
