"""As much of the Hugging Face hub as its own client needs to upload a model and to load it again.

Files that ``.gitattributes`` gives to LFS take LFS's way, ``.gitignore`` is followed, as on the hub.
"""

from __future__ import annotations

import base64
import contextlib
import fnmatch
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator

COMMIT = "c" * 40


class FakeHub(http.server.ThreadingHTTPServer):
    """Repositories in memory."""

    daemon_threads = False  # closing the server waits for its connections

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.lfs_paths: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.cards: list[str] = []


@contextlib.contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that answers until the block ends."""
    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, content: object, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def do_POST(self) -> None:
        path, hub = self.path.split("?")[0], self.server
        body = self._body()
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            hub.repositories.setdefault(name, {})
            self._answer({"url": f"{hub.address}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            hub.cards.append(json.loads(body)["content"])
            self._answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            self._answer({"files": self._modes(json.loads(body))})
        elif path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)
            upload = [
                {**each, "actions": {"upload": {"href": f"{hub.address}/lfs/{each['oid']}"}}}
                for each in asked["objects"]
            ]
            self._answer({"transfer": "basic", "objects": upload})
        elif found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/main", path):
            self._commit(hub.repositories[found[1]], body)
            url = f"{hub.address}/{found[1]}/commit/{COMMIT}"
            self._answer({"commitUrl": url, "commitOid": COMMIT, "hookOutput": "", "success": True})
        else:
            self._answer({"error": f"unknown {path}"}, 404)

    def _modes(self, asked: dict) -> list[dict]:
        samples = {
            each["path"]: base64.b64decode(each["sample"]).decode(errors="replace") for each in asked["files"]
        }
        lfs = [line.split()[0] for line in samples.get(".gitattributes", "").splitlines() if "lfs" in line]
        ignored = asked.get("gitIgnore", "").split()
        return [
            {
                "path": path,
                "uploadMode": "lfs" if any(fnmatch.fnmatch(path, each) for each in lfs) else "regular",
                "shouldIgnore": any(fnmatch.fnmatch(path, each) for each in ignored),
            }
            for path in samples
        ]

    def _commit(self, files: dict[str, bytes], body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                assert entry["value"]["encoding"] == "base64"
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.server.objects[entry["value"]["oid"]]
                self.server.lfs_paths.add(entry["value"]["path"])

    def do_PUT(self) -> None:
        content, oid = self._body(), self.path.removeprefix("/lfs/")
        if hashlib.sha256(content).hexdigest() != oid:
            self._answer({"error": "another checksum"}, 400)
            return
        self.server.objects[oid] = content
        self._answer(b"")

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/revision/[\w.]+", path):
            files = self.server.repositories.get(found[1])
            if files is None:
                self._answer({"error": "no such model"}, 404, X_Error_Code="RepoNotFound")
            else:
                listed = [{"rfilename": name} for name in files]
                self._answer(
                    {"id": found[1], "sha": COMMIT, "siblings": listed, "private": False, "tags": []}
                )
        elif found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/tree/\w+", path):
            files = self.server.repositories[found[1]]
            rows = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            self._answer(rows)
        elif found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/\w+/(.+)", path):
            content = self.server.repositories[found[1]].get(found[2])
            if content is None:
                self._answer({"error": "no such file"}, 404, X_Error_Code="EntryNotFound")
            else:
                checksum = hashlib.sha256(content).hexdigest()
                self._answer(content, ETag=f'"{checksum}"', X_Repo_Commit=COMMIT)
        else:
            self._answer({"error": f"unknown {path}"}, 404)

    do_HEAD = do_GET  # noqa: N815
