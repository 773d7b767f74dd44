"""``python -m train`` whose ranks count what they ask of each other; a module, for torchrun.

``COUNTS=FOLDER`` in the environment says where each rank leaves its counts.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch.distributed as dist

from train.__main__ import main

COUNTED = ("barrier", "all_reduce", "broadcast", "all_gather", "broadcast_object_list")


def _count(name: str, counts: Counter[str]) -> None:
    plain = getattr(dist, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return plain(*args, **kwargs)

    setattr(dist, name, counted)


if __name__ == "__main__":
    found: Counter[str] = Counter()
    for one in COUNTED:
        _count(one, found)
    code = main(sys.argv[1:])
    folder = Path(os.environ["COUNTS"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    sys.exit(code)
