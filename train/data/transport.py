"""How bytes of a shard come here: http answers that go on where they broke, output of commands."""

from __future__ import annotations

import base64
import http.client
import io
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from cascade.errors import UserError, describe_os_error

PIPE = "pipe:"
_TRIES = 4
_TIMEOUT_S = 60.0
_FIRST_WAIT_S = 0.5
_PASSING = (408, 425, 429, 500, 502, 503, 504)
"""HTTP answers that another try may change."""

T = TypeVar("T")


class SourceError(UserError):
    """A shard that can't be read; the line names it."""


class NoPiecesError(SourceError):
    """A server that sends whole files alone."""


def shown(address: str) -> str:
    """Return an address without user, password and query."""
    if "://" not in address or address.startswith(PIPE):
        return address
    parts = urlsplit(address)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def retried(address: str, action: Callable[[], T]) -> T:
    """Do it; when the network fails, wait and try again a few times."""
    wait_s = _FIRST_WAIT_S
    for left in reversed(range(_TRIES)):
        try:
            return action()
        except SourceError:
            raise
        except urllib.error.HTTPError as error:
            error.close()
            if not left or error.code not in _PASSING:
                raise SourceError(f"{shown(address)}: HTTP {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException) as error:
            local = "://" not in address or isinstance(error, FileNotFoundError)
            if local or not left:
                reason = describe_os_error(error) if isinstance(error, OSError) else None
                said = str(getattr(error, "reason", error)) or repr(error)
                reason = reason.split(": ", 1)[-1] if reason else said
                raise SourceError(f"{shown(address)}: {reason}") from error
        time.sleep(wait_s)
        wait_s *= 2
    raise AssertionError("the last try returns or raises")


def request(address: str, *, method: str = "GET", piece: str | None = None) -> Any:
    """Send an http request.

    Args:
        address: May hold ``user:password@``.
        method: GET or HEAD.
        piece: The range of bytes that is wanted, such as ``0-99`` or ``100-``.

    Raises:
        SourceError: The server gives no pieces.
    """
    parts = urlsplit(address)
    login, _, host = parts.netloc.rpartition("@")
    sent = urllib.request.Request(urlunsplit(parts._replace(netloc=host)), method=method)
    if login:
        word = base64.b64encode(unquote(login).encode()).decode()
        sent.add_header("Authorization", f"Basic {word}")
    if piece is not None:
        sent.add_header("Range", f"bytes={piece}")
    answer = urllib.request.urlopen(sent, timeout=_TIMEOUT_S)
    if piece is not None and answer.status != http.client.PARTIAL_CONTENT:
        answer.close()
        raise NoPiecesError(
            f"{shown(address)}: the server gives no pieces of files, which data.mode exact and a "
            "broken connection need; use resampled, or another server"
        )
    return answer


def request_piece(address: str, offset: int, length: int) -> bytes:
    """Return a piece of an http file."""
    with request(address, piece=f"{offset}-{offset + length - 1}") as answer:
        return answer.read()


class Download(io.RawIOBase):
    """An http answer's body; a connection that breaks is opened again where it broke."""

    def __init__(self, address: str) -> None:
        """Open ``address``."""
        super().__init__()
        self.address = address
        self.position = 0
        self.answer: Any = retried(address, lambda: request(address))
        length = self.answer.headers.get("Content-Length")
        self.length = int(length) if length is not None else None

    def readable(self) -> bool:
        """Return that it is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer."""
        count = retried(self.address, lambda: self._read(buffer))
        self.position += count
        return count

    def _read(self, buffer: Any) -> int:
        if self.answer is None:
            piece = f"{self.position}-" if self.position else None
            self.answer = request(self.address, piece=piece)
        try:
            count = self.answer.readinto(buffer)
            if not count and self.length is not None and self.position < self.length:
                raise ConnectionError(f"broke off at byte {self.position} of {self.length}")
        except (OSError, http.client.HTTPException):
            self.answer.close()
            self.answer = None
            raise
        return count

    def close(self) -> None:
        """Close the connection."""
        if not self.closed and self.answer is not None:
            self.answer.close()
        super().close()


class Command(io.RawIOBase):
    """What a shell command prints; its failure is one of reading."""

    def __init__(self, address: str) -> None:
        """Open ``address``."""
        super().__init__()
        self.address = address
        self.process = subprocess.Popen(
            address[len(PIPE) :],
            shell=True,
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is ours: the step in hand still needs its batch
        )

    def readable(self) -> bool:
        """Return that it is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer.

        Raises:
            SourceError: The command failed.
        """
        assert self.process.stdout is not None, "Popen was given a pipe"
        data = self.process.stdout.read(len(buffer))
        buffer[: len(data)] = data
        if not data and self.process.wait() != 0:
            raise SourceError(f"{self.address}: the command failed ({self.process.returncode})")
        return len(data)

    def close(self) -> None:
        """End the command if it still runs."""
        if not self.closed:
            assert self.process.stdout is not None, "Popen was given a pipe"
            self.process.stdout.close()
            self.process.terminate()
            self.process.wait()
        super().close()
