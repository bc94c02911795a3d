# SPDX-License-Identifier: Apache-2.0
"""How a pruner's result leaves the process: as a folder, as several folders of different depths, as a repository."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from optimum.utils import logging
from transformers import ProcessorMixin

from .asked import num_to_remove
from .blocks import find_blocks
from .depths import checked_counts, pruned_to
from .errors import ConfigurationError, HubError, PlanError
from .evaluation import EvaluationSpec, size_of
from .gate import Expectation, check_mode, prove_folder, require_proof
from .hub import check_repo_id, push_folder
from .measuring import Measuring, measured_depth
from .plan import PruningPlan
from .records import record, write_records
from .report import PruningReport
from .saving import atomic_folder, check_output, restored
from .streamed_saving import save_model
from .team import Team, alone, in_step


logger = logging.get_logger("optimum.blockprune")

_HUB_ARGUMENTS = ("repo_id", "private", "token", "revision", "create_pr", "commit_message", "commit_description")


@dataclass
class _Depth:
    """One exported depth, until its records are written."""

    name: str
    plan: PruningPlan
    report: PruningReport
    entry: dict[str, Any]


class Publishing(Measuring):
    """Saving, exporting and pushing of `BlockPruner`."""

    processor: ProcessorMixin | None
    _expected: Expectation | None
    _source: str | None
    _loading: dict[str, Any]

    @in_step
    def check_save(
        self,
        save_directory: str | Path,
        *,
        plan: PruningPlan | None = None,
        overwrite: bool = False,
        verify: str = "logits",
    ) -> None:
        """Refuses now what would make `save_pretrained` fail after the search; `prune(save_dir)` calls it itself.

        Raises:
            OutputError: The folder exists, may not be written, or the disk has no room for the result.
            ConfigurationError: The generation configuration is one that transformers refuses to save.
            UnsupportedModelError: `verify` is too weak for this architecture.
        """
        check_mode(verify)
        require_proof(self.model, verify)
        if Team.current().is_first:
            check_output(save_directory, overwrite=overwrite, needed_bytes=self._bytes_after(plan))
        generation = getattr(self.model, "generation_config", None)
        if generation is not None:
            try:
                generation.validate(strict=True)
            except ValueError as error:
                raise ConfigurationError(f"model.generation_config cannot be saved; mend it first: {error}") from error

    @in_step
    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
        verify: str = "logits",
        push_to_hub: bool = False,
        **hub: Any,
    ) -> Path:
        """Writes an ordinary checkpoint with tokenizer, plan, report, configuration and card; proves it by reloading.

        Args:
            save_directory: The folder; appears only when it is whole and proven.
            max_shard_size: As in transformers.
            overwrite: Whether an existing folder may be replaced; with `push_to_hub` also a repository that holds
                another base model.
            verify: See `prune`.
            push_to_hub: Also upload the folder, once it is there.
            **hub: Arguments of `push_to_hub`; `repo_id` defaults to the name of the folder.

        Raises:
            PlanError: Nothing was pruned yet.
            OutputError: The folder exists, may not be written, or the disk is full.
            VerificationError: The reloaded checkpoint is not the model; nothing is left of it.
            HubError: The upload failed; the folder stays.
        """
        repo_id = self._checked_hub_arguments(save_directory, push_to_hub, hub)
        expected = self._pruned()
        check_mode(verify)
        require_proof(self.model, verify)
        path = Path(save_directory)
        if not Team.current().is_first:
            return path
        with self.report.timed("save"), atomic_folder(path, overwrite=overwrite) as folder:
            logger.info(f"Saving to '{path}'")
            self._write_weights(folder, expected, max_shard_size, verify)
            self.report.verification = {"mode": verify, "passed": verify != "off"}
            write_records(folder, expected.plan, self.report, title=path.name, config=self.config)
        if push_to_hub:
            push_folder(path, repo_id, overwrite=overwrite, **hub)
        return path

    @in_step
    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
        verify: str = "logits",
    ) -> CommitInfo | None:
        """Saves and proves the pruned model in a temporary folder and uploads that in one commit.

        Args:
            repo_id: `name` or `owner/name`; made if it does not exist.
            private: Whether a repository that is made is private; by default what its owner has set.
            token: By default the one that `hf auth login` stored.
            revision: Branch to commit to; made if it does not exist.
            create_pr: Open a pull request instead.
            commit_message: By default says what was pruned.
            commit_description, max_shard_size: As in transformers.
            overwrite: Replace a model of another base that is there.
            verify: See `prune`.

        Returns:
            The `CommitInfo`, whose `commit_url` is the address of the commit; `None` in all processes but the first.

        Raises:
            PlanError: Nothing was pruned yet.
            HubError: The upload failed. The temporary folder then stays; the message names it and how to resume.
        """
        check_repo_id(repo_id)
        if self._pruned() and not Team.current().is_first:
            return None
        parent = Path(tempfile.mkdtemp(prefix="blockprune-push-"))
        try:
            with alone():
                place = parent / repo_id.rpartition("/")[2]
                folder = self.save_pretrained(place, max_shard_size=max_shard_size, verify=verify)
            commit = push_folder(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
                commit_description=commit_description,
                overwrite=overwrite,
            )
        except HubError:
            raise  # its message names the folder
        except BaseException:
            shutil.rmtree(parent, ignore_errors=True)
            raise
        shutil.rmtree(parent, ignore_errors=True)
        return commit

    @in_step
    def export(
        self,
        save_dir: str | Path,
        counts: Iterable[int],
        *,
        dataset: Any = None,
        num_samples: int | None = None,
        spec: EvaluationSpec | None = None,
        every_depth: bool = False,
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
        verify: str = "logits",
    ) -> dict[int, Path]:
        """Writes the checkpoints of several depths of one plan, without searching again; the model stays dense.

        Of a nested order (`plan.nested`) these are prefixes; another plan gives its own best choice for each number.

        Args:
            save_dir: Gets one folder `removed-N` for each depth, and appears only when all are whole and proven.
            counts: Numbers of blocks to remove, none larger than the plan's.
            dataset: Held-out text to measure each depth on, for the common table in their reports and cards; without
                it the table has sizes only.
            num_samples, spec: As for `evaluate`; only what is written, and the dense model, is asked to continue text.
            every_depth: Measure all depths up to the largest, not only those that are written.
            max_shard_size: As in transformers.
            overwrite: Whether `save_dir` may be replaced.
            verify: See `prune`.

        Returns:
            The folders by number of removed blocks.

        Raises:
            PlanError: There is no plan, the model was pruned already, or the plan cannot be cut that short.
            OutputError: The folder exists, may not be written, or the disk is full; nothing is left of it.
        """
        plan, spec = self._dense_plan(), spec or self._spec()
        wanted = self._exportable(save_dir, counts, overwrite=overwrite, verify=verify)
        if every_depth and dataset is None:
            raise ConfigurationError("every_depth=True measures, which needs text: give dataset=...")
        measured = checked_counts(plan, range(max(wanted) + 1) if every_depth else wanted)
        if not Team.current().is_first:
            return {count: Path(save_dir) / f"removed-{count}" for count in wanted}
        text = None if dataset is None else self._text(dataset, num_samples, spec)
        entries, exported = [], []
        with atomic_folder(save_dir, overwrite=overwrite) as folder:
            for count in measured:
                with pruned_to(self.model, plan.truncate(count)) as expected:
                    with self.report.timed("depths"):
                        writes = count in (0, *wanted)
                        entries.append(measured_depth(self.model, plan.stack, count, text, spec, writes=writes))
                    if count in wanted:
                        exported.append(self._exported(folder, expected, entries, max_shard_size, verify))
            self.report.depths = entries
            for each in exported:
                each.report.depths = copy.deepcopy(entries)
                write_records(folder / each.name, each.plan, each.report, title=each.name, config=self.config)
        return {each.entry["removed"]: Path(save_dir) / each.name for each in exported}

    def _exportable(self, save_dir: str | Path, counts: Iterable[int], *, overwrite: bool, verify: str) -> list[int]:
        """The depths to write, in ascending order, once nothing speaks against them; see `export` for the errors."""
        plan = self._dense_plan()
        wanted = [count for count in checked_counts(plan, counts) if count]
        if not wanted:
            raise ConfigurationError("Nothing is exported: every count is 0, which is the dense model.")
        parts = [plan.truncate(count) for count in wanted]
        for part in parts:
            self.check_save(save_dir, plan=part, overwrite=overwrite, verify=verify)
        if Team.current().is_first:
            check_output(save_dir, overwrite=overwrite, needed_bytes=sum(map(self._bytes_after, parts)))
        return wanted

    def _exported(
        self,
        parent: Path,
        expected: Expectation,
        entries: list[dict[str, Any]],
        max_shard_size: int | str,
        verify: str,
    ) -> _Depth:
        """Writes the model as it is now into a folder below `parent`, and what is known of it by now."""
        dense, entry = entries[0], entries[-1]
        report = copy.deepcopy(self.report)
        record(report, expected.plan, dense, self.model, **self._origin())
        report.device = str(self.model.device)
        report.verification = {"mode": verify, "passed": verify != "off"}
        if "perplexity" in entry:
            report.evaluations += [{"label": "dense", **dense}, {"label": "pruned", **entry}]
        name = f"removed-{entry['removed']}"
        (parent / name).mkdir()
        with report.timed("save"):
            self._write_weights(parent / name, expected, max_shard_size, verify)
        return _Depth(name, expected.plan, report, entry)

    def _write_weights(self, folder: Path, expected: Expectation, max_shard_size: int | str, verify: str) -> None:
        """Fills a folder with the model as it is now and what belongs to it, and proves it."""
        with restored(self.model.config):
            save_model(self.model, expected.plan, folder, max_shard_size)
            for companion in (self.processor, self.tokenizer):
                if companion is not None:
                    companion.save_pretrained(folder)
            prove_folder(folder, self.model, expected, verify)

    def _pruned(self) -> Expectation:
        if self._expected is None:
            raise PlanError("There is nothing to save yet: call prune() first.")
        return self._expected

    def _origin(self) -> dict[str, Any]:
        """What `records.record` is told of where the model came from."""
        return {"config": self.config, "source": self._source, "loading": self._loading}

    def _bytes_after(self, plan: PruningPlan | None) -> int:
        """Size of the result on disk, as far as it is known before the blocks are chosen."""
        removed = num_to_remove(self.model, self.config.recipe) if plan is None else plan.num_removed
        blocks = find_blocks(self.model, self.config.stack if plan is None else plan.stack).blocks
        sizes = sorted(sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks)
        maps = 0 if plan is None else plan.folds.num_bytes
        return size_of(self.model)["size_bytes"] - sum(sizes[len(sizes) - removed :]) + maps

    @staticmethod
    def _checked_hub_arguments(save_directory: str | Path, push_to_hub: bool, hub: dict[str, Any]) -> str:
        """Takes the repository out of `hub`; raises before anything is written."""
        unknown = sorted(set(hub) - set(_HUB_ARGUMENTS))
        if unknown:
            raise ConfigurationError(
                f"Unknown arguments of save_pretrained: {', '.join(unknown)}. For uploads there are: "
                f"{', '.join(_HUB_ARGUMENTS)}."
            )
        if hub and not push_to_hub:
            raise ConfigurationError(f"{', '.join(sorted(hub))} only count together with push_to_hub=True.")
        repo_id = hub.pop("repo_id", Path(save_directory).resolve().name)
        if push_to_hub:
            check_repo_id(repo_id)
        return repo_id
