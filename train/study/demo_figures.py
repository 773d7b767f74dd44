"""The figures of the demonstration's model card: sizes, reconstruction, prompt agreement."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from cascade.checkpoints.files import read_metadata
from cascade.errors import UserError
from cascade.evaluate.clip_scorer import ClipScorer
from cascade.evaluate.reconstruction import psnr, ssim, to_8bit
from cascade.evaluate.retrieval import (
    Agreement,
    agreement,
    derangement,
    draw_candidates,
    true_ranks,
)
from train.settings import EXPORT_KEYS
from train.study.held_out import HELD_OUT, Split
from train.study.pictures import PictureStore

PSNR_CEILING_DB = 100.0
"""What a picture without any error counts as in a mean."""


@dataclass(frozen=True)
class FileSize:
    """One file of weights: what it holds and what it cost."""

    file: str
    parameters: int
    """Stored numbers, buffers of norms included."""
    bf16_mb: float
    """Two bytes a number, in 10^6 bytes, whatever the file itself stores."""
    file_mb: float
    train_steps: int | None
    """None: the file does not say."""
    train_samples: int | None
    train_seconds: float | None


@dataclass(frozen=True)
class ReconstructionRow:
    """How close reconstructions of a split are, averaged over its pictures."""

    split: str
    num_pictures: int
    stage_a_psnr_db: float
    stage_a_ssim: float
    stage_ab_psnr_db: float | None = None
    """None: a U-Net's autoencoder is all there is."""
    stage_ab_ssim: float | None = None


@dataclass(frozen=True)
class AgreementRow:
    """How often the yardstick finds the prompt of one kind of picture."""

    split: str
    pictures: str
    num_candidates: int
    agreement: Agreement


@dataclass
class Figures:
    """What was measured; None where a part was not asked for."""

    sizes: list[FileSize] | None = None
    reconstruction: list[ReconstructionRow] | None = None
    retrieval: list[AgreementRow] | None = None
    sheet: list[str] | None = None


def measure_sizes(model: Path) -> list[FileSize]:
    """Read every weight file's header: its tensors, and what its training cost.

    Raises:
        UserError: If the folder has no weight files.
    """
    paths = sorted(model.rglob("*.safetensors"))
    if not paths:
        raise UserError(f"{model}: no .safetensors files; give the model's folder with --model")
    return [_file_size(path, path.relative_to(model).as_posix()) for path in paths]


def _file_size(path: Path, name: str) -> FileSize:
    metadata = read_metadata(path)
    with safe_open(path, framework="pt") as file:
        slices = [file.get_slice(key) for key in file.keys()]
        parameters = sum(
            math.prod(part.get_shape()) for part in slices if "F" in str(part.get_dtype())
        )
    steps, samples, seconds = (_number(metadata.get(key)) for key in EXPORT_KEYS)
    return FileSize(
        file=name,
        parameters=parameters,
        bf16_mb=2 * parameters / 1e6,
        file_mb=path.stat().st_size / 1e6,
        train_steps=None if steps is None else int(steps),
        train_samples=None if samples is None else int(samples),
        train_seconds=seconds,
    )


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)


