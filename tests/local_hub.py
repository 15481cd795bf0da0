"""A local server that answers the requests that huggingface_hub and transformers send to the Hub.

It keeps every commit of every repository. Uploads contain whole files, as small files do on the real Hub.
"""

import base64
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class LocalHub(ThreadingHTTPServer):
    """Maps each repository id to its commits, oldest first: `{id: {sha: {path: content}}}`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that make huggingface_hub use this server."""
        address = f"http://127.0.0.1:{self.server_port}"
        settings = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        inherited = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        return inherited | settings | {"HF_ENDPOINT": address, "HF_TOKEN": "hf_local"}

    def commit(self, repository: str, files: dict[str, bytes]) -> str:
        """Add or replace files, and return the sha of the commit."""
        commits = self.repositories.setdefault(repository, {})
        tree = {**(list(commits.values())[-1] if commits else {}), **files}
        known = sorted((path, _etag(content)) for path, content in tree.items())
        sha = hashlib.sha1(f"{list(commits)} {known}".encode()).hexdigest()
        commits[sha] = tree
        return sha

    def add(self, repository: str, folder: Path) -> str:
        """Commit a folder."""
        files = (file for file in folder.rglob("*") if file.is_file())
        return self.commit(repository, {file.relative_to(folder).as_posix(): file.read_bytes() for file in files})


class Handler(BaseHTTPRequestHandler):
    """Answers as the Hub does."""

    server: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Log nothing."""

    def do_HEAD(self) -> None:
        """Send the headers of a file."""
        self.do_GET()

    def do_GET(self) -> None:
        """Send a file, or a description of a repository."""
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"] and len(parts) > 3:
            self._describe("/".join(parts[2:4]), parts[4:])
        elif parts[2:3] == ["resolve"]:
            self._send_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._fail(404, "EntryNotFound")

    def do_POST(self) -> None:
        """Create a repository, or commit to one."""
        body = self._body()
        parts = urlsplit(self.path).path.strip("/").split("/")
        repository = "/".join(parts[2:4])
        if parts == ["api", "repos", "create"]:
            wanted = json.loads(body)
            repository = f"{wanted.get('organization', 'USER')}/{wanted['name']}"
            self.server.repositories.setdefault(repository, {})
            self._answer({"url": f"{self._address()}/{repository}"})
        elif parts == ["api", "validate-yaml"]:
            self._answer({"errors": [], "warnings": []})
        elif parts[4:5] == ["preupload"]:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self._answer({"files": [file | {"shouldIgnore": False} for file in files]})
        elif parts[4:5] == ["commit"]:
            lines = [json.loads(line) for line in body.splitlines() if line]
            values = [line["value"] for line in lines if line["key"] == "file"]
            sha = self.server.commit(repository, {one["path"]: base64.b64decode(one["content"]) for one in values})
            url = f"{self._address()}/{repository}/commit/{sha}"
            self._answer({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})
        else:
            self._fail(404, "EntryNotFound")

    def _describe(self, repository: str, rest: list[str]) -> None:
        what, revision, *path = [*rest, "revision", "main"][:2] + rest[2:]
        found = self._tree(repository, revision)
        if found is None:
            return
        sha, tree = found
        if what == "revision":
            files = [{"rfilename": name} for name in sorted(tree)]
            self._answer({"id": repository, "sha": sha, "siblings": files, "tags": [], "private": False})
        elif what == "tree":
            folder = "".join(f"{part}/" for part in path)
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
                for name, content in sorted(tree.items())
                if name.startswith(folder)
            ]
            self._answer(entries) if entries else self._fail(404, "EntryNotFound")
        else:
            self._fail(404, "EntryNotFound")

    def _send_file(self, repository: str, revision: str, name: str) -> None:
        found = self._tree(repository, revision)
        if found is None:
            return
        sha, tree = found
        if name in tree:
            self._send(200, tree[name], {"ETag": f'"{_etag(tree[name])}"', "X-Repo-Commit": sha})
        else:
            self._fail(404, "EntryNotFound", {"X-Repo-Commit": sha})

    def _tree(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.server.repositories.get(repository)
        if not commits:
            self._fail(401, "RepoNotFound")
            return None
        sha = list(commits)[-1] if revision == "main" else revision
        if sha not in commits:
            self._fail(404, "RevisionNotFound")
            return None
        return sha, commits[sha]

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def _answer(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"", {"X-Error-Code": code, **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """Serve an empty Hub."""
    hub = LocalHub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
