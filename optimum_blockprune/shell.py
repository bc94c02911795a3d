# SPDX-License-Identifier: Apache-2.0
"""What the commands of `optimum-cli blockprune` do: a thin skin over the Python API.

Results go to stdout, as text or with `--json` as one JSON object; logs and progress bars go to stderr.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from optimum.utils import logging
from transformers import GenerationConfig

from .checking import Check, check_config
from .commands import given_fields, model_arguments
from .config import BlockPruningConfig
from .errors import ConfigurationError, OutputError
from .evaluation import EvaluationSpec
from .loading import load_model, read_config, split_gguf
from .plan import PruningPlan
from .pruner import BlockPruner
from .registry import available_strategies
from .saving import check_output
from .widths import spelled


# Fields that matter to `run --blocks ... --eval-dataset D`, where nothing is searched.
_EVALUATION_FIELDS = ("batch_size", "dataset_text_field", "seqlen", "use_chat_template")


def run(args: Namespace) -> None:
    """Chooses blocks (or takes those of `--blocks`), prunes, proves and saves."""
    _show_progress()
    _refuse_search_flags(args)
    check_output(args.output, overwrite=args.overwrite)
    pruner = _pruner(args, _config(args))
    stack = getattr(args, "stack", None)
    plan = PruningPlan.from_blocks(pruner.model, args.blocks, stack=stack) if args.blocks else None
    pruner.check_save(args.output, plan=plan, overwrite=args.overwrite, verify=args.verify)
    held_out = args.eval_dataset
    if held_out is not None:
        pruner.evaluate(held_out)
    pruner.prune(plan=plan)
    if held_out is not None:
        pruner.evaluate(held_out)
    pruner.save_pretrained(args.output, overwrite=args.overwrite, verify=args.verify)
    _print(args, {"output": args.output, **pruner.report.to_dict()}, _summary(pruner, args.output))


def plan(args: Namespace) -> None:
    """Chooses blocks and writes the plan."""
    _show_progress()
    config = _config(args)
    with _writing(args.output), TemporaryFile(dir=Path(args.output).absolute().parent):
        pass
    made = _pruner(args, config).make_plan()
    with _writing(args.output):
        path = made.save(args.output)
    text = f"{path}: {made.strategy} removes {_removed(made)}"
    _print(args, {"output": str(path), **made.to_dict()}, text)


def apply(args: Namespace) -> None:
    """Applies a plan to files."""
    _show_progress()
    source, loading = split_gguf(args.model, model_arguments(args))
    if "gguf_file" in loading:
        raise ConfigurationError("apply rewrites safetensors; prune a GGUF file with: run --blocks I,J,...")
    for name in ("dtype", "device_map", "tokenizer"):
        if name in loading or (name == "tokenizer" and args.tokenizer is not None):
            raise ConfigurationError(f"apply copies the files as they are; --{name.replace('_', '-')} has no effect.")
    chosen = PruningPlan.from_file(args.plan)
    path = chosen.apply_to_checkpoint(source, args.output, overwrite=args.overwrite, verify=args.verify, **loading)
    gone = [_listed(chosen.removed_blocks), *_narrowed(chosen)] if chosen.removed_blocks else _narrowed(chosen)
    text = f"{path}: {len(chosen.blocks)} of {chosen.num_blocks} blocks, without {' and '.join(gone) or 'nothing'}"
    _print(args, {"output": str(path), "removed_blocks": list(chosen.removed_blocks)}, text)


def evaluate(args: Namespace) -> None:
    """Measures one model, or two side by side."""
    _show_progress()
    if args.kl and args.baseline is None:
        raise ConfigurationError("--kl compares with another model: give --baseline MODEL.")
    fields = {"dataset": None, **given_fields(args)}
    names = [("model", args.model)] if args.baseline is None else [("baseline", args.baseline), ("model", args.model)]
    results: dict[str, Any] = {}
    for label, name in names:
        # One model at a time, unless KL needs both.
        baseline = load_model(args.baseline, **model_arguments(args)) if args.kl and label == "model" else None
        results[label] = _measure(args, name, fields, baseline)
    _print(args, results, _table(results))


def check(args: Namespace) -> None:
    """Says from the configuration alone what can be removed."""
    loading = model_arguments(args)
    config = read_config(args.model, **loading)
    checks = check_config(
        config,
        stack=getattr(args, "stack", None),
        removed=args.blocks,
        remote_code=loading.get("trust_remote_code", False),
    )
    _print(args, {"checks": [each.to_dict() for each in checks]}, "\n\n".join(map(_described, checks)))


def _described(check: Check) -> str:
    named = f"{check.model_type} ({check.class_name})" if check.class_name else check.model_type
    head = f"{named}, {check.stack} of {check.num_blocks} blocks" if check.num_blocks else named
    lines = [head, *(f"  {unit:<12} {answer}" for unit, answer in check.units.items())]
    if check.prunable:
        how = "proven by the test suite" if check.evidence == "proven" else "accepted if the result passes the gate"
        lines.append(f"  {'evidence':<12} {how}")
    if check.search not in (None, "yes"):
        lines.append(f"  {'search':<12} no: {check.search}")
        lines.append(f"  {'alone':<12} {_ranges(check.removable)}")
    reasons: dict[str, list[int]] = {}
    for block, reason in check.protected.items():
        reasons.setdefault(reason, []).append(block)
    lines += [f"  {'stay':<12} {_ranges(blocks)}: {reason}" for reason, blocks in reasons.items()]
    if check.cache is not None:
        lines.append(f"  {'cache':<12} not compared: {check.cache}")
    lines += [f"  {'sets':<12} {name} = {value}" for name, value in check.changes.items()]
    for runtime, verdict in check.runtimes.items():
        lines.append(f"  {runtime:<12} {verdict['verdict']}: {verdict['reason']}")
        if "same_without" in verdict and verdict["verdict"] == "same":
            some = _ranges(verdict["same_without"]) or "no single block"
            every = set(check.removable) <= set(verdict["same_without"])
            lines.append(f"  {'':<12} and without {'any one of the others' if every else 'one of ' + some}")
    return "\n".join(lines)


def _ranges(blocks: Iterable[int]) -> str:
    """Spells ascending numbers as `0-2, 7`."""
    return spelled(blocks).replace(",", ", ")


def strategies(args: Namespace) -> None:
    """Lists what is installed."""
    found = available_strategies()
    lines = [
        f"{name:<20} {info.summary if info.available else 'unavailable: ' + str(info.error)} "
        f"[{info.distribution} {info.version}]"
        for name, info in found.items()
    ]
    _print(args, {name: vars(info) for name, info in found.items()}, "\n".join(lines))


def _config(args: Namespace) -> BlockPruningConfig:
    given = given_fields(args)
    if args.config is None:
        return BlockPruningConfig(**given)
    return BlockPruningConfig.from_pretrained(args.config, **given)


def _pruner(args: Namespace, config: BlockPruningConfig) -> BlockPruner:
    return BlockPruner.from_pretrained(args.model, config, args.tokenizer, **model_arguments(args))


def _refuse_search_flags(args: Namespace) -> None:
    """An option that would be ignored is an error."""
    used = ("stack", *(_EVALUATION_FIELDS if args.eval_dataset is not None else ()))
    given = [name for name in sorted(given_fields(args)) if name not in used] + (["config"] if args.config else [])
    if args.blocks and given:
        raise ConfigurationError(f"--blocks names the blocks itself; {', '.join(given)} would have no effect.")


@contextmanager
def _writing(path: str) -> Iterator[None]:
    """Explains why a plan cannot be written."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"The plan cannot be written to '{path}': {error}.") from error


