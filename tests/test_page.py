# SPDX-License-Identifier: Apache-2.0
"""The HTML page: well-formed, self-contained, escaped, complete, and there without matplotlib as well."""

from __future__ import annotations

import json
import math
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from toys import TEXTS, config, toy_pruner

from optimum_blockprune import PruningReport
from optimum_blockprune.page import PAGE_FILE, page, write_page
from optimum_blockprune.page_parts import Html, number, pairs, section, table, tag, text
from optimum_blockprune.page_quality import compared


VOID = {"meta", "img", "br"}


class Parsed(HTMLParser):
    """Elements with their attributes, what is written, and whether every element that opens closes in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def said(self) -> str:
        return " ".join("".join(self.words).split())

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == name]


def parsed(report: PruningReport, title: str = "smaller") -> Parsed:
    found = Parsed(page(report, title=title))
    assert found.open == []
    return found


def generation(repetition: float) -> dict[str, Any]:
    shape = {"continuations": 20, "prompt_tokens": 32, "new_tokens": 64}
    return {**shape, "repetition": repetition, "distinct_1": 0.4, "distinct_2": 0.5, "distinct_3": 0.6}


def evaluation(label: str, perplexity: float, **more: Any) -> dict[str, Any]:
    setting = {"source": "/home/me/held_out.txt", "fingerprint": "f00d", "windows": 8, "seqlen": 128, "stride": 128}
    size = {"tokens": 1016, "nll": math.log(perplexity), "blocks": 6, "parameters": 1000, "size_bytes": 4_321_000}
    return {"label": label, **setting, **size, "perplexity": perplexity, **more}


def scored(label: str, value: float) -> dict[str, Any]:
    metrics = {"acc": value, "acc_stderr": 0.051, "acc_norm": value + 0.02, "acc_norm_stderr": 0.052}
    how = {"primary": "acc", "num_fewshot": 0, "source": "lm-eval 0.4.13"}
    return {"label": label, "task": "arc_easy", "samples": 137, "metrics": metrics, **how}


def full() -> PruningReport:
    """A report with something in every field."""
    return PruningReport(
        requested={"num_blocks": 2},
        achieved={
            "blocks_before": 6,
            "blocks_after": 4,
            "blocks_removed": 1 / 3,
            "parameters_before": 134_515_008,
            "parameters_after": 120_354_624,
            "parameters_removed": 0.1053,
        },
        strategy="sleb",
        removed_blocks=[4, 1],
        block_forwards=3136,
        naive_block_forwards=5900,
        head_forwards=214,
        tokens=256,
        calibration={
            "source": "/home/me/texts/calibration.txt",
            "fingerprint": "2067cafe",
            "windows": 2,
            "seqlen": 128,
        },
        seconds={"load": 1.25, "search": 67.61},
        peak_memory_bytes=1_154_752_512,
        device="cpu",
        dtype="float32",
        strategy_details={"dense_loss": 2.8},
        verification={"mode": "logits", "passed": True},
        loader="AutoModelForCausalLM",
        task="text-generation",
        runtimes={"vllm": {"verdict": "same", "reason": "it reads the same fields"}},
        options={"search": "prefix"},
        seed=7,
        scores={"1": 2.9, "2": 3.1, "3": 3.4, "4": 2.85},
        steps=[
            {"block": 4, "loss": 2.85, "perplexity": 17.29, "candidates": {"1": 2.9, "2": 3.1, "3": 3.4, "4": 2.85}},
            {"block": 1, "loss": 2.95, "perplexity": 19.11, "candidates": {"1": 2.95, "2": 3.2, "3": 3.5}},
        ],
        base={"model": "me/dense", "revision": "93efa2f", "license": "apache-2.0", "language": ["en"]},
        history=[{"strategy": "shortgpt", "removed_blocks": [3], "num_blocks": 7, "base_model": "me/denser"}],
        command="optimum-cli blockprune run -m me/dense --strategy sleb --num-blocks 2 out",
        depths=[
            {
                "removed": count,
                "blocks": 6 - count,
                "parameters": 9000 - count,
                "source": "a.txt",
                "perplexity": 11.5 + count,
            }
            for count in range(3)
        ],
        evaluations=[
            evaluation("dense", 29.77, generation=generation(0.2), decode_tokens_per_second=17.62),
            evaluation("pruned", 43.11, generation=generation(0.3), kl=0.5123, prefill_tokens_per_second=313.4),
        ],
        task_results=[scored("dense", 0.583), scored("pruned", 0.481)],
        versions={"torch": "2.13.0", "optimum-blockprune": "0.1.0"},
    )


# What is in it


def test_every_figure_of_the_report_is_there() -> None:
    found = parsed(full())
    for figure in (
        "134,515,008",
        "120,354,624",
        "2 of its 6 blocks",
        "10.5 %",
        "order of removal: 4, 1.",
        "29.77",
        "43.11",
        "0.5123",
        "17.6",
        "313.4",
        "20.0 %",
        "30.0 %",
        "0.583 ± 0.051",
        "0.481 ± 0.051",
        "0.603 ± 0.052",
        "137",
        "13.50",
        "3,136",
        "5,900",
        "214",
        "67.61",
        "1,154.8 MB",
        "2067cafe",
        "2 windows of 128 tokens",
        "search=prefix",
        "93efa2f",
        "apache-2.0",
        "passed (logits)",
        "reads it as transformers does",
        "2.13.0",
        "pruned before, by shortgpt: blocks 3 of me/denser",
        full().command,
    ):
        assert figure in found.said, figure
    assert json.dumps(full().to_dict(), indent=1) in "".join(found.words), "the whole report as data"


def test_the_first_sentence_says_what_and_how_good() -> None:
    said = parsed(full()).said
    start = "This is me/dense with 2 of its 6 blocks removed: 10.5 % of its parameters are gone."
    assert start in said
    assert "Its perplexity on held_out.txt is 43.11; that of the dense model is 29.77. Lower is better." in said
    assert "degenerated" not in said


def test_collapsed_text_is_a_warning() -> None:
    report = full()
    report.evaluations[1]["generation"] = generation(0.63)
    found = parsed(report)
    assert "has degenerated: 63% of the 4-grams" in found.said
    assert {"class": "warning"} in found.all("p")


def test_other_texts_are_not_compared() -> None:
    report = full()
    report.evaluations[0]["fingerprint"] = "another"
    assert "the dense model was not measured on it" in parsed(report).said
    report.evaluations = []
    assert [entry["removed"] for entry in compared(report)] == [0, 2], "the measured depths say it as well"
    report.depths = []
    assert compared(report) == (None, None) and "quality of the result was not measured" in parsed(report).said


def test_width_is_said_in_words() -> None:
    report = full()
    report.removed_blocks, report.strategy, report.scores, report.steps = [], "bip", {}, []
    report.achieved["units"] = {"mlp": {"before": 46_080, "after": 36_960, "removed": 0.198}}
    report.achieved["padding_parameters"] = 77_123
    report.widths = {"mlp": {"units": 8, "kept": [8, 6, None, 7, 5, 4]}}
    said = parsed(report).said
    assert "with 19.8 % of its MLP channels removed" in said
    assert "46,080" in said and "36,960" in said and "77,123" in said and "62.5 %" in said


def test_a_report_without_anything() -> None:
    found = parsed(PruningReport())
    assert "not measured" in found.said and "no blocks removed" in found.said
    assert found.all("img") == [] and found.all("table") == []


def test_choices_by_hand_are_no_strategy() -> None:
    report = PruningReport(strategy="manual", removed_blocks=[1], achieved={"blocks_before": 4})
    assert "A person named them" in parsed(report).said


# What kind of page it is


def test_nothing_comes_from_elsewhere() -> None:
    """No script, no address but links to click on, and a policy that would forbid them."""
    source = page(full(), title="smaller")
    found = Parsed(source)
    names = {name for name, _ in found.elements}
    assert not names & {"script", "link", "iframe", "object", "embed", "form", "base", "video", "audio"}
    for name, attributes in found.elements:
        assert not any(key.startswith("on") for key in attributes)
        assert "src" not in attributes or (attributes["src"] or "").startswith("data:image/png;base64,")
        assert "href" not in attributes or (name == "a" and attributes["href"] == "https://huggingface.co/me/dense")
    style = source.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in str(found.all("meta"))


def test_it_is_a_page_for_everyone() -> None:
    """One heading of the first order, sections with names, table heads with a scope, pictures in words, two modes."""
    source = page(full(), title="smaller")
    found = Parsed(source)
    assert source.startswith("<!DOCTYPE html>") and found.all("html") == [{"lang": "en"}]
    assert len(found.all("h1")) == 1 and len(found.all("main")) == 1
    names = [each["id"] for each in found.all("h2")]
    assert len(set(names)) == len(names) >= 8
    assert [each["aria-labelledby"] for each in found.all("section")] == names
    assert all(each.get("scope") in ("col", "row") for each in found.all("th"))
    assert len(found.all("img")) == 3 and all(len(each["alt"] or "") > 40 for each in found.all("img"))
    assert "prefers-color-scheme: dark" in source and "width=device-width" in source


def test_it_is_escaped() -> None:
    """Names come from other people's repositories."""
    evil = '<script>alert("x")</script>&amp;\'"<img src=x onerror=y>'
    report = full()
    report.strategy = report.command = report.device = report.loader = evil
    report.base = {"model": evil, "revision": evil, "license": evil, "language": [evil]}
    report.calibration = {"source": evil, "fingerprint": evil, "windows": evil, "seqlen": evil}
    report.runtimes = {evil: {"verdict": evil, "reason": evil}}
    report.options, report.requested, report.versions = {evil: evil}, {evil: evil}, {evil: evil}
    report.seconds = {evil: 1.0}
    report.history = [{"strategy": evil, "removed_blocks": [1], "base_model": evil}]
    report.widths = {evil: {"units": 4, "kept": [4, 3, 2, 4, 1, 4]}}
    report.verification = {"mode": evil, "passed": True}
    for entry in (*report.evaluations, *report.task_results, *report.depths):
        entry |= {"label": evil, "source": evil, "task": evil, "primary": evil}
    usual, found = parsed(full()), parsed(report, title=evil)
    assert {name for name, _ in found.elements} <= {name for name, _ in usual.elements} | {"a"}
    assert evil in "".join(found.words)
    assert all(not key.startswith("on") for _, attributes in found.elements for key in attributes)


