# SPDX-License-Identifier: Apache-2.0
"""Saves a pruned model without holding more of it than it holds anyway: a streamed one as bytes of its files."""

from __future__ import annotations

import warnings
from pathlib import Path

from accelerate.utils.modeling import convert_file_size_to_int
from optimum.utils import logging
from transformers import PreTrainedModel

from .blocks import find_blocks
from .errors import BlockPruningError
from .offload import is_offloaded
from .plan import PruningPlan
from .source import open_source
from .streaming import source_of
from .weight_writing import write_weights


logger = logging.get_logger("optimum.blockprune.streamed_saving")


def save_model(model: PreTrainedModel, plan: PruningPlan, folder: Path, max_shard_size: int | str) -> None:
    """Writes what `model.save_pretrained` does.

    Of a streamed model, the kept bytes of its files are copied, into as many files as it has. Where they are not what
    the model is made of (another dtype, tensors that transformers changes), and of a model whose weights are fetched
    from elsewhere, files are no larger than a block.

    Args:
        model: The pruned model.
        plan: What was pruned.
        folder: An existing folder.
        max_shard_size: As in transformers; does not count where bytes are copied.
    """
    if _copied(model, plan, folder):
        return
    blocks = find_blocks(model, plan.stack).blocks
    if is_offloaded(blocks):
        # transformers gathers the tensors of one file in memory.
        largest = max(sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks)
        max_shard_size = min(convert_file_size_to_int(max_shard_size), largest)
    with warnings.catch_warnings():
        # It warns of the memory that one file takes, which was seen to.
        warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules", UserWarning)
        model.save_pretrained(folder, max_shard_size=max_shard_size)


def _copied(model: PreTrainedModel, plan: PruningPlan, folder: Path) -> bool:
    """Whether the files that a model is streamed from could be copied, and were."""
    origin = source_of(model)
    # Code of a repository is copied by `save_pretrained`.
    if origin is None or not origin.exact or type(model).__module__.startswith("transformers_modules."):
        return False
    try:
        source = open_source(origin.folder, plan, "logits", False)
    except BlockPruningError as error:  # pruned before, or what a block has lies in a tensor of all blocks
        logger.info(f"The files of '{origin.folder}' cannot be copied as they are: {error}")
        return False
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    write_weights(source.kept(plan), folder, num_parameters=parameters)
    return True
