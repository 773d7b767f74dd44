"""A study's folder: what lies where in it, and runs made in another one of the same study.

Seeds can be trained on several machines, each into a folder of its own, and joined: a run's rows
hold all that a report needs of it. What was judged comes with them where it is there; trainings
with their checkpoints stay where they are. Of a study whose arms have changed since, those that
are the same can be joined.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import yaml

from cascade.checkpoints.files import atomic_path, atomic_write_text
from cascade.errors import UserError
from train.study.settings import arm_folder

_log = logging.getLogger(__name__)

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
        other: A folder of the same study. Other seeds are no other study, nor are other arms,
            as long as one is the same.

    Raises:
        UserError: It holds another study, or one whose files held something else.
    """
    if not (other / STUDY_FILE).is_file():
        raise UserError(f"--join {other}: there is no {STUDY_FILE} in it; name a study's folder")
    here, there = (read_own(one / STUDY_FILE, yaml.safe_load) for one in (out, other))
    for key in sorted({*here, *there} - {*FREE, "seeds", "arms"}):
        if as_asked(here.get(key)) != as_asked(there.get(key)):
            raise UserError(
                f"--join {other}: it is a study with another {key} than {out}; only other seeds "
                "of the same one can be joined"
            )
    same, _ = _arms_of_both(out, other)
    if not same:
        raise UserError(
            f"--join {other}: none of its arms is one of {out}, by name and by what is done; "
            "nothing of it can be joined"
        )
    _check_note(out, other)


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
    same, unlike = _arms_of_both(out, other)
    for name in unlike:
        _log.warning("%s: its arm '%s' is another one; no run of it is taken", other, name)
    _check_plan(out, other, same)
    folders = {arm_folder(name) for name in same}
    taken = 0
    for rows_file in sorted((other / RUNS).glob(f"*/*/seed_*/{ROWS_FILE}")):
        place = out / RUNS / rows_file.parent.relative_to(other / RUNS)
        if rows_file.parent.parent.name not in folders:
            continue
        if is_finished(rows_file) and not is_finished(place / ROWS_FILE):
            _take(rows_file, place, trainings)
            taken += 1
    return taken


def _arms_of_both(out: Path, other: Path) -> tuple[list[str], list[str]]:
    """Return the arms in which the same is done here and there, and those that differ."""
    here, there = (_arms(read_own(one / STUDY_FILE, yaml.safe_load)) for one in (out, other))
    same = [name for name in there if here.get(name) == there[name]]
    return same, [name for name in there if name not in same]


def _arms(asked: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the arms by name, without what only describes them."""
    arms = asked.get("arms") or ()
    return {
        arm["name"]: {key: value for key, value in arm.items() if key != "description"}
        for arm in arms
    }


def _check_note(out: Path, other: Path) -> None:
    """Refuse a folder for whose runs a file of both held something else."""
    here, there = (read_own(one / INPUTS_FILE, json.loads) for one in (out, other))
    for key in sorted(here.keys() & there.keys()):
        if here[key] != there[key]:
            raise UserError(
                f"--join {other}: {key} in {INPUTS_FILE} held something else there than in {out}, "
                "whose runs would not compare"
            )


def _check_plan(out: Path, other: Path, arms: Collection[str]) -> None:
    """Refuse a folder in which one of these arms was planned otherwise."""
    here, there = (read_own(one / PLAN_FILE, json.loads) for one in (out, other))
    for amount in here.keys() & there.keys():
        for name in arms:
            plans = [plan[amount].get(name) for plan in (here, there)]
            if None not in plans and plans[0] != plans[1]:
                raise UserError(
                    f"--join {other}: '{name}' with {amount} in {PLAN_FILE} is planned otherwise "
                    f"than in {out}, whose runs would not compare"
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
