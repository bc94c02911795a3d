# SPDX-License-Identifier: Apache-2.0
"""Chooses what toys lose, as one of several processes, and writes the plans.

Arguments: a JSON list of `[name, fields of the configuration]`, and the folder that gets `NAME-RANK.json`.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from toys import toy_pruner


def main() -> None:
    """Joins the others and lets the strategies choose."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    for name, fields in json.loads(sys.argv[1]):
        pruner = toy_pruner(**fields)
        place = Path(sys.argv[2]) / f"{name}-{dist.get_rank()}.json"
        pruner.make_plan().save(place)
        place.with_suffix(".cost").write_text(str(pruner.report.block_forwards))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
