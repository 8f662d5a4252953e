"""The server. WRITES may write to user/..., READS may only read; every other token is refused.

hub.fail(method, route) makes the next such request fail: with a status, or with a broken connection.
"""

import base64
import json
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from .repository import File, Repository

WRITES, READS = "hf_writes", "hf_reads"
LICENSES = ("apache-2.0", "mit", "other")  # a few of the hub's list
LARGE = re.compile(r".*\.safetensors")  # as in .gitattributes of a new repository


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Fault:
    """status None: the connection breaks after ``after`` bytes of the body, sent or received."""

    method: str
    route: str
    status: int | None
    message: str
    after: int
    times: int


class Hub:
    """with Hub() as hub: hub.url is its endpoint, hub.requests lists its requests."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(
        self, method: str, route: str, status: int | None = None, message: str = "no", *, after: int = 0, times: int = 1
    ) -> None:
        self.faults.append(Fault(method, route, status, message, after, times))

    def add(self, name: str, files: dict[str, bytes] | None = None, *, private: bool = False) -> Repository:
        """Add a repository that already exists."""
        repository = self.repositories[name] = Repository(name, private)
        if files:
            whole = {path: File(content, bool(LARGE.fullmatch(path))) for path, content in files.items()}
            repository.commit("main", repository.files() | whole, "files")
        return repository

    def fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.method == method and re.fullmatch(fault.route, path) and fault.times > 0:
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # send headers and body in one packet: a second packet would wait 40 ms for an acknowledgement
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    # ------------------------------------------------------------------------------------------ one request

    def _answer(self) -> None:
        path = urlsplit(self.path).path  # slashes within a revision are quoted
        self.hub.requests.append(f"{self.command} {path}")
        fault = self.hub.fault(self.command, path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.status is None and length:
            self.rfile.read(min(length, fault.after))
            self.close_connection = True
            return
        self.body = self.rfile.read(length)
        try:
            if fault is not None and fault.status is not None:
                raise Refused(fault.status, fault.message)
            for method, pattern, answer in ROUTES:
                if (found := re.fullmatch(pattern, path)) and self.command in method:
                    self.broken = None if fault is None else fault.after
                    answer(self, **{key: unquote(value) for key, value in found.groupdict().items()})
                    return
            raise Refused(404, f"no such route: {self.command} {path}")
        except Refused as refused:
            headers = {"X-Error-Message": refused.message, "X-Error-Code": refused.code}
            content = json.dumps({"error": refused.message}).encode()
            self._send(refused.status, content, {key: value for key, value in headers.items() if value})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        broken = getattr(self, "broken", None)
        if self.command != "HEAD":
            self.wfile.write(content if broken is None else content[:broken])
        if broken is not None:
            self.close_connection = True

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode())

    # ------------------------------------------------------------------------------------------ who asks for what

    def _token(self) -> str | None:
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if given not in (None, WRITES, READS):
            raise Refused(401, "Invalid credentials in Authorization header")
        return given

    def _check_writes(self, name: str) -> None:
        token = self._token()
        if token is None:
            raise Refused(401, "Invalid username or password.")
        if token != WRITES or not name.startswith("user/"):
            raise Refused(403, f"You don't have the rights to write to {name}")

    def _repository(self, name: str) -> Repository:
        token, found = self._token(), self.hub.repositories.get(name)
        if found is None or (found.private and token is None):
            if token is None:  # it does not reveal which of the two applies
                raise Refused(401, "Invalid username or password.")
            raise Refused(404, "Repository not found", "RepoNotFound")
        return found

    def _sha(self, repository: Repository, revision: str) -> str:
        sha = repository.sha(revision)
        if sha is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # ------------------------------------------------------------------------------------------ routes

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization'] or 'user'}/{asked['name']}"
        self._check_writes(name)
        if name in self.hub.repositories:
            said = {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
            self._send(409, json.dumps(said).encode())
            return
        self.hub.add(name, private=asked.get("visibility") == "private")
        self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def validate_yaml(self) -> None:
        head = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        try:
            values = yaml.safe_load(head[1]) if head else {}
        except yaml.YAMLError:
            values = None
        if not isinstance(values, dict):
            found = "metadata must be a mapping"
        else:
            found = "" if values.get("license", "mit") in LICENSES else '"license" must be one of the known ones'
        said = {"errors": [{"message": found}] if found else [], "warnings": []}
        self._send(400 if found else 200, json.dumps(said).encode())

    def info(self, name: str, revision: str | None = None) -> None:
        repository = self._repository(name)
        sha = self._sha(repository, revision or "main")
        siblings = [{"rfilename": path} for path in repository.files(sha)]
        self._json({"id": name, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []})

    def tree(self, name: str, revision: str, folder: str = "") -> None:
        repository = self._repository(name)
        files = repository.files(self._sha(repository, revision))
        found = [file.described(path) for path, file in files.items() if path.startswith(folder)]
        if folder and not found:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        self._json(found)

    def paths_info(self, name: str, revision: str) -> None:
        repository = self._repository(name)
        files = repository.files(self._sha(repository, revision))
        asked = parse_qs(self.body.decode())["paths"]
        self._json([file.described(path) for path, file in files.items() if path in asked])

    def branch(self, name: str, branch: str) -> None:
        self._check_writes(name)
        repository = self._repository(name)
        if branch in repository.branches:
            raise Refused(409, f"Reference already exists: {branch}")
        repository.branches[branch] = repository.branches["main"]
        self._json({})

    def preupload(self, name: str, revision: str) -> None:
        self._check_writes(name)
        repository = self._repository(name)
        there = repository.files(self._sha(repository, revision))
        self._json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if LARGE.fullmatch(file["path"]) else "regular",
                        "shouldIgnore": False,
                        "oid": there[file["path"]].oid if file["path"] in there else None,
                    }
                    for file in json.loads(self.body)["files"]
                ]
            }
        )

    def batch(self, name: str) -> None:
        self._check_writes(name)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{asked['oid']}"}
            verify = {"href": f"{self.hub.url}/lfs/{asked['oid']}/verify"}
            actions = {} if asked["oid"] in self.hub.objects else {"actions": {"upload": upload, "verify": verify}}
            objects.append({**asked, **actions})
        self._json({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if File(self.body).sha256 != oid:
            raise Refused(400, "the object has another SHA-256")
        self.hub.objects[oid] = self.body
        self._send(200, b"")

    def verify(self, oid: str) -> None:
        if len(self.hub.objects.get(oid, b"")) != json.loads(self.body)["size"]:
            raise Refused(404, "no such object")
        self._json({})

    def commit(self, name: str, revision: str) -> None:
        self._check_writes(name)
        repository = self._repository(name)
        files = dict(repository.files(self._sha(repository, revision)))
        header: dict = {}
        for line in self.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                header = value
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                files[value["path"]] = File(self.hub.objects[value["oid"]], large=True)
            elif key == "deletedFile":
                del files[value["path"]]
        if header.get("parentCommit") not in (None, repository.branches[revision]):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        sha = repository.commit(revision, files, header["summary"])
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name)
        sha = self._sha(repository, revision)
        file = repository.files(sha).get(path)
        if file is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.large:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked:
            start = int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(file.content) - 1}/{len(file.content)}"
            self._send(206, file.content[start:], headers)
        else:
            self._send(200, file.content, headers)


NAME, REVISION = r"(?P<name>[\w.-]+/[\w.-]+)", "(?P<revision>[^/]+)"
ROUTES = (
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", f"/api/models/{NAME}/preupload/{REVISION}", _Handler.preupload),
    ("POST", f"/api/models/{NAME}/commit/{REVISION}", _Handler.commit),
    ("POST", f"/api/models/{NAME}/branch/(?P<branch>[^/]+)", _Handler.branch),
    ("POST", f"/api/models/{NAME}/paths-info/{REVISION}", _Handler.paths_info),
    ("GET", f"/api/models/{NAME}/tree/{REVISION}", _Handler.tree),
    ("GET", f"/api/models/{NAME}/tree/{REVISION}/(?P<folder>.+)", _Handler.tree),
    ("GET", f"/api/models/{NAME}/revision/{REVISION}", _Handler.info),
    ("GET", f"/api/models/{NAME}", _Handler.info),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.store),
    ("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify", _Handler.verify),
    (("GET", "HEAD"), f"/{NAME}/resolve/{REVISION}/(?P<path>.+)", _Handler.resolve),
    (("HEAD", "GET"), "/?", lambda self: self._send(200, b"")),
)
