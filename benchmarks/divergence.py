# SPDX-License-Identifier: Apache-2.0
"""How far the divergence that a search minimises, over the k most likely tokens, is below that over all of them.

SmolLM2-135M-Instruct without one block and without seven, on articles that come with a package.

    python benchmarks/divergence.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from material import machine, smollm2_gguf, write_texts

from optimum_blockprune import BlockPruner
from optimum_blockprune.calibration import WindowSpec, build_windows
from optimum_blockprune.inputs import vocabulary_of
from optimum_blockprune.runner import BlockRunner
from optimum_blockprune.teacher import tail_mass, with_teacher


WITHOUT = ((14,), (17, 18, 16, 5, 14, 15, 13))


def main() -> None:
    """Prints a line for every k."""
    pruner = BlockPruner.from_pretrained(smollm2_gguf(), dtype="float32")
    runner = BlockRunner(pruner.model)
    text, _ = write_texts(Path(".demo"))
    windows = build_windows(str(text), pruner.tokenizer, WindowSpec(num_samples=2, seqlen=256))
    sys.stdout.write(f"{machine()}\n     k  other tokens  1 block  7 blocks\n")
    for k in (32, 511, 1024, vocabulary_of(runner.stack.layout)):
        taught = with_teacher(runner, windows, 2, k=k)
        figures = []
        for removed in WITHOUT:
            measured = [runner.nll(batch, removed) for batch in taught.batches(2)]
            figures.append(sum(loss.item() for loss, _ in measured) / sum(count for _, count in measured))
        sys.stdout.write(f"{k:>6}  {tail_mass(taught):>12.3f}  {figures[0]:>7.3f}  {figures[1]:>8.3f}\n")


if __name__ == "__main__":
    main()