def _measure(args: Namespace, name: str, fields: dict[str, Any], baseline: Any) -> dict[str, Any]:
    config = BlockPruningConfig(**fields)
    spec = EvaluationSpec(stride=args.stride, batch_size=config.batch_size)
    pruner = BlockPruner.from_pretrained(name, config, args.tokenizer, **model_arguments(args))
    samples = fields.get("num_samples")
    result = pruner.evaluate(config.dataset, spec=spec, num_samples=samples, baseline=baseline, label=name)
    if args.prompt is not None:
        result["prompt"], result["text"] = args.prompt, _continuation(pruner, args.prompt)
    return result


def _continuation(pruner: BlockPruner, prompt: str) -> str:
    if not pruner.model.can_generate():
        raise ConfigurationError(f"--prompt: {type(pruner.model).__name__} does not generate text.")
    if pruner.tokenizer is None:
        raise ConfigurationError("--prompt needs a tokenizer: give --tokenizer MODEL.")
    ids = pruner.tokenizer(prompt, return_tensors="pt").input_ids.to(pruner.model.device)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=32, pad_token_id=pruner.tokenizer.pad_token_id or 0)
    output = pruner.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
    return pruner.tokenizer.decode(output[0], skip_special_tokens=True)


def _summary(pruner: BlockPruner, output: str) -> str:
    achieved = pruner.report.achieved
    lines = [
        f"{output}: {achieved['blocks_after']} of {achieved['blocks_before']} blocks, "
        f"{achieved['parameters_after']:,} of {achieved['parameters_before']:,} parameters",
    ]
    if pruner.plan.width:
        lines.append(f"removed by {pruner.plan.strategy}: {_removed(pruner.plan)}")
    else:
        lines.append(f"removed by {pruner.plan.strategy}, in this order: {_listed(pruner.plan.removed_blocks)}")
    lines += [
        f"perplexity of the {entry['label']} model on {entry['source']}: {entry['perplexity']:.2f} "
        f"({entry['tokens']:,} tokens)"
        for entry in pruner.report.evaluations
    ]
    return "\n".join(lines)


