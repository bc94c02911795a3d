# SPDX-License-Identifier: Apache-2.0
"""Claim: `apply_to_checkpoint` costs little more than `cp` of the bytes that stay, and memory that does not grow.

Writes a made-up Llama checkpoint of the asked size (bf16, several shards, a few patterned bytes over and over), takes
every fourth block out of it in a process of its own, and copies the files of the result with `cp`: the same bytes in
as many files. Both in turn, several times; medians count. Before each run the pages of its source are dropped from
the cache (`--cache warm`: read once instead), and each run ends with fsync of every file that it wrote.

Importing torch and transformers takes seconds whatever the size; it is part of "whole process", and shown alone.
Memory is that of the process: peak resident size (VmHWM, which counts the pages of shared libraries), the same after
the imports alone, and the largest anonymous part seen every 20 ms. Most of it is what `from transformers import
LlamaForCausalLM` needs, so one more run hides the packages that a plain installation does not have.

    python benchmarks/apply_checkpoint.py --gigabytes 8 --output benchmarks/results/apply_checkpoint.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from material import machine

from optimum_blockprune.tensors import INDEX_FILE


SHAPE = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}
PIECE = 2**18
# Not needed, but imported by transformers and for the card's pictures where they are installed.
OPTIONAL = ("scipy", "sklearn", "matplotlib")
PLAIN_NAME = "  without optional packages"
PEAK = "peak_bytes"
Timing = dict[str, float]


def main() -> None:
    """Writes the checkpoint, times both ways of copying, removes everything again."""
    args = _arguments()
    if args.child:
        if args.plain:
            _hide(OPTIONAL)
        _child(*map(Path, args.child))
        return
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="blockprune-benchmark-") as name:
        folder = Path(name)
        blocks = _write_checkpoint(folder / "dense", args.gigabytes, args.shard_gigabytes)
        _plan(folder / "dense", blocks).save(folder / "plan.json")
        runs = {"apply": [], "cp": []}
        for _ in range(args.repeats + 1):
            runs["apply"].append(_apply(folder, args.cache))
            runs["cp"].append(_copy(folder, args.cache))
        for kind in runs.values():
            del kind[0]  # the first run finds a disk without room set aside for it
        plain = _apply(folder, args.cache, plain=True)
        report = {
            "claim": "apply_to_checkpoint takes at most 1.3 times as long as cp of the kept bytes, and 400 MB",
            "device": machine(),
            "versions": _versions(),
            "disk": _file_system(folder),
            "cache": args.cache,
            "checkpoint": _sizes(folder),
            "apply": _medians(runs["apply"]),
            "cp": _medians(runs["cp"]),
            "plain": plain,
            "runs": runs,
        }
    apply, cp = report["apply"], report["cp"]
    report["ratio"] = {"copying": apply["save"] / cp["seconds"], "process": apply["seconds"] / cp["seconds"]}
    sys.stdout.write(_table(report))
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


# --- the checkpoint ------------------------------------------------------------------------------------------------


def _write_checkpoint(folder: Path, gigabytes: float, per_shard: float) -> int:
    """Writes configuration, index and shards; returns the number of blocks."""
    from transformers import LlamaConfig

    ends, block = _shapes(None), _shapes(0)
    blocks = max(4, round((gigabytes * 1e9 - _bytes(ends)) / _bytes(block)))
    config = LlamaConfig(
        **SHAPE, **HEADS, num_hidden_layers=blocks, dtype="bfloat16", architectures=["LlamaForCausalLM"]
    )
    config.save_pretrained(folder)
    shards, filled = [{}], 0
    for name, shape in [item for number in range(blocks) for item in _shapes(number).items()] + list(ends.items()):
        size = _bytes({name: shape})
        if filled and filled + size > per_shard * 1e9:
            shards, filled = [*shards, {}], 0
        shards[-1][name], filled = shape, filled + size
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(map(_bytes, shards))
    index = {"metadata": {"total_size": total, "total_parameters": total // 2}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return blocks


def _shapes(block: int | None) -> dict[str, tuple[int, ...]]:
    """The tensors of a block, or those outside of all blocks."""
    hidden, wide = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    if block is None:
        rows = (SHAPE["vocab_size"], hidden)
        return {"model.embed_tokens.weight": rows, "model.norm.weight": (hidden,), "lm_head.weight": rows}
    narrow = hidden * HEADS["num_key_value_heads"] // HEADS["num_attention_heads"]
    rows = {"q": hidden, "k": narrow, "v": narrow, "o": hidden}
    shapes = {f"self_attn.{name}_proj": (count, hidden) for name, count in rows.items()}
    shapes |= {"mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide)}
    shapes |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    return {f"model.layers.{block}.{name}.weight": shape for name, shape in shapes.items()}


def _bytes(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(2 * shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes.values())


def _write_shard(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + _bytes({name: shape})
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    piece = os.urandom(PIECE)
    with file.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, PIECE):
            target.write(piece[: end - start])


def _plan(folder: Path, blocks: int) -> Any:
    from transformers import AutoConfig

    from optimum_blockprune import PruningPlan

    return PruningPlan.from_blocks(AutoConfig.from_pretrained(folder), removed=list(range(1, blocks - 1, 4)))


# --- the two ways --------------------------------------------------------------------------------------------------


def _apply(folder: Path, cache: str, *, plain: bool = False) -> Timing:
    """One run of `apply_to_checkpoint`, its result stays for `cp`; `plain` hides the optional packages."""
    target = folder / "pruned"
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, __file__, "--child", *map(str, (folder / "plan.json", folder / "dense", target))]
    command += ["--plain"] * plain
    memory: list[int] = []

    def run() -> None:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            while process.poll() is None:
                memory.append(_status(process.pid).get("RssAnon", 0))
                time.sleep(0.02)
            said.append(json.loads(process.stdout.read().splitlines()[-1]))
        if process.returncode:
            raise SystemExit(f"The run failed with code {process.returncode}.")

    said: list[Timing] = []
    timing = _timed(run, folder / "dense", target, cache)
    phases = json.loads((target / "pruning_report.json").read_text())["seconds"]
    # fsync belongs to the copying.
    copying = phases["save"] + timing["fsync"]
    return {**timing, **said[0], **phases, "save": copying, "peak_anonymous_bytes": max(memory)}


def _child(plan: Path, source: Path, target: Path) -> None:
    begin = time.perf_counter()
    from optimum_blockprune import PruningPlan, checkpoint

    imports, before = time.perf_counter() - begin, _status("self")["VmHWM"]
    checkpoint.apply_to_checkpoint(PruningPlan.from_file(plan), source, target, verify="keys")
    said = {"imports": imports, PEAK: _status("self")["VmHWM"], f"{PEAK}_of_imports": before}
    sys.stdout.write(json.dumps(said) + "\n")


def _hide(packages: Collection[str]) -> None:
    """Makes them look as if they were not installed."""
    found = importlib.util.find_spec
    sys.modules.update(dict.fromkeys(packages))
    importlib.util.find_spec = lambda name, package=None: None if name in packages else found(name, package)


def _copy(folder: Path, cache: str) -> Timing:
    source, target = folder / "pruned", folder / "copy"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    files = sorted(map(str, source.glob("*.safetensors")))
    return _timed(lambda: subprocess.run(["cp", *files, str(target)], check=True), source, target, cache)


def _timed(run: Callable[[], Any], source: Path, target: Path, cache: str) -> Timing:
    """Seconds of a run until its files are on the disk."""
    _prepare(source, cache)
    os.sync()  # what was written before does not count
    begin = time.perf_counter()
    run()
    ran = time.perf_counter()
    for file in _weights(target):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    end = time.perf_counter()
    return {"seconds": end - begin, "fsync": end - ran}


def _prepare(source: Path, cache: str) -> None:
    """Brings all pages of the source into the cache, or takes them out of it."""
    for file in _weights(source):
        with file.open("rb") as opened:
            if cache == "cold":
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while opened.read(PIECE):
                    pass


def _weights(folder: Path) -> Iterator[Path]:
    return iter(sorted(folder.glob("*.safetensors")))


def _status(process: int | str) -> dict[str, int]:
    """The sizes in /proc/.../status, in bytes."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except OSError:  # it ended
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}


