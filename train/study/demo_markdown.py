"""The demonstration's figures as Markdown tables, ready for the model card."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cascade.evaluate.retrieval import HitRate
from train.study.demo_figures import AgreementRow, Figures, FileSize, ReconstructionRow
from train.study.provenance import Provenance

SPLIT_TITLES = {
    "train": "captions seen in training",
    "test_combo": "unseen combinations of style and concept",
    "test_concept": "unseen concepts",
    "test": "photos, held-out pictures",
    "all": "all",
}


def to_markdown(figures: Figures, provenance: Provenance, num_candidates: int) -> str:
    """Return the report: the figures, what they mean, and where they come from."""
    sections = []
    if figures.sizes is not None:
        sections.append(
            "### Sizes and training cost\n\nSteps, samples and seconds are those of the run that "
            "made the file.\n\n" + sizes_table(figures.sizes)
        )
    if figures.reconstruction is not None:
        ways = (
            "A: Stage A alone. A+B: semantic compressor, Stage B sampling with the empty prompt, "
            "Stage A."
        )
        if figures.reconstruction[0].stage_ab_psnr_db is None:
            ways = "By the autoencoder, with the means of its latents."
        sections.append(
            "### Reconstruction of held-out pictures\n\nMeans over pictures, measured on 8-bit "
            f"pictures. {ways}\n\n" + reconstruction_table(figures.reconstruction)
        )
    if figures.retrieval is not None:
        sections.append(
            "### Prompt agreement\n\nHow often the demonstration's own CLIP finds a picture's "
            f"prompt among {num_candidates}: the true one and others of the same split, no two of "
            "which share a caption or a thing and style. Real pictures show what the yardstick "
            "itself can do, pictures shuffled among the prompts what chance and style alone give. "
            "Intervals are Wilson's. The yardstick was trained on the `train` split only.\n\n"
            + agreement_table(figures.retrieval)
        )
    if figures.sheet is not None:
        prompts = "\n".join(f"{n}. {prompt}" for n, prompt in enumerate(figures.sheet, start=1))
        sections.append(f"### Contact sheet\n\n![contact sheet](sheet.png)\n\n{prompts}\n")
    sections.append(
        "### Where these figures come from\n\n"
        f"- command: `{provenance.command}`\n- seed: {provenance.seed}\n"
        f"- commit: {provenance.commit}\n- weights: {provenance.weights}\n"
        f"- machine: {provenance.machine}\n- number format: {provenance.dtype}\n"
    )
    return "\n".join(sections)


def sizes_table(rows: Sequence[FileSize]) -> str:
    """Return the table of parameters, megabytes and training cost."""
    lines = [
        [
            row.file,
            f"{row.parameters:,}",
            f"{row.bf16_mb:.2f}",
            f"{row.file_mb:.2f}",
            _count(row.train_steps),
            _count(row.train_samples),
            _count(row.train_seconds),
        ]
        for row in rows
    ]
    lines.append(
        [
            "**all**",
            f"{sum(row.parameters for row in rows):,}",
            f"{sum(row.bf16_mb for row in rows):.2f}",
            f"{sum(row.file_mb for row in rows):.2f}",
            *[""] * 3,  # not to be added up: one run may make two files
        ]
    )
    head = ["file", "parameters", "MB in bf16", "MB of file", "steps", "samples", "seconds"]
    return _table(head, lines)


def reconstruction_table(rows: Sequence[ReconstructionRow]) -> str:
    """Return the table of PSNR and SSIM by split."""
    head = ["split", "pictures", "A: PSNR dB", "A: SSIM", "A+B: PSNR dB", "A+B: SSIM"]
    if rows[0].stage_ab_psnr_db is None:
        head = ["split", "pictures", "PSNR dB", "SSIM"]
    lines = []
    for row in rows:
        cells = [
            f"{SPLIT_TITLES[row.split]} (`{row.split}`)" if row.split != "all" else "**all**",
            f"{row.num_pictures:,}",
            f"{row.stage_a_psnr_db:.2f}",
            f"{row.stage_a_ssim:.3f}",
        ]
        if row.stage_ab_psnr_db is not None and row.stage_ab_ssim is not None:
            cells += [f"{row.stage_ab_psnr_db:.2f}", f"{row.stage_ab_ssim:.3f}"]
        lines.append(cells)
    return _table(head, lines)


def agreement_table(rows: Sequence[AgreementRow]) -> str:
    """Return the table of prompt agreement by split and kind of picture."""
    head = ["prompts", "pictures", "n", "first", "95 %", "in the first five", "95 %"]
    lines = [
        [
            f"{SPLIT_TITLES[row.split]} (`{row.split}`)",
            row.pictures,
            str(row.agreement.top_1.trials),
            *_hits(row.agreement.top_1),
            *_hits(row.agreement.top_5),
        ]
        for row in rows
    ]
    return _table(head, lines)


def _hits(hit_rate: HitRate) -> tuple[str, str]:
    interval = hit_rate.interval
    return (
        f"{100 * hit_rate.rate:.1f} % ({hit_rate.hits})",
        f"{100 * interval.low:.1f} to {100 * interval.high:.1f}",
    )


def _count(number: float | None) -> str:
    return "not recorded" if number is None else f"{number:,.0f}"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