_ROWS = (
    ("blocks", "blocks", "{:,}"),
    ("parameters", "parameters", "{:,}"),
    ("size_bytes", "weights (MB)", "{:,.1f}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("tokens", "scored tokens", "{:,}"),
    ("kl", "KL to baseline (nats/token)", "{:.4f}"),
    ("prefill_tokens_per_second", "prefill tokens/s", "{:.1f}"),
    ("decode_tokens_per_second", "decode tokens/s", "{:.1f}"),
    ("text", "continuation", "{!r}"),
)


def _table(results: dict[str, dict[str, Any]]) -> str:
    """One row per figure, one column per model; figures that were not measured have no row."""
    lines = [" ".join([f"{'':<28}", *(f"{label:>24}" for label in results)])]
    for key, title, form in _ROWS:
        if any(key in result for result in results.values()):
            cells = [_cell(key, result, form) for result in results.values()]
            lines.append(" ".join([f"{title:<28}", *(f"{cell:>24}" for cell in cells)]))
    return "\n".join(lines)


def _cell(key: str, result: dict[str, Any], form: str) -> str:
    if key not in result:
        return "-"
    return form.format(result[key] / 1e6 if key == "size_bytes" else result[key])


def _listed(blocks: tuple[int, ...]) -> str:
    return ", ".join(map(str, blocks)) if blocks else "nothing"


def _removed(plan: PruningPlan) -> str:
    """What a plan removes, in one line."""
    parts = [f"{_listed(plan.removed_blocks)} of {plan.num_blocks} blocks"] if plan.removed_blocks else []
    return " and ".join([*parts, *_narrowed(plan)]) or "nothing"


def _narrowed(plan: PruningPlan) -> list[str]:
    return [
        f"{counts['before'] - counts['after']:,} of {counts['before']:,} {_FAMILIES[family]}"
        for family, counts in plan.width.totals().items()
    ]


_FAMILIES = {"mlp": "MLP channels", "attention": "KV groups or heads"}


def _show_progress() -> None:
    """The command line shows what the library only logs; the handler writes to stderr."""
    logging.set_verbosity_info()


def _print(args: Namespace, result: dict[str, Any], text: str) -> None:
    sys.stdout.write((json.dumps(result, indent=2) if args.json else text) + "\n")
