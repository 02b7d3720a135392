"""A stand-in of the Hub on loopback: enough of its HTTP API for huggingface_hub's own client to push,
pull and search, and a record of every request. It is no Hub: nothing is stored, and rights are four words.

What can be set to go wrong: a listing, the bytes behind a name, the answer to any request, and a request
that never ends, which is when a test kills its client.
"""

from __future__ import annotations

import base64
import datetime
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

import yaml

TOKEN = "hf_StandInTokenThatMustNeverShow"
READ_TOKEN = "hf_ReadOnlyTokenThatMustNeverShow"


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """A repo with its commits, the newest last.

    Attributes:
        private: whether only its owner sees it.
        commits: id and files of each.
        listed: what the listing says instead of the truth.
        served: bytes that come instead of a file's own.
    """

    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    listed: list[dict[str, Any]] = field(default_factory=list)
    served: dict[str, bytes] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(repr((len(self.commits), sorted(files))).encode())
        for name in sorted(files):
            digest.update(files[name])
        self.commits.append((digest.hexdigest(), dict(files)))
        return digest.hexdigest()

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((one for one in self.commits if one[0] == revision), None)

    @property
    def front(self) -> dict[str, Any]:
        card = self.commits[-1][1].get("README.md", b"").decode(errors="replace")
        return yaml.safe_load(card.split("---\n")[1]) or {} if card.startswith("---\n") else {}


@dataclass
class Seen:
    """A request as it came."""

    method: str
    path: str
    body: bytes


class HubStandIn:
    """The server and all that it knows."""

    def __init__(self) -> None:
        self.users = {TOKEN: ("me", "write"), READ_TOKEN: ("reader", "read")}
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.seen: list[Seen] = []
        self.fault: Callable[[str, str], tuple[int, str] | None] = lambda method, path: None
        self.hanging = threading.Event()
        self.let_go = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def requests(self, method: str, part: str = "") -> list[Seen]:
        return [one for one in self.seen if one.method == method and part in one.path]

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


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


