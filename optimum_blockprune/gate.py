# SPDX-License-Identifier: Apache-2.0
"""The gate: proves that a pruned model equals the dense one with the same blocks switched off.

`expect` asks the dense model for the truth *before* the surgery. `prove_live` holds the pruned model in memory to it,
`prove_folder` the saved checkpoint after stock classes loaded it again:

1. keys: nothing missing, unexpected or mismatched, and the block count is what the plan says;
2. configuration: every per-block field has the planned value after loading, nothing was recomputed;
3. traits: every plain attribute of every reloaded block (window, scale, number, ...) equals the live block's;
4. weights: every reloaded tensor, tables that are not saved included, equals the live one, bit for bit;
5. logits (of a model without a head: hidden states): equal to the expectation;
6. cache: logits of a cached generation equal those of one uncached pass over the same tokens, where the dense model
   generates with a cache.

`verify="keys"` does 1 to 3 on the meta device, for models too large to hold twice. Only 5 can accept an architecture
that is not in the table.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from optimum.utils import logging
from transformers import PretrainedConfig, PreTrainedModel

from .architectures import layout_for
from .blocks import find_blocks
from .caching import cache_error, relative_error
from .errors import ConfigurationError, UnsupportedModelError, VerificationError, nearest
from .expectation import Expectation, expect, is_half, tolerance
from .loading import load_model
from .per_layer import as_plain, narrowed_class
from .plan import PruningPlan
from .runner import BlockRunner
from .skeleton import load_skeleton
from .streaming import source_of
from .surgery import Journal, apply_plan, block_traits
from .table import table


logger = logging.get_logger("optimum.blockprune.gate")

VERIFY_MODES = ("logits", "keys", "off")


def check_mode(verify: str) -> None:
    """Raises `ConfigurationError` for an unknown `verify`."""
    if verify not in VERIFY_MODES:
        raise ConfigurationError(f"Unknown verify={verify!r}.{nearest(str(verify), VERIFY_MODES)}")


def apply_proven(model: PreTrainedModel, plan: PruningPlan, expected: Expectation | None = None) -> Journal:
    """Applies the plan in place and proves the live result; puts the model back as it was if it fails.

    Returns:
        The journal that takes the surgery back.
    """
    expected = expected or expect(model, plan)
    layout = layout_for(model, plan.stack)
    journal = apply_plan(model, plan)
    try:
        prove_live(model, expected)
    except BaseException:
        journal.rollback()
        raise
    if not layout.proven:
        logger.warning(
            f"{layout.subject} is not in the architecture table; it was accepted because the pruned "
            "model in memory equals the dense one with these blocks switched off. Saving proves the files as well."
        )
    return journal


def prove_live(model: PreTrainedModel, expected: Expectation, *, typical: bool = False) -> None:
    """Raises `VerificationError` unless the pruned model in memory meets the expectation, cached and uncached.

    Args:
        model: The pruned model.
        expected: What the dense model computed.
        typical: Whether the median position counts instead of the worst one; see `is_half`.
    """
    plan = expected.plan
    blocks = len(find_blocks(model, plan.stack))
    _require(blocks == len(plan.blocks), f"the model has {blocks} blocks, the plan keeps {len(plan.blocks)}")
    _prove_logits(model, expected, typical=typical)
    if expected.caches:
        _prove_cache(model, expected)


def prove_folder(
    folder: str | Path,
    model: PreTrainedModel,
    expected: Expectation | None,
    verify: str = "logits",
    *,
    plan: PruningPlan | None = None,
    extra: Collection[str] = (),
) -> None:
    """Raises `VerificationError` unless the checkpoint in `folder`, loaded by stock classes, is the live `model`.

    Args:
        folder: The saved checkpoint.
        model: The pruned model it was saved from, or its like on the meta device.
        expected: From `expect`, made before the surgery; only `verify="logits"` needs it.
        verify: `"logits"`, `"keys"` or `"off"`.
        plan: What was pruned; by default that of `expected`.
        extra: Tensors that may be in the folder although the class does not know them: the dense one had them, too.

    Raises:
        UnsupportedModelError: `verify` is weaker than `"logits"` and the architecture is not in the table.
    """
    check_mode(verify)
    require_proof(model, verify)
    if verify == "off":
        return
    plan = plan or (expected.plan if expected is not None else None)
    streams = verify == "logits" and source_of(model) is not None
    device = torch.device("meta") if verify == "keys" or streams else _reload_device(model)
    reloaded = reload(folder, model, device, plan=plan, extra=extra)
    _prove_fields(reloaded, model)
    _prove_traits(reloaded, model, None if plan is None else plan.stack)
    if verify == "logits":
        if streams:  # the keys were proved on empty tensors: streaming looks for those only that it needs
            place = {"device_map": BlockRunner(model).device, "attn_implementation": _attention_of(model.config)}
            reloaded = load_model(folder, stream=True, dtype=model.dtype, local_files_only=True, **place)
        _prove_weights(reloaded, model)
        # Other memory, other kernels: its weights, buffers and attributes are the live model's bit for bit by now.
        prove_live(reloaded, expected, typical=is_half(model))


def require_proof(model_or_config: Any, verify: str) -> None:
    """Raises where a weaker check than logits cannot tell whether this architecture is right."""
    layout = layout_for(model_or_config)
    if verify != "logits" and not layout.proven:
        raise UnsupportedModelError(
            f"{layout.subject} is not in the architecture table, so only comparing logits can prove "
            f"the result: use verify='logits' instead of {verify!r}."
        )


def reload(
    folder: str | Path,
    model: PreTrainedModel,
    device: torch.device | str,
    *,
    plan: PruningPlan | None = None,
    extra: Collection[str] = (),
) -> PreTrainedModel:
    """Loads `folder` with the model's own class; refuses anything but a perfect match of the keys, but for `extra`."""
    # Without it, transformers builds a model of the class's default size.
    _require((Path(folder) / "config.json").is_file(), "it has no config.json")
    # A model class from a repository's own code is passed to from_pretrained as it is: nothing is executed anew.
    kind = type(model)
    if plan is not None and not plan.width.loads_anywhere:
        kind = narrowed_class(kind, plan)
    settings = {"dtype": model.dtype, "attn_implementation": _attention_of(model.config)}
    try:
        if torch.device(device).type == "meta":
            config = kind.config_class.from_pretrained(folder, local_files_only=True)
            reloaded, info = load_skeleton(kind, folder, config, **settings)
        else:
            settings |= {"device_map": {"": device}, "output_loading_info": True, "local_files_only": True}
            reloaded, info = kind.from_pretrained(folder, **settings)
    except torch.OutOfMemoryError as error:
        raise VerificationError("No room to load the result beside the model: use verify='keys'.") from error
    except Exception as error:  # transformers, safetensors and huggingface_hub have no common base class
        raise VerificationError(f"The pruned checkpoint does not load: {error}") from error
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs", "conversion_errors"):
        problems = set(map(str, info.get(fault) or ()))
        if fault == "unexpected_keys":
            problems -= set(extra)
        _require(not problems, f"{fault.replace('_', ' ')} on loading: {sorted(problems)[:5]}")
    return as_plain(reloaded, type(model)).eval()


