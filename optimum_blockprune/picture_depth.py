# SPDX-License-Identifier: Apache-2.0
"""The depth map: one column per block of the dense model, with its score, its width, and whether it stayed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .card_text import FAMILIES
from .picture_style import (
    APART,
    GONE,
    GRID,
    INK,
    KEPT,
    LEFT,
    NORMAL,
    PAPER,
    RIGHT,
    SMALL,
    WIDTH,
    axes_at,
    block_count,
    by_divergence,
    caption,
    dense_loss,
    finite,
    given_up,
    grid,
    heading,
    label_step,
    linear_part,
    name_values,
    new_figure,
    plain,
    reading,
    scale_of,
    strategy_name,
    tried,
)
from .report import PruningReport


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# So many columns leave room for a number of two digits in each; more blocks go on in a further row.
_COLUMNS, _WIDEST = 36, 0.62  # inches
_SCORE, _WIDTH, _STRIP, _CAPTION, _NUMBERS, _TOP = 1.25, 0.8, 0.3, 0.27, 0.34, 0.88  # inches

# What scores mean and which go first belongs to the strategy; this is what the built-in ones say of theirs.
_MEANINGS = {
    "sleb": "loss without this block, nats per token (low ones go first)",
    "shortgpt": "block influence: 1 - cosine of its input and output (low ones go first)",
    "angular": "angle between a block's input and output, in parts of 180° (runs of low ones go first)",
    "mi_prun": "what the block's output says about its input (runs of high ones go first)",
    "functional_network": "part in the functional networks (low ones tend to go first)",
}
_PALE = "#dbe3ea"


@dataclass(frozen=True)
class _Map:
    """What there is to draw. All lists have one entry per block of the dense model."""

    order: dict[int, int]
    halves: dict[str, int]
    scores: list[float | None]
    broken: list[int]
    meaning: str
    shares: dict[str, list[float | None]]
    apart: set[int]

    @property
    def blocks(self) -> int:
        return len(self.scores)

    def colour(self, block: int) -> str:
        return GONE if block in self.order else KEPT


def depth_figure(report: PruningReport) -> Figure | None:
    """Draws the depth map; `None` if nothing is known of single blocks."""
    found = _collect(report)
    if found is None:
        return None
    rows = _rows(found)
    height = _TOP + len(rows) * _row_height(found) + 0.26
    figure = new_figure(height)
    title, subtitle = _titles(report, found)
    heading(figure, title, subtitle)
    _legend(figure, found)
    for number, row in enumerate(rows):
        _draw_row(figure, found, row, top=_TOP + number * _row_height(found), columns=len(rows[0]))
    figure.axes[-1].set_xlabel("block number (dense model)", fontsize=NORMAL, color=INK, labelpad=3)
    return figure


def depth_words(report: PruningReport) -> str | None:
    """The depth map in words; `None` where there is none."""
    found = _collect(report)
    return None if found is None else _words(report, found)


def _collect(report: PruningReport) -> _Map | None:
    if not report.removed_units and not any(entry.get("kept") for entry in report.widths.values()):
        return None
    blocks = block_count(report)
    raw = {int(block): score for block, score in report.scores.items() if str(block).isdigit()}
    dense, first = dense_loss(report), (tried(report) or [{}])[0]
    early = given_up(report)[0] if first else set()
    meaning = _MEANINGS.get((report.strategy or "").split("+")[0], "score of each block, as the strategy defines it")
    if dense is not None and first:
        raw = {block: score - dense if finite(score) is not None else score for block, score in raw.items()}
        meaning = "added loss if only this block is removed, nats per token (low ones go first)"
        if by_divergence(report):
            meaning = "KL (nats per token) if only this block is removed (low ones go first)"
    return _Map(
        order={block: place for place, block in enumerate(report.removed_units, 1) if isinstance(block, int)},
        halves={half: place // 2 + 1 for place, half in enumerate(report.removed_halves)},
        scores=[finite(raw.get(block)) for block in range(blocks)],
        broken=[block for block in raw if finite(raw[block]) is None],
        meaning=meaning,
        shares={family: shares for family, entry in report.widths.items() if (shares := kept_shares(entry, blocks))},
        apart=set(range(blocks)) - set(first) - early - set(report.removed_blocks) if first else set(),
    )


def kept_shares(entry: dict[str, Any], blocks: int) -> list[float | None]:
    """The kept share of a family's units in each block, 0 to 1; `None` where the block is gone or has none."""
    kept, units = list(entry.get("kept") or ()), entry.get("units")
    units = list(units) if isinstance(units, (list, tuple)) else [units] * len(kept)
    found: list[float | None] = [None] * blocks
    for block, (part, whole) in enumerate(zip(kept, units, strict=False)):
        if finite(part) is not None and finite(whole):
            found[block] = part / whole
    return found if any(share is not None for share in found) else []


