# SPDX-License-Identifier: Apache-2.0
"""The gate sees every kind of damage, and lets everything pass that is right."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, block_list, plain_logits, silenced, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from optimum_blockprune import architectures, constraints, gate, surgery, template
from optimum_blockprune.errors import ConfigurationError, NonFiniteError, UnsupportedModelError, VerificationError
from optimum_blockprune.gate import Expectation, apply_proven, check_mode, expect, prove_folder, prove_live
from optimum_blockprune.plan import PruningPlan
from optimum_blockprune.surgery import apply_plan
from optimum_blockprune.table import table


pytestmark = pytest.mark.usefixtures("no_pictures")

Pruned = tuple[PreTrainedModel, Expectation]
both_modes = pytest.mark.parametrize("verify", ["logits", "keys"])
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def pruned(model: PreTrainedModel, removed: tuple[int, ...] = (1,), folder: Path | None = None) -> Pruned:
    """Applies a proven plan and, if asked, saves the result."""
    plan = PruningPlan.from_blocks(model, removed)
    expected = expect(model, plan)
    apply_proven(model, plan, expected)
    if folder is not None:
        model.save_pretrained(folder)
    return model, expected


def other_model(model_type: str, **fields: Any) -> PreTrainedModel:
    """A random model of a type that is not among the families."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**TINY, **fields})).eval()


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


# What is right passes


@pytest.mark.parametrize("family", FAMILIES)
def test_right_results_pass(family: str, tmp_path: Path, ids: Tensor) -> None:
    model = tiny_model(family)
    truth = plain_logits(silenced(model, (3, 1)), ids)
    model, expected = pruned(model, (3, 1), tmp_path)
    assert torch.equal(plain_logits(model, ids), truth)
    prove_folder(tmp_path, model, expected)
    prove_folder(tmp_path, model, None, "keys")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom", "mixtral"])
def test_half_precision_passes(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, expected = pruned(tiny_model(family).to(dtype), (1,), tmp_path)
    prove_folder(tmp_path, model, expected)
    prove_folder(tmp_path, model, None, "keys")


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"assistant_early_exit": 3},
        {"prompt_lookup_num_tokens": 3},
        {"do_sample": True, "num_return_sequences": 2, "temperature": 0.5},
        {"repetition_penalty": 2.0},
        {"eos_token_id": [2, 5]},
        {"eos_token_id": None},
        {"use_cache": False},
    ],
    ids=str,
)
def test_generation_defaults_of_the_model_do_not_matter(settings: dict[str, Any]) -> None:
    model = tiny_model("llama")
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    own, before = model.generation_config, model.generation_config.to_dict()
    pruned(model, (4,))
    assert model.generation_config is own
    assert own.to_dict() == before


@pytest.mark.parametrize("verify", ["logits", "keys"])
def test_how_the_model_is_run_does_not_matter(verify: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = tiny_model("llama").train()
    model._set_gradient_checkpointing(True)
    model.config._attn_implementation = "eager"
    flags = [module.training for block in block_list(model)[2:] for module in block.modules()]
    model, expected = pruned(model, (1,), tmp_path)
    prove_folder(tmp_path, model, expected, verify)
    assert [module.training for block in block_list(model)[1:] for module in block.modules()] == flags


def test_plan_apply_returns_the_model_itself() -> None:
    model = tiny_model("llama")
    assert PruningPlan.from_blocks(model, [1]).apply(model) is model
    assert len(block_list(model)) == 4


# The expectation


def test_expectation_is_the_silenced_model_and_changes_nothing() -> None:
    model = tiny_model("gemma2").train()
    plan = PruningPlan.from_blocks(model, [1, 3])
    expected = expect(model, plan)
    assert expected.batch.input_ids.shape == (2, 12)
    assert model.training
    assert len(block_list(model)) == 5
    assert torch.equal(expected.logits, plain_logits(silenced(model.eval(), (1, 3)), expected.batch.input_ids))
    again = expect(model, plan)
    assert torch.equal(again.batch.input_ids, expected.batch.input_ids)


def test_model_with_nan_is_refused_and_the_block_is_named() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        block_list(model)[3].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="block 3"):
        PruningPlan.from_blocks(model, [1]).apply(model)
    assert len(block_list(model)) == 5
    PruningPlan.from_blocks(model, [3]).apply(model)


def test_nan_in_the_head_is_refused() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="every block's output is finite"):
        expect(model, PruningPlan.from_blocks(model, [1]))


# Damage in memory


def sabotage_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgery, "_follow_attributes", lambda *_: None)


def sabotage_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def reverse(stack: Any, plan: PruningPlan, journal: surgery.Journal) -> None:
        kept = {str(new): stack.blocks[old] for new, old in enumerate(reversed(plan.kept_blocks))}
        journal.set(stack.blocks, "_modules", kept)

    monkeypatch.setattr(surgery, "_cut_list", reverse)


