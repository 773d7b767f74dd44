"""Each metric of a protocol: what the yardsticks saw to figures with their uncertainty."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cascade.errors import UserError
from cascade.evaluate import distances
from cascade.evaluate.attributes import answers, make_questions
from cascade.evaluate.features import Clip, FeatureNetwork
from cascade.evaluate.picture_sets import PictureSet
from cascade.evaluate.prompts import Prompt, seed_of
from cascade.evaluate.protocol import PAIRED, Protocol
from cascade.evaluate.reconstruction import psnr, ssim
from cascade.evaluate.results import Figure
from cascade.evaluate.retrieval import (
    agreement,
    draw_candidates,
    true_ranks,
    wilson_interval,
)
from cascade.evaluate.yardsticks import Perceptual, Yardsticks

PSNR_CEILING_DB = 100.0
"""What a picture without any error counts as in a mean."""
_WILSON = "95 % (Wilson)"
_OF_PICTURES = "95 % of the mean over pictures"
_BOOTSTRAP = "s.d. of the bootstrap over pictures"
_HALVES = "s.d., of random halves of the pictures"


@dataclass(frozen=True)
class Embedded:
    """A set of pictures as the yardsticks see it; None where nobody asked."""

    keys: tuple[str, ...]
    features: Tensor | None
    """``(N, D)`` float32 of the feature network."""
    clip: Tensor | None
    """``(N, D)`` float32 unit vectors of the CLIP."""
    fingerprint: str


@dataclass(frozen=True)
class Scene:
    """What every set of pictures is measured against."""

    protocol: Protocol
    yardsticks: Yardsticks
    prompts: Sequence[Prompt]
    """By key; pictures are in the same order."""
    reference: Embedded | None

    @cached_property
    def reference_gaussian(self) -> distances.Gaussian:
        """Mean and covariance of the reference's features."""
        features = _reference(self).features
        assert features is not None, "made of the same yardsticks"
        return distances.gaussian_of(features)

    @cached_property
    def real_by_prompt(self) -> Tensor | None:
        """The CLIP vectors of the prompts' own real pictures; None where some are missing."""
        if self.reference is None or not self.prompts or self.reference.clip is None:
            return None
        rows = {key: row for row, key in enumerate(self.reference.keys)}
        if any(prompt.key not in rows for prompt in self.prompts):
            return None
        return self.reference.clip[[rows[prompt.key] for prompt in self.prompts]]

    def generator(self, metric: str) -> torch.Generator:
        """Return a source of draws of a metric's own."""
        return _generator(self.protocol, metric)


def _frechet(scene: Scene, made: Embedded) -> list[Figure]:
    network, features = _featured(scene, made)
    real = scene.reference_gaussian
    value = distances.frechet_distance(real, distances.gaussian_of(features))
    spread = None
    if scene.protocol.resamples:
        root = distances.matrix_root(real.covariance)
        spread = distances.spread_by_halves(
            lambda rows: distances.frechet_distance(
                real, distances.gaussian_of(features[rows]), root
            ),
            len(features),
            scene.generator("frechet"),
            scene.protocol.resamples,
        )
    fewest = min(len(features), real.count)
    warning = distances.covariance_warning(fewest, network.channels)
    label = network.label("FID", "Frechet distance")
    return [
        Figure(
            "frechet",
            label,
            value,
            len(features),
            real.count,
            spread=spread,
            uncertainty=_HALVES if spread is not None else "none",
            yardstick=network.name,
            yardstick_weights=network.weights,
            notes=() if warning is None else (f"{label}: {warning}",),
        )
    ]


def _kernel(scene: Scene, made: Embedded) -> list[Figure]:
    network, features = _featured(scene, made)
    real = _reference(scene).features
    assert real is not None, "made of the same yardsticks"
    found = distances.kernel_distance(
        real,
        features,
        scene.protocol.kernel_subsets,
        scene.protocol.kernel_subset_size,
        scene.generator("kernel"),
    )
    spread = found.spread
    uncertainty = f"s.d. over {found.subsets} subsets of {found.subset_size}"
    if spread is None and scene.protocol.resamples:
        generator = scene.generator("kernel spread")
        some = real[torch.randperm(len(real), generator=generator)[: 2 * found.subset_size]]
        spread = distances.spread_by_halves(
            lambda rows: distances.cubic_mmd(some, features[rows]),
            len(features),
            generator,
            scene.protocol.resamples,
        )
        uncertainty = _HALVES
    return [
        Figure(
            "kernel",
            network.label("KID", "kernel distance"),
            found.mean,
            len(features),
            len(real),
            spread=spread,
            uncertainty=uncertainty if spread is not None else "none",
            yardstick=network.name,
            yardstick_weights=network.weights,
        )
    ]


