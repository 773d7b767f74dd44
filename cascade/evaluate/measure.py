"""Pictures and a protocol in, figures out: :func:`evaluate`, or a :class:`Judge` for many sets."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from cascade.errors import UserError
from cascade.evaluate.features import clip_features
from cascade.evaluate.metrics import MEASURES, Embedded, Scene, paired
from cascade.evaluate.picture_sets import Fingerprint, PictureSet, in_memory
from cascade.evaluate.prompts import Prompt, attributes_hash, hash_of, prompts_hash
from cascade.evaluate.protocol import (
    ASKING,
    BY_FEATURES,
    PAIRED,
    PROMPTED,
    REFERRED,
    Protocol,
    Resolved,
)
from cascade.evaluate.provenance import commit, machine
from cascade.evaluate.results import Results
from cascade.evaluate.yardsticks import Yardsticks

BATCH_SIZE = 32


def evaluate(
    pictures: PictureSet | Tensor,
    real: PictureSet | Tensor | None,
    protocol: Protocol,
    *,
    yardsticks: Yardsticks,
    prompts: Sequence[Prompt] = (),
    keys: Sequence[str] | None = None,
    real_keys: Sequence[str] | None = None,
    model: str = "pictures",
    batch_size: int = BATCH_SIZE,
) -> Results:
    """Measure pictures as a protocol says.

    Args:
        pictures: The set, or ``(N, 3, H, W)`` uint8 or float in [0, 1].
        real: The reference; None where no metric needs one.
        protocol: What to measure, and how.
        yardsticks: From :func:`cascade.evaluate.yardsticks.load_yardsticks`.
        prompts: What the pictures were made of; of each prompt one picture, by its key.
        keys: Of pictures in memory, in their order; None: those of the prompts, in theirs.
        real_keys: Of reference pictures in memory, for the metrics that pair them.
        model: What made the pictures, for tables.
        batch_size: Pictures that are measured together.

    Raises:
        UserError: If pictures, reference and prompts do not fit each other or the protocol.
    """
    judge = Judge(protocol, yardsticks, prompts, real, real_keys=real_keys, batch_size=batch_size)
    return judge(pictures, keys=keys, model=model)


class Judge:
    """Measures sets of pictures by one protocol; what the reference costs, it costs once."""

    def __init__(
        self,
        protocol: Protocol,
        yardsticks: Yardsticks,
        prompts: Sequence[Prompt] = (),
        real: PictureSet | Tensor | None = None,
        *,
        real_keys: Sequence[str] | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        """Take what every set is measured with; the arguments are those of :func:`evaluate`.

        Raises:
            UserError: If a metric lacks its reference or its prompts.
        """
        self._protocol = protocol
        self._yardsticks = yardsticks
        self._given = list(prompts)
        self._prompts = sorted(prompts, key=lambda prompt: prompt.key)
        self._batch_size = batch_size
        if isinstance(real, Tensor):
            where = "the reference pictures"
            real = in_memory(real, protocol.size, protocol.resize, real_keys, where=where)
        self._real = real
        for group, lacks, what in (
            (REFERRED, real is None, "reference pictures (--real)"),
            (PROMPTED, not self._prompts, "the prompts (--prompts)"),
        ):
            names = ", ".join(name for name in protocol.metrics if name in group)
            if names and lacks:
                raise UserError(f"{protocol.name} measures {names}, which need {what}")

    def __call__(
        self,
        pictures: PictureSet | Tensor,
        *,
        keys: Sequence[str] | None = None,
        model: str = "pictures",
        sampling: Mapping[str, Mapping[str, object]] | None = None,
    ) -> Results:
        """Measure one set; the arguments and errors are those of :func:`evaluate`.

        ``sampling`` is how a model made them, of :meth:`PictureMaker.sampling`; None: nobody knows.
        """
        protocol = self._protocol
        if isinstance(pictures, Tensor):
            if keys is None and self._given:
                keys = [prompt.key for prompt in self._given]
            size = protocol.generated_size
            pictures = in_memory(pictures, protocol.size, protocol.resize, keys, size)
        pictures = self._matched(pictures)
        made = self._embed(pictures)
        figures = []
        for metric in protocol.metrics:
            if metric in MEASURES:
                figures += MEASURES[metric](self._scene, made)
        if self._real is not None and PAIRED & set(protocol.metrics):
            perceptual = self._yardsticks.perceptual
            figures += paired(protocol, perceptual, pictures, self._real, self._batch_size)
        return Results(
            model=model,
            figures=tuple(figures),
            protocol=self.resolved(pictures.keys).content(),
            protocol_name=protocol.name,
            sampling=sampling,
            pictures=made.fingerprint,
            commit=commit(),
            machine=machine(self._yardsticks.device),
            at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )

    def resolved(self, keys: Sequence[str]) -> Resolved:
        """Return the protocol with what it stands for.

        Args:
            keys: Of the pictures; without prompts they say what is measured.
        """
        yards = self._yardsticks
        asked = prompts_hash(self._prompts) if self._prompts else hash_of("\n".join(keys))
        # A reference that serves for ceilings alone does not move a figure.
        measured = set(self._protocol.metrics)
        reference = self._scene.reference if REFERRED & measured else None
        return Resolved(
            protocol=self._protocol,
            prompts_sha256=asked,
            attributes_sha256=attributes_hash(self._prompts) if ASKING & measured else None,
            num_prompts=len(keys),
            reference=None if reference is None else reference.fingerprint,
            num_reference=0 if reference is None else len(reference.keys),
            features_weights=None if yards.features is None else yards.features.weights,
            clip_weights=None if yards.clip is None else yards.clip.weights,
            perceptual_weights=None if yards.perceptual is None else yards.perceptual.weights,
        )

    @cached_property
    def _scene(self) -> Scene:
        reference = None if self._real is None else self._embed(self._real)
        return Scene(self._protocol, self._yardsticks, self._prompts, reference)

    def _matched(self, pictures: PictureSet) -> PictureSet:
        """Return a set that holds a picture of each prompt, and no other."""
        if not self._prompts:
            return pictures
        known = {prompt.key for prompt in self._prompts}
        if strays := [key for key in pictures.keys if key not in known]:
            raise UserError(
                f"{pictures.where}: {len(strays)} pictures belong to no prompt of the protocol, "
                f"the first is {strays[0]!r}; a picture's file is named by its prompt's key"
            )
        return pictures.select([prompt.key for prompt in self._prompts])

    def _embed(self, pictures: PictureSet) -> Embedded:
        wanted = set(self._protocol.metrics)
        if wanted & BY_FEATURES and len(pictures) < 2:
            raise UserError(
                f"{pictures.where}: {len(pictures)} picture has no covariance; distances between "
                "sets need at least 2, and more than the features have dimensions not to be biased"
            )
        network, judge = self._yardsticks.features, self._yardsticks.clip
        on_clip = judge is not None and bool(wanted & (PROMPTED | {"mmd"}))
        # The demonstration's CLIP may be both yardsticks; it looks once.
        shared = network is not None and judge is not None and network.weights == judge.weights
        clip = None
        if judge is not None and on_clip and not shared:
            clip = clip_features(judge.scorer, judge.name, judge.weights)
        seen = Fingerprint()
        features: list[Tensor] = []
        vectors: list[Tensor] = []
        keys, start = pictures.keys, 0
        for batch in pictures.batches(self._batch_size):
            seen.update(keys[start : start + len(batch)], batch)
            start += len(batch)
            if network is not None:
                features.append(network.embed(batch))
            if clip is not None:
                vectors.append(clip.embed(batch))
        if shared and on_clip:
            vectors = features
        return Embedded(
            tuple(keys),
            torch.cat(features) if features else None,
            torch.cat(vectors) if vectors else None,
            seen.digits,
        )
