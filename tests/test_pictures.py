# SPDX-License-Identifier: Apache-2.0
"""Pictures: drawn for what a report has data for, the same bytes each time, readable, and never a reason to fail."""

from __future__ import annotations

import copy
import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from toys import config, toy_pruner, word_tokenizer
from zoo import other_stacks

from optimum_blockprune import BlockPruner, PruningReport
from optimum_blockprune.errors import BlockPruningError
from optimum_blockprune.picture_style import label_step, plain, png, reading, scale_of, short
from optimum_blockprune.pictures import (
    DEPTH_FILE,
    PICTURES,
    QUALITY_FILE,
    SEARCH_FILE,
    alt_texts,
    can_draw,
    draw_pictures,
    figures_of,
    require,
)


DENSE_LOSS = 2.8
GENERATION = {
    "continuations": 4,
    "prompt_tokens": 8,
    "new_tokens": 16,
    "distinct_1": 0.5,
    "distinct_2": 0.6,
    "repetition": 0.1,
}


def greedy(blocks: int, removed: int) -> PruningReport:
    """A report as SLEB's, with made-up losses; the first and the last block are no candidates."""
    alive, steps = list(range(1, blocks - 1)), []
    for step in range(removed):
        losses = {str(block): DENSE_LOSS + 0.01 * (1 + step) + ((block * 7) % blocks) ** 3 / 99 for block in alive}
        best = min(losses, key=losses.__getitem__)
        alive.remove(int(best))
        entry = {"block": int(best), "loss": losses[best], "perplexity": math.exp(losses[best])}
        steps.append({**entry, "candidates": losses})
    return PruningReport(
        strategy="sleb",
        achieved={"blocks_before": blocks, "blocks_after": blocks - removed, "parameters_removed": 0.1},
        removed_blocks=[step["block"] for step in steps],
        scores=dict(steps[0]["candidates"]) if steps else {},
        steps=steps,
        strategy_details={"dense_loss": DENSE_LOSS},
        depths=[depth(count, 20 + count) for count in range(removed + 1)],
    )


def depth(removed: int, perplexity: float, **more: Any) -> dict[str, Any]:
    sizes = {"removed": removed, "blocks": 30 - removed, "parameters": 1_000_000 - 1000 * removed, "size_bytes": 99}
    return {**sizes, "source": "texts/held_out.txt", "tokens": 1016, "perplexity": perplexity, **more}


def narrowed(blocks: int, removed: tuple[int, ...] = (), listed: bool = False) -> PruningReport:
    """A report of pruned width; `listed`: the units are said block by block."""
    kept = [None if block in removed else 8 - block % 3 for block in range(blocks)]
    units: Any = [None if each is None else 8 for each in kept] if listed else 8
    return PruningReport(
        strategy="sleb+bip" if removed else "bip",
        achieved={"blocks_before": blocks, "blocks_after": blocks - len(removed)},
        removed_blocks=list(removed),
        widths={family: {"units": units, "kept": kept} for family in ("mlp", "attention")},
        steps=[{"block": 0, "writer": "mlp.down_proj", "kept": 8}],
    )


def words_on(figure: Figure) -> str:
    """Everything that is written on a figure."""
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def drawn(report: PruningReport, folder: Path) -> list[str]:
    return [path.name for path in draw_pictures(report, folder)]


# Which pictures


