"""A Hub on 127.0.0.1 that speaks the protocol of huggingface_hub, and misbehaves on demand.

Repositories have commits, tags, git hashes and LFS objects as the real one; reading needs nothing, writing and private
repositories need the token "good".
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

LFS_SUFFIX = (".safetensors", ".npy")


@dataclass
class Repo:
    """Commits (files by path), newest last; tags by name; who may read."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def commit(self, files: dict[str, bytes]) -> str:
        """A new commit with exactly these files."""
        listed = sorted((name, hashlib.sha256(content).hexdigest()) for name, content in files.items())
        name = hashlib.sha1(json.dumps([len(self.commits), listed]).encode()).hexdigest()
        self.commits[name] = dict(files)
        return name

    @property
    def head(self) -> str:
        return next(reversed(self.commits))

    def find(self, revision: str) -> str | None:
        """Commit of a branch, tag or commit."""
        found = self.head if revision == "main" else self.tags.get(revision, revision)
        return found if found in self.commits else None


@dataclass
class Fault:
    """What happens to requests whose method and path match, so many times; a status, a cut, or other bytes."""

    pattern: str
    times: int = 10**9
    status: int = 0
    cut_after: int | None = None
    damage: Callable[[bytes], bytes] | None = None
    then: Callable[[], Any] | None = None