def _precision_recall(scene: Scene, made: Embedded) -> list[Figure]:
    network, features = _featured(scene, made)
    real = _reference(scene).features
    assert real is not None, "made of the same yardsticks"
    nearest = scene.protocol.neighbours
    if min(len(real), len(features)) <= nearest:
        raise UserError(
            f"{len(features)} pictures and {len(real)} of the reference: precision and recall "
            f"by {nearest} neighbours need more than {nearest} of each"
        )
    found = distances.precision_recall(real, features, nearest)
    rates = (
        ("precision", found.precise, found.num_generated),
        ("recall", found.recalled, found.num_real),
    )
    return [
        _rate(name, f"{name} ({network.name})", hits, trials, network.name, network.weights)
        for name, hits, trials in rates
    ]


def _mmd(scene: Scene, made: Embedded) -> list[Figure]:
    clip, vectors = _seen(scene, made)
    real = _reference(scene).clip
    assert real is not None, "made of the same yardsticks"
    found = distances.rbf_distance(real, vectors, scene.protocol.resamples, scene.generator("mmd"))
    return [
        Figure(
            "mmd",
            f"CMMD's distance ({clip.name})",
            found.value,
            len(vectors),
            len(real),
            spread=found.spread,
            uncertainty=_BOOTSTRAP if found.spread is not None else "none",
            yardstick=clip.name,
            yardstick_weights=clip.weights,
        )
    ]


def _clip_score(scene: Scene, made: Embedded) -> list[Figure]:
    clip, vectors = _seen(scene, made)
    prompts = clip.scorer.embed_prompts([prompt.text for prompt in scene.prompts]).double()

    def scores(pictures: Tensor) -> Tensor:
        return 100.0 * (pictures.double() * prompts).sum(dim=1).clamp(min=0)

    real = scene.real_by_prompt
    return [
        _mean_figure(
            "clip_score",
            f"CLIP score, 100 x cosine ({clip.name})",
            scores(vectors),
            clip.name,
            clip.weights,
            real=None if real is None else float(scores(real).mean()),
        )
    ]


