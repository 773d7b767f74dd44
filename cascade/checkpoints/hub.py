"""From what the user calls a model to folders on this disk."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cascade.checkpoints.hub_choice import Part, choose
from cascade.checkpoints.hub_errors import NoAnswer, NotThere
from cascade.checkpoints.hub_fetch import Listing, fetch, list_files
from cascade.config import did_you_mean
from cascade.errors import UserError

_log = logging.getLogger(__name__)

COMPANIONS = {
    "stabilityai/stable-cascade": "stabilityai/stable-cascade-prior",
    "warp-ai/wuerstchen": "warp-ai/wuerstchen-prior",
}
"""Cascades that are published as two repositories: Stages B and A, and Stage C."""

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NAME = re.compile(rf"(?P<id>{_ID.pattern})(?P<lite>:lite)?(?:@(?P<revision>.+))?")
_REVISION = re.compile(r"(?!.*\.\.)\w[\w./-]*")
_LITE = ":lite"
_WITHOUT_VARIANTS = ("latent.json", "pipeline.json")
"""Settings of models that are written here, whose networks have one file each."""


@dataclass(frozen=True)
class ModelFiles:
    """Where the files of one model are."""

    folders: tuple[Path, ...]
    lite: bool = False
    """Of stages in several sizes the smaller ones are meant."""
    files: frozenset[Path] | None = None
    """Only these belong to the model; None: whatever is found in the folders."""

    @property
    def where(self) -> str:
        """The folders, for messages."""
        return " and ".join(str(folder) for folder in self.folders)


def refuse_lite(files: ModelFiles, what: str) -> None:
    """Refuse ``:lite`` behind the name of a model that has one size.

    Raises:
        UserError: It was given.
    """
    if files.lite:
        raise UserError(f"{files.where}: {what}, which has no smaller stages; leave :lite out")


def resolve(
    model: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    lite: bool = False,
    part: Part | None = None,
) -> ModelFiles:
    """Find the files of a model; the network is touched only for a hub id.

    Args:
        model: A folder, a single file of SD or SDXL, or a name on the Hugging Face hub as
            ``organisation/name``; folders and names with ``:lite`` at the end for the smaller
            stages, and a name with ``@revision`` after that. What could be both is a folder if
            its first part exists as one.
        revision: A branch, tag or commit on the hub. Of a model in two repositories it pins the
            named one, and ``first,second`` pins both.
        variant: The mark of a set of weights, such as "bf16"; None: the unmarked one.
        lite: As ``:lite``.
        part: Of a model on the hub, download this part alone.

    Raises:
        UserError: If there is no such model, or the download fails.
    """
    if not str(model).strip():
        raise UserError("model: the name is empty; name a folder, a file or organisation/name")
    if (file := _local_file(model)) is not None:
        if revision is not None or variant is not None or lite:
            raise UserError(f"{model}: a file here, which has no revision, variant or size")
        return ModelFiles((file.parent,), files=frozenset({file}))
    folder = _local_folder(model)
    if folder is None and str(model).endswith(_LITE) and str(model) != _LITE:
        folder = _local_folder(str(model).removesuffix(_LITE))
        lite = lite or folder is not None
    if folder is not None:
        if revision is not None:
            raise UserError(f"{model}: a folder here, which has no revision {revision!r}")
        return _choose_local(folder, lite, variant)
    match = _NAME.fullmatch(str(model))
    if match is None or not is_hub_name(model):
        raise UserError(
            f"{model}: no such folder; name a model's folder, or a hub id as organisation/name"
            f"{did_you_mean(str(model), COMPANIONS)}"
        )
    named = match["revision"]
    if None not in (named, revision) and named != revision:
        raise UserError(f"{model}: names one revision, and revision={revision!r} another")
    lite = lite or match["lite"] is not None
    return _from_hub(match["id"], named or revision, variant, lite, part)


def is_hub_name(model: str | Path) -> bool:
    """Return whether a name that is no folder here can only mean a model on the hub."""
    if isinstance(model, Path) or _NAME.fullmatch(model) is None:
        return False
    return not Path(Path(model).parts[0]).exists()


def _local_file(model: str | Path) -> Path | None:
    """Return the file of weights that a model is named by."""
    path = Path(model)
    return path if path.suffix in (".safetensors", ".ckpt") and path.is_file() else None


def _local_folder(model: str | Path) -> Path | None:
    try:
        path = Path(model).expanduser()
    except RuntimeError as error:  # the home of nobody
        raise UserError(f"{model}: no such user's home folder; check the path") from error
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(
            f"{model}: a file, but neither .safetensors nor .ckpt; name a model's folder, or a "
            "single file of a U-Net's model"
        )
    return None


def _choose_local(folder: Path, lite: bool, variant: str | None) -> ModelFiles:
    if variant is None:
        return ModelFiles((folder,), lite)
    has_index = (folder / "model_index.json").is_file()
    if not has_index and any((folder / name).is_file() for name in _WITHOUT_VARIANTS):
        raise UserError(f"{folder}: its files have no variants; leave variant {variant!r} out")
    paths = [*folder.glob("*"), *folder.glob("*/*"), *folder.glob("*/*/*")]
    names = {path.relative_to(folder).as_posix(): "" for path in paths if path.is_file()}
    [chosen] = choose([names], str(folder), lite=lite, variant=variant)
    return ModelFiles((folder,), lite, frozenset(folder / name for name in chosen))


def _from_hub(
    name: str, revision: str | None, variant: str | None, lite: bool, part: Part | None
) -> ModelFiles:
    names = _repositories(name)
    revisions = dict(zip(names, _revisions(name, names, revision), strict=True))
    # In one order, whichever is named: of equal files the same repository's is taken.
    listings = _list(name, {one: revisions[one] for one in sorted(names)}, whole=part is None)
    contents = [
        {path: file.identity for path, file in listing.files.items()} for listing in listings
    ]
    try:
        chosen = choose(contents, name, lite=lite, variant=variant, part=part)
    except UserError as error:
        if not any(listing.is_cached for listing in listings):
            raise
        raise UserError(
            f"{error} (as far as the cache has it: the hub was not asked, or did not answer)"
        ) from error
    for listing, paths in zip(listings, chosen, strict=True):
        fetch(listing, paths)
    pairs = list(zip(listings, chosen, strict=True))
    files = frozenset(listing.folder / path for listing, paths in pairs for path in paths)
    # Of a part, the other repository may have nothing, and no folder here.
    folders = tuple(listing.folder for listing, paths in pairs if paths or part is None)
    return ModelFiles(folders, lite, files)


def _repositories(name: str) -> list[str]:
    """Return all repositories of a model, the named one first."""
    both = {**COMPANIONS, **{prior: decoder for decoder, prior in COMPANIONS.items()}}
    return [name, both[name]] if name in both else [name]


def _revisions(name: str, names: Sequence[str], revision: str | None) -> list[str | None]:
    if revision is None:
        return [None] * len(names)
    parts: list[str | None] = list(revision.split(","))
    for part in parts:
        if not _REVISION.fullmatch(part or ""):
            raise UserError(f"{name}: revision {part!r}: name a branch, a tag or a commit")
    if len(parts) > len(names):
        raise UserError(
            f"{name}: {len(parts)} revisions, and it is in {len(names)} "
            f"{'repository' if len(names) == 1 else 'repositories'}"
        )
    for other in names[len(parts) :]:
        _log.warning("%s is not pinned; pin both as revision %s,REVISION", other, revision)
    return parts + [None] * (len(names) - len(parts))


def _list(name: str, revisions: Mapping[str, str | None], *, whole: bool) -> list[Listing]:
    """List all repositories of a model; for a part of it, those that can be listed will do."""
    try:
        listings, silent = [], None
        for pair in revisions.items():
            try:
                listings.append(list_files(*pair))
            except NoAnswer as error:
                silent = error
        if silent is not None and (whole or not listings):
            raise silent
        return listings
    except NotThere as error:
        raise UserError(f"{error}{did_you_mean(name, COMPANIONS)}") from error
    # Whatever goes wrong (no network, offline mode, a proxy's answer) has the same way out.
    except NoAnswer as error:
        single = len(revisions) == 1
        commands = " and ".join(
            f"`hf download {one} --local-dir FOLDER{'' if single else '/' + one.split('/')[1]}`"
            for one in revisions
        )
        raise UserError(
            f"{name}: not a folder here, and the hub gave nothing ({error}); to go on offline, "
            f"fetch it elsewhere with {commands}, copy FOLDER here and name it, or leave the model "
            "out"
        ) from error
