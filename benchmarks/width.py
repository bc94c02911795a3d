# SPDX-License-Identifier: Apache-2.0
"""Width pruning of a real model by every method that is there: quality on two or more texts, time and memory.

Each selection runs in a process of its own, so that its peak memory is its own; the scores do not depend on how much
is removed, so one selection serves all sparsities. Then every plan is applied to the same dense model and measured on
the same windows of articles and of news that chose nothing. Nothing is retrained.

    python benchmarks/width.py --output benchmarks/results/width.json

Calibration is on Wikipedia articles; `--text NAME=PATH` adds a text to measure on.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from material import machine, package_dir, smollm2_gguf, write_texts

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan
from optimum_blockprune.blocks import find_blocks
from optimum_blockprune.choosing import choose
from optimum_blockprune.environment import peak_memory, versions
from optimum_blockprune.evaluation import EvaluationSpec
from optimum_blockprune.registry import build_options, get_strategy
from optimum_blockprune.report import PruningReport
from optimum_blockprune.strategies.base import Place
from optimum_blockprune.strategies.ranking import kept_units
from optimum_blockprune.width_task import width_task
from optimum_blockprune.widths import Narrowing, Width


# What is removed, and by which strategy with which options.
NETWORK = {"groups": 4, "components": 64, "restarts": 1}
MLP: dict[str, tuple[str, dict[str, Any]]] = {
    "bip (paper: l1)": ("bip", {"families": "mlp"}),
    "bip, l2": ("bip", {"families": "mlp", "reduction": "l2"}),
    "functional_network": ("functional_network", NETWORK),
    "  control: leverage_only": ("functional_network", {**NETWORK, "control": "leverage_only"}),
    "  control: random_rotation": ("functional_network", {**NETWORK, "control": "random_rotation"}),
    "magnitude": ("magnitude", {}),
    "random": ("random", {"unit": "width"}),
}
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "bip (paper)": ("bip", {"families": "attention"}),
    "bip, local": ("bip", {"families": "attention", "propagate": "local"}),
    "bip, exact": ("bip", {"families": "attention", "propagate": "exact"}),
    "magnitude": ("magnitude", {"families": "attention"}),
    "random": ("random", {"unit": "width", "families": "attention"}),
}
SPARSITIES = (0.1, 0.2)
FOLDER = Path(".demo")


def main() -> None:
    """Runs all selections and measures all results."""
    args = _arguments()
    if args.select is not None:
        _select(json.loads(args.select))
        return
    calibration, held_out = write_texts(FOLDER)
    texts = {"wikipedia": str(held_out), "news": str(_news()), **dict(args.text)}
    dense = _dense_folder(args.model)
    cases = [("mlp", name, *spec, SPARSITIES) for name, spec in MLP.items()]
    # One of the three KV groups of each block is the least that can go.
    cases += [("attention", name, *spec, (0.2,)) for name, spec in HEADS.items()]
    report = {
        "model": args.model or "SmolLM2-135M-Instruct (Q4_1 GGUF, float32)",
        "device": machine(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "calibration": f"{args.windows} x {args.seqlen} tokens of {calibration.name}",
        "measured_on": f"{args.eval_windows} x {args.seqlen} tokens of each text",
        "dense": {},
        "results": [],
    }
    pruner = BlockPruner.from_pretrained(dense, dtype=torch.float32)
    report["dense"] = _measure(pruner, texts, args)
    with tempfile.TemporaryDirectory() as folder:
        for family, name, strategy, options, sparsities in cases:
            job = {"model": str(dense), "strategy": strategy, "options": options, "sparsities": sparsities}
            job |= {"dataset": str(calibration), "windows": args.windows, "seqlen": args.seqlen, "folder": folder}
            cost = _in_process(job)
            for sparsity in sparsities:
                row = {"family": family, "method": name, "strategy": strategy, "options": options, **cost}
                row |= _applied(pruner, PruningPlan.from_file(Path(folder) / f"{sparsity}.json"), texts, args)
                report["results"].append({"sparsity": sparsity, **row})
                if args.output:  # row by row: a long run may be broken off
                    Path(args.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(_table(report, list(texts)))


def _in_process(job: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--select", json.dumps(job)], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def _select(job: dict[str, Any]) -> None:
    """The other process: one selection, its plans into files, its cost to stdout."""
    config = BlockPruningConfig(
        job["strategy"],
        sparsity=max(job["sparsities"]),
        dataset=job["dataset"],
        num_samples=job["windows"],
        seqlen=job["seqlen"],
        strategy_options=job["options"],
    )
    pruner = BlockPruner.from_pretrained(job["model"], config, dtype=torch.float32)
    with torch.no_grad():
        pruner.model(torch.zeros(1, 8, dtype=torch.long))  # brings the weights from the file into memory
    loaded, begin = _peak(pruner), time.perf_counter()
    scores: dict[Place, list[float]] = {}
    report = PruningReport()
    plan = choose(pruner.model, config.recipe, pruner.tokenizer, report, unit_scores=scores)
    seconds = time.perf_counter() - begin
    for sparsity in job["sparsities"]:
        _with_sparsity(pruner, config, plan, scores, sparsity).save(Path(job["folder"]) / f"{sparsity}.json")
    cost = {
        "seconds": round(seconds, 1),
        "block_forwards": report.block_forwards,
        "extra_peak_bytes": _peak(pruner) - loaded,
    }
    sys.stdout.write(json.dumps(cost) + "\n")


def _peak(pruner: BlockPruner) -> int:
    """Largest resident size so far; Linux hands the getrusage figure of a parent down to its children."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory(pruner.model)
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _with_sparsity(
    pruner: BlockPruner,
    config: BlockPruningConfig,
    plan: PruningPlan,
    scores: dict[Place, list[float]],
    sparsity: float,
) -> PruningPlan:
    """The plan with the same scores and another budget; a choice without scores is made anew."""
    smaller = copy.copy(config)
    smaller.sparsity = sparsity
    if not scores:
        return choose(pruner.model, smaller.recipe, pruner.tokenizer, PruningReport())
    strategy = get_strategy(config.strategy)
    options = build_options(strategy, config.strategy_options or {})
    task = width_task(find_blocks(pruner.model), smaller.recipe, strategy, options)
    by_place = {(place.block, place.group): each for place, each in scores.items()}
    found, _ = kept_units(task, {place: by_place[place.block, place.group] for place in task.free}, "uniform")
    narrowed = tuple(Narrowing(place.block, place.group, units) for place, units in found.items())
    return plan.with_provenance(width=Width("uniform", task.groups, narrowed), requested={"sparsity": sparsity})


