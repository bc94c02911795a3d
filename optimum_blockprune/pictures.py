# SPDX-License-Identifier: Apache-2.0
"""Pictures of a report: which blocks went, how the search went, and what every removed block costs.

They are drawn from `pruning_report.json` alone; what the report has no data for is not drawn. Matplotlib is needed to
draw, not to say in words what would be drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ConfigurationError
from .picture_depth import depth_figure, depth_words
from .picture_quality import quality_figure, quality_words
from .picture_search import search_figure, search_words
from .picture_style import png
from .report import PruningReport


if TYPE_CHECKING:
    from matplotlib.figure import Figure


DEPTH_FILE, SEARCH_FILE, QUALITY_FILE = "pruning_depth.png", "pruning_search.png", "pruning_quality.png"

# What each file shows, whatever the report; `alt_texts` says it with the figures.
PICTURES = {
    DEPTH_FILE: "Map of the dense model's blocks: which were kept, which were removed, and their scores.",
    SEARCH_FILE: "Heat map of the search: the loss of every candidate of every step, and the block that was taken.",
    QUALITY_FILE: "Perplexity against the number of removed blocks, the dense model at the left.",
}
_FIGURES: dict[str, Callable[[PruningReport], Figure | None]] = {
    DEPTH_FILE: depth_figure,
    SEARCH_FILE: search_figure,
    QUALITY_FILE: quality_figure,
}
_WORDS: dict[str, Callable[[PruningReport], str | None]] = {
    DEPTH_FILE: depth_words,
    SEARCH_FILE: search_words,
    QUALITY_FILE: quality_words,
}


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def require() -> None:
    """Raises `ConfigurationError` with the remedy where matplotlib is missing."""
    if not can_draw():
        raise ConfigurationError(
            "Pictures need matplotlib, which is not installed: pip install 'optimum-blockprune[report]'"
        )


def alt_texts(report: PruningReport) -> dict[str, str]:
    """One or two sentences with figures for each picture that the report has data for, by file name."""
    said = {name: words(report) for name, words in _WORDS.items()}
    return {name: words for name, words in said.items() if words is not None}


def figures_of(report: PruningReport) -> dict[str, Figure]:
    """Draws what the report has data for, by file name, in the order of `PICTURES`.

    Raises:
        ConfigurationError: matplotlib is missing.
    """
    require()
    drawn = {name: draw(report) for name, draw in _FIGURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def draw_pictures(report: PruningReport, folder: str | Path) -> list[Path]:
    """Writes what the report has data for into a folder, and removes pictures that it has none for.

    Args:
        report: Of a pruning run.
        folder: Exists already.

    Returns:
        The written files, in the order of `PICTURES`; the same report gives the same bytes.

    Raises:
        ConfigurationError: matplotlib is missing.
    """
    folder, drawn = Path(folder), figures_of(report)
    for name in PICTURES:
        if name in drawn:
            (folder / name).write_bytes(png(drawn[name]))
        else:
            (folder / name).unlink(missing_ok=True)
    return [folder / name for name in drawn]