class HubServer(ThreadingHTTPServer):
    """The server; `repos` and `faults` are changed by the tests."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.asked: list[str] = []
        self.pause = 0.0  # seconds before each block of a file
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def publish(self, repo_id: str, folder: Path, *, version: str | None = None) -> str:
        """A commit of everything in a folder."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.startswith(".")
        }
        repo = self.repos.setdefault(repo_id, Repo())
        commit = repo.commit(files)
        if version:
            repo.tags[f"v{version}"] = commit
        return commit

    def fault(self, pattern: str, **how: Any) -> Fault:
        self.faults.append(Fault(pattern, **how))
        return self.faults[-1]

    def take_fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    if fault.then:
                        fault.then()
                    return fault
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no news."""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes
    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.fault = None
        request = f"{self.command} {unquote(url.path)}"
        self.server.asked.append(request)
        self.fault = self.server.take_fault(request)
        if self.fault and self.fault.status:
            self._answer(self.fault.status, {"error": "told to"})
            return
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, request):
                method(self, *match.groups(), **{key: values[0] for key, values in parse_qs(url.query).items()})
                return
        self._answer(404, {"error": "no such page"})

    def _answer(self, status: int, value: Any = None, *, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _repo(self, repo_id: str, revision: str = "main") -> tuple[Repo, str] | None:
        """The repository and commit, or None after an answer that there is none for you."""
        repo = self.server.repos.get(repo_id)
        good = self.headers.get("Authorization") == "Bearer good"
        if repo is None or (repo.private and not good):
            self._answer(404 if good else 401, {"error": "no"}, headers={"X-Error-Code": "RepoNotFound"})
            return None
        if not (commit := repo.find(revision)):
            self._answer(404, {"error": "no"}, headers={"X-Error-Code": "RevisionNotFound"})
            return None
        return repo, commit

    def info(self, repo_id: str, _: str | None, revision: str | None, **query: str) -> None:
        if found := self._repo(repo_id, revision or "main"):
            self._answer(200, {"id": repo_id, "sha": found[1], "siblings": [], "tags": [], "private": False})

    def models(self, author: str = "", search: str = "", **query: str) -> None:
        names = [n for n, repo in self.server.repos.items() if n.startswith(author + "/") and not repo.private]
        self._answer(200, [{"id": name, "tags": []} for name in names if search in name])

    def tree(self, repo_id: str, revision: str, **query: str) -> None:
        if found := self._repo(repo_id, revision):
            repo, commit = found
            entries = []
            for name, content in repo.commits[commit].items():
                entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
                if name.endswith(LFS_SUFFIX):
                    oid = hashlib.sha256(content).hexdigest()
                    entry |= {"lfs": {"oid": oid, "size": len(content), "pointerSize": 130}}
                entries.append(entry)
            self._answer(200, entries)

    def refs(self, repo_id: str) -> None:
        if found := self._repo(repo_id):
            tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": c} for tag, c in found[0].tags.items()]
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": found[1]}
            self._answer(200, {"branches": [main], "converts": [], "tags": tags})

    def resolve(self, repo_id: str, revision: str, name: str, **query: str) -> None:
        if not (found := self._repo(repo_id, revision)):
            return
        repo, commit = found
        if name not in repo.commits[commit]:
            self._answer(404, {"error": "no"}, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        content = repo.commits[commit][name]
        etag = hashlib.sha256(content).hexdigest() if name.endswith(LFS_SUFFIX) else git_hash(content)
        if self.fault and self.fault.damage and self.command == "GET":
            content = self.fault.damage(content)
        start = int(match[1]) if (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        self.send_response(206 if start else 200)
        for header, text in {
            "X-Repo-Commit": commit,
            "ETag": f'"{etag}"',
            "X-Linked-Etag": f'"{etag}"',
            "X-Linked-Size": str(len(content)),
            "Accept-Ranges": "bytes",
            "Content-Length": str(len(content) - start),
            **({"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}),
        }.items():
            self.send_header(header, text)
        self.end_headers()
        if self.command == "GET":
            self._send(content[start:])

    def _send(self, content: bytes) -> None:
        cut = self.fault.cut_after if self.fault else None
        if self.server.pause:
            for start in range(0, len(content), 4096):
                threading.Event().wait(self.server.pause)
                self.wfile.write(content[start : start + 4096])
        else:
            self.wfile.write(content if cut is None else content[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else f"me/{wanted['name']}"
        if self.headers.get("Authorization") != "Bearer good":
            self._answer(401, {"error": "who are you?"})
        elif name in self.server.repos:
            self._answer(409, {"error": "there already", "url": f"{self.server.url}/{name}"})
        else:
            repo = self.server.repos[name] = Repo(private=wanted.get("visibility") == "private")
            repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
            self._answer(200, {"url": f"{self.server.url}/{name}"})

    def validate(self) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def preupload(self, repo_id: str, revision: str, **query: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIX) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._answer(200, {"files": files})

    def batch(self, repo_id: str) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.objects:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}
            objects.append(entry)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self._answer(400, {"error": "other bytes than announced"})
            return
        self.server.objects[oid] = self.body
        self._answer(200, {})

    def commit(self, repo_id: str, revision: str, **query: str) -> None:
        if not (found := self._repo(repo_id)):
            return
        repo, head = found
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, head):
            self._answer(412, {"error": "the parent is no longer the newest"})
            return
        files = dict(repo.commits[head])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            else:
                del files[value["path"]]
        oid = repo.commit(files)
        self._answer(200, {"commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}", "commitOid": oid})

    def tag(self, repo_id: str, revision: str) -> None:
        if found := self._repo(repo_id, revision):
            name = json.loads(self.body)["tag"]
            if name in found[0].tags:
                self._answer(409, {"error": "there already"})
                return
            found[0].tags[name] = found[1]
            self._answer(200, {})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (rf"GET /api/models/{NAME}/tree/([^/]+)", Handler.tree),
    (rf"GET /api/models/{NAME}/refs", Handler.refs),
    (rf"GET /api/models/{NAME}(/revision/([^/]+))?", Handler.info),
    (r"GET /api/models", Handler.models),
    (rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST /api/models/{NAME}/preupload/([^/]+)", Handler.preupload),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(\w+)", Handler.store),
    (rf"POST /api/models/{NAME}/commit/([^/]+)", Handler.commit),
    (rf"POST /api/models/{NAME}/tag/([^/]+)", Handler.tag),
]


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """A Hub of its own, for a while."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that `$HF_ENDPOINT` names; waiting between retries is skipped."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with running_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server