def _rows(found: _Map) -> list[range]:
    """The blocks of each row: as even as possible, as few rows as possible."""
    columns = 28 if len(found.order) > 99 else _COLUMNS
    number = math.ceil(found.blocks / columns)
    size = math.ceil(found.blocks / number)
    return [range(start, min(start + size, found.blocks)) for start in range(0, found.blocks, size)]


def _panels(found: _Map) -> list[str]:
    scored = any(score is not None for score in found.scores)
    return [*(["score"] if scored else []), *found.shares, *(["strip"] if found.order or found.halves else [])]


def _row_height(found: _Map) -> float:
    heights = {"score": _SCORE + _CAPTION, "strip": _strip_height(found) + 0.08}
    return sum(heights.get(panel, _WIDTH + _CAPTION) for panel in _panels(found)) + _NUMBERS


def _strip_height(found: _Map) -> float:
    return _STRIP * (1.8 if found.halves else 1)


def _draw_row(figure: Figure, found: _Map, row: range, *, top: float, columns: int) -> None:
    column = min((WIDTH - LEFT - RIGHT) / columns, _WIDEST)
    width = column * len(row)
    for panel in _panels(found):
        if panel == "strip":
            top += 0.08
            axes = axes_at(figure, LEFT, top, width, _strip_height(found))
            (_half_strip if found.halves else _strip)(axes, found, row)
            top += _strip_height(found)
        elif panel == "score":
            axes = axes_at(figure, LEFT, top + _CAPTION, width, _SCORE)
            _scores(axes, found, row, column * 72)
            top += _CAPTION + _SCORE
        else:
            axes = axes_at(figure, LEFT, top + _CAPTION, width, _WIDTH)
            _shares(axes, found, row, panel)
            top += _CAPTION + _WIDTH
        axes.set_xlim(row[0] - 0.5, row[-1] + 0.5)
        axes.set_xticks([])
    step = label_step(column * 72, found.blocks - 1)
    axes.set_xticks([block for block in row if block % step == 0])


def _strip(axes: Axes, found: _Map, row: range) -> None:
    """Full cells stay, hollow ones are gone and say when."""
    for block in row:
        gone, apart = block in found.order, block in found.apart
        axes.bar(
            block,
            1,
            width=0.86,
            facecolor=PAPER if gone else APART if apart else KEPT,
            edgecolor=GONE if gone else INK if apart else KEPT,
            linewidth=1.2 if gone else 0,
            hatch="////" if apart else None,
        )
        if gone:
            number = str(found.order[block])
            axes.text(block, 0.48, number, ha="center", va="center", fontsize=SMALL, fontweight="bold", color=GONE)
    axes.set_ylim(-0.05, 1.05)
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _half_strip(axes: Axes, found: _Map, row: range) -> None:
    """As `_strip`, with two cells for each block: attention above, MLP below."""
    for block in row:
        for bottom, part in ((0.52, "attention"), (0.0, "mlp")):
            place = found.halves.get(f"{block}.{part}")
            edge = KEPT if place is None else GONE
            face = KEPT if place is None else PAPER
            width = 0 if place is None else 1.2
            axes.bar(block, 0.48, bottom=bottom, width=0.86, facecolor=face, edgecolor=edge, linewidth=width)
            if place is not None:
                style = {"ha": "center", "va": "center", "fontsize": SMALL, "fontweight": "bold", "color": GONE}
                axes.text(block, bottom + 0.22, str(place), **style)
    axes.set_ylim(-0.05, 1.05)
    axes.set_yticks([0.24, 0.76], ["MLP", "attn"], fontsize=SMALL)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _scores(axes: Axes, found: _Map, row: range, points: float) -> None:
    known = [score for score in found.scores if score is not None]
    scale = scale_of(known)
    log = scale == "log"
    low, high = (min(known) / 1.6, max(known) * 1.6) if log else (min(0, *known), max(0, *known))
    room = 0 if log else 0.08 * ((high - low) or 1)
    axes.set_ylim(low * 1.6 if scale == "symlog" else low - (room if low < 0 else 0), high + room)
    name_values(axes, scale, linear_part(known))
    if not log:
        axes.axhline(0, color=INK, linewidth=0.8, zorder=1)
    size = min(6.5, 0.55 * points)
    for block in row:
        score = found.scores[block]
        if score is None:
            continue
        gone = block in found.order
        axes.vlines(block, low if log else 0, score, color=found.colour(block), linewidth=1.4, zorder=2)
        shape = {"marker": "s" if gone else "o", "markerfacecolor": PAPER if gone else KEPT, "markeredgewidth": 1.4}
        axes.plot([block], [score], markersize=size, markeredgecolor=found.colour(block), zorder=3, **shape)
    for block in set(found.broken) & set(row):
        axes.annotate("×", (block, 0.9), xycoords=("data", "axes fraction"), ha="center", fontsize=NORMAL, color=INK)
    grid(axes)
    caption(axes, found.meaning + (", logarithmic" if scale != "linear" else ""))


