# SPDX-License-Identifier: Apache-2.0
"""One table from the results of the benchmarks: every claim, what was measured for it, and on what.

python benchmarks/table.py                        # of the committed results
python benchmarks/table.py .demo/bench            # of those that `make bench` has just made
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


Row = tuple[str, str, str]


def main() -> None:
    """Prints the table of a folder of results."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results"
    rows: list[Row] = []
    for name, read in READERS.items():
        path = folder / f"{name}.json"
        if path.is_file():
            rows += read(json.loads(path.read_text(encoding="utf-8")))
    if not rows:
        raise SystemExit(f"There are no results in '{folder}'.")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write(f"{line.rstrip()}\n")


def _search(result: dict[str, Any]) -> Iterator[Row]:
    text = result["calibration"]
    place = (
        f"{len(result['naive']['removed'])} of {result['blocks']} blocks, {text['windows']} x {text['seqlen']} tokens"
    )
    yield "SLEB, published procedure", f"{result['naive']['seconds']:,.0f} s", f"{place}; {result['device']}"
    for search in ("exact", "race"):
        row = result[search]
        same = "the same blocks" if row["same_blocks"] else "OTHER BLOCKS"
        yield f"SLEB, search={search}", f"{row['seconds_ratio']:.3f} of its time", f"{same}; {text['tokens']:,} tokens"


def _one_pass(result: dict[str, Any]) -> Iterator[Row]:
    text = result["tokens"]
    for name, row in result["rows"].items():
        if not name.startswith("forward"):
            place = f"{text['windows']} x {text['seqlen']} tokens, medians of {result['repeats']}; {result['device']}"
            yield f"{name}, one pass", f"{row['ratio']:.2f} of a forward", place


def _apply(result: dict[str, Any]) -> Iterator[Row]:
    sizes, ratio = result["checkpoint"], result["ratio"]
    place = f"{sizes['bytes'] / 1e9:.1f} GB in {sizes['files']} files, {result['disk']}, cache {result['cache']}"
    peak, plain = (result[kind]["peak_bytes"] / 1e6 for kind in ("apply", "plain"))
    yield "apply, copying", f"{ratio['copying']:.2f} of cp", f"{place}; {result['device']}"
    yield "apply, whole process", f"{ratio['process']:.2f} of cp", "with importing torch and transformers"
    yield "apply, peak memory", f"{peak:.0f} MB", f"{plain:.0f} MB without packages that only the tests need"


def _streaming(result: dict[str, Any]) -> Iterator[Row]:
    for name, row in result["rows"].items():
        one, other = row["resident"], row["streamed"]
        same = "same choice" if row["same_choice"] else "OTHER CHOICE"
        peaks = f"{other['peak_mb']:,.0f} of {one['peak_mb']:,.0f} MB"
        yield f"{name}, streamed", peaks, f"{same}; {other['seconds'] / one['seconds']:.1f} of the time"


READERS = {"sleb_search": _search, "one_pass": _one_pass, "apply_checkpoint": _apply, "streaming": _streaming}


if __name__ == "__main__":
    main()
