"""A local stand-in for the model hub: what `huggingface_hub` requests for repository listings and files, and
what it uploads.

Large files are redirected to another host name, as the hub redirects to its CDN, and Xet is offered for them,
which the stub does not speak. A file can be cut short or stalled once, claim another size, be refused, or be
served damaged. Every request is recorded in `requests`, those that are answered with content in `contents`.
Uploads need the token WRITER. Large files come by Xet or LFS, the latter in parts of `lfs_part` bytes if that
is set. Sizes and hashes are checked; a commit adds all files to the repository.
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from xet_store import XetStore

WRITER = "hf_writer"
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
    full: set[str] = field(default_factory=set)  # repositories whose commits are refused
    lfs_part: int | None = None
    requests: list[Request] = field(default_factory=list)
    contents: list[Request] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)  # uploaded large files, by their SHA-256
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    xet: XetStore = field(default_factory=XetStore)
    commits: list[dict] = field(default_factory=list)

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


UPLOADS = {  # what answers which paths
    "^/api/repos/create$": "_create",
    "^/api/validate-yaml$": "_check_card",
    "^/api/models/.*/preupload/": "_preupload",
    r"\.git/info/lfs/objects/batch$": "_lfs_batch",
    "^/lfs-store/": "_take_lfs",
    "^/lfs-verify$": "_verify_lfs",
    "^/api/models/.*/xet-write-token/": "_xet_token",
    "^/xet/": "_take_xet",
    "^/v1/telemetry$": "_no_content",
    "^/api/models/.*/commit/": "_commit",
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubStub

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self._request = Request(self.command, path, self.headers["Range"], self.headers["Authorization"])
        self.hub.requests.append(self._request)
        self._body = self._read_body()
        if path.startswith("/api/") and re.search("/(paths-info|tree)/", path):
            self._answer_paths(path.removeprefix("/api/"))
        elif answer := next((answer for form, answer in UPLOADS.items() if re.search(form, path)), None):
            self._answer_upload(answer, path, {name: value for name, (value,) in parse_qs(url.query).items()})
        elif path.startswith("/api/"):
            self._answer_listing(path.removeprefix("/api/"), with_sizes="blobs=" in url.query)
        elif path.startswith("/cdn/"):
            self._answer_content(path.removeprefix("/cdn/"))
        else:
            self._answer_file(path.strip("/"))

    do_HEAD = do_POST = do_PUT = do_GET

    def _read_body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

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
            asked = json.loads(self._body)["paths"]
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

    def _answer_json(self, body: dict | list, status: int = 200, headers: dict | None = None) -> None:
        headers = {"Content-Type": "application/json", **(headers or {})}
        self._answer(status, json.dumps(body).encode(), headers)

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

    def _answer_upload(self, answer: str, path: str, query: dict[str, str]) -> None:
        signed = answer == "_take_lfs"  # such addresses need no token
        if not signed and self.headers["Authorization"] not in (f"Bearer {WRITER}", "Bearer of-xet"):
            self._answer_json({"error": "Invalid username or password."}, 401)
            return
        try:
            status, body = getattr(self, answer)(path, query)
        except (ValueError, KeyError) as error:
            status, body = (
                400,
                {"error": f"{type(error).__name__}: {error}", "errors": [{"message": f"{error}"}]},
            )
        self._answer_json(body, status, {"ETag": '"etag"'})

    def _create(self, path: str, query: dict) -> tuple[int, dict]:
        asked = json.loads(self._body)
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "others":
            return 403, {
                "error": 'You don\'t have the rights to create a model under the namespace "others".'
            }
        found = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.models:
            return 409, {"error": "You already created this model repo", **found}
        self.hub.models[name] = {}
        return 200, found

    def _check_card(self, path: str, query: dict) -> tuple[int, dict]:
        _, metadata, _ = json.loads(self._body)["content"].split("---\n", 2)
        if not isinstance(found := yaml.safe_load(metadata), dict) or "license" not in found:
            raise ValueError(f"metadata is {found!r}")
        return 200, {"errors": [], "warnings": []}

    def _preupload(self, path: str, query: dict) -> tuple[int, dict]:
        known = self.hub.models[re.search("models/(.*)/preupload/main$", path)[1]]
        files = []
        for file in json.loads(self._body)["files"]:
            name, sample = file["path"], base64.b64decode(file["sample"], validate=True)
            is_large = name.endswith(LFS_SUFFIXES) or b"\0" in sample  # binary files are, whatever their size
            oid = self._object_id(known[name], is_large) if name in known else None
            mode = {"uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, "oid": oid}
            files.append({"path": name, **mode})
        return 200, {"files": files}

    @staticmethod
    def _object_id(content: bytes, is_large: bool) -> str:
        return hashlib.sha256(content).hexdigest() if is_large else git_blob_id(content)

    def _lfs_batch(self, path: str, query: dict) -> tuple[int, dict]:
        asked, objects = json.loads(self._body), []
        if asked["operation"] != "upload" or asked["hash_algo"] != "sha256":
            raise ValueError(f"operation {asked['operation']}, hash_algo {asked['hash_algo']}")
        for one in asked["objects"]:
            oid, part = one["oid"], self.hub.lfs_part
            store = f"http://localhost:{self.hub.port}/lfs-store/{oid}"
            upload, verify = (
                {"href": f"{store}?size={one['size']}"},
                {"href": f"{self.hub.endpoint}/lfs-verify"},
            )
            if part:
                numbers = range(1, -(-one["size"] // part) + 1)
                header = {f"{number:05}": f"{store}?part={number}" for number in numbers}
                upload["header"] = {"chunk_size": str(part), **header}
            actions = {} if oid in self.hub.objects else {"actions": {"upload": upload, "verify": verify}}
            objects.append({**one, **actions})
        return 200, {"transfer": "multipart" if self.hub.lfs_part else "basic", "objects": objects}

    def _take_lfs(self, path: str, query: dict) -> tuple[int, dict]:
        oid, content = path.rsplit("/", 1)[1], self._body
        if "part" in query:
            self.hub.parts[oid, int(query["part"])] = content
            return 200, {}
        if self.command == "POST":  # all parts are there
            told = json.loads(content)
            numbers = [part["partNumber"] for part in told["parts"]]
            if told["oid"] != oid or any(part["etag"] != '"etag"' for part in told["parts"]):
                raise ValueError(f"parts are {told}")
            content = b"".join(self.hub.parts[oid, number] for number in numbers)
        if hashlib.sha256(content).hexdigest() != oid or len(content) != int(query["size"]):
            raise ValueError(f"{len(content)} bytes are not those of {oid}, {query['size']} bytes")
        self.hub.objects[oid] = content
        return 200, {}

    def _verify_lfs(self, path: str, query: dict) -> tuple[int, dict]:
        told = json.loads(self._body)
        if len(self.hub.objects[told["oid"]]) != told["size"]:
            raise ValueError(f"size is {told['size']}")
        return 200, {}

    def _xet_token(self, path: str, query: dict) -> tuple[int, dict]:
        expires = int(time.time()) + 3600
        return 200, {"casUrl": f"{self.hub.endpoint}/xet", "accessToken": "of-xet", "exp": expires}

    def _take_xet(self, path: str, query: dict) -> tuple[int, dict]:
        if path.startswith("/xet/v1/xorbs/"):
            self.hub.xet.add_xorb(path.rsplit("/", 1)[1], self._body)
            return 200, {"was_inserted": True}
        if path == "/xet/v1/shards":
            self.hub.objects |= self.hub.xet.files_of(self._body)
            return 200, {"result": 1}
        return 404, {}  # chunks that are known already, addresses to upload to, the second version of shards

    def _commit(self, path: str, query: dict) -> tuple[int, dict]:
        repository = re.search("models/(.*)/commit/main$", path)[1]
        if repository in self.hub.full:
            return 403, {"error": "Repository storage limit reached"}
        if self.headers["Content-Type"] != "application/x-ndjson":
            raise ValueError(f"Content-Type is {self.headers['Content-Type']}")
        header, *lines = map(json.loads, self._body.splitlines())
        files = {}
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"], validate=True)
            elif key != "lfsFile" or value["algo"] != "sha256":
                raise ValueError(f"{key} is {value}")
            elif len(self.hub.objects[value["oid"]]) != value["size"]:
                raise ValueError(f"{value['path']} has size {value['size']}")
            else:
                files[value["path"]] = self.hub.objects[value["oid"]]
        self.hub.models[repository] |= files
        self.hub.commits.append({**header["value"], "files": sorted(files)})
        return 200, {"commitUrl": f"{self.hub.endpoint}/{repository}/commit/{COMMIT}", "commitOid": COMMIT}

    def _no_content(self, path: str, query: dict) -> tuple[int, dict]:
        return 200, {}

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
