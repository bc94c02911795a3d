# SPDX-License-Identifier: Apache-2.0
"""What `optimum-cli blockprune mix` does."""

from __future__ import annotations

from argparse import Namespace

from .config import BlockPruningConfig
from .flags import given_fields, named_options
from .mix import width_beside
from .resuming import resumption
from .saving import check_output
from .shell_parts import load_pruner, print_result, show_progress
from .shell_text import depth_table, summary
from .team import Team


_WIDTH_ONLY = ("layout", "align")
_HELD_OUT = ("held_out_dataset", "held_out_samples")


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
    options = None if args.width_option is None else named_options("--width-option", args.width_option)
    width = BlockPruningConfig(**vars(width_beside(depth.recipe, args.width_strategy, options, **only)))
    pruner = load_pruner(args, depth)
    with resumption(args.resume_dir, args.output) as kept:
        plan = pruner.mix(target, depth, width, counts=args.counts, resume_dir=kept, **held_out)
        pruner.prune(plan=plan)
        pruner.save_pretrained(args.output, overwrite=args.overwrite, verify=args.verify)
    text = f"{depth_table(plan.details['mix']['trail'])}\n{summary(pruner.report, plan, args.output)}"
    print_result(args, {"output": args.output, **pruner.report.to_dict()}, text)
