# SPDX-License-Identifier: Apache-2.0
"""The command line that makes a checkpoint again, spelled so that it can be pasted."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .budget_rules import QUALITY_BUDGETS
from .card_text import hub_id, hub_text
from .healing_spec import HealingSpec
from .plan import PLAN_FILE, PruningPlan
from .recipe import BUDGET_FIELDS, Recipe
from .registry import get_strategy
from .text import HUB_DATASETS


if TYPE_CHECKING:
    from .config import BlockPruningConfig

PLACEHOLDER, PRUNED = "BASE_MODEL", "PRUNED_MODEL"
_LINE_LENGTH = 100

# How a model is loaded, as far as it changes the result; a token is nobody else's business.
_LOADING = ("revision", "subfolder", "gguf_file", "dtype", "trust_remote_code", "tokenizer")
_APPLY_LOADING = ("revision", "subfolder", "trust_remote_code")

# Fields that have a flag of another name, or a place of their own in the line.
_SPELLED_APART = ("strategy", *BUDGET_FIELDS, "dataset", "held_out_dataset", "strategy_options")

_Flags = list[tuple[str, ...]]


def command_for(
    plan: PruningPlan,
    config: BlockPruningConfig | None = None,
    *,
    revision: str | None = None,
    loading: Mapping[str, Any] | None = None,
) -> str | None:
    """The `optimum-cli blockprune` line that makes the checkpoint of a plan again.

    It is a `run` where that chooses the same again: blocks that were named, or a configuration that can be spelled.
    Otherwise (data in memory, plans that were joined, a plan without its configuration) it applies the plan.

    Args:
        plan: What was removed.
        config: What it was chosen with; ignored where it is that of another plan.
        revision: Commit of the dense model on the Hub.
        loading: Arguments that the dense model was loaded with (`dtype`, `gguf_file`, ...).

    Returns:
        The line, wrapped by backslashes, with `BASE_MODEL` for a model that is not on the Hub; `None` where nothing
        was removed, or where no command does it (`apply` reads no GGUF file).
    """
    if not plan.num_removed and not plan.width:
        return None
    loading = {**(loading or {}), **({"revision": revision} if revision else {})}
    chosen = _named_blocks(plan) or _chosen_again(plan, config)
    if chosen is None:
        return apply_command(plan, loading=loading)
    return _wrapped(["optimum-cli blockprune run", *_model(plan, loading, _LOADING), *chosen, ("OUTPUT",)])


def apply_command(
    plan: PruningPlan, *, revision: str | None = None, loading: Mapping[str, Any] | None = None
) -> str | None:
    """The line that applies the saved plan, which needs no data; `None` for a GGUF file, whose plan needs Python.

    Args:
        plan: The plan, as saved beside the card.
        revision: Commit of the dense model on the Hub.
        loading: See `command_for`.
    """
    loading = {**(loading or {}), **({"revision": revision} if revision else {})}
    if "gguf_file" in loading or (plan.base_model or "").endswith(".gguf"):
        return None
    words = ["optimum-cli blockprune apply", *_model(plan, loading, _APPLY_LOADING)]
    return _wrapped([*words, ("--plan", PLAN_FILE), ("OUTPUT",)])


def healing_command(spec: HealingSpec, dataset: Any, teacher: str | None = None) -> str | None:
    """The line that trains a pruned checkpoint alike; `None` for text in memory.

    Args:
        spec: How it was trained.
        dataset: The text.
        teacher: The dense model whose predictions were learned.
    """
    text = _dataset(dataset)
    if text is None:
        return None
    flags: _Flags = [("--teacher", hub_id(teacher) or PLACEHOLDER)] if teacher else []
    for name, value in spec.changed.items():
        if name == "target_modules":
            flags.append((_flag(name), ",".join(value)))
        elif name != "save_steps":
            flags.append((_flag(name),) if value is True else _valued(_flag(name), str(value)))
    return _wrapped(["optimum-cli blockprune heal", ("-m", PRUNED), *text, *flags, ("OUTPUT",)])


def _model(plan: PruningPlan, loading: Mapping[str, Any], names: Iterable[str]) -> _Flags:
    """The model and how to load it; what concerns a repository only is left out for a local one."""
    given = {name: loading[name] for name in names if loading.get(name)}
    repo = hub_id(plan.base_model, loaded="revision" in given)
    if repo is None:
        given.pop("revision", None)
    flags: _Flags = [("-m", repo or PLACEHOLDER)]
    for name, value in given.items():
        shown = str(value).removeprefix("torch.")
        flags.append((_flag(name),) if value is True else _valued(_flag(name), shown))
    return flags


def _named_blocks(plan: PruningPlan) -> _Flags | None:
    """What to say for blocks that the user named; `None` for other plans."""
    if plan.strategy != "manual" or plan.width or plan.folds or "parts" in plan.details:
        return None
    stack = [] if plan.stack == "decoder" else [("--stack", plan.stack)]
    return [("--blocks", ",".join(plan.removed_names)), *stack]


def _chosen_again(plan: PruningPlan, config: BlockPruningConfig | None) -> _Flags | None:
    """What to say so that the same is chosen again; `None` where that cannot be said."""
    if config is None or "parts" in plan.details or not _made_with(plan, config.recipe):
        return None
    recipe = config.recipe
    ((budget, value),) = plan.requested.items()
    dataset, options = _dataset(recipe.dataset), _options(recipe.strategy_options)
    # Of a plan that was cut short, the budget is a number of blocks, which nothing is held out for.
    held_out = _dataset(recipe.held_out_dataset, "--held-out-dataset") if budget in QUALITY_BUDGETS else []
    if dataset is None or options is None or held_out is None:
        return None
    return [
        _valued("--strategy", recipe.strategy),
        *options,
        (_flag(budget), str(value)),
        *dataset,
        *held_out,
        *_changed(recipe, budget),
    ]


def _made_with(plan: PruningPlan, recipe: Recipe) -> bool:
    """Whether nothing that the plan knows of its making speaks against this recipe."""
    # A plan that was cut short is what the same search gives for its smaller budget.
    if dict(plan.requested) != recipe.requested and "truncated_from" not in plan.details:
        return False
    chosen = (plan.strategy, plan.seed) == (recipe.strategy, recipe.seed)
    options = all(plan.options.get(name) == value for name, value in (recipe.strategy_options or {}).items())
    width = not plan.width or plan.width.layout == recipe.layout
    width = width and (plan.details.get("unit", "block") == (recipe.unit or "block"))
    fitted = plan.details.get("compensation", {})
    width = width and fitted.get("asked", "none") == recipe.compensation
    width = width and (fitted.get("generated_samples") or 0) == (recipe.generated_samples or 0)
    default = next(iter(get_strategy(recipe.strategy).objectives), None)
    wanted = recipe.objective or default
    same = options and width and plan.details.get("objective", default) == wanted
    return chosen and same and recipe.stack in (None, plan.stack) and _same_text(plan.calibration, recipe)


def _same_text(calibration: Mapping[str, Any] | None, recipe: Recipe) -> bool:
    """Whether the calibration set can be what the recipe asks for; of data in memory nobody can say."""
    if calibration is None or not isinstance(recipe.dataset, (str, os.PathLike)):
        return calibration is None or recipe.dataset is not None
    source, name = str(calibration.get("source")), os.fspath(recipe.dataset)
    same = hub_text(source) is not None and source.startswith(f"{name} (")
    way = calibration.get("recipe")  # rows that are tokenised already, and completions, have one of their own
    ways = ("task",) if recipe.objective == "task" else (recipe.calibration_recipe, "tokenised")
    cut = calibration.get("seqlen", 0) <= recipe.seqlen and way in (*ways, None)
    return cut and (same or source == str(Path(name).expanduser()))


def _dataset(dataset: Any, flag: str = "--dataset") -> _Flags | None:
    """A name or a file; `None` for data in memory. Of the author's own folders only those below the current one."""
    if dataset is None:
        return []
    if not isinstance(dataset, (str, os.PathLike)):
        return None
    path = Path(dataset).expanduser()
    known = dataset in HUB_DATASETS or not (path.is_absolute() or ".." in path.parts)
    return [_valued(flag, os.fspath(dataset) if known else path.name)]


