# SPDX-License-Identifier: Apache-2.0
"""The recipe: every field of a configuration, its default, its help text and its rules, in one place.

`BlockPruningConfig` takes its fields from here, the command line its flags, the documentation its table. A recipe says
*what* is wanted; device, dtype and everything else that does not change the result is no part of it. Whether the
strategy exists and knows its options is the registry's business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields, replace
from fractions import Fraction
from typing import Any

from .budget_rules import (
    HELD_OUT_FIELDS,
    OPEN_BUDGETS,
    blocks_for_size,
    blocks_for_target,
    check_held_out,
    check_number,
    why_blocks_stay,
)
from .errors import ConfigurationError, nearest
from .widths import LAYOUTS


DEFAULT_SPARSITY = 0.2
BUDGET_FIELDS = ("sparsity", "num_blocks", "target_params", "target_size_gb", *OPEN_BUDGETS)
CALIBRATION_RECIPES = ("windows", "sleb")
OBJECTIVES = ("nll", "kl", "task")
COMPENSATIONS = ("none", "scale", "ridge", "auto", "reconstruct")
_CHOICES = {
    "objective": OBJECTIVES,
    "compensation": COMPENSATIONS,
    "layout": LAYOUTS,
    "calibration_recipe": CALIBRATION_RECIPES,
}


@dataclass(frozen=True)
class Recipe:
    """What to remove, how to choose it, and on which text; checked once, when it is made.

    Raises:
        ConfigurationError: A field has an impossible value, or more than one budget is given.
    """

    strategy: str = field(
        default="sleb",
        metadata={"help": "Chooses the blocks: `auto` (search, ridge compensation) or one that `strategies` lists."},
    )
    sparsity: float | None = field(
        default=None,
        metadata={
            "help": "Budget: fraction of the blocks to remove, between 0 and 1, rounded up to whole blocks; of "
            "strategies that remove channels and heads, the fraction of these in each block. "
            f"Without any budget: {DEFAULT_SPARSITY}."
        },
    )
    num_blocks: int | None = field(
        default=None, metadata={"help": "Budget: number of blocks to remove.", "minimum": 1}
    )
    target_params: int | None = field(
        default=None,
        metadata={"help": "Budget: number of parameters that the pruned model may have at most.", "minimum": 1},
    )
    target_size_gb: float | None = field(
        default=None,
        metadata={
            "help": "Budget: gigabytes (1e9 bytes) that the weights of the pruned model may take at most, in the "
            "dtype in which the model is loaded.",
            "above": 0,
        },
    )
    max_ppl_increase: float | None = field(
        default=None,
        metadata={
            "help": "Budget: as many blocks as keep the perplexity on held-out text within this share above that of "
            "the dense model; 0.1 is 10 percent.",
            "above": 0,
        },
    )
    max_kl: float | None = field(
        default=None,
        metadata={
            "help": "Budget: as many blocks as keep the mean KL(dense || pruned) on held-out text within this many "
            "nats per token.",
            "above": 0,
        },
    )
    target_speedup: float | None = field(
        default=None,
        metadata={
            "help": "Budget: as few blocks as make both prefill and decoding (batch 1, measured on this machine) this "
            "many times as fast as those of the dense model; 1.25 for a quarter more.",
            "above": 1,
        },
    )
    held_out_dataset: Any = field(
        default=None,
        metadata={
            "help": "Text that max_ppl_increase and max_kl are held to, like dataset; of a data set with several "
            "splits the validation split. If not given: windows of dataset that are not calibrated on."
        },
    )
    held_out_samples: int | None = field(
        default=None,
        metadata={"help": "Windows of held-out text; as many as num_samples if not given.", "minimum": 1},
    )
    unit: str | None = field(
        default=None,
        metadata={
            "help": "What goes where blocks are removed: 'block', whole blocks (the default), or 'half_block', pairs "
            "of an attention and an MLP half that need not be of one block; as many parameters, the same kind of "
            "checkpoint, more to choose from.",
            "choices": ("block", "half_block"),
        },
    )
    objective: str | None = field(
        default=None,
        metadata={
            "help": "What a search minimises on the text: 'nll', the loss there (the default of sleb); 'kl', the "
            "divergence from what the dense model predicts there; 'task', the loss on completions of prompts.",
            "choices": OBJECTIVES,
        },
    )
    stack: str | None = field(
        default=None,
        metadata={
            "help": "Which blocks of an encoder-decoder to remove from: 'decoder' (the default) or 'encoder'.",
            "choices": ("decoder", "encoder"),
        },
    )
    dataset: Any = field(
        default=None,
        metadata={
            "help": "Text to measure the model on: wikitext2, c4, alpaca, or the path of a .txt, .jsonl or .parquet "
            "file; in Python also a list of strings, a list of tokenized dicts or a datasets.Dataset."
        },
    )
    dataset_text_field: str | None = field(
        default=None, metadata={"help": "Column of the dataset that holds the text; found by itself if not given."}
    )
    num_samples: int = field(default=128, metadata={"help": "Number of windows of text.", "minimum": 1})
    seqlen: int = field(
        default=2048,
        metadata={
            "help": "Tokens per window, clipped to what the model can read.",
            "minimum": 2,  # one token to read and one to predict
        },
    )
    batch_size: int = field(default=1, metadata={"help": "Windows per forward pass.", "minimum": 1})
    seed: int = field(default=0, metadata={"help": "Seed of every random choice.", "minimum": 0})
    use_chat_template: bool = field(
        default=False, metadata={"help": "Format conversations with the chat template of the tokenizer."}
    )
    calibration_recipe: str = field(
        default="windows",
        metadata={
            "help": "How text becomes windows: 'windows' cuts num_samples of them; 'sleb' does as the authors of SLEB "
            "do and cuts num_samples shuffled rows, joined, which gives only a few.",
            "choices": CALIBRATION_RECIPES,
        },
    )
    protect_first: int | None = field(
        default=None,
        metadata={
            "help": "Blocks at the input end that are never removed; if not given, the strategy decides.",
            "minimum": 0,
        },
    )
    protect_last: int | None = field(
        default=None,
        metadata={
            "help": "Blocks at the output end that are never removed; if not given, the strategy decides.",
            "minimum": 0,
        },
    )
    compensation: str = field(
        default="none",
        metadata={
            "help": "Whether weights that stay make up for what goes, in closed form: 'scale' fits a factor for each "
            "channel in front of every gap, 'ridge' a whole weight, 'auto' the better one, 'reconstruct' a whole "
            "weight there and in every half-block behind the first gap; no shape changes. Kept only where some of the "
            "windows, which the fit does not see, say that it helps.",
            "choices": COMPENSATIONS,
        },
    )
    generated_samples: int | None = field(
        default=None,
        metadata={
            "help": "Windows of text that the dense model writes itself, from beginnings out of dataset, for "
            "compensation to be fitted on, too: where there is little text. If not given: none; with strategy 'auto', "
            "up to three for each window of text, to 32,768 tokens in all.",
            "minimum": 0,
        },
    )
    layout: str = field(
        default="uniform",
        metadata={
            "help": "How strategies that remove channels and heads shape the result: 'uniform' keeps as many in every "
            "block, which every runtime loads; 'padded' fills up with zeros to the widest block, which saves less; "
            "'per_layer' gives every block its own width, which only BlockPruner.load_pruned loads.",
            "choices": LAYOUTS,
        },
    )
    align: int = field(
        default=8,
        metadata={"help": "Channels that an MLP keeps are a multiple of this number.", "minimum": 1},
    )
    strategy_options: dict[str, Any] | None = field(
        default=None, metadata={"help": "Options of the strategy, by name; each strategy documents its own."}
    )

    def __post_init__(self) -> None:
        _check_budget(self)
        for each in fields(self):
            if "minimum" in each.metadata:
                _check_whole_number(each, getattr(self, each.name))
            if "above" in each.metadata:
                check_number(each, getattr(self, each.name))
        _check_texts(self)
        check_held_out(self)
        _check_options(self.strategy_options)

    @property
    def requested(self) -> dict[str, float | int]:
        """The one budget that was given, else the default: `{"sparsity": 0.2}`."""
        given = {name: getattr(self, name) for name in BUDGET_FIELDS if getattr(self, name) is not None}
        return given or {"sparsity": DEFAULT_SPARSITY}

    @property
    def budget(self) -> str:
        """Name of the one budget."""
        return next(iter(self.requested))

    def with_num_blocks(self, num_blocks: int) -> Recipe:
        """Returns the recipe with another budget, and without the fields that only counted for its own."""
        return replace(self, **{**dict.fromkeys((*BUDGET_FIELDS, *HELD_OUT_FIELDS)), "num_blocks": num_blocks})

    def budget_blocks(
        self, num_blocks: int, removable: Sequence[int], *, block_params: Sequence[int], total_params: int
    ) -> int:
        """Turns the budget into the number of blocks to remove from one model; an open one into the largest number.

        Args:
            num_blocks: Number of blocks of the model.
            removable: Indices of the blocks that may go, ascending.
            block_params: Parameters that go with each of the `num_blocks` blocks; bytes where the budget is a size.
            total_params: Parameters, or bytes, of the whole model.

        Raises:
            ConfigurationError: More blocks are asked for than may go, or the model is already small enough.
        """
        (name, value), *_ = self.requested.items()
        # A plan keeps at least one block, even where nothing is protected.
        limit = min(len(removable), num_blocks - 1)
        if name == "target_params":
            return blocks_for_target(value, sorted(block_params[i] for i in removable)[:limit], total_params)
        if name == "target_size_gb":
            return blocks_for_size(value, sorted(block_params[i] for i in removable)[:limit], total_params)
        count = max(1, limit) if name in OPEN_BUDGETS else value
        if name == "sparsity":
            # The decimal that the user typed, not its binary neighbour: 0.07 of 100 blocks is 7, not 8.
            count = math.ceil(num_blocks * Fraction(str(value)))
        if count <= limit:
            return count
        largest = math.floor(limit / num_blocks * 10_000) / 10_000 if name == "sparsity" else limit
        allowed = f"The largest possible {name} is {largest}." if limit > 0 else "No block may go."
        raise ConfigurationError(
            f"{name}={value} asks to remove {count} of {num_blocks} blocks, but only {limit} may go: "
            f"{why_blocks_stay(num_blocks, removable)}. {allowed}"
        )


def _check_budget(recipe: Recipe) -> None:
    """Allows one budget, and a sparsity strictly between 0 and 1."""
    given = [f"{name}={getattr(recipe, name)!r}" for name in BUDGET_FIELDS if getattr(recipe, name) is not None]
    if len(given) > 1:
        raise ConfigurationError(f"Give one budget, not {len(given)}: {' and '.join(given)}.")
    sparsity = recipe.sparsity
    if sparsity is None:
        return
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
        raise ConfigurationError(f"sparsity must be a number between 0 and 1, not {sparsity!r}.")
    if not 0 < sparsity < 1:
        raise ConfigurationError(
            f"sparsity={sparsity!r} is not between 0 and 1, both excluded: it is the fraction of the blocks to remove "
            "(0.25 for a quarter). For a count of blocks use num_blocks."
        )


def _check_whole_number(count: Field[Any], value: Any) -> None:
    """Allows an `int` that is not too small; `True` and `3.0` are no counts."""
    if value is None and count.default is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigurationError(f"{count.name} must be a whole number, not {value!r}.")
    minimum = count.metadata["minimum"]
    if value < minimum:
        raise ConfigurationError(f"{count.name}={value} is too small; the smallest value is {minimum}.")


def _check_texts(recipe: Recipe) -> None:
    """Checks the names and the switch; a dataset may be any object, `calibration` reads it."""
    if not isinstance(recipe.strategy, str) or not recipe.strategy:
        raise ConfigurationError(f"strategy must be the name of a strategy, not {recipe.strategy!r}.")
    if isinstance(recipe.dataset, str) and not recipe.dataset:
        raise ConfigurationError("dataset is an empty string; give a name or a path, or leave it out.")
    if recipe.stack not in (None, "decoder", "encoder"):
        raise ConfigurationError(f"stack must be 'decoder' or 'encoder', not {recipe.stack!r}.")
    if recipe.unit not in (None, "block", "half_block"):
        raise ConfigurationError(f"unit must be 'block' or 'half_block', not {recipe.unit!r}.")
    column = recipe.dataset_text_field
    if column is not None and (not isinstance(column, str) or not column):
        raise ConfigurationError(f"dataset_text_field must be the name of a column, not {column!r}.")
    if not isinstance(recipe.use_chat_template, bool):
        raise ConfigurationError(f"use_chat_template must be True or False, not {recipe.use_chat_template!r}.")
    if recipe.generated_samples and recipe.compensation == "none":
        raise ConfigurationError(
            f"generated_samples={recipe.generated_samples} is text for compensation to be fitted on: name a "
            "compensation ('ridge'), or leave it out."
        )
    for name, choices in _CHOICES.items():
        value = getattr(recipe, name)
        if value not in choices and not (name == "objective" and value is None):
            raise ConfigurationError(f"Unknown {name} {value!r}.{nearest(str(value), choices)}")


def _check_options(options: Any) -> None:
    """Allows a dict with string keys; the registry checks keys and values against the strategy."""
    if options is None:
        return
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise ConfigurationError(
            f"strategy_options must be a dict of option names and values, not {options!r} "
            "(on the command line: --strategy-option key=value)."
        )
