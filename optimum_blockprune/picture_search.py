# SPDX-License-Identifier: Apache-2.0
"""The search path: the loss of every candidate of every step of a greedy search, and which one was taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .card_text import counted
from .picture_style import (
    GRID,
    INK,
    LEFT,
    NORMAL,
    PAPER,
    SMALL,
    WIDTH,
    axes_at,
    block_count,
    by_divergence,
    dense_loss,
    finite,
    given_up,
    heading,
    label_step,
    linear_part,
    new_figure,
    reading,
    scale_of,
    scored_text,
    short,
    strategy_name,
    tried,
)
from .report import PruningReport


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


_TOP, _BAR, _AFTER = 0.92, 0.16, 0.62  # inches: above the map, its colour bar, what is written right of it
_NAMES = 0.86  # inches for "12. block 104"


def search_figure(report: PruningReport) -> Figure | None:
    """Draws the map of losses; `None` for strategies that do not try single blocks one after the other."""
    found = _collect(report)
    if found is None:
        return None
    (steps, chosen), blocks, dense = found, block_count(report), dense_loss(report)
    known = [loss - (dense or 0) for step in steps for loss in step.values() if loss is not None]
    row = min(0.3, max(0.16, 6.0 / len(steps)))
    figure = new_figure(_TOP + row * len(steps) + 0.62 + 0.66)
    early = sum(map(len, given_up(report)))
    named = f"The search tried {sum(map(len, steps)) + early:,} removals to choose {len(steps)}"
    hatched = "untried or given up" if early else "not tried"
    heading(
        figure,
        named,
        f"Each row is one step: dark blocks hurt least when removed. Squares: what was taken. Hatched: {hatched}.",
    )
    width = WIDTH - LEFT - _NAMES - _AFTER + 0.1
    axes = axes_at(figure, _NAMES + 0.2, _TOP, width, row * len(steps))
    image = _draw_map(axes, steps, blocks, dense or 0.0, known)
    _mark(axes, chosen, size=min(row, width / blocks) * 72)
    _name_steps(axes, report, chosen, row * 72)
    axes.set_xticks(range(0, blocks, label_step(width / blocks * 72, blocks - 1)))
    axes.set_xlabel("block number (dense model)", fontsize=NORMAL, color=INK, labelpad=3)
    name = "loss above the dense model's, nats per token" if dense is not None else "loss, nats per token"
    _draw_bar(figure, image, known, "KL (nats per token)" if by_divergence(report) else name)
    return figure


def _collect(report: PruningReport) -> tuple[list[dict[int, float | None]], list[int]] | None:
    """The losses of every step, and the block that it took."""
    steps, chosen = tried(report), [step.get("block") for step in report.steps]
    if not all(isinstance(block, int) for block in chosen):
        return None
    known = any(loss is not None for step in steps for loss in step.values())
    return (steps, chosen) if known else None


def _draw_map(
    axes: Axes, steps: list[dict[int, float | None]], blocks: int, dense: float, known: list[float]
) -> AxesImage:
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize, SymLogNorm

    table = np.full((len(steps), blocks), np.nan)
    for number, step in enumerate(steps):
        for block, loss in step.items():
            if loss is not None:
                table[number, block] = loss - dense
    low, high = min(known), max(known)
    norms = {
        "log": lambda: LogNorm(low, high),
        "symlog": lambda: SymLogNorm(linear_part(known), vmin=low, vmax=high, base=10),
        "linear": lambda: Normalize(low, high if high > low else low + 1),
    }
    axes.set_facecolor("#f6f8fa")
    extent = (-0.5, blocks - 0.5, len(steps) - 0.5, -0.5)
    # Hatched, where there was nothing to try: blocks that are gone by then, and those never looked at.
    axes.fill_between(
        [-0.5, blocks - 0.5], -0.5, len(steps) - 0.5, facecolor="#f6f8fa", edgecolor=GRID, hatch="////", lw=0, zorder=0
    )
    return axes.imshow(
        np.ma.masked_invalid(table),
        cmap="cividis",
        norm=norms[scale_of(known)](),
        aspect="auto",
        extent=extent,
        interpolation="nearest",
    )


def _mark(axes: Axes, chosen: list[int], *, size: float) -> None:
    side = max(4.5, min(10.0, 0.62 * size))
    axes.plot(
        chosen,
        range(len(chosen)),
        linestyle="none",
        marker="s",
        markersize=side,
        markerfacecolor=PAPER,
        markeredgecolor=INK,
        markeredgewidth=1.2,
    )


def _name_steps(axes: Axes, report: PruningReport, chosen: list[int], points: float) -> None:
    """Left of the map what was taken, right of it the perplexity that was left."""
    step = label_step(points, 9)
    rows = [row for row in range(len(chosen)) if row % step == 0]
    axes.set_yticks(rows, [f"{row + 1}. block {chosen[row]}" for row in rows])
    for row in rows:
        left = finite(report.steps[row].get("perplexity"))
        if left is not None:
            axes.annotate(
                reading(left),
                (1, row),
                xytext=(5, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                va="center",
                fontsize=SMALL,
                color=INK,
                annotation_clip=False,
            )
    if any("perplexity" in step for step in report.steps):
        axes.annotate(
            "perplexity left",
            (1, 1),
            xytext=(38, 5),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="right",
            fontsize=SMALL,
            color=INK,
        )


def _draw_bar(figure: Figure, image: AxesImage, known: list[float], name: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, SymmetricalLogLocator

    height = figure.get_figheight()
    axes = axes_at(figure, _NAMES + 0.2, height - 0.58, 3.4, _BAR)
    bar = figure.colorbar(image, cax=axes, orientation="horizontal")
    scale = scale_of(known)
    locators = {
        "log": LogLocator(base=10, numticks=6),
        "symlog": SymmetricalLogLocator(base=10, linthresh=linear_part(known)),
        "linear": MaxNLocator(5),
    }
    bar.ax.xaxis.set_major_locator(locators[scale])
    bar.ax.xaxis.set_minor_locator(NullLocator())
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    bar.ax.tick_params(labelsize=SMALL, labelcolor=INK, length=2, color=INK)
    bar.outline.set_visible(False)
    figure.text(
        (_NAMES + 0.2 + 3.55) / WIDTH,
        (0.58 - _BAR / 2) / height,
        name + ("" if scale == "linear" else ", logarithmic"),
        va="center",
        fontsize=SMALL,
        color=INK,
    )


def search_words(report: PruningReport) -> str | None:
    """The search in words; `None` where there is no picture of it."""
    found = _collect(report)
    if found is None:
        return None
    steps, chosen = found
    loss = "KL (nats per token)" if by_divergence(report) else "loss"
    words = (
        f"Heat map of the search by {strategy_name(report)}: {loss} of each of {sum(map(len, steps)):,} candidates in "
        f"{counted(len(steps), 'step')}; taken, in this order: {', '.join(map(str, chosen))}"
    )
    left = finite(report.steps[-1].get("perplexity"))
    return words + (f"; the perplexity on the {scored_text(report)} is {reading(left)} at the end." if left else ".")