def sabotage_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgery, "_cut_list", lambda *_: None)


def sabotage_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    def others(stack: Any, plan: PruningPlan, journal: surgery.Journal) -> None:
        journal.set(stack.blocks, "_modules", {str(new): stack.blocks[new] for new in range(len(plan.blocks))})

    monkeypatch.setattr(surgery, "_cut_list", others)


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        (sabotage_numbers, "KV cache"),
        (sabotage_order, "logits differ from the dense model with blocks .1. switched off"),
        (sabotage_choice, "logits differ"),
        (sabotage_count, "no list of 4 blocks"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_wrong_surgery_is_seen_and_taken_back(
    family: str,
    sabotage: Callable[[pytest.MonkeyPatch], None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    ids: Tensor,
) -> None:
    model = tiny_model(family)
    truth, config = plain_logits(model, ids), model.config.to_dict()
    plan = PruningPlan.from_blocks(model, [1])
    sabotage(monkeypatch)
    with pytest.raises((VerificationError, UnsupportedModelError), match=message):
        plan.apply(model)
    assert model.config.to_dict() == config
    assert torch.equal(plain_logits(model, ids), truth)
    monkeypatch.undo()
    plan.apply(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_two_blocks_in_one_cache_slot_are_seen(family: str, dtype: torch.dtype) -> None:
    model, expected = pruned(tiny_model(family).to(dtype))
    prove_live(model, expected)
    block_list(model)[2].self_attn.layer_idx = 1
    with pytest.raises(VerificationError, match="KV cache"):
        prove_live(model, expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, VerificationError])
def test_interrupted_proof_is_taken_back(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any) -> None:
        raise error

    model = tiny_model("gemma2")
    config = model.config.to_dict()
    monkeypatch.setattr(gate, "_prove_cache", fail)
    with pytest.raises(error):
        PruningPlan.from_blocks(model, [0]).apply(model)
    assert model.config.to_dict() == config
    assert [block.self_attn.layer_idx for block in block_list(model)] == [0, 1, 2, 3, 4]


def test_a_changed_expectation_is_not_met() -> None:
    model, expected = pruned(tiny_model("llama"))
    prove_live(model, expected)
    for logits in (expected.logits * 1.001, expected.logits[:1], torch.full_like(expected.logits, torch.nan)):
        with pytest.raises(VerificationError, match="logits differ"):
            prove_live(model, replace(expected, logits=logits))
    with pytest.raises(VerificationError, match="the model has 4 blocks, the plan keeps 3"):
        prove_live(model, replace(expected, plan=PruningPlan.from_removed("llama", 5, [1, 2])))


# Damage in the folder


def set_count(count: int) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config.update(num_hidden_layers=count)


@both_modes
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_count(3), "unexpected keys on loading: .*model.layers.3"),
        (set_count(5), "missing keys on loading: .*model.layers.4"),
        (
            lambda config: config.update(rms_norm_eps=0.5),
            "config field 'rms_norm_eps' is 0.5 after loading, not 1e-06",
        ),
        (lambda config: config.pop("block_pruning"), "config field 'block_pruning' is None"),
        (lambda config: config.update(intermediate_size=40), "mismatch"),
    ],
)
def test_wrong_config_is_seen(
    edit: Callable[[dict[str, Any]], Any], message: str, verify: str, tmp_path: Path
) -> None:
    model, expected = pruned(tiny_model("llama"), folder=tmp_path)
    edit_config(tmp_path, edit)
    with pytest.raises(VerificationError, match=message):
        prove_folder(tmp_path, model, expected, verify)


@both_modes
@pytest.mark.parametrize(
    ("family", "edit", "message"),
    [
        ("gemma2", lambda c: c["layer_types"].reverse(), "'layer_types'"),
        ("gemma2", lambda c: c["layer_types"].__setitem__(1, "full_attention"), "'layer_types'"),
        ("gemma2", lambda c: c["layer_types"].append("full_attention"), "(?s)does not load.*layer_types"),
        ("gemma3_text", lambda c: c.update(sliding_window=5), "'sliding_window' is 5 after loading, not 4"),
        ("qwen3", lambda c: c.update(max_window_layers=3), "'max_window_layers' is 3 after loading, not 1"),
        ("smollm3", lambda c: c["no_rope_layers"].__setitem__(0, 0), "'no_rope_layers'"),
        ("granite", lambda c: c.update(residual_multiplier=1.0), "'residual_multiplier'"),
    ],
)
def test_wrong_field_of_blocks_is_seen(
    family: str, edit: Callable[[dict[str, Any]], Any], message: str, verify: str, tmp_path: Path
) -> None:
    model, expected = pruned(tiny_model(family), folder=tmp_path)
    edit_config(tmp_path, edit)
    with pytest.raises(VerificationError, match=message):
        prove_folder(tmp_path, model, expected, verify)


