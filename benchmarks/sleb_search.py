# SPDX-License-Identifier: Apache-2.0
"""SLEB's searches in one run: the published procedure (a whole forward pass per candidate), the exact one, the race.

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


SEARCHES = ("naive", "exact", "race")


def main() -> None:
    """Runs the searches and prints what each one cost and chose."""
    args = _arguments()
    calibration, _ = write_texts(Path(".demo"))
    dataset = args.dataset or str(calibration)
    pruner = BlockPruner.from_pretrained(args.model or smollm2_gguf(), dtype=args.dtype, device_map=args.device)
    results = {search: _search(pruner, dataset, search, args) for search in args.searches}
    first = results[args.searches[0]]
    report = {
        "model": args.model or "SmolLM2-135M-Instruct (Q4_1 GGUF, float32)",
        "device": _device(pruner.model.device),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        **{key: first[key] for key in ("calibration", "blocks")},
        "compared_with": args.searches[0],
        **{search: {**result, **_against(result, first)} for search, result in results.items()},
    }
    sys.stdout.write(_table(report, args.searches))
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
        strategy_options={"search": search, **({"confidence": args.confidence} if search == "race" else {})},
    )
    memory = _Peak(pruner.model.device)
    begin = time.perf_counter()
    plan = pruner.make_plan(config)
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "block_forwards": pruner.report.block_forwards,
        "head_forwards": pruner.report.head_forwards,
        "tokens": pruner.report.tokens,
        "peak_memory_bytes": memory.read(),
        "removed": list(plan.removed_blocks),
        "losses": [step["loss"] for step in plan.steps],
        "decided_exactly": [len(step["candidates"]) for step in plan.steps],
        "options": dict(plan.options),
        "calibration": dict(plan.calibration),
        "blocks": plan.num_blocks,
    }


def _against(result: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """What a search costs, and where it differs, beside the first one."""
    return {
        **{f"{key}_ratio": result[key] / first[key] for key in ("block_forwards", "head_forwards", "seconds")},
        "same_blocks": result["removed"] == first["removed"],
        "largest_loss_difference": max(abs(a - b) for a, b in zip(result["losses"], first["losses"], strict=True)),
    }


class _Peak:
    """The most memory that the process (on a GPU: PyTorch's allocator) held since this was made; weights included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:  # Linux forgets its high-water mark when asked to
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            self._device = None

    def read(self) -> int | None:
        """Bytes; `None` where it cannot be known."""
        if self._device is None:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def _table(report: dict[str, Any], searches: list[str]) -> str:
    text, first = report["calibration"], report["compared_with"]
    lines = [
        f"{report['model']}, {report['blocks']} blocks, {text['windows']} x {text['seqlen']} tokens",
        f"{report['device']}; {report['threads']} threads",
        "",
        f"{'':<8}{'block-forwards':>16}{'head-forwards':>15}{'seconds':>10}{'of ' + first:>10}{'MiB':>8}  removed",
    ]
    for name in searches:
        row = report[name]
        memory = f"{row['peak_memory_bytes'] / 2**20:,.0f}" if row["peak_memory_bytes"] else "-"
        lines.append(
            f"{name:<8}{row['block_forwards']:>16,}{row['head_forwards']:>15,}{row['seconds']:>10.1f}"
            f"{row['seconds_ratio']:>10.3f}{memory:>8}  {row['removed']}"
        )
    for name in searches[1:]:
        same = "the same blocks in the same order" if report[name]["same_blocks"] else "NOT the same blocks"
        lines.append(f"{name}: {same}; losses differ by {report[name]['largest_loss_difference']:.1e}")
    return "\n".join(lines) + "\n"


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}; {machine()}"
    return machine()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or repo id; default: the SmolLM2-135M that a package carries")
    parser.add_argument("--dataset", help="text; default: Wikipedia articles that a package carries")
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=list(SEARCHES), help="in this order")
    parser.add_argument("--confidence", type=float, default=0.999, help="of the race, per step")
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