def _applied(
    pruner: BlockPruner, plan: PruningPlan, texts: dict[str, str], args: argparse.Namespace
) -> dict[str, Any]:
    pruned = BlockPruner(copy.deepcopy(pruner.model), tokenizer=pruner.tokenizer)
    pruned.prune(plan=plan)
    achieved = pruned.report.achieved
    removed = {family: round(counts["removed"], 4) for family, counts in achieved["units"].items()}
    return {
        "units_removed": removed,
        "parameters": achieved["parameters_after"],
        **_measure(pruned, texts, args),
    }


def _measure(pruner: BlockPruner, texts: dict[str, str], args: argparse.Namespace) -> dict[str, Any]:
    pruner.config = BlockPruningConfig(seqlen=args.seqlen)
    spec = EvaluationSpec(speed=False, continuations=0)
    found = {
        name: round(pruner.evaluate(path, num_samples=args.eval_windows, spec=spec)["perplexity"], 2)
        for name, path in texts.items()
    }
    return {"perplexity": found}


def _dense_folder(model: str | None) -> Path:
    """The dense model as a folder, which loads in no time."""
    if model is not None:
        return Path(model)
    folder = FOLDER / "dense"
    if not (folder / "config.json").exists():
        pruner = BlockPruner.from_pretrained(smollm2_gguf(), dtype=torch.float32)
        nothing = PruningPlan.from_blocks(pruner.model, [])
        pruner.prune(folder, plan=nothing, overwrite=True)
    return folder


def _news() -> Path:
    """News of the Australian Broadcasting Corporation that gensim carries as test data, one article per line."""
    lines = (package_dir("gensim") / "test/test_data/lee_background.cor").read_text(encoding="utf-8").splitlines()
    target = FOLDER / "abc_news.txt"
    target.write_text("\n\n".join(line for line in lines if line.strip()), encoding="utf-8")
    return target


def _table(report: dict[str, Any], texts: list[str]) -> str:
    return "\n".join(_lines(report, texts)) + "\n"


def _lines(report: dict[str, Any], texts: list[str]) -> Iterator[str]:
    yield f"{report['model']}; calibration: {report['calibration']}; perplexity: {report['measured_on']}"
    yield f"{report['device']}; {report['threads']} threads"
    head = "".join(f"{name:>12}" for name in texts)
    for family, title in (("mlp", "MLP channels"), ("attention", "attention heads, in KV groups")):
        yield ""
        yield f"{title:<30}{'removed':>8}{head}{'seconds':>10}{'extra MB':>10}"
        yield f"{'(dense)':<30}{'':>8}" + "".join(f"{report['dense']['perplexity'][name]:>12,.2f}" for name in texts)
        for row in report["results"]:
            if row["family"] == family:
                figures = "".join(f"{row['perplexity'][name]:>12,.2f}" for name in texts)
                removed = f"{row['units_removed'][family]:.1%}"
                cost = f"{row['seconds']:>10.1f}{row['extra_peak_bytes'] / 1e6:>10.0f}"
                yield f"{row['method']:<30}{removed:>8}{figures}{cost}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder; default: the SmolLM2-135M that a package carries")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--eval-windows", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--text", action="append", default=[], type=_named, metavar="NAME=PATH")
    parser.add_argument("--output", help="JSON file")
    parser.add_argument("--select", help=argparse.SUPPRESS)
    return parser.parse_args()


def _named(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    return name, path


if __name__ == "__main__":
    main()
