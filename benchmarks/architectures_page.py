# SPDX-License-Identifier: Apache-2.0
"""Renders `docs/architectures.md` from the outcome of a sweep and the architecture table; pure text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any


GROUPS = {
    "causal": "Causal language models",
    "multimodal": "Text decoders of models with images, video or sound",
    "encoder": "Encoders",
    "encoder-decoder": "Encoder-decoders",
}
_HEAD = """# Architectures

*Written by `benchmarks/architectures.py` from a run of {date}; do not edit.* {machine}; {versions}.

Every type that can be built from a tiny configuration was pruned in several ways: the first inner block, two that
are no neighbours, the last block, the first block, a random choice, and all blocks of every kind that the model
has. A removal is **exact** if the pruned model in memory, and the saved folder loaded by its own class of
transformers, give the logits of the dense model with the removed blocks bypassed (2e-4 of the largest, on image
inputs as well where there are any), and cached greedy generation agrees with uncached. It is **refused** if an
error with the type, the reason and what would be allowed came before the first forward pass. "Wrong" counts
everything else.

{totals}

"Files" says whether `apply` can also rewrite the files of a checkpoint without building the model.
Ask about a model of your own with

```shell
optimum-cli blockprune check -m MODEL
```
"""


def render(outcome: Mapping[str, Any], table: Mapping[str, Any]) -> str:
    """Returns the page.

    Args:
        outcome: As `benchmarks/architectures.py` stores it.
        table: `architectures.json`.
    """
    versions = ", ".join(f"{name} {number}" for name, number in outcome["versions"].items())
    head = _HEAD.format(
        date=outcome["date"], machine=outcome["machine"], versions=versions, totals=_totals(outcome["subjects"])
    )
    parts = [head.rstrip()]
    parts += ["\n".join(_group(group, outcome["subjects"])) for group in GROUPS]
    parts += ["\n".join(_constraints(table)), "\n".join(_fields(table)), "\n".join(_unbuilt(outcome["unbuilt"]))]
    return "\n\n".join(parts) + "\n"


def families(outcome: Mapping[str, Any]) -> set[str]:
    """The types that the sweep proves: every removal exact or refused, and at least one exact."""
    exact, wrong = set(), set()
    for entry in outcome["subjects"].values():
        types = {entry["model_type"], entry["text_type"]}
        statuses = {verdict[0] for verdict in entry["removals"].values()}
        exact |= types if "exact" in statuses else set()
        wrong |= types if statuses - {"exact", "refused"} else set()
    return exact - wrong


def _totals(subjects: Mapping[str, Any]) -> str:
    rows = ["| | types | exact | with constraints | refused | removals exact | refused | wrong |", "|" + "---|" * 8]
    for group, title in GROUPS.items():
        kinds = {"exact": set(), "constrained": set(), "refused": set()}
        removals: Counter[str] = Counter()
        for name, entry in _of(group, subjects):
            verdicts = _proper(entry)
            removals.update(verdict[0] for verdict in verdicts.values())
            statuses = {verdict[0] for verdict in verdicts.values()}
            kind = "refused" if "exact" not in statuses else "exact" if statuses == {"exact"} else "constrained"
            kinds[kind].add(_type(name))
        kinds["exact"] -= kinds["constrained"]
        kinds["refused"] -= kinds["exact"] | kinds["constrained"]
        counts = [len(kinds[kind]) for kind in ("exact", "constrained", "refused")]
        wrong = sum(count for status, count in removals.items() if status not in ("exact", "refused"))
        rows.append(
            f"| {title} | {sum(counts)} | {counts[0]} | {counts[1]} | {counts[2]} | {removals['exact']} | "
            f"{removals['refused']} | {wrong} |"
        )
    return "\n".join(rows)


def _group(group: str, subjects: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {GROUPS[group]}\n"
    yield "| type | exact | refused | files | notes |"
    yield "|---|---|---|---|---|"
    alike: dict[str, list[str]] = {}
    for name, entry in _of(group, subjects):
        alike.setdefault(_row(entry), []).append(name)
    for row, names in sorted(alike.items(), key=lambda item: (-len(item[1]), item[1])):
        yield f"| {', '.join(names)} | {row} |"


def _row(entry: Mapping[str, Any]) -> str:
    verdicts = _proper(entry)
    refused = {label: verdict for label, verdict in verdicts.items() if verdict[0] != "exact"}
    exact = "all" if not refused else ", ".join(label for label in verdicts if label not in refused) or "none"
    files = "yes" if entry["removals"]["files"][0] == "exact" else "-"
    reasons = dict.fromkeys(_short(verdict[2]) for verdict in refused.values())
    notes = dict.fromkeys(verdict[2] for verdict in verdicts.values() if verdict[0] == "exact" and verdict[2])
    text = "; ".join([*reasons, *notes]).replace("|", "\\|").replace("\n", " ")
    return f"{exact} | {', '.join(refused) or '-'} | {files} | {text}"


def _short(reason: str) -> str:
    """A refusal without its subject and its advice, which depend on the blocks."""
    _, separator, rest = reason.partition("exactly: ")
    return (rest if separator else reason).split(". ")[0].rstrip(".")


def _constraints(table: Mapping[str, Any]) -> Iterator[str]:
    yield "## Which blocks must stay, and why\n"
    yield "| rule | about | reason |"
    yield "|---|---|---|"
    for row in (*table["constraints"], *table["uncached"]):
        about = [*row.get("model_types", ()), *(f"`{row[key]}`" for key in ("field", "root_field") if key in row)]
        yield f"| {row['rule']} | {', '.join(about)} | {row['reason']} |"


def _fields(table: Mapping[str, Any]) -> Iterator[str]:
    yield "## Configuration fields that follow\n"
    rules: dict[str, list[str]] = {}
    for name, row in table["fields"].items():
        rules.setdefault(row["rule"], []).append(f"`{name}`")
    yield "| rule | fields |"
    yield "|---|---|"
    yield from (f"| {rule} | {', '.join(names)} |" for rule, names in rules.items())


def _unbuilt(unbuilt: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    yield "## Not tried\n"
    yield "No tiny model of these could be built or run here; a real one has to pass the gate like any other.\n"
    yield "| type | why |"
    yield "|---|---|"
    for reasons in unbuilt.values():
        yield from (f"| {name} | {reason} |" for name, reason in sorted(reasons.items()))


def _of(group: str, subjects: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name.partition("/")[2], entry) for name, entry in subjects.items() if name.startswith(f"{group}/")]


def _type(name: str) -> str:
    return name.partition(":")[0].partition("#")[0]


def _proper(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {label: verdict for label, verdict in entry["removals"].items() if label != "files"}
