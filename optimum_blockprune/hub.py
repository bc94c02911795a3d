# SPDX-License-Identifier: Apache-2.0
"""Uploads a finished folder to the Hub in one commit, or says what went wrong and how to go on.

Guaranteed: the local folder is only read; what is on the Hub changes with one commit or not at all (a repository or a
branch that was missing is made before it and may stay behind empty); a model of another base is not replaced unasked.
Not done here: retries. Those of huggingface_hub are all there are, and files that reached the Hub's storage in a push
that failed are not sent again by the next one.

`HfApi.upload_folder` is not used: with `hf_xet` installed, version 2 of huggingface_hub makes several commits of it.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from os.path import normpath
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token, metadata_load
from huggingface_hub.errors import HFValidationError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from optimum.utils import logging

from . import __version__
from .errors import CheckpointError, HubError
from .failures import LOG_IN, Attempt
from .plan import PLAN_FILE, PruningPlan
from .weight_files import check_weights, json_object


logger = logging.get_logger("optimum.blockprune.hub")

CARD, CONFIG = "README.md", "config.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".h5", ".msgpack", ".gguf", ".pt", ".pth", ".ckpt", ".onnx")
# Files at the root of a repository that the push replaces as a whole: weights as transformers names them (which it
# would mix up with the new ones), and what this package writes. All other files of the repository stay.
REPLACED = (
    "model*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "tf_model*.h5",
    "tf_model*.h5.index.json",
    "flax_model*.msgpack",
    "flax_model*.msgpack.index.json",
    "pruning_*.json",
    "pruning_*.folds",
    "pruning_*.png",
    "pruning_*.html",
    "block_pruning_config.json",
)
_NEVER_SENT = {".git", ".cache"}


@dataclass(frozen=True)
class _Branch:
    """A branch on the Hub as it was when the push began; `is_new`: it is still to be made, from `main`."""

    repo_id: str
    name: str | None
    commit: str
    files: tuple[str, ...]
    is_new: bool


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    overwrite: bool = False,
) -> CommitInfo:
    """Uploads a pruned folder in one commit and removes in it what is left there of an older push.

    Args:
        folder: Output of a pruning run. Everything in it is sent, but `.git` and `.cache`.
        repo_id: `name` or `owner/name`; made if it does not exist.
        private: Whether a repository that is made is private; by default what its owner has set.
        token: By default the one that `hf auth login` stored, or that of HF_TOKEN.
        revision: Branch to commit to, made from `main` if it does not exist; or `refs/pr/N`, to add to a pull request.
        create_pr: Open a pull request instead of committing, against `revision` (then an existing branch) or `main`;
            needs no right to write.
        commit_message: First line; by default says what was pruned.
        commit_description: Further lines.
        overwrite: Replace a model that is there even if it has another base, or one that cannot be told.

    Returns:
        The `CommitInfo`: `commit_url`, `oid`, and `pr_url` for a pull request. Where nothing differs from what is
        there, nothing is committed or proposed, and it is that of the last commit.

    Raises:
        CheckpointError: `folder` is no pruned checkpoint, or not whole.
        HubError: The name is malformed, a model of another base is there, or the upload failed. The message holds the
            command that resumes it.
    """
    check_repo_id(repo_id)
    folder = check_folder(folder)
    plan = PruningPlan.from_file(folder)
    attempt = _attempt(
        folder,
        repo_id,
        token,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        commit_description=commit_description,
        overwrite=overwrite,
    )
    with attempt.explained():
        api = _api(attempt)
        branch = _opened(api, attempt, repo_id, private, revision, create_pr)
        if not overwrite:
            _check_base(api, attempt, branch, plan.base_model or _base_of_card(folder / CARD))
        operations = _operations(folder, branch)
        message = commit_message or _summary(plan)
        return _committed(api, branch, operations, create_pr, message, commit_description)


def push_file(
    path: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> CommitInfo:
    """Uploads one file to the root of a repository, which is made if needed; all else there stays as it is.

    Args:
        path: The file.
        repo_id: See `push_folder`, as for all other arguments.

    Raises:
        HubError: The name is malformed, or the upload failed.
    """
    check_repo_id(repo_id)
    path = Path(path)
    attempt = Attempt(f"Nothing is lost here: push {path.name} again to '{repo_id}'.", token)
    with attempt.explained():
        api = _api(attempt)
        branch = _opened(api, attempt, repo_id, private, revision, create_pr)
        operations = [CommitOperationAdd(path.name, path)]
        message = commit_message or f"Upload {path.name}"
        return _committed(api, branch, operations, create_pr, message, commit_description)


def check_repo_id(repo_id: str) -> None:
    """Refuses what cannot be the name of a repository.

    Raises:
        HubError: It is malformed.
    """
    try:
        validate_repo_id(repo_id if isinstance(repo_id, str) else "")
    except HFValidationError as error:
        raise HubError(
            f"{repo_id!r} cannot be the name of a repository: give name or owner/name, of letters, digits, '-', '_' "
            "and '.' only."
        ) from error


def check_folder(folder: str | Path) -> Path:
    """Returns the absolute path of a pruned checkpoint; opens every file of weights, but reads no weight.

    Raises:
        CheckpointError: The folder does not exist, is no output of a pruning run, or is not whole.
        PlanError: Its plan is malformed, or the file with what it folds into weights is missing or another one.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder '{folder}' to push.")
    if folder.resolve().name.startswith("."):
        raise CheckpointError(
            f"'{folder}' has the name of a temporary folder, left by a run that was stopped: prune again. (If it is "
            "complete, give it a name without the dot.)"
        )
    missing = [name for name in (CONFIG, PLAN_FILE) if not (folder / name).is_file()]
    if missing:
        below = sorted(path.parent.name for path in folder.glob(f"*/{PLAN_FILE}"))
        hint = f" Push one of the folders in it: {', '.join(below)}." if below else ""
        raise CheckpointError(
            f"'{folder}' is no output of a pruning run: it lacks {' and '.join(missing)}.{hint or ' Prune first.'}"
        )
    json_object(folder / CONFIG)
    PruningPlan.from_file(folder).folds.tensors()
    check_weights(folder)
    return folder


