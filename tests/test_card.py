# SPDX-License-Identifier: Apache-2.0
"""The model card: metadata that the Hub takes, every figure that was measured, and nothing else; safe and the same."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_cards import problems
from huggingface_hub import ModelCard
from toys import config, text, toy_folder, toy_pruner

from optimum_blockprune import BlockPruner, PruningPlan, PruningReport
from optimum_blockprune.card import model_card, title_of
from optimum_blockprune.card_text import (
    code,
    fenced,
    figure,
    hub_id,
    last_part,
    one_line,
    percent,
    plain,
    table,
    unescaped,
)
from optimum_blockprune.pictures import PICTURES


COMMIT = "93efa2f097d58c2a74874c7e644dbc9b0cee75a2"
WIKITEXT = "wikitext2 (Salesforce/wikitext, wikitext-2-raw-v1, test)"
SECTIONS = [
    "How to load it",
    "What was removed",
    "Quality",
    "Benchmark tasks",
    "Generation",
    "Quality against depth",
    "The search",
    "Cost",
    "Reproduce",
    "Other runtimes",
    "Where it comes from",
    "Limits",
]
ALWAYS = [name for name in SECTIONS if name not in ("Quality against depth", "The search", "Cost")]
MARKUP = "<script>alert(1)</script> [x](http://evil) ![y](z) **b** _i_ $$x$$ \x1b[31m"
EVIL = f"a|b`c`\n\n---\nlicense: mit\n---\n# Hi {MARKUP}"


def plan(base_model: str | None = "me/dense", strategy: str = "sleb", **fields: Any) -> PruningPlan:
    return PruningPlan.from_removed("llama", 30, [11, 3], base_model=base_model, strategy=strategy, **fields)


def unfenced(body: str) -> str:
    """A body without its code blocks."""
    return re.sub(r"(?ms)^(`{3,})\w*\n.*?\n\1$", "", body)


def checked(made: PruningPlan, report: PruningReport, title: str = "smaller", **more: Any) -> ModelCard:
    """The card as the Hub reads it; it holds to the Hub's rules, and to ours for any card."""
    written = str(model_card(made, report, title=title, **more))
    assert written == str(model_card(made, report, title=title, **more))
    assert problems(written) == ([], []) and "None" not in written and "nan" not in written
    assert title_of(written) == (one_line(title) or "Pruned model")
    _, front, body = written.split("---\n", 2)
    data = yaml.safe_load(front)
    body = unfenced(body)
    names = re.findall(r"(?m)^## (.*)$", body)
    assert names == [name for name in SECTIONS if name in names] and set(ALWAYS) <= set(names)
    assert len(re.findall(r"(?m)^# ", body)) == 1 and not re.search(r"(?m)^(---|===)", body)
    card = ModelCard(written)
    assert card.data.to_dict().keys() == data.keys()
    return card


def section(card: ModelCard, name: str) -> str:
    return card.text.split(f"\n## {name}\n", 1)[1].split("\n## ", 1)[0].strip()


