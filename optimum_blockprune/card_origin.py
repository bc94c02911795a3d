# SPDX-License-Identifier: Apache-2.0
"""What a card says of where a model comes from: how to make it again, the dense model, its past and licence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from .card_data import calibrations, direct_base, direct_repo, licence_link
from .card_text import FAMILIES, HUB, code, counted, fenced, figure, hub_text, last_part, model_name, plain, text_name
from .json_values import fits
from .plan import PruningPlan
from .report import PruningReport
from .reproduce import PLACEHOLDER, PRUNED, apply_command


# What a budget that is measured leaves in a plan's details; see `budgets`.
_FIGURES = ("perplexity_dense", "perplexity", "increase", "kl", "speedup", "prefill_speedup", "decode_speedup")
_PROOFS = {
    "logits": "The written checkpoint was loaded again and gave the outputs of the dense model with these parts "
    "switched off.",
    "keys": "The names and shapes of the written checkpoint were checked; its outputs were not.",
}

_HEALED = "The written checkpoint was loaded again and gave the outputs of the trained model in memory."


def again(plan: PruningPlan, report: PruningReport) -> Iterator[str | None]:
    """The commands, and everything that the choice depends on."""
    loading = {name: report.base[name] for name in ("revision", "gguf_file", "subfolder") if name in report.base}
    loading |= {"trust_remote_code": True} if report.base.get("remote_code") else {}
    base = direct_base(plan, report)
    applied = apply_command(plan.with_provenance(base_model=base), loading=loading)
    if report.command and report.command != applied:
        yield f"This command makes the same checkpoint{_before(report)}:"
        yield fenced(report.command, "shell")
    if applied:
        weights = f"the same weights{_before(report)}"
        yield f"`pruning_plan.json` in this folder says what stays. It makes {weights} without data and search:"
        yield fenced(applied, "shell")
    else:
        yield (
            "`pruning_plan.json` in this folder says what stays. The dense model is a GGUF file: load it with "
            "`BlockPruner.from_pretrained`, then `prune(plan=PruningPlan.from_file(...))`."
        )
    if PLACEHOLDER in f"{report.command} {applied}":
        known = direct_repo(plan, report) is not None
        here = f", here {model_name(base, loaded=known)}" if base else ""
        unknown = "" if known else ", which is not known to be on the Hub"
        yield f"`{PLACEHOLDER}` stands for the dense model{here}{unknown}."
    if "--dataset" in str(report.command) and not all(
        hub_text(str(each.get("source"))) for each in calibrations(plan, report)
    ):
        yield "The calibration text is a file that is not in this folder; its fingerprint tells whether another is it."
    yield from _trained(report)
    yield "\n".join(f"- {line}" for line in _settings(plan, report))


def _before(report: PruningReport) -> str:
    return " as it was before the training" if report.healings else ""


def _trained(report: PruningReport) -> Iterator[str | None]:
    """How the training is done again; other machines round differently, so the weights will not be the same bits."""
    for entry in report.healings:
        if entry.get("command"):
            yield f"This command trains the result alike; `{PRUNED}` stands for its folder:"
            yield fenced(entry["command"], "shell")
        else:
            yield "It was then trained on text in memory, so that no command does it again."


def _settings(plan: PruningPlan, report: PruningReport) -> Iterator[str]:
    parts = plan.parts()
    yield from _split(plan.details.get("mix"))
    for part in parts:
        name = code(part["strategy"])
        of, by = (f" of {name}", f" by {name}") if len(parts) > 1 else ("", "")
        yield f"Asked for{by}: {_pairs(part.get('requested'))}"
        yield from _reached(part.get("details"))
        yield f"Options{of}: {_pairs(part.get('options'))}"
        yield f"Seed{of}: {part.get('seed', 0)}"
    for each in calibrations(plan, report):
        yield f"Calibration text: {_calibration(each)}"
    if not calibrations(plan, report):
        yield "Calibration text: none was used"
    for entry in report.healings:
        settings = {"steps": entry["steps"], **(entry.get("settings") or {})}
        yield f"Trained by {code(entry['method'])}: {_pairs(settings)}"
        yield f"Training text: {_calibration(entry)}"
    if report.verification:
        mode = report.verification.get("mode")
        proofs = {**_PROOFS, "logits": _HEALED} if report.healings else _PROOFS
        yield f"Proof: {proofs.get(mode, 'passed.') if report.verification.get('passed') else 'none was made.'}"
    if report.versions:
        yield f"Versions: {_versions(report.versions)}"
    if plan.versions and dict(plan.versions) != report.versions:
        yield f"Versions that chose: {_versions(plan.versions)}"


def _split(mix: Any) -> Iterator[str]:
    """How depth and width came to share one budget."""
    trail = mix.get("trail") if isinstance(mix, Mapping) else None
    if not fits(trail, list[Mapping[str, Any]]) or not fits(mix.get("target_params"), int):
        return
    tried = [
        f"{counted(each['removed'], 'block')} {figure(each.get('kl'), 4)}"
        for each in trail
        if fits(each.get("removed"), int) and fits(each.get("kl"), float | None)
    ]
    yield (
        f"Split between depth and width: at most {mix['target_params']:,} parameters; KL from the dense model on "
        f"held-out text, nats per token, by the number of blocks that go: {', '.join(tried)}"
    )
    yield from _held_out(mix.get("held_out"))


def _reached(details: Any) -> Iterator[str]:
    """What was measured for a budget that only measuring turns into a number of blocks."""
    budget = details.get("budget") if isinstance(details, Mapping) else None
    if not isinstance(budget, Mapping):
        return
    figures = {name: f"{budget[name]:.4g}" for name in _FIGURES if fits(budget.get(name), float)}
    if figures:
        yield f"Reached: {_pairs(figures)}"
    yield from _held_out(budget.get("held_out"))


def _held_out(text: Any) -> Iterator[str]:
    if isinstance(text, Mapping) and all(fits(text.get(name), float) for name in ("windows", "seqlen", "tokens")):
        yield f"Held-out text that this was measured on: {_calibration(text)}"


def _versions(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{plain(name)} {plain(each)}" for name, each in versions.items())


def _pairs(values: Mapping[str, Any] | None) -> str:
    """Names and values, the same whether they come from a file or not."""
    return ", ".join(code(f"{name}={_value(value)}") for name, value in (values or {}).items()) or "none"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _calibration(entry: Mapping[str, Any]) -> str:
    """Which text, how much of it, and the fingerprint that tells whether another one is the same."""
    parts = [code(text_name(str(entry.get("source", "unnamed text"))))]
    if entry.get("windows") is not None:
        parts.append(f"{counted(entry['windows'], 'window')} of {figure(entry.get('seqlen'))} tokens")
    if entry.get("tokens") is not None:
        parts.append(f"{counted(entry['tokens'], 'token')} in all")
    if entry.get("recipe"):
        parts.append(f"recipe {code(entry['recipe'])}")
    return ", ".join([*parts, f"fingerprint {code(entry.get('fingerprint', 'unknown'))}"])


def origin(plan: PruningPlan, report: PruningReport) -> Iterator[str | None]:
    """The dense model, what was pruned from it before, and its licence."""
    base, repo = report.base, direct_repo(plan, report)
    name = model_name(direct_base(plan, report), loaded=repo is not None)
    commit = f", commit {code(base['revision'])}" if base.get("revision") else ""
    card = f"; what it is good for is said in [its own card]({HUB}/{repo})" if repo else ""
    known = direct_base(plan, report) is not None
    yield f"The dense model is {name}{commit}{card}." if known else "The name of the dense model is not known."
    if report.history:
        yield "It was pruned before, the oldest step first:"
        yield "\n".join(f"{place}. {_earlier(each)}" for place, each in enumerate(report.history, 1))
    yield _licence(plan, report)


def _earlier(entry: Mapping[str, Any]) -> str:
    gone = []
    if entry.get("removed_blocks"):
        blocks = ", ".join(map(str, entry["removed_blocks"]))
        gone.append(f"blocks {plain(blocks)} of {figure(entry.get('num_blocks'))}")
    gone += [
        f"{figure(each['before'] - each['after'])} of {figure(each['before'])} {plain(FAMILIES.get(family, family))}"
        for family, each in (entry.get("units") or {}).items()
    ]
    tool = (entry.get("versions") or {}).get("optimum-blockprune")
    by = f" by {code(entry.get('strategy', 'unknown'))}" + (f" (optimum-blockprune {plain(tool)})" if tool else "")
    trained = ", and its weights were trained afterwards" if entry.get("healing") else ""
    return f"{model_name(entry.get('base_model'))} lost {' and '.join(gone) or 'nothing'}{by}{trained}"


def _licence(plan: PruningPlan, report: PruningReport) -> str:
    """What the dense model's own card states; nothing is made up."""
    base, link = report.base, licence_link(plan, report)
    stated = base.get("license_name") or base.get("license")
    if not stated:
        return "Licence: not known, because none was found with the dense model. Look there before you use this one."
    names = ", ".join(map(code, stated if isinstance(stated, list) else [stated]))
    terms = f" ([terms]({link}))" if link else ""
    place = base.get("card")
    seen = f", read from {_place(place)}" if place else ""
    return f"Licence: that of the dense model, {names}{terms}{seen}."


def _place(place: str) -> str:
    return f"[its card]({place})" if place.startswith(f"{HUB}/") else code(last_part(place))
