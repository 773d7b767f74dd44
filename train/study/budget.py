"""Arms under one budget: plans, runs, judges and reports; the same command goes on after a stop.

A study's folder holds ``study.yaml`` (what was asked), ``inputs.json`` (what its files held),
``plan.json``, a folder for each budget, arm and seed with its runs, their logs and what was judged,
``results.jsonl`` with one row for each moment, and the report.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cascade.checkpoints.files import atomic_write_text, read_metadata
from cascade.checkpoints.hub import is_hub_name
from cascade.config import to_dict
from cascade.errors import UserError
from cascade.evaluate.results import check_alike
from cascade.pipelines.placement import pick_device
from train.callbacks.export import export_folder
from train.run_lock import held
from train.settings import EXPORT_KEYS
from train.study.checks import check_study
from train.study.folder import (
    FREE,
    INPUTS_FILE,
    JUDGED,
    PLAN_FILE,
    RESULTS_FILE,
    ROWS_FILE,
    RUNS,
    STUDY_FILE,
    as_asked,
    check_same_study,
    is_finished,
    join,
    read_own,
)
from train.study.judge import judge
from train.study.plan import (
    SHARED,
    ArmPlan,
    ArmRates,
    Moment,
    calibrate,
    check_warmup,
    plan_arm,
    plan_lines,
    rates_of_samples,
)
from train.study.provenance import commit, inputs_of, machine, trained_by
from train.study.report import write_report
from train.study.settings import ArmConfig, StudyConfig, arm_folder
from train.study.spent import Spent, read_ledger, spent_by_command, spent_until
from train.study.steps import Commands, Places, StepFailedError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One arm with one budget and one seed."""

    arm: ArmConfig
    amount: float
    seed: int
    plan: ArmPlan
    places: Places
    why: str | None = None
    """Why it can't even be tried; None: it was."""

    @property
    def rows_file(self) -> Path:
        """Where its rows are when it is finished or has failed."""
        return self.places.here / ROWS_FILE


@dataclass(frozen=True)
class Kind:
    """What a kind of study adds to one of budgets."""

    asked: Mapping[str, object]
    """All that was asked, as plain values, which the folder keeps."""
    judge_more: Callable[[Run, Path, Commands], dict[str, Any]]
    """Further columns of a row, of the run and the model's folder."""
    report: Callable[[Sequence[Mapping[str, Any]], Path, Mapping[str, Mapping[str, str]]], None]
    """Writes the report: rows, the study's folder, what given weights had cost."""


def budget_kind(config: StudyConfig) -> Kind:
    """Return the kind of a study that compares arms, and no more."""
    return Kind(
        to_dict(config),
        lambda run, model, commands: {},
        lambda rows, out, given: write_report(config, rows, out, given=given),
    )


def run_study(
    config: StudyConfig,
    out: Path,
    *,
    dry_run: bool = False,
    kind: Kind | None = None,
    others: Sequence[Path] = (),
) -> int:
    """Run a study, or go on with it; print its plan, write its report.

    Args:
        config: The study.
        out: Its folder.
        dry_run: Print the plan and stop.
        kind: What it is beside a study of budgets; None: no more than that.
        others: Folders of the same study whose finished runs are taken first; see ``join``.

    Returns:
        How many runs have failed.

    Raises:
        UserError: The folder, or another one, holds another study, or the budget buys nothing.
        StudyStoppedError: SIGTERM; what was done stays.
    """
    kind = kind or budget_kind(config)
    check_study(config)  # what is missing is told before anything is trained
    _given(config)
    _refuse_foreign(out)
    with held(out, "runs a study", "--out"):
        return _run_held(config, out, kind, others, dry_run=dry_run)


def _run_held(
    config: StudyConfig, out: Path, kind: Kind, others: Sequence[Path], *, dry_run: bool
) -> int:
    """Run a study in a folder that no other process works in."""
    _claim(kind.asked, out)
    _claim_inputs(config, out)
    for other in others:
        check_same_study(out, other)
    commands = Commands(config.launcher)
    with commands.listening():
        rates, why = _rates(config, out, commands, tried=dry_run)
        tried = [arm for arm in config.arms if arm.name in rates]
        plans = {
            amount: {
                arm.name: plan_arm(arm, amount, config.budget, rates[arm.name], config.evaluate_at)
                for arm in tried
            }
            for amount in config.budget.amounts
        }
        for by_arm in plans.values():
            for arm in tried:
                check_warmup(arm, by_arm[arm.name])
        lines = plan_lines(config, plans, rates)
        lines += [f"{name} can't be tried: {reason}" for name, reason in why.items()]
        print("\n".join(lines), flush=True)
        if dry_run:
            return len(why)
        _keep_plan(out / PLAN_FILE, plans)
        trainings = {step.name for arm in config.arms for step in arm.steps if step.train}
        for other in others:
            _log.info("%s: %d runs taken", other, join(out, other, trainings))
        runs = list(_runs(config, out, plans, why))
        for run in runs:
            # What failed, of a full disk or a missing file, is tried again where it stopped.
            if not is_finished(run.rows_file):
                _one(config, run, out, commands, kind)
                _collect(config, out, runs, kind)
    rows = _collect(config, out, runs, kind)
    failed = {(row["arm"], row["budget"], row["seed"]) for row in rows if row["status"] == "failed"}
    return len(failed)