def _shares(axes: Axes, found: _Map, row: range, family: str) -> None:
    shares = found.shares[family]
    for block in row:
        share = shares[block]
        if share is None:
            axes.bar(block, 100, width=0.86, facecolor=PAPER, edgecolor=GRID, hatch="////", linewidth=0)
            continue
        axes.bar(block, 100, width=0.86, facecolor=_PALE, linewidth=0)
        axes.bar(block, 100 * share, width=0.86, facecolor=KEPT, linewidth=0)
    axes.set_ylim(0, 108)
    axes.set_yticks([0, 50, 100], ["0", "50", "100"])
    axes.spines["left"].set_visible(False)
    known = [share for share in shares if share is not None]
    low, high = (f"{100 * share:.0f}" for share in (min(known), max(known)))
    same = f"{low} % in every block" if low == high else f"{low} to {high} %"
    caption(axes, f"{_family(family)} kept, % of the dense block's ({same})")


def _family(name: str) -> str:
    return FAMILIES.get(name, plain(name, 24))


def _legend(figure: Figure, found: _Map) -> None:
    """What the marks mean, in one line under the heading."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    known = list(_marks(found))
    patches = [Patch(label=label, **style) for label, style in known]
    if found.broken:
        cross = {"marker": "x", "linestyle": "none", "color": INK, "markersize": 5.5}
        patches.append(Line2D([], [], label="score not finite", **cross))
    figure.legend(
        handles=patches,
        loc="upper left",
        bbox_to_anchor=(0.09 / WIDTH, 1 - 0.60 / figure.get_figheight()),
        ncols=len(patches),
        fontsize=SMALL,
        labelcolor=INK,
        frameon=False,
        handlelength=1.2,
        handleheight=0.9,
        columnspacing=1.2,
        borderaxespad=0,
    )


def _marks(found: _Map) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "kept", {"facecolor": KEPT, "edgecolor": KEPT}
    if found.order or found.halves:
        label = "removed (number: order of removal)"
        yield label, {"facecolor": PAPER, "edgecolor": GONE, "linewidth": 1.2}
    if found.apart:
        yield "kept, never a candidate", {"facecolor": APART, "edgecolor": INK, "hatch": "////", "linewidth": 0}
    if found.shares:
        yield "removed width", {"facecolor": _PALE, "edgecolor": _PALE}


def _titles(report: PruningReport, found: _Map) -> tuple[str, str]:
    gone = len(report.removed_units)
    worth = " as half-blocks" if found.halves else ""
    parts = [f"{gone} of {found.blocks} blocks{worth}"] if gone else []
    parts += [f"{_lost(report, found, family)} of {_family(family)}" for family in found.shares]
    saved = finite(report.achieved.get("parameters_removed"))
    size = f"; {saved:.1%} of the parameters are gone".replace("%", " %") if saved is not None else ""
    return f"Removed: {', '.join(parts)}", f"chosen by {strategy_name(report)}{size}"


def _lost(report: PruningReport, found: _Map, family: str) -> str:
    """The removed share of a family's units in the blocks that stay."""
    known = [share for share in found.shares[family] if share is not None]
    counted = finite(report.achieved.get("units", {}).get(family, {}).get("removed"))
    return f"{100 * (1 - sum(known) / len(known) if counted is None else counted):.0f} %"


def _words(report: PruningReport, found: _Map) -> str:
    """The picture in one sentence."""
    title, _ = _titles(report, found)
    words = f"Map of the {found.blocks} blocks of the dense model. {title}, chosen by {strategy_name(report)}"
    units = report.removed_units
    if units:
        which = "the blocks went in this order: " if len(units) > 1 else "it is block "
        words += f"; {which}{', '.join(map(str, units))}"
    known = {block: score for block, score in enumerate(found.scores) if score is not None}
    if known:
        low, high = (find(known, key=known.__getitem__) for find in (min, max))
        scores = "added losses (of one block alone)" if found.meaning.startswith("added loss") else "scores"
        words += f"; {scores} run from {reading(known[low])} (block {low}) to {reading(known[high])} (block {high})"
    return words + "."
