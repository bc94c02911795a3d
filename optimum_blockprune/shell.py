# SPDX-License-Identifier: Apache-2.0
"""What the commands of `optimum-cli blockprune` do: a thin skin over the Python API.

Results go to stdout, as text or with `--json` as one JSON object; logs and progress bars go to stderr.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from transformers import GenerationConfig

from .asked import num_to_remove, refuse_named_depths, removes
from .checking import check_config
from .config import BlockPruningConfig
from .errors import ConfigurationError
from .evaluation import EvaluationSpec, size_of
from .flags import given_fields, model_arguments
from .half import read_units, sorted_halves
from .hub import push_folder
from .loading import load_model, read_config, split_gguf
from .page import PAGE_FILE, write_page
from .pictures import PICTURES, draw_pictures, require
from .plan import PLAN_FILE, PruningPlan
from .pruner import BlockPruner
from .recipe import BUDGET_FIELDS
from .records import update_records
from .registry import available_strategies
from .report import PruningReport
from .resuming import Resumption, resumption
from .saving import check_output
from .shell_heal import heal  # noqa: F401
from .shell_mix import mix  # noqa: F401
from .shell_parts import load_pruner, print_result, show_progress, writing
from .shell_text import depth_table, described, listed, narrowed, removed, summary, table
from .team import Team


# Fields that matter to `run --blocks ... --eval-dataset D`, where nothing is searched.
_EVALUATION_FIELDS = ("batch_size", "dataset_text_field", "seqlen", "use_chat_template")


def run(args: Namespace) -> None:
    """Chooses blocks (or takes those of `--blocks`), prunes, proves and saves."""
    show_progress()
    _refuse_search_flags(args)
    Team.current().by_first(lambda: check_output(args.output, overwrite=args.overwrite))
    pruner = load_pruner(args, _config(args))
    _refuse_depths(args, pruner)
    stack = getattr(args, "stack", None)
    plan = PruningPlan.from_blocks(pruner.model, args.blocks, stack=stack) if args.blocks else None
    pruner.check_save(args.output, plan=plan, overwrite=args.overwrite, verify=args.verify)
    with resumption(args.resume_dir, args.output) as kept:
        _carry_out(args, pruner, plan, kept)


def _carry_out(args: Namespace, pruner: BlockPruner, plan: PruningPlan | None, kept: Resumption) -> None:
    """The work of `run`, once nothing speaks against it."""
    deep = bool(args.export or args.curve)
    team = Team.current()
    team.by_first(lambda: _measure_now(args, pruner, text=not deep))
    if deep:
        plan = pruner.plan = plan or pruner.make_plan(resume_dir=kept)
    if args.export:
        _export(args, pruner)
        return
    if args.curve:
        team.by_first(lambda: _measure_curve(args, pruner))
    pruner.prune(plan=plan, resume_dir=kept)
    team.by_first(lambda: _measure_now(args, pruner, text=not deep))
    pruner.save_pretrained(args.output, overwrite=args.overwrite, verify=args.verify)
    text = summary(pruner.report, pruner.plan, args.output)
    print_result(args, {"output": args.output, **pruner.report.to_dict()}, text)


def _measure_now(args: Namespace, pruner: BlockPruner, *, text: bool) -> None:
    """Measures the model as it is now, dense or pruned, as far as that was asked for."""
    if args.tasks:
        pruner.evaluate_tasks(args.tasks, limit=args.limit, num_fewshot=args.num_fewshot)
    if text and args.eval_dataset is not None:
        pruner.evaluate(args.eval_dataset, num_samples=args.eval_samples)


def _measure_curve(args: Namespace, pruner: BlockPruner) -> None:
    """Measures every depth; its two ends are what the model is before and after."""
    depths = pruner.measure_depths(args.eval_dataset, num_samples=args.eval_samples)
    pruner.report.evaluations += [{"label": "dense", **depths[0]}, {"label": "pruned", **depths[-1]}]


def _export(args: Namespace, pruner: BlockPruner) -> None:
    folders = pruner.export(
        args.output,
        args.export,
        dataset=args.eval_dataset,
        num_samples=args.eval_samples,
        every_depth=args.curve,
        overwrite=args.overwrite,
        verify=args.verify,
    )
    result = {
        "output": args.output,
        "folders": {str(count): str(folder) for count, folder in folders.items()},
        "depths": pruner.report.depths,
    }
    head = "\n".join(
        f"{folder}: {listed(pruner.plan.truncate(n).removed_names)} removed" for n, folder in folders.items()
    )
    print_result(args, result, f"{head}\n{depth_table(pruner.report.depths)}")


def _refuse_depths(args: Namespace, pruner: BlockPruner) -> None:
    """What `--export` and `--curve` cannot do, said before anything is measured or searched."""
    if not (args.export or args.curve):
        return
    if args.curve and args.eval_dataset is None:
        raise ConfigurationError("--curve measures the model at every depth: give --eval-dataset DATASET.")
    if args.tasks and args.export:
        raise ConfigurationError("--tasks scores one result: use it without --export, or `evaluate` on the folders.")
    recipe = pruner.config.recipe
    if recipe.compensation != "none":
        raise ConfigurationError(
            f"--compensation {recipe.compensation} is fitted to one depth: leave out --export and --curve, and run "
            "once for each depth."
        )
    if args.blocks is None and removes(recipe) == "width":
        raise ConfigurationError(
            f"Strategy '{recipe.strategy}' removes channels and heads, which have no depths: leave out --export and "
            "--curve."
        )
    if args.export and not args.blocks:
        refuse_named_depths(recipe)
    most = len(sorted_halves(read_units(args.blocks))) // 2 if args.blocks else num_to_remove(pruner.model, recipe)
    wrong = [count for count in args.export or () if not 0 < count <= most]
    if wrong:
        raise ConfigurationError(
            f"--export {wrong[0]}: the search removes {most} blocks, so that any number from 1 to {most} can be "
            "exported. Raise the budget."
        )


def plan(args: Namespace) -> None:
    """Chooses blocks and writes the plan."""
    show_progress()
    config = _config(args)
    with writing(args.output), TemporaryFile(dir=Path(args.output).absolute().parent):
        pass
    pruner = load_pruner(args, config)
    with resumption(args.resume_dir, args.output) as kept:
        made = pruner.make_plan(resume_dir=kept)
        Team.current().by_first(lambda: _save_plan(args, made))


def _save_plan(args: Namespace, made: PruningPlan) -> None:
    with writing(args.output):
        path = made.save(args.output)
    text = f"{path}: {made.strategy} removes {removed(made)}"
    print_result(args, {"output": str(path), **made.to_dict()}, text)


def apply(args: Namespace) -> None:
    """Applies a plan to files."""
    show_progress()
    source, loading = split_gguf(args.model, model_arguments(args))
    if "gguf_file" in loading:
        raise ConfigurationError("apply rewrites safetensors; prune a GGUF file with: run --blocks I,J,...")
    for name in ("dtype", "device_map", "stream", "tokenizer"):
        if name in loading or (name == "tokenizer" and args.tokenizer is not None):
            raise ConfigurationError(f"apply copies the files as they are; --{name.replace('_', '-')} has no effect.")
    chosen = PruningPlan.from_file(args.plan)
    path = chosen.apply_to_checkpoint(source, args.output, overwrite=args.overwrite, verify=args.verify, **loading)
    gone = [listed(chosen.removed_names), *narrowed(chosen)] if chosen.num_removed else narrowed(chosen)
    text = f"{path}: {len(chosen.blocks)} of {chosen.num_blocks} blocks, without {' and '.join(gone) or 'nothing'}"
    print_result(args, {"output": str(path), "removed_blocks": list(chosen.removed_blocks)}, text)


def evaluate(args: Namespace) -> None:
    """Measures one model, or two side by side."""
    show_progress()
    _refuse_task_flags(args)
    if args.kl and args.baseline is None:
        raise ConfigurationError("--kl compares with another model: give --baseline MODEL.")
    fields = {"dataset": None, **given_fields(args)}
    unused = [name for name in ("kl", "stride") if getattr(args, name)] if args.tasks else []
    if unused and fields["dataset"] is None:
        raise ConfigurationError(f"--{unused[0]} is measured on text: give --dataset DATASET besides --tasks.")
    if args.write_report:
        PruningReport.from_file(args.model)  # there must be one
    names = [("model", args.model)] if args.baseline is None else [("baseline", args.baseline), ("model", args.model)]
    results: dict[str, Any] = {}
    for label, name in names:
        # One model at a time, unless KL needs both.
        baseline = load_model(args.baseline, **model_arguments(args)) if args.kl and label == "model" else None
        results[label] = _measure(args, name, fields, baseline)
    if args.write_report:
        update_records(Path(args.model), lambda report: _add_results(report, results))
    print_result(args, results, table(results))


def _add_results(report: PruningReport, results: dict[str, dict[str, Any]]) -> None:
    """Puts what was measured into a report, in place of what was measured alike before."""
    for role, result in results.items():
        label = {"baseline": "dense", "model": "pruned"}[role]
        tasks = [{**each, "label": label} for each in result.get("tasks", ())]
        report.task_results = _replaced(report.task_results, tasks, ("label", "task", "source", "num_fewshot"))
        if "perplexity" in result:
            kept = {name: value for name, value in result.items() if name not in ("tasks", "prompt", "text")}
            same = ("label", "source", "fingerprint", "stride")
            report.evaluations = _replaced(report.evaluations, [{**kept, "label": label}], same)


def _replaced(old: list[dict[str, Any]], new: list[dict[str, Any]], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Entries that agree in `names` with a new one make room for it."""
    keys = [[entry.get(name) for name in names] for entry in new]
    return [entry for entry in old if [entry.get(name) for name in names] not in keys] + new


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
    print_result(args, {"checks": [each.to_dict() for each in checks]}, "\n\n".join(map(described, checks)))


