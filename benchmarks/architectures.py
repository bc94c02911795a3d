# SPDX-License-Identifier: Apache-2.0
"""Prunes a tiny model of every architecture in several ways, compares with the truth, and writes down what came of it.

The models and the comparison are those of the test suite (`tests/zoo`, `tests/exactness.py`). Writes
`benchmarks/results/architectures.json`, the list of proven families in the architecture table, and from both of them
`docs/architectures.md`. What is proven may be checked less, so a run after the list has changed is a further proof.

    python benchmarks/architectures.py                    # the whole sweep; half an hour on two cores
    python benchmarks/architectures.py --page             # the page alone, from the stored results
    python benchmarks/architectures.py --only llama t5    # some specimens; the others stay as they were stored
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import textwrap
import warnings
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

from architectures_page import families, render
from material import machine
from tqdm.auto import tqdm


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "architectures.json"
PAGE = ROOT / "docs" / "architectures.md"
TABLE = ROOT / "optimum_blockprune" / "architectures.json"
_FILES = (3, 1)


def main() -> None:
    """Runs what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", action="store_true", help="Only write the page from the stored results.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="Only these specimens; replaces their results.")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.page:
        write_page(json.loads(RESULTS.read_text(encoding="utf-8")))
        return
    outcome = sweep(args.workers, args.only)
    if args.only:
        stored = json.loads(RESULTS.read_text(encoding="utf-8"))
        if stored["versions"] != outcome["versions"]:
            raise SystemExit("The stored results are of other versions: run the whole sweep.")
        outcome["subjects"] = {**stored["subjects"], **outcome["subjects"]}
    RESULTS.write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")
    write_families(outcome)
    write_page(outcome)


def write_families(outcome: dict[str, Any]) -> None:
    """Replaces the list of families in the table; the rest of the file stays as it is."""
    names = ", ".join(f'"{name}"' for name in sorted(families(outcome)))
    lines = textwrap.fill(names, 114, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    text = TABLE.read_text(encoding="utf-8")
    TABLE.write_text(re.sub(r'"families": \[[^\]]*\]', f'"families": [\n{lines}\n  ]', text), encoding="utf-8")


def write_page(outcome: dict[str, Any]) -> None:
    """Renders the page."""
    PAGE.write_text(render(outcome, json.loads(TABLE.read_text(encoding="utf-8"))), encoding="utf-8")


def sweep(workers: int, only: list[str] | None) -> dict[str, Any]:
    """Judges all specimens in several processes and returns every verdict."""
    _prepare()
    from exactness import SUBJECTS
    from zoo import causal, multimodal, other_stacks

    from optimum_blockprune.environment import versions

    subjects = [each for each in SUBJECTS if not only or each.name in only]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare) as pool:
        verdicts = list(tqdm(pool.map(_judged, subjects), total=len(subjects), unit=" specimens"))
    unbuilt = {"causal": causal.UNBUILT, "multimodal": multimodal.UNBUILT, "other": other_stacks.UNBUILT}
    return {
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "subjects": dict(zip((f"{each.group}/{each}" for each in subjects), verdicts, strict=True)),
        "unbuilt": unbuilt,
    }


def _judged(subject: Any) -> dict[str, Any]:
    from exactness import judge, judge_files, removals

    chosen = removals(subject, subject.depth(subject.model()))
    found = {label: (removed, judge(subject, removed)) for label, removed in chosen.items()}
    found["files"] = (_FILES, judge_files(subject, _FILES))
    return {
        "model_type": subject.model_type,
        "text_type": subject.text_type,
        "removals": {label: [verdict.status, list(gone), verdict.reason] for label, (gone, verdict) in found.items()},
    }


def _prepare() -> None:
    """What every process needs before it imports torch."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(ROOT / "tests"))
    warnings.filterwarnings("ignore")
    import torch
    import transformers
    from optimum.utils import logging

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.set_verbosity_error()


if __name__ == "__main__":
    main()
