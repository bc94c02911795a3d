# SPDX-License-Identifier: Apache-2.0
"""Makes plans under a limit on address space: `limited_memory.py FOLDER STREAM MEGABYTES`; prints removed blocks."""

from __future__ import annotations

import json
import resource
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


def address_space() -> int:
    """Bytes that the process has now."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main() -> None:
    """See the module docstring."""
    folder, stream, megabytes = Path(sys.argv[1]), sys.argv[2] == "1", int(sys.argv[3])
    with TemporaryDirectory() as place:  # whatever is imported on the way counts for nothing
        plans(toy_folder(Path(place)), stream, protect_first=None)
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + megabytes * 2**20,) * 2)
    sys.stdout.write(json.dumps(plans(folder, stream)))


main()
