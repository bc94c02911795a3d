# SPDX-License-Identifier: Apache-2.0
"""A model hub over HTTP, as huggingface_hub speaks to it, for tests and for trying out uploads on one machine.

Standalone: `python tests/hub_server.py --port 8008` prints what to set in the environment of its clients.
What it does not have: Xet, uploads in parts, datasets, spaces, gates, pages to look at.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import secrets
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


sys.path.insert(0, str(Path(__file__).parent))

from hub_cards import problems
from hub_http import Exchange, Request
from hub_protocol import Account, Blob, Hub, Refusal, Repo


@dataclass
class Fault:
    """What happens instead of the answer, or before it, to requests whose "METHOD /path" matches.

    Attributes:
        pattern: Regular expression, searched for.
        times: How many requests it meets; `None` for all.
        status: Answer with this status.
        message: Words of that answer.
        plain: Make it an answer of no JSON.
        cut_after: Read so many bytes of the body, then drop the connection.
        action: Called before the request is answered as usual.
    """

    pattern: str
    times: int | None = 1
    status: int | None = None
    message: str = "injected"
    plain: bool = False
    cut_after: int | None = None
    action: Callable[[], None] | None = None


class HubServer:
    """A hub behind a socket, served by threads of this process.

    Args:
        tokens: Accounts by token.
        port: 0 takes a free one.
    """

    def __init__(self, tokens: dict[str, Account], port: int = 0) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hub-server-")
        self._tokens = tokens
        self._http = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
        self._http.daemon_threads = True
        self._http.owner = self
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.key = secrets.token_hex(8)
        self.lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forgets repositories, faults and log."""
        self.hub = Hub(Path(tempfile.mkdtemp(dir=self._folder.name)), self._tokens)
        self.faults: list[Fault] = []
        self.log: list[Request] = []

    def start(self) -> None:
        """Serves from a thread, until the process ends or `stop` is called."""
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()

    def serve(self) -> None:
        """Serves from this thread."""
        self._http.serve_forever()

    def stop(self) -> None:
        """Frees port and disk."""
        self._http.shutdown()
        self._http.server_close()
        self._folder.cleanup()

    def fail(self, pattern: str, **fault: Any) -> Fault:
        """Plans a fault; see `Fault`."""
        self.faults.append(Fault(pattern, **fault))
        return self.faults[-1]

    def fault_for(self, line: str) -> Fault | None:
        """The first planned fault that meets this request; counts it."""
        with self.lock:
            for fault in self.faults:
                if fault.times != 0 and re.search(fault.pattern, line):
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None

    def requests(self, pattern: str) -> list[Request]:
        """What the log holds that matches."""
        return [each for each in self.log if re.search(pattern, str(each))]


