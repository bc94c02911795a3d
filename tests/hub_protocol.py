# SPDX-License-Identifier: Apache-2.0
"""A model hub in memory: accounts, repositories with commits and branches, and what it answers. No HTTP here."""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hub_cards import problems


ATTRIBUTES = ".gitattributes"
LARGE = ("*.safetensors", "*.bin", "*.h5", "*.msgpack", "*.gguf", "*.pt", "*.onnx", "*.zip")
LARGEST_REGULAR = 10_000_000
_NAME = re.compile(r"\w[\w.-]{0,95}\Z")


class Refusal(Exception):
    """An answer that is no success: status, message and the code that huggingface_hub goes by."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass(frozen=True)
class Account:
    """Who a token belongs to and what it may do: "write" or "read"."""

    user: str
    role: str = "write"
    orgs: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        """Whether repositories of this namespace are this account's."""
        return namespace in (self.user, *self.orgs)


@dataclass(frozen=True)
class Blob:
    """A file: its bytes, or the name of the large object that holds them."""

    size: int
    oid: str
    data: bytes | None = None
    sha256: str | None = None

    @classmethod
    def regular(cls, data: bytes) -> Blob:
        """A file that git keeps itself."""
        return cls(len(data), hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), data=data)

    @classmethod
    def large(cls, sha256: str, size: int) -> Blob:
        """A pointer, whose own git object is named by its text."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return cls(size, cls.regular(pointer).oid, sha256=sha256)

    def described(self, path: str) -> dict[str, Any]:
        """The entry of a listing."""
        entry = {"type": "file", "path": path, "oid": self.oid, "size": self.size}
        if self.sha256:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 130}
        return entry


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    oid: str
    files: Mapping[str, Blob]
    parent: str | None = None
    title: str = "initial commit"
    description: str = ""
    author: str = ""


@dataclass
class Repo:
    """A repository; `heads` holds branches by name and pull requests as `refs/pr/N`."""

    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        """Its namespace."""
        return self.name.partition("/")[0]

    @property
    def pull_requests(self) -> list[str]:
        """`refs/pr/1`, ..."""
        return [name for name in self.heads if name.startswith("refs/pr/")]

    def add(self, head: str, files: Mapping[str, Blob], **facts: Any) -> Commit:
        """Puts a commit on top of a branch."""
        parent = self.heads.get(head)
        commit = Commit(secrets.token_hex(20), dict(files), parent, **facts)
        self.commits[commit.oid] = commit
        self.heads[head] = commit.oid
        return commit

    def at(self, revision: str) -> Commit:
        """The commit of a branch, a pull request or an oid."""
        oid = self.heads.get(revision.removeprefix("refs/heads/"), revision)
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def history(self, revision: str = "main") -> list[Commit]:
        """Newest first."""
        found = [self.at(revision)]
        while found[-1].parent:
            found.append(self.commits[found[-1].parent])
        return found


class Hub:
    """All that is on the server.

    Args:
        store: Folder for the large objects.
        tokens: Accounts by token.
    """

    def __init__(self, store: Path, tokens: Mapping[str, Account]) -> None:
        self.store = store
        self.tokens = dict(tokens)
        self.repos: dict[str, Repo] = {}

    # Rights

    def account(self, token: str | None) -> Account | None:
        """Whose token this is; `None` for nobody's request."""
        if token is None:
            return None
        if token not in self.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.tokens[token]

    def readable(self, name: str, who: Account | None) -> Repo:
        """A repository that `who` may see; others look as if they did not exist."""
        repo = self.repos.get(name)
        if repo is None or (repo.private and not (who and who.owns(repo.owner))):
            raise Refusal(401 if who is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, name: str, who: Account | None, *, proposal: bool = False) -> Repo:
        """A repository that `who` may commit to, or open a pull request in."""
        repo = self.readable(name, who)
        if who is None:
            raise Refusal(401, "Invalid username or password.")
        if not proposal and not (who.role == "write" and who.owns(repo.owner)):
            raise Refusal(403, "Forbidden: you must use a write token to upload to this repository.")
        return repo

    # Repositories

    def create(self, who: Account | None, name: str, organization: str | None, private: bool) -> Repo:
        """Makes a repository with its first commit, as the Hub does."""
        if who is None:
            raise Refusal(401, "Invalid username or password.")
        full = f"{organization or who.user}/{name}"
        if full in self.repos and who.owns(self.repos[full].owner):
            raise Refusal(409, "You already created this model repo", repo=full)
        if who.role != "write" or not who.owns(full.partition("/")[0]):
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{organization}".')
        if not _NAME.match(name):
            raise Refusal(400, f"Invalid name: {name}")
        self.repos[full] = Repo(full, private)
        lines = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE)
        self.repos[full].add("main", {ATTRIBUTES: Blob.regular(lines.encode())}, author=who.user)
        return self.repos[full]

    def branch(self, repo: Repo, name: str, start: str | None) -> None:
        """Makes a branch."""
        if name in repo.heads:
            raise Refusal(409, f"Reference already exists: refs/heads/{name}")
        repo.heads[name] = repo.at(start or "main").oid

    # Uploads

    def upload_modes(self, repo: Repo, revision: str, files: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """For each file, whether it goes into a commit or to the store of large objects."""
        there = repo.at(revision).files
        found = []
        for each in files:
            path, size = each["path"], each["size"]
            binary = b"\0" in base64.b64decode(each["sample"])
            large = any(fnmatch(path, pattern) for pattern in LARGE) or binary or size > LARGEST_REGULAR
            old = there.get(path)
            oid = (old.sha256 or old.oid) if old else None
            mode = "lfs" if large else "regular"
            found.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return found

    def stored(self, oid: str, size: int | None = None) -> bool:
        """Whether the large object is there, of this size if one is given."""
        path = self.store / oid
        return path.is_file() and size in (None, path.stat().st_size)

    def commit(self, repo: Repo, head: str, lines: list[dict[str, Any]], who: Account, *, proposal: bool) -> Commit:
        """Carries out a commit that came as a list of operations, all or nothing."""
        header = lines[0]["value"]
        base = repo.at(head)
        parent = header.get("parentCommit")
        if head not in repo.heads:
            raise Refusal(404, f"Not a branch: {head}", "RevisionNotFound")
        if parent and parent != base.oid:
            if not proposal:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            base = repo.at(parent)
        files = dict(base.files)
        for line in lines[1:]:
            self._carry_out(files, line["key"], line["value"])
        facts = {"title": header["summary"], "description": header.get("description", ""), "author": who.user}
        if proposal:
            head = f"refs/pr/{len(repo.pull_requests) + 1}"
            repo.heads[head] = base.oid
        return repo.add(head, files, **facts)

    def _carry_out(self, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            data = base64.b64decode(value["content"], validate=True)
            errors = problems(data.decode())[0] if path == "README.md" else []
            if errors:
                raise Refusal(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
            files[path] = Blob.regular(data)
        elif key == "lfsFile":
            if not self.stored(value["oid"], value.get("size")):
                raise Refusal(400, f"The large object of {path} was never uploaded")
            files[path] = Blob.large(value["oid"], (self.store / value["oid"]).stat().st_size)
        elif key == "deletedFile":
            if path not in files:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            del files[path]
        elif key == "deletedFolder":
            for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[name]
        else:
            raise Refusal(400, f"Unknown operation {key}")

    # Reading

    def read(self, blob: Blob) -> bytes:
        """The bytes of a file."""
        return blob.data if blob.data is not None else (self.store / blob.sha256).read_bytes()

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """All files of a repository, for tests to compare."""
        return {path: self.read(blob) for path, blob in self.repos[name].at(revision).files.items()}

    def put(self, name: str, files: Mapping[str, str | bytes], revision: str = "main", private: bool = False) -> Repo:
        """Commits files as somebody else would, making the repository if it is missing."""
        owner, _, short = name.partition("/")
        repo = self.repos.get(name) or self.create(Account(owner), short, None, private)
        blobs = dict(repo.at(revision).files)
        for path, content in files.items():
            blobs[path] = Blob.regular(content if isinstance(content, bytes) else content.encode())
        repo.add(revision, blobs, title="by hand", author=owner)
        return repo
