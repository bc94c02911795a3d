# SPDX-License-Identifier: Apache-2.0
"""One exchange with the server in place of the Hub: reads bodies, answers, keeps the log, drops connections."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

from hub_protocol import Account, Refusal


CHUNK = 1 << 16


@dataclass
class Request:
    """One line of the log; `received`: bytes of the body that arrived."""

    method: str
    path: str
    user: str | None = None
    status: int | None = None
    received: int = 0

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


class Exchange(BaseHTTPRequestHandler):
    """Transport only; a subclass answers in `answer`, or raises `Refusal`.

    `server.owner` is the `HubServer`.
    """

    protocol_version = "HTTP/1.1"
    server: Any
    who: Account | None = None
    body = b""

    def log_message(self, *_: Any) -> None:
        """Silent: the log is `HubServer.log`."""

    def answer(self) -> None:
        """Answers the request."""
        raise NotImplementedError

    def do_GET(self) -> None:
        """Answers any request."""
        self.owner = self.server.owner
        url = urlsplit(self.path)
        self.route, self.query = url.path, parse_qs(url.query)
        self.seen = Request(self.command, self.path)
        self.owner.log.append(self.seen)
        try:
            self.answer()
        except Refusal as refusal:
            self.refuse(refusal)
        except (TimeoutError, ConnectionError):
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_GET

    # The body of the request

    def chunks(self) -> Iterator[bytes]:
        """The body, of a stated length or in chunks."""
        for data in self._raw_chunks():
            self.seen.received += len(data)
            yield data

    def _raw_chunks(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self._exactly(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            data = self._exactly(min(left, CHUNK))
            left -= len(data)
            yield data

    def _exactly(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) != size:
            raise ConnectionError("the client left")
        return data

    def drain(self) -> None:
        """Reads the body and forgets it."""
        for _ in self.chunks():
            pass

    def cut(self, after: int) -> None:
        """Drops the connection while the client is still sending; a reset, not an orderly end."""
        self.seen.received = len(self.rfile.read(min(after, int(self.headers.get("Content-Length") or 0))))
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.close_connection = True
        self.connection.close()

    def json(self) -> dict[str, Any]:
        """The body as an object; forms count as well."""
        if "json" in self.headers.get("Content-Type", ""):
            return json.loads(self.body or b"{}")
        return parse_qs(self.body.decode())

    # The answer

    def send(self, data: bytes, status: int = 200, kind: str = "application/json", **headers: Any) -> None:
        """Answers; names of headers are written with `_`."""
        self.seen.status = status
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": len(data), **headers}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def reply(self, content: Any, status: int = 200) -> None:
        """Answers with JSON."""
        self.send(json.dumps(content).encode(), status)

    def refuse(self, refusal: Refusal) -> None:
        """Answers with an error, in the headers that huggingface_hub goes by."""
        body = dict(refusal.body)
        headers = {**body.pop("headers", {}), "X-Error-Message": refusal.message}
        if refusal.code:
            headers["X-Error-Code"] = refusal.code
        if self.command == "PUT":  # its body may not have been read
            self.close_connection = True
            headers["Connection"] = "close"
        if "repo" in body:
            body["url"] = f"{self.owner.url}/{body.pop('repo')}"
        self.send(json.dumps({"error": refusal.message, **body}).encode(), refusal.status, **headers)