def push(args: Namespace) -> None:
    """Uploads a folder."""
    show_progress()
    names = ("private", "token", "revision", "create_pr", "commit_message", "commit_description", "overwrite")
    commit = push_folder(args.folder, args.repo_id, **{name: getattr(args, name) for name in names})
    result = {"repo_id": args.repo_id, "commit_url": commit.commit_url, "commit": commit.oid, "pr_url": commit.pr_url}
    print_result(args, result, commit.pr_url or commit.commit_url)


def report(args: Namespace) -> None:
    """Draws pictures and page from a report."""
    show_progress()
    require()
    place = Path(args.folder)
    found = PruningReport.from_file(place)
    folder = place if place.is_dir() else place.parent
    target = Path(args.output or folder)
    with writing(target, "The report"):
        target.mkdir(parents=True, exist_ok=True)
        if args.output is None and (folder / PLAN_FILE).is_file():
            update_records(folder)
            pictures = [folder / name for name in PICTURES if (folder / name).is_file()]
        else:
            pictures = draw_pictures(found, target)
        page = write_page(found, target / PAGE_FILE, title=folder.resolve().name)
    files = [str(path) for path in (*pictures, page)]
    print_result(args, {"files": files}, "\n".join(files))


def strategies(args: Namespace) -> None:
    """Lists what is installed."""
    found = available_strategies()
    lines = [
        f"{name:<20} {info.summary if info.available else 'unavailable: ' + str(info.error)} "
        f"[{info.distribution} {info.version}]"
        for name, info in found.items()
    ]
    print_result(args, {name: vars(info) for name, info in found.items()}, "\n".join(lines))


