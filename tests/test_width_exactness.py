# SPDX-License-Identifier: Apache-2.0
"""Width leaves a model exactly, or is refused by name: every kind of attention and MLP, in three layouts."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import EXACT, REFUSED, SUBJECTS, WRONG, Subject, Verdict, relative
from safetensors.torch import load_file
from tiers import often
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from width_exactness import FAMILIES, LAYOUTS, TOLERANCE, Case, case, judge, masked, same_model, uneven, width_config
from zoo import causal

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan
from optimum_blockprune.errors import BlockPruningError, UnsupportedModelError
from optimum_blockprune.loading import load_model


pytestmark = pytest.mark.usefixtures("no_pictures")


# Both families in all layouts.
BOTH = (
    case("llama", "gqa"),
    case("llama", "mha", num_key_value_heads=4),
    case("llama", "mqa", num_key_value_heads=1),
    case("llama", "biases", attention_bias=True, mlp_bias=True),
    case("llama", "tied", tie_word_embeddings=True),
    case("phi3", "gqa"),
    case("phi3", "mha", num_key_value_heads=4),
    case("phi3", "mqa", num_key_value_heads=1),
    case("mistral"),
    case("qwen2"),
    case("qwen3"),
    case("gemma2"),
    case("gemma3_text"),
    case("phi"),
    case("granite"),
    case("cohere", "norms"),
    case("cohere", "plain", use_qk_norm=False),
    case("starcoder2"),
    case("smollm3"),
    case("glm"),
    case("glm4"),
    case("qwen2_moe"),
    case("deepseek_v3"),
    case("bamba"),
)
# Channels; the heads have no ordinary checkpoint.
MLP = (
    case("gpt2"),
    case("gpt_neox", "parallel"),
    case("gpt_neox#sequential"),
    case("falcon", "multi_query"),
    case("falcon#new_decoder"),
    case("falcon", "multi_head", multi_query=False, num_kv_heads=4),
    case("falcon", "sequential", parallel_attn=False, bias=True),
    case("opt"),
    case("opt#projected"),
    case("stablelm", "biases"),
    case("stablelm", "norms", qk_layernorm=True, use_parallel_residual=True),
    Case("encoder-decoder", "bart", "encoder"),
    Case("encoder-decoder", "bart", "decoder"),
)
# Heads; the channels are those of routed experts.
ATTENTION = (case("olmo"), case("gpt_oss"), case("mixtral"), case("jamba"))
# Whatever the layout: what is refused, and a word of the reason.
NEVER = (
    (case("olmo2"), "attention", "norm' normalises all of them together"),
    (case("bloom"), "attention", "ALiBi"),
    (case("falcon#alibi"), "attention", "ALiBi"),
    (case("gpt_oss"), "mlp", "experts"),
    (case("mixtral"), "mlp", "experts"),
    (case("jamba"), "mlp", "experts"),
    (Case("encoder-decoder", "t5", "encoder"), "attention", "position bias"),
    (Case("encoder-decoder", "t5", "decoder"), "attention", "position bias"),
)
# Refused in layout "uniform"; the others have no need of a configuration field.
NOT_UNIFORM = (
    *((each, "attention", "") for each in MLP),
    (case("bloom"), "mlp", "no field"),
    (Case("encoder-decoder", "t5", "encoder"), "mlp", "outside of the blocks"),
    (Case("encoder-decoder", "t5", "decoder"), "mlp", "outside of the blocks"),
)
POSSIBLE = (
    *((each, family) for each in BOTH for family in FAMILIES),
    *((each, "mlp") for each in (*MLP, case("olmo2"), case("falcon#alibi"))),
    *((each, "attention") for each in ATTENTION),
)
# Built like others that run by default.
ALIKE = (
    *("llama-mha", "llama-tied", "phi3-mha", "phi3-mqa", "mistral", "smollm3", "qwen2", "glm", "granite"),
    *("cohere-plain", "falcon-multi_head", "falcon#alibi", "stablelm-biases", "gpt_neox#sequential", "jamba"),
)
# One of each kind runs in all layouts by default.
REDUCED = ("llama-gqa", "llama-mqa", "phi3-gqa", "gpt2", "gpt_neox-parallel", "falcon#new_decoder")


def assert_exact(verdict: Verdict) -> None:
    assert verdict.status == EXACT, verdict.reason


def assert_refused(verdict: Verdict, subject: Case, word: str = "") -> None:
    """By name, with a reason, and before anything was changed."""
    assert verdict.status == REFUSED, verdict.reason
    assert f"odel type '{subject.model_type}'" in verdict.reason
    assert "cannot be cut exactly" in verdict.reason
    assert verdict.reason.startswith("0 passes")
    assert word in verdict.reason


def ids(value: object) -> str:
    return str(value)


# --- one verdict for every architecture ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("subject", "family"), often(POSSIBLE, kept=lambda case: str(case[0]) not in ALIKE), ids=ids)
def test_uniform_width_is_exact(subject: Case, family: str) -> None:
    assert_exact(judge(subject, family, "uniform"))


def _others(*, chosen: bool) -> list[tuple[Case, str, str]]:
    return [
        (subject, family, layout)
        for layout in ("padded", "per_layer")
        for subject, family in POSSIBLE
        if (str(subject) in REDUCED) == chosen
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("subject", "family", "layout"), _others(chosen=True), ids=ids)
def test_blocks_of_different_widths_are_exact(subject: Case, family: str, layout: str) -> None:
    assert_exact(judge(subject, family, layout))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("subject", "family", "layout"), _others(chosen=False), ids=ids)
def test_blocks_of_different_widths_are_exact_everywhere(subject: Case, family: str, layout: str) -> None:
    assert_exact(judge(subject, family, layout))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("subject", "family", "word"), NEVER, ids=ids)
def test_what_no_layout_can_hold_is_refused(subject: Case, family: str, word: str, layout: str) -> None:
    assert_refused(judge(subject, family, layout), subject, word)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("subject", "family", "word"), NOT_UNIFORM, ids=ids)
def test_what_no_configuration_describes_is_refused_in_layout_uniform(subject: Case, family: str, word: str) -> None:
    assert_refused(judge(subject, family, "uniform"), subject, word)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", often(["padded", "per_layer"], kept=lambda layout: layout == "padded"))
@pytest.mark.parametrize(("subject", "family", "word"), NOT_UNIFORM, ids=ids)
def test_other_layouts_hold_it_exactly_or_refuse_it(subject: Case, family: str, word: str, layout: str) -> None:
    verdict = judge(subject, family, layout)
    if verdict.status == REFUSED:
        assert_refused(verdict, subject)
    else:
        assert_exact(verdict)


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_result_is_seen() -> None:
    """The judge itself can fail: a truth that is another one by little is not met."""

    class Mistaken(Case):
        def logits(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
            hooked = any(module._forward_pre_hooks for module in model.modules())
            return super().logits(model, inputs) * (1.0001 if hooked else 1.0)

    assert judge(Mistaken("causal", "llama", None, "", 3), "mlp", "uniform").status == WRONG


@pytest.fixture(scope="module")
def counts() -> Iterator[Counter[str]]:
    """Verdicts of the sweep, printed at the end (`-s`)."""
    counted: Counter[str] = Counter()
    yield counted
    print("\n", dict(counted))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_every_architecture_is_exact_or_refused(subject: Subject, family: str, counts: Counter[str]) -> None:
    verdict = judge(Case(subject.group, subject.name, subject.stack), family, "uniform", align=8)
    counts[f"{family}: {verdict.status}"] += 1
    assert verdict.status in (EXACT, REFUSED), verdict.reason
    assert verdict.status == EXACT or "odel type '" in verdict.reason


# --- files, and depth before width ---------------------------------------------------------------------------------


def plan_for(model: PreTrainedModel, family: str, layout: str) -> PruningPlan:
    """The same number everywhere in layout "uniform", different ones in the others."""
    plan = BlockPruner(model, width_config(family, layout)).make_plan()
    return plan if layout == "uniform" else uneven(plan)


def assert_same_files(one: Path, other: Path) -> None:
    """The same tensors, bit for bit, and the same configuration but for where it comes from."""
    tensors, others = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor.view(torch.uint8), others[name].view(torch.uint8)), name
    fields, their_fields = (json.loads((folder / "config.json").read_text()) for folder in (one, other))
    for field in ("block_pruning", "_name_or_path"):
        fields.pop(field, None)
        their_fields.pop(field, None)
    assert fields == their_fields


FILES = (
    case("llama", "gqa"),
    case("llama", "tied", tie_word_embeddings=True),
    case("qwen2"),
    case("gemma3_text"),
    case("phi3"),
    case("gpt2"),
    case("deepseek_v3"),
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", often(LAYOUTS, kept=lambda layout: layout == "uniform"))
@pytest.mark.parametrize("subject", FILES, ids=ids)
def test_files_are_narrowed_like_models(subject: Case, layout: str, tmp_path: Path) -> None:
    family = "mlp" if subject.name in ("gpt2", "gemma3_text") else "attention"
    model = subject.model()
    model.save_pretrained(tmp_path / "dense")
    plan = plan_for(model, family, layout)
    BlockPruner(model).prune(save_dir=tmp_path / "memory", plan=plan)
    try:
        stored = PruningPlan.from_file(tmp_path / "memory")
        assert stored.width == plan.width
        stored.apply_to_checkpoint(tmp_path / "dense", tmp_path / "files")
    except UnsupportedModelError as error:
        # Files may hold experts in other pieces than the model.
        assert subject.name == "deepseek_v3"
        assert "files" in str(error)
        return
    assert_same_files(tmp_path / "memory", tmp_path / "files")


def depth_and_width(layout: str, **fields: Any) -> list[BlockPruningConfig]:
    """One block of six, and then two fifths of all channels."""
    return [BlockPruningConfig(strategy="random", num_blocks=1), width_config("both", layout, **fields)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", often(["llama", "gemma3_text"], kept=lambda name: name == "llama"))
def test_depth_and_width_in_one_go(name: str, layout: str, tmp_path: Path) -> None:
    subject = case(name, blocks=5)
    model = subject.model()
    dense = copy.deepcopy(model)
    model.save_pretrained(tmp_path / "dense")
    pruner = BlockPruner(model)
    pruner.prune(save_dir=tmp_path / "joined", config=depth_and_width(layout))
    plan = pruner.plan
    assert len(plan.removed_blocks) == 1
    assert {each.block for each in plan.width.narrowed} == set(plan.kept_blocks)

    truth = masked(subject, causal.silenced(name, dense, plan.removed_blocks), plan)
    ids = causal.random_ids()
    assert relative(causal.plain_logits(model, ids), causal.plain_logits(truth, ids)) <= TOLERANCE

    plan.apply_to_checkpoint(tmp_path / "dense", tmp_path / "files")
    assert_same_files(tmp_path / "joined", tmp_path / "files")

    first, second = depth_and_width(layout)
    BlockPruner.from_pretrained(tmp_path / "dense").prune(save_dir=tmp_path / "shallow", config=first)
    BlockPruner.from_pretrained(tmp_path / "shallow").prune(save_dir=tmp_path / "twice", config=second)
    assert_same_files(tmp_path / "joined", tmp_path / "twice")
    joined, twice = (load_model(tmp_path / name).config.block_pruning for name in ("joined", "twice"))
    assert "previous" not in joined
    assert twice["previous"]["removed_blocks"] == joined["removed_blocks"] == list(plan.removed_blocks)
    assert twice["layout"] == joined["layout"] == layout


def twice(layout: str) -> list[BlockPruningConfig]:
    """Channels first, heads after, and channels again."""
    return [width_config(family, layout, seed=seed) for seed, family in enumerate(("mlp", "attention", "mlp"))]


def test_width_in_three_steps_is_one_width(tmp_path: Path) -> None:
    subject = case("llama", blocks=4)
    model = subject.model()
    dense = copy.deepcopy(model)
    pruner = BlockPruner(model)
    pruner.prune(save_dir=tmp_path / "pruned", config=twice("uniform"))
    assert pruner.plan.width.totals()["mlp"]["after"] == 4 * 17  # 48 -> 29 -> 17
    truth = masked(subject, dense, pruner.plan)
    ids = causal.random_ids()
    for pruned in (model, load_model(tmp_path / "pruned")):
        assert relative(causal.plain_logits(pruned, ids), causal.plain_logits(truth, ids)) <= TOLERANCE


@pytest.mark.parametrize("layout", ["padded", "per_layer"])
def test_the_same_units_twice_in_other_layouts_are_refused(layout: str) -> None:
    model = case("llama").model()
    with pytest.raises(BlockPruningError):
        BlockPruner(model).prune(config=twice(layout))
    assert same_model(model, case("llama").model())


def test_heads_after_kv_groups_are_never_mistaken_for_them() -> None:
    """One KV head is left by the first step, so that the second one counts query heads."""
    subject = case("llama", num_attention_heads=4, num_key_value_heads=2)
    model = subject.model()
    pruner = BlockPruner(model)
    try:
        pruner.prune(config=[width_config("attention", "uniform", seed=seed) for seed in (0, 1)])
    except BlockPruningError:
        assert same_model(model, subject.model())
        return
    truth = masked(subject, subject.model(), pruner.plan)
    ids = causal.random_ids()
    assert relative(causal.plain_logits(model, ids), causal.plain_logits(truth, ids)) <= TOLERANCE


# --- nothing is left of what was not wanted -------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plan_leaves_the_model_alone(layout: str) -> None:
    subject = case("llama", blocks=5)
    model = subject.model()
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    plan = BlockPruner(model).make_plan(depth_and_width(layout))
    assert len(plan.removed_blocks) == 1
    assert plan.width
    assert same_model(model, subject.model())
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters


def test_a_refusal_after_the_first_step_leaves_the_model_alone(tmp_path: Path) -> None:
    subject = case("gpt2", blocks=5)
    model = subject.model()
    configs = [
        BlockPruningConfig(strategy="random", num_blocks=1),
        width_config("mlp", "uniform"),
        width_config("attention", "uniform"),
    ]
    with pytest.raises(UnsupportedModelError, match="'gpt2': its attention heads cannot be cut exactly"):
        BlockPruner(model).prune(save_dir=tmp_path / "pruned", config=configs)
    assert same_model(model, subject.model())
    assert not (tmp_path / "pruned").exists()


# --- other ways to run it -------------------------------------------------------------------------------------------

_WITHOUT_THE_PACKAGE = """
import sys
sys.modules["optimum_blockprune"] = sys.modules["optimum"] = None
import torch
from transformers import AutoModelForCausalLM
ids = torch.load("ids.pt")
for layout in ("uniform", "padded"):
    model = AutoModelForCausalLM.from_pretrained(layout).eval()
    with torch.no_grad():
        torch.save(model(input_ids=ids, use_cache=False).logits, f"{layout}.pt")
