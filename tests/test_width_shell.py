# SPDX-License-Identifier: Apache-2.0
"""Width from the command line, and what report and card say of it; figures are counted again from the weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import output, refusal, run
from families import block_list, plain_logits, random_ids, tiny_model
from huggingface_hub import ModelCard
from optimum.utils import logging
from safetensors.torch import load_file
from toys import assert_same_weights, files_below, toy_folder
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan
from optimum_blockprune.loading import load_model


DEPTH = 4
FLAGS = ["--strategy", "magnitude", "--sparsity", "0.4", "--align", "16"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_folder(tmp_path_factory.mktemp("dense"), num_blocks=DEPTH)


@pytest.fixture(autouse=True)
def verbosity() -> Iterator[None]:
    """The commands turn the logs on."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


def parameters_in(folder: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())


# run, plan, apply


@pytest.mark.parametrize("layout", ["uniform", "padded", "per_layer"])
def test_run(layout: str, dense: Path, tmp_path: Path, capsys) -> None:
    """28.8 of 48 channels in each block; in sixteens 32."""
    printed = output(capsys, "run", "-m", dense, *FLAGS, "--layout", layout, tmp_path / "out")
    before, after = parameters_in(dense), parameters_in(tmp_path / "out")
    assert after == before - DEPTH * 16 * 3 * 32
    assert printed.splitlines() == [
        f"{tmp_path / 'out'}: 4 of 4 blocks, {after:,} of {before:,} parameters",
        "removed by magnitude: 64 of 192 MLP channels",
    ]
    config = BlockPruningConfig("magnitude", sparsity=0.4, layout=layout, align=16)
    pruner = BlockPruner.from_pretrained(dense, config)
    pruner.prune()
    loaded = load_model(tmp_path / "out")
    assert_same_weights(loaded.state_dict(), pruner.model.state_dict())
    assert PruningPlan.from_file(tmp_path / "out").to_dict() == pruner.plan.to_dict()
    saved = BlockPruningConfig.from_pretrained(tmp_path / "out")
    assert (saved.strategy, saved.sparsity, saved.layout, saved.align) == ("magnitude", 0.4, layout, 16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == (
        48 if layout == "per_layer" else 32
    )


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_plan_and_apply_give_what_run_gives(layout: str, dense: Path, tmp_path: Path, capsys) -> None:
    before = files_below(dense)
    flags = [*FLAGS, "--layout", layout, "--strategy-option", "families=both"]
    run("run", "-m", dense, *flags, tmp_path / "run")
    printed = output(capsys, "plan", "-m", dense, *flags, "--output", tmp_path / "plan.json")
    removed = "64 of 192 MLP channels and 4 of 8 KV groups or heads"
    assert printed == f"{tmp_path / 'plan.json'}: magnitude removes {removed}\n"
    plan = PruningPlan.from_file(tmp_path / "plan.json")
    assert plan.to_dict() == PruningPlan.from_file(tmp_path / "run").to_dict()
    for verify in ("keys", "logits"):
        words = ["apply", "-m", dense, "--plan", tmp_path / "plan.json", "--verify", verify, tmp_path / verify]
        assert output(capsys, *words) == f"{tmp_path / verify}: 4 of 4 blocks, without {removed}\n"
        weights = [load_file(tmp_path / name / "model.safetensors") for name in ("run", verify)]
        assert sorted(weights[0]) == sorted(weights[1])
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        settings = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("run", verify)]
        assert settings[0] == settings[1]
        reports = [json.loads((tmp_path / name / "pruning_report.json").read_text()) for name in ("run", verify)]
        assert reports[0]["achieved"] == reports[1]["achieved"] and reports[0]["runtimes"] == reports[1]["runtimes"]
        cards = [(tmp_path / name / "README.md").read_text() for name in ("run", verify)]
        first, second = (card.split("## What was removed\n")[1].split("## Quality\n")[0] for card in cards)
        assert first == second
    assert files_below(dense) == before