@pytest.mark.parametrize(
    ("report", "names"),
    [
        (PruningReport(), []),
        (PruningReport(achieved={"blocks_before": 6}, scores={"0": 1.0}), []),
        (PruningReport(removed_blocks=[3], achieved={"blocks_before": 6}, strategy="manual"), [DEPTH_FILE]),
        (PruningReport(removed_blocks=[3]), [DEPTH_FILE]),
        (narrowed(6), [DEPTH_FILE]),
        (narrowed(6, (1, 4), listed=True), [DEPTH_FILE]),
        (greedy(30, 4), list(PICTURES)),
        (PruningReport(depths=[depth(0, 20.0)]), []),
        (PruningReport(depths=[depth(0, 20.0), depth(1, math.inf)]), []),
        (PruningReport(depths=[{"removed": 0, "parameters": 9}, {"removed": 1, "parameters": 8}]), []),
        (PruningReport(depths=[depth(0, 20.0), depth(2, 30.0, source="another.txt")]), []),
        (PruningReport(depths=[depth(0, 20.0), depth(2, 30.0)]), [QUALITY_FILE]),
        (PruningReport(widths={"mlp": {"units": 8, "kept": []}}), []),
    ],
)
def test_only_what_there_is_data_for(report: PruningReport, names: list[str], tmp_path: Path) -> None:
    assert drawn(report, tmp_path) == names == list(alt_texts(report))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_pictures_without_data_go(tmp_path: Path) -> None:
    draw_pictures(greedy(6, 2), tmp_path)
    (tmp_path / "other.png").write_bytes(b"mine")
    assert drawn(narrowed(6), tmp_path) == [DEPTH_FILE]
    assert {path.name for path in tmp_path.iterdir()} == {DEPTH_FILE, "other.png"}


