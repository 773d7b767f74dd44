from __future__ import annotations

from pathlib import Path

import torch

from train.study.provenance import describe_run


def test_the_command_is_the_one_typed_without_this_machine_s_folders(tmp_path: Path):
    (tmp_path / "model.json").write_text("{}")
    inside = Path.cwd() / "runs" / "x"
    argv = ["--shards", "/somewhere/else/shards", "--out", str(inside), "--parts", "a, b"]
    found = describe_run("train.report_demo", argv, 3, tmp_path, torch.device("cpu"), torch.float32)
    assert found.command == (
        "python -m train.report_demo --shards PATH_TO/shards --out runs/x --parts 'a, b'"
    )
    assert found.seed == 3 and found.machine and found.commit
