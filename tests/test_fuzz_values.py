# SPDX-License-Identifier: Apache-2.0
"""Plans, configurations and reports from anybody: either they are read, or our error says what is wrong with them."""

from __future__ import annotations

import json
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzzing import FUZZ, HOSTILE, VALUES, mutated, nested, spoiled, written
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_blockprune import BlockPruningConfig, PruningPlan, PruningReport
from optimum_blockprune.errors import BlockPruningError, CheckpointError, ConfigurationError, PlanError
from optimum_blockprune.folds import Fold, Folds
from optimum_blockprune.half import Half
from optimum_blockprune.widths import CutAttribute, CutTensor, Narrowing, UnitGroup, Width


MANY = settings(FUZZ, max_examples=400)
SOME = settings(FUZZ, max_examples=120)

GROUP = UnitGroup(
    "mlp",
    "channel",
    "mlp.down_proj",
    8,
    {"intermediate_size": 1},
    {"head_dim": 4},
    (CutTensor("mlp.down_proj.weight", 1, (1,)), CutTensor("mlp.up_proj.weight", 0, (1,), 2)),
    (CutAttribute("mlp", "width", 1, 2),),
)
NARROW = Width("padded", (GROUP,), tuple(Narrowing(block, 0, (0, 1, 2, 5)) for block in (0, 2, 4)), (6,))
PLAN = PruningPlan.from_removed(
    "llama",
    5,
    [3, 1],
    width=NARROW,
    strategy="sleb",
    base_model="me/dense",
    requested={"num_blocks": 2},
    scores={"1": 0.5, "3": 0.25},
    steps=({"block": 3, "loss": 2.0, "candidates": {"1": 2.5, "3": 2.0}},),
    details={"dense_loss": 1.0, "parts": [{"strategy": "sleb", "scores": {"1": 0.5}, "steps": [], "seed": 0}]},
    calibration={"source": "texts", "windows": 4},
    options={"early_stop": True},
    versions={"torch": "2"},
    nested=False,
    smaller={"1": (1,)},
).to_dict()
# Blocks (0, 0), (1, 3), (4, 4): block 1 has the channels of block 3.
HALVED = PruningPlan.from_halves(
    "llama",
    5,
    [Half(1, "mlp"), Half(2, "attention"), Half(2, "mlp"), Half(3, "attention")],
    {"self_attn": "attention", "mlp": "mlp"},
    width=Width("per_layer", (GROUP,), tuple(Narrowing(block, 0, (0, 1, 2, 5)) for block in (0, 3, 4))),
    folds=Folds((Fold(1, "self_attn.o_proj", "matrix", 0, 0.0, "x"), Fold(3, "mlp.down_proj", "matrix", 0, 0.0, "y"))),
).to_dict()
CONFIG = BlockPruningConfig("sleb", num_blocks=2, dataset="wikitext2", strategy_options={}).to_dict()
REPORT = PruningReport(
    requested={"num_blocks": 2},
    strategy="sleb",
    removed_blocks=[3, 1],
    tokens=64,
    seconds={"search": 1.0},
    scores={"1": 0.5},
    steps=[{"block": 3, "loss": 2.0}],
    evaluations=[{"label": "dense", "perplexity": 20.0}],
    versions={"torch": "2"},
).to_dict()


def read_or_refused(read: Callable[[Any], Any], data: Any, error: type[BlockPruningError]) -> Any:
    """What was read, which survives being written and read again; `None` where our error was raised, in few words."""
    try:
        found = read(data)
    except error as refusal:
        assert str(refusal).strip()
        return None
    said = found.to_dict()
    assert json.dumps(type(found).from_dict(json.loads(json.dumps(said))).to_dict()) == json.dumps(said)
    return found


