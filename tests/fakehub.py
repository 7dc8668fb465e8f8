"""A small Hugging Face Hub on loopback for tests: push, load, stream and list, with LFS uploads. Nothing is checked.

with FakeHub() as hub: ...   # hub.url; set HF_ENDPOINT to it before huggingface_hub is imported
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "a" * 40


class FakeHub:
    """Repositories are `repos[(type, "owner/name")][path] = bytes`, type models or datasets; `log` holds every
    request; every revision is at `commit`."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], dict[str, bytes]] = {}
        self.uploads: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.commit = COMMIT
        hub = self

        class Handler(_Handler):
            store = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def _sha(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: FakeHub

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, code: int, value: Any = b"", headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        headers = {"Content-Length": str(len(body))} | (headers or {})
        if not isinstance(value, bytes):
            headers.setdefault("Content-Type", "application/json")
        self.send_response(code)
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline().strip(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def handle_any(self) -> None:
        path = unquote(urlparse(self.path).path)
        body = self.body()
        self.store.log.append((self.command, path))
        host = f"http://{self.headers['Host']}"
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": o["oid"],
                    "size": o["size"],
                    "actions": {"upload": {"href": f"{host}/lfs/{o['oid']}", "header": {}}},
                }
                for o in json.loads(body)["objects"]
            ]
            return self.answer(
                200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}
            )
        if path.startswith("/lfs/"):
            self.store.uploads[path[5:]] = body
            return self.answer(200)
        if path == "/api/whoami-v2":
            token = {"role": "write", "displayName": "x"}
            return self.answer(
                200, {"name": "me", "type": "user", "orgs": [], "auth": {"type": "access_token", "accessToken": token}}
            )
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.store.repos.setdefault((asked.get("type", "model") + "s", name), {})
            return self.answer(200, {"url": f"{host}/{name}", "name": name, "id": "x"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if found := re.match(r"^/api/(models|datasets|spaces)/([^/]+/[^/]+)(/.*)?$", path):
            return self.repository((found[1], found[2]), found[3] or "", body, host)
        if found := re.match(r"^/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$", path):
            key = ("datasets" if found[1] else "models", found[2])
            data = self.store.repos.get(key, {}).get(found[4])
            if data is None:
                why = "EntryNotFound" if key in self.store.repos else "RepoNotFound"
                return self.answer(404, b"", {"X-Error-Code": why, "X-Repo-Commit": self.store.commit})
            headers = {"ETag": f'"{_sha(data)}"', "X-Repo-Commit": self.store.commit, "Accept-Ranges": "bytes"}
            asked_range = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if asked_range:
                start = int(asked_range[1])
                end = int(asked_range[2] or len(data) - 1)
                headers["Content-Range"] = f"bytes {start}-{min(end, len(data) - 1)}/{len(data)}"
                return self.answer(206, data[start : end + 1], headers)
            return self.answer(200, data, headers)
        return self.answer(404, {"error": f"not here: {path}"})

    def repository(self, key: tuple[str, str], rest: str, body: bytes, host: str) -> None:
        if rest.startswith("/preupload/"):
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith((".parquet", ".safetensors")) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if rest.startswith("/commit/"):
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "lfsFile":
                    self.store.repos[key][item["value"]["path"]] = self.store.uploads[item["value"]["oid"]]
                if item["key"] == "file":
                    self.store.repos[key][item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            commit = {
                "success": True,
                "commitOid": self.store.commit,
                "commitUrl": f"{host}/{key[1]}/commit/{self.store.commit}",
                "hookOutput": "",
            }
            return self.answer(200, commit)
        files = self.store.repos.get(key)
        if files is None:
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if rest == "" or rest.startswith("/revision/"):
            about = {
                "id": key[1],
                "modelId": key[1],
                "sha": self.store.commit,
                "private": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
            return self.answer(200, about | {"siblings": [{"rfilename": f} for f in files]})
        if rest.startswith("/tree/"):
            return self.tree(files, "/".join(rest.split("/")[3:]), "recursive=true" in self.path.lower())
        if rest.startswith("/refs"):
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": self.store.commit}
            return self.answer(200, {"branches": [main], "tags": [], "converts": []})
        if rest.startswith("/paths-info"):
            asked = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode()).get("paths", [])
            return self.answer(200, [_entry(f, data) for f, data in files.items() if f in asked])
        return self.answer(404, {"error": f"not here: {rest}"})

    def tree(self, files: dict[str, bytes], folder: str, recursive: bool) -> None:
        prefix = folder + "/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for file, data in files.items():
            if not file.startswith(prefix):
                continue
            parts = file[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                name = prefix + "/".join(parts[:depth])
                entries[name] = {"type": "directory", "path": name, "size": 0, "oid": _sha(name.encode())}
            if recursive or len(parts) == 1:
                entries[file] = _entry(file, data)
        if folder and not entries:
            return self.answer(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
        return self.answer(200, list(entries.values()))

    do_GET = do_POST = do_HEAD = do_PUT = do_DELETE = handle_any


def _entry(file: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": file, "size": len(data), "oid": _sha(data)}
