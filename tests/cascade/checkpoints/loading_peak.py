"""Peaks of memory of loading, as JSON: ``python -m tests.cascade.checkpoints.loading_peak FOLDER``.

Each loading runs in a fork of one process that has all imports and a tiny loading behind it. Memory
counts from there; afterwards every page of every weight is read, because a memory-mapped weight
that nobody read is not in memory.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.load_once import read_all
from cascade.checkpoints.files import build_on_meta, load_network, save_network
from cascade.checkpoints.load import FAMILIES, load_any
from cascade.evaluate.process_memory import measure, reset_peak
from stages.stage_c import StageC, StageCConfig

CONFIG = StageCConfig(
    cond_channels=512,
    hidden_channels=(512, 512),
    num_heads=(8, 8),
    down_blocks=(4, 4),
    up_blocks=(4, 4),
)
"""55 million parameters: 220 MB in float32, no tensor above 5 % of that."""
TINY = StageCConfig(
    cond_channels=8,
    hidden_channels=(8, 8),
    num_heads=(1, 1),
    down_blocks=(1, 1),
    up_blocks=(1, 1),
)
FILES = ("ours", "original", "diffusers", "sharded", "pickled")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOADERS = {
    "any": lambda path, dtype: load_any(path, dtype=dtype)[0][1],
    "ours": lambda path, dtype: load_network(path, expect=StageC, dtype=dtype),
}
[FAMILY] = [family for family in FAMILIES if family.network is StageC]


def full_state(config: StageCConfig, layout: str, dtype: torch.dtype) -> dict[str, Tensor]:
    state = build_on_meta(StageC, config, "test").state_dict()
    if layout != "ours":
        state = FAMILY.to_layout[layout](state, config)
    return {
        key: torch.full(value.shape, index / 64, dtype=dtype)
        for index, (key, value) in enumerate(state.items())
    }


def write(folder: Path, kind: str, dtype: torch.dtype, config: StageCConfig) -> Path:
    """Write the network as a file of one kind, and return the path to load."""
    if kind == "ours":
        network = build_on_meta(StageC, config, "test")
        network.load_state_dict(full_state(config, "ours", dtype), assign=True)
        save_network(folder / "ours.safetensors", network)
        return folder / "ours.safetensors"
    state = full_state(config, "original" if kind == "pickled" else kind_layout(kind), dtype)
    if kind == "pickled":
        torch.save({"state_dict": state}, folder / "theirs.pt")
        return folder / "theirs.pt"
    if kind != "sharded":
        save_file(state, folder / "theirs.safetensors")
        return folder / "theirs.safetensors"
    names = [f"model-0000{index}-of-00002.safetensors" for index in (1, 2)]
    weight_map = {key: names[index % 2] for index, key in enumerate(sorted(state))}
    for name in names:
        keys = [key for key in state if weight_map[key] == name]
        save_file({key: state[key] for key in keys}, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def kind_layout(kind: str) -> str:
    return "diffusers" if kind == "sharded" else kind


def in_a_fork(run: Callable[[], object]) -> object:
    """Return what a function returns in a fork of this process, with the memory of this one."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=lambda: send.send(run()))
    process.start()
    send.close()
    found = receive.recv()
    process.join()
    return found


def peak_of(loader: str, path: Path, dtype: torch.dtype, tiny: Path) -> dict[str, float]:
    # A fork starts without the pages of the libraries, which are no part of the question.
    read_all([LOADERS[loader](tiny, dtype)])
    reset_peak()
    before = measure()
    network = LOADERS[loader](path, dtype)
    weights = read_all([network])
    after = measure()
    return {
        "weights": weights,
        "peak": after.peak - before.resident,
        "anonymous": after.anonymous - before.anonymous,
        "mapped": after.mapped - before.mapped,
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)  # forks and threads do not mix
    tiny = write(folder, "ours", torch.float32, TINY)
    for loader in LOADERS.values():
        read_all([loader(tiny, torch.bfloat16)])
    found: dict[str, object] = {}
    for kind in FILES:
        for stored, stored_dtype in DTYPES.items():
            place = folder / f"{kind}-{stored}"
            place.mkdir()
            path = Path(str(in_a_fork(lambda: str(write(place, kind, stored_dtype, CONFIG)))))  # noqa: B023
            for wanted, dtype in DTYPES.items():
                for loader in LOADERS if kind == "ours" else ("any",):
                    name = f"{kind} {stored} as {wanted}, loader {loader}"
                    found[name] = in_a_fork(lambda: peak_of(loader, path, dtype, tiny))  # noqa: B023
            for file in place.iterdir():
                file.unlink()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
