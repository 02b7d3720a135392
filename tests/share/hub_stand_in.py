"""A stand-in of the Hub on loopback: enough of its HTTP API for huggingface_hub's own client to push,
pull and search, and a record of every request. It is no Hub: nothing is stored, and rights are four words.

What can be set to go wrong: a listing, the bytes behind a name, the answer to any request, and a request
that never ends, which is when a test kills its client.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

TOKEN = "hf_StandInTokenThatMustNeverShow"
READ_TOKEN = "hf_ReadOnlyTokenThatMustNeverShow"
USERS = {TOKEN: ("me", "write"), READ_TOKEN: ("reader", "read")}


@dataclass
class Repo:
    """A repo with its commits (id and files), the newest last."""

    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    listed: list[dict[str, Any]] = field(default_factory=list)
    """What the listing says besides the truth."""
    served: dict[str, bytes] = field(default_factory=dict)
    """Bytes that come instead of a file's own."""

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]

    def commit(self, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits.append((digest, dict(files)))
        return digest

    @property
    def front(self) -> dict[str, Any]:
        return _front(self.files.get("README.md", b"").decode(errors="replace"))


class HubStandIn:
    """The server and all that it knows."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.seen: list[tuple[str, str]] = []  # Method and path.
        self.fault: Callable[[str, str], tuple[Any, ...] | None] = lambda method, path: None
        self.hanging, self.let_go = threading.Event(), threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, name: str, files: dict[str, bytes], *, private: bool = False) -> Repo:
        """A repo with one commit."""
        self.repos[name] = Repo(private)
        self.repos[name].commit(files)
        return self.repos[name]

    def requests(self, method: str, part: str = "") -> list[str]:
        """The last words of the paths that were asked for."""
        return [path.rsplit("/", 1)[-1] for how, path in self.seen if how == method and part in path]

    def hang(self) -> None:
        """Never answer a request, until the test is over."""
        self.hanging.set()
        self.let_go.wait()

    @contextmanager
    def running(self) -> Iterator[HubStandIn]:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield self
        finally:
            self.let_go.set()
            self._server.shutdown()
            self._server.server_close()


def point_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


def _handler(hub: HubStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def _answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            self.body = self.rfile.read(length) if length else self._chunks()
            url = urlsplit(self.path)
            self.query = parse_qs(url.query)
            hub.seen.append((self.command, unquote(self.path)))
            try:
                fault = hub.fault(self.command, unquote(url.path))
                if fault is not None:
                    raise _Refused(*fault)
                found = self._route([unquote(part) for part in url.path.strip("/").split("/")])
                if found is not None:
                    self._answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})
            except _Refused as refused:
                told = {"error": refused.message, "errors": [{"message": refused.message}]}
                headers = {"X-Error-Code": refused.code} if refused.code else {}
                self._answer(refused.status, json.dumps(told).encode(), headers)

        do_GET = do_HEAD = do_POST = do_PUT = _serve

        def _chunks(self) -> bytes:
            data = b""
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            return data

        def _user(self) -> tuple[str, str]:
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if token and token not in USERS:
                raise _Refused(401, "Invalid credentials in Authorization header")
            return USERS.get(token, ("", ""))

        def _repo(self, name: str, *, write: bool = False) -> Repo:
            (user, role), repo, owner = self._user(), hub.repos.get(name), name.split("/")[0]
            if repo is None or (repo.private and user != owner):
                raise _Refused(404, "Repository not found", "RepoNotFound")
            if write and (user, role) != (owner, "write"):
                raise _Refused(403, "You need write rights")
            return repo

        def _at(self, name: str, revision: str, **rights: bool) -> tuple[Repo, str, dict[str, bytes]]:
            repo = self._repo(name, **rights)
            for sha, files in reversed(repo.commits):
                if revision in ("main", sha):
                    return repo, sha, files
            raise _Refused(404, "Revision not found", "RevisionNotFound")

        def _route(self, parts: list[str]) -> Any:
            match parts:
                case ["api", "whoami-v2"]:
                    name, role = self._user()
                    if not name:
                        raise _Refused(401, "Invalid username or password")
                    auth = {"type": "access_token", "accessToken": {"displayName": "a", "role": role}}
                    return {"type": "user", "name": name, "orgs": [], "auth": auth}
                case ["api", "validate-yaml"]:
                    if _front(json.loads(self.body)["content"]).get("license") == "no-such-license":
                        raise _Refused(400, '"license" must be one of a long list')
                    return {"errors": [], "warnings": []}
                case ["api", "repos", "create"]:
                    return self._create(json.loads(self.body))
                case ["api", "models"]:
                    return self._search()
                case ["api", "models", owner, name]:
                    return self._facts(f"{owner}/{name}", "main")
                case ["api", "models", owner, name, "revision", revision]:
                    return self._facts(f"{owner}/{name}", revision)
                case ["api", "models", owner, name, "tree", revision]:
                    repo, _, files = self._at(f"{owner}/{name}", revision)
                    return [*(_entry(path, data) for path, data in files.items()), *repo.listed]
                case ["api", "models", owner, name, "paths-info", revision]:
                    # What mirrors ask; the client itself lists the tree.
                    files, asked = self._at(f"{owner}/{name}", revision)[2], self.body.decode()
                    paths = json.loads(asked)["paths"] if asked[0] == "{" else parse_qs(asked)["paths"]
                    return [_entry(path, files[path]) for path in paths if path in files]
                case ["api", "models", owner, name, "preupload", revision]:
                    return self._preupload(self._at(f"{owner}/{name}", revision, write=True)[2])
                case ["api", "models", owner, name, "commit", revision]:
                    return self._commit(*self._at(f"{owner}/{name}", revision, write=True))
                case [owner, name, "info", "lfs", "objects", "batch"]:
                    self._repo(f"{owner}/{name.removesuffix('.git')}", write=True)
                    return {"transfer": "basic", "objects": [*map(_upload, json.loads(self.body)["objects"])]}
                case ["lfs", oid]:
                    hub.blobs[oid] = self.body
                    assert oid == hashlib.sha256(self.body).hexdigest()
                    return self._answer(200, b"", {"ETag": oid})
                case [owner, name, "resolve", revision, *path]:
                    return self._resolve(f"{owner}/{name}", revision, "/".join(path))
            raise _Refused(404, f"the stand-in does not know {self.path}")

        def _create(self, asked: dict[str, Any]) -> Any:
            user, role = self._user()
            owner = asked.get("organization") or user
            if role != "write" or user != owner:
                raise _Refused(403, f"You don't have the rights to create a model under {owner}")
            name = f"{owner}/{asked['name']}"
            private = asked.get("visibility") == "private" or asked.get("private", False)
            hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
            return {"url": f"{hub.endpoint}/{name}", "name": name}

        def _facts(self, name: str, revision: str) -> dict[str, Any]:
            repo, sha, files = self._at(name, revision)
            front = repo.front
            base, index = front.get("base_model"), front.pop("model-index", None)
            tags = [*(front.get("tags") or []), *([f"base_model:{base}"] if base else [])]
            known = {"id": name, "sha": sha, "private": repo.private, "tags": tags, "cardData": front}
            known |= {"model-index": index, "downloads": 7, "likes": 1}
            known["siblings"] = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
            return known | {"lastModified": "2026-01-02T00:00:00.000Z"}

        def _search(self) -> list[dict[str, Any]]:
            wanted, user = set(self.query.get("filter", [])), self._user()[0]
            text, author = self.query.get("search", [""])[0], self.query.get("author", [""])[0]
            seen = [
                self._facts(name, "main")
                for name, repo in hub.repos.items()
                if text in name and name.startswith(author)
                if not repo.private or name.startswith(f"{user}/")
            ]
            return [one for one in seen if wanted <= set(one["tags"])]

        def _preupload(self, there: dict[str, bytes]) -> Any:
            files = []
            for path in (one["path"] for one in json.loads(self.body)["files"]):
                oid = _etag(path, there[path]) if path in there else None
                mode = "lfs" if _is_lfs(path) else "regular"
                files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            return {"files": files}

        def _commit(self, repo: Repo, sha: str, there: dict[str, bytes]) -> Any:
            files = dict(there)
            for line in self.body.splitlines():
                key, value = (json.loads(line)[word] for word in ("key", "value"))
                if key == "header" and value.get("parentCommit", sha) != sha:
                    raise _Refused(412, "A commit has happened since. Please refresh and try again.")
                if key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                if key == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
                if key == "deletedFile":
                    del files[value["path"]]
            made = repo.commit(files)
            return {"commitUrl": f"{hub.endpoint}/me/x/commit/{made}", "commitOid": made}

        def _resolve(self, name: str, revision: str, path: str) -> None:
            repo, sha, files = self._at(name, revision)
            if path not in files:
                raise _Refused(404, "Entry not found", "EntryNotFound")
            data = repo.served.get(path, files[path])
            headers = {"ETag": f'"{_etag(path, files[path])}"', "X-Repo-Commit": sha}
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                self._answer(206, data[first : last + 1], headers)
            else:
                self._answer(200, data, headers)

    def _upload(one: dict[str, Any]) -> dict[str, Any]:
        """Where to send a blob; nowhere if it is here."""
        way = {"actions": {"upload": {"href": f"{hub.endpoint}/lfs/{one['oid']}"}}}
        return {"oid": one["oid"], "size": one["size"], **({} if one["oid"] in hub.blobs else way)}

    return Handler


def _front(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1]) or {} if card.startswith("---\n") else {}


def _is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".png", ".bin"))


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _etag(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if _is_lfs(path) else _git(data)


def _entry(path: str, data: bytes) -> dict[str, Any]:
    """A file as the Hub lists it."""
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _git(data)}
    if _is_lfs(path):
        found["lfs"] = {"oid": _etag(path, data), "size": len(data), "pointerSize": 134}
    return found
