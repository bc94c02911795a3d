# SPDX-License-Identifier: Apache-2.0
"""`BlockPruner`: loads, calibrates, lets a strategy choose, cuts, proves, saves. It directs and decides nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from optimum.utils import logging
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from .asked import removes
from .blocks import find_blocks
from .choosing import Keep, choose, score_units
from .config import BlockPruningConfig
from .errors import ConfigurationError
from .evaluation import size_of
from .gate import Expectation, check_mode
from .healing import Healing
from .loading import dequantised, find_processor, find_tokenizer, load_model, load_tokenizer
from .mix import Mix, width_beside
from .mixing import mixed
from .plan import PruningPlan
from .records import record
from .report import PruningReport
from .resuming import Resumption, resumption
from .sequence import apply_in_order
from .surgery import Journal, check_plan
from .team import in_step


logger = logging.get_logger("optimum.blockprune")

Configs = BlockPruningConfig | Sequence[BlockPruningConfig]
ResumeDir = str | Path | bool | Resumption | None


class BlockPruner(Healing):
    """Removes transformer blocks from a model and proves that the result is right.

    Args:
        model: A loaded `PreTrainedModel`: a causal language model, one with images or sound and a text decoder, an
            encoder, or an encoder-decoder. It is pruned in place, where it lies.
        config: What to remove and how to choose it; may also be given to `make_plan` and `prune`.
        tokenizer: Needed to calibrate on text, and saved with the result.

    Example:
        >>> pruner = BlockPruner.from_pretrained("HuggingFaceTB/SmolLM2-135M")  # doctest: +SKIP
        >>> config = BlockPruningConfig(strategy="sleb", num_blocks=4, dataset="wikitext2")  # doctest: +SKIP
        >>> model = pruner.prune(save_dir="smollm2-26-blocks", config=config)  # doctest: +SKIP

    Raises:
        UnsupportedModelError: The model cannot be pruned exactly, or not in the form in which it was loaded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: BlockPruningConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.model = dequantised(model)
        self.config = config or BlockPruningConfig()
        find_blocks(self.model, self.config.stack)
        self.tokenizer = tokenizer
        self.processor: ProcessorMixin | None = None
        self.plan: PruningPlan | None = None
        self.report = PruningReport()
        self._source: str | None = None
        self._loading: dict[str, Any] = {}
        self._expected: Expectation | None = None

    @classmethod
    def from_pretrained(
        cls,
        model_or_path: PreTrainedModel | str | Path,
        config: BlockPruningConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        **kwargs: Any,
    ) -> BlockPruner:
        """Loads a model, and the tokenizer beside it unless one is given.

        Args:
            model_or_path: Repo id, folder, `.gguf` file, or a loaded model.
            config: See the class.
            tokenizer: A tokenizer, or where to load it from.
            **kwargs: For `from_pretrained` of the model's class: `revision`, `token`, `dtype`, `device_map`,
                `gguf_file`, `trust_remote_code` (False unless given), ...

        Raises:
            UnsupportedModelError: The model cannot be pruned; found out from its configuration where possible.
            ConfigurationError: There is no such model or tokenizer, or arguments were given for a model that is loaded
                already.
        """
        if isinstance(model_or_path, (str, Path)):
            report = PruningReport()
            named = {"tokenizer": str(tokenizer)} if isinstance(tokenizer, (str, Path)) else {}
            with report.timed("load"):
                model = load_model(model_or_path, **kwargs)
                if tokenizer is None:
                    tokenizer = find_tokenizer(model_or_path, **kwargs)
            pruner = cls(model, config, _tokenizer(tokenizer, kwargs))
            pruner.report, pruner._source, pruner._loading = report, str(model_or_path), {**kwargs, **named}
            pruner.processor = find_processor(model_or_path, model, **kwargs)
            return pruner
        if kwargs:
            raise ConfigurationError(f"The model is loaded already; {', '.join(sorted(kwargs))} would be ignored.")
        return cls(model_or_path, config, _tokenizer(tokenizer, {}))

    @staticmethod
    def load_pruned(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
        """Loads a pruned model of any layout, `"per_layer"` included, which transformers alone cannot load.

        Args:
            folder: The folder, or its repository on the Hub; nothing in it is executed or unpickled.
            **kwargs: For `from_pretrained` of the model's class.
        """
        return load_model(folder, **kwargs)

    @in_step
    def score(self, config: BlockPruningConfig | None = None) -> dict[Any, Any]:
        """Returns the strategy's score of everything it may remove, measured on the dense model.

        What a score means belongs to the strategy (SLEB: mean NLL without the block, low ones go first); strategies
        that measure nothing return nothing. The model, `plan` and `report` stay as they are.

        Returns:
            Block number -> score, with `unit="half_block"` also the name of a pair (`"4.mlp+5.attention"`) -> score;
            of strategies that remove channels and heads, block number -> name of the module that they end in -> one
            score for each.
        """
        recipe = (config or self.config).recipe
        if removes(recipe) == "width":
            return score_units(self.model, recipe, self.tokenizer)
        plan = choose(self.model, recipe.with_num_blocks(1), self.tokenizer, PruningReport())
        return {int(name) if name.isdigit() else name: score for name, score in plan.scores.items()}

    @in_step
    def make_plan(self, config: Configs | None = None, *, resume_dir: ResumeDir = None) -> PruningPlan:
        """Lets the strategy choose; the model stays bit-identical. The plan is returned and kept in `plan`.

        Args:
            config: Replaces the configuration of this pruner. Of several, each chooses on what the one before leaves:
                they are applied for that, and taken back.
            resume_dir: Folder where finished measurements are kept until there is a plan; a run that was killed goes
                on from there.

        Raises:
            ResumeError: `resume_dir` belongs to a run that differs, or is in use.
            ConfigurationError: Strategy, option or budget do not fit; raised before any text is read.
            CalibrationError: The calibration text is missing, too short or does not fit the tokenizer.
            NonFiniteError: The model gives NaN or infinity on this text.
        """
        configs = self._configs(config)
        with resumption(resume_dir) as kept:
            makers = self._makers(configs, kept)
            if len(makers) == 1:
                makers[0]()
            else:
                self.plan, _, journal = apply_in_order(self.model, makers, self.report)
                journal.rollback()
        return self.plan

    def _configs(self, config: Configs | None) -> list[BlockPruningConfig]:
        configs = list(config) if isinstance(config, (list, tuple)) else [config or self.config]
        if not configs:
            raise ConfigurationError("The list of configurations is empty.")
        layouts = [each.layout for each in configs if removes(each.recipe) == "width"]
        if len(layouts) > 1 and (len(set(layouts)) > 1 or "padded" in layouts):
            raise ConfigurationError(
                f"Widths of layouts {', '.join(layouts)} cannot be joined in one plan: use 'uniform' for all of them "
                "or 'per_layer' for all, or prune twice into two folders."
            )
        self.config = configs[-1]
        return configs

    def _makers(self, configs: list[BlockPruningConfig], kept: Resumption) -> list[Callable[[], PruningPlan]]:
        def maker(number: int, config: BlockPruningConfig) -> Callable[[], PruningPlan]:
            def keep(fingerprint: Mapping[str, Any]) -> Any:
                return kept.ledger(number, config.strategy, {"searches": len(configs), **fingerprint})

            return partial(self._choose, config, keep, joins=number > 1)

        return [maker(number, each) for number, each in enumerate(configs, 1)]

    def _choose(self, config: BlockPruningConfig, keep: Keep, *, joins: bool = False) -> PruningPlan:
        report = PruningReport() if joins else self.report
        self.report.depths = []
        plan = choose(self.model, config.recipe, self.tokenizer, report, base_model=self._source, keep=keep)
        if joins:
            self.report.add_search(report)
        else:
            self.plan = plan  # a search is not lost with what comes after it
        return plan

    @in_step
    def mix(
        self,
        target_params: int,
        depth: BlockPruningConfig | None = None,
        width: BlockPruningConfig | None = None,
        *,
        counts: Sequence[int] | None = None,
        held_out_dataset: Any = None,
        held_out_samples: int | None = None,
        resume_dir: ResumeDir = None,
    ) -> PruningPlan:
        """Splits a budget between depth and width by what held-out text says; the model stays bit-identical.

        Some numbers of blocks are tried, each together with the width that then reaches the target. The plan of the
        split with the smallest KL divergence from the dense model is returned, and kept in `plan`, for
        `prune(plan=...)`.

        Args:
            target_params: Parameters that the result may have at most.
            depth: Chooses the blocks or half-blocks; without a budget. By default the configuration of this pruner.
            width: Chooses channels and heads; without a budget. By default MLP channels by `bip` with `reduction=l2`,
                on the same text as `depth`.
            counts: Numbers of blocks to try; by default up to five, from none to as many as reach the target alone.
            held_out_dataset: Text that decides, like `dataset`; by default windows of the text of `depth` that are not
                calibrated on.
            held_out_samples: Windows of it; by default as many as are calibrated on.
            resume_dir: See `make_plan`.

        Raises:
            BlockPruningError: Whatever is wrong; see `mixing.mixed`. As much as possible before any text is read.
        """
        deep = (depth or self.config).recipe
        wide = width_beside(deep) if width is None else width.recipe
        wanted = Mix(
            target_params, deep, wide, None if counts is None else tuple(counts), held_out_dataset, held_out_samples
        )
        report = PruningReport()
        with resumption(resume_dir) as kept:

            def ledgers(number: int, strategy: str) -> Keep:
                return lambda fingerprint: kept.ledger(number, strategy, {"searches": "mix", **fingerprint})

            plan = mixed(self.model, wanted, self.tokenizer, report, base_model=self._source, ledgers=ledgers)
        self.plan, self.report.depths = plan, []
        self.report.add_search(report)
        return plan

    @in_step
    def prune(
        self,
        save_dir: str | Path | None = None,
        config: Configs | None = None,
        plan: PruningPlan | None = None,
        *,
        overwrite: bool = False,
        verify: str = "logits",
        resume_dir: ResumeDir = None,
    ) -> PreTrainedModel:
        """Chooses (unless a plan says what goes), removes it in place, proves the result and saves it.

        Args:
            save_dir: Folder for the checkpoint; nothing is written without it.
            config: Replaces the configuration of this pruner. Several are carried out in order, each on what the one
                before left: blocks first and then channels, say. They make one plan and one folder.
            plan: What to remove; needs no data.
            overwrite: Whether `save_dir` may be replaced.
            verify: How the saved folder is proven: `"logits"`, `"keys"` (meta device) or `"off"`.
            resume_dir: Folder where finished measurements are kept until the result is there: the same call goes on
                from there after a crash. By default a hidden one beside `save_dir`, without that none; `False` for
                none.

        Returns:
            The pruned model: the same object, on the device where it was.

        Raises:
            BlockPruningError: Whatever is wrong. The model and the disk are then as they were, also after Ctrl-C, but
                for what was measured.
        """
        configs = self._configs(config)
        check_mode(verify)
        if plan is not None:
            _refuse_resuming(resume_dir)
            check_plan(self.model, plan)
        if save_dir is not None:
            self.check_save(save_dir, plan=plan, overwrite=overwrite, verify=verify)
        with resumption(resume_dir, save_dir) as kept:
            makers = self._makers(configs, kept)
            if plan is None and len(makers) == 1:
                plan = makers[0]()
            self._carry_out(makers if plan is None else [lambda: plan], plan, save_dir, overwrite, verify)
        return self.model

    def _carry_out(
        self,
        makers: list[Callable[[], PruningPlan]],
        plan: PruningPlan | None,
        save_dir: str | Path | None,
        overwrite: bool,
        verify: str,
    ) -> None:
        """Removes what the plans say and saves, or leaves everything as it was."""
        before = (self._expected, copy.deepcopy(self.report))
        journal: Journal | None = None
        try:
            if plan is not None and plan is not self.plan:
                # What an earlier search cost, and what its depths gave, is not true of this plan.
                kept = ("seconds", "evaluations", "task_results", "base")
                self.report = PruningReport(**{name: getattr(self.report, name) for name in kept})
            sizes = size_of(self.model, self.config.stack if plan is None else plan.stack)
            self.plan, self._expected, journal = apply_in_order(self.model, makers, self.report)
            record(self.report, self.plan, sizes, self.model, **self._origin())
            self.report.device = str(self.model.device)
            self.report.healing = []  # of an earlier pruning, which the history tells
            if save_dir is not None:
                self.save_pretrained(save_dir, overwrite=overwrite, verify=verify)
        except BaseException:
            if journal is not None:
                journal.rollback()
            self._expected, self.report = before
            raise


def _refuse_resuming(resume_dir: ResumeDir) -> None:
    """An argument that would be ignored is an error."""
    if resume_dir and not isinstance(resume_dir, Resumption):
        raise ConfigurationError(
            f"plan= says what goes, so that nothing is measured; resume_dir={str(resume_dir)!r} would have no effect."
        )


def _tokenizer(given: Any, kwargs: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    return load_tokenizer(given, **kwargs) if isinstance(given, (str, Path)) else given
