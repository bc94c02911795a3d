# SPDX-License-Identifier: Apache-2.0
"""Whether pairs tell which set of blocks to remove: a quadratic model, solved exactly, against greedy and exchanges.

The divergence without every single block and without every pair is measured once. They make up a model of the
divergence without any set S,

    sum over i in S of s_i  +  sum over pairs in S of (s_ij - s_i - s_j),

whose least set of N blocks is found by integer programming, products written as linear constraints. It is measured
beside what `search` chooses on the same windows, without exchanges and with them, and beside the N blocks with the
least s_i. Prints a table and, with `--output`, writes it as JSON.

    python benchmarks/pairs.py --windows 1 --seqlen 128 --counts 3
    python benchmarks/pairs.py --show benchmarks/results/pairs.json     # measures nothing
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from material import machine, smollm2_gguf, write_texts
from scipy.optimize import Bounds, LinearConstraint, milp
from tqdm.auto import tqdm

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan
from optimum_blockprune.batches import CalibrationWindows
from optimum_blockprune.branching import Branches
from optimum_blockprune.calibration import WindowSpec, build_windows
from optimum_blockprune.depths import pruned_to
from optimum_blockprune.environment import versions
from optimum_blockprune.evaluation import EvaluationSpec
from optimum_blockprune.runner import BlockRunner
from optimum_blockprune.teacher import with_teacher


Blocks = tuple[int, ...]


def main() -> None:
    """Measures, solves, compares, prints."""
    args = _arguments()
    if args.show:
        sys.stdout.write(table(json.loads(Path(args.show).read_text(encoding="utf-8"))))
        return
    calibration, held_out = write_texts(Path(".demo"))
    text = args.calibration or str(calibration)
    texts = dict(each.split("=", 1) for each in args.texts or [f"articles={held_out}"])
    pruner = BlockPruner.from_pretrained(smollm2_gguf(), dtype="float32")
    runner = BlockRunner(pruner.model)
    spec = WindowSpec(num_samples=args.windows, seqlen=args.seqlen)
    windows = with_teacher(runner, build_windows(text, pruner.tokenizer, spec), args.batch_size)
    begin, before = time.perf_counter(), runner.counters.block_forwards
    losses = _measured(runner, windows, range(1, runner.num_blocks - 1), args.batch_size)
    costs = {"pairs": _cost(begin, runner.counters.block_forwards - before)}
    rows: list[dict[str, Any]] = []
    for count in args.counts:
        for choice, order in (("singles", 1), ("pairs", 2)):
            removed, model = _least(losses, count, order)
            rows.append({"count": count, "choice": choice, "removed": list(removed), "model": model})
        for choice, swaps in (("greedy", 0), ("exchanges", 2)):
            begin = time.perf_counter()
            plan = pruner.make_plan(_search(text, count, swaps, args))
            costs[f"{choice} {count}"] = _cost(begin, pruner.report.block_forwards)
            if plan.calibration["fingerprint"] != windows.fingerprint:
                raise SystemExit("The searches read other windows than the pairs.")
            rows.append({"count": count, "choice": choice, "removed": list(plan.removed_blocks)})
    for row in rows:
        row["kl"] = _divergence(runner, windows, row["removed"], args.batch_size)
        row |= _held_out(pruner, row["removed"], texts, args)
    rows.sort(key=lambda row: (row["count"], row["kl"]))
    report = {
        "model": "SmolLM2-135M-Instruct (Q4_1 GGUF, float32)",
        "device": machine(),
        "versions": versions(),
        "calibration": {"text": Path(text).name, "windows": args.windows, "seqlen": args.seqlen},
        "test": {"texts": list(texts), "windows": args.test_windows, "seqlen": args.seqlen},
        "costs": costs,
        "losses": {" ".join(map(str, blocks)): loss for blocks, loss in losses.items()},
        "rows": rows,
    }
    sys.stdout.write(table(report))
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _cost(begin: float, block_forwards: int) -> dict[str, float]:
    return {"seconds": time.perf_counter() - begin, "block_forwards": block_forwards}


def _search(text: str, count: int, swaps: int, args: argparse.Namespace) -> BlockPruningConfig:
    return BlockPruningConfig(
        "search",
        num_blocks=count,
        dataset=text,
        num_samples=args.windows,
        seqlen=args.seqlen,
        batch_size=args.batch_size,
        strategy_options={"swaps": swaps, "seeds": False},
    )


def _measured(
    runner: BlockRunner, windows: CalibrationWindows, blocks: Sequence[int], batch_size: int
) -> dict[Blocks, float]:
    """The divergence without each block and without each pair, nats per token."""
    branches, found = Branches(runner), {}
    branches.cut(batch_size)
    for first in tqdm([None, *blocks], desc="Pairs"):
        gone = [] if first is None else [first]
        wanted = [block for block in blocks if first is None or block > first]
        branches.begin(gone)
        sums = dict.fromkeys(wanted, 0.0)
        for place, batch in enumerate(windows.batches(batch_size)):
            for block, losses in branches.losses(batch, (place, 0), gone, wanted):
                sums[block] += losses.sum().item()
        # The first token of a window is not predicted.
        found |= {(*gone, block): total / (windows.num_tokens - windows.num_windows) for block, total in sums.items()}
    return found


def _least(losses: dict[Blocks, float], count: int, order: int) -> tuple[Blocks, float]:
    """The set of so many blocks with the least value of the model of this order, and the value."""
    singles = sorted(blocks for blocks in losses if len(blocks) == 1)
    pairs = sorted(blocks for blocks in losses if len(blocks) == 2)
    place = {block: number for number, (block,) in enumerate(singles)}
    costs = [losses[each] for each in singles]
    costs += [losses[each] - sum(losses[block,] for block in each) if order > 1 else 0.0 for each in pairs]
    # x_i + x_j - 1 <= y_ij <= x_i, x_j: y_ij is the product.
    lines = [np.concatenate([np.ones(len(singles)), np.zeros(len(pairs))])]
    lower, upper = [float(count)], [float(count)]
    for number, pair in enumerate(pairs, len(singles)):
        for parts in ([place[pair[0]]], [place[pair[1]]], [place[block] for block in pair]):
            line = np.zeros(len(costs))
            line[parts], line[number] = 1.0, -1.0
            lines.append(line)
            lower.append(0.0 if len(parts) == 1 else -np.inf)
            upper.append(np.inf if len(parts) == 1 else 1.0)
    found = milp(
        costs,
        integrality=np.ones(len(costs)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(np.array(lines), lower, upper),
        options={"mip_rel_gap": 0.0},
    )
    if found.status != 0:
        raise SystemExit(f"No exact solution: {found.message}")
    return tuple(block for block, number in place.items() if found.x[number] > 0.5), float(found.fun)


def _divergence(runner: BlockRunner, windows: CalibrationWindows, removed: Sequence[int], batch_size: int) -> float:
    measured = [runner.nll(batch, removed) for batch in windows.batches(batch_size)]
    return sum(loss.item() for loss, _ in measured) / sum(count for _, count in measured)


def _held_out(
    pruner: BlockPruner, removed: Sequence[int], texts: dict[str, str], args: argparse.Namespace
) -> dict[str, float]:
    """Perplexity on texts that nothing was chosen on."""
    spec = EvaluationSpec(batch_size=args.batch_size, speed=False, continuations=0)
    with pruned_to(pruner.model, PruningPlan.from_blocks(pruner.model, removed)):
        return {
            name: pruner.evaluate(path, num_samples=args.test_windows, spec=spec)["perplexity"]
            for name, path in texts.items()
        }


def table(report: dict[str, Any]) -> str:
    """The rows as text; the divergence on the windows of the search, and what the model said it would be."""
    texts = report["test"]["texts"]
    lines = [("blocks", "choice", "divergence", "model", *texts, "removed")]
    for row in report["rows"]:
        model = f"{row['model']:.3f}" if "model" in row else "-"
        figures = (f"{row[text]:.1f}" for text in texts)
        removed = " ".join(map(str, sorted(row["removed"])))
        lines.append((str(row["count"]), row["choice"], f"{row['kl']:.3f}", model, *figures, removed))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
    costs = [
        f"{name}: {cost['block_forwards']:,} block-forwards, {cost['seconds']:,.0f} s"
        for name, cost in report["costs"].items()
    ]
    return "\n".join([*rows, "", *costs, ""])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", help="text to choose on; articles of a package unless given")
    parser.add_argument("--texts", nargs="+", metavar="NAME=FILE", help="held-out texts; other articles unless given")
    parser.add_argument("--counts", nargs="+", type=int, default=[3, 5, 7], help="numbers of blocks")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--test-windows", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--output")
    parser.add_argument("--show", metavar="FILE", help="print what a file holds instead")
    return parser.parse_args()


if __name__ == "__main__":
    main()