def measure_reconstruction(
    splits: Mapping[str, Split],
    through_stage_a: Callable[[Tensor], Tensor],
    store: PictureStore | None,
    seed: int,
    batch_size: int = 16,
) -> list[ReconstructionRow]:
    """Compare all held-out pictures with what Stage A, and Stages A and B, make of them.

    Of a U-Net the autoencoder stands in Stage A's place, and there is nothing else.

    Args:
        splits: Splits by name; the held-out ones among them are measured.
        through_stage_a: Pixels to Stage A's reconstruction.
        store: Makes and keeps the reconstructions through the compressor, Stage B and Stage A;
            None: there is no Stage B.
        seed: Seeds Stage B's noise.
        batch_size: Pictures that are compared at a time.

    Returns:
        A row for each held-out split and one for all pictures together.
    """
    rows, everything = [], []
    for name in HELD_OUT:
        if name not in splits:
            continue
        keys = sorted(splits[name].pixels)
        measured = []
        for start in range(0, len(keys), batch_size):
            batch_keys = keys[start : start + batch_size]
            originals = pixels_of(splits[name], batch_keys)
            made_by = [to_8bit(through_stage_a(originals))]
            if store is not None:
                made_by.append(store.reconstructed(batch_keys, originals, seed))
            columns = [f(made, originals) for made in made_by for f in (psnr, ssim)]
            measured.append(torch.stack(columns, dim=1))
        everything.extend(measured)
        rows.append(_reconstruction_row(name, torch.cat(measured)))
    if not rows:
        raise UserError(f"the shards hold no held-out split ({', '.join(HELD_OUT)})")
    return [*rows, _reconstruction_row("all", torch.cat(everything))]


def _reconstruction_row(split: str, measured: Tensor) -> ReconstructionRow:
    means = measured.double().clamp(max=PSNR_CEILING_DB).mean(dim=0).tolist()
    return ReconstructionRow(split, len(measured), *means)


@dataclass(frozen=True)
class Asked:
    """Prompts of a split with their candidates."""

    prompts: list[str]
    vectors: Tensor
    """(M, D): embeddings of all candidates."""
    candidates: Tensor
    """(N, K): rows of ``vectors``, each prompt's own first."""


def ask(split: Split, scorer: ClipScorer, num_candidates: int, generator: torch.Generator) -> Asked:
    """Draw the candidates of each asked prompt; each caption is embedded once.

    Raises:
        UserError: If the split has too few different captions.
    """
    captions = [entry.caption for entry in split.entries]
    identities = [entry.identity for entry in split.entries]
    drawn = draw_candidates(split.asked, captions, identities, num_candidates, generator)
    used, compact = torch.unique(drawn, return_inverse=True)
    vectors = scorer.embed_prompts([captions[index] for index in used.tolist()])
    return Asked([captions[index] for index in split.asked], vectors, compact)


def measure_agreement(
    split: Split, scorer: ClipScorer, store: PictureStore, num_candidates: int, seed: int
) -> list[AgreementRow]:
    """Ask for each asked prompt of a split how well each kind of picture agrees with it.

    All kinds answer to the same prompts and the same candidates.

    Args:
        split: The prompts and their real pictures.
        scorer: The yardstick.
        store: Makes and keeps the generated and reconstructed pictures.
        num_candidates: The true prompt and its distractors.
        seed: Draws the distractors, the shuffle, and the pictures' noise.

    Returns:
        A row for real, reconstructed, generated and shuffled pictures.

    Raises:
        UserError: If the split has too few different captions.
    """
    generator = torch.Generator().manual_seed(seed)
    asked = ask(split, scorer, num_candidates, generator)
    shuffle = derangement(len(split.asked), generator)
    keys = [split.entries[i].key for i in split.asked]
    real = pixels_of(split, keys)
    seeds = range(seed, seed + len(keys))
    embedded = {
        "real": scorer.embed_pictures(real),
        store.reconstruction: scorer.embed_pictures(store.reconstructed(keys, real, seed)),
        "generated": scorer.embed_pictures(store.generated(asked.prompts, list(seeds))),
    }
    embedded["shuffled"] = embedded["real"][shuffle]
    return [
        AgreementRow(
            split.name,
            kind,
            num_candidates,
            agreement(true_ranks(pictures, asked.vectors, asked.candidates)),
        )
        for kind, pictures in embedded.items()
    ]


def pixels_of(split: Split, keys: Sequence[str]) -> Tensor:
    """Return pictures of a split as ``(N, 3, H, W)`` float32 in ``[0, 1]``."""
    return torch.stack([split.pixels[key] for key in keys]).float() / 255.0
