# SPDX-License-Identifier: Apache-2.0
"""Claim: with `stream=True` a model is measured in the memory of one block, its embeddings and the hidden states.

Writes a synthetic Llama checkpoint (random weights, sharded) into a temporary folder, and lets each strategy choose,
once with the model in memory and once streamed, each in a process of its own. Peaks are those of the search: what
Linux says the process took at most (`VmHWM`, reset before the model is loaded), less what it had by then; files that
are mapped into memory count in it. The blocks that are chosen must be the same.

    python benchmarks/streaming.py --output benchmarks/results/streaming.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from material import machine
from transformers import AutoModelForCausalLM, LlamaConfig

from optimum_blockprune import BlockPruner, BlockPruningConfig
from optimum_blockprune.environment import versions


# Strategy, budget and options.
CASES: dict[str, dict[str, Any]] = {
    "shortgpt": {"strategy": "shortgpt", "num_blocks": 4},
    "mi_prun": {"strategy": "mi_prun", "num_blocks": 4},
    "bip": {"strategy": "bip", "sparsity": 0.2},
    # Nine candidates: what is compared is one greedy step.
    "sleb": {"strategy": "sleb", "num_blocks": 1, "protect_first": 14},
}
VOCABULARY = 8000


def main() -> None:
    """Measures all cases and prints the table; `--child` is one of them."""
    args = _arguments()
    if args.child:
        sys.stdout.write(json.dumps(_measured(Path(args.child[0]), args.child[1], args.child[2] == "streamed", args)))
        return
    with tempfile.TemporaryDirectory() as place:
        folder, tiny = Path(place) / "model", Path(place) / "tiny"
        size = _checkpoint(folder, args.width, args.blocks)
        _checkpoint(tiny, 256, args.blocks)
        rows = dict(_rows(folder, args))
    report = {
        "claim": "streamed, a model is measured in the memory of one block, its embeddings and the hidden states",
        "model": {"blocks": args.blocks, "width": args.width, **size},
        "tokens": {"windows": args.windows, "seqlen": args.seqlen, "batch_size": args.batch_size},
        "machine": machine(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    sys.stdout.write(_table(report))
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _checkpoint(folder: Path, width: int, blocks: int) -> dict[str, float]:
    """Writes a model; returns the sizes of all, of a block, and of what lies outside the blocks, in MB."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 128),
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
    )
    model = AutoModelForCausalLM.from_config(config)
    sizes = {"all": _megabytes(model), "block": _megabytes(model.model.layers[0])}
    model.save_pretrained(folder, max_shard_size="256MB")
    return {**sizes, "rest": sizes["all"] - blocks * sizes["block"]}


def _megabytes(module: torch.nn.Module) -> float:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters()) / 1e6


def _rows(folder: Path, args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in args.cases:
        found = {}
        for kind in ("resident", "streamed"):
            command = [sys.executable, __file__, *sys.argv[1:], "--child", str(folder), name, kind]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            found[kind] = json.loads(done.stdout)
        same = found["resident"].pop("chosen") == found["streamed"].pop("chosen")
        yield name, {**found, "same_choice": same}


def _measured(folder: Path, case: str, streamed: bool, args: argparse.Namespace) -> dict[str, Any]:
    """One search; what is imported and compiled on the way is there before, from a search on a tiny model."""
    _choice(folder.parent / "tiny", case, streamed, args)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM begins anew
    begin = time.perf_counter()
    chosen, search = _choice(folder, case, streamed, args)
    seconds = time.perf_counter() - begin
    return {"peak_mb": _memory("VmHWM") - before, "seconds": seconds, "search_seconds": search, "chosen": chosen}


def _choice(folder: Path, case: str, streamed: bool, args: argparse.Namespace) -> tuple[Any, float]:
    """What goes, and the seconds that it took to find out."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, VOCABULARY, (args.windows, args.seqlen), generator=generator)
    shared = {"num_samples": args.windows, "seqlen": args.seqlen, "batch_size": args.batch_size}
    config = BlockPruningConfig(**CASES[case], dataset=[{"input_ids": row} for row in rows], **shared)
    loading = {"stream": True} if streamed else {}
    pruner = BlockPruner.from_pretrained(folder, config, **loading)
    plan = pruner.make_plan()
    kept = [list(each.kept) for each in plan.width.narrowed] if plan.width else []
    return [list(plan.removed_blocks), kept], pruner.report.seconds["search"]


def _memory(field: str) -> float:
    """A line of the process's status, in MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{field}:"))


def _table(report: dict[str, Any]) -> str:
    model, tokens = report["model"], report["tokens"]
    lines = [
        f"{model['blocks']} blocks of {model['block']:.0f} MB, {model['rest']:.0f} MB outside them, "
        f"{model['all']:.0f} MB in all; {tokens['windows']} x {tokens['seqlen']} tokens, "
        f"{tokens['batch_size']} window(s) a time",
        "",
        f"{'':<10}{'in memory':>22}{'streamed':>26}",
        f"{'':<10}{'peak MB':>12}{'seconds':>10}{'peak MB':>16}{'seconds':>10}   same choice",
    ]
    for name, row in report["rows"].items():
        one, other = row["resident"], row["streamed"]
        lines.append(
            f"{name:<10}{one['peak_mb']:>12.0f}{one['seconds']:>10.1f}{other['peak_mb']:>16.0f}{other['seconds']:>10.1f}"
            f"   {'yes' if row['same_choice'] else 'NO'}"
        )
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--width", type=int, default=1280, help="the default makes 2 GB of weights")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--output", help="JSON file")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
