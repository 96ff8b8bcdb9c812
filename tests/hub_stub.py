"""A local stand-in for the model hub: what `huggingface_hub` requests for repository listings and files.

Large files are redirected to another host name, as the hub redirects to its CDN, and Xet is offered for them,
which the stub does not speak. A file can be cut short or stalled once, claim another size, be refused, or be
served damaged. Every request is recorded in `requests`, those that are answered with content in `contents`.
"""

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
LFS_SUFFIXES = (".bin", ".h5", ".jsonl", ".parquet", ".pth", ".safetensors", ".tar", ".zip")


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class HubStub:
    """`with HubStub() as hub`: fill `hub.models` and `hub.datasets` ({repository: {file name: bytes}})."""

    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    datasets: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    claimed_sizes: dict[str, int] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)  # listed, but answered with 403
    cut_once: dict[str, int] = field(default_factory=dict)  # close the connection after so many bytes
    stall_once: dict[str, int] = field(default_factory=dict)  # send nothing more after so many bytes
    requests: list[Request] = field(default_factory=list)
    contents: list[Request] = field(default_factory=list)

    def __enter__(self) -> "HubStub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._stopping = threading.Event()
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for, each as often as it was."""
        return [request.path.rsplit("/", 1)[1] for request in self.contents]

    def ranges(self, name: str) -> list[str | None]:
        """The Range header of each request for a file's content."""
        return [request.range for request in self.contents if request.path.endswith(f"/{name}")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubStub

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self._request = Request(self.command, path, self.headers["Range"], self.headers["Authorization"])
        self.hub.requests.append(self._request)
        if path.startswith("/api/") and re.search("/(paths-info|tree)/", path):
            self._answer_paths(path.removeprefix("/api/"))
        elif path.startswith("/api/"):
            self._answer_listing(path.removeprefix("/api/"), with_sizes="blobs=" in url.query)
        elif path.startswith("/cdn/"):
            self._answer_content(path.removeprefix("/cdn/"))
        else:
            self._answer_file(path.strip("/"))

    do_HEAD = do_POST = do_GET

    def _find_repository(self, repository: str) -> dict[str, bytes] | None:
        """The files of `models/a/b` or `datasets/a/b`; None after an error was sent."""
        kind, _, repo_id = repository.partition("/")
        files = {"models": self.hub.models, "datasets": self.hub.datasets}.get(kind, {}).get(repo_id)
        if files is None:
            self._answer(404, headers={"X-Error-Code": "RepoNotFound"})
        elif repo_id in self.hub.gated:
            self._answer(403, headers={"X-Error-Code": "GatedRepo"})
            return None
        return files

    def _answer_listing(self, path: str, with_sizes: bool) -> None:
        repository, _, _revision = path.partition("/revision/")
        files = self._find_repository(repository)
        if files is None:
            return
        siblings = []
        for name, content in files.items():
            about = self._about(name, content, digest_name="sha256")
            sizes = {"blobId": about.pop("oid"), **about} if with_sizes else {}
            siblings.append({"rfilename": name, **sizes})
        self._answer_json({"id": repository.partition("/")[2], "sha": COMMIT, "siblings": siblings})

    def _answer_paths(self, path: str) -> None:
        """What the library's file system asks before it opens a file: of some paths, or of a whole folder."""
        repository, _, rest = re.split("/(paths-info|tree)/", path)
        files = self._find_repository(repository)
        if files is None:
            return
        names, folder = [*files], rest.partition("/")[2]
        if self.command == "POST":
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
            names = [name for name in names if name in asked]
        entries = [{"type": "file", "path": name, **self._about(name, files[name])} for name in names]
        self._answer_json([entry for entry in entries if entry["path"].startswith(folder)])

    def _about(self, name: str, content: bytes, digest_name: str = "oid") -> dict:
        size = self.hub.claimed_sizes.get(name, len(content))
        about: dict = {"size": size, "oid": git_blob_id(content)}
        if name.endswith(LFS_SUFFIXES):
            digest = hashlib.sha256(content).hexdigest()
            about["lfs"] = {digest_name: digest, "size": size, "pointerSize": 134}
        return about

    def _answer_json(self, body: dict | list) -> None:
        self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _answer_file(self, path: str) -> None:
        repository, _, rest = path.partition("/resolve/")
        if not repository.startswith("datasets/"):
            repository = f"models/{repository}"
        files = self._find_repository(repository)
        if files is None:
            return
        name = rest.partition("/")[2]
        if name not in files:
            self._answer(404, headers={"X-Error-Code": "EntryNotFound"})
        elif name in self.hub.refused:
            self._answer(403)
        elif name.endswith(LFS_SUFFIXES):
            headers = {
                "Location": f"http://localhost:{self.hub.port}/cdn/{repository}/{name}",
                "X-Repo-Commit": COMMIT,
                "X-Linked-Etag": hashlib.sha256(files[name]).hexdigest(),
                "X-Linked-Size": str(len(files[name])),
                "X-Xet-Hash": hashlib.sha256(files[name]).hexdigest(),
                "X-Xet-Refresh-Route": f"{self.hub.endpoint}/api/xet-read-token",
            }
            self._answer(302, headers=headers)
        else:
            self._send_content(name, files[name])

    def _answer_content(self, path: str) -> None:
        kind, owner, name_of_it, name = path.split("/", 3)
        files = self._find_repository(f"{kind}/{owner}/{name_of_it}")
        if files is not None:
            self._send_content(name, files[name])

    def _send_content(self, name: str, content: bytes) -> None:
        if name in self.hub.damaged:
            content = bytes(len(content))
        headers = {"ETag": f'"{git_blob_id(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status, start, end = 200, 0, len(content)
        if self.headers["Range"]:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            status, start, end = 206, int(first), int(last) + 1 if last else end
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        body = content[start:end]
        cut = stall = None
        if self.command == "GET":
            self.hub.contents.append(self._request)
            cut = self.hub.cut_once.pop(name, None)
            stall = self.hub.stall_once.pop(name, None)
        self._answer(status, body, headers, send=cut or stall)
        if cut is not None:
            self.close_connection = True
        while stall is not None and not self.hub._stopping.is_set():
            time.sleep(0.05)

    def _answer(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, send: int | None = None
    ) -> None:
        """Announce all of `body`, and send its first `send` bytes (default: all)."""
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:send])
            self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