def test_json(dense: Path, tmp_path: Path, capsys) -> None:
    flags = [*FLAGS, "--layout", "per_layer", "--json"]
    result = json.loads(output(capsys, "run", "-m", dense, *flags, tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "pruning_report.json").read_text())
    assert result["output"] == str(tmp_path / "out") and result["requested"] == {"sparsity": 0.4}
    assert result["achieved"] == report["achieved"]
    assert result["achieved"]["layout"] == "per_layer" and result["achieved"]["blocks_removed"] == 0
    assert result["achieved"]["units"] == {"mlp": {"before": 192, "after": 128, "removed": pytest.approx(1 / 3)}}
    assert "removed_blocks" not in result  # none
    planned = json.loads(output(capsys, "plan", "-m", dense, *flags, "-o", tmp_path))
    assert planned == {"output": str(tmp_path / "pruning_plan.json"), **PruningPlan.from_file(tmp_path).to_dict()}
    assert planned["width"]["layout"] == "per_layer" and len(planned["width"]["narrowed"]) == DEPTH
    applied = output(capsys, "apply", "-m", dense, "--plan", tmp_path, "--json", tmp_path / "applied")
    assert json.loads(applied) == {"output": str(tmp_path / "applied"), "removed_blocks": []}


def test_protected_blocks(dense: Path, tmp_path: Path, capsys) -> None:
    flags = [*FLAGS, "--layout", "per_layer", "--protect-first", "1", "--protect-last", "2"]
    printed = output(capsys, "run", "-m", dense, *flags, tmp_path / "out")
    assert printed.endswith("removed by magnitude: 16 of 192 MLP channels\n")
    loaded = load_model(tmp_path / "out")
    assert [block.mlp.down_proj.in_features for block in block_list(loaded)] == [48, 32, 48, 48]


def test_a_saved_configuration_is_read(dense: Path, tmp_path: Path, capsys) -> None:
    BlockPruningConfig("magnitude", sparsity=0.4, align=16, layout="per_layer").save_pretrained(tmp_path / "saved")
    command = ["run", "-m", dense, "--config", tmp_path / "saved", "--json"]
    first = json.loads(output(capsys, *command, tmp_path / "first"))
    second = json.loads(output(capsys, *command, "--align", "1", "--layout", "uniform", tmp_path / "second"))
    assert [each["achieved"]["units"]["mlp"]["after"] for each in (first, second)] == [4 * 32, 4 * 29]
    assert [each["achieved"]["layout"] for each in (first, second)] == ["per_layer", "uniform"]