def replaced(files: Collection[str]) -> list[str]:
    """Names, among those of a repository, that a push replaces as a whole; see `REPLACED`."""
    return [name for name in files if "/" not in name and any(fnmatchcase(name, each) for each in REPLACED)]


# The folder


def _operations(folder: Path, branch: _Branch) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Every file of the folder, and the end of what it takes the place of."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    sent = {name: path for name, path in files.items() if not _NEVER_SENT & set(Path(name).parts)}
    stale = [name for name in replaced(branch.files) if name not in sent]
    if ".gitignore" in {*branch.files, *sent}:
        logger.warning(
            "The repository has a .gitignore: files that it names do not arrive. Delete it if it is not yours."
        )
    logger.info(f"Pushing {len(sent)} files to '{branch.repo_id}', deleting {len(stale)} of an older push")
    return [*map(CommitOperationDelete, stale), *(CommitOperationAdd(name, path) for name, path in sent.items())]


def _base_of_card(path: Path) -> str | None:
    """What a card gives as `base_model`; several are one text."""
    try:
        stated = (metadata_load(path) or {}).get("base_model") if path.is_file() else None
    except Exception as error:  # a foreign card: YAML and huggingface_hub have no common base class
        logger.info(f"'{path}' cannot be read: {error}")
        return None
    return ", ".join(map(str, stated)) if isinstance(stated, list) else stated


def _summary(plan: PruningPlan) -> str:
    parts = [f"{plan.num_removed} of {plan.num_blocks} blocks"] if plan.num_removed else []
    parts += ["width"] if plan.width else []
    return f"Model pruned with optimum-blockprune {__version__} ({plan.strategy}): less {' and '.join(parts)}"


def _attempt(folder: Path, repo_id: str, token: str | bool | None, **arguments: Any) -> Attempt:
    """How to go on: the command line of the same push, with what was given; a token is not written out."""
    words = ["optimum-cli", "blockprune", "push", str(folder), repo_id]
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        words += [] if value in (None, False) else [flag] if value is True else [f"{flag}={value}"]
    command = shlex.join(words) + (' --token "$HF_TOKEN"' if isinstance(token, str) else "")
    return Attempt(
        f"The folder '{folder}' is whole and unchanged, and large files that arrived are not sent again. Resume with: "
        f"{command}",
        token,
    )


# The Hub


def _api(attempt: Attempt) -> HfApi:
    token = attempt.token
    if token is False or not (token if isinstance(token, str) else get_token()):
        raise attempt.failed("There is no token to log in to the Hub with.", f"{LOG_IN}.")
    return HfApi(token=token, library_name="optimum-blockprune", library_version=__version__)


def _opened(
    api: HfApi, attempt: Attempt, repo_id: str, private: bool | None, revision: str | None, create_pr: bool
) -> _Branch:
    """Makes the repository if it is missing, and looks at the branch."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    try:
        info, is_new = api.model_info(repo_id, revision=revision), False
    except RevisionNotFoundError as error:
        if create_pr or revision is None or revision.startswith("refs/"):
            raise attempt.failed(
                f"'{repo_id}' has no revision '{revision}'.", "A pull request needs a branch that exists."
            ) from error
        info, is_new = api.model_info(repo_id), True
    if private and info.private is False:
        raise attempt.failed(
            f"'{repo_id}' exists and is public, so that private=True would have no effect.",
            "Make it private in its settings first, or take another name.",
        )
    files = tuple(file.rfilename for file in info.siblings or ())
    return _Branch(repo_id, revision, info.sha, files, is_new)


def _check_base(api: HfApi, attempt: Attempt, branch: _Branch, base: str | None) -> None:
    """Refuses to replace a model that was not pruned from the same base."""
    if PLAN_FILE not in branch.files and not any(name.endswith(WEIGHT_SUFFIXES) for name in branch.files):
        return
    there = _base_of_repo(api, branch)
    if base and there and normpath(base) == normpath(there):
        return
    mine = f"'{base}'" if base else "a model of unknown name"
    theirs = f"one pruned from '{there}'" if there else "one whose base it does not name"
    raise attempt.failed(
        f"'{branch.repo_id}' holds a model already: {theirs}, while the folder was pruned from {mine}.",
        "To replace it, pass overwrite=True (--overwrite); or take another name.",
    )


def _base_of_repo(api: HfApi, branch: _Branch) -> str | None:
    with TemporaryDirectory() as folder:
        for name in (PLAN_FILE, CARD):
            if name not in branch.files:
                continue
            path = Path(api.hf_hub_download(branch.repo_id, name, revision=branch.commit, local_dir=folder))
            if name == CARD:
                return _base_of_card(path)
            try:
                # Not read as a plan: one of a newer version names its base as well.
                found = json_object(path).get("base_model")
            except CheckpointError:
                found = None
            if found:
                return str(found)
    return None


def _committed(
    api: HfApi, branch: _Branch, operations: list[Any], create_pr: bool, message: str, description: str | None
) -> CommitInfo:
    if branch.is_new:
        api.create_branch(branch.repo_id, branch=branch.name, revision=branch.commit, exist_ok=True)
    return api.create_commit(
        branch.repo_id,
        operations,
        commit_message=message,
        commit_description=description,
        revision=branch.name,
        create_pr=create_pr,
        parent_commit=branch.commit,
    )