def _handler(hub: HubStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        # -------------------------------------------------------------- in and out

        def _answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _json(self, found: Any, status: int = 200) -> None:
            self._answer(status, json.dumps(found).encode(), {"Content-Type": "application/json"})

        def _serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            self.body = self.rfile.read(length) if length else self._chunks()
            url = urlsplit(self.path)
            self.query = parse_qs(url.query)
            self.place = url.path
            hub.seen.append(Seen(self.command, unquote(self.path), self.body))
            try:
                fault = hub.fault(self.command, unquote(url.path))
                if fault is not None:
                    raise _Refused(*fault)
                self._route()
            except _Refused as refused:
                found = {"error": refused.message, "errors": [{"message": refused.message}]}
                headers = {"X-Error-Code": refused.code} if refused.code else {}
                self._answer(refused.status, json.dumps(found).encode(), headers)

        def _chunks(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return b""
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data

        do_GET = do_HEAD = do_POST = do_PUT = _serve

        def _user(self) -> tuple[str, str] | None:
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if token and token not in hub.users:
                raise _Refused(401, "Invalid credentials in Authorization header")
            return hub.users.get(token)

        def _repo(self, name: str, *, write: bool = False) -> Repo:
            user, repo = self._user(), hub.repos.get(name)
            owner = name.split("/")[0]
            if repo is None or (repo.private and (user is None or user[0] != owner)):
                raise _Refused(404, "Repository not found", "RepoNotFound")
            if write and (user is None or user[0] != owner or user[1] != "write"):
                raise _Refused(403, "You need write rights")
            return repo

        def _at(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]]:
            found = repo.at(revision)
            if found is None:
                raise _Refused(404, "Revision not found", "RevisionNotFound")
            return found

        # -------------------------------------------------------------- what is asked

        def _route(self) -> None:
            parts = [unquote(part) for part in self.place.strip("/").split("/")]
            match parts:
                case ["api", "whoami-v2"]:
                    user = self._user()
                    if user is None:
                        raise _Refused(401, "Invalid username or password")
                    token = {"displayName": "a", "role": user[1]}
                    auth = {"type": "access_token", "accessToken": token}
                    self._json({"type": "user", "name": user[0], "orgs": [], "auth": auth})
                case ["api", "validate-yaml"]:
                    self._validate(json.loads(self.body)["content"])
                case ["api", "repos", "create"]:
                    self._create(json.loads(self.body))
                case ["api", "models"]:
                    self._search()
                case ["api", "models", owner, name]:
                    self._info(f"{owner}/{name}", "main")
                case ["api", "models", owner, name, "revision", revision]:
                    self._info(f"{owner}/{name}", revision)
                case ["api", "models", owner, name, "tree", revision]:
                    self._tree(f"{owner}/{name}", revision)
                case ["api", "models", owner, name, "paths-info", revision]:
                    self._paths(f"{owner}/{name}", revision)
                case ["api", "models", owner, name, "preupload", revision]:
                    self._preupload(f"{owner}/{name}", revision)
                case ["api", "models", owner, name, "commit", revision]:
                    self._commit(f"{owner}/{name}", revision)
                case [owner, name, "info", "lfs", "objects", "batch"]:
                    self._batch(f"{owner}/{name.removesuffix('.git')}")
                case ["lfs", oid]:
                    hub.blobs[hashlib.sha256(self.body).hexdigest()] = self.body
                    assert oid in hub.blobs
                    self._answer(200, b"", {"ETag": oid})
                case [owner, name, "resolve", revision, *path]:
                    self._resolve(f"{owner}/{name}", revision, "/".join(path))
                case _:
                    raise _Refused(404, f"the stand-in does not know {self.place}")

        def _validate(self, card: str) -> None:
            front = yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else {}
            if front.get("license") == "no-such-license":
                raise _Refused(400, '"license" must be one of a long list')
            self._json({"errors": [], "warnings": []})

        def _create(self, asked: dict[str, Any]) -> None:
            user = self._user()
            owner = asked.get("organization") or (user[0] if user else "")
            if user is None or user[1] != "write" or user[0] != owner:
                raise _Refused(403, f"You don't have the rights to create a model under {owner}")
            name = f"{owner}/{asked['name']}"
            if name in hub.repos:
                raise _Refused(409, "You already created this model repo")
            hub.repos[name] = Repo(
                private=asked.get("visibility") == "private" or asked.get("private", False)
            )
            hub.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
            self._json({"url": f"{hub.endpoint}/{name}", "name": name})

        def _facts(self, name: str, repo: Repo, sha: str) -> dict[str, Any]:
            front = repo.front
            tags = list(front.get("tags") or [])
            if front.get("base_model"):
                base = front["base_model"]
                tags += [f"base_model:{base}", f"base_model:adapter:{base}"]
            return {
                "id": name,
                "sha": sha,
                "private": repo.private,
                "tags": tags,
                "cardData": {key: value for key, value in front.items() if key != "model-index"},
                "model-index": front.get("model-index"),
                "downloads": 7,
                "likes": 1,
                "lastModified": datetime.datetime(2026, 1, 2).isoformat() + ".000Z",
            }

        def _info(self, name: str, revision: str) -> None:
            repo = self._repo(name)
            self._json(self._facts(name, repo, self._at(repo, revision)[0]))

        def _search(self) -> None:
            user = self._user()
            wanted = set(self.query.get("filter", []))
            found = []
            for name, repo in hub.repos.items():
                facts = self._facts(name, repo, repo.commits[-1][0])
                text = self.query.get("search", [""])[0]
                owner = self.query.get("author", [name.split("/")[0]])[0]
                seen = not repo.private or (user is not None and user[0] == name.split("/")[0])
                if seen and wanted <= set(facts["tags"]) and text in name and name.startswith(f"{owner}/"):
                    found.append(facts)
            self._json(found[: int(self.query.get("limit", ["100"])[0])])

        def _tree(self, name: str, revision: str) -> None:
            repo = self._repo(name)
            found = [_entry(path, data) for path, data in self._at(repo, revision)[1].items()]
            self._json([*found, *repo.listed])

        def _paths(self, name: str, revision: str) -> None:
            files = self._at(self._repo(name), revision)[1]
            asked = self.body.decode()
            paths = json.loads(asked)["paths"] if asked.startswith("{") else parse_qs(asked)["paths"]
            self._json([_entry(path, files[path]) for path in paths if path in files])

        def _preupload(self, name: str, revision: str) -> None:
            repo = self._repo(name, write=True)
            there = self._at(repo, revision)[1]
            files = []
            for one in json.loads(self.body)["files"]:
                mode = "lfs" if _is_lfs(one["path"]) else "regular"
                oid = _etag(one["path"], there[one["path"]]) if one["path"] in there else None
                files.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self._json({"files": files})

        def _batch(self, name: str) -> None:
            self._repo(name, write=True)
            objects = []
            for one in json.loads(self.body)["objects"]:
                found: dict[str, Any] = {"oid": one["oid"], "size": one["size"]}
                if one["oid"] not in hub.blobs:
                    found["actions"] = {"upload": {"href": f"{hub.endpoint}/lfs/{one['oid']}"}}
                objects.append(found)
            self._json({"transfer": "basic", "objects": objects})

        def _commit(self, name: str, revision: str) -> None:
            repo = self._repo(name, write=True)
            sha, there = self._at(repo, revision)
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
            self._json({"commitUrl": f"{hub.endpoint}/{name}/commit/{made}", "commitOid": made})

        def _resolve(self, name: str, revision: str, path: str) -> None:
            repo = self._repo(name)
            sha, files = self._at(repo, revision)
            if path not in files:
                raise _Refused(404, "Entry not found", "EntryNotFound")
            data = repo.served.get(path, files[path])
            headers = {"ETag": f'"{_etag(path, files[path])}"', "X-Repo-Commit": sha}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if wanted is None:
                self._answer(200, data, headers)
                return
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
            self._answer(206, data[first : last + 1], headers)

    return Handler


def _is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".png", ".bin"))


def _etag(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if _is_lfs(path) else git_oid(data)


def _entry(path: str, data: bytes) -> dict[str, Any]:
    """A file as the Hub lists it."""
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
    if _is_lfs(path):
        found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return found
