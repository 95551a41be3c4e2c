"""A small Hugging Face Hub on this machine: the requests that ``huggingface_hub`` makes, and its forms of errors."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


def commit_of(number: int) -> str:
    return f"{number:040x}"


@dataclass
class Repository:
    """The files of each commit, branches by name, and how the server misbehaves.

    ``cut``: paths whose transfer ends half way. ``lies``: path -> the size in the list of files. ``answer``: what is
    sent instead of the list.
    """

    commits: dict[str, Files]
    branches: dict[str, str]
    token: str = ""
    gated: bool = False
    cut: set[str] = field(default_factory=set)
    lies: dict[str, Any] = field(default_factory=dict)
    answer: bytes = b""


@dataclass
class Hub:
    """The repositories by name, and all requests so far as ``METHOD path``."""

    endpoint: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    status: int = 0

    def add(self, name: str, files: Files, number: int = 1, **more: Any) -> Repository:
        """A repository with one commit on its main branch."""
        commit = commit_of(number)
        self.repositories[name] = Repository({commit: files}, {"main": commit}, **more)
        return self.repositories[name]

    def downloads(self) -> list[str]:
        """The files that were transferred."""
        found = (one.partition("/resolve/")[2].partition("/")[2] for one in self.requests if one.startswith("GET"))
        return [one for one in found if one]


@contextmanager
def running() -> Iterator[Hub]:
    """A server until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        if hub.status:
            return self._error(hub.status, "")
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        name, rest = "/".join(parts[2:4] if is_api else parts[:2]), parts[4:] if is_api else parts[2:]
        repository = hub.repositories.get(name)
        if repository is None:
            return self._error(404 if self.headers.get("authorization") else 401, "RepoNotFound")
        if repository.token and self.headers.get("authorization") != f"Bearer {repository.token}":
            return self._error(401, "RepoNotFound")
        revision = "/".join(rest[1:] if is_api else rest[1:2]) or "main"
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            return self._error(404, "RevisionNotFound")
        files = repository.commits[commit]
        if is_api:
            self._send_api(name, commit, files, repository)
        else:
            self._send_file("/".join(rest[2:]), commit, files, repository, body)

    def _send_api(self, name: str, commit: str, files: Files, repository: Repository) -> None:
        sizes = {one: repository.lies.get(one, len(content)) for one, content in files.items()}
        listed = [{"rfilename": one, "size": size, "blobId": "0" * 40} for one, size in sizes.items()]
        content = json.dumps({"id": name, "sha": commit, "siblings": listed}).encode()
        self._send(200, {"Content-Type": "application/json"}, repository.answer or content)

    def _send_file(self, path: str, commit: str, files: Files, repository: Repository, body: bool) -> None:
        if repository.gated:
            return self._error(403, "GatedRepo")
        if path not in files:
            return self._error(404, "EntryNotFound")
        content = files[path]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
        if body and path in repository.cut:
            self.close_connection = True
            return self._send(200, headers, content[: len(content) // 2], len(content))
        return self._send(200, headers, content if body else b"", len(content))

    def _error(self, status: int, code: str) -> None:
        self._send(status, {"X-Error-Code": code} if code else {}, b"")

    def _send(self, status: int, headers: dict[str, str], content: bytes, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)
