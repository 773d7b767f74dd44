"""A study's folder: what lies where in it, and runs made in another one of the same study.

Seeds can be trained on several machines, each into a folder of its own, and joined: a run's rows
hold all that a report needs of it. What was judged comes with them where it is there; trainings
with their checkpoints stay where they are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import yaml

from cascade.checkpoints.files import atomic_path, atomic_write_text
from cascade.errors import UserError

STUDY_FILE = "study.yaml"
PLAN_FILE = "plan.json"
INPUTS_FILE = "inputs.json"
RESULTS_FILE = "results.jsonl"
ROWS_FILE = "rows.json"
RUNS, JUDGED = "runs", "judged"
FREE = ("description", "headline", "price_per_device_hour", "grid_prompts", "device", "launcher")
"""Keys that may change between two starts: they decide nothing that was measured."""


def read_own(file: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Read a file that a study has written.

    Raises:
        UserError: It is not there, or somebody else has written it, or has cut it off.
    """
    try:
        values = parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: can't be read: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())
        raise UserError(f"{file}: can't be read any more: {told}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: holds no mapping any more; put the study's own back")
    return values


def as_asked(value: object) -> object:
    """Return what a key asks; what starts its judges decides nothing that is measured."""
    if isinstance(value, dict) and "launcher" in value:
        return {key: one for key, one in value.items() if key != "launcher"}
    return value


def is_finished(rows_file: Path) -> bool:
    """Return whether a run has its rows, and none that failed."""
    if not rows_file.is_file():
        return False
    try:
        rows = json.loads(rows_file.read_text(encoding="utf-8"))
        return all(row["status"] != "failed" for row in rows)
    except (ValueError, TypeError, KeyError):
        return False  # they are made again of what the run has left


def check_same_study(out: Path, other: Path) -> None:
    """Refuse to join another study; that can be told before anything is tried.

    Args:
        out: The study's folder, with its notes.
        other: A folder of the same study; other seeds are no other study.

    Raises:
        UserError: It holds another study, or one whose files held something else.
    """
    if not (other / STUDY_FILE).is_file():
        raise UserError(f"--join {other}: there is no {STUDY_FILE} in it; name a study's folder")
    here, there = (read_own(one / STUDY_FILE, yaml.safe_load) for one in (out, other))
    for key in sorted({*here, *there} - {*FREE, "seeds"}):
        if as_asked(here.get(key)) != as_asked(there.get(key)):
            raise UserError(
                f"--join {other}: it is a study with another {key} than {out}; only other seeds "
                "of the same one can be joined"
            )
    _check_note(out, other, INPUTS_FILE, "held something else there")


def join(out: Path, other: Path, trainings: Collection[str]) -> int:
    """Take the finished runs of another folder that this one has not; what is there stays.

    Args:
        out: The study's folder, with its plan.
        other: A folder of the same study: see ``check_same_study``.
        trainings: Names of the folders in a run that are left behind.

    Returns:
        How many were taken.

    Raises:
        UserError: Its plan was another.
    """
    _check_note(out, other, PLAN_FILE, "is another there")
    taken = 0
    for rows_file in sorted((other / RUNS).glob(f"*/*/seed_*/{ROWS_FILE}")):
        place = out / RUNS / rows_file.parent.relative_to(other / RUNS)
        if is_finished(rows_file) and not is_finished(place / ROWS_FILE):
            _take(rows_file, place, trainings)
            taken += 1
    return taken


def _check_note(out: Path, other: Path, name: str, what: str) -> None:
    """Refuse a folder in which something that both have noted differs."""
    here, there = (read_own(one / name, json.loads) for one in (out, other))
    for key in sorted(here.keys() & there.keys()):
        if here[key] != there[key]:
            raise UserError(
                f"--join {other}: {key} in {name} {what} than in {out}, whose runs would not "
                "compare"
            )


def _take(rows_file: Path, place: Path, trainings: Collection[str]) -> None:
    """Copy a run, its rows last: with them it counts as made."""
    place.mkdir(parents=True, exist_ok=True)
    for one in rows_file.parent.iterdir():
        if one.is_dir() and one.name not in trainings:
            shutil.copytree(one, place / one.name, dirs_exist_ok=True)
        elif one.is_file() and one != rows_file:
            with atomic_path(place / one.name) as temporary:
                shutil.copyfile(one, temporary)
    atomic_write_text(place / rows_file.name, rows_file.read_text(encoding="utf-8"))