@both_modes
@pytest.mark.parametrize(
    ("family", "attribute", "value"),
    [("gemma2", "sliding_window", 3), ("smollm3", "use_rope", 0), ("llama", "layer_idx", 2), ("llama", "mine", "x")],
)
def test_wrong_attribute_of_a_block_is_seen(
    family: str, attribute: str, value: Any, verify: str, tmp_path: Path
) -> None:
    model, expected = pruned(tiny_model(family), (3,), tmp_path)
    prove_folder(tmp_path, model, expected, verify)
    setattr(block_list(model)[0].self_attn, attribute, value)
    with pytest.raises(VerificationError, match=f"block attribute 0.self_attn.{attribute} is .* not {value!r}"):
        prove_folder(tmp_path, model, expected, verify)


def drop(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda weights: weights.pop(name)


def flip_bit(weights: dict[str, Tensor]) -> None:
    weights["model.layers.2.mlp.up_proj.weight"].view(torch.int32)[3, 5] ^= 1


def swap_blocks(weights: dict[str, Tensor]) -> None:
    for name in [name for name in weights if name.startswith("model.layers.1.")]:
        twin = name.replace(".1.", ".2.")
        weights[name], weights[twin] = weights[twin], weights[name]


NORM = "model.layers.1.input_layernorm.weight"


@both_modes
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop(NORM), f"missing keys on loading: .*{NORM}"),
        (drop("lm_head.weight"), "missing keys on loading: .*lm_head.weight"),
        (lambda weights: weights.update({"model.layers.4.extra": torch.zeros(2)}), "unexpected keys.*layers.4.extra"),
        (lambda weights: weights.update({NORM: torch.zeros(33)}), "mismatch"),
    ],
)
def test_wrong_tensors_are_seen(
    edit: Callable[[dict[str, Tensor]], Any], message: str, verify: str, tmp_path: Path
) -> None:
    model, expected = pruned(tiny_model("llama"), folder=tmp_path)
    edit_weights(tmp_path, edit)
    with pytest.raises(VerificationError, match=message):
        prove_folder(tmp_path, model, expected, verify)


@pytest.mark.parametrize(
    ("edit", "tensor"), [(flip_bit, "model.layers.2.mlp.up_proj.weight"), (swap_blocks, r"model.layers.1.*")]
)
def test_wrong_values_are_seen(edit: Callable[[dict[str, Tensor]], Any], tensor: str, tmp_path: Path) -> None:
    model, expected = pruned(tiny_model("llama"), folder=tmp_path)
    edit_weights(tmp_path, edit)
    with pytest.raises(VerificationError, match=f"tensor '{tensor}' in the file differs"):
        prove_folder(tmp_path, model, expected)
    # What "keys" cannot see, as documented: it reads no values.
    prove_folder(tmp_path, model, None, "keys")


def test_tensors_that_the_dense_checkpoint_had_too_are_allowed_by_name(tmp_path: Path) -> None:
    model, expected = pruned(tiny_model("llama"), folder=tmp_path)
    edit_weights(tmp_path, lambda weights: weights.update(legacy=torch.zeros(2), other=torch.zeros(2)))
    prove_folder(tmp_path, model, expected, extra=("legacy", "other"))
    with pytest.raises(VerificationError, match=r"unexpected keys on loading: \['other'\]"):
        prove_folder(tmp_path, model, expected, extra=("legacy",))


@both_modes
@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"junk"),
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-8]),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text("{"),
    ],
    ids=["no weights", "junk", "cut short", "no config", "broken config"],
)
def test_unreadable_files_are_seen(damage: Callable[[Path], Any], verify: str, tmp_path: Path) -> None:
    model, expected = pruned(tiny_model("llama"), folder=tmp_path)
    damage(tmp_path)
    with pytest.raises(VerificationError, match=r"does not load|it has no config\.json"):
        prove_folder(tmp_path, model, expected, verify)


# Types that are not in the table


@pytest.mark.parametrize("model_type", ["stablelm", "olmo", "gemma"])
@pytest.mark.usefixtures("nothing_proven")
def test_unknown_type_needs_logits(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(gate.logger, "warning", said.append)
    model, expected = pruned(other_model(model_type), (3, 1), tmp_path)
    assert len(said) == 1
    assert f"'{model_type}' is not in the architecture table" in said[0]
    prove_folder(tmp_path, model, expected)
    for verify in ("keys", "off"):
        with pytest.raises(UnsupportedModelError, match=f"'{model_type}'.*verify='logits' instead of '{verify}'"):
            prove_folder(tmp_path, model, expected, verify)


def test_families_pass_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate.logger, "warning", lambda message: pytest.fail(message))
    pruned(tiny_model("llama"))