def _attention_of(config: PretrainedConfig) -> str | dict[str, str]:
    """The attention implementation, of each part where a model has several: not every tower has them all."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    each = {name: part._attn_implementation for name, part in parts.items() if isinstance(part, PretrainedConfig)}
    return {"": config._attn_implementation, **each} if each else config._attn_implementation


def _reload_device(model: PreTrainedModel) -> torch.device:
    """The model's own device if it has one; the CPU, whose weights can stay in the file, if it is spread out."""
    devices = {parameter.device for parameter in model.parameters()}
    return devices.pop() if len(devices) == 1 and torch.device("meta") not in devices else torch.device("cpu")


def _prove_fields(reloaded: PreTrainedModel, model: PreTrainedModel) -> None:
    """The configuration must come back as it was written.

    Some classes change a field on every load, pruned or not (MPT, Moshi); that is accepted, except in fields that
    follow the blocks.
    """
    written, read = model.config.to_dict(), reloaded.config.to_dict()
    unpruned = _comparable(type(model.config).from_dict(copy.deepcopy(written)).to_dict())
    written, read = _comparable(written), _comparable(read)
    for name, value in written.items():
        changes_anyway = name not in table().fields and read.get(name) == unpruned.get(name)
        same = read.get(name) == value or changes_anyway
        _require(same, f"config field '{name}' is {read.get(name)!r} after loading, not {value!r}")


def _comparable(fields: Any) -> Any:
    """A configuration without what saving and loading set by themselves, in nested ones too.

    `model_type` is among it: where two types share a class, as Llama and InternLM3, it loads as the first.
    """
    if not isinstance(fields, dict):
        return fields
    own = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "model_type")
    return {name: _comparable(value) for name, value in fields.items() if name not in own}


def _prove_traits(reloaded: PreTrainedModel, model: PreTrainedModel, stack: str | None) -> None:
    live, read = (dict(block_traits(find_blocks(each, stack).blocks)) for each in (model, reloaded))
    for name, value in live.items():
        _require(
            name in read and (read[name] == value or value != value),
            f"block attribute {name} is {read.get(name, 'absent')!r} after loading, not {value!r}",
        )


def _prove_weights(reloaded: PreTrainedModel, model: PreTrainedModel) -> None:
    stored = model.state_dict()
    live, read = ({**each.state_dict(), **dict(each.named_buffers())} for each in (model, reloaded))
    for name, tensor in read.items():
        if name not in stored and name in live and live[name].shape != tensor.shape:
            continue  # a table that grows with the inputs
        # Offloaded weights lie on meta in the live model; the logits speak for those.
        if name in live and live[name].device.type != "meta":
            # In its dtype: a model that was cast as a whole has rounded tables, which loading computes anew.
            same = torch.equal(tensor.to(live[name].device, live[name].dtype), live[name])
            _require(same, f"tensor '{name}' in the file differs from the model's")


def _prove_logits(model: PreTrainedModel, expected: Expectation, *, typical: bool) -> None:
    try:
        logits = BlockRunner(model, expected.plan.stack).logits(expected.batch).float().cpu()
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as failure:
        reason = " ".join(str(failure).split())
        raise VerificationError(f"The pruned result failed the gate: its forward fails: {reason}.") from failure
    error = relative_error(logits, expected.logits, typical=typical)
    _require(
        error <= tolerance(model),
        f"logits differ from {expected.of or _silenced(expected.plan)} by {error:.2g} of the largest logit",
    )


def _silenced(plan: PruningPlan) -> str:
    return f"the dense model with blocks [{', '.join(plan.removed_names)}] switched off"


def _prove_cache(model: PreTrainedModel, expected: Expectation) -> None:
    try:
        error = cache_error(model, expected.batch, expected.plan.stack, typical=is_half(model))
    except (IndexError, RuntimeError, ValueError) as failure:
        raise VerificationError(f"The pruned model does not generate with a KV cache: {failure}") from failure
    _require(
        error <= tolerance(model),
        f"generation with a KV cache differs from generation without one by {error:.2g} of the largest logit",
    )


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise VerificationError(f"The pruned result failed the gate: {problem}. Nothing was kept of it.")
