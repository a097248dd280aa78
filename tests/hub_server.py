"""A Hugging Face Hub in memory for the tests: real sockets on 127.0.0.1, real git and LFS ids, real error codes.

The endpoints are the ones that `huggingface_hub` (1.33 and 2.x) calls to publish and to load: models, data sets,
branches, tags, pull requests, private repos, LFS uploads, and downloads that are redirected to another host. Only the
standard library is used, except for the YAML of model cards (PyYAML comes with `huggingface_hub`). Left out, and
answered with 404: Xet storage, multipart uploads, spaces, discussions, gated repos, search. Not paginated.

`huggingface_hub` reads its environment at import, so every client is a process of its own:

    with HubServer() as hub:
        hub.put("alice/model", {"config.json": b"{}"})
        subprocess.run([sys.executable, "client.py"], env=hub.env(home), check=True)
        assert "README.md" in hub.files("alice/model")
"""

import base64
import hashlib
import hmac
import json
import os
import re
import secrets
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".bin", ".ckpt", ".npy", ".npz", ".parquet", ".pt", ".pth", ".safetensors")
LFS_SIZE = 10 * 2**20  # the Hub takes larger files by LFS only
KINDS = {"model": "models", "dataset": "datasets"}  # repo type -> how API paths spell it


class HubError(Exception):
    """An answer that is not 2xx: `code` becomes `X-Error-Code`, which picks the client's exception class."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}


@dataclass
class Request:
    """A request as it came, and how it was answered (for `HubServer.log`)."""

    host: str  # "hub", or "cdn": the storage host
    method: str
    path: str  # percent-encoded, without the query
    query: dict[str, list[str]]
    headers: Message
    body: bytes
    user: str | None = None
    role: str | None = None  # of the user's token: "read" or "write"
    status: int = 0

    @property
    def range(self) -> str:
        return self.headers.get("Range", "")

    @property
    def segments(self) -> list[str]:
        """A revision such as refs/pr/1 is one encoded segment: split first, decode then."""
        return [unquote(segment) for segment in self.path.split("/")[1:]]

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)


class Answer(NamedTuple):
    """What the handler sends; `cut_at` breaks the connection after so many bytes of the body."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    cut_at: int | None = None


def git_id(kind: str, data: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


@dataclass(frozen=True)
class File:
    """A file's content; of an LFS file git has a pointer only."""

    data: bytes
    lfs: bool

    @property
    def blob(self) -> bytes:
        if not self.lfs:
            return self.data
        sha256 = hashlib.sha256(self.data).hexdigest()
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(self.data)}\n".encode()

    @property
    def git_id(self) -> str:
        return git_id("blob", self.blob)

    @property
    def etag(self) -> str:
        """What tells clients that the content is the same."""
        return hashlib.sha256(self.data).hexdigest() if self.lfs else self.git_id

    def lfs_info(self, key: str) -> dict[str, Any]:
        if not self.lfs:
            return {}
        return {"lfs": {key: self.etag, "size": len(self.data), "pointerSize": len(self.blob)}}


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    author: str
    title: str
    description: str
    date: int
    files: Mapping[str, File]


