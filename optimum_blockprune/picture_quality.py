# SPDX-License-Identifier: Apache-2.0
"""Quality against depth: perplexity at every measured number of removed blocks, and beside it what is gained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .card_text import counted, text_name
from .picture_style import (
    GONE,
    INK,
    KEPT,
    LEFT,
    MUTED,
    NORMAL,
    PAPER,
    SMALL,
    WIDTH,
    axes_at,
    finite,
    grid,
    heading,
    name_values,
    new_figure,
    plain,
    reading,
    scale_of,
    strategy_name,
)
from .repetition import degenerated
from .report import PruningReport


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_TOP, _HEIGHT, _GAP = 0.95, 2.5, 0.78  # inches


def quality_figure(report: PruningReport) -> Figure | None:
    """Draws perplexity against depth; `None` unless it was measured at two depths on one text."""
    depths = _comparable(report)
    if not depths:
        return None
    gain = _gain(depths)
    figure = new_figure(_TOP + _HEIGHT + 0.56)
    heading(figure, *_titles(report, depths))
    whole = WIDTH - LEFT - 0.3
    width = (whole - _GAP) * 0.6 if gain else whole
    axes = axes_at(figure, LEFT, _TOP, width, _HEIGHT)
    _draw_perplexity(axes, report, depths)
    if gain:
        _draw_gain(axes_at(figure, LEFT + width + _GAP, _TOP, whole - width - _GAP, _HEIGHT), depths, *gain)
    return figure


def _comparable(report: PruningReport) -> list[dict[str, Any]]:
    """The depths measured on the same text as the first, by number of removed blocks; none if these are too few."""
    measured = [entry for entry in report.depths if "perplexity" in entry and isinstance(entry.get("removed"), int)]
    same = [entry for entry in measured if _text(entry) == _text(measured[0])]
    known = {entry["removed"] for entry in same if finite(entry["perplexity"]) is not None}
    return sorted(same, key=lambda entry: entry["removed"]) if len(known) > 1 else []


def _text(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(entry.get(name) for name in ("source", "fingerprint", "tokens"))


def _collapsed(depths: list[dict[str, Any]]) -> set[int]:
    """The depths whose generated text degenerated, by number of removed blocks."""
    dense = next((entry.get("generation") for entry in depths if entry["removed"] == 0), None)
    return {
        entry["removed"]
        for entry in depths
        if entry["removed"] and entry.get("generation") and degenerated(entry["generation"], dense)
    }


def _gain(depths: list[dict[str, Any]]) -> tuple[str, str, float] | None:
    """What becomes better with fewer blocks: speed where it was measured, else the number of parameters."""
    candidates = (
        ("decode_tokens_per_second", "generated tokens per second, higher is better", 1.0),
        ("parameters", "parameters, millions", 1e-6),
    )
    for name, label, factor in candidates:
        if sum(finite(entry.get(name)) is not None for entry in depths) >= 2:
            return name, label, factor
    return None


def _points(depths: list[dict[str, Any]], name: str, factor: float = 1.0) -> tuple[list[int], list[float]]:
    known = [(entry["removed"], finite(entry.get(name))) for entry in depths]
    return [x for x, y in known if y is not None], [y * factor for _, y in known if y is not None]


def _draw_perplexity(axes: Axes, report: PruningReport, depths: list[dict[str, Any]]) -> None:
    x, y = _points(depths, "perplexity")
    scale = scale_of(y)
    log = scale == "log"
    low, high = min(y), max(y)
    room = 0.16 * (high - low) or 0.1 * abs(high) or 1.0
    factor = (high / low) ** 0.16 if log else 1
    axes.set_ylim(*((low / factor, high * factor) if log else (max(0.0, low - 1.5 * room), high + 1.4 * room)))
    name_values(axes, scale)
    _line(axes, x, y)
    for removed in _collapsed(depths):
        if removed in x:
            axes.plot([removed], [y[x.index(removed)]], marker="x", markersize=11, markeredgewidth=1.8, color=GONE)
    for removed in {entry["removed"] for entry in depths} - set(x):
        where = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "top"}
        axes.annotate("not\nfinite", (removed, 1), fontsize=SMALL, color=GONE, **where)
    _label(axes, x, y, report)
    label = f"perplexity (lower is better{', logarithmic' if log else ''})"
    _finish(axes, depths, label + ("; × its text degenerated" if _collapsed(depths) else ""))


def _line(axes: Axes, x: list[int], y: list[float]) -> None:
    """Dots for pruned models, a square for the dense one."""
    axes.plot(x, y, color=KEPT, linewidth=1.6, zorder=2)
    size = max(3.0, min(6.0, 120 / len(x)))
    for removed, value in zip(x, y, strict=True):
        shape = {"marker": "o" if removed else "s", "markerfacecolor": KEPT if removed else PAPER}
        axes.plot(
            [removed],
            [value],
            markersize=size if removed else 6,
            markeredgecolor=KEPT,
            markeredgewidth=1.5,
            zorder=3,
            **shape,
        )


def _label(axes: Axes, x: list[int], y: list[float], report: PruningReport) -> None:
    """Writes values at the points: all if there are few, else at the dense model, at this one and at the last."""
    here = len(report.removed_units)
    shown = set(x) if len(x) <= 9 else {x[0], x[-1], here}
    for removed, value in zip(x, y, strict=True):
        if removed not in shown:
            continue
        name = "dense " if removed == 0 else "this model " if removed == here else ""
        first = removed == x[0]
        place = {"ha": "left" if first else "right", "va": "top" if first else "bottom"}
        style = {"fontsize": SMALL, "color": INK, "fontweight": "bold" if removed == here else "normal"}
        offset = (-3, -7) if first else (5, 7)
        axes.annotate(
            f"{name}{reading(value)}", (removed, value), xytext=offset, textcoords="offset points", **place, **style
        )


def _draw_gain(axes: Axes, depths: list[dict[str, Any]], name: str, label: str, factor: float) -> None:
    x, y = _points(depths, name, factor)
    axes.set_ylim(0, 1.25 * max(y) or 1.0)
    axes.locator_params(axis="y", nbins=5)
    _line(axes, x, y)
    for index in (0, -1):
        style = {"fontsize": SMALL, "color": INK, "va": "bottom", "ha": "right" if index else "left"}
        axes.annotate(
            reading(y[index]),
            (x[index], y[index]),
            xytext=(5 if index else -4, 8),
            textcoords="offset points",
            **style,
        )
    _finish(axes, depths, label)


def _finish(axes: Axes, depths: list[dict[str, Any]], label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    last = max(entry["removed"] for entry in depths)
    room = 0.04 * last
    axes.set_xlim(-room, last + room)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("blocks removed", fontsize=NORMAL, color=INK, labelpad=3)
    axes.annotate(
        label,
        (0, 1),
        xytext=(-26, 7),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=SMALL,
        color=MUTED,
    )
    grid(axes)


def _titles(report: PruningReport, depths: list[dict[str, Any]]) -> tuple[str, str]:
    first = depths[0]
    where = f"text: {plain(text_name(str(first['source'])), 40)}" if first.get("source") else "one text"
    if isinstance(first.get("tokens"), int):
        where += f", {first['tokens']:,} tokens scored"
    note = f"Blocks go in the order that {strategy_name(report)} chose; {where}."
    return "What each removed block costs", note


def quality_words(report: PruningReport) -> str | None:
    """Quality against depth in words; `None` where there is no picture of it."""
    depths = _comparable(report)
    if not depths:
        return None
    x, y = _points(depths, "perplexity")
    values = "; ".join(
        f"{reading(value)} with {counted(removed, 'block')} removed" for removed, value in zip(x, y, strict=True)
    )
    if len(x) > 9:
        ends = f"{reading(y[0])} with {counted(x[0], 'block')} removed, {reading(y[-1])} with {x[-1]}"
        values = f"{ends}; {len(x)} depths were measured"
    return f"Perplexity (lower is better) against depth for {strategy_name(report)}: {values}."
