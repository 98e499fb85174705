"""A stand-in for the hub on this machine: the part of its HTTP interface that huggingface_hub uses here.

Repositories are folders of bytes in memory. Each request is noted, so that tests can count what was asked for; answers
can be broken off or refused. As the hub does, it stores large files by their SHA-256 and takes commits as JSON Lines.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"
OWNER = "me"
API = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree|preupload|commit|branch)/(?P<revision>[^/]+))?"
)
RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
LFS_BATCH = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
LFS_OBJECT = re.compile(r"/lfs/(?P<oid>[0-9a-f]{64})")


@dataclass
class Repository:
    """The files of a repository. commit: changes with each commit. private: hidden from those without the token.

    branches: the files of other branches than main.
    """

    files: dict[str, bytes]
    private: bool = False
    commit: str = "1" * 40
    branches: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def at(self, revision: str | None) -> dict[str, bytes]:
        """The files of a branch, or of a commit of main."""
        return self.branches.get(revision or "main", self.files)

    def commit_of(self, revision: str | None) -> str:
        """The commit of a branch, or that which is named."""
        return revision if revision and re.fullmatch("[0-9a-f]{40}", revision) else self.commit


@dataclass
class StandInHub:
    """The state of the stand-in. requests: method and path of each, in order.

    broken: files whose connection ends after so many bytes, once. refused: status and code for requests whose path
    contains the key.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    broken: dict[str, int] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    address: str = ""

    def fetched(self) -> list[str]:
        """The files whose bytes were asked for, in the order of their names."""
        found = (RESOLVE.fullmatch(request.removeprefix("GET ")) for request in self.requests)
        return sorted(match["file"] for match in found if match)

    def start(self) -> ThreadingHTTPServer:
        """Starts the server in a thread."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Answers,), {"hub": self}))
        server.daemon_threads = True
        self.address = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server


class _Answers(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""

    def _send(self, status: int, body: object = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _error(self, status: int, code: str, message: str = "") -> None:
        headers = {"X_Error_Code": code} if code else {}
        self._send(status, {"error": message or code}, **headers)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        self.hub.requests.append(f"{self.command} {path}")
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        for part, (status, code) in self.hub.refused.items():
            if part in path:
                return self._error(status, code)
        if given not in ("", TOKEN):
            headers = {"X_Error_Message": "Invalid credentials in Authorization header"}
            return self._send(401, {"error": "Invalid credentials in Authorization header"}, **headers)
        if match := LFS_OBJECT.fullmatch(path):
            self.hub.objects[match["oid"]] = body
            return self._send(200)
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body), given)
        for pattern, answer in ((API, self._api), (RESOLVE, self._file), (LFS_BATCH, self._batch)):
            if match := pattern.fullmatch(path):
                repository = self.hub.repositories.get(match["repo"])
                if repository is None or (repository.private and not given):
                    return self._error(404 if given else 401, "RepoNotFound", "Repository not found")
                return answer(match, repository, body, given)
        return self._error(404, "", f"no such page: {path}")

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _create(self, asked: dict[str, object], given: str) -> None:
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        if not given:
            return self._error(401, "", "Invalid username or password.")
        if not name.startswith(f"{OWNER}/"):
            return self._error(403, "", f"You don't have the rights to create a model under the namespace {name[:4]}")
        if name in self.hub.repositories:
            return self._send(
                409, {"error": "You already created this model repo", "url": f"{self.hub.address}/{name}"}
            )
        self.hub.repositories[name] = Repository({}, private=asked.get("visibility") == "private")
        return self._send(200, {"url": f"{self.hub.address}/{name}"})

    def _api(self, match: re.Match[str], repository: Repository, body: bytes, given: str) -> None:
        if match["what"] in (None, "revision"):
            siblings = [{"rfilename": name} for name in repository.at(match["revision"])]
            found = {"id": match["repo"], "sha": repository.commit_of(match["revision"]), "private": repository.private}
            return self._send(200, {**found, "siblings": siblings})
        if match["what"] == "tree":
            files = repository.at(match["revision"]).items()
            return self._send(
                200, [{"type": "file", "path": p, "size": len(data), "oid": _oid(data)} for p, data in files]
            )
        if not given or not match["repo"].startswith(f"{OWNER}/"):
            return self._error(403, "", "you are not allowed to write here")
        if match["what"] == "branch":
            repository.branches[match["revision"]] = dict(repository.files)
            return self._send(200)
        files = repository.at(match["revision"])
        if match["what"] == "preupload":
            asked = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": _oid(files[file["path"]]) if file["path"] in files else None,
                }
                for file in asked
            ]
            return self._send(200, {"files": modes})
        return self._commit(match, repository, files, body)

    def _commit(self, match: re.Match[str], repository: Repository, files: dict[str, bytes], body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repository.commit = hashlib.sha1(body).hexdigest()
        url = f"{self.hub.address}/{match['repo']}/commit/{repository.commit}"
        self._send(200, {"success": True, "commitOid": repository.commit, "commitUrl": url})

    def _batch(self, match: re.Match[str], repository: Repository, body: bytes, given: str) -> None:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{wanted['oid']}"}}}
            for wanted in json.loads(body)["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def _file(self, match: re.Match[str], repository: Repository, body: bytes, given: str) -> None:
        data = repository.at(match["revision"]).get(match["file"])
        if data is None:
            return self._error(404, "EntryNotFound")
        headers = {
            "ETag": f'"{_oid(data)}"',
            "X_Repo_Commit": repository.commit_of(match["revision"]),
            "Accept_Ranges": "bytes",
        }
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if begin:
            headers["Content_Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        if self.command == "GET" and match["file"] in self.hub.broken:
            kept = data[begin : begin + self.hub.broken.pop(match["file"])]
            self.send_response(200)
            self.send_header("Content-Length", str(len(data) - begin))
            self.end_headers()
            self.wfile.write(kept)
            self.close_connection = True
            return None
        return self._send(206 if begin else 200, data[begin:], **headers)


def _oid(data: bytes) -> str:
    """The name that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
