# SPDX-License-Identifier: Apache-2.0
"""SLEB's search: the published procedure (a whole forward pass per candidate) against ours, in one run.

Same model, same tokens, same process, one after the other. Prints a table and, with `--output`, writes it as JSON.

    python benchmarks/sleb_search.py --num-blocks 3 --windows 2 --seqlen 256
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from material import machine, smollm2_gguf, write_texts

from optimum_blockprune import BlockPruner, BlockPruningConfig
from optimum_blockprune.environment import versions


def main() -> None:
    """Runs both searches and prints what each one cost and chose."""
    args = _arguments()
    calibration, _ = write_texts(Path(".demo"))
    dataset = args.dataset or str(calibration)
    pruner = BlockPruner.from_pretrained(args.model or smollm2_gguf(), dtype=args.dtype, device_map=args.device)
    results = {search: _search(pruner, dataset, search, args) for search in ("naive", "prefix")}
    naive, ours = results["naive"], results["prefix"]
    report = {
        "model": args.model or "SmolLM2-135M-Instruct (Q4_1 GGUF, float32)",
        "device": _device(pruner.model.device),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        **{key: naive[key] for key in ("calibration", "blocks")},
        "naive": naive,
        "prefix": ours,
        "block_forward_ratio": ours["block_forwards"] / naive["block_forwards"],
        "seconds_ratio": ours["seconds"] / naive["seconds"],
        "same_blocks": ours["removed"] == naive["removed"],
        "largest_loss_difference": max(abs(a - b) for a, b in zip(ours["losses"], naive["losses"], strict=True)),
    }
    sys.stdout.write(_table(report))
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _search(pruner: BlockPruner, dataset: str, search: str, args: argparse.Namespace) -> dict[str, Any]:
    config = BlockPruningConfig(
        strategy="sleb",
        num_blocks=args.num_blocks,
        dataset=dataset,
        num_samples=args.windows,
        seqlen=args.seqlen,
        batch_size=args.batch_size,
        strategy_options={"search": search},
    )
    begin = time.perf_counter()
    plan = pruner.make_plan(config)
    return {
        "seconds": time.perf_counter() - begin,
        "block_forwards": pruner.report.block_forwards,
        "head_forwards": pruner.report.head_forwards,
        "removed": list(plan.removed_blocks),
        "losses": [step["loss"] for step in plan.steps],
        "calibration": dict(plan.calibration),
        "blocks": plan.num_blocks,
    }


def _table(report: dict[str, Any]) -> str:
    text = report["calibration"]
    lines = [
        f"{report['model']}, {report['blocks']} blocks, {text['windows']} x {text['seqlen']} tokens",
        f"{report['device']}; {report['threads']} threads",
        "",
        f"{'':<10}{'block-forwards':>16}{'seconds':>10}  removed",
    ]
    for name in ("naive", "prefix"):
        row = report[name]
        lines.append(f"{name:<10}{row['block_forwards']:>16,}{row['seconds']:>10.1f}  {row['removed']}")
    lines.append(f"{'ratio':<10}{report['block_forward_ratio']:>16.3f}{report['seconds_ratio']:>10.3f}")
    same = "yes" if report["same_blocks"] else "NO"
    lines.append(f"same blocks in the same order: {same}; losses differ by {report['largest_loss_difference']:.1e}")
    return "\n".join(lines) + "\n"


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}; {machine()}"
    return machine()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or repo id; default: the SmolLM2-135M that a package carries")
    parser.add_argument("--dataset", help="text; default: Wikipedia articles that a package carries")
    parser.add_argument("--num-blocks", type=int, default=7)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", help="default: that of the files")
    parser.add_argument("--device", help="default: the CPU")
    parser.add_argument("--output", help="JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
