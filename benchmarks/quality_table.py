# SPDX-License-Identifier: Apache-2.0
"""What `quality.py` measured, in short: means over seeds, and how far below SLEB they are on the same tokens.

python benchmarks/quality_table.py                # of the committed results
python benchmarks/quality_table.py .demo/q.json   # of other ones
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


BASELINE = ("sleb", "none")
# What the product calls a choice together with a compensation.
_NAMES = {
    ("runs", "ridge+own"): "auto",
    ("runs", "reconstruct+own"): "auto, compensation=reconstruct",
    ("runs", "ridge"): "auto, generated_samples=0",
    ("half-runs", "ridge"): "auto, unit=half_block, generated_samples=0",
}
Rows = Sequence[Mapping[str, Any]]


def main() -> None:
    """Prints the table of a file."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results" / "quality.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    lines = list(table(report))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        sys.stdout.write(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n"
        )
    for line in asked(report):
        sys.stdout.write(f"{line}\n")


def table(report: Mapping[str, Any]) -> Iterator[list[str]]:
    """The heading, and a line for every number of blocks, choice and compensation; seeds are averaged."""
    rows, texts = report["rows"], list(report["texts"])
    yield ["blocks", "choice", "seeds", *texts]
    for count in sorted({row["count"] for row in rows}):
        groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for row in rows:
            if row["count"] == count:
                groups.setdefault((row["choice"], row["compensation"]), []).append(row)
        base = groups.get(BASELINE, [])
        for key, each in sorted(groups.items(), key=lambda item: _mean(item[1], texts[0])):
            yield [str(count), _name(*key), str(len(each)), *(_cell(each, base, text, key) for text in texts)]


def _name(choice: str, compensation: str) -> str:
    parts = compensation.split("+")
    fold, after = "+".join(part for part in parts if part != "distill"), ["distill"] * parts.count("distill")
    if (choice, fold) in _NAMES:
        return " + ".join([_NAMES[choice, fold], *after])
    return " + ".join([choice, *([] if fold in ("", "none") else [fold]), *after])


def _cell(rows: Rows, base: Rows, text: str, key: tuple[str, str]) -> str:
    """The mean perplexity, and its change against SLEB on the seeds that both have."""
    seeds = {row["seed"] for row in rows} & {row["seed"] for row in base}
    if not seeds or key == BASELINE:
        return f"{_mean(rows, text):.1f}"
    ours, theirs = ([row for row in each if row["seed"] in seeds] for each in (rows, base))
    return f"{_mean(rows, text):.1f} ({_mean(ours, text) / _mean(theirs, text) - 1:+.0%})"


def _mean(rows: Rows, text: str) -> float:
    return sum(row[text] for row in rows) / len(rows)


def asked(report: Mapping[str, Any]) -> Iterator[str]:
    """Benchmark tasks and repetition of the rows that have them, means over seeds.

    All seeds are asked the same questions, so that the error is that of one seed.
    """
    groups: dict[tuple[int, str, str], list[Mapping[str, Any]]] = {}
    for row in sorted(report["rows"], key=lambda row: (row["count"], row["choice"])):
        if "tasks" in row:
            groups.setdefault((row["count"], row["choice"], row["compensation"]), []).append(row)
    if groups:
        yield ""
    for (count, choice, compensation), rows in groups.items():
        tasks = {name: sum(row["tasks"][name]["value"] for row in rows) / len(rows) for name in rows[0]["tasks"]}
        chosen = [name for name in tasks if name != "lambada"]
        mean = sum(tasks[name] for name in chosen) / len(chosen)
        error = sum(_error([row["tasks"][name] for name in chosen]) for row in rows) / len(rows)
        told = " ".join(f"{name} {value:.3f}" for name, value in tasks.items())
        repeats = " ".join(f"{sum(shares) / len(rows):.2f}" for shares in zip(*map(_repeats, rows), strict=True))
        seeds = f", {len(rows)} seeds" if len(rows) > 1 else ""
        yield (
            f"{count} blocks, {_name(choice, compensation)}{seeds}: mean {mean:.3f} +- {error:.3f}; {told}; "
            f"repeated 4-grams {repeats}"
        )


def _error(tasks: Sequence[Mapping[str, Any]]) -> float:
    """The standard error of the mean over tasks."""
    return sum(task["stderr"] ** 2 for task in tasks) ** 0.5 / len(tasks)


def _repeats(row: Mapping[str, Any]) -> Sequence[float]:
    return list(row["repetition"].values())


if __name__ == "__main__":
    main()
