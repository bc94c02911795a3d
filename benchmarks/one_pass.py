# SPDX-License-Identifier: Apache-2.0
"""Claim: a strategy that looks at the text once costs about one forward pass over it, not one per candidate.

Times the search of each strategy (report.seconds["search"]: everything from the first token to the plan) beside a
plain forward of the same model over the same tokens in the same batches: `model(ids)`, as a user would run it, which
is what the claim is against; and the stricter `model.model(ids)`, which leaves the head out, as these strategies do.
All are run in turn, several times, in one process; medians count. The processor's time is taken as well as the
clock's, because it does not see what else the machine does.

    python benchmarks/one_pass.py --output benchmarks/results/one_pass.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from material import machine, smollm2_gguf, write_texts

from optimum_blockprune import BlockPruner, BlockPruningConfig
from optimum_blockprune.calibration import build_windows
from optimum_blockprune.choosing import window_spec
from optimum_blockprune.environment import versions
from optimum_blockprune.report import PruningReport


BASELINES = ("forward", "forward without head")
# What is timed: strategy, budget and options.
CASES: dict[str, dict[str, Any]] = {
    "shortgpt": {"strategy": "shortgpt", "num_blocks": 7},
    "angular": {"strategy": "angular", "num_blocks": 7},
    "mi_prun": {"strategy": "mi_prun", "num_blocks": 7},
    "mi_prun, histogram": {"strategy": "mi_prun", "num_blocks": 7, "strategy_options": {"estimator": "histogram"}},
    "mi_prun, identity_decoder": {
        "strategy": "mi_prun",
        "num_blocks": 7,
        "strategy_options": {"estimator": "identity_decoder"},
    },
    "bip (width)": {"strategy": "bip", "sparsity": 0.2},
}
Timing = tuple[float, float]


def main() -> None:
    """Times all cases in turn and prints the table."""
    args = _arguments()
    calibration, _ = write_texts(Path(".demo"))
    pruner = BlockPruner.from_pretrained(args.model or smollm2_gguf(), dtype=args.dtype, device_map=args.device)
    shared = {"num_samples": args.windows, "seqlen": args.seqlen, "batch_size": args.batch_size}
    configs = {
        name: BlockPruningConfig(**case, dataset=args.dataset or str(calibration), **shared)
        for name, case in CASES.items()
        if name in args.cases
    }
    runs = _baselines(pruner, next(iter(configs.values()))) | {
        name: _search(pruner, config) for name, config in configs.items()
    }
    timings: dict[str, list[Timing]] = {name: [] for name in runs}
    for repeat in range(args.repeats + 1):
        for name, run in runs.items():
            timing = run()
            if repeat:  # the first round warms up
                timings[name].append(timing)
    report = {
        "claim": "a one-pass search costs about one plain forward over the same tokens",
        "model": args.model or "SmolLM2-135M-Instruct (Q4_1 GGUF, float32)",
        "device": _device(pruner.model.device),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "tokens": {"windows": args.windows, "seqlen": args.seqlen, "batch_size": args.batch_size},
        "repeats": args.repeats,
        "rows": {name: _row(timings, name) for name in runs},
    }
    sys.stdout.write(_table(report))
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _search(pruner: BlockPruner, config: BlockPruningConfig) -> Callable[[], Timing]:
    """Makes a plan; the text is cut into windows before the search, which is not counted on the clock."""

    def run() -> Timing:
        pruner.report = PruningReport()  # which adds up otherwise
        processor = time.process_time()
        pruner.make_plan(config)
        spent = pruner.report.seconds
        return spent["search"], time.process_time() - processor - spent.get("calibration", 0.0)

    return run


def _baselines(pruner: BlockPruner, config: BlockPruningConfig) -> dict[str, Callable[[], Timing]]:
    windows = build_windows(config.dataset, pruner.tokenizer, window_spec(config.recipe))
    device = pruner.model.device
    batches = [batch.input_ids.to(device) for batch in windows.batches(config.batch_size)]

    def timed(model: torch.nn.Module) -> Callable[[], Timing]:
        @torch.no_grad()
        def run() -> Timing:
            begin, processor = time.perf_counter(), time.process_time()
            for ids in batches:
                model(input_ids=ids, use_cache=False)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter() - begin, time.process_time() - processor

        return run

    return dict(zip(BASELINES, map(timed, (pruner.model, pruner.model.base_model)), strict=True))


def _row(timings: dict[str, list[Timing]], name: str) -> dict[str, Any]:
    """Medians, and how often each baseline fits into them."""
    wall, processor = ({key: statistics.median(t[kind] for t in timings[key]) for key in timings} for kind in (0, 1))
    return {
        "seconds": wall[name],
        "processor_seconds": processor[name],
        "ratio": wall[name] / wall[BASELINES[0]],
        "ratio_without_head": wall[name] / wall[BASELINES[1]],
        "processor_ratio": processor[name] / processor[BASELINES[0]],
        "all_seconds": [timing[0] for timing in timings[name]],
    }


def _table(report: dict[str, Any]) -> str:
    tokens = report["tokens"]
    lines = [
        f"{report['model']}; {tokens['windows']} x {tokens['seqlen']} tokens, {tokens['batch_size']} window(s) a time",
        f"{report['device']}; {report['threads']} threads; medians of {report['repeats']}",
        "",
        f"{'':<28}{'seconds':>10}{'of forward':>12}{'(processor)':>13}{'of forward without head':>25}",
    ]
    for name, row in report["rows"].items():
        lines.append(
            f"{name:<28}{row['seconds']:>10.2f}{row['ratio']:>12.2f}{row['processor_ratio']:>13.2f}"
            f"{row['ratio_without_head']:>25.2f}"
        )
    return "\n".join(lines) + "\n"


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}; {machine()}"
    return machine()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or repo id; default: the SmolLM2-135M that a package carries")
    parser.add_argument("--dataset", help="text; default: Wikipedia articles that a package carries")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", help="default: that of the files")
    parser.add_argument("--device", help="default: the CPU")
    parser.add_argument("--output", help="JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
