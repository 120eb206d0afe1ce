"""A Hub on the loopback: the routes that huggingface_hub's client uses, and faults on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c" * 39 + "1"
TOKEN = "hf_right"


@dataclass(kw_only=True)
class Repo:
    """A directory served as a repository: `revisions` name commits, all of the same files."""

    directory: Path
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    gated: bool = False
    private: bool = False
    stated_sha256: dict[str, str] = field(default_factory=dict)
    xet_status: int | None = None
    """Large files are in Xet storage, which answers every question with this status."""

    def file(self, name: str) -> dict[str, Any]:
        content = (self.directory / name).read_bytes()
        entry: dict[str, Any] = {
            "rfilename": name,
            "size": len(content),
            "blobId": hashlib.sha1(content).hexdigest(),
        }
        if name.endswith(".safetensors"):
            sha256 = self.stated_sha256.get(name, hashlib.sha256(content).hexdigest())
            entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
        return entry


@dataclass(kw_only=True)
class Fault:
    """What befalls the next `times` requests whose method and path match."""

    method: str
    path: str
    times: int
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after_bytes: int | None = None
    hook: Callable[[], None] | None = None
    page: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request as it came in."""

    method: str
    path: str
    range: str | None


class HubServer:
    """Serve `repos` at `url` while inside `running()`; `log` is every request so far."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.ignores_ranges = False
        self.url = self.cdn_url = ""
        self._lock = threading.Lock()

    def fail(self, path: str, *, method: str = "GET", times: int = 1, **fault: Any) -> None:
        """The next `times` requests for a path that the pattern is found in meet this fault."""
        self.faults.append(Fault(method=method, path=path, times=times, **fault))

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def num_requests(self, pattern: str, method: str = "GET") -> int:
        return sum(r.method == method and bool(re.search(pattern, r.path)) for r in self.log)

    @contextmanager
    def running(self) -> Iterator[HubServer]:
        hub = self

        class Bound(_Handler):
            server_of = hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        server.daemon_threads = True
        thread = threading.Thread(
            target=server.serve_forever, args=(0.02,), name="hub", daemon=True
        )
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        self.cdn_url = f"http://localhost:{server.server_port}"  # another host, as in real life
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server_of: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        hub = self.server_of
        hub.log.append(Request(method=self.command, path=path, range=self.headers.get("Range")))
        fault = hub.take_fault(self.command, path)
        if fault and fault.hook:
            fault.hook()
        if fault and fault.page is not None:
            self._send(200, fault.page, {"Content-Type": "text/html"})
            return
        if fault and fault.status:
            self._json({"error": "fault"}, fault.status, fault.headers)
            return
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3])
        elif re.fullmatch(r"/xet-token", path):
            in_an_hour = str(int(time.time()) + 3600)
            headers = {"X-Xet-Cas-Url": hub.url, "X-Xet-Access-Token": "t"}
            self._send(200, b"", {**headers, "X-Xet-Token-Expiration": in_an_hour})
        elif re.match(r"/v\d/", path):
            (status,) = {repo.xet_status for repo in hub.repos.values()}
            self._send(status or 404, b"", {})
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            self._content(hub.repos[match[1]], match[2], fault)
        else:
            self._json({"error": "no such route"}, 404)

    def _repo(self, name: str) -> Repo | None:
        """The repository, if it is there for whoever asks; else the refusal is sent."""
        repo = self.server_of.repos.get(name)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo is None or (repo.private and token != TOKEN):
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self._json({"error": "Repository not found"}, 401, headers)
            return None
        if repo.gated and token != TOKEN and "/resolve/" in self.path:
            headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}
            self._json({"error": "Access is restricted"}, 403 if token else 401, headers)
            return None
        return repo

    def _commit(self, repo: Repo, revision: str) -> str | None:
        commit = repo.revisions.get(revision)
        if commit is None and revision in repo.revisions.values():
            commit = revision
        if commit is None:
            headers = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}
            self._json({"error": "Invalid rev id"}, 404, headers)
        return commit

    def _info(self, name: str, revision: str) -> None:
        repo = self._repo(name)
        if repo is None or (commit := self._commit(repo, revision)) is None:
            return
        files = sorted(path.name for path in repo.directory.iterdir() if path.is_file())
        self._json(
            {
                "id": name,
                "modelId": name,
                "sha": commit,
                "private": repo.private,
                "gated": "auto" if repo.gated else False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [repo.file(file) for file in files],
            }
        )

    def _resolve(self, name: str, revision: str, file: str) -> None:
        """Metadata headers; large files are redirected, as to a content network."""
        repo = self._repo(name)
        if repo is None or (commit := self._commit(repo, revision)) is None:
            return
        if not (repo.directory / file).is_file():
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            self._json({"error": "Entry not found"}, 404, headers)
            return
        entry = repo.file(file)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {
                "X-Linked-Size": str(entry["size"]),
                "X-Linked-ETag": f'"{entry["lfs"]["sha256"]}"',
                "Location": f"{self.server_of.cdn_url}/cdn/{name}/{file}",
            }
            if repo.xet_status is not None:
                headers["X-Xet-Hash"] = entry["lfs"]["sha256"]
                headers["X-Xet-Refresh-Route"] = f"{self.server_of.url}/xet-token"
            self._send(302, b"", headers)
        else:
            self._content(repo, file, None, {**headers, "ETag": f'"{entry["blobId"]}"'})

    def _content(
        self, repo: Repo, file: str, fault: Fault | None, headers: dict[str, str] | None = None
    ) -> None:
        content = (repo.directory / file).read_bytes()
        headers, status = dict(headers or {}), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and not self.server_of.ignores_ranges:
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            if first >= len(content):
                self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            last = min(last, len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self._send(status, content, headers, fault.cut_after_bytes if fault else None)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(
            status,
            json.dumps(value).encode(),
            {"Content-Type": "application/json", **(headers or {})},
        )

    def _send(
        self, status: int, content: bytes, headers: dict[str, str], cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            self.wfile.write(content if cut is None else content[:cut])
            if cut is not None:
                self.wfile.flush()
                self.close_connection = True
        except ConnectionError:
            self.close_connection = True  # the client has read all that it wanted
