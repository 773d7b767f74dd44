"""Where figures come from: the commit of this source, and the machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch


def commit() -> str:
    """Return the commit of this source, marked when tracked files were changed after it."""
    try:
        revision, changes = (_git("rev-parse", "HEAD"), _git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"
    return revision[:12] + (" with uncommitted changes" if changes else "")


def _git(*arguments: str) -> str:
    folder = Path(__file__).parent
    result = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


def machine(device: torch.device) -> str:
    """Return the processor, the GPU if ``device`` is one, and the versions that matter."""
    where = f"{_processor()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where += f", {torch.cuda.get_device_name(device)}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{where}, {sys.platform}, {versions}"


def _processor() -> str:
    """Return the processor's name; Linux says more in a file than through ``platform``."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