# --- what is said --------------------------------------------------------------------------------------------------


def _sizes(folder: Path) -> dict[str, int]:
    dense, pruned = ([file.stat().st_size for file in _weights(folder / name)] for name in ("dense", "pruned"))
    return {"bytes": sum(dense), "files": len(dense), "kept_bytes": sum(pruned), "kept_files": len(pruned)}


def _medians(runs: list[Timing]) -> Timing:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def _versions() -> dict[str, str]:
    from optimum_blockprune.environment import versions

    return versions()


def _file_system(folder: Path) -> str:
    done = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def _table(report: dict[str, Any]) -> str:
    apply, cp, sizes = report["apply"], report["cp"], report["checkpoint"]
    rows = {
        "cp of the kept bytes": cp["seconds"],
        "apply: whole process": apply["seconds"],
        "  imports": apply["imports"],
        "  load (configuration, headers)": apply["load"],
        "  save (copying, fsync)": apply["save"],
        "  verification": apply["verification"],
    }
    lines = [
        f"{sizes['bytes'] / 1e9:.2f} GB in {sizes['files']} files, kept: {sizes['kept_bytes'] / 1e9:.2f} GB in "
        f"{sizes['kept_files']}; {report['disk']}, cache {report['cache']}; medians of {len(report['runs']['cp'])}",
        report["device"],
        "",
        *(f"{name:<34}{seconds:>8.2f} s{seconds / cp['seconds']:>8.2f} x cp" for name, seconds in rows.items()),
        *(_memory_line(name, report[key]) for name, key in (("peak memory", "apply"), (PLAIN_NAME, "plain"))),
    ]
    return "\n".join(lines) + "\n"


def _memory_line(name: str, timing: Timing) -> str:
    peak, imports, anonymous = (timing[key] / 1e6 for key in (PEAK, f"{PEAK}_of_imports", "peak_anonymous_bytes"))
    return f"{name:<34}{peak:>8.0f} MB; after the imports {imports:.0f} MB; anonymous at most {anonymous:.0f} MB"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gigabytes", type=float, default=8.0, help="of the dense checkpoint; three times as much disk is needed"
    )
    parser.add_argument("--shard-gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--cache", choices=("cold", "warm"), default="cold", help="pages of the source before each run"
    )
    parser.add_argument("--folder", help="where to write; default: the temporary directory")
    parser.add_argument("--output", help="JSON file")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