def test_folders_of_the_author_stay_out_of_the_tables() -> None:
    words = parsed(full()).said.split("The report itself")[0]
    assert "/home/me" not in words and "calibration.txt" in words


def test_what_is_not_finite() -> None:
    report = full()
    report.evaluations[1] |= {"perplexity": math.inf, "nll": math.nan}
    report.scores["2"] = math.nan
    report.depths[1]["perplexity"] = math.inf
    report.task_results[0]["metrics"]["acc"] = math.nan
    report.seconds["search"] = math.inf
    assert parsed(report).said.count("not finite") >= 5


def test_the_same_report_gives_the_same_page(tmp_path: Path) -> None:
    again = PruningReport.from_dict(json.loads(json.dumps(full().to_dict())))
    path = write_page(full(), tmp_path / PAGE_FILE, title="smaller")
    assert path == tmp_path / "pruning_report.html"
    assert path.read_text(encoding="utf-8") == page(again, title="smaller")


def test_a_title_that_is_no_utf_8(tmp_path: Path) -> None:
    """Names of folders may hold bytes that are no text."""
    path = write_page(PruningReport(), tmp_path / PAGE_FILE, title="caf\udce9")
    assert "caf&#56553;" in path.read_text(encoding="utf-8")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = parsed(full())
    assert found.all("img") == [] and "pip install 'optimum-blockprune[report]'" in found.said
    assert "43.11" in found.said


def test_a_real_run() -> None:
    pruner = toy_pruner()
    pruner.evaluate(TEXTS)
    pruner.prune(config=[config("sleb"), config("bip")])
    pruner.evaluate(TEXTS)
    found = parsed(PruningReport.from_dict(json.loads(json.dumps(pruner.report.to_dict()))))
    assert "with 2 of its 6 blocks and" in found.said and "sleb+bip" in found.said
    assert len(found.all("img")) == 2


# Parts


def test_parts_escape_text_and_keep_html() -> None:
    assert text("<b>&") == "&lt;b&gt;&amp;" and text(Html("<b>")) == "<b>"
    assert tag("a", "x<", href='"', class_="c") == '<a href="&quot;" class="c">x&lt;</a>'
    assert tag("div", aria_label="n") == '<div aria-label="n"></div>'
    assert section("Empty", None) is None and pairs([("a", None)]) is None
    assert table(("h",), [("a",), ("b",)], marked=1).count('class="this"') == 1
    assert [number(value) for value in (None, True, "x", 1234, 0.5)] == ["–", "True", "x", "1,234", "0.50"]
