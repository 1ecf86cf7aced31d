"""A small hub on 127.0.0.1: what huggingface_hub asks of huggingface.co when it makes, fills and fetches a repository.

It keeps everything in memory and writes down every request. `refuse` makes it answer a kind of request with an error.
"""

import base64
import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "StubTokenOfTheTests" + "0123456789"


@dataclass
class Repository:
    private: bool
    branches: dict[str, list[dict[str, bytes]]] = field(default_factory=lambda: {"main": [{".gitattributes": b"*.bin\n"}]})
    messages: list[str] = field(default_factory=list)
    card: dict = field(default_factory=dict)

    def files(self, revision="main"):
        for name, commits in self.branches.items():
            for number, files in enumerate(commits):
                if revision == commit_hash(name, number) or (revision == name and number == len(commits) - 1):
                    return files
        return None

    def head(self, branch="main"):
        return commit_hash(branch, len(self.branches[branch]) - 1)


def commit_hash(branch, number):
    return hashlib.sha1(f"{branch} {number}".encode()).hexdigest()


class Hub:
    """The server, the repositories by name, and what was asked.

    Attributes:
        requests: (method, path) of each, in order.
        refuse: by a part of the path: status, and the headers or message of the answer.
        stored: by SHA-256, what was uploaded apart from commits.
        cas: where xet keeps its chunks: a URL; of what went there, a file says only its SHA-256.
    """

    def __init__(self):
        self.repositories, self.requests, self.refuse, self.stored = {}, [], {}, {}
        self.cas = None
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def wrote(self):
        """The requests that change something."""
        return [(method, path) for method, path in self.requests if method in ("POST", "PUT", "DELETE")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def handle_request(self):
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        self.hub.requests.append((self.command, path))
        for part, (status, headers) in self.hub.refuse.items():
            if part in path:
                return self.answer({"error": headers.get("X-Error-Message", "")}, status, headers)
        if not path.startswith("/stored/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            message = "Invalid credentials in Authorization header"
            return self.answer({"error": message}, 401, {"X-Error-Message": message})
        parts = path.strip("/").split("/")
        if path.startswith("/api/"):
            return self.api(parts[1:], body)
        if parts[0] == "stored":
            self.hub.stored[parts[1]] = body
            assert hashlib.sha256(body).hexdigest() == parts[1]
            return self.answer({})
        if path.endswith("/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        if parts[2] == "resolve":
            return self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self.answer({}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = handle_request

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while count := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(count))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def answer(self, content, status=200, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def api(self, parts, body):
        if parts == ["repos", "create"]:
            return self.create(json.loads(body))
        if parts == ["validate-yaml"]:
            return self.answer({"errors": [], "warnings": []})
        name, what = "/".join(parts[1:3]), parts[3] if len(parts) > 3 else "info"
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self.answer({}, 404, {"X-Error-Code": "RepoNotFound"})
        revision = "/".join(parts[4:]) or "main"
        if what == "branch":
            known = revision in repository.branches
            repository.branches.setdefault(revision, [dict(repository.files())])
            return self.answer({}, 409 if known else 200)
        if repository.files(revision) is None:
            return self.answer({}, 404, {"X-Error-Code": "RevisionNotFound"})
        return getattr(self, what.replace("-", "_"))(name, repository, revision, body)

    def create(self, wanted):
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != "someone":
            message = f"You don't have the rights to create a model under the namespace {wanted['organization']!r}"
            return self.answer({"error": message}, 403, {"X-Error-Message": message})
        known = name in self.hub.repositories
        self.hub.repositories.setdefault(name, Repository(private=wanted.get("visibility") == "private"))
        return self.answer({"url": f"{self.hub.url}/{name}"}, 409 if known else 200)

    def info(self, name, repository, revision, _):
        head = repository.head(revision) if revision in repository.branches else revision
        return self.answer(
            {
                "id": name,
                "sha": head,
                "private": repository.private,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "cardData": repository.card,
                "siblings": [{"rfilename": file} for file in repository.files(revision)],
            }
        )

    revision = info

    def tree(self, name, repository, revision, _):
        entries = []
        for file, content in sorted(repository.files(revision).items()):
            entries.append({"type": "file", "path": file, "size": len(content), "oid": git_hash(content)})
        return self.answer(entries)

    def preupload(self, name, repository, revision, body):
        held = repository.files(revision)
        answers = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith((".safetensors", ".parquet"))
            content = held.get(file["path"])
            oid = content and (hashlib.sha256(content).hexdigest() if large else git_hash(content))
            answers.append(
                {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            )
        return self.answer({"files": answers})

    def batch(self, wanted):
        objects = []
        for one in wanted["objects"]:
            upload = {} if one["oid"] in self.hub.stored else {"upload": {"href": f"{self.hub.url}/stored/{one['oid']}"}}
            objects.append(one | ({"actions": upload} if upload else {}))
        return self.answer({"transfer": "basic", "objects": objects})

    def commit(self, name, repository, revision, body):
        header, *operations = (json.loads(line) for line in body.splitlines())
        files = dict(repository.files(revision))
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored.get(value["oid"], b"in xet: " + value["oid"].encode())
            else:
                del files[value["path"]]
        repository.messages.append(header["value"]["summary"])
        repository.branches[revision].append(files)
        head = repository.head(revision)
        return self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/{head}", "commitOid": head})

    def xet_write_token(self, *_):
        until = str(int(time.time()) + 3600)
        headers = {"X-Xet-Cas-Url": self.hub.cas, "X-Xet-Access-Token": "short-lived", "X-Xet-Token-Expiration": until}
        return self.answer({"casUrl": self.hub.cas, "accessToken": "short-lived", "exp": int(until)}, 200, headers)

    def resolve(self, name, revision, file):
        repository = self.hub.repositories[name]
        content = repository.files(revision)[file]
        digest = hashlib.sha256(content).hexdigest()
        head = repository.head(revision) if revision in repository.branches else revision
        return self.answer(content, 200, {"ETag": f'"{digest}"', "X-Repo-Commit": head})


def git_hash(content):
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