def test_a_target(dense: Path, tmp_path: Path, capsys) -> None:
    target = parameters_in(dense) - 5000
    flags = ["--strategy", "magnitude", "--target-params", target]
    run("run", "-m", dense, *flags, tmp_path / "out")
    after = parameters_in(tmp_path / "out")
    # In eights, one more step would not be needed.
    assert after <= target < after + DEPTH * 8 * 96


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--strategy", "magnitude", "--num-blocks", "1"],
            "num_blocks=1 counts blocks, but strategy 'magnitude' removes",
        ),
        (
            ["--strategy", "random", "--strategy-option", "unit=width", "--num-blocks", "1"],
            "but strategy 'random' removes channels and heads: use sparsity or target_params.",
        ),
        ([*FLAGS, "--layout", "uniform", "--protect-first", "1"], "layout='uniform' gives all blocks the same width"),
        (["--strategy", "magnitude", "--sparsity", "0.99"], "The largest possible sparsity is 0.9166."),
        (["--strategy", "magnitude", "--sparsity", "0.01"], "sparsity=0.01 removes nothing"),
        (["--strategy", "magnitude", "--target-params", "10"], "target_params=10 cannot be reached by removing units"),
        (["--strategy", "magnitude", "--align", "64"], "align=64"),
        (["--strategy", "magnitude", "--strategy-option", "families=mpl"], "Did you mean 'mlp'"),
        (["--strategy", "magnitude", "--strategy-option", "family=mlp"], "has no option 'family'"),
        (["--blocks", "1", "--layout", "padded"], "--blocks names the blocks itself; layout would have no effect."),
        (["--blocks", "1", "--align", "8"], "--blocks names the blocks itself; align would have no effect."),
    ],
)
def test_refusals(flags: list[str], message: str, dense: Path, tmp_path: Path, capsys) -> None:
    assert message in refusal(capsys, "run", "-m", dense, *flags, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    if "--blocks" not in flags:
        assert message in refusal(capsys, "plan", "-m", dense, *flags, "-o", tmp_path / "plan.json")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--layout", "unifrom"], ["--align", "0"], ["--align", "x"]])
def test_flags_that_are_wrong(flags: list[str], dense: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        run("run", "-m", dense, *FLAGS, *flags, tmp_path / "out")
    assert caught.value.code == 2 and not list(tmp_path.iterdir())
    assert "Traceback" not in capsys.readouterr().err


def test_a_second_run_on_widths_of_their_own_is_refused(dense: Path, tmp_path: Path, capsys) -> None:
    run("run", "-m", dense, *FLAGS, "--layout", "per_layer", tmp_path / "out")
    PruningPlan.from_removed("llama", DEPTH, [1]).save(tmp_path / "plan.json")
    for words in (
        ["run", "-m", tmp_path / "out", *FLAGS, tmp_path / "twice"],
        ["run", "-m", tmp_path / "out", "--blocks", "1", tmp_path / "twice"],
        ["apply", "-m", tmp_path / "out", "--plan", tmp_path / "plan.json", tmp_path / "twice"],
    ):
        line = refusal(capsys, *words)
        assert "was pruned with layout='per_layer' before" in line and "prune(config=[first, second])" in line
    assert {path.name for path in tmp_path.iterdir()} == {"out", "plan.json"}


def test_heads_that_cannot_go_are_refused_by_name(tmp_path: Path, capsys) -> None:
    toy_folder(tmp_path / "dense", "bloom", 2)
    flags = ["--strategy", "magnitude", "--strategy-option", "families=attention", "--sparsity", "0.5"]
    line = refusal(capsys, "run", "-m", tmp_path / "dense", *flags, tmp_path / "out")
    assert "Model type 'bloom': its attention heads cannot be cut exactly: ALiBi" in line


# Report and card


def counted(dense: PreTrainedModel, model: PreTrainedModel, padded: bool = False) -> dict[str, dict[str, Any]]:
    """Units of a Llama by the shapes of its writers, or by the inputs that are not zero."""
    found: dict[str, dict[str, Any]] = {}
    for family, name, size in (("mlp", "mlp.down_proj", 1), ("attention", "self_attn.o_proj", 16)):
        inputs = []
        for each in (dense, model):
            weights = [block.get_submodule(name).weight for block in block_list(each)]
            if padded:
                weights = [weight[:, weight.abs().sum(0) > 0] for weight in weights]
            inputs.append(sum(weight.shape[1] for weight in weights) // size)
        found[family] = {"before": inputs[0], "after": inputs[1], "removed": pytest.approx(1 - inputs[1] / inputs[0])}
    return found


def pruned(layout: str, folder: Path, **fields: Any) -> BlockPruner:
    options = {"families": "both"}
    config = BlockPruningConfig("magnitude", sparsity=0.4, align=16, layout=layout, strategy_options=options, **fields)
    pruner = BlockPruner(tiny_model("llama", DEPTH), config)
    pruner.prune(save_dir=folder)
    return pruner


def read_card(folder: Path) -> tuple[list[str], list[str]]:
    """The lines of the card as the Hub reads it, and its tags."""
    card = ModelCard.load(folder / "README.md")
    return card.text.splitlines(), card.data.tags


def snippet(lines: list[str]) -> list[str]:
    begin = lines.index("```python")
    return lines[begin + 1 : lines.index("```", begin)]


def executed(lines: list[str], folder: Path) -> Any:
    """Runs a card's snippet, but for the tokenizer, which the folder does not have."""
    code = "\n".join(line.replace("path/or/repo", str(folder)) for line in snippet(lines) if "tokenizer" not in line)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["model"]


@pytest.mark.parametrize("layout", ["uniform", "padded", "per_layer"])
def test_units_and_parameters_are_those_of_the_weights(layout: str, tmp_path: Path) -> None:
    protect = {} if layout == "uniform" else {"protect_first": 1}
    pruner = pruned(layout, tmp_path / "out", **protect)
    dense, achieved = tiny_model("llama", DEPTH), pruner.report.achieved
    assert achieved["layout"] == layout
    assert achieved["units"] == counted(dense, pruner.model, layout == "padded")
    assert (achieved["parameters_before"], achieved["parameters_after"]) == (
        dense.num_parameters(),
        parameters_in(tmp_path / "out"),
    )
    assert ("padding_parameters" in achieved) == (layout == "padded")
    written = json.loads((tmp_path / "out" / "pruning_report.json").read_text())
    assert written["achieved"] == json.loads(json.dumps(achieved))


def test_padding_is_counted_as_zeros(tmp_path: Path) -> None:
    """Block 0 is protected and keeps all; the three others are filled up to it."""
    pruner = pruned("padded", tmp_path / "out", protect_first=1)
    zeros = sum(int((parameter == 0).sum()) for block in block_list(pruner.model) for parameter in block.parameters())
    dense = sum(int((p == 0).sum()) for block in block_list(tiny_model("llama", DEPTH)) for p in block.parameters())
    assert dense == 0
    assert pruner.report.achieved["padding_parameters"] == zeros == 3 * (16 * 96 + 1 * 48 * 32)
    lines, _ = read_card(tmp_path / "out")
    assert f"| of the parameters, zeros that fill up blocks | 0 | {zeros:,} |" in lines


@pytest.mark.parametrize(
    ("layout", "order"),
    [
        ("uniform", "every block keeps the same number of them"),
        ("padded", "zeros fill the narrower blocks up to the widest one"),
        ("per_layer", "every block has its own width"),
    ],
)
def test_the_card_says_what_was_removed(layout: str, order: str, tmp_path: Path) -> None:
    pruner = pruned(layout, tmp_path / "out")
    lines, tags = read_card(tmp_path / "out")
    assert tags == ["pruned", "structured-pruning", "width-pruning", "optimum", "magnitude"]
    text = "with 33.3 % of its MLP channels and 50.0 % of its KV groups or heads removed"
    assert any(line.startswith(f"This is a model of unknown name {text}") for line in lines)
    assert any(f"Width, layout `{layout}`: {order}." in line for line in lines)
    assert f"| blocks | {DEPTH} | {DEPTH} |" in lines
    assert (
        f"| parameters | {tiny_model('llama', DEPTH).num_parameters():,} | {pruner.model.num_parameters():,} |"
        in lines
    )
    assert "| MLP channels, all blocks | 192 | 128 |" in lines
    assert "| KV groups or heads, all blocks | 8 | 4 |" in lines
    # As many in every block: there is nothing to fill up.
    assert not any("zeros that fill up" in line for line in lines)


@pytest.mark.parametrize("layout", ["uniform", "padded", "per_layer"])
def test_the_snippet_loads_the_model(layout: str, tmp_path: Path) -> None:
    pruner = pruned(layout, tmp_path / "out", **({} if layout == "uniform" else {"protect_last": 1}))
    lines, _ = read_card(tmp_path / "out")
    own = any("optimum_blockprune" in line for line in snippet(lines))
    assert own == (layout == "per_layer")
    assert 'tokenizer = AutoTokenizer.from_pretrained("path/or/repo")' in snippet(lines)
    loaded = executed(lines, tmp_path / "out")
    assert torch.equal(plain_logits(loaded, random_ids()), plain_logits(pruner.model, random_ids()))


def test_other_runtimes_cannot_read_widths_of_their_own(tmp_path: Path) -> None:
    runtimes = pruned("per_layer", tmp_path / "out").report.runtimes
    others = pruned("uniform", tmp_path / "uniform").report.runtimes
    assert runtimes.keys() == {"transformers", *others} and len(others) >= 2
    assert {each["verdict"] for each in runtimes.values()} == {"differs"}
    lines, _ = read_card(tmp_path / "out")
    for name in runtimes:
        assert (
            f"- {name}: reads it differently (every block has its own width, which only this package loads)" in lines
        )
    assert {each["verdict"] for each in others.values()} == {"same"}
    assert "transformers" not in others


def test_depth_and_width_in_one_card(tmp_path: Path) -> None:
    configs = [BlockPruningConfig("random", num_blocks=1), BlockPruningConfig("magnitude", sparsity=0.4, align=16)]
    pruner = BlockPruner(tiny_model("llama", DEPTH))
    pruner.prune(save_dir=tmp_path / "out", config=configs)
    lines, tags = read_card(tmp_path / "out")
    depth = ["block-pruning", "depth-pruning"]
    assert tags == ["pruned", *depth, "structured-pruning", "width-pruning", "optimum", "random", "magnitude"]
    text = "with 1 of its 4 transformer blocks and 33.3 % of its MLP channels removed by"
    assert any(text in line for line in lines)
    (removed,) = pruner.plan.removed_blocks
    assert any(f"Removed blocks, in order: {removed} " in line for line in lines)
    assert any("`random`, then `magnitude`" in line for line in lines)
    assert any("layout `uniform`: every block keeps the same number of them." in line for line in lines)
    assert "| MLP channels, all blocks | 144 | 96 |" in lines and "| blocks | 4 | 3 |" in lines
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() == pruner.model.num_parameters()