def _refuse_foreign(out: Path) -> None:
    """Refuse a folder that holds what is no study's.

    Raises:
        UserError: Saying what to do.
    """
    if (out / STUDY_FILE).is_file() or not out.is_dir():
        return
    if any(one.name != SHARED and not one.name.startswith(".") for one in out.iterdir()):
        raise UserError(
            f"{out}: holds something else than {SHARED}, what was made for a study beforehand; "
            "choose a new folder with --out"
        )


def _claim(values: Mapping[str, object], out: Path) -> None:
    """Note what is asked; refuse a folder in which something else was asked."""
    file = out / STUDY_FILE
    if file.is_file():
        earlier = read_own(file, yaml.safe_load)
        free = {*FREE, *_free_so_far(out)}
        for key, value in values.items():
            if key not in free and as_asked(earlier.get(key)) != as_asked(value):
                raise UserError(
                    f"{out} holds a study with another {key}; go on with the configuration that "
                    "it was started with, or choose another --out"
                )
    atomic_write_text(file, yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))


def _free_so_far(out: Path) -> list[str]:
    """Return the keys that may still change: what nothing that is here was made by."""
    free = []
    if not (out / RUNS).exists():
        free += ["budget", "evaluate_at"]
        (out / PLAN_FILE).unlink(missing_ok=True)  # of other amounts
    if not any((out / RUNS).glob(f"*/*/*/{JUDGED}/*/results.jsonl")):
        free.append("judge")
    return free


def _claim_inputs(config: StudyConfig, out: Path) -> None:
    """Note what the study's files hold; refuse to go on when one holds something else by now.

    Raises:
        UserError: Naming the file.
    """
    file, found = out / INPUTS_FILE, inputs_of(config)
    if file.is_file():
        earlier = read_own(file, json.loads)
        # What is there and not among them was the judge's, and that may have changed.
        named = [path for path in earlier if path in found or not Path(path).exists()]
        changed = [path for path in named if found.get(path) != earlier[path]]
        if changed:
            raise UserError(
                f"{changed[0]}: has changed since the study in {out} was begun, whose runs would "
                "not compare; put it back, or choose another --out"
            )
    atomic_write_text(file, json.dumps(found, indent=1) + "\n")


def _rates(
    config: StudyConfig, out: Path, commands: Commands, *, tried: bool
) -> tuple[dict[str, ArmRates], dict[str, str]]:
    """Return what the steps of each arm take, and of others why they can't be tried.

    A budget of samples needs no trying.

    Raises:
        UserError: No arm can be tried.
    """
    if config.budget.unit == "samples" and not tried:
        return {arm.name: rates_of_samples(arm) for arm in config.arms}, {}
    found: dict[str, ArmRates] = {}
    why: dict[str, str] = {}
    for arm in config.arms:
        try:
            found[arm.name] = calibrate(config, arm, out, commands)
        except StepFailedError as error:
            _log.error("%s can't be tried: %s", arm.name, error)
            why[arm.name] = str(error)
    if not found:
        name, reason = next(iter(why.items()))
        raise UserError(f"no arm can be tried, the first, {name}, not for this: {reason}")
    return found, why


def _keep_plan(file: Path, plans: Mapping[float, Mapping[str, ArmPlan]]) -> None:
    """Note the plan; one that was noted before is what the study goes on with."""
    values = {
        f"{amount:g}": {name: to_dict(plan) for name, plan in by_arm.items()}
        for amount, by_arm in plans.items()
    }
    if file.is_file():
        earlier = read_own(file, json.loads)
        for amount, by_arm in earlier.items():
            again = values.get(amount, {})
            if any(again.get(name, plan) != plan for name, plan in by_arm.items()):
                raise UserError(
                    f"{file}: was made with other training configurations than there are now; "
                    "choose another --out"
                )
            # One that could not be tried before, or not now, is no contradiction.
            values[amount] = {**by_arm, **again}
    atomic_write_text(file, json.dumps(values, indent=2) + "\n")


def _runs(
    config: StudyConfig,
    out: Path,
    plans: Mapping[float, Mapping[str, ArmPlan]],
    why: Mapping[str, str],
) -> Iterator[Run]:
    """Yield all runs, seed by seed: a study that is cut short has all arms."""
    nothing = ArmPlan({}, tuple(Moment(fraction, None) for fraction in config.evaluate_at))
    for seed in config.seeds:
        for amount in config.budget.amounts:
            for arm in config.arms:
                here = out / RUNS / f"{amount:g}" / arm_folder(arm.name) / f"seed_{seed}"
                places = Places(here, out / SHARED, seed)
                plan = plans[amount].get(arm.name, nothing)
                yield Run(arm, amount, seed, plan, places, why.get(arm.name))


