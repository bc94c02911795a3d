# SPDX-License-Identifier: Apache-2.0
"""The pruning plan: what is kept, decided once, never changed.

A plan is the only thing that passes from the strategies (which decide) to the surgery (which executes). It speaks of
what is *kept*: for every block of the result, the original block its attention half and its MLP half come from (the
same one, unless half-blocks were removed), and the units of width that each block keeps. A plan reads and writes
no weights itself; `apply` and `apply_to_checkpoint` hand it to `surgery` and `checkpoint`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import PlanError
from .folds import FOLDS_SUFFIX, Folds
from .half import ATTENTION, BlockSource, Half, Unit, joined_halves, read_units, sorted_halves
from .json_values import json_fault, read_json
from .plan_changes import followed, truncated
from .plan_rules import PART_FIELDS, check_parts, check_types
from .widths import Width


PLAN_FILE = "pruning_plan.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class PruningPlan:
    """An immutable, validated list of what to keep, with the reasons.

    Attributes:
        model_type: `config.model_type` of the text decoder that the plan was made for.
        num_blocks: Number of blocks before pruning.
        blocks: One `BlockSource` per block of the result, in order.
        removed_blocks: Original indices of the blocks that are gone altogether, in the order of removal.
        removed_halves: Where half-blocks were removed: all of them, such as `"4.mlp"`, in the order of removal.
        halves: Where half-blocks were removed, or a smaller choice removes some: to which half the modules of a block
            belong, by name (`{"self_attn": "attention", "mlp": "mlp"}`).
        width: The channels and heads that each kept block keeps; empty where all stay.
        folds: What goes into weights that stay, to make up for what is gone; see `folds`.
        stack: The stack that loses them, `"decoder"` or `"encoder"`.
        strategy: Name of the strategy that chose them; `"manual"` if the user did.
        base_model: Repo id or path of the dense model, if known.
        requested: The budget as it was asked for, e.g. `{"sparsity": 0.25}`.
        scores: Score of each block measured on the dense model, by block number as a string; what a score means, and
            whether low or high ones go first, belongs to the strategy.
        steps: One entry per decision, in order; its keys belong to the strategy (SLEB: `block`, `loss`, `candidates`).
        details: Further figures of the strategy (estimator, violation rates, ...).
        calibration: Source, fingerprint, windows and tokens of the calibration set; `None` if no data was used.
        options: The options of the strategy as used.
        seed: Seed of the choice.
        versions: Versions of the packages that made the plan.
        nested: Whether a smaller budget would have removed a prefix of `removed_blocks`; `None` if nobody knows.
        smaller: Where it would not: what each smaller number of blocks would have been, by that number as a string;
            blocks by number, or all of it as halves by name.

    Raises:
        PlanError: When the parts contradict each other.
    """

    model_type: str
    num_blocks: int
    blocks: tuple[BlockSource, ...]
    removed_blocks: tuple[int, ...]
    removed_halves: tuple[str, ...] = ()
    halves: Mapping[str, str] = field(default_factory=dict)
    width: Width = Width()
    folds: Folds = Folds()
    stack: str = "decoder"
    strategy: str = "manual"
    base_model: str | None = None
    requested: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    steps: tuple[Mapping[str, Any], ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    nested: bool | None = None
    smaller: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        check_parts(self)

    @property
    def kept_blocks(self) -> tuple[int, ...]:
        """Original indices of the blocks that stay, ascending; where halves were joined, of their attention."""
        return tuple(source.attention for source in self.blocks)

    @property
    def num_removed(self) -> int:
        """How many blocks shallower the result is; two halves are worth one block."""
        return self.num_blocks - len(self.blocks)

    @property
    def removed_names(self) -> tuple[str, ...]:
        """What goes, in the order of removal: `"3"` is a block, `"3.mlp"` a half of one."""
        return self.removed_halves or tuple(map(str, self.removed_blocks))

    @property
    def removed_units(self) -> tuple[Unit, ...]:
        """What is switched off in the dense model to make it equal the pruned one."""
        return tuple(map(Half.read, self.removed_halves)) or self.removed_blocks

    def part_of(self, module: str) -> str:
        """The half that a module of a block belongs to; the block itself goes with its attention half."""
        return self.halves.get(module.partition(".")[0], ATTENTION)

    def old_place(self, block: int, module: str) -> int:
        """Number of the original block from which a module of a block of the result comes."""
        return self.blocks[block].of(self.part_of(module))

    def new_place(self, block: int, module: str) -> int | None:
        """Number of the block of the result in which a module of an original block comes to lie; `None` if it goes.

        Args:
            block: Its original block.
            module: Its name inside the block; empty for the block itself.
        """
        part = self.part_of(module)
        sources = [source.of(part) for source in self.blocks]
        return sources.index(block) if block in sources else None

    @classmethod
    def from_removed(cls, model_type: str, num_blocks: int, removed: Iterable[int], **provenance: Any) -> PruningPlan:
        """Builds the plan that removes whole blocks `removed` (original indices, in the order of removal)."""
        order = tuple(removed)
        for block in order:
            if isinstance(block, bool) or not isinstance(block, int) or not 0 <= block < num_blocks:
                raise PlanError(f"Block {block!r} does not exist: this model has blocks 0 to {num_blocks - 1}.")
        gone = set(order)
        blocks = tuple(BlockSource(index, index) for index in range(num_blocks) if index not in gone)
        return cls(model_type=model_type, num_blocks=num_blocks, blocks=blocks, removed_blocks=order, **provenance)

    @classmethod
    def from_halves(
        cls, model_type: str, num_blocks: int, removed: Iterable[Half], halves: Mapping[str, str], **provenance: Any
    ) -> PruningPlan:
        """Builds the plan that removes half-blocks.

        Args:
            model_type: See the class.
            num_blocks: Number of blocks before pruning.
            removed: In the order of removal. What is left must alternate: attention, MLP, attention, ...
            halves: See the class.
            **provenance: Further fields.

        Raises:
            PlanError: A half does not exist, is named twice, or what is left does not make up blocks.
        """
        order = tuple(removed)
        pairs, whole = joined_halves(num_blocks, order)
        blocks = tuple(BlockSource(attention, mlp) for attention, mlp in pairs)
        return cls(
            model_type=model_type,
            num_blocks=num_blocks,
            blocks=blocks,
            removed_blocks=whole,
            removed_halves=tuple(map(str, order)),
            halves=dict(halves),
            **provenance,
        )

    @classmethod
    def from_blocks(
        cls, model_or_config: Any, removed: Iterable[int | str], *, stack: str | None = None
    ) -> PruningPlan:
        """Builds a plan for blocks that the user names, without data and without a search.

        Args:
            model_or_config: A loaded model, or its configuration (which does not tell halves).
            removed: Original indices of the blocks to remove; the order is kept as the order of removal. Halves of
                blocks by name, such as `"4.mlp"` and `"5.attention"`: what is left must make up blocks.
            stack: `"decoder"` or `"encoder"` of an encoder-decoder; by default its decoder.

        Raises:
            PlanError: A block does not exist, is named twice, or nothing would be left.
            UnsupportedModelError: The architecture cannot lose blocks exactly.
        """
        from .architectures import layout_for  # torch and transformers enter here only, not when a plan is read

        layout = layout_for(model_or_config, stack)
        fields = {"base_model": layout.base_model, "stack": layout.stack, "nested": True}
        removed = list(removed)
        if any(isinstance(each, (str, Half)) for each in removed):
            if model_or_config is layout.root:
                raise PlanError(
                    "Half-blocks are found by running the model: give the loaded model, not a configuration."
                )
            from .runner import BlockRunner  # see above

            units, halves = read_units(removed), BlockRunner(model_or_config, layout.stack).halves.names()
            plan = cls.from_halves(layout.model_type, layout.num_blocks, sorted_halves(units), halves, **fields)
        else:
            plan = cls.from_removed(layout.model_type, layout.num_blocks, removed, **fields)
        layout.check(plan)
        return plan

    def apply(self, model: Any) -> Any:
        """Removes the blocks from a live model, in place and where it lies, proves the result and returns it.

        Args:
            model: The dense `PreTrainedModel` that the plan was made for.

        Raises:
            PlanError: The plan belongs to another model.
            UnsupportedModelError: The architecture cannot be expressed exactly.
            VerificationError: The pruned model does not equal the dense one with these blocks switched off; the
                model is put back as it was.
        """
        from .gate import apply_proven  # see from_blocks

        apply_proven(model, self)
        return model

    def apply_to_checkpoint(self, src: Any, dst: Any, **kwargs: Any) -> Path:
        """Writes the pruned checkpoint `dst` from the files in `src`, tensor by tensor, without building the model.

        See `optimum_blockprune.checkpoint.apply_to_checkpoint` for the arguments and the errors.
        """
        from .checkpoint import apply_to_checkpoint  # see from_blocks

        return apply_to_checkpoint(self, src, dst, **kwargs)

    def with_provenance(self, **fields: Any) -> PruningPlan:
        """Returns a copy with some descriptive fields replaced."""
        return replace(self, **fields)

    def truncate(self, num_blocks: int) -> PruningPlan:
        """Returns the plan that the same search would have made for fewer blocks, without searching again.

        Of a nested order (greedy removal, rankings) that is a prefix; other plans know their own best choice for every
        smaller number (`smaller`), which need not be part of the larger one.

        Args:
            num_blocks: Number of blocks to remove, from 0 to as many as this plan removes.

        Raises:
            PlanError: The plan removes fewer blocks, removes width as well, or does not know.
        """
        return truncated(self, num_blocks)

    def then(self, second: PruningPlan) -> PruningPlan:
        """Returns the one plan for this one and another that was made for its result.

        Scores, steps and details stay apart, one entry for each plan, under `details["parts"]`.

        Args:
            second: Its numbers of blocks, half-blocks and units are those of the model that this plan leaves.

        Raises:
            PlanError: The second plan is for another model, or the two widths are of no one layout.
        """
        return followed(self, second)

    def parts(self) -> list[dict[str, Any]]:
        """What each of the plans that were joined in this one has to say for itself; this one's own if it is one."""
        joined = self.details.get("parts")
        if joined is not None:
            return list(joined)
        return [{name: value for name, value in self.to_dict().items() if name in PART_FIELDS}]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types; `from_dict` is the inverse."""
        plain = asdict(replace(self, folds=Folds()))
        return json.loads(json.dumps({**plain, "width": self.width.to_dict(), "folds": self.folds.to_dict()}))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningPlan:
        """Reads what `to_dict` wrote.

        Raises:
            PlanError: A field is missing, unknown or malformed, or a newer version wrote the plan.
        """
        if not isinstance(data, Mapping):
            raise PlanError(f"A plan is a JSON object, not {type(data).__name__}.")
        fault = json_fault(data)
        if fault:
            raise PlanError(f"The plan is malformed: {fault}.")
        version = data.get("format_version")
        if version != FORMAT_VERSION or not isinstance(version, int) or isinstance(version, bool):
            raise PlanError(
                f"This plan has format_version {version!r}; this version of the tool reads {FORMAT_VERSION}."
            )
        unknown = sorted(set(data) - set(cls.__dataclass_fields__))
        if unknown:
            raise PlanError(f"Unknown fields in the plan: {', '.join(unknown)}.")
        try:
            blocks = tuple(BlockSource(**block) for block in data["blocks"])
            plan = cls(
                **{
                    **data,
                    "blocks": blocks,
                    "removed_blocks": tuple(data["removed_blocks"]),
                    "removed_halves": tuple(data.get("removed_halves", ())),
                    "width": Width.from_dict(data["width"]) if "width" in data else Width(),
                    "folds": Folds.from_dict(data["folds"]) if "folds" in data else Folds(),
                    "steps": tuple(data.get("steps", ())),
                    "smaller": {count: tuple(each) for count, each in data.get("smaller", {}).items()},
                }
            )
        except PlanError:
            raise
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise PlanError(f"The plan is malformed: {error}.") from error
        check_types(plan)
        return plan

    def save(self, path: str | Path) -> Path:
        """Writes the plan as JSON to `path` (a file, or a folder that gets `pruning_plan.json`).

        What it folds into weights goes into a second file beside it, of the same name with the ending `.folds`.
        """
        path = Path(path)
        path = path / PLAN_FILE if path.is_dir() else path
        self.folds.save(path)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def from_file(cls, path: str | Path) -> PruningPlan:
        """Reads a plan from a JSON file, or from the folder that holds `pruning_plan.json`.

        Raises:
            PlanError: There is none, or it is malformed; see `from_dict`.
        """
        path = Path(path)
        path = path / PLAN_FILE if path.is_dir() else path
        if not path.exists():
            raise PlanError(f"There is no plan at '{path}'.")
        plan = cls.from_dict(read_json(path, PlanError))
        return replace(plan, folds=replace(plan.folds, file=path.with_suffix(FOLDS_SUFFIX)))

    @classmethod
    def from_hub(cls, repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> PruningPlan:
        """Downloads `pruning_plan.json` of a pruned model on the Hub and reads it, with its folds if it has any."""
        from huggingface_hub import hf_hub_download

        plan = cls.from_file(hf_hub_download(repo_id, PLAN_FILE, revision=revision, token=token))
        plan.folds.fetch(repo_id, token)
        return plan
