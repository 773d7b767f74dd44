"""Which files of a repository make a model: no more than it needs, and each network once.

Only names are looked at. Published repositories hold each network in several sizes, number formats
and file formats, and the authors' own large files beside the folders of diffusers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from cascade.errors import HoldsNone, UserError

Part = Literal[
    "stage_a",
    "stage_b",
    "stage_c",
    "compressor",
    "previewer",
    "text",
    "image_encoder",
    "unet",
    "autoencoder_kl",
]
"""What can be wanted of a cascade, or of a pipeline of SD or SDXL, by itself."""
OWN_SETTINGS = "model.json"
CONVERTED_SETTINGS = "cascade.json"
_OWN_NETWORKS = (
    "stage_a",
    "stage_b",
    "stage_c",
    "compressor",
    "previewer",
    "stage_a_fast",
    "stage_b_few",
    "stage_c_few",
)
_OWN_NEEDED = ("stage_a", "stage_b", "stage_c")
_SINGLE_FILES = ("effnet_encoder", "previewer")
"""The authors' files that diffusers has no folder for."""

_ROLES = {
    "prior": "prior",
    "prior_prior": "prior",
    "prior_lite": "prior_lite",
    "prior_prior_lite": "prior_lite",
    "decoder": "decoder",
    "decoder_lite": "decoder_lite",
    "vqgan": "vqgan",
    "text_encoder": "text_encoder",
    "prior_text_encoder": "text_encoder",
    "tokenizer": "tokenizer",
    "prior_tokenizer": "tokenizer",
    "image_encoder": "image_encoder",
    "prior_image_encoder": "image_encoder",
    "feature_extractor": "feature_extractor",
    "prior_feature_extractor": "feature_extractor",
}
"""What the folders of diffusers' pipelines are for, by the last part of their path."""
_SIZED = ("prior", "decoder")
_NEEDED = ("prior", "decoder", "vqgan", "text_encoder", "tokenizer")
_TAKEN_IF_THERE = ("image_encoder", "feature_extractor")
"""What variations of a picture need; of Würstchen v2 there is none."""
_WITHOUT_WEIGHTS = ("tokenizer", "feature_extractor")
_PART_ROLES: dict[Part, tuple[str, ...]] = {
    "stage_a": ("vqgan",),
    "stage_b": ("decoder",),
    "stage_c": ("prior",),
    "text": ("text_encoder", "tokenizer"),
    "image_encoder": ("image_encoder", "feature_extractor"),
}
_PART_FILES: dict[Part, str] = {
    "compressor": "effnet_encoder.safetensors",
    "previewer": "previewer.safetensors",
}
_OWN_FOLDERS: dict[Part, tuple[str, ...]] = {
    "text": ("text", "text_b"),
    "image_encoder": ("image_encoder", "text"),
}
_MAX_DEPTH = 2
_SETTINGS_SUFFIXES = {".json", ".txt"}

_UNET_NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
_UNET_FOLDERS = (*_UNET_NETWORKS, "tokenizer", "tokenizer_2", "scheduler")
_UNET_PARTS: dict[Part, tuple[str, ...]] = {
    "unet": ("unet",),
    "autoencoder_kl": ("vae",),
    "text": ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
}
_UNET_NEEDED = ("unet", "vae", "text_encoder", "tokenizer")
"""Folders of diffusers' pipelines of SD and SDXL."""

_SHARD = r"(?:-\d{5}-of-(?P<count>\d{5}))?"
_WEIGHTS = re.compile(
    rf"(?P<base>[^.]+?)(?:\.(?P<mark>[^.]+?))?{_SHARD}(?:\.(?P<late>[^.]+))?"
    r"\.(?P<format>safetensors|bin)"
)
_INDEX = re.compile(
    r"(?P<base>[^.]+)\.(?P<format>safetensors|bin)\.index(?:\.(?P<mark>[^.]+))?\.json"
)


@dataclass(frozen=True)
class _Set:
    """Files that are one network's weights together, or ought to be."""

    files: tuple[str, ...]
    mark: str
    """The variant, such as "bf16"; empty if the names bear none."""
    pickled: bool
    sharded: bool
    whole: bool


