"""A Hugging Face hub of this machine's own, for tests of what is fetched from one: the few requests that matter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlparse

SECRET = "hf_aVerySecretTokenOfTheUser"
"""What :func:`running_hub` logs in with; no output may have it."""


@dataclass
class Repository:
    """Commits of files: by the name of the revision, the commit; by commit, the directory."""

    revisions: dict[str, str] = field(default_factory=dict)
    directories: dict[str, Path] = field(default_factory=dict)
    gated: bool = False

    def commit(self, directory: Path, *, revision: str = "main") -> str:
        """Publish the files in ``directory`` under ``revision``; return the commit."""
        commit = hashlib.sha1(f"{directory}{len(self.directories)}".encode()).hexdigest()
        self.revisions[revision] = commit
        self.directories[commit] = directory
        return commit

    def find(self, revision: str) -> tuple[str, Path] | None:
        commit = self.revisions.get(revision, revision)
        return (commit, self.directories[commit]) if commit in self.directories else None


@dataclass
class Hub:
    """Repositories by name, and what was asked for.

    Attributes:
        broken: answer every request with this status.
        cut_after: send no more than so many bytes of a weight file, and close the connection.
        requests: method and path of each.
        fetched: the files whose contents were sent.
        authorizations: the tokens that came along.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    broken: int | None = None
    cut_after: int | None = None
    requests: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    authorizations: set[str | None] = field(default_factory=set)

    def publish(self, name: str, directory: Path, *, revision: str = "main") -> str:
        return self.repositories.setdefault(name, Repository()).commit(directory, revision=revision)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers at ``hub.url``."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.authorizations.add(self.headers.get("Authorization"))
        if self.hub.broken is not None:
            return self.refuse(self.hub.broken, None)
        parts = path.strip("/").split("/")
        if len(parts) < 3:  # of no repository
            return self.refuse(404, None)
        owner, name, verb, *rest = parts[2:] if parts[:2] == ["api", "models"] else parts
        repository = self.hub.repositories.get(f"{owner}/{name}")
        if repository is None:
            return self.refuse(401, "RepoNotFound")
        if verb == "resolve":
            revision, *file = rest
            return self.resolve(repository, revision, "/".join(file))
        found = repository.find("/".join(rest))
        if found is None:
            return self.refuse(404, "RevisionNotFound")
        commit, directory = found
        if verb == "revision":
            return self.answer({"id": f"{owner}/{name}", "sha": commit, "siblings": []})
        assert verb == "tree", path
        return self.answer([_entry(file, directory) for file in sorted(directory.rglob("*")) if file.is_file()])

    def resolve(self, repository: Repository, revision: str, name: str) -> None:
        if repository.gated:
            return self.refuse(403, "GatedRepo")
        found = repository.find(revision)
        assert found is not None
        commit, directory = found
        file = directory / name
        if not file.is_file():
            return self.refuse(404, "EntryNotFound")
        content = file.read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_digest(file)}"'}
        if self.command == "HEAD":
            return self.answer(content, headers)
        self.hub.fetched.append(name)
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if self.hub.cut_after is not None and name.endswith(".safetensors"):
            self.answer(content[start:], headers, send=content[start : start + self.hub.cut_after])
            self.close_connection = True
            return None
        return self.answer(content[start:], headers, status=206 if start else 200)

    def refuse(self, status: int, code: str | None) -> None:
        self.answer({"error": f"no: {SECRET}"}, {"X-Error-Code": code} if code else {}, status=status)

    def answer(
        self, content: object, headers: dict[str, str] | None = None, *, status: int = 200, send: bytes | None = None
    ) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if send is None else send)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _entry(file: Path, directory: Path) -> dict[str, object]:
    entry: dict[str, object] = {
        "type": "file",
        "path": file.relative_to(directory).as_posix(),
        "size": file.stat().st_size,
        "oid": _digest(file)[:40],
    }
    if file.suffix in (".safetensors", ".bin"):
        entry["lfs"] = {"oid": _digest(file), "size": file.stat().st_size, "pointerSize": 134}
    return entry


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
