"""What a run keeps of its data, so that a resumed one tells whether they are still the same."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from cascade.checkpoints.files import atomic_write_text
from cascade.errors import UserError
from train.data.open import TrainingData

_log = logging.getLogger(__name__)

_MAKERS = {
    "text": "the text encoder",
    "image": "CLIP's picture tower",
    "stage_a": "Stage A",
    "stage_c": "the compressor",
    "autoencoder": "the autoencoder",
    "teacher": "the teacher",
    "lesson": "the teacher",
}
"""What makes each part, for messages."""


def remember_data(data: TrainingData, out: Path, *, resume: bool) -> None:
    """Keep the data's digest with the run; say so if a resumed run sees others than it began with.

    The run goes on: more shards, or another batch size, may be what is wanted. Other frozen weights
    never are: what the network has learned to read or to imitate would mean something else.

    Raises:
        UserError: It goes on with other frozen weights than it began with.
    """
    path = out / "data.json"
    if resume and path.is_file():
        try:
            noted = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            noted = {}
        for part, earlier in (noted.get("weights") or {}).items():
            now = data.hashes.get(part, earlier)
            if now != earlier:
                raise UserError(
                    f"--resume: {_MAKERS.get(part, part)} has the weights {now} now, and "
                    f"had {earlier} when {out} began: the network has learned with those; put "
                    "them back, or start another run.out (init_from takes the trained weights over)"
                )
        if noted.get("digest") != data.digest:
            _log.warning(
                "%s: the shards or the data options have changed since this run began: from here "
                "on the order of the samples is another",
                out,
            )
    atomic_write_text(path, json.dumps({"digest": data.digest, "weights": data.hashes}) + "\n")
