"""Where a run finds the indexes of its shards: in memory, in a folder of the user's, beside them.

An index is kept under a name made of the shard's address, size and time: a changed shard has a new
one.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import OrderedDict
from pathlib import Path

from cascade.errors import UserError
from train.data.beside import trusted_beside
from train.data.index import INDEX_VERSION, ShardIndex, index_of, load_index, save_index
from train.data.sources import open_stream, shard_title, stamp
from train.data.transport import SourceError, shown

_log = logging.getLogger(__name__)


def default_folder() -> Path:
    """Return the folder of indexes in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "cascade" / "index"


def _looked_through(address: str) -> ShardIndex:
    with open_stream(address) as stream:
        try:
            return index_of(stream)
        except OSError as error:
            raise SourceError(f"{shown(address)}: {error}") from error


class IndexStore:
    """Indexes by shard: from memory, from their folder, or made now."""

    def __init__(self, folder: Path | None, max_kept: int = 64) -> None:
        """Take the folder; at most ``max_kept`` indexes stay in memory."""
        self.folder = folder or default_folder()
        self.max_kept = max_kept
        self._kept: OrderedDict[str, ShardIndex] = OrderedDict()
        self._paths: dict[str, Path] = {}
        self._unwritable = False

    def get(self, address: str) -> ShardIndex:
        """Return a shard's index; the last few stay in memory.

        Raises:
            SourceError: The shard can't be read.
        """
        if address not in self._kept:
            self._kept[address] = self.read(address)
        self._kept.move_to_end(address)
        while len(self._kept) > self.max_kept and not self._unwritable:
            self._kept.popitem(last=False)
        return self._kept[address]

    def read(self, address: str) -> ShardIndex:
        """Return a shard's index from its folder or beside it, or make it; by any thread.

        Raises:
            SourceError: The shard can't be read.
        """
        path = self._paths.get(address) or self._path(address)
        index = load_index(path)
        if index is None:
            # What lies beside it is kept as well: looked at once, not by every worker again.
            beside = trusted_beside(address)
            index = _looked_through(address) if beside is None else beside
            self._save(index, path)
        self._paths[address] = path
        if self._unwritable:
            self._kept[address] = index
        return index

    def _path(self, address: str) -> Path:
        where = os.path.abspath(address) if "://" not in address else shown(address)
        named = f"{INDEX_VERSION}\n{where}\n{stamp(address)}"
        digest = hashlib.sha256(named.encode("utf-8", "surrogateescape")).hexdigest()[:24]
        # The title is for people who look into the folder.
        return self.folder / f"{shard_title(address)[:40]}-{digest}.npz"

    def _save(self, index: ShardIndex, path: Path) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_index(index, path)
        except (UserError, OSError) as error:
            if not self._unwritable:
                _log.warning("indexes are not kept, each start makes them again: %s", error)
            self._unwritable = True