@pytest.mark.parametrize("blocks", [2, 3, 30, 126])
def test_any_number_of_blocks_fits(blocks: int, tmp_path: Path) -> None:
    """Twice as many pixels as the text column of a README is wide, and bytes that depend on the report alone."""
    report = greedy(blocks, blocks // 4) if blocks > 3 else narrowed(blocks, (1,))
    first = {path.name: path.read_bytes() for path in draw_pictures(report, tmp_path)}
    again = {path.name: path.read_bytes() for path in draw_pictures(copy.deepcopy(report), tmp_path)}
    assert first and first == again
    for data in first.values():
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert width == 1660 and 300 < height < 3000
        assert b"Software" not in data and b"tIME" not in data


def test_no_global_state(tmp_path: Path) -> None:
    """No pyplot and no changed setting. Reading the setting `backend` would load pyplot itself."""
    code = (
        "import sys, matplotlib; from optimum_blockprune import PruningReport\n"
        "from optimum_blockprune.pictures import draw_pictures\n"
        "read = lambda: {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != 'backend'}\n"
        "before = read()\n"
        "draw_pictures(PruningReport(removed_blocks=[1], achieved={'blocks_before': 4}), sys.argv[1])\n"
        "assert read() == before and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path)], check=True, timeout=120)
    assert (tmp_path / DEPTH_FILE).is_file()


def test_settings_of_the_user_do_not_show() -> None:
    report = greedy(12, 3)
    report.widths = narrowed(12).widths
    usual = {name: png(figure) for name, figure in figures_of(report).items()}
    dark = {name: "black" for name in ("figure.facecolor", "axes.facecolor", "savefig.facecolor")}
    light = {name: "white" for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color")}
    other = {"axes.grid": True, "font.size": 20, "savefig.bbox": "tight", "figure.dpi": 50, "xtick.top": True}
    with matplotlib.rc_context({**dark, **light, **other, "font.family": "serif", "axes.spines.top": False}):
        assert {name: png(figure) for name, figure in figures_of(report).items()} == usual


def long_names() -> PruningReport:
    report = greedy(30, 12)
    report.strategy = "functional_network+" * 9
    report.widths = {name * 40: {"units": 8, "kept": [6] * 30} for name in ("ab", "mm")}
    report.depths = [depth(count, 10.0**count, source="w" * 99, generation=GENERATION) for count in range(9)]
    report.depths[5]["generation"] = {**GENERATION, "repetition": 0.9}
    report.scores["4"] = math.nan
    return report


@pytest.mark.parametrize(
    "report",
    [greedy(30, 4), greedy(126, 40), greedy(3, 1), narrowed(2, (0,)), narrowed(12), long_names()],
    ids=["30", "126", "3", "2", "width", "long"],
)
def test_nothing_is_cut_off(report: PruningReport) -> None:
    """Everything lies on the picture, and no text is smaller than 9 points at README width."""
    for figure in figures_of(report).values():
        png(figure)
        box, (width, height) = figure.get_tightbbox(figure.canvas.get_renderer()), figure.get_size_inches()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        assert all(text.get_fontsize() >= 9 for text in figure.findobj(Text) if text.get_text())


# What they show


def test_depth_map() -> None:
    report = greedy(30, 4)
    figure = figures_of(report)[DEPTH_FILE]
    said = words_on(figure)
    assert "Removed: 4 of 30 blocks" in said and "chosen by sleb; 10.0 % of the parameters are gone" in said
    assert "block number (dense model)" in said and "kept, never a candidate" in said
    scores, strip = figure.axes
    assert scores.get_yscale() == "log" and "added loss" in said
    numbers = {text.get_text(): round(text.get_position()[0]) for text in strip.texts}
    assert numbers == {str(place): block for place, block in enumerate(report.removed_blocks, 1)}
    faces = [tuple(patch.get_facecolor()) for patch in strip.patches]
    assert len(faces) == 30 and len(set(faces)) == 3
    assert sum(patch.get_hatch() is not None for patch in strip.patches) == 2


def test_long_models_go_on_in_further_rows() -> None:
    """So that every number has room: at README width a column is never narrower than a number of two digits."""
    figure = figures_of(greedy(126, 12))[DEPTH_FILE]
    strips = figure.axes[1::2]
    assert len(strips) == 4 and sum(len(axes.patches) for axes in strips) == 126
    assert sorted(text.get_text() for axes in strips for text in axes.texts) == sorted(map(str, range(1, 13)))


@pytest.mark.parametrize("listed", [False, True])
def test_width(listed: bool) -> None:
    """A removed block has no width: it is hatched, not zero."""
    figure = figures_of(narrowed(6, (1, 4), listed))[DEPTH_FILE]
    mlp, attention, strip = figure.axes
    for axes in (mlp, attention):
        full = [patch for patch in axes.patches if patch.get_hatch() is None]
        assert len(axes.patches) - len(full) == 2
        assert {patch.get_height() for patch in full} == {100.0, 75.0}
        assert sum(patch.get_height() < 100 for patch in full) == 2
    assert len(strip.patches) == 6
    assert "Removed: 2 of 6 blocks" in words_on(figure) and "MLP channels kept" in words_on(figure)


def test_search_path() -> None:
    report = greedy(30, 4)
    figure = figures_of(report)[SEARCH_FILE]
    axes = figure.axes[0]
    table = axes.images[0].get_array()
    assert table.shape == (4, 30)
    assert table.mask[:, [0, 29]].all(), "no candidates"
    first = report.removed_blocks[0]
    assert not table.mask[0, first] and table.mask[1:, first].all(), "gone after the first step"
    assert table[0, first] == pytest.approx(report.steps[0]["loss"] - DENSE_LOSS)
    marks = next(line for line in axes.lines if line.get_marker() == "s")
    assert list(marks.get_xdata()) == report.removed_blocks and list(marks.get_ydata()) == [0, 1, 2, 3]
    assert f"1. block {first}" in words_on(figure) and "nats per token" in words_on(figure)


def test_quality_against_depth() -> None:
    report = greedy(30, 4)
    for entry in report.depths:
        entry["decode_tokens_per_second"] = 10.0 + entry["removed"]
    report.depths[0]["generation"] = GENERATION
    report.depths[3]["generation"] = {**GENERATION, "repetition": 0.9}
    figure = figures_of(report)[QUALITY_FILE]
    perplexity, speed = figure.axes
    assert list(perplexity.lines[0].get_xdata()) == [0, 1, 2, 3, 4]
    assert list(perplexity.lines[0].get_ydata()) == [20, 21, 22, 23, 24]
    assert list(speed.lines[0].get_ydata()) == [10, 11, 12, 13, 14]
    crosses = [line for line in perplexity.lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[3]]
    said = words_on(figure)
    assert "lower is better" in said and "dense 20.0" in said and "this model 24.0" in said
    assert "held_out.txt, 1,016 tokens" in said and "texts/" not in said


def test_quality_without_speed_shows_the_size_and_wide_ones_are_logarithmic() -> None:
    report = PruningReport(depths=[depth(count, 10.0 ** (1 + count)) for count in range(5)])
    perplexity, size = figures_of(report)[QUALITY_FILE].axes
    assert perplexity.get_yscale() == "log"
    assert list(size.lines[0].get_ydata()) == pytest.approx([1.0, 0.999, 0.998, 0.997, 0.996])


def test_words_have_the_figures() -> None:
    said = alt_texts(greedy(30, 4))
    order = ", ".join(map(str, greedy(30, 4).removed_blocks))
    assert "4 of 30 blocks" in said[DEPTH_FILE] and order in said[DEPTH_FILE]
    assert order in said[SEARCH_FILE]
    assert "20.0 with 0 blocks removed; 21.0 with 1 block removed" in said[QUALITY_FILE]
    assert all(text.endswith(".") and "\n" not in text for text in said.values())


# What comes in


def test_what_is_not_finite_is_said_so(tmp_path: Path) -> None:
    report = greedy(8, 3)
    report.scores |= {"4": math.inf, "5": math.nan}
    report.steps[1]["candidates"]["4"] = math.nan
    report.steps[2]["candidates"]["5"] = DENSE_LOSS - 1
    report.depths[2]["perplexity"] = math.inf
    figures = figures_of(PruningReport.from_dict(json.loads(json.dumps(report.to_dict()))))
    assert "score not finite" in words_on(figures[DEPTH_FILE])
    assert "not\nfinite" in words_on(figures[QUALITY_FILE])
    assert drawn(report, tmp_path) == list(PICTURES)


@pytest.mark.parametrize(
    "steps",
    [
        [{"candidates": [4, 5], "iteration": 1}],
        [{"block": 1, "candidates": {"a": 1.0}}],
        [{"candidates": {"1": 1.0}}],
        [{"block": 1, "candidates": {"1": math.nan}}],
        [{"start": 1, "length": 2, "distance": 0.1}],
        [{"block": 1, "candidates": {}}],
    ],
)
def test_steps_of_other_shapes_are_no_search_path(steps: list[dict[str, Any]]) -> None:
    report = PruningReport(removed_blocks=[1], achieved={"blocks_before": 4}, steps=steps, strategy="other")
    assert list(figures_of(report)) == [DEPTH_FILE]


def test_scores_below_zero_and_alike() -> None:
    for scores in ({"0": -1.0, "1": 5.0}, {"0": 0.0, "1": 0.0}, {"0": 0.0, "1": 0.001, "2": 50.0}, {"x": 1.0}):
        report = PruningReport(removed_blocks=[1], achieved={"blocks_before": 4}, scores=scores)
        assert list(figures_of(report)) == [DEPTH_FILE]


def test_names_of_any_spelling(tmp_path: Path) -> None:
    """No mathematics, no missing glyphs (a warning would be an error here), no overlong line."""
    report = greedy(6, 2)
    report.strategy = "my_$x^2$_\n剪枝" + "z" * 200
    report.widths = {"experts $e$ 专家": {"units": 4, "kept": [4, 2, 3, 1, 4, 4]}}
    for entry in report.depths:
        entry["source"] = "/home/me/文$a$.txt"
    assert drawn(report, tmp_path) == list(PICTURES)
    assert "$x^2$" in words_on(figures_of(report)[DEPTH_FILE])


@pytest.mark.parametrize(
    ("strategy", "fields"),
    [
        ("sleb", {}),
        ("shortgpt", {}),
        ("angular", {}),
        ("mi_prun", {}),
        ("random", {}),
        ("bip", {}),
        ("magnitude", {"layout": "padded"}),
    ],
)
def test_reports_of_real_runs(strategy: str, fields: dict[str, Any], tmp_path: Path) -> None:
    pruner = toy_pruner(strategy=strategy, **fields)
    pruner.prune()
    report = PruningReport.from_file(pruner.report.save(tmp_path))
    names = drawn(report, tmp_path)
    assert names[0] == DEPTH_FILE and (SEARCH_FILE in names) == (strategy == "sleb")


def test_an_encoder_decoder(tmp_path: Path) -> None:
    pruner = BlockPruner(other_stacks.tiny_model("t5"), config("shortgpt", num_blocks=1), word_tokenizer())
    pruner.prune()
    assert drawn(pruner.report, tmp_path) == [DEPTH_FILE]


def test_joined_plans() -> None:
    """Blocks first, width after: one map of both."""
    pruner = toy_pruner()
    pruner.prune(config=[config("sleb"), config("bip")])
    assert pruner.report.strategy == "sleb+bip"
    figure = figures_of(pruner.report)[DEPTH_FILE]
    assert len(figure.axes) == 4 and "Removed: 2 of 6 blocks" in words_on(figure)


# Without matplotlib


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Says what to install, draws nothing, and still knows the words."""
    report, said = greedy(6, 2), alt_texts(greedy(6, 2))
    assert can_draw()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not can_draw() and alt_texts(report) == said
    for call in (require, lambda: draw_pictures(report, tmp_path)):
        with pytest.raises(BlockPruningError, match=r"pip install 'optimum-blockprune\[report\]'"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_is_imported_to_draw_only() -> None:
    code = "import sys, optimum_blockprune.pictures, optimum_blockprune.page; assert 'matplotlib' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


# Small things


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1.0, 2.0, 3.0], "linear"),
        ([0.01, 0.8, 0.9, 1.0], "linear"),
        ([0.02, 0.03, 0.03, 1.0], "log"),
        ([0.0, 0.03, 0.03, 1.0], "symlog"),
        ([-1.0, -0.5], "linear"),
        ([5.0], "linear"),
    ],
)
def test_scales(values: list[float], scale: str) -> None:
    assert scale_of(values) == scale


def test_numbers_are_short() -> None:
    assert [short(value) for value in (0, 0.00687, 0.5, 43.11, 1264.4, 25_900, 2.5e7)] == [
        "0",
        "0.00687",
        "0.5",
        "43.1",
        "1264",
        "25.9k",
        "2.5e7",
    ]
    assert [reading(value) for value in (0.145, 20.0, 1264.4, 2.5e7)] == ["0.14", "20.0", "1,264", "2.5e7"]
    assert [label_step(points, 125) for points in (40, 20, 8, 4)] == [1, 2, 5, 10]
    assert plain("a\n b\tc" + "d" * 99, 9) == "a b cd..."


def test_candidates_that_a_race_dropped_were_candidates() -> None:
    steps = [{"block": 3, "loss": 2.9, "candidates": {"2": 3.0, "3": 2.9}, "dropped": {"1": 16, "4": 32}}]
    report = PruningReport(strategy="sleb", removed_blocks=[3], steps=steps, scores={"2": 3.0, "3": 2.9})
    report.achieved = {"blocks_before": 5, "blocks_after": 4}
    figures = figures_of(report)
    depth, search = (words_on(figures[name]) for name in (DEPTH_FILE, SEARCH_FILE))
    assert "The search tried 4 removals to choose 1" in search and "Hatched: untried or given up." in search
    assert "never a candidate" in depth  # block 0
    steps[0]["dropped"]["0"] = 16
    assert "never a candidate" not in words_on(figures_of(report)[DEPTH_FILE])