def choose(
    repositories: Sequence[Mapping[str, str]],
    where: str,
    *,
    lite: bool = False,
    variant: str | None = None,
    part: Part | None = None,
) -> list[list[str]]:
    """Choose the files of a cascade, which may lie in several repositories, or of a U-Net.

    Args:
        repositories: For each, the paths of its files with what identifies their content (equal
            values are equal files), or an empty string where that is not known.
        where: The model's name; errors begin with it.
        lite: Take the smaller stages.
        variant: Take weights with this mark in their names where there are any; else the unmarked.
        part: Take this part alone; None: the whole cascade.

    Returns:
        The chosen paths of each repository.

    Raises:
        UserError: If that is no such model, or there is no such size or variant.
    """
    if len(repositories) == 1 and _is_unet(repositories[0]):
        names = _choose_unet(repositories[0], where, lite=lite, variant=variant)
        if part is None:
            return [names]
        folders_of_part = _UNET_PARTS.get(part, ())
        if not folders_of_part:
            raise HoldsNone(f"{where}: a U-Net's pipeline, which has no {part}")
        return [[name for name in names if _parent(name) in folders_of_part]]
    if part in ("unet", "autoencoder_kl"):
        folder = _UNET_PARTS[part][0]
        raise UserError(
            f"{where}: no folder {folder} beside a model_index.json, as diffusers has it"
        )
    if any(OWN_SETTINGS in files for files in repositories):
        if lite or variant is not None:
            asked = ":lite" if lite else f"variant {variant!r}"
            raise UserError(f"{where}: its stages come in one size and variant; leave {asked} out")
        return [_choose_own(files, where, part) for files in repositories]
    if part in _PART_FILES:
        name = _PART_FILES[part]
        if not any(name in files for files in repositories):
            raise HoldsNone(f"{where}: no {name} in it; name the file that holds the {part}")
        return [[name] if name in files else [] for files in repositories]
    folders = [_folders(files) for files in repositories]
    roles = {role for one in folders for role in one.values()}
    if part is None and not roles & {"prior", "decoder", "prior_lite", "decoder_lite"}:
        raise UserError(
            f"{where}: neither {OWN_SETTINGS} nor diffusers' folders prior and decoder in it; "
            "download the files that you mean with `hf download` and name their folder"
        )
    named = _NEEDED if part is None else _PART_ROLES[part]
    needed = {f"{role}_lite" if lite and role in _SIZED else role for role in named}
    _check_roles(needed, roles, where, lite)
    wanted = {*needed, *_TAKEN_IF_THERE} if part is None else needed

    chosen: list[list[str]] = []
    marks: set[str] = set()
    known_texts: set[tuple[str, ...]] = set()
    for files, own in zip(repositories, folders, strict=True):
        names = [name for name in files if "/" not in name and part is None and _is_extra(name)]
        for folder, role in own.items():
            if role not in wanted:
                continue
            inside = [name for name in files if _parent(name) == folder]
            sets = _weight_sets(inside)
            marks |= {one.mark for one in sets}
            if role not in _WITHOUT_WEIGHTS:
                best = _best(sets, variant, f"{where}: {folder}")
                content = tuple(sorted(files[name] for name in best.files))
                if role == "text_encoder" and all(content):
                    if content in known_texts:
                        continue  # the same encoder in both repositories
                    known_texts.add(content)
                names += best.files
            names += [name for name in inside if _is_settings(name)]
        chosen.append(sorted(names))
    if variant is not None and variant not in marks:
        others = ", ".join(sorted(marks - {""})) or "none but the unmarked one"
        raise UserError(f"{where}: no variant {variant!r} in it; it has: {others}")
    return chosen


def _is_unet(files: Iterable[str]) -> bool:
    return any(name.startswith("unet/") for name in files) and "model_index.json" in files


def _choose_unet(
    files: Mapping[str, str], where: str, *, lite: bool, variant: str | None
) -> list[str]:
    """Choose the files of a pipeline of SD or SDXL; safety checkers and the like stay there."""
    if lite:
        raise UserError(f"{where}: a U-Net, which has no smaller stages; leave :lite out")
    names = [name for name in files if "/" not in name and _is_unet_top(name)]
    marks: set[str] = set()
    for folder in _UNET_FOLDERS:
        inside = [name for name in files if _parent(name) == folder]
        if folder in _UNET_NETWORKS and inside:
            # Flax and others beside them have formats of their own; ONNX lies deeper.
            sets = [one for one in _weight_sets(inside) if not _is_foreign(one)]
            marks |= {one.mark for one in sets}
            names += _best(sets, variant, f"{where}: {folder}").files
        names += [name for name in inside if _is_settings(name)]
    there = {_parent(name) for name in names}
    # A single text encoder of SDXL's kind is the second.
    missing = [one for one in _UNET_NEEDED if not there & {one, f"{one}_2"}]
    if missing:
        raise UserError(f"{where}: no {' and no '.join(missing)} in it, which a U-Net needs")
    if variant is not None and variant not in marks:
        others = ", ".join(sorted(marks - {""})) or "none but the unmarked one"
        raise UserError(f"{where}: no variant {variant!r} in it; it has: {others}")
    return sorted(names)


def _is_foreign(one: _Set) -> bool:
    bases = ("diffusion_pytorch_model", "model", "pytorch_model")
    return not all(
        PurePosixPath(name).name.split(".")[0].split("-")[0] in bases for name in one.files
    )


