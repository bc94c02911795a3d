# SPDX-License-Identifier: Apache-2.0
"""Toys for the tests of the front: a tokenizer of whole words, text, folders with tiny models, and snapshots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from families import VOCABULARY, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from optimum_blockprune import BlockPruner, BlockPruningConfig, get_strategy
from optimum_blockprune.batches import Batch
from optimum_blockprune.recipe import BUDGET_FIELDS


NUM_BLOCKS = 6
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def word_tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Word `w17` is token 17; the special tokens are those of the tiny models."""
    names = [*SPECIAL, *(f"w{number}" for number in range(len(SPECIAL), vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def text(words: int, seed: int = 0) -> str:
    """Random words, one token each."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(len(SPECIAL), VOCABULARY, (words,), generator=generator)
    return " ".join(f"w{number}" for number in numbers.tolist())


TEXTS = [text(40, seed) for seed in range(8)]


def config(strategy: str = "sleb", **fields: Any) -> BlockPruningConfig:
    """Two blocks (or 40 % of the width) by four windows of sixteen tokens, unless told otherwise."""
    usual = {"sparsity": 0.4} if get_strategy(strategy).unit == "width" else {"num_blocks": 2}
    budget = {} if set(BUDGET_FIELDS) & set(fields) else usual
    defaults = {"dataset": TEXTS, "num_samples": 4, "seqlen": 16, "batch_size": 2}
    if strategy == "functional_network":
        defaults["strategy_options"] = {"groups": 1}  # networks need more tokens than a fourth of these
    return BlockPruningConfig(strategy=strategy, **{**defaults, **budget, **fields})


def wide(family: str, blocks: int = 6, seed: int = 0) -> PreTrainedModel:
    """A model whose blocks do far more to the stream than those of a fresh one."""
    torch.manual_seed(seed)
    model = tiny_model(family, blocks)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and ("proj" in name or "c_fc" in name):
                parameter.mul_(6.0)
    return model


def toy_pruner(family: str = "llama", depth: int = NUM_BLOCKS, **fields: Any) -> BlockPruner:
    """A pruner with a tiny model of `depth` blocks; `fields` are those of `config`."""
    return BlockPruner(tiny_model(family, depth), config(**fields), word_tokenizer())


def toy_folder(folder: Path, family: str = "llama", num_blocks: int = NUM_BLOCKS) -> Path:
    """Saves a tiny model and its tokenizer, as transformers does."""
    tiny_model(family, num_blocks).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """All that may not change: weights, settings, flags, hooks, the modules and their plain attributes."""
    plain = (bool, int, float, str, list, type(None))
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "config": model.config.to_dict(),
        "generation_config": model.generation_config.to_dict(),
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "flags": [module.training for module in model.modules()],
        "hooks": [len(getattr(module, name)) for module in model.modules() for name in hooks],
        "attributes": [
            {name: value for name, value in vars(module).items() if isinstance(value, plain)}
            for module in model.modules()
        ],
    }


def assert_unchanged(model: PreTrainedModel, before: dict[str, Any]) -> None:
    """Compares with an earlier snapshot, bit for bit."""
    after = snapshot(model)
    for name in before.keys() - {"weights"}:
        assert after[name] == before[name], name
    assert_same_weights(after["weights"], before["weights"])


def assert_same_weights(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    """Compares two state dicts, bit for bit."""
    assert list(weights) == list(others)
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too, with what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TextPositions:
    """What fakes of the runner say of text: all tokens are real but those under the mask; no block lies elsewhere."""

    stack = SimpleNamespace(blocks=())

    def positions(self, batch: Batch) -> torch.Tensor:
        mask = batch.attention_mask
        return torch.ones_like(batch.input_ids, dtype=torch.bool) if mask is None else mask


@contextmanager
def counting(model: PreTrainedModel) -> Iterator[list[int]]:
    """Counts the model's forward passes: `len()` of the list."""
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def seconds_by_blocks(model: PreTrainedModel) -> list[float]:
    """Seconds of a machine on which a block takes one, and all the rest two (prefill) or one (decode)."""
    return [len(model.model.layers) + 2.0, len(model.model.layers) + 1.0]