@dataclass
class Repo:
    repo_id: str
    kind: str  # "models" or "datasets"
    private: bool
    refs: dict[str, str] = field(default_factory=dict)  # "refs/heads/main" -> commit id
    commits: dict[str, Commit] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)  # LFS objects by sha256

    def ref(self, revision: str) -> str | None:
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def resolve(self, revision: str) -> Commit:
        ref = self.ref(revision)
        commit = self.commits.get(self.refs[ref] if ref else revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def commit(self, ref: str, base: Commit | None, files: dict[str, File], author: str, title: str, text: str) -> str:
        """Records `files` as the whole content of `ref` after `base`, as git would: same bytes, same id."""
        date, parent = int(time.time()), base.oid if base else None
        who = f"{author} <{author}@hub.invalid> {date} +0000"
        head = f"tree {walk(files)[0]}\n" + (f"parent {parent}\n" if parent else "")
        message = f"{title}\n\n{text}" if text else title
        oid = git_id("commit", f"{head}author {who}\ncommitter {who}\n\n{message}\n".encode())
        self.commits[oid] = Commit(oid, parent, author, title, text, date, files)
        self.refs[ref] = oid
        return oid

    def history(self, commit: Commit) -> list[Commit]:
        commits = [commit]
        while commits[-1].parent:
            commits.append(self.commits[commits[-1].parent])
        return commits


def walk(files: Mapping[str, File], at: str = "") -> tuple[str, list[dict[str, Any]]]:
    """The git tree id of the folder `at`, and all that is below it as `tree` and `paths-info` describe it."""
    folders: dict[str, dict[str, File]] = {}
    rows, entries = [], []
    for path, file in files.items():
        name, is_below, rest = path.partition("/")
        if is_below:
            folders.setdefault(name, {})[rest] = file
        else:
            rows.append((name, "100644", file.git_id))
            details = {"oid": file.git_id, "size": len(file.data), **file.lfs_info("oid")}
            entries.append({"type": "file", "path": at + name, **details})
        if name in ("", ".", "..", ".git") or (name in folders and name in files):
            raise HubError(400, f"Invalid path in repo, or both a file and a folder: {at}{path}")
    for name, inside in folders.items():
        oid, below = walk(inside, f"{at}{name}/")
        rows.append((f"{name}/", "40000", oid))
        entries += [{"type": "directory", "oid": oid, "size": 0, "path": at + name}, *below]
    rows.sort(key=lambda row: row[0].encode())  # git sorts a folder as if its name ended in a slash
    tree = b"".join(f"{mode} {name.rstrip('/')}\0".encode() + bytes.fromhex(oid) for name, mode, oid in rows)
    return git_id("tree", tree), sorted(entries, key=lambda entry: entry["path"])


def read_card(text: str) -> dict[str, Any]:
    """The metadata of a card; `ValueError` says what the Hub would refuse."""
    front = re.match(r"\s*---\r?\n(.*?)\r?\n?---\s*(\n|$)", text, re.DOTALL)
    try:
        data = (yaml.safe_load(front[1]) if front else None) or {}
        if not all(isinstance(tag, str) for tag in data.get("tags", [])):
            raise ValueError('"tags" must be an array of strings')
        for model in data.get("model-index", []):
            for result in model["results"]:
                model["name"], result["task"]["type"], result["dataset"]["name"]
                for metric in result["metrics"]:
                    metric["type"], metric["value"]
    except yaml.YAMLError as error:
        raise ValueError(f"invalid YAML: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not a mapping with the fields that the Hub expects: {error!r}") from error
    return data


class HubServer:
    """The Hub; use as a context manager.

    Args:
        users (`tuple[str]`, *optional*, defaults to `("alice", "bob")`):
            Each may write to repos under the own name, with a token of `token(user)`. `put` and `create_repo` are not
            bound by users.
        lfs_suffixes (`tuple[str]`, *optional*):
            Files with these endings are stored by LFS.
    """

    def __init__(self, users: tuple[str, ...] = ("alice", "bob"), lfs_suffixes: tuple[str, ...] = LFS_SUFFIXES):
        self.lfs_suffixes = lfs_suffixes
        self.log: list[Request] = []
        self._tokens = {self.token(user, role): (user, role) for user in users for role in ("read", "write")}
        self._repos: dict[tuple[str, str], Repo] = {}
        self._cuts: dict[str, int] = {}
        self._secret = secrets.token_bytes(32)
        self._lock = threading.RLock()
        self._crashes: list[str] = []

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.cdn = f"http://localhost:{self._server.server_port}"  # to a client: another host
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        if self._crashes and exception_type is None:
            raise RuntimeError("the Hub itself failed:\n" + "\n".join(self._crashes))

    # What tests use

    def token(self, user: str, role: str = "write") -> str:
        return f"hf_{user}_{role}"

    def env(self, home: str | os.PathLike, token: str | None = "hf_alice_write") -> dict[str, str]:
        """The whole environment of a client process that keeps its files in `home`; `token=None` is nobody."""
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "DIFFUSERS_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        env |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "*",
            "no_proxy": "*",
        }
        env |= {f"HF_HUB_DISABLE_{what}": "1" for what in ("TELEMETRY", "UPDATE_CHECK", "PROGRESS_BARS")}
        env |= {"HF_HUB_DISABLE_XET": "1"}  # with it, huggingface_hub 2.x uploads to Xet servers only
        return env | ({"HF_TOKEN": token} if token else {})

    def create_repo(self, repo: str, private: bool = False, repo_type: str = "model") -> None:
        with self._lock:
            self._create(KINDS[repo_type], repo, private, repo.split("/")[0])

    def put(
        self,
        repo: str,
        files: Mapping[str, bytes],
        private: bool = False,
        revision: str = "main",
        repo_type: str = "model",
    ) -> str:
        """Commits `files` on a branch (a new one starts at main) and returns the commit id; creates the repo."""
        with self._lock:
            if (KINDS[repo_type], repo) not in self._repos:
                self.create_repo(repo, private, repo_type)
            found = self._repos[KINDS[repo_type], repo]
            ref = found.ref(revision) or f"refs/heads/{revision}"
            base = found.resolve(ref if ref in found.refs else "main")
            added = {path: File(data, self._by_lfs(path, len(data))) for path, data in files.items()}
            found.uploads |= {file.etag: file.data for file in added.values() if file.lfs}
            return found.commit(ref, base, {**base.files, **added}, repo.split("/")[0], "Put files", "")

    def files(self, repo: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        with self._lock:
            commit = self._repos[KINDS[repo_type], repo].resolve(revision)
            return {path: file.data for path, file in commit.files.items()}

    def commits(self, repo: str, revision: str = "main", repo_type: str = "model") -> list[str]:
        """The commit ids of a revision, newest first."""
        with self._lock:
            found = self._repos[KINDS[repo_type], repo]
            return [commit.oid for commit in found.history(found.resolve(revision))]

    def interrupt(self, path: str, after: int) -> None:
        """Breaks the connection of the next download of the file `path` after `after` bytes."""
        self._cuts[path] = after

    # What the handler's threads use

    def _respond(self, call: Request) -> Answer:
        """Answers one request and logs it."""
        with self._lock:
            try:
                if call.host == "cdn":
                    answer = self._storage(call)
                else:
                    if token := call.headers.get("Authorization", "").removeprefix("Bearer "):
                        if token not in self._tokens:
                            raise HubError(401, "Invalid credentials in Authorization header")
                        call.user, call.role = self._tokens[token]
                    answer = self._hub(call)
            except HubError as error:
                answer = _json({"error": str(error)}, error.status)
                answer.headers.update({"X-Error-Message": " ".join(str(error).split())} | error.headers)
                if error.code:
                    answer.headers["X-Error-Code"] = error.code
            except Exception:
                self._crashes.append(f"{call.method} {call.path}\n{traceback.format_exc()}")
                answer = Answer(500, {})
            call.status = answer.status
            self.log.append(call)
        return answer

    def _hub(self, call: Request) -> Answer:
        """The API and the files, one case per endpoint."""
        match [call.method, *call.segments]:
            case ["GET", "api", "whoami-v2"]:
                if call.user is None:
                    raise HubError(401, "Invalid username or password.")
                auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": call.role}}
                return _json({"type": "user", "id": call.user, "name": call.user, "orgs": [], "auth": auth})

            case ["POST", "api", "validate-yaml"]:
                try:
                    data = read_card(call.json["content"])
                except ValueError as error:
                    return _json({"errors": [{"message": str(error)}], "warnings": []}, 400)
                warning = {"message": "empty or missing yaml metadata in repo card"}
                return _json({"errors": [], "warnings": [] if data else [warning]})

            case ["POST" | "DELETE", "api", "repos", "create" | "delete" as action]:
                wish = call.json
                kind, namespace = KINDS.get(wish.get("type") or "model"), wish.get("organization") or call.user
                if kind is None:
                    raise HubError(400, f"Unknown repo type: {wish['type']}")
                self._check_write(call, namespace)
                repo_id = f"{namespace}/{wish['name']}"
                if action == "delete":
                    self._repo(call, kind, repo_id)
                    return _json({"deleted": self._repos.pop((kind, repo_id)).repo_id})
                where = {"url": self._page(kind, repo_id), "name": repo_id}
                if (kind, repo_id) in self._repos:
                    return _json({"error": "You already created this repo", **where}, 409)
                private = wish.get("visibility") == "private" or wish.get("private") is True
                self._create(kind, repo_id, private, namespace)
                return _json(where)

            case [_, "api", "models" | "datasets" as kind, namespace, name, *route]:
                return self._repo_api(call, self._repo(call, kind, f"{namespace}/{name}"), route)
        # Outside the API a model has no prefix.
        kind, route = ("datasets", call.segments[1:]) if call.segments[0] == "datasets" else ("models", call.segments)
        match [call.method, *route]:
            case ["POST", namespace, name, "info", "lfs", "objects", "batch" | "verify" as action]:
                return self._lfs(call, self._repo(call, kind, f"{namespace}/{name.removesuffix('.git')}"), action)
            case ["GET" | "HEAD", namespace, name, "resolve", revision, *path]:
                return self._file(call, self._repo(call, kind, f"{namespace}/{name}"), revision, "/".join(path))
        raise HubError(404, f"Not found: {call.method} /{'/'.join(call.segments)}")

    def _repo_api(self, call: Request, repo: Repo, route: list[str]) -> Answer:
        """`/api/{models,datasets}/{namespace}/{name}/...`."""
        # Who may read a repo may propose changes to it.
        pull_request = call.query.get("create_pr") == ["1"]
        namespace = None if pull_request else repo.repo_id.split("/")[0]
        match [call.method, *route]:
            case ["GET"]:
                return self._info(repo, repo.resolve("main"), "blobs" in call.query)
            case ["GET", "revision", revision]:
                return self._info(repo, repo.resolve(revision), "blobs" in call.query)

            case ["GET", "refs"]:
                found: dict[str, list] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
                for ref, oid in repo.refs.items():
                    _, what, name = ref.split("/", 2)
                    key = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}[what]
                    found[key].append({"name": name, "ref": ref, "targetCommit": oid})
                if "include_prs" not in call.query:
                    del found["pullRequests"]
                return _json(found)

            case ["GET", "commits", revision]:
                rows = []
                for commit in repo.history(repo.resolve(revision)):
                    rows.append({"id": commit.oid, "title": commit.title, "message": commit.description})
                    rows[-1] |= {"date": _iso(commit.date), "authors": [{"user": commit.author}]}
                return _json(rows)

            case ["GET", "tree", revision, *path]:
                folder = "/".join(path)
                entries = walk(repo.resolve(revision).files)[1]
                if folder and not any(entry["path"].startswith(f"{folder}/") for entry in entries):
                    raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
                if call.query.get("recursive") in (["true"], ["1"]):
                    return _json([entry for entry in entries if not folder or entry["path"].startswith(f"{folder}/")])
                return _json([entry for entry in entries if entry["path"].rpartition("/")[0] == folder])

            case ["POST", "paths-info", revision]:
                wanted = parse_qs(call.body.decode())["paths"]
                return _json([entry for entry in walk(repo.resolve(revision).files)[1] if entry["path"] in wanted])

            case ["POST", "branch" | "tag" as what, name]:
                self._check_write(call, namespace)
                # A new branch is named by the address, a new tag by the body.
                if what == "branch":
                    ref, start = f"refs/heads/{name}", call.json.get("startingPoint", "main")
                else:
                    ref, start = f"refs/tags/{call.json['tag']}", name
                if ref in repo.refs:
                    raise HubError(409, f"Reference already exists: {ref}")
                repo.refs[ref] = repo.resolve(start).oid
                return _json({})
            case ["DELETE", "branch" | "tag" as what, name]:
                self._check_write(call, namespace)
                ref = f"refs/{'heads' if what == 'branch' else 'tags'}/{name}"
                if ref == "refs/heads/main":
                    raise HubError(403, "The main branch cannot be deleted")
                if repo.refs.pop(ref, None) is None:
                    raise HubError(404, f"No such reference: {ref}", "RevisionNotFound")
                return _json({})

            case ["POST", "preupload", revision]:
                self._check_write(call, namespace)
                there, modes = repo.resolve(revision).files, []
                for item in call.json["files"]:
                    path, mode = item["path"], "lfs" if self._by_lfs(item["path"], item["size"]) else "regular"
                    oid = there[path].etag if path in there else None
                    modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
                return _json({"files": modes})

            case ["POST", "commit", revision]:
                self._check_write(call, namespace)
                base, ref = repo.resolve(revision), repo.ref(revision)
                if pull_request:
                    ref = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repo.refs)}"
                elif ref is None or ref.startswith("refs/tags/"):
                    raise HubError(400, f"{revision} is not a branch")
                return self._commit(call, repo, ref, base)
        raise HubError(404, f"Not found: {call.method} {repo.repo_id}: {'/'.join(route)}")

    def _commit(self, call: Request, repo: Repo, ref: str, base: Commit) -> Answer:
        """Applies a commit's lines of JSON, all or none."""
        files, title, text = dict(base.files), "", ""
        for line in filter(None, call.body.split(b"\n")):
            item = json.loads(line)
            key, value = item["key"], item["value"]
            path = value.get("path", "")
            inside = [name for name in files if name.startswith(f"{path.rstrip('/')}/")]
            if key == "header":
                title, text = value["summary"], value["description"]
                if value.get("parentCommit", base.oid) != base.oid:
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[path] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile" and value["oid"] in repo.uploads:
                files[path] = File(repo.uploads[value["oid"]], lfs=True)
            elif key == "deletedFile" and path in files:
                del files[path]
            elif key == "deletedFolder" and inside:
                files = {name: file for name, file in files.items() if name not in inside}
            else:
                raise HubError(400, f"Cannot do {key} on {path}: no such operation, file or uploaded LFS object")
        oid = repo.commit(ref, base, files, call.user, title, text)
        page = self._page(repo.kind, repo.repo_id)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{page}/commit/{oid}"}
        if ref.startswith("refs/pr/"):
            answer["pullRequestUrl"] = f"{page}/discussions/{ref.removeprefix('refs/pr/')}"
        return _json(answer)

    def _info(self, repo: Repo, commit: Commit, blobs: bool) -> Answer:
        """`model_info` and `dataset_info`."""
        try:
            card = read_card(commit.files["README.md"].data.decode())
        except (KeyError, ValueError):
            card = {}
        siblings = []
        for path, file in sorted(commit.files.items()):
            details = {"size": len(file.data), "blobId": file.git_id, **file.lfs_info("sha256")}
            siblings.append({"rfilename": path, **(details if blobs else {})})
        info = {"id": repo.repo_id, "author": repo.repo_id.split("/")[0], "sha": commit.oid, "siblings": siblings}
        info |= {"createdAt": _iso(repo.history(commit)[-1].date), "lastModified": _iso(commit.date)}
        info |= {"private": repo.private, "gated": False, "tags": card.get("tags", []), "cardData": card}
        return _json(info | {key: card[key] for key in ("pipeline_tag", "library_name", "model-index") if key in card})

    def _file(self, call: Request, repo: Repo, revision: str, path: str) -> Answer:
        """A file itself, or for LFS the way to the storage host with the metadata of the file."""
        commit = repo.resolve(revision)
        headers = {"X-Repo-Commit": commit.oid}
        file = commit.files.get(path)
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        headers["ETag"] = f'"{file.git_id}"'
        if not file.lfs:
            return self._content(call, file.data, path, headers)
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
        return Answer(302, headers | {"Location": self._storage_address("GET", repo, file.etag, path)})

    def _content(self, call: Request, data: bytes, path: str, headers: dict[str, str]) -> Answer:
        """A file's bytes, or the range of them that was asked for."""
        status, size = 200, len(data)
        headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if match := re.fullmatch(r"bytes=(?=.*\d)(\d*)-(\d*)", call.range):
            first, last = match.groups()
            start = int(first) if first else max(size - int(last), 0)
            stop = min(int(last) + 1, size) if first and last else size
            if start >= stop:
                raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
            status, data = 206, data[start:stop]
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return Answer(status, headers, data, self._cuts.pop(path, None) if call.method == "GET" else None)

    def _lfs(self, call: Request, repo: Repo, action: str) -> Answer:
        """git LFS: where to upload the objects that the repo lacks, and whether they arrived."""
        self._check_write(call, None)
        if action == "verify":
            if len(repo.uploads.get(call.json["oid"], b"")) != call.json["size"]:
                raise HubError(404, f"LFS object {call.json['oid']} was not uploaded, or has another size")
            return _json({})
        verify = f"{self._page(repo.kind, repo.repo_id)}.git/info/lfs/objects/verify"
        objects = []
        for item in call.json["objects"]:
            objects.append({"oid": item["oid"], "size": item["size"]})
            if item["oid"] not in repo.uploads:
                upload = self._storage_address("PUT", repo, item["oid"], "upload")
                objects[-1]["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        return _json({"transfer": "basic", "objects": objects})

    def _storage(self, call: Request) -> Answer:
        """The other host: signed addresses of LFS objects, no tokens."""
        if "Authorization" in call.headers:
            raise HubError(400, "Only one auth mechanism is allowed: a token reached the storage host")
        kind, namespace, name, oid = call.segments
        repo, path = self._repos[kind, f"{namespace}/{name}"], call.query["filename"][0]
        address = self._storage_address("PUT" if call.method == "PUT" else "GET", repo, oid, path)
        if parse_qs(urlsplit(address).query) != call.query:
            raise HubError(403, "Invalid signature")
        headers = {"ETag": f'"{oid}"', "Content-Disposition": f'inline; filename="{quote(path)}";'}
        if call.method != "PUT":
            return self._content(call, repo.uploads[oid], path, headers)
        if hashlib.sha256(call.body).hexdigest() != oid:
            raise HubError(400, f"Checksum mismatch: the content is not that of sha256 {oid}")
        repo.uploads[oid] = call.body
        return Answer(200, headers)

    def _storage_address(self, method: str, repo: Repo, oid: str, path: str) -> str:
        target = f"/{repo.kind}/{repo.repo_id}/{oid}?filename={quote(path, safe='')}"
        signature = hmac.new(self._secret, f"{method} {target}".encode(), "sha256").hexdigest()
        return f"{self.cdn}{target}&signature={signature}"

    def _create(self, kind: str, repo_id: str, private: bool, author: str) -> None:
        repo = self._repos[kind, repo_id] = Repo(repo_id, kind, private)
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in self.lfs_suffixes)
        files = {".gitattributes": File(attributes.encode(), lfs=False)}
        repo.commit("refs/heads/main", None, files, author, "initial commit", "")

    def _repo(self, call: Request, kind: str, repo_id: str) -> Repo:
        repo = self._repos.get((kind, repo_id))
        if repo is None or (repo.private and call.user != repo_id.split("/")[0]):
            # The Hub does not tell a private repo from a missing one.
            raise HubError(404 if call.user else 401, "Repository not found", "RepoNotFound")
        return repo

    def _check_write(self, call: Request, namespace: str | None) -> None:
        """Whether the user may write there; no namespace: anywhere at all."""
        if call.user is None:
            raise HubError(401, "Invalid username or password.")
        if call.role != "write" or namespace not in (None, call.user):
            raise HubError(403, f"Forbidden: the {call.role} token of {call.user} may not write to this repo")

    def _by_lfs(self, path: str, size: int) -> bool:
        return size > 0 and (path.endswith(self.lfs_suffixes) or size > LFS_SIZE)

    def _page(self, kind: str, repo_id: str) -> str:
        return f"{self.endpoint}/{'' if kind == 'models' else f'{kind}/'}{repo_id}"


def _json(data: Any, status: int = 200) -> Answer:
    return Answer(status, {"Content-Type": "application/json"}, json.dumps(data, default=str).encode())


def _iso(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


class _Handler(BaseHTTPRequestHandler):
    """Reads a request from the socket, writes the Hub's answer to it."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet, else Nagle and delayed ACK cost 40 ms an answer
    disable_nagle_algorithm = True

    def do(self) -> None:
        if "Transfer-Encoding" in self.headers:  # chunks: no client sends them
            return self.send_error(411)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        host = "cdn" if self.headers.get("Host", "").startswith("localhost") else "hub"
        call = Request(host, self.command, url.path, parse_qs(url.query), self.headers, body)
        answer = self.hub._respond(call)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if answer.cut_at is not None:
            self.wfile.write(answer.body[: answer.cut_at])
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do

    def log_message(self, *_: object) -> None:
        """Tests read `HubServer.log`; nothing goes to stderr."""
