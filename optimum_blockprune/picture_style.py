# SPDX-License-Identifier: Apache-2.0
"""How all pictures look, and what they share: one size, one set of colours, places in inches, the same bytes.

Every picture is drawn on white, so that it reads on a dark page as well; what colour says is also said by shape, by
hatching or by a number. Nothing of matplotlib's settings is changed.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .report import PruningReport


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text


# As wide as the text column of a README (830 pixels) at 100 pixels per inch, with twice the pixels for sharp screens.
WIDTH, DPI = 8.3, 200
LEFT, RIGHT = 0.62, 0.16  # inches
SMALL, NORMAL, LARGE = 9, 9.5, 12.5  # points
FONT = "DejaVu Sans"  # comes with matplotlib

# Blue and vermilion of Okabe and Ito's palette for all kinds of colour vision, the second darkened to be read as text.
INK, MUTED, GRID, PAPER = "#1f2328", "#57606a", "#d8dee4", "#ffffff"
KEPT, GONE, APART = "#0072B2", "#B34700", "#aab2bb"

# An axis is logarithmic where the largest value is so many times the smallest, and so many times the middle one, which
# would lie at the bottom otherwise; our choice.
WIDE, ALOFT = 15.0, 4.0


def finite(value: Any) -> float | None:
    """The number, or `None` for anything that is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def scale_of(values: Iterable[float]) -> str:
    """`"linear"`, or `"log"` where a linear axis would hide most values; `"symlog"` if some are not positive."""
    values = sorted(values)
    low, middle, high = values[0], values[len(values) // 2], values[-1]
    if high <= 0 or high < ALOFT * middle:
        return "linear"
    return "symlog" if low <= 0 else "log" if high >= WIDE * low else "linear"


def linear_part(values: Iterable[float]) -> float:
    """How far from 0 a `"symlog"` scale stays linear."""
    values = list(values)
    return max(-min(values), max(values) / 300)


def block_count(report: PruningReport) -> int:
    """Number of blocks of the model before pruning; 0 where the report does not let it be known."""
    seen = [int(block) for block in report.scores if str(block).isdigit()]
    seen += [block for block in report.removed_blocks if isinstance(block, int)]
    seen += [int(half.partition(".")[0]) for half in report.removed_halves if half.partition(".")[0].isdigit()]
    seen += [block for losses in tried(report) for block in losses]
    listed = [len(entry.get("kept") or ()) for entry in report.widths.values()]
    return max(report.achieved.get("blocks_before") or 0, *listed, *(block + 1 for block in seen), 0)


def tried(report: PruningReport) -> list[dict[int, float | None]]:
    """Loss of every candidate of every step; empty for strategies that try no single blocks."""
    found = []
    for step in report.steps:
        losses = step.get("candidates")
        if not isinstance(losses, dict) or not losses or not all(str(block).isdigit() for block in losses):
            return []
        found.append({int(block): finite(loss) for block, loss in losses.items()})
    return found


def given_up(report: PruningReport) -> list[set[int]]:
    """The candidates of every step of a race that were dropped before all tokens were seen."""
    early = [step.get("dropped") for step in report.steps]
    return [
        {int(block) for block in step if str(block).isdigit()} if isinstance(step, dict) else set() for step in early
    ]


def details(report: PruningReport) -> dict[str, Any]:
    """Further figures of the strategy; of joined plans those of the first, whose blocks are the dense model's."""
    parts = report.strategy_details.get("parts")
    return dict(parts[0].get("details", {})) if parts else report.strategy_details


def dense_loss(report: PruningReport) -> float | None:
    """The loss of the dense model in a search that measured losses, in nats per token."""
    return finite(details(report).get("dense_loss"))


def by_divergence(report: PruningReport) -> bool:
    """Whether the losses of the search are divergences from the dense model's predictions."""
    return details(report).get("objective") == "kl"


def scored_text(report: PruningReport) -> str:
    """What the losses of the search are of: all of the calibration text, or the completions in it alone."""
    return "completions" if details(report).get("objective") == "task" else "calibration text"


def plain(value: Any, limit: int = 60) -> str:
    """Text of any origin in letters that the font has, on one line."""
    line = " ".join(str(value).split()).encode("latin-1", "replace").decode("latin-1")
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def strategy_name(report: PruningReport) -> str:
    """The strategy's name for a heading."""
    return plain(report.strategy or "an unnamed strategy", 40)


def new_figure(height: float) -> Figure:
    """An empty white picture, `height` inches high, that belongs to no window and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def heading(figure: Figure, title: str, subtitle: str) -> None:
    """Writes what is seen, in bold, and what one needs to read it, below."""
    height = figure.get_figheight()
    style = {"ha": "left", "va": "top", "parse_math": False}
    x = 0.16 / WIDTH
    _fit(figure.text(x, 1 - 0.12 / height, title, fontsize=LARGE, fontweight="bold", color=INK, **style))
    _fit(figure.text(x, 1 - 0.40 / height, subtitle, fontsize=NORMAL, color=MUTED, **style))


def _fit(text: Text) -> None:
    """Cuts a line that is longer than the picture is wide: a strategy or a family may have any name."""
    text.set_fontfamily(FONT)
    room = (WIDTH - 0.3) * DPI
    whole = text.get_text()
    for length in range(len(whole) - 1, 0, -1):
        if text.get_window_extent().width <= room:
            return
        text.set_text(f"{whole[:length]}...")


def axes_at(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Adds axes whose upper left corner is `left` and `top` inches from the picture's."""
    total = figure.get_figheight()
    axes = figure.add_axes((left / WIDTH, 1 - (top + height) / total, width / WIDTH, height / total))
    axes.set_facecolor(PAPER)
    axes.set_axisbelow(True)
    axes.grid(False)
    sides = {"left": True, "labelleft": True, "bottom": True, "labelbottom": True, "top": False, "right": False}
    axes.tick_params(labelsize=SMALL, colors=MUTED, labelcolor=INK, length=0, pad=3, which="both", **sides)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)
        spine.set_linewidth(0.8)
    return axes