def _options(options: Mapping[str, Any] | None) -> _Flags | None:
    """One flag for each option; `None` if one of them has a value that is no plain word or number."""
    if any(not isinstance(value, (str, int, float, type(None))) for value in (options or {}).values()):
        return None
    return [("--strategy-option", f"{name}={value}") for name, value in (options or {}).items()]


def _changed(recipe: Recipe, budget: str) -> _Flags:
    """Every other field that differs from its default."""
    flags: _Flags = []
    for name, value in vars(recipe).items():
        if name in _SPELLED_APART or value == getattr(Recipe, name):
            continue
        if name == "held_out_samples" and budget not in QUALITY_BUDGETS:
            continue
        flags.append((_flag(name),) if value is True else _valued(_flag(name), str(value)))
    return flags


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _valued(flag: str, value: str) -> tuple[str, ...]:
    """A flag and its value; one word where the value would be taken for a flag."""
    return (f"{flag}={value}",) if value.startswith("-") else (flag, value)


def _wrapped(groups: Iterable[str | tuple[str, ...]]) -> str:
    """Quotes the words and breaks the line between flags."""
    lines = [""]
    for group in groups:
        words = group if isinstance(group, str) else shlex.join(group)
        if lines[-1] and len(lines[-1]) + 1 + len(words) > _LINE_LENGTH - 2:
            lines.append("    " + words)
        else:
            lines[-1] = f"{lines[-1]} {words}".strip() if len(lines) == 1 else f"{lines[-1]} {words}"
    return " \\\n".join(lines)
