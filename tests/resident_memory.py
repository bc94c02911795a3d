# SPDX-License-Identifier: Apache-2.0
"""Makes plans: `resident_memory.py FOLDER STREAM`; prints the removed blocks and the memory that this took at most."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from toys import config, toy_folder

from optimum_blockprune import BlockPruner


SETTINGS = (
    {"strategy": "shortgpt"},
    {"strategy": "mi_prun", "strategy_options": {"chunk_tokens": 32}},
    {"strategy": "sleb", "num_blocks": 1, "protect_first": 34},
)


def plans(folder: Path, stream: bool, **fields: Any) -> list[list[int]]:
    """The blocks that each of the strategies would remove."""
    pruner = BlockPruner.from_pretrained(folder, stream=stream) if stream else BlockPruner.from_pretrained(folder)
    return [list(pruner.make_plan(config(**{**each, **fields})).removed_blocks) for each in SETTINGS]


def resident(name: str) -> int:
    """Bytes of memory that the process has now (`VmRSS`), or had at most (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main() -> None:
    """See the module docstring."""
    folder, stream = Path(sys.argv[1]), sys.argv[2] == "1"
    with TemporaryDirectory() as place:  # whatever is imported on the way counts for nothing
        plans(toy_folder(Path(place)), stream, protect_first=None)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM begins anew
    before = resident("VmRSS")
    removed = plans(folder, stream)
    sys.stdout.write(json.dumps({"removed": removed, "bytes": resident("VmHWM") - before}))


main()
