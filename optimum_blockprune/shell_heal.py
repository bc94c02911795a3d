# SPDX-License-Identifier: Apache-2.0
"""What `optimum-cli blockprune heal` does."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from .config import CONFIG_FILE, BlockPruningConfig
from .errors import ConfigurationError
from .flags import given_settings
from .healing_spec import HealingSpec
from .plan import PruningPlan
from .resuming import resumption
from .shell_parts import load_pruner, print_result, show_progress
from .shell_text import healed


def heal(args: Namespace) -> None:
    """Trains a pruned model and writes the result, with what the folder of the pruned one says of itself."""
    show_progress()
    settings = given_settings(args)
    if args.teacher is not None and settings.get("method") != "distill":
        raise ConfigurationError("--teacher only counts together with --method distill.")
    HealingSpec.of(settings)  # before anything is loaded
    saved = Path(args.model) / getattr(args, "subfolder", "") / CONFIG_FILE
    config = BlockPruningConfig.from_pretrained(saved) if saved.is_file() else BlockPruningConfig()
    pruner = load_pruner(args, config)
    whole = PruningPlan.from_blocks(pruner.model, ())  # the configuration's budget was spent already
    pruner.check_save(args.output, plan=whole, overwrite=args.overwrite, verify=args.verify)
    with resumption(args.resume_dir, args.output) as kept:
        pruner.heal(args.dataset, teacher=args.teacher, resume_dir=kept, **settings)
        pruner.save_pretrained(args.output, overwrite=args.overwrite, verify=args.verify)
    print_result(args, {"output": args.output, **pruner.report.to_dict()}, healed(pruner.report, args.output))