class _Handler(Exchange):
    def answer(self) -> None:
        owner = self.owner
        fault = owner.fault_for(str(self.seen))
        if fault and fault.cut_after is not None:
            self.cut(fault.cut_after)
            return
        if fault and fault.status:
            self.drain()
            if not fault.plain:
                raise Refusal(fault.status, fault.message)
            self.send(b"<html>", fault.status, "text/html")
            return
        if fault and fault.action:
            fault.action()
        # Bodies of PUT are large objects, which go by signed links and to the disk.
        self.body = b"" if self.command == "PUT" else b"".join(self.chunks())
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        self.who = owner.hub.account(token or None)
        self.seen.user = self.who.user if self.who else None
        for methods, pattern, action in ROUTES:
            match = re.fullmatch(pattern, self.route)
            if match and self.command in methods.split():
                action(self, *(unquote(group) if group else group for group in match.groups()))
                return
        raise Refusal(404, f"No such page: {self.command} {self.route}")

    def whoami(self) -> None:
        if self.who is None:
            raise Refusal(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": org} for org in self.who.orgs]
        access = {"role": self.who.role, "displayName": "test"}
        self.reply({"type": "user", "name": self.who.user, "orgs": orgs, "auth": {"accessToken": access}})

    def create_repo(self) -> None:
        asked = self.json()
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repo = self.owner.hub.create(self.who, asked["name"], asked.get("organization"), private)
        self.reply({"url": f"{self.owner.url}/{repo.name}", "name": repo.name, "id": secrets.token_hex(12)})

    def validate_yaml(self) -> None:
        errors, warnings = problems(self.json()["content"])
        found = {"errors": errors, "warnings": warnings}
        answer = {name: [{"message": text} for text in texts] for name, texts in found.items()}
        self.reply(answer, 400 if errors else 200)

    def _repo(self, name: str) -> Repo:
        return self.owner.hub.readable(name, self.who)

    def model_info(self, name: str, revision: str | None = None) -> None:
        repo = self._repo(name)
        commit = repo.at(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in self.query:
            for each in siblings:
                entry = commit.files[each["rfilename"]].described(each["rfilename"])
                lfs = {"sha256": entry["lfs"]["oid"], **entry["lfs"]} if "lfs" in entry else None
                each |= {"size": entry["size"], "blobId": entry["oid"], **({"lfs": lfs} if lfs else {})}
        info = {"author": repo.owner, "sha": commit.oid, "private": repo.private, "gated": False, "disabled": False}
        info |= {"downloads": 0, "likes": 0, "tags": [], "siblings": siblings}
        if expand := self.query.get("expand"):
            info = {key: value for key, value in info.items() if key in expand}
        self.reply({"_id": name, "id": name, "modelId": name, **info})

    def preupload(self, name: str, revision: str) -> None:
        repo = self.owner.hub.writable(name, self.who, proposal="create_pr" in self.query)
        self.reply({"files": self.owner.hub.upload_modes(repo, revision, self.json()["files"])})

    def lfs_batch(self, name: str) -> None:
        # Whoever may open a pull request may store objects.
        self.owner.hub.writable(name, self.who, proposal=True)
        objects = []
        for each in self.json()["objects"]:
            oid, size = each["oid"], each["size"]
            entry = {"oid": oid, "size": size, "authenticated": True}
            if not self.owner.hub.stored(oid, size):
                upload = {"href": f"{self.owner.url}/lfs/{oid}?signature={self.owner.key}"}
                verify = {"href": f"{self.owner.url}/{name}.git/info/lfs/objects/verify"}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if self.query.get("signature") != [self.owner.key]:
            raise Refusal(403, "SignatureDoesNotMatch")
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=self.owner.hub.store, prefix="part-", delete=False) as file:
            for data in self.chunks():
                digest.update(data)
                file.write(data)
        if digest.hexdigest() != oid:
            raise Refusal(400, f"The bytes have the hash {digest.hexdigest()}, not {oid}")
        Path(file.name).rename(self.owner.hub.store / oid)
        self.send(b"", ETag=f'"{oid}"')

    def lfs_verify(self, name: str) -> None:
        self.owner.hub.writable(name, self.who, proposal=True)
        asked = self.json()
        if not self.owner.hub.stored(asked["oid"], asked["size"]):
            raise Refusal(422, "The object is not there, or of another size")
        self.reply({})

    def commit(self, name: str, revision: str) -> None:
        hub, proposal = self.owner.hub, "create_pr" in self.query
        repo = hub.writable(name, self.who, proposal=proposal)
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        with self.owner.lock:
            done = hub.commit(repo, revision, lines, self.who, proposal=proposal)
        answer = {"success": True, "commitOid": done.oid, "commitUrl": f"{self.owner.url}/{name}/commit/{done.oid}"}
        if proposal:
            answer["pullRequestUrl"] = f"{self.owner.url}/{name}/discussions/{len(repo.pull_requests)}"
        self.reply(answer)

    def create_branch(self, name: str, branch: str) -> None:
        self.owner.hub.branch(self.owner.hub.writable(name, self.who), branch, self.json().get("startingPoint"))
        self.reply({})

    def refs(self, name: str) -> None:
        repo = self._repo(name)

        def listed(names: list[str]) -> list[dict[str, str]]:
            full = {each: each if each.startswith("refs/") else f"refs/heads/{each}" for each in names}
            return [{"name": each, "ref": full[each], "targetCommit": repo.heads[each]} for each in names]

        proposals = repo.pull_requests
        found = {
            "branches": listed([each for each in repo.heads if each not in proposals]),
            "converts": [],
            "tags": [],
        }
        self.reply({**found, "pullRequests": listed(proposals)} if "include_prs" in self.query else found)

    def commits(self, name: str, revision: str) -> None:
        date = "2025-01-01T00:00:00.000Z"
        history = self._repo(name).history(revision)
        facts = [{"id": each.oid, "title": each.title, "message": each.description} for each in history]
        self.reply(
            [
                {**fact, "authors": [{"user": each.author}], "date": date}
                for fact, each in zip(facts, history, strict=True)
            ]
        )

    def tree(self, name: str, revision: str, folder: str | None = None) -> None:
        files = self._repo(name).at(revision).files
        inside = f"{folder.strip('/')}/" if folder else ""
        below = [path for path in sorted(files) if path.startswith(inside)]
        if inside and not below:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        flat = self.query.get("recursive", ["false"])[0].lower() in ("false", "0")
        folders = {inside + path[len(inside) :].split("/")[0] for path in below if "/" in path[len(inside) :]}
        entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        shown = [path for path in below if not (flat and "/" in path[len(inside) :])]
        self.reply(entries + [files[path].described(path) for path in shown])

    def paths_info(self, name: str, revision: str) -> None:
        files = self._repo(name).at(revision).files
        self.reply([files[path].described(path) for path in self.json()["paths"] if path in files])

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self._repo(name).at(revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers={"X-Repo-Commit": commit.oid})
        blob = commit.files[path]
        headers: dict[str, Any] = {"X_Repo_Commit": commit.oid, "ETag": f'"{blob.oid}"', "Accept_Ranges": "bytes"}
        if blob.sha256:
            headers |= {"X_Linked_Etag": f'"{blob.sha256}"', "X_Linked_Size": blob.size}
        self._content(blob, headers)

    def _content(self, blob: Blob, headers: dict[str, Any]) -> None:
        data = self.owner.hub.read(blob)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            self.send(data, kind="application/octet-stream", **headers)
            return
        first, last = int(asked[1]), min(int(asked[2] or blob.size), blob.size - 1)
        if first > last:
            raise Refusal(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{blob.size}"})
        headers["Content_Range"] = f"bytes {first}-{last}/{blob.size}"
        self.send(data[first : last + 1], 206, "application/octet-stream", **headers)


_MODEL, _REV = r"/api/models/([^/]+/[^/]+)", "([^/]+)"
ROUTES: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("GET", _MODEL, _Handler.model_info),
    ("GET", f"{_MODEL}/revision/{_REV}", _Handler.model_info),
    ("POST", f"{_MODEL}/preupload/{_REV}", _Handler.preupload),
    ("POST", f"{_MODEL}/commit/{_REV}", _Handler.commit),
    ("POST", f"{_MODEL}/branch/{_REV}", _Handler.create_branch),
    ("GET", f"{_MODEL}/refs", _Handler.refs),
    ("GET", f"{_MODEL}/commits/{_REV}", _Handler.commits),
    ("GET", f"{_MODEL}/tree/{_REV}(?:/(.+))?", _Handler.tree),
    ("POST", f"{_MODEL}/paths-info/{_REV}", _Handler.paths_info),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/verify", _Handler.lfs_verify),
    ("PUT", "/lfs/([0-9a-f]{64})", _Handler.lfs_put),
    ("GET HEAD", f"/([^/]+/[^/]+)/resolve/{_REV}/(.+)", _Handler.resolve),
    # A name without an owner: no such repository here, whatever is asked of it.
    ("GET", "/api/models/([^/]+)(?:/(?:revision|tree|refs).*)?", _Handler._repo),
    ("GET HEAD", "/([^/]+)/resolve/.*", _Handler._repo),
)
ACCOUNTS = {
    "hf_write": Account("me", orgs=("my-org",)),
    "hf_read": Account("me", role="read"),
    "hf_other": Account("other"),
}


def main() -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8008)
    server = HubServer(ACCOUNTS, parser.parse_args().port)
    people = ", ".join(f"{token} ({account.user}, {account.role})" for token, account in ACCOUNTS.items())
    sys.stdout.write(f"export HF_ENDPOINT={server.url} HF_TOKEN=hf_write HF_HUB_DISABLE_XET=1\n# tokens: {people}\n")
    sys.stdout.flush()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.serve()
    except KeyboardInterrupt:
        server.stop()


if __name__ == "__main__":
    main()