"""


def test_an_ordinary_checkpoint_needs_nothing_of_this_package(tmp_path: Path) -> None:
    ids = causal.random_ids()
    torch.save(ids, tmp_path / "ids.pt")
    expected = {}
    for layout in ("uniform", "padded"):
        model = case("llama").model()
        plan = BlockPruner(model, width_config("both", layout)).make_plan()
        plan = plan if layout == "uniform" else uneven(plan)
        BlockPruner(model).prune(save_dir=tmp_path / layout, plan=plan)
        expected[layout] = causal.plain_logits(model, ids)
    subprocess.run([sys.executable, "-W", "ignore", "-c", _WITHOUT_THE_PACKAGE], cwd=tmp_path, check=True, timeout=300)
    for layout, logits in expected.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{layout}.pt"), logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_are_aligned(family: str) -> None:
    model = case("llama").model()
    BlockPruner(model, width_config(family, "uniform", align=8)).prune()
    assert model.config.intermediate_size == (32 if family == "mlp" else 48)  # of 48, and 28.8 were asked for
    assert model.config.num_key_value_heads == (1 if family == "attention" else 2)
    assert model.config.head_dim == 8


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_passes_its_own_gate(family: str, layout: str, tmp_path: Path) -> None:
    subject = case("llama")
    model = subject.model().to(torch.bfloat16)
    dense = copy.deepcopy(model)
    plan = plan_for(model, family, layout)
    BlockPruner(model).prune(save_dir=tmp_path / "pruned", plan=plan)
    reloaded = load_model(tmp_path / "pruned")
    assert reloaded.dtype == torch.bfloat16
    ids = causal.random_ids()
    truth = causal.plain_logits(masked(subject, dense, plan), ids).float()
    for pruned in (model, reloaded):
        assert relative(causal.plain_logits(pruned, ids).float(), truth) < 0.03


def test_automatic_classes_say_that_widths_differ(tmp_path: Path) -> None:
    model = case("llama").model()
    BlockPruner(model).prune(save_dir=tmp_path / "pruned", plan=plan_for(model, "mlp", "per_layer"))
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