def caption(axes: Axes, text: str) -> None:
    """Names the vertical axis above it, where it can be read without turning one's head."""
    axes.annotate(
        text,
        (0, 1),
        xytext=(-LEFT * 72 + 12, 5),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=SMALL,
        color=MUTED,
        parse_math=False,
    )


def grid(axes: Axes, axis: str = "y") -> None:
    """Draws faint lines at the labelled values."""
    axes.grid(True, which="major", axis=axis, color=GRID, linewidth=0.7)


def name_values(axes: Axes, scale: str, linear: float = 1.0) -> None:
    """Sets the scale of the vertical axis and labels it with ordinary numbers (0.01, 0.1, 1), never with none."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, SymmetricalLogLocator

    if scale == "linear":
        axes.locator_params(axis="y", nbins=5)
        return
    if scale == "symlog":
        axes.set_yscale("symlog", linthresh=linear)
        axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    powers = math.log10(high / low) if low > 0 else 1
    steps = (1.0,) if powers > 2.2 else (1.0, 3.0) if powers > 1 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=steps, numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def short(value: float) -> str:
    """A number as an axis or a point can carry it: three significant digits, thousands with k."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-4:
        return f"{value:.2g}".replace("e+0", "e").replace("e-0", "e-")
    if size >= 10_000:
        return f"{value / 1000:.3g}k"
    return f"{value:.0f}" if size >= 100 else f"{value:.3g}"


def reading(value: float) -> str:
    """A measured number beside others of its kind: as many decimals as tell them apart."""
    if not 0.01 <= abs(value) < 10_000:
        return short(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def label_step(points: float, largest: int) -> int:
    """How many columns of `points` each a block number needs: 1, 2, 5, 10, ..."""
    needed = (len(str(largest)) * 0.64 * SMALL + 4) / points
    scale = 1
    while True:
        for step in (scale, 2 * scale, 5 * scale):
            if step >= needed:
                return step
        scale *= 10


def png(figure: Figure) -> bytes:
    """The picture as PNG: the same bytes for the same figures, without date or version."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_fontfamily(FONT)
    out = io.BytesIO()
    # `savefig` would ask the user's settings whether to cut the margins.
    figure.canvas.print_png(out, metadata={"Software": None})
    return out.getvalue()