def _config(args: Namespace) -> BlockPruningConfig:
    given = given_fields(args)
    if (
        getattr(args, "export", None)
        and not args.blocks
        and args.config is None
        and not set(given) & set(BUDGET_FIELDS)
    ):
        given["num_blocks"] = max(args.export)
    if args.config is None:
        return BlockPruningConfig(**given)
    return BlockPruningConfig.from_pretrained(args.config, **given)


def _refuse_search_flags(args: Namespace) -> None:
    """An option that would be ignored is an error."""
    measured = args.eval_dataset is not None or args.tasks
    used = ("stack", *(_EVALUATION_FIELDS if measured else ()))
    given = [name for name in sorted(given_fields(args)) if name not in used] + (["config"] if args.config else [])
    given += ["resume_dir"] if args.resume_dir is not None else []
    if args.blocks and given:
        raise ConfigurationError(f"--blocks names the blocks itself; {', '.join(given)} would have no effect.")
    if args.eval_samples is not None and args.eval_dataset is None:
        raise ConfigurationError("--eval-samples only counts together with --eval-dataset.")
    _refuse_task_flags(args)


def _refuse_task_flags(args: Namespace) -> None:
    given = [name for name in ("limit", "num_fewshot") if getattr(args, name) is not None]
    if given and not args.tasks:
        raise ConfigurationError(f"--{given[0].replace('_', '-')} only counts together with --tasks.")


def _measure(args: Namespace, name: str, fields: dict[str, Any], baseline: Any) -> dict[str, Any]:
    config = BlockPruningConfig(**fields)
    spec = EvaluationSpec(stride=args.stride, batch_size=config.batch_size, continuations=args.continuations)
    pruner = BlockPruner.from_pretrained(name, config, args.tokenizer, **model_arguments(args))
    result: dict[str, Any] = {"label": name, **size_of(pruner.model)}
    if args.tasks:
        result["tasks"] = pruner.evaluate_tasks(args.tasks, limit=args.limit, num_fewshot=args.num_fewshot, label=name)
    if config.dataset is not None or not args.tasks:
        samples = fields.get("num_samples")
        result |= pruner.evaluate(config.dataset, spec=spec, num_samples=samples, baseline=baseline, label=name)
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
