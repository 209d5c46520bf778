"""A server that answers what huggingface_hub asks of the hub when a folder is uploaded and fetched again, and no more."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "c" * 40
TOKEN = "hf_aWriteTokenOfTheTests"
OWNER = "me"


class Hub:
    """``branches``: of each repository, the files by branch; ``private``: its visibility; ``large``: a pattern of what goes
    to the large file storage; ``seen``: methods and paths that were asked for."""

    def __init__(self, large: str = r"\.safetensors$") -> None:
        self.branches: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.card_errors: list[dict[str, str]] = []
        self.seen: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.large = large
        self.url = ""

    def add(self, repo: str, private: bool = False, **files: bytes) -> None:
        self.private[repo], self.branches[repo] = private, {"main": dict(files)}

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """The status and the answer: JSON, or the bytes of a file."""
        if found := re.fullmatch("/objects/(.*)", path):
            self.objects[found[1]] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 400 if self.card_errors else 200, {"errors": self.card_errors, "warnings": []}
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return 200, {
                "transfer": "basic",
                "objects": [self._upload_of(each) for each in json.loads(body)["objects"]],
            }
        if found := re.fullmatch(
            r"/api/models/([^/]+/[^/]+)(?:/(branch|revision|tree|preupload|commit)/([^/]+))?", path
        ):
            repo, verb, branch = found[1], found[2] or "revision", unquote(found[3] or "main")
            if repo not in self.branches:
                return 404, {"error": "Repository not found"}
            return getattr(self, f"_{verb}")(repo, branch, body)
        raise AssertionError(f"huggingface_hub asked for {method} {path}, which this hub does not know")

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.branches:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{repo}"}
        if asked["organization"] != OWNER:
            return 403, {
                "error": f"You don't have the rights to create a model under the namespace {asked['organization']!r}"
            }
        self.add(repo, private=asked.get("visibility") == "private")
        return 200, {"url": f"{self.url}/{repo}", "name": repo}

    def _upload_of(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return wanted | {"actions": {"upload": {"href": f"{self.url}/objects/{wanted['oid']}"}}}

    def _branch(self, repo: str, branch: str, _: bytes) -> tuple[int, Any]:
        if branch in self.branches[repo]:
            return 409, {"error": "Reference already exists"}
        self.branches[repo][branch] = dict(self.branches[repo]["main"])
        return 200, {}

    def _revision(self, repo: str, branch: str, _: bytes) -> tuple[int, Any]:
        names = [{"rfilename": name} for name in self.branches[repo]["main" if branch == COMMIT else branch]]
        return 200, {"id": repo, "private": self.private[repo], "sha": COMMIT, "siblings": names}

    def _tree(self, repo: str, branch: str, _: bytes) -> tuple[int, Any]:
        files = self.branches[repo][branch]
        return 200, [{"type": "file", "path": name, "size": len(files[name]), "oid": "0"} for name in files]

    def _preupload(self, repo: str, branch: str, body: bytes) -> tuple[int, Any]:
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = {name: "lfs" if re.search(self.large, name) else "regular" for name in names}
        return 200, {"files": [{"path": name, "uploadMode": modes[name], "shouldIgnore": False} for name in names]}

    def _commit(self, repo: str, branch: str, body: bytes) -> tuple[int, Any]:
        files = self.branches[repo][branch]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.messages.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                content = files[value["path"]] = self.objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
            else:
                assert entry["key"] == "deletedFile"
                del files[value["path"]]
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT}


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """``hub`` at ``hub.url``."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            path = self.path.partition("?")[0]
            hub.seen.append(f"{self.command} {path}")
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            status, answer = hub.answer(self.command, path, self.headers.get("authorization", ""), body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if "error" in answer:
                self.send_header("X-Error-Message", answer["error"])
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_POST  # noqa: N815 - http.server's names

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()