@pytest.mark.parametrize(
    ("model_type", "row", "fields"),
    [
        ("gpt2", "scale_attn_by_inverse_layer_idx", {"scale_attn_by_inverse_layer_idx": True}),
        ("diffllama", "diffllama", {"num_key_value_heads": 2}),
        ("minicpm3", "scale_depth", {"scale_depth": 1.4}),
    ],
)
def test_the_gate_catches_what_the_table_forgets(
    model_type: str, row: str, fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model in memory is what a checkpoint of it loads as, so that it is wrong before any file is written."""
    whole = table()
    without = replace(
        whole,
        fields={name: rule for name, rule in whole.fields.items() if name != row},
        constraints=tuple(each for each in whole.constraints if row not in (each.field, *each.model_types)),
    )
    assert without != whole
    for module in (architectures, constraints, gate, template):
        monkeypatch.setattr(module, "table", lambda: without)
    model = tiny_model("gpt2", **fields) if model_type == "gpt2" else other_model(model_type, **fields)
    before = model.config.to_dict()
    with pytest.raises(VerificationError, match="logits differ from the dense model with blocks .1. switched off"):
        pruned(model, (1,), tmp_path)
    assert model.config.to_dict() == before
    assert not list(tmp_path.iterdir())


# Modes


def test_modes() -> None:
    for mode in ("logits", "keys", "off"):
        check_mode(mode)
    with pytest.raises(ConfigurationError, match=r"Unknown verify='logit'. Did you mean 'logits'"):
        check_mode("logit")


def test_off_reads_nothing(tmp_path: Path) -> None:
    model, expected = pruned(tiny_model("llama"))
    prove_folder(tmp_path / "nowhere", model, expected, "off")
    with pytest.raises(ConfigurationError, match="verify='none'"):
        prove_folder(tmp_path / "nowhere", model, expected, "none")


def test_keys_builds_on_the_meta_device(tmp_path: Path) -> None:
    model, _ = pruned(tiny_model("llama"), folder=tmp_path)
    reloaded = gate.reload(tmp_path, model, "meta")
    assert {parameter.device.type for parameter in reloaded.parameters()} == {"meta"}


def test_too_little_memory_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected = pruned(tiny_model("llama"), folder=tmp_path)

    def exhausted(*_args: Any, **_kwargs: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(type(model), "from_pretrained", exhausted)
    with pytest.raises(VerificationError, match="use verify='keys'"):
        prove_folder(tmp_path, model, expected)


# Weights that lie elsewhere


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_offloaded_model_is_proved(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    devices = {f"model.layers.{block}": "disk" if block % 2 else "cpu" for block in range(5)}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", device_map={**devices, **rest}, offload_folder=tmp_path / "offload"
    )
    model, expected = pruned(model, (2, 1), tmp_path / "pruned")
    prove_folder(tmp_path / "pruned", model, expected)
    prove_folder(tmp_path / "pruned", model, expected, "keys")
    edit_weights(tmp_path / "pruned", lambda weights: weights["model.layers.1.mlp.up_proj.weight"].mul_(1.5))
    with pytest.raises(VerificationError, match="logits differ"):
        prove_folder(tmp_path / "pruned", model, expected)


def test_plain_surgery_is_what_is_proved() -> None:
    """`apply_plan` alone gives the model that `apply_proven` accepts."""
    model = tiny_model("qwen3")
    plan = PruningPlan.from_blocks(model, [1])
    expected = expect(model, plan)
    apply_plan(model, plan)
    prove_live(model, expected)


def test_a_model_with_few_positions_is_probed_within_them(tmp_path: Path) -> None:
    pruner_model = tiny_model("gpt2", 4, n_positions=10)
    plan = PruningPlan.from_blocks(pruner_model, [1])
    expected = gate.expect(pruner_model, plan)
    assert expected.batch.input_ids.shape == (2, 4)
    gate.apply_proven(pruner_model, plan, expected)
    pruner_model.save_pretrained(tmp_path)
    gate.prove_folder(tmp_path, pruner_model, expected)


def test_one_wrong_position_is_seen_in_half_precision_too() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    plan = PruningPlan.from_blocks(model, [1])
    expected = expect(model, plan)
    expected.logits[0, -1] += expected.logits.abs().max()
    with pytest.raises(VerificationError, match="logits differ"):
        apply_proven(model, plan, expected)


def test_a_table_that_is_not_saved_must_come_back(tmp_path: Path) -> None:
    model = tiny_model("llama")
    plan = PruningPlan.from_blocks(model, [1])
    expected = expect(model, plan)
    apply_proven(model, plan, expected)
    model.save_pretrained(tmp_path)
    model.model.rotary_emb.inv_freq[-1] *= 1.0001  # too little for the logits
    with pytest.raises(VerificationError, match="inv_freq"):
        prove_folder(tmp_path, model, expected)
