"""What the Hugging Face hub answers when it gives nothing, in one line that says how to go on."""

from __future__ import annotations

import errno
import os

from cascade.errors import UserError


class NoAnswer(Exception):
    """The hub can not be reached, and the cache does not hold the model."""


class NotThere(UserError):
    """The hub has no such model."""


def endpoint() -> str | None:
    """Return the hub's address if the user names one, now and not when a library was imported."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def host() -> str:
    """Return the hub's address."""
    return endpoint() or "https://huggingface.co"


def explain(error: Exception, name: str, revision: str) -> UserError:
    """Return the line that says what went wrong with a repository, and how to go on."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__  # the client says no more than that it found nothing
    cache = constants.HF_HUB_CACHE
    page = f"{host()}/{name}"
    if isinstance(error, GatedRepoError):
        return UserError(
            f"{name}: its licence must be accepted first: log in and accept it at {page}, then "
            "`hf auth login` here, and run the same command again"
        )
    if isinstance(error, RepositoryNotFoundError):
        return NotThere(
            f"{name}: the hub has no such model; check the name, or if it is a private one, "
            "`hf auth login` first"
        )
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"{name}: no revision {revision!r}; {page}/commits/main lists them")
    if isinstance(error, HfHubHTTPError):
        status = status_of(error)
        if status in (401, 403):
            return UserError(
                f"{name}: the hub refuses access ({status}); see {page}, accept its licence if it "
                "has one, and `hf auth login` with a token that may read it"
            )
        if status == 404:
            return NotThere(f"{name}: the hub has no such model or file; check the name")
        return UserError(
            f"{name}: the hub answers with an error ({status}); run the same command again later, "
            "what is downloaded is kept"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"{name}: the disk is full at {cache}; free some space, or set "
            "HF_HOME to a folder on another disk, and run the same command again: it resumes"
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"{name}: {cache} can't be written to; set HF_HOME to another folder")
    return UserError(
        f"{name}: the download was cut off ({type(error).__name__}: {one_line(error)}); run the "
        "same command again: it resumes"
    )


def status_of(error: Exception) -> int | None:
    """Return the number of an HTTP answer that is an error."""
    return getattr(getattr(error, "response", None), "status_code", None)


def one_line(error: Exception) -> str:
    """Return an error's message, cut to one line."""
    return " ".join(str(error).split())[:160]
