# SPDX-License-Identifier: Apache-2.0
"""How a card spells things: numbers, tables, code, and names of models and texts without the author's folders."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .text import HUB_DATASETS


HUB = "https://huggingface.co"
ABSENT = "–"

# What the families of units are called wherever people read of them.
FAMILIES = {"mlp": "MLP channels", "attention": "KV groups or heads"}

# The cache of the Hub keeps a repository under its name: such a folder is no folder of the author's own.
_SNAPSHOT = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]+)")
_LARGE = 1_000_000.0

# What means something to Markdown in the midst of a line, to HTML or to the formulas of the Hub.
_MARKS = re.compile(r"([\\`*\[\]<>|&~$#])")


def figure(value: Any, digits: int = 2) -> str:
    """Spells a number: whole ones with separators, others with `digits` decimals, huge ones with an exponent.

    What is not there is a dash; what is no finite number is said to be so.
    """
    if value is None:
        return ABSENT
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2e}" if abs(value) >= _LARGE else f"{value:,.{digits}f}"


def percent(share: float) -> str:
    """Spells a share of one."""
    return f"{share:.1%}".replace("%", " %")


def megabytes(size: int | None) -> str:
    """Spells a size in bytes as MB (a million bytes)."""
    return figure(None if size is None else size / 1e6, 1)


def counted(count: int, noun: str) -> str:
    """Spells `1 window`, `2 windows`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def one_line(text: Any) -> str:
    """Text of any origin as one line of characters that can be seen and written."""
    return "".join(map(_visible, " ".join(str(text).split())))


def _visible(letter: str) -> str:
    return letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}"


def plain(text: Any) -> str:
    """Text of any origin as one line that Markdown shows as it is, in a table as well."""
    # Between letters an underscore means nothing to Markdown.
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", _MARKS.sub(r"\\\1", one_line(text)))


def unescaped(line: str) -> str:
    """What `plain` was given, but for white space."""
    return re.sub(r"\\([\\`*\[\]<>|&~$#_])", r"\1", line)


def code(text: Any) -> str:
    """Text of any origin as a code span, in a table as well; as plain text where it would end the span or the cell."""
    line = one_line(text)
    return plain(line) if not line or re.search("[`|]", line) else f"`{line}`"


def fenced(text: str, language: str) -> str:
    """Text as a code block."""
    inner = "".join(" " if each.isspace() and each != "\n" else each for each in text)
    inner = "\n".join("".join(map(_visible, line)) for line in inner.split("\n"))
    fence = "`" * max(3, *(len(run) + 1 for run in ["", *re.findall("`+", inner)]))
    return f"{fence}{language}\n{inner}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table; `left` columns are flush left, the others right. Cells are Markdown already."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def picture(name: str, words: str) -> str:
    """A picture of the folder, with words for those who do not see it."""
    return f"![{plain(words)}]({name})"


def paragraphs(*parts: str | None) -> str:
    """Joins what is there by blank lines."""
    return "\n\n".join(part for part in parts if part)


def healing_words(entry: Mapping[str, Any]) -> str:
    """One training after pruning, in plain words."""
    learned = {
        "lora": "to predict the next token",
        "distill": "to predict what the dense model does",
    }.get(entry["method"], entry["method"])
    tokens = f" ({counted(entry['tokens'], 'token')})" if entry.get("tokens") is not None else ""
    change = [figure(entry.get(f"perplexity_{when}")) for when in ("before", "after")]
    fate = "" if entry["kept"] else "; that did not help, and the weights are those from before"
    return (
        f"{counted(entry['steps'], 'step')} of training {learned} on {text_name(entry['source'])}{tokens} took the "
        f"perplexity on held-out windows of that text from {change[0]} to {change[1]}{fate}"
    )


def hub_id(name: str | None, *, loaded: bool = False) -> str | None:
    """The repository on the Hub that `name` means; `None` for a folder, a file and whatever is spelled like none.

    Args:
        name: Repo id or path.
        loaded: Whether it is known to come from the Hub (there is a commit): then `gpt2` is one, too.
    """
    if name is None:
        return None
    cached = _SNAPSHOT.search(name)
    if cached:
        return cached[1].replace("--", "/", 1)
    if not loaded and ("/" not in name or name.endswith(".gguf")) or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def commit_of(path: str) -> str | None:
    """The commit that a path in the Hub's cache belongs to."""
    cached = _SNAPSHOT.search(path)
    return cached[2] if cached else None


def last_part(path: str) -> str:
    """The name of a file or folder without where it lies."""
    name = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
    return os.path.basename(os.path.abspath(path)) if name in ("", ".", "..") else name


def model_name(name: str | None, *, loaded: bool = False) -> str:
    """A model in Markdown: a link to the Hub, or the bare name of a folder or file."""
    if not name:
        return "a model of unknown name"
    repo = hub_id(name, loaded=loaded)
    return f"[{plain(repo)}]({HUB}/{repo})" if repo else code(last_part(name))


def hub_text(source: str) -> tuple[str, str | None, str | None] | None:
    """Repository, configuration and split of a source that `text.open_rows` named; `None` for any other text."""
    name, _, rest = source.partition(" (")
    known = HUB_DATASETS.get(name)
    if known is None or not (rest.startswith(f"{known.repo}, ") and rest.endswith(")")):
        return None
    split = rest.rstrip(")").split(", ")[-1]
    return known.repo, known.config, split if split in known.splits else None


def text_name(source: str) -> str:
    """A text without the folder that it lies in; named data sets and texts in memory keep their description."""
    return source if hub_text(source) else last_part(source)