def asked_of(protocol: Protocol, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts of which a protocol can't ask what it asks; no picture is needed to know.

    Raises:
        UserError: They are too few, or do not say what they are of.
    """
    if "retrieval" in protocol.metrics:
        _candidates(protocol, prompts)
    if "attributes" in protocol.metrics:
        for attribute in protocol.attributes:
            make_questions(attribute, prompts)


def _candidates(protocol: Protocol, prompts: Sequence[Prompt]) -> Tensor:
    texts = [prompt.text for prompt in prompts]
    identities = [prompt.identity for prompt in prompts]
    generator = _generator(protocol, "retrieval")
    return draw_candidates(range(len(texts)), texts, identities, protocol.candidates, generator)


def _generator(protocol: Protocol, metric: str) -> torch.Generator:
    """Return a source of draws of a metric's own: no metric moves another's figures."""
    return torch.Generator().manual_seed(seed_of(metric, protocol.seed))


def _retrieval(scene: Scene, made: Embedded) -> list[Figure]:
    clip, vectors = _seen(scene, made)
    texts = [prompt.text for prompt in scene.prompts]
    count = scene.protocol.candidates
    drawn = _candidates(scene.protocol, scene.prompts)
    prompts = clip.scorer.embed_prompts(texts)
    found = agreement(true_ranks(vectors, prompts, drawn))
    real = scene.real_by_prompt
    ceiling = None if real is None else agreement(true_ranks(real, prompts, drawn))
    reals = (None, None) if ceiling is None else (ceiling.top_1.rate, ceiling.top_5.rate)
    named = (
        ("retrieval_top_1", "first", found.top_1, reals[0]),
        ("retrieval_top_5", "in the first five", found.top_5, reals[1]),
    )
    return [
        _rate(
            metric,
            f"own prompt {place} of {count} ({clip.name})",
            rate.hits,
            rate.trials,
            clip.name,
            clip.weights,
            real=best,
        )
        for metric, place, rate, best in named
    ]


def _attributes(scene: Scene, made: Embedded) -> list[Figure]:
    clip, vectors = _seen(scene, made)
    figures = []
    for attribute in scene.protocol.attributes:
        questions = make_questions(attribute, scene.prompts)
        right = answers(questions, vectors, clip.scorer.embed_prompts)
        real = scene.real_by_prompt
        best = None
        if real is not None:
            best = float(answers(questions, real, clip.scorer.embed_prompts).double().mean())
        values = len(questions[0].wordings)
        figures.append(
            _rate(
                f"attribute_{attribute.field}",
                f"{attribute.field} right, of {values} ({clip.name})",
                int(right.sum()),
                len(right),
                clip.name,
                clip.weights,
                real=best,
            )
        )
    return figures


def paired(
    protocol: Protocol,
    perceptual: Perceptual | None,
    pictures: PictureSet,
    real: PictureSet,
    batch_size: int,
) -> list[Figure]:
    """Compare each picture with the reference picture of its key."""
    wanted = [name for name in protocol.metrics if name in PAIRED]
    originals = real.select(pictures.keys)
    columns: dict[str, list[Tensor]] = {name: [] for name in wanted}
    both = zip(pictures.batches(batch_size), originals.batches(batch_size), strict=True)
    for made, original in both:
        x, y = made.float() / 255.0, original.float() / 255.0
        if "psnr" in columns:
            columns["psnr"].append(psnr(x, y).clamp(max=PSNR_CEILING_DB))
        if "ssim" in columns:
            columns["ssim"].append(ssim(x, y))
        if "lpips" in columns and perceptual is not None:
            columns["lpips"].append(perceptual.distance(x, y))
    labels = {"psnr": "PSNR, dB", "ssim": "SSIM"}
    figures = []
    for name, values in columns.items():
        label, yardstick, weights = labels.get(name, ""), None, None
        if name == "lpips" and perceptual is not None:
            label, yardstick, weights = perceptual.label, perceptual.name, perceptual.weights
        figures.append(_mean_figure(name, label, torch.cat(values), yardstick, weights))
    return figures


def _featured(scene: Scene, made: Embedded) -> tuple[FeatureNetwork, Tensor]:
    assert scene.yardsticks.features is not None and made.features is not None, "loaded"
    return scene.yardsticks.features, made.features


def _seen(scene: Scene, made: Embedded) -> tuple[Clip, Tensor]:
    assert scene.yardsticks.clip is not None and made.clip is not None, "loaded"
    return scene.yardsticks.clip, made.clip


def _reference(scene: Scene) -> Embedded:
    assert scene.reference is not None, "asked before"
    return scene.reference


def _rate(
    metric: str,
    label: str,
    hits: int,
    trials: int,
    yardstick: str,
    weights: str,
    real: float | None = None,
) -> Figure:
    interval = wilson_interval(hits, trials)
    return Figure(
        metric,
        label,
        hits / trials,
        trials,
        low=interval.low,
        high=interval.high,
        uncertainty=_WILSON,
        real=real,
        yardstick=yardstick,
        yardstick_weights=weights,
    )


def _mean_figure(
    metric: str,
    label: str,
    values: Tensor,
    yardstick: str | None,
    weights: str | None,
    real: float | None = None,
) -> Figure:
    mean, half = distances.mean_interval(values)
    return Figure(
        metric,
        label,
        mean,
        len(values),
        low=None if half is None else mean - half,
        high=None if half is None else mean + half,
        uncertainty="none" if half is None else _OF_PICTURES,
        real=real,
        yardstick=yardstick,
        yardstick_weights=weights,
    )


MEASURES: Mapping[str, Callable[[Scene, Embedded], list[Figure]]] = {
    "frechet": _frechet,
    "kernel": _kernel,
    "precision_recall": _precision_recall,
    "mmd": _mmd,
    "clip_score": _clip_score,
    "retrieval": _retrieval,
    "attributes": _attributes,
}
"""Metrics of a whole set, by name; the paired ones are :func:`paired`'s."""
