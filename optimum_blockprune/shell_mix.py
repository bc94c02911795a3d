# SPDX-License-Identifier: Apache-2.0
"""What `optimum-cli blockprune mix` does."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from .config import BlockPruningConfig
from .flags import given_fields, named_options
from .resuming import resumption
from .saving import check_output
from .shell_parts import load_pruner, print_result, show_progress
from .shell_text import depth_table, summary
from .team import Team


_WIDTH_ONLY = ("layout", "align")
_HELD_OUT = ("held_out_dataset", "held_out_samples")
# What the width part does not take over from the depth.
_DEPTH_ONLY = ("strategy", "strategy_options", "unit", "objective", "compensation", "protect_first", "protect_last")


def mix(args: Namespace) -> None:
    """Tries splits between depth and width, prunes by the best one, proves and saves."""
    show_progress()
    Team.current().by_first(lambda: check_output(args.output, overwrite=args.overwrite))
    given = given_fields(args)
    target = given.pop("target_params")
    held_out = {name: given.pop(name) for name in _HELD_OUT if name in given}
    only = {name: given.pop(name) for name in _WIDTH_ONLY if name in given}
    depth = BlockPruningConfig(**given)
    if args.config is not None:
        depth = BlockPruningConfig.from_pretrained(args.config, **given)
    width = _width(args, depth, only)
    pruner = load_pruner(args, depth)
    with resumption(args.resume_dir, args.output) as kept:
        plan = pruner.mix(target, depth, width, counts=args.counts, resume_dir=kept, **held_out)
        pruner.prune(plan=plan)
        pruner.save_pretrained(args.output, overwrite=args.overwrite, verify=args.verify)
    text = f"{depth_table(plan.details['mix']['trail'])}\n{summary(pruner.report, plan, args.output)}"
    print_result(args, {"output": args.output, **pruner.report.to_dict()}, text)


def _width(args: Namespace, depth: BlockPruningConfig, only: dict[str, Any]) -> BlockPruningConfig:
    """The configuration of the width part: the text of the depth, and what was typed for it."""
    fields = {name: value for name, value in vars(depth.recipe).items() if name not in (*_DEPTH_ONLY, *_HELD_OUT)}
    options = {"families": "mlp", "reduction": "l2"} if args.width_strategy == "bip" else None
    if args.width_option is not None:
        options = named_options("--width-option", args.width_option)
    return BlockPruningConfig(args.width_strategy, **{**fields, **only, "strategy_options": options})