def _is_unet_top(name: str) -> bool:
    return name in ("model_index.json", "pipeline.json") or _is_licence(name)


def _choose_own(files: Mapping[str, str], where: str, part: Part | None) -> list[str]:
    networks = [f"{name}.safetensors" for name in _OWN_NETWORKS]
    if part is not None:
        folders = _OWN_FOLDERS.get(part, ())
        chosen = [n for n in files if n == f"{part}.safetensors" or _parent(n) in folders]
        if not chosen:
            raise UserError(f"{where}: no {part} beside its {OWN_SETTINGS}")
        return sorted(chosen)
    missing = [name for name in networks[: len(_OWN_NEEDED)] if name not in files]
    if missing:
        raise UserError(f"{where}: no {' and no '.join(missing)} beside its {OWN_SETTINGS}")
    texts = [
        name
        for name in files
        if _parent(name) in ("text", "text_b")
        and PurePosixPath(name).suffix in {".safetensors", *_SETTINGS_SUFFIXES}
    ]
    tops = [name for name in files if name in (OWN_SETTINGS, *networks) or _is_licence(name)]
    return sorted([*tops, *texts])


def _check_roles(wanted: set[str], roles: set[str], where: str, lite: bool) -> None:
    missing = sorted(wanted - roles)
    if not missing:
        return
    sized = [role for role in missing if role.removesuffix("_lite") in _SIZED]
    if sized and lite and {role.removesuffix("_lite") for role in sized} <= roles:
        raise UserError(f"{where}: no smaller stages in it; leave :lite out")
    if sized and not lite and {f"{role}_lite" for role in sized} <= roles:
        raise UserError(f"{where}: only the smaller {' and '.join(sized)} in it; add :lite")
    raise UserError(
        f"{where}: no {' and no '.join(missing)} in it, which a cascade needs; if another "
        "repository has it, download both with `hf download` into one folder and name that"
    )


def _folders(files: Iterable[str]) -> dict[str, str]:
    """Return the folders that are parts of pipelines, and what each is for."""
    inside: dict[str, list[str]] = defaultdict(list)
    for name in files:
        inside[_parent(name)].append(name)
    found = {}
    for folder in sorted(inside):
        parts = PurePosixPath(folder).parts
        role = _ROLES.get(parts[-1]) if 0 < len(parts) <= _MAX_DEPTH else None
        # In a folder that holds a whole pipeline, "prior" may also name that pipeline's folder.
        if role is not None and (role in _WITHOUT_WEIGHTS or _weight_sets(inside[folder])):
            found[folder] = role
    return found


def _weight_sets(names: Iterable[str]) -> list[_Set]:
    """Sort the weights of one folder by variant, format, and whether they are in shards."""
    groups: dict[tuple[str, str, str, bool], list[str]] = defaultdict(list)
    counts: dict[tuple[str, str, str, bool], int] = {}
    for name in names:
        plain = PurePosixPath(name).name
        index, weights = _INDEX.fullmatch(plain), _WEIGHTS.fullmatch(plain)
        match = index or weights
        if match is None:
            continue
        parts = match.groupdict()
        count = parts.get("count")
        mark = parts["mark"] or parts.get("late") or ""
        key = (parts["base"], mark, parts["format"], index is not None or count is not None)
        groups[key].append(name)
        if count is not None:
            counts[key] = int(count)
    return [
        _Set(
            files=tuple(sorted(files)),
            mark=mark,
            pickled=file_format == "bin",
            sharded=sharded,
            whole=not sharded or len(files) == counts.get((base, mark, file_format, True), -1) + 1,
        )
        for (base, mark, file_format, sharded), files in groups.items()
    ]


def _best(sets: Sequence[_Set], variant: str | None, where: str) -> _Set:
    """Choose safetensors before pickles, the wanted variant before the unmarked one and others."""
    whole = [one for one in sets if one.whole]
    if not whole:
        raise UserError(f"{where}: not all parts of its weights are there; download them again")
    return min(
        whole,
        key=lambda one: (
            one.pickled,
            one.mark != (variant or ""),
            one.mark != "",
            one.mark,
            one.sharded,
            one.files,
        ),
    )


def _parent(name: str) -> str:
    return name.rpartition("/")[0]


def _is_settings(name: str) -> bool:
    plain = PurePosixPath(name).name
    return PurePosixPath(name).suffix in _SETTINGS_SUFFIXES and not _INDEX.fullmatch(plain)


def _is_licence(name: str) -> bool:
    return name.upper().startswith(("LICENSE", "LICENCE"))


def _is_extra(name: str) -> bool:
    singles = {f"{single}.safetensors" for single in _SINGLE_FILES}
    settings = ("model_index.json", CONVERTED_SETTINGS)
    return name in settings or name in singles or _is_licence(name)