def _one(config: StudyConfig, run: Run, out: Path, commands: Commands, kind: Kind) -> None:
    """Train an arm, judge its moments, keep the rows; a failure is a row as well."""
    spent, teacher, taught = Spent(), Spent(), Spent()
    rows: list[dict[str, Any]] = []
    try:
        if run.why is not None:
            raise StepFailedError(run.why)
        for step in run.arm.steps:
            if step.command is not None:
                seconds = commands.other(run.arm, step, run.places)
                written = step.set.get("out")
                places = run.places.of(step)
                folder = None if written is None else Path(places.fill(written))
                cost = spent_by_command(folder, seconds)
                counted = step.cost == "teacher" and config.budget.teacher == "counted"
                if step.cost == "teacher":
                    teacher += cost
                if counted:
                    spent += cost
                elif step.cost == "arm":  # what a budget of operations leaves free is 0 of them
                    spent += replace(cost, flops=cost.flops or 0.0)
                continue
            steps = run.plan.steps[step.name]
            options: dict[str, Any] = {"run.max_steps": steps}
            if step is run.arm.last:
                options["run.export_at_steps"] = list(run.plan.exports)
            folder = commands.train(run.arm, step, run.places, options)
            if step is not run.arm.last:
                rows_so_far = read_ledger(folder)
                spent += spent_until(rows_so_far)
                taught += spent_until(rows_so_far, whose="teacher")
        ledger = read_ledger(run.places.here / run.arm.last.name)
        for moment in run.plan.moments:
            upto = moment.step or 0
            cost = spent + spent_until(ledger, upto)
            asked = taught + spent_until(ledger, upto, whose="teacher")
            if config.budget.teacher == "counted":
                cost += asked
            row = {
                **_row(config, run, moment),
                "spent": to_dict(cost),
                "teacher": to_dict(teacher + asked),
            }
            if moment.step is not None:
                row |= _judged(config, run, moment, out, commands, kind)
            rows.append(row)
    except StepFailedError as error:
        _log.error("%s, seed %d: failed: %s", run.arm.name, run.seed, error)
        done = {row["fraction"] for row in rows}
        rows += [
            {**_row(config, run, moment), "status": "failed", "why": str(error)}
            for moment in run.plan.moments
            if moment.fraction not in done
        ]
    run.places.here.mkdir(parents=True, exist_ok=True)
    atomic_write_text(run.rows_file, json.dumps(rows, indent=1) + "\n")


def _row(config: StudyConfig, run: Run, moment: Moment) -> dict[str, Any]:
    return {
        "study": config.name,
        "arm": run.arm.name,
        "unit": config.budget.unit,
        "budget": run.amount,
        "seed": run.seed,
        "fraction": moment.fraction,
        "step": moment.step,
        "status": "no model yet" if moment.step is None else "judged",
        "commit": commit(),
        "machine": machine(pick_device(config.device)),
        "trained": trained_by(run.places.here / step.name for step in run.arm.steps if step.train),
    }


def _judged(
    config: StudyConfig, run: Run, moment: Moment, out: Path, commands: Commands, kind: Kind
) -> dict[str, Any]:
    """Return what the protocol says of what a run had learned at a moment."""
    assert moment.step is not None
    weights = export_folder(run.places.here / run.arm.last.name, moment.step)
    judged = run.places.here / JUDGED / f"{moment.fraction:g}"
    commands.assemble(run.arm.model, run.places, weights, judged / "model")
    found = judge(config, judged, run.places.shared, commands)
    found["pictures"] = str(Path(found["pictures"]).relative_to(out))
    return found | kind.judge_more(run, judged / "model", commands)


def _collect(config: StudyConfig, out: Path, runs: list[Run], kind: Kind) -> list[dict[str, Any]]:
    """Write what there is: the rows, and the report of them."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        if run.rows_file.is_file():
            rows += json.loads(run.rows_file.read_text(encoding="utf-8"))
    judged = [row for row in rows if row["status"] == "judged"]
    check_alike(judged, [f"{row['arm']}, seed {row['seed']}" for row in judged])
    atomic_write_text(out / RESULTS_FILE, "".join(json.dumps(row) + "\n" for row in rows))
    kind.report(rows, out, _given(config))
    return rows


def _given(config: StudyConfig) -> dict[str, dict[str, str]]:
    """Return what the weights that arms are given had cost, by file, as the files say."""
    found = {}
    for arm in config.arms:
        for path in arm.given:
            # What the hub's weights have cost is said by no file, nor by an archive of torch.
            silent = is_hub_name(path) or Path(path).suffix != ".safetensors"
            said = {} if silent else read_metadata(Path(path))
            found[path] = {key: said[key] for key in EXPORT_KEYS if key in said}
    return found