def from_file(reader: Callable[[Path], Any], content: bytes) -> Callable[[Any], Any]:
    """Reads a file with this content."""

    def read(_: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file.json"
            path.write_bytes(content)
            return reader(path)

    return read


@MANY
@given(mutated(PLAN))
def test_changed_plans(data: Any) -> None:
    plan = read_or_refused(PruningPlan.from_dict, data, PlanError)
    if plan is not None:
        # What is read can be used: joined, cut short, turned into a configuration.
        assert plan.parts()
        for use in (lambda: BlockPruningConfig.from_plan(plan), lambda: plan.truncate(1), plan.width.fields):
            try:
                use()
            except BlockPruningError as error:
                assert str(error)


@SOME
@given(mutated({**PLAN, "width": Width().to_dict(), "nested": True, "details": {}}))
def test_changed_plans_of_whole_blocks(data: Any) -> None:
    plan = read_or_refused(PruningPlan.from_dict, data, PlanError)
    if plan is not None and plan.removed_blocks and not plan.width:
        assert len(plan.truncate(len(plan.removed_blocks)).removed_blocks) == len(plan.removed_blocks)


@MANY
@given(mutated(HALVED))
def test_changed_plans_of_halves_and_units(data: Any) -> None:
    plan = read_or_refused(PruningPlan.from_dict, data, PlanError)
    if plan is None:
        return
    # Whatever becomes narrower, or gets a map, is there; and the plan can be joined with one for what it leaves.
    writers = [(each.block, plan.width.groups[each.group].writer) for each in plan.width.narrowed]
    for block, module in (*writers, *((each.block, each.module) for each in plan.folds.entries)):
        assert plan.old_place(plan.new_place(block, module), module) == block
    last = len(plan.blocks) - 1
    if last:
        later = PruningPlan.from_removed(plan.model_type, last + 1, [last], stack=plan.stack)
        try:
            joined = plan.then(later)
        except PlanError as error:
            assert str(error)  # a map goes, and the file with the others is not there
        else:
            assert len(joined.blocks) == last and PruningPlan.from_dict(joined.to_dict()) == joined


@SOME
@given(HOSTILE)
def test_any_value_as_a_plan(data: Any) -> None:
    assert read_or_refused(PruningPlan.from_dict, data, PlanError) is None


@SOME
@given(spoiled(written(PLAN)) | mutated(PLAN).map(written))
def test_plan_files(content: bytes) -> None:
    read_or_refused(from_file(PruningPlan.from_file, content), None, PlanError)


@MANY
@given(mutated(CONFIG) | st.dictionaries(st.sampled_from(sorted(CONFIG)), VALUES))
def test_changed_configurations(data: Any) -> None:
    read_or_refused(BlockPruningConfig.from_dict, data, ConfigurationError)


@SOME
@given(spoiled(written(CONFIG)) | mutated(CONFIG).map(written) | HOSTILE.map(written))
def test_configuration_files(content: bytes) -> None:
    read_or_refused(from_file(BlockPruningConfig.from_pretrained, content), None, ConfigurationError)


@SOME
@given(mutated(REPORT) | HOSTILE)
def test_changed_reports(data: Any) -> None:
    read_or_refused(PruningReport.from_dict, data, CheckpointError)


@SOME
@given(spoiled(written(REPORT)) | mutated(REPORT).map(written))
def test_report_files(content: bytes) -> None:
    read_or_refused(from_file(PruningReport.from_file, content), None, CheckpointError)


# What was found, spelled out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_blocks": 10**18}, "do not make up"),
        ({"details": nested(65)}, "levels deep"),
        ({"details": {"deep": nested(3000, "dict")}}, "levels deep"),
        ({"format_version": nested(3000)}, "levels deep"),
        ({"base_model": "\ud800"}, "half of a character"),
        ({"details": []}, "'details' must be an object"),
        ({"seed": "0"}, "'seed' must be a whole number, not '0'"),
        ({"scores": {"1": "low"}}, r"'scores' must be an object \(a number each\)"),
        ({"smaller": {"1": [True]}}, "'smaller' must be"),
        ({"format_version": True}, "format_version True"),
        ({"details": {"parts": []}}, "'parts' of its details"),
        ({"details": {"parts": [{"seed": 1}]}}, "'strategy' of a part"),
        ({"width": {**PLAN["width"], "more": 1}}, "Unknown fields in the width of the plan: more"),
    ],
)
def test_plans_that_were_read_before(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PruningPlan.from_dict({**PLAN, **fields})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("narrowed", 0, "kept"), "0-999999999999", "more than 16777216 kept units"),
        (("narrowed", 0, "means"), [float("nan")] * 4, "means must be finite"),
        (("groups", 0, "tensors"), [], "no units or tensors"),
        (("groups", 0, "tensors", 0, "axis"), -1, "axis and rest are 0 or more"),
        (("groups", 0, "tensors", 1, "parts"), [], "parts 1 or more"),
        (("groups", 0, "units"), 8.0, "'units' must be a whole number"),
        (("groups", 0, "fields"), {"intermediate_size": None}, "'fields' must be an object"),
    ],
)
def test_widths_that_were_read_before(path: tuple[Any, ...], value: Any, message: str) -> None:
    data = json.loads(json.dumps(PLAN))
    place = data["width"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(PlanError, match=message):
        PruningPlan.from_dict(data)


def test_no_other_file_is_read_for_a_configuration(tmp_path: Path) -> None:
    """Optimum would go on to the file that this key names."""
    (tmp_path / "block_pruning_config_0.json").write_text('{"strategy": "random"}')
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "block_pruning_config.json").write_text(
        json.dumps({"configuration_files": ["../block_pruning_config_0.json"]})
    )
    with pytest.raises(ConfigurationError, match="Unknown field 'configuration_files'"):
        BlockPruningConfig.from_pretrained(folder)


class Exploit:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize(
    ("reader", "error"),
    [
        (PruningPlan.from_file, PlanError),
        (PruningReport.from_file, CheckpointError),
        (BlockPruningConfig.from_pretrained, ConfigurationError),
    ],
)
def test_nothing_is_unpickled(reader: Callable[[Path], Any], error: type[BlockPruningError], tmp_path: Path) -> None:
    file, marker = tmp_path / "file.json", tmp_path / "marker"
    file.write_bytes(pickle.dumps(Exploit(marker)))
    with pytest.raises(error):
        reader(file)
    assert not marker.exists()
    pickle.loads(file.read_bytes())
    assert marker.exists()
