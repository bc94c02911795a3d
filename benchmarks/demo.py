# SPDX-License-Identifier: Apache-2.0
"""The demo: prunes a real language model from the command line and shows what is left.

1. `optimum-cli blockprune run` removes blocks of SmolLM2-135M-Instruct, read from GGUF.
2. Plain transformers load the result and write a sentence.
3. `optimum-cli blockprune evaluate` measures dense and pruned on articles that were not used to choose the blocks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from material import machine, smollm2_gguf, write_texts


FOLDER = Path(".demo")
PROMPT = "The capital of France is"
RUN = ["--strategy", "mi_prun", "--num-blocks", "3", "--protect-first", "1", "--protect-last", "2"]
TEXT = ["--num-samples", "16", "--seqlen", "512"]
ROWS = (
    ("blocks", "blocks", "{:d}"),
    ("parameters", "parameters", "{:,d}"),
    ("megabytes", "size on disk (MB)", "{:,.0f}"),
    ("perplexity", "perplexity, held-out text", "{:.2f}"),
    ("tokens", "  on predictions", "{:,d}"),
    ("decode_tokens_per_second", "decode tokens/s", "{:.1f}"),
    ("text", "greedy continuation", "{:s}"),
)


def main() -> None:
    """Runs the three steps and prints the table."""
    begin = time.perf_counter()
    calibration, held_out = write_texts(FOLDER)
    dense, pruned = FOLDER / "dense", FOLDER / "pruned"
    gguf = Path(os.path.relpath(smollm2_gguf()))
    _cli("run", "-m", gguf, *RUN, *TEXT, "--dataset", calibration, "--overwrite", pruned)
    convert(gguf, dense)
    figures = _cli("evaluate", "-m", pruned, "--baseline", dense, *TEXT, "--dataset", held_out, "--json")
    results = {"dense": figures["baseline"], "pruned": figures["model"]}
    for name, folder in (("dense", dense), ("pruned", pruned)):
        results[name]["megabytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
        results[name]["text"] = _continuation(folder)
    _print_table(results)
    sys.stdout.write(f"\n{machine()}\n{time.perf_counter() - begin:.0f} s; the pruned model is in {pruned}/\n")


def _cli(command: str, *arguments: object) -> dict:
    """Runs `optimum-cli blockprune`, as in a shell; returns its JSON, if asked for."""
    program = Path(sys.executable).with_name("optimum-cli")
    line = [str(program), "blockprune", command, *map(str, arguments)]
    sys.stdout.write("$ " + " ".join(["optimum-cli", *line[1:]]) + "\n")
    sys.stdout.flush()
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
    if "--json" in line:
        return json.loads(done.stdout)
    sys.stdout.write(done.stdout)
    return {}


def convert(gguf: Path, folder: Path) -> None:
    """Writes the dense model as an ordinary folder: removing no block is a plan, too."""
    if not folder.exists():
        from optimum_blockprune import BlockPruner, PruningPlan

        pruner = BlockPruner.from_pretrained(gguf)
        pruner.prune(folder, plan=PruningPlan.from_blocks(pruner.model, []), verify="keys")


def _continuation(folder: Path) -> str:
    """Loads the folder with plain transformers, nothing of ours, and generates with the KV cache."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True).replace("\n", " ")


def _print_table(results: dict[str, dict]) -> None:
    sys.stdout.write(f"\n{'':<28}{'dense':<36}pruned\n")
    for key, title, form in ROWS:
        dense, pruned = (form.format(results[name][key]) for name in ("dense", "pruned"))
        sys.stdout.write(f"{title:<28}{dense:<36}{pruned}\n")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
