"""From what the user calls a model to a folder on this disk."""

from __future__ import annotations

import re
from pathlib import Path

from cascade.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED_FILES = ("*.json", "*.safetensors", "*.md", "*.txt", "text/*")


def resolve(model: str | Path) -> Path:
    """Return the folder of a model; the network is touched only for a hub id.

    Args:
        model: A folder, or an id ``organisation/name`` of the Hugging Face hub. What could be both
            is a folder if its first part exists as one.

    Raises:
        UserError: If there is no such folder, or the download fails.
    """
    try:
        path = Path(model).expanduser()
    except RuntimeError as error:  # the home of nobody
        raise UserError(f"{model}: no such user's home folder; check the path") from error
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{model}: a file; name the model's folder")
    name = str(model)
    if isinstance(model, Path) or not _HUB_ID.fullmatch(name) or Path(path.parts[0]).exists():
        raise UserError(
            f"{model}: no such folder; name a model's folder, or a hub id as organisation/name"
        )
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download  # heavy, and rarely needed

    try:
        return Path(snapshot_download(name, allow_patterns=list(_WANTED_FILES)))
    # Whatever goes wrong (no network, offline mode, no such repository, a proxy's answer) has the
    # same way out, and the hub's client raises errors of many libraries.
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{name}: not a folder here, and the hub gave nothing ({type(error).__name__}: "
            f"{reason}); to go on offline, fetch it elsewhere with `hf download {name} "
            "--local-dir FOLDER`, copy that folder here and name it, or leave the model out"
        ) from error
