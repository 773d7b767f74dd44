"""What a run's folder says of the run in it: its configuration, its starts, how far it came."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from cascade.checkpoints.files import atomic_write_text, read_metadata
from cascade.config import read_yaml
from cascade.errors import UserError
from train.callbacks.checkpoints import CHECKPOINTS
from train.environment import note_start
from train.loggers import note_config
from train.rank_errors import RankErrors

CONFIG_FILE = "config.yaml"
DONE_FILE = "done"
"""In the folder of a run that came to its end."""
KIND_LINE = "# all of a {}\n"
"""First of a run's ``config.yaml``: whose configuration it is."""


@dataclass(frozen=True)
class Noted:
    """A run's configuration as its last start noted it."""

    values: dict[str, Any]
    kind: str | None
    """Name of its dataclass; None: the file does not say."""


def read_noted(out: Path) -> Noted:
    """Read the configuration of a run that goes on.

    Raises:
        UserError: It is not there, or is no configuration.
    """
    path = out / CONFIG_FILE
    if not path.is_file():
        raise UserError(
            f"{path}: not there, and the sizes of the run's network are noted in it alone; put it "
            "back, or give the sizes in the model section"
        )
    try:
        values = read_yaml(path)
    except UserError as error:
        reason = " ".join(str(error).split())  # a parser's takes several lines
        raise UserError(
            f"{reason}; put the run's own {CONFIG_FILE} back, or start another run.out (init_from "
            "takes the trained weights over)"
        ) from error
    kind = re.match(KIND_LINE.format(r"(\w+)"), path.read_text(encoding="utf-8"))
    return Noted(values, None if kind is None else kind[1])


def refuse_lost_checkpoints(out: Path, checkpoint_every_steps: int) -> None:
    """Refuse to begin anew in the folder of a run that has trained and lost its checkpoints.

    A run that was killed before its first checkpoint has lost nothing that was ever safe, and
    begins again: its folder for checkpoints is there, and an export, if any, is a first one.

    Args:
        out: The folder, in which no checkpoint is.
        checkpoint_every_steps: The run's.

    Raises:
        UserError: Naming what tells of the training.
    """
    anew = "put them back, choose another run.out (init_from takes exported weights over), or "
    anew += "remove the folder to begin anew"
    if (out / DONE_FILE).is_file():
        raise UserError(f"{out}: the run in it is done, but its checkpoints are gone; {anew}")
    if not (out / CONFIG_FILE).is_file():
        return
    for path in sorted([*out.glob("*.safetensors"), *out.glob("text/*.safetensors")]):
        try:
            steps = read_metadata(path).get("train_steps", "")
        except UserError:
            continue  # cut off: no export of ours, which appear whole
        is_first = steps.isdecimal() and int(steps) <= checkpoint_every_steps
        if steps and not (is_first and (out / CHECKPOINTS).is_dir()):
            raise UserError(
                f"{path}: holds {steps} steps of training, but the run's checkpoints are gone; "
                f"{anew}"
            )


class NoteStart(Callback):
    """Notes the configuration, the commit and the machine of a start, when all checks have passed.

    A start that is refused leaves the notes of the one before.
    """

    def __init__(self, out: Path, config: str, errors: RankErrors) -> None:
        """Take the run's folder, the text of its ``config.yaml``, and who tells of errors."""
        self.out = out
        self.config = config
        self.errors = errors

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and show them; make the folder that tells of a run without a checkpoint as yet."""
        if not trainer.is_global_zero:
            return
        with self.errors.kept():
            (self.out / CHECKPOINTS).mkdir(exist_ok=True)
            atomic_write_text(self.out / CONFIG_FILE, self.config)
            note_start(self.out)
            note_config(trainer.loggers, self.config)
