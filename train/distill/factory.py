"""The data factory: a teacher's pictures of many prompts as shards, by any number of processes.

The set is cut into shards beforehand: shard ``n`` holds the pictures ``n * shard_size`` and so on,
whoever makes it. A process makes every so-many-th shard; each is written under a temporary name,
renamed, and then vouched for by ``NAME-000000.done.json``. A process that is killed loses the shard
that it was in, and the same command, with as many processes as one likes, makes those that are not
done: nothing is there twice and nothing is missing. Whoever finds the set whole leaves out what an
earlier shard has to the pixel. ``generated.json`` says what the pictures
depend on; a folder with another set is refused.

Reference: route A of distillation between latent spaces; BK-SDM, KOALA and EdgeFusion
(arXiv:2404.11925) train on teachers' pictures.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tarfile
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cascade.checkpoints.files import atomic_path
from cascade.errors import UserError
from cascade.evaluate.generate import (
    Item,
    PictureMaker,
    Refused,
    item_seed,
)
from cascade.evaluate.training_cost import LEDGER_FILE
from cascade.launchers import Part
from cascade.pipelines.results import CascadePicture, Picture, UNetPicture
from train.data.beside import write_beside
from train.data.members import CAPTION_KEY, DRAWN_KEY, LATENT_KEYS, METADATA_KEY, array_bytes
from train.data.shards import shard_name
from train.data.write import add_member
from train.distill.generate_config import GenerateConfig
from train.distill.generated_set import (
    TWIN,
    claim,
    done_file,
    flat,
    is_done,
    refuse_twins,
    write_done,
)
from train.distill.prompts import read_prompts
from train.distill.teacher_cost import PictureCost, TeacherLedger, measure_cost
from train.encode import FrozenPaths
from train.study.provenance import commit

_log = logging.getLogger(__name__)

_ENCODERS = 4
_AHEAD = 16
_HOPELESS = 16
_JPEG = {"quality": 95, "subsampling": 0}


@dataclass
class FactoryReport:
    """What a process has done, and how far the set is."""

    shards: int = 0
    samples: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    done_before: int = 0
    """Shards of this process that were there."""


class Factory:
    """One process of the factory."""

    def __init__(self, config: GenerateConfig, part: Part) -> None:
        """Read the prompts and find the teacher; its networks are not loaded yet.

        Raises:
            UserError: One of them is not there, or the teacher can't make what is asked.
        """
        self.config = config
        self.part = part
        self.prompts = read_prompts(config.prompts, config.column, config.limit, config.shuffle)
        self.maker = PictureMaker(config.maker(part.device(config.device)))
        self.latents = _latent_hashes(config, self.maker) if config.keep_latents else {}
        self.out = Path(config.out)
        self._commit = commit()

    @property
    def num_pictures(self) -> int:
        """Pictures of the whole set."""
        return len(self.prompts) * self.config.pictures_per_prompt

    @property
    def num_shards(self) -> int:
        """Shards of the whole set."""
        return -(-self.num_pictures // self.config.shard_size)

    def items(self, shard: int) -> list[Item]:
        """Return the pictures of a shard."""
        size, each = self.config.shard_size, self.config.pictures_per_prompt
        found = []
        for number in range(shard * size, min((shard + 1) * size, self.num_pictures)):
            prompt, again = self.prompts[number // each], number % each
            seed = item_seed(self.config.seed, prompt, again)
            found.append(Item(f"{self.config.name}-{number:08d}", prompt, seed))
        return found

    def settings(self) -> dict[str, object]:
        """Return all that the set depends on."""
        digest = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()[:12]
        config = self.config
        return {
            **flat(self.maker.settings()),
            "prompts": f"{len(self.prompts)} ({digest})",
            "pictures_per_prompt": config.pictures_per_prompt,
            "seed": config.seed,
            "picture_format": config.format,
            "shard_size": config.shard_size,
            "keep_latents": config.keep_latents,
            "name": config.name,
        }

    def run(self) -> FactoryReport:
        """Make this process's shards that are not done.

        Raises:
            UserError: The folder holds another set, the teacher does not fit together, or makes
                nothing that can be used.
        """
        self._claim()
        report = FactoryReport()
        waiting = []
        for number in self.part.of(range(self.num_shards)):
            if is_done(self._target(number)):
                report.done_before += 1
            else:
                waiting.append(number)
        if waiting:
            self._make(waiting, report)
        report.refused[TWIN] += refuse_twins(self.out, self.config.name, self.num_shards)
        report.refused = +report.refused
        return report

    def _make(self, waiting: list[int], report: FactoryReport) -> None:
        ledger = TeacherLedger(self.out / LEDGER_FILE, self.maker.weights_hash)
        device = self.maker.load().device
        ledger.begin(measure_cost(self.maker, self.items(waiting[0])[0], timed=False), device)
        for number in waiting:
            self._make_shard(number, report, ledger)

    def estimate(self) -> tuple[PictureCost, int]:
        """Make a picture, or two; return what one takes, and its bytes with all members."""
        item = self.items(0)[0]
        cost = measure_cost(self.maker, item, timed=True)
        [(_, made)] = self.maker.make([item], batch_size=1)
        if isinstance(made, Refused):
            raise UserError(f"{self.config.teacher}: its first picture has {made.reason}")
        return cost, sum(len(data) for _, data in self._members(item, made).members)

    def _claim(self) -> None:
        """Make the folder this set's, or refuse one that is another's."""
        self.out.mkdir(parents=True, exist_ok=True)
        described = {
            "settings": self.settings(),
            "teacher": self.maker.spec.name,
            "licence": self.maker.spec.licence,
            "pictures": self.num_pictures,
            "shards": self.num_shards,
        }
        claim(self.out, described)

    def _target(self, shard: int) -> Path:
        return shard_name(self.out, self.config.name, shard)

    def _make_shard(self, shard: int, report: FactoryReport, ledger: TeacherLedger) -> None:
        target = self._target(shard)
        for name in (target.name, done_file(target).name):
            for old in target.parent.glob(f".{name[:32]}.*.tmp"):
                old.unlink(missing_ok=True)  # of a process that was killed
        refused: dict[str, list[str]] = {}
        kept: dict[str, str] = {}
        with (
            atomic_path(target) as temporary,
            tarfile.open(temporary, "w") as tar,
            ThreadPoolExecutor(_ENCODERS) as pool,
        ):
            for item, made in self._encoded(shard, ledger, pool):
                reason = made.reason if isinstance(made, Refused) else None
                if isinstance(made, _Sample):
                    twin = kept.get(made.digest)
                    if twin is None:
                        kept[made.digest] = item.key
                        for name, data in made.members:
                            add_member(tar, name, data)
                    else:
                        reason = TWIN
                ledger.count(refused=reason is not None)
                if reason is not None:
                    refused.setdefault(reason, []).append(item.key)
                    report.refused[reason] += 1
                    self._require_hope(report, len(kept))
                ledger.write_row(target.stem, if_due=True)
        write_beside(target)
        write_done(target, kept, refused)
        ledger.write_row(target.stem)
        report.shards += 1
        report.samples += len(kept)
        count = sum(map(len, refused.values()))
        _log.info("wrote %s: %d pictures%s", target, len(kept), f", {count} refused" * bool(count))

    def _require_hope(self, report: FactoryReport, kept: int) -> None:
        """Stop at a teacher that makes nothing."""
        if report.samples + kept == 0 and report.refused.total() >= _HOPELESS:
            reasons = ", ".join(f"{n} {reason}" for reason, n in report.refused.most_common())
            raise UserError(
                f"{self.config.teacher}: its first {report.refused.total()} pictures are of no use "
                f"({reasons}); look at some with sample.py"
            )

    def _encoded(
        self, shard: int, ledger: TeacherLedger, pool: ThreadPoolExecutor
    ) -> Iterator[tuple[Item, _Sample | Refused]]:
        """Yield samples in their order; files of pictures are made while the teacher draws."""
        coming: deque[tuple[Item, Future[_Sample] | Refused]] = deque()
        pictures = self.maker.make(self.items(shard), batch_size=self.config.batch_size)
        while True:
            with ledger.within("teacher"):
                found = next(pictures, None)
            if found is not None:
                item, made = found
                bad = isinstance(made, Refused)
                coming.append((item, made if bad else pool.submit(self._members, item, made)))  # type: ignore[arg-type]
            while coming and (found is None or len(coming) > _AHEAD):
                item, sample = coming.popleft()
                yield item, sample if isinstance(sample, Refused) else sample.result()
            if found is None:
                return

    def _members(self, item: Item, picture: Picture) -> _Sample:
        """Return what a sample consists of."""
        config = self.config
        buffer = io.BytesIO()
        if config.format == "png":
            picture.image.save(buffer, format="PNG", compress_level=6)
        else:
            picture.image.save(buffer, format="JPEG", **_JPEG)
        row: dict[str, object] = {
            "captions": [item.prompt],
            "made_by": {
                "teacher": picture.metadata["model"],
                "weights": picture.metadata["model_hash"],
                "licence": self.maker.spec.licence,
                "commit": self._commit,
                "prompt": item.prompt,
                "negative_prompt": picture.metadata["negative_prompt"],
                "seed": item.seed,
                "settings": json.loads(picture.metadata["settings"]),
            },
        }
        members = [(f"{item.key}.{config.format}", buffer.getvalue())]
        if self.latents:
            row[DRAWN_KEY] = self.latents
            for name, latents in _latents_of(picture).items():
                stored = latents.half()
                if not bool(torch.isfinite(stored).all()):
                    raise UserError(
                        f"{item.key}: {name} would hold values that are not finite in float16; "
                        "leave out --keep-latents"
                    )
                members.append((f"{item.key}.{LATENT_KEYS[name]}", array_bytes(stored.numpy())))
        members.append((f"{item.key}.{CAPTION_KEY}", item.prompt.encode()))
        members.append((f"{item.key}.{METADATA_KEY}", json.dumps(row, sort_keys=True).encode()))
        digest = hashlib.sha256(picture.image.tobytes()).hexdigest()[:16]
        return _Sample(digest, members)


@dataclass(frozen=True)
class _Sample:
    digest: str
    """Of the picture's pixels."""
    members: list[tuple[str, bytes]]


def _latents_of(picture: Picture) -> dict[str, Tensor]:
    """Return what a teacher drew, by the parts of a cache that it is."""
    if isinstance(picture, UNetPicture):
        return {"autoencoder_mean": picture.latents}
    assert isinstance(picture, CascadePicture), "pictures are of a U-Net or of a cascade"
    return {
        "stage_a_latents": picture.stage_b_latents,
        "stage_c_latents": picture.stage_c_latents,
    }


def _latent_hashes(config: GenerateConfig, maker: PictureMaker) -> dict[str, str]:
    """Return the hashes by which ``train.data precompute`` knows the kept latents' networks."""
    if maker.is_unet:
        return FrozenPaths(autoencoder=config.teacher).hashes()
    return FrozenPaths(stage_a=config.teacher, compressor=config.teacher).hashes()