def cells(line: str) -> list[str]:
    return [each.strip() for each in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def rows(part: str) -> list[list[str]]:
    """All rows of the tables of a section; tables are whole."""
    found = [cells(line) for line in part.splitlines() if line.startswith("|")]
    assert all(len(block) for block in found)
    return found


def evaluation(label: str, perplexity: float = 17.128, **more: Any) -> dict[str, Any]:
    setting = {"source": WIKITEXT, "fingerprint": "f00dcafe", "windows": 8, "seqlen": 128, "stride": 64}
    size = {"tokens": 1016, "nll": math.log(perplexity), "blocks": 6, "parameters": 1234, "size_bytes": 4_321_000}
    return {"label": label, **setting, **size, "perplexity": perplexity, **more}


def written(repetition: float) -> dict[str, Any]:
    shape = {"continuations": 19, "prompt_tokens": 31, "new_tokens": 63, "tokens": 1197}
    return {**shape, "repetition": repetition, "distinct_1": 0.113, "distinct_2": 0.524, "distinct_3": 0.635}


def scored(label: str, value: float, **more: Any) -> dict[str, Any]:
    metrics = {"acc": value, "acc_stderr": 0.0512, "acc_norm": value + 0.021, "acc_norm_stderr": 0.0523}
    how = {"primary": "acc", "num_fewshot": 5, "source": "lm-eval 0.4.13", "dataset": "allenai/ai2_arc/ARC-Easy"}
    return {"label": label, "task": "arc_easy", "samples": 137, "metrics": metrics, **how, **more}


def full(**changed: Any) -> PruningReport:
    """A report with something in every field."""
    fields: dict[str, Any] = {
        "requested": {"num_blocks": 2},
        "achieved": {
            "blocks_before": 30,
            "blocks_after": 28,
            "blocks_removed": 1 / 15,
            "parameters_before": 134_515_008,
            "parameters_after": 127_435_392,
            "parameters_removed": 0.0526,
        },
        "strategy": "sleb",
        "removed_blocks": [11, 3],
        "block_forwards": 3136,
        "naive_block_forwards": 5900,
        "head_forwards": 214,
        "tokens": 256,
        "calibration": {"source": "/home/me/calib.txt", "fingerprint": "2067d0d0", "windows": 2, "seqlen": 129}
        | {"tokens": 258, "recipe": "windows"},
        "seconds": {"load": 1.25, "search": 67.61},
        "peak_memory_bytes": 1_154_752_512,
        "device": "cpu",
        "dtype": "float32",
        "verification": {"mode": "logits", "passed": True},
        "loader": "AutoModelForCausalLM",
        "task": "text-generation",
        "runtimes": {"vllm": {"verdict": "same", "reason": "it reads the same fields"}},
        "options": {"search": "prefix"},
        "seed": 7,
        "scores": {"3": 2.97126, "11": 2.86161, "12": 5.5},
        "steps": [
            {"block": 11, "loss": 2.86161, "perplexity": 17.4896, "candidates": {"3": 2.97, "11": 2.86161}},
            {"block": 3, "loss": 2.90531, "perplexity": 18.2707, "candidates": {"3": 2.90531}},
        ],
        "base": {
            "model": "me/dense",
            "revision": COMMIT,
            "license": "other",
            "license_name": "tulip-research",
            "license_link": "LICENSE",
            "language": ["en", "fr"],
            "card": f"https://huggingface.co/me/dense/blob/{COMMIT}/README.md",
        },
        "command": "optimum-cli blockprune run -m me/dense --strategy sleb --num-blocks 2 OUTPUT",
        "depths": [
            {"removed": 0, **evaluation("x", 17.25), "blocks": 30},
            {"removed": 2, **evaluation("x", 23.75), "blocks": 28, "decode_tokens_per_second": 41.37},
        ],
        "evaluations": [
            evaluation("dense", 17.128, generation=written(0.211), prefill_tokens_per_second=287.41),
            evaluation("pruned", 1234.56, kl=0.61234, generation=written(0.302), decode_tokens_per_second=19.13),
        ],
        "task_results": [scored("dense", 0.611), scored("pruned", 0.482)],
        "versions": {"optimum-blockprune": "0.1.0", "torch": "2.13.0+cpu"},
    }
    return PruningReport(**{**fields, **changed})


def full_plan(**changed: Any) -> PruningPlan:
    report = full()
    same = {name: getattr(report, name) for name in ("requested", "options", "seed", "calibration", "scores", "steps")}
    return plan(**{**same, **changed})


# Metadata


def test_metadata() -> None:
    data = checked(full_plan(), full()).data
    assert (data.base_model, data.base_model_relation) == ("me/dense", "finetune")
    assert (data.library_name, data.pipeline_tag, data.language) == ("transformers", "text-generation", ["en", "fr"])
    assert (data.license, data.license_name) == ("other", "tulip-research")
    assert data.license_link == f"https://huggingface.co/me/dense/blob/{COMMIT}/LICENSE"
    assert data.tags == ["pruned", "block-pruning", "depth-pruning", "optimum", "sleb"]
    assert data.datasets is None  # the calibration text is a file
    perplexity, task = data.eval_results
    assert (perplexity.dataset_type, perplexity.dataset_config, perplexity.dataset_split) == (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "test",
    )
    assert (perplexity.metric_type, perplexity.metric_value) == ("perplexity", 1234.56)
    assert perplexity.metric_args["tokens"] == 1016 and "1,016 tokens" in perplexity.metric_name
    assert (task.dataset_type, task.dataset_name) == ("allenai/ai2_arc", "arc_easy")
    assert (task.metric_type, task.metric_value, task.metric_args["stderr"]) == ("accuracy", 0.482, 0.0512)
    assert task.metric_args["samples"] == 137 and "0.051" in task.metric_name


def test_nothing_known_is_not_in_the_metadata() -> None:
    data = checked(plan(None), PruningReport()).data.to_dict()
    assert data.keys() == {"library_name", "tags"}


def test_only_the_pruned_model_has_results() -> None:
    entries = [evaluation("dense"), evaluation("other"), evaluation("pruned", math.inf)]
    others = [scored("dense", 0.5), scored("pruned", math.nan), {**scored("pruned", 0.5), "metrics": {}}]
    report = PruningReport(evaluations=entries[:2], task_results=others[:1])
    assert "model-index" not in checked(plan(), report).data.to_dict()
    report = PruningReport(evaluations=entries, task_results=[others[0], others[2]])
    assert "model-index" not in checked(plan(), report).data.to_dict()


@pytest.mark.parametrize(
    ("source", "kind", "name"),
    [
        ("/home/me/held_out.txt", "local-text", "held_out.txt"),
        ("c4 (copy).txt", "local-text", "c4 (copy).txt"),
        ("in-memory texts", "text-in-memory", "in-memory texts"),
        ("alpaca (tatsu-lab/alpaca, default, train)", "tatsu-lab/alpaca", "tatsu-lab/alpaca"),
    ],
)
def test_texts_in_the_results(source: str, kind: str, name: str) -> None:
    (result,) = checked(plan(), PruningReport(evaluations=[evaluation("pruned", source=source)])).data.eval_results
    assert (result.dataset_type, result.dataset_name) == (kind, name)


@pytest.mark.parametrize("dataset", ["super_glue/boolq", "piqa", None])
def test_no_repository_is_guessed_for_a_task(dataset: str | None) -> None:
    report = PruningReport(task_results=[scored("pruned", 0.5, dataset=dataset, task="my task/1")])
    (result,) = checked(plan(), report).data.eval_results
    assert (result.dataset_type, result.dataset_name) == ("my-task-1", "my task/1")


def test_data_sets_are_those_of_the_calibration() -> None:
    sets = [WIKITEXT.replace("test", "train"), "c4 (allenai/c4, en/c4-train.00000-of-01024.json.gz, train)"]
    used = [{"source": source, "fingerprint": "abc"} for source in (*sets, "texts.txt", "wikitext2 (mine).txt")]
    parts = [{"strategy": "sleb", "calibration": each} for each in used]
    report = PruningReport(evaluations=[evaluation("pruned", source="alpaca (tatsu-lab/alpaca, default, train)")])
    assert checked(plan(details={"parts": parts}), report).data.datasets == ["Salesforce/wikitext", "allenai/c4"]
    assert checked(plan(calibration=used[1]), report).data.datasets == ["allenai/c4"]
    assert checked(plan(), report).data.datasets is None


@pytest.mark.parametrize(
    ("base", "metadata", "said"),
    [
        ({}, {}, "Licence: not known"),
        ({"license": "Apache-2.0"}, {"license": "apache-2.0"}, "`Apache-2.0`"),
        ({"license": ["mit", "apache-2.0"]}, {"license": ["mit", "apache-2.0"]}, "`mit`, `apache-2.0`"),
        ({"license": "My Own (v2)"}, {"license": "other", "license_name": "my-own-v2"}, "`My Own (v2)`"),
        ({"license": "mit", "license_link": "http://["}, {"license": "mit", "license_link": "http://["}, "`mit`"),
        ({"license": "mit", "license_link": "javascript:x"}, {"license": "mit"}, "`mit`"),
        ({"license": "mit", "license_link": "/etc/passwd"}, {"license": "mit"}, "`mit`"),
        ({"license_link": "https://a.example/terms"}, {}, "Licence: not known"),
    ],
)
def test_licences_are_inherited_and_never_invented(base: Any, metadata: dict[str, Any], said: str) -> None:
    card = checked(plan(), PruningReport(base={"model": "me/dense", **base}))
    assert {name: value for name, value in card.data.to_dict().items() if "license" in name} == metadata
    assert said in section(card, "Where it comes from")


def test_languages_that_are_no_codes_stay_out() -> None:
    base = {"language": ["en", "English", "zh-Hans", "no", ""]}
    assert checked(plan(), PruningReport(base=base)).data.language == ["en", "zh-Hans", "no"]


@pytest.mark.parametrize(
    ("base_model", "is_repo"),
    [
        ("HuggingFaceTB/SmolLM2-135M", True),
        ("me/a.b_c-d", True),
        (None, False),
        ("gpt2", False),
        ("/home/me/dense", False),
        ("./dense", False),
        ("../dense", False),
        ("~/dense", False),
        ("a/b/c", False),
        ("C:\\models/dense", False),
        ("me/", False),
        ("my models/dense", False),
        ("models/dense.gguf", False),
    ],
)
def test_base_model_is_metadata_only_if_it_is_a_repository(base_model: str | None, is_repo: bool) -> None:
    card = checked(plan(base_model), PruningReport())
    assert card.data.base_model == (base_model if is_repo else None)
    assert hasattr(card.data, "base_model_relation") == is_repo
    name = f"[{base_model}](https://huggingface.co/{base_model})" if is_repo else code(last_part(base_model or "x"))
    name = "a model of unknown name" if base_model is None else name
    assert f"\nThis is {name} with 2 of its 30 transformer blocks removed by" in card.text


def test_a_repository_of_one_word_counts_if_it_was_loaded() -> None:
    base = {"model": "gpt2", "revision": COMMIT}
    assert checked(plan("gpt2"), PruningReport(base=base)).data.base_model == "gpt2"


def test_a_folder_that_is_spelled_like_a_repository_is_none(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "models" / "dense").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert checked(plan("models/dense"), PruningReport()).data.base_model is None
    assert checked(plan("models/other"), PruningReport()).data.base_model == "models/other"


@pytest.mark.parametrize("name", ["my: strategy", "yes", "- x", "'quoted'", "a\nb", "|", "`"])
def test_a_strategy_with_an_odd_name_is_still_valid_yaml(name: str) -> None:
    assert checked(plan(strategy=name), PruningReport()).data.tags[-1] == one_line(name)


# Body


def test_every_figure_of_the_report_is_in_the_body() -> None:
    report = full()
    card = checked(full_plan(), report, pictures=list(PICTURES))
    body = " ".join(card.text.split())
    expected = {
        "What was removed": "134,515,008 127,435,392 2.8616 2.9713 2.9053 17.4896 18.2707",
        "Quality": "17.13 1,234.56 0.6123 2.8407 7.1185 1,016 1,234 4.3 287.4 19.1 f00dcafe 72.08 float32",
        "Benchmark tasks": "0.611 0.482 0.051 0.632 0.503 0.052 137 5 arc_easy acc acc_norm",
        "Generation": "19 31 63 1,197 21.1 30.2 11.3 52.4 63.5",
        "Quality against depth": "17.25 **23.75** **41.4** **28** 30",
        "The search": "3,136 5,900 214 256 1,154.8 1.2 67.6",
        "Reproduce": f"num_blocks=2 search=prefix 7 calib.txt 2067d0d0 129 258 0.1.0 2.13.0+cpu {COMMIT}",
        "Other runtimes": "vllm transformers",
        "Where it comes from": f"{COMMIT} tulip-research",
    }
    for name, numbers in expected.items():
        part = section(card, name)
        for number in numbers.split():
            assert number in part, (name, number)
    assert "5.3 % fewer parameters" in body and report.command in card.text
    assert "/home/me" not in str(card)  # whose folders they were is nobody's business
    assert "Not evaluated: perplexity" not in body and "Warning" not in body


def test_dense_and_pruned_stand_side_by_side() -> None:
    head, _, *lines = rows(section(checked(full_plan(), full()), "Quality"))
    assert head == ["", "dense", "pruned"]
    assert ["perplexity (lower is better)", "17.13", "1,234.56"] in lines
    assert ["KL divergence from the dense model, nats per token", "–", "0.6123"] in lines
    assert ["tokens scored", "1,016", "1,016"] in lines


def test_each_text_has_its_own_table_and_the_last_figure_counts() -> None:
    other = {"source": "held_out.txt", "fingerprint": "0ther"}
    entries = [evaluation("pruned", 30.0), evaluation("dense", 20.0), evaluation("pruned", 40.0)]
    entries += [evaluation("pruned", 50.0, **other), evaluation("healed", 45.0, **other)]
    card = checked(plan(), PruningReport(evaluations=entries))
    part = section(card, "Quality")
    lines = [row for row in rows(part) if row[0].startswith("perplexity")]
    assert [row[1:] for row in lines] == [["20.00", "40.00"], ["50.00", "45.00"]]
    assert ["", "dense", "pruned"] in rows(part) and ["", "pruned", "healed"] in rows(part)
    assert part.count("The dense model was not evaluated on this text.") == 1
    assert "2.00 times that of the dense model" in part


def test_what_is_absent_is_said_to_be_absent() -> None:
    card = checked(plan(), PruningReport())
    for name in ("Quality", "Benchmark tasks", "Generation"):
        assert section(card, name) == "Not evaluated."
    assert section(card, "Other runtimes") == "Not looked at."
    assert "Calibration text: none was used" in section(card, "Reproduce")
    limits = section(card, "Limits")
    for name in ("perplexity", "KL divergence", "speed", "repetition", "benchmark tasks"):
        assert name in limits
    assert "| parameters |" not in card.text and "fewer parameters" not in card.text
    assert (
        "## The search" not in card.text
        and "## Cost" not in card.text
        and "## Quality against depth" not in card.text
        and "![" not in card.text
    )


def test_depths_alone() -> None:
    card = checked(plan(), PruningReport(depths=full().depths, removed_blocks=[11, 3]))
    assert section(card, "Quality") == "Measured at every depth, see below."
    assert "Not evaluated: KL" in section(card, "Limits")
    sizes = [{"removed": 0, "blocks": 30, "parameters": 10}, {"removed": 2, "blocks": 28, "parameters": 8}]
    card = checked(plan(), PruningReport(depths=sizes, removed_blocks=[11, 3]))
    assert rows(section(card, "Quality against depth"))[0] == ["blocks removed", "blocks left", "parameters"]
    assert section(card, "Quality") == "Not evaluated."


@pytest.mark.parametrize(("mine", "dense", "warned"), [(0.9, 0.2, True), (0.25, 0.2, False), (0.9, None, True)])
def test_a_collapse_is_a_warning_at_the_top(mine: float, dense: float | None, warned: bool) -> None:
    entries = [evaluation("pruned", generation=written(mine))]
    entries += [evaluation("dense", generation=written(dense))] if dense is not None else []
    card = checked(plan(), PruningReport(evaluations=entries))
    top = card.text.split("## How to load it")[0]
    assert ("> **Warning:** the text that this model writes has degenerated" in top) == warned
    assert ("90%" in top) == warned


def test_pictures_are_shown_only_if_they_are_there() -> None:
    made, report = full_plan(), full()
    assert "![" not in checked(made, report).text
    card = checked(made, report, pictures=["pruning_depth.png", "pruning_quality.png", "other.png"])
    found = re.findall(r"!\[(.+)\]\((.+)\)", card.text)
    assert [name for _, name in found] == ["pruning_depth.png", "pruning_quality.png"]
    assert all(len(words) > 20 for words, _ in found)
    assert "pruning_depth.png" in section(card, "What was removed")
    only = checked(plan(), PruningReport(), pictures=list(PICTURES))
    assert [name for _, name in re.findall(r"!\[(.+)\]\((.+)\)", only.text)] == [
        "pruning_depth.png",
        "pruning_quality.png",
        "pruning_search.png",
    ]


def test_the_command_and_the_plan() -> None:
    part = section(checked(full_plan(), full()), "Reproduce")
    applied = f"optimum-cli blockprune apply -m me/dense --revision {COMMIT} --plan pruning_plan.json OUTPUT"
    assert full().command in part and applied in " ".join(part.replace("\\\n", "").split())
    assert "BASE_MODEL" not in part
    part = section(checked(plan("/home/me/dense"), PruningReport()), "Reproduce")
    assert "apply -m BASE_MODEL --plan pruning_plan.json OUTPUT" in part
    assert "`BASE_MODEL` stands for the dense model, here `dense`, which is not known to be on the Hub." in part
    gguf = section(checked(plan("/home/me/dense.gguf"), PruningReport()), "Reproduce")
    assert "optimum-cli" not in gguf and "GGUF" in gguf


def test_what_a_stranger_needs_to_run_the_command() -> None:
    command = "optimum-cli blockprune run -m me/dense --dataset {} OUTPUT"
    part = section(checked(full_plan(), full(command=command.format("calib.txt"))), "Reproduce")
    assert "is a file that is not in this folder" in part
    named = {"source": WIKITEXT, "fingerprint": "abc"}
    report = full(command=command.format("wikitext2"), calibration=named)
    assert "is a file" not in section(checked(full_plan(calibration=named), report), "Reproduce")
    part = section(checked(full_plan(versions={"torch": "1.0"}), full()), "Reproduce")
    assert "Versions that chose: torch 1.0" in part
    assert "Versions that chose" not in section(checked(full_plan(versions=full().versions), full()), "Reproduce")


def test_loading_code_of_the_repository() -> None:
    card = checked(plan(), PruningReport(base={"model": "me/dense", "remote_code": True}))
    part = section(card, "How to load it")
    assert part.count(", trust_remote_code=True)") == 2 and "read that first" in part
    assert "--trust-remote-code" in section(card, "Reproduce")


def test_models_that_read_more_than_text() -> None:
    report = PruningReport(loader="LlavaForConditionalGeneration", task="image-text-to-text")
    lines = section(checked(plan(), report), "How to load it").splitlines()
    begin = lines.index("```python")
    assert lines[begin + 1 : begin + 4] == [
        "from transformers import LlavaForConditionalGeneration, AutoProcessor",
        'model = LlavaForConditionalGeneration.from_pretrained("path/or/repo")',
        'processor = AutoProcessor.from_pretrained("path/or/repo")',
    ]


def test_earlier_prunings_are_listed_oldest_first() -> None:
    history = [
        {"strategy": "sleb", "removed_blocks": [4, 1], "num_blocks": 32, "base_model": "org/first", "versions": {}},
        {
            "strategy": "bip",
            "removed_blocks": [],
            "num_blocks": 30,
            "units": {"mlp": {"before": 100, "after": 75}},
            "base_model": "/home/me/second",
            "versions": {"optimum-blockprune": "0.1.0"},
        },
    ]
    card = checked(plan("/home/me/third"), PruningReport(history=history, base={"model": "/home/me/third"}))
    assert card.data.base_model == "org/first"
    part = section(card, "Where it comes from")
    assert "1. [org/first](https://huggingface.co/org/first) lost blocks 4, 1 of 32 by `sleb`\n" in part
    assert "2. `second` lost 25 of 100 MLP channels by `bip` (optimum-blockprune 0.1.0)" in part
    assert "/home/me" not in str(card)


def test_a_plan_that_was_applied_cost_something_but_no_search() -> None:
    card = checked(plan(), PruningReport(seconds={"load": 1.5}, dtype="float32"))
    assert "## The search" not in card.text and section(card, "Cost").startswith("What it cost (float32):")


# Injection


def test_nothing_that_is_named_becomes_markup() -> None:
    """All texts of a report that others can choose."""
    report = full(
        evaluations=[evaluation("pruned", 5.0, source=EVIL, fingerprint=EVIL), evaluation(EVIL, 6.0, source=EVIL)],
        task_results=[scored("pruned", 0.5, task=EVIL, source=EVIL, metrics={EVIL: 0.5}, primary=EVIL)],
        calibration={"source": EVIL, "fingerprint": EVIL, "recipe": EVIL},
        options={EVIL: EVIL},
        requested={EVIL: EVIL},
        seconds={EVIL: 1.0},
        device=EVIL,
        runtimes={EVIL: {"verdict": EVIL, "reason": EVIL}},
        base={"model": f"x/{EVIL}", "license": EVIL, "license_name": EVIL, "license_link": EVIL, "card": EVIL}
        | {"revision": EVIL, "language": [EVIL]},
        history=[{"strategy": EVIL, "removed_blocks": [EVIL], "base_model": EVIL, "units": {}, "versions": {}}],
        versions={EVIL: EVIL},
        command=EVIL + "\n```\nrm",
    )
    made = plan(EVIL, EVIL, options={EVIL: EVIL}, requested={EVIL: EVIL}, calibration=report.calibration)
    card = checked(made, report, title=EVIL)
    outside = unfenced(card.text)
    assert "alert" in outside
    bare = re.sub(r"`[^`\n]+`", "", re.sub(r"\\.", "", outside))
    for mark in ("<script", "](http://evil", "![", "**b**", "$$", "`"):
        assert mark not in bare, mark
    assert "\x1b" not in str(card) and "\nlicense: mit" not in card.text.replace(fenced(report.command, "shell"), "")
    assert [name for name in re.findall(r"(?m)^## (.*)$", outside)] == [name for name in SECTIONS if name != "Cost"]
    for line in outside.splitlines():
        if line.startswith("|"):
            assert cells(line) and line.endswith("|")


def test_tables_keep_their_columns_whatever_is_in_them() -> None:
    report = PruningReport(task_results=[scored(label, 0.5, task=EVIL) for label in ("dense", "pruned", "a|b")])
    widths = {len(row) for row in rows(section(checked(plan(), report), "Benchmark tasks"))}
    assert widths == {8}


@pytest.mark.parametrize("word", [EVIL, "__init__", "a_b", "x\\|y", "&lt;", "1 # 2 #", "~~s~~", "", " ", "emoji 🙂"])
def test_plain_text_can_be_read_back(word: str) -> None:
    assert unescaped(plain(word)) == one_line(word)
    assert title_of(str(model_card(plan(), PruningReport(), title=word))) == (one_line(word) or "Pruned model")


def test_spellings() -> None:
    assert plain("a_b") == "a_b" and plain("_a_ __b__") == r"\_a\_ \_\_b\_\_"
    assert (code("x y"), code("a`b"), code("a|b"), code("")) == ("`x y`", r"a\`b", r"a\|b", "")
    assert fenced("a\n```\tb\x00", "shell") == "````shell\na\n``` b\N{REPLACEMENT CHARACTER}\n````"
    assert (figure(None), figure(3), figure(1234.5), figure(2e9), figure(math.inf)) == (
        "–",
        "3",
        "1,234.50",
        "2.00e+09",
        "not finite",
    )
    assert percent(0.1234) == "12.3 %"
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"


@pytest.mark.parametrize(
    ("name", "loaded", "repo"),
    [
        ("org/x", False, "org/x"),
        ("gpt2", True, "gpt2"),
        (f"/cache/models--org--x/snapshots/{COMMIT}", False, "org/x"),
        (f"/cache/models--gpt2/snapshots/{COMMIT}", False, "gpt2"),
        (f"C:\\cache\\models--a--b.c\\snapshots\\{COMMIT}\\", False, "a/b.c"),
    ],
)
def test_repositories_by_name_and_by_their_place_in_the_cache(name: str, loaded: bool, repo: str) -> None:
    assert hub_id(name, loaded=loaded) == repo


# Real runs


def run(source: Any, target: Path, **fields: Any) -> tuple[ModelCard, BlockPruner]:
    """Prunes, and checks that the card can be written again from the files beside it."""
    pruner = BlockPruner.from_pretrained(source, config(**fields))
    pruner.prune(target)
    return again(target), pruner


def again(folder: Path) -> ModelCard:
    pictures = [name for name in PICTURES if (folder / name).is_file()]
    written = (folder / "README.md").read_text(encoding="utf-8")
    made, report = PruningPlan.from_file(folder), PruningReport.from_file(folder)
    assert str(checked(made, report, folder.name, pictures=pictures)) == written
    return ModelCard(written)


def test_two_prunings_keep_the_chain(tmp_path: Path) -> None:
    dense = toy_folder(tmp_path / "dense")
    (dense / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\nIts own words.\n", encoding="utf-8")
    first, _ = run(dense, tmp_path / "first")
    second, pruner = run(tmp_path / "first", tmp_path / "second", strategy="random", num_blocks=1)
    assert first.data.license == second.data.license == "mit" and second.data.language == ["en"]
    assert first.data.base_model is second.data.base_model is None
    part = section(second, "Where it comes from")
    gone = ", ".join(map(str, pruner.report.history[0]["removed_blocks"]))
    assert f"1. `dense` lost blocks {gone} of 6 by `sleb` (optimum-blockprune" in part
    assert "Its own words" not in second.text and str(tmp_path) not in str(second)
    assert "This is `first` with 1 of its 4 transformer blocks" in second.text


@pytest.mark.parametrize("layout", ["uniform", "padded", "per_layer"])
def test_width(layout: str, tmp_path: Path) -> None:
    options = {"families": "both"}
    pruner = toy_pruner(strategy="magnitude", layout=layout, protect_first=int(layout != "uniform"), dataset=None)
    pruner.prune(tmp_path / "out", config=config("magnitude", layout=layout, strategy_options=options, dataset=None))
    card, totals = again(tmp_path / "out"), pruner.plan.width.totals()
    assert card.data.tags == ["pruned", "structured-pruning", "width-pruning", "optimum", "magnitude"]
    for family, name in (("mlp", "MLP channels"), ("attention", "KV groups or heads")):
        before, after = totals[family]["before"], totals[family]["after"]
        assert [f"{name}, all blocks", f"{before:,}", f"{after:,}"] in rows(section(card, "What was removed"))
        assert f"{percent(1 - after / before)} of its {name}" in card.text
    assert f"layout `{layout}`" in card.text and "All blocks stay" in card.text
    loads = section(card, "How to load it")
    assert ("load_pruned" in loads) == ("pip install optimum-blockprune" in loads) == (layout == "per_layer")
    padding = pruner.report.achieved.get("padding_parameters")
    assert bool(padding) == ("zeros that fill up blocks" in card.text)


def test_joined_plans(tmp_path: Path) -> None:
    pruner = toy_pruner()
    parts = [config("shortgpt", seed=3), config("magnitude", dataset=None)]
    pruner.prune(tmp_path / "out", config=parts)
    card = again(tmp_path / "out")
    assert card.data.tags[-2:] == ["shortgpt", "magnitude"] and "width-pruning" in card.data.tags
    assert "Chosen by the strategies `shortgpt`, then `magnitude`" in card.text
    part = section(card, "Reproduce")
    assert "Seed of `shortgpt`: 3" in part and "Asked for of `magnitude`" not in part
    assert "Asked for by `magnitude`: `sparsity=0.4`" in part and "makes the same checkpoint" not in part
    assert "2 of its 6 transformer blocks and" in card.text


def test_a_measured_run(tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(text(150, seed=8), encoding="utf-8")
    pruner = BlockPruner.from_pretrained(toy_folder(tmp_path / "dense"), config())
    pruner.evaluate(held_out)
    pruner.make_plan()
    pruner.measure_depths(held_out)
    pruner.prune(plan=pruner.plan)
    pruner.evaluate(held_out)
    pruner.save_pretrained(tmp_path / "out")
    card = again(tmp_path / "out")
    quality = rows(section(card, "Quality"))
    dense, pruned = pruner.report.evaluations
    assert ["perplexity (lower is better)", figure(dense["perplexity"]), figure(pruned["perplexity"])] in quality
    depths = rows(section(card, "Quality against depth"))
    assert len(depths) == 2 + 3 and depths[-1][0] == "**2**"
    assert "in-memory texts" in section(card, "Reproduce") and "loaded again" in section(card, "Reproduce")
    assert (
        json.loads((tmp_path / "out" / "pruning_report.json").read_text())["calibration"]["fingerprint"] in card.text
    )
