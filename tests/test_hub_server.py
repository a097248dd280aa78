"""The tests' own Hub against the real client: this file is also the client, run as `test_hub_server.py CLIENT FOLDER`.

Four client processes run one after the other, each prints what it saw as JSON; the tests compare that with what the
Hub holds, with the recorded requests, and with git itself.
"""

import hashlib
import http.client
import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hub_server import HubServer

CARD = b"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: image-to-image
tags:
- pdae
- diffusers
model-index:
- name: tiny
  results:
  - task:
      type: image-to-image
    dataset:
      name: digits
      type: digits
    metrics:
    - type: mse
      value: 0.01
---
# Tiny
"""
WEIGHTS = random.Random(0).randbytes(300_000)
BIG = random.Random(1).randbytes(12 * 2**20)  # the client writes, and so resumes, by 10 MiB
MODEL = {
    "README.md": CARD,
    "config.json": b'{"a": 1}',
    "empty.bin": b"",  # too small for LFS, whatever its name
    "old_code.py": b"x = 1",
    "unet/weights.safetensors": WEIGHTS,
    "encoder/weights.bin": WEIGHTS[::-1],
    "encoder/sub folder/\u00e4 #1.txt": b"odd name",
}


# --- The clients (in processes of their own)


def publish(folder: Path) -> dict:
    """As alice: everything that writes."""
    from huggingface_hub import CommitOperationAdd, HfApi

    def write(name: str, files: dict[str, bytes]) -> Path:
        for path, data in files.items():
            (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / path).write_bytes(data)
        return folder / name

    api, repo = HfApi(), "alice/model"
    seen = {"whoami": api.whoami()["name"], "url": api.create_repo(repo).repo_id}
    seen["created twice"] = refusal(lambda: api.create_repo(repo))
    seen["exist_ok"] = api.create_repo(repo, exist_ok=True).repo_id

    first = api.upload_folder(repo_id=repo, folder_path=write("model", MODEL), commit_description="Why")
    again = api.upload_folder(repo_id=repo, folder_path=folder / "model")
    seen["pushes"] = [first.oid, again.oid]
    seen["titles"] = [[commit.title, commit.message, *commit.authors] for commit in api.list_repo_commits(repo)]
    info = api.model_info(repo, files_metadata=True)
    seen["info"] = [info.sha, info.author, info.private, info.tags, info.pipeline_tag, info.library_name]
    seen["metric"] = [[r.dataset_name, r.metric_type, r.metric_value] for r in info.card_data.eval_results]
    seen["siblings"] = {
        s.rfilename: [s.size, s.blob_id, s.lfs and [s.lfs.sha256, s.lfs.pointer_size]] for s in info.siblings
    }
    seen["tree"] = {x.path: getattr(x, "size", None) for x in api.list_repo_tree(repo, "encoder", recursive=True)}
    seen["top"] = sorted(x.path for x in api.list_repo_tree(repo))
    seen["paths"] = [
        [x.path, getattr(x, "lfs", None) is not None]
        for x in api.get_paths_info(repo, ["unet", "unet/weights.safetensors", "none"])
    ]

    change = [CommitOperationAdd("config.json", b'{"a": 2}')]
    old = api.list_repo_commits(repo)[-1].commit_id
    seen["stale parent"] = refusal(lambda: api.create_commit(repo, change, commit_message="x", parent_commit=old))

    pull = api.create_commit(repo, change, commit_message="Propose", create_pr=True)
    api.upload_file(path_or_fileobj=b"more", path_in_repo="more.txt", repo_id=repo, revision=pull.pr_revision)
    seen["pull request"] = [pull.pr_revision, pull.pr_num]

    api.create_tag(repo, tag="v1", tag_message="First")
    api.create_branch(repo, branch="dev", revision="v1")
    api.upload_file(path_or_fileobj=b"dev", path_in_repo="dev.txt", repo_id=repo, revision="dev")
    for name in ("gone", "gone too"):
        api.create_branch(repo, branch=name)
        api.create_tag(repo, tag=name, revision="dev")
    api.delete_branch(repo, branch="gone")
    api.delete_tag(repo, tag="gone")
    seen["tag twice"] = refusal(lambda: api.create_tag(repo, tag="v1"))
    seen["no such branch"] = refusal(lambda: api.delete_branch(repo, branch="gone"))
    refs = api.list_repo_refs(repo, include_pull_requests=True)
    seen["refs"] = [[ref.name for ref in kind] for kind in (refs.branches, refs.tags, refs.pull_requests)]

    new = write("new", {"new_code.py": b"x = 2", "config.json": b'{"a": 3}'})
    api.upload_folder(repo_id=repo, folder_path=new, delete_patterns=["*.py"])
    api.delete_folder("encoder/sub folder", repo)
    api.delete_file("empty.bin", repo)
    seen["delete nothing"] = refusal(lambda: api.delete_file("none.txt", repo))

    changed = write("changing", {"late.safetensors": b"before"}) / "late.safetensors"
    late = CommitOperationAdd("late.safetensors", str(changed))
    assert late.upload_info.sha256 == hashlib.sha256(b"before").digest()
    changed.write_bytes(b"after!")  # a file that changes between hashing and upload
    seen["wrong content"] = refusal(lambda: api.create_commit(repo, [late], commit_message="Late"))
    bad_cards = (b"---\nlicense: [\n---\n", b"---\ntags: [1]\n---\n", b"---\nmodel-index:\n- name: x\n---\n")
    seen["bad cards"] = [
        refusal(lambda card=card: api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=repo))
        for card in bad_cards
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        api.create_repo("alice/bare")
        api.upload_file(path_or_fileobj=b"# No metadata", path_in_repo="README.md", repo_id="alice/bare")
    seen["bare card"] = any("empty or missing yaml metadata" in str(warning.message) for warning in caught)

    api.create_repo("alice/secret", private=True)
    api.upload_folder(repo_id="alice/secret", folder_path=folder / "model")
    api.create_repo("alice/images", repo_type="dataset")
    rows = write("images", {"train.csv": b"text,label\none,1\ntwo,2\n", "test.csv": b"text,label\nthree,3\n"})
    api.upload_folder(repo_id="alice/images", repo_type="dataset", folder_path=rows)
    seen["dataset again"] = refusal(lambda: api.model_info("alice/images"))
    api.create_repo("alice/temporary")
    seen["existed"] = api.repo_exists("alice/temporary")
    api.delete_repo("alice/temporary")
    seen["exists"] = api.repo_exists("alice/temporary")

    def upload(token: str | bool, **kwargs: object) -> str:
        added = [CommitOperationAdd("by_other.safetensors", b"other")]
        return api.create_commit(repo, added, commit_message="Other", token=token, **kwargs).pr_revision

    seen["read token"] = refusal(lambda: upload("hf_alice_read"))
    seen["other user"] = refusal(lambda: upload("hf_bob_write"))
    seen["no token"] = refusal(lambda: upload(False))
    seen["namespace"] = refusal(lambda: api.create_repo("bob/by_alice"))
    seen["other's pull request"] = upload("hf_bob_write", create_pr=True)
    return seen


def load(folder: Path) -> dict:
    """As nobody: everything that reads, tokens only where they are named."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    def contents(repo: str, **kwargs: object) -> dict[str, str]:
        root = Path(snapshot_download(repo, **kwargs))
        return {str(p.relative_to(root)): digest(p.read_bytes()) for p in root.rglob("*") if p.is_file()}

    repo = "alice/model"
    tries = {
        "missing repo": lambda: hf_hub_download("alice/none", "config.json"),
        "missing repo, logged in": lambda: hf_hub_download("alice/none", "config.json", token="hf_bob_read"),
        "missing file": lambda: hf_hub_download(repo, "none.json"),
        "missing revision": lambda: hf_hub_download(repo, "config.json", revision="none"),
        "missing revision of repo": lambda: snapshot_download(repo, revision="none"),
        "private": lambda: hf_hub_download("alice/secret", "config.json"),
        "private snapshot": lambda: snapshot_download("alice/secret"),
        "private of another": lambda: hf_hub_download("alice/secret", "config.json", token="hf_bob_write"),
        "wrong token": lambda: hf_hub_download("alice/images", "config.json", token="hf_wrong"),
        "wrong token, whoami": lambda: HfApi().whoami(token="hf_wrong"),
        "model as dataset": lambda: hf_hub_download(repo, "config.json", repo_type="dataset"),
    }
    # Before anything is in the cache: the client falls back on it.
    seen = {name: refusal(attempt) for name, attempt in tries.items()}

    seen["revisions"] = {name: contents(repo, revision=name) for name in ("main", "v1", "dev", "refs/pr/1")}
    commit = HfApi().model_info(repo, revision="v1").sha
    seen["by commit"] = contents(repo, revision=commit)
    seen["snapshot"] = Path(hf_hub_download(repo, "config.json", revision="v1")).parent.name == commit
    seen["dataset"] = contents("alice/images", repo_type="dataset")
    seen["private with token"] = contents("alice/secret", token="hf_alice_read")
    for name in ("lfs.safetensors", "lfs.safetensors", "text.json"):  # the second time from the cache
        try:
            path = hf_hub_download("alice/big", name)
        except Exception as error:  # old clients leave it to the user to call again
            if type(error).__name__ != "RemoteProtocolError":
                raise
            path = hf_hub_download("alice/big", name)
        seen[name] = digest(Path(path).read_bytes())
    seen["file exists"] = [HfApi().file_exists(repo, name) for name in ("config.json", "none")]
    return seen


def load_offline(folder: Path) -> dict:
    from huggingface_hub import hf_hub_download, snapshot_download

    path = hf_hub_download("alice/model", "unet/weights.safetensors", revision="refs/pr/1")
    return {
        "file": digest(Path(path).read_bytes()),
        "snapshot": Path(snapshot_download("alice/model")).name,
        "not cached": refusal(lambda: hf_hub_download("alice/model", "dev.txt")),
    }


def load_data(folder: Path) -> dict:
    from datasets import load_dataset

    data = load_dataset("alice/images")
    return {split: rows.to_list() for split, rows in data.items()}


def refusal(attempt: Callable[[], object]) -> list:
    """The class and the HTTP status of what `attempt` raises; the innermost of a chain has the status."""
    try:
        attempt()
    except Exception as error:
        name, inner = type(error).__name__, error
        while getattr(inner, "response", None) is None and inner.__cause__ is not None:
            inner = inner.__cause__
        return [name, getattr(getattr(inner, "response", None), "status_code", None)]
    return ["nothing", None]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))))
    sys.exit()


# --- The tests


def run(hub: HubServer, client: Callable, folder: Path, **env: str) -> dict:
    folder.mkdir(exist_ok=True)
    token = hub.token("alice") if client is publish else None
    command = [sys.executable, __file__, client.__name__, str(folder)]
    done = subprocess.run(
        command, env=hub.env(folder / "home", token) | env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory):
    return run(hub, publish, tmp_path_factory.mktemp("publish"))


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return tmp_path_factory.mktemp("load")


@pytest.fixture(scope="module")
def loaded(hub, published, reader):
    hub.put("alice/big", {"lfs.safetensors": BIG, "text.json": b"0123456789"})
    hub.interrupt("lfs.safetensors", after=11 * 2**20)
    hub.interrupt("text.json", after=4)
    return run(hub, load, reader)


def request(hub, method, path, body=None, user=None, host="hub", **headers):
    """One raw request -> status, headers, body."""
    connection = http.client.HTTPConnection(urlsplit(hub.cdn if host == "cdn" else hub.endpoint).netloc, timeout=10)
    if user:
        headers["Authorization"] = f"Bearer {hub.token(user)}"
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, response.headers, data


def test_push(hub, published):
    assert published["whoami"] == "alice"
    assert published["url"] == published["exist_ok"] == "alice/model"
    assert published["created twice"] == ["HfHubHTTPError", 409]
    first = hub.files("alice/model", "v1")
    assert {path: data for path, data in first.items() if path != ".gitattributes"} == MODEL
    assert "*.safetensors filter=lfs" in first[".gitattributes"].decode()
    puts = [call for call in hub.log if call.host == "cdn" and call.method == "PUT" and "alice/model" in call.path]
    sent = {call.segments[-1] for call in puts if call.status == 200}
    assert {digest(WEIGHTS), digest(WEIGHTS[::-1])} <= sent
    assert len(sent) == 3  # with the other user's pull request; nothing was sent twice
    assert len(puts) == 4  # with the refused one


def test_push_of_the_same_makes_no_commit(hub, published):
    first, again = published["pushes"]
    assert first == again == hub.commits("alice/model", "v1")[0]
    assert published["titles"] == [
        ["Upload folder using huggingface_hub", "Why", "alice"],
        ["initial commit", "", "alice"],
    ]


def test_info_and_tree(published):
    info = [published["pushes"][0], "alice", False, ["pdae", "diffusers"], "image-to-image", "diffusers"]
    assert published["info"] == info
    assert published["metric"] == [["digits", "mse", 0.01]]
    siblings = published["siblings"]
    assert set(siblings) == {*MODEL, ".gitattributes"}
    size, _, (sha256, pointer_size) = siblings["unet/weights.safetensors"]
    assert (size, sha256, pointer_size) == (300_000, digest(WEIGHTS), 131)
    assert siblings["config.json"] == [8, "4a036f56bb619924ec4189bd84ed716c766971ae", None]  # git hash-object
    assert siblings["empty.bin"] == [0, "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391", None]
    folder = "encoder/sub folder"
    assert published["tree"] == {folder: None, f"{folder}/\u00e4 #1.txt": 8, "encoder/weights.bin": 300_000}
    top = [".gitattributes", "README.md", "config.json", "empty.bin", "encoder", "old_code.py", "unet"]
    assert published["top"] == top
    assert published["paths"] == [["unet", False], ["unet/weights.safetensors", True]]


def test_ids_are_those_of_git(hub, tmp_path):
    """Blobs, trees (git sorts `a/` after `a-b` and `a.txt`) and commits, by git itself."""
    files = {"a/b.txt": b"1", "a-b": b"2", "a.txt": b"3", "a/c/d": b"4", "a0": b"", "w.safetensors": b"weights"}
    oid = hub.put("bob/git", files)
    status, _, body = request(hub, "GET", "/api/models/bob/git/commits/main")
    newest, oldest = json.loads(body)
    assert (status, newest["id"]) == (200, oid)

    def git(*args: str, **env: str) -> str:
        env = {"PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", **env}
        return subprocess.check_output(["git", *args], cwd=tmp_path, env=env, text=True).strip()

    def commit(of: dict, *parent: str) -> str:
        git("add", "--all")
        date = f"{int(datetime.fromisoformat(of['date']).timestamp())} +0000"
        env = {}
        for role in ("AUTHOR", "COMMITTER"):
            env |= {f"GIT_{role}_NAME": "bob", f"GIT_{role}_EMAIL": "bob@hub.invalid", f"GIT_{role}_DATE": date}
        return git("commit-tree", git("write-tree"), "-m", of["title"], *parent, **env)

    git("init", "--quiet")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest(b'weights')}\nsize 7\n"
    (tmp_path / ".gitattributes").write_bytes(hub.files("bob/git")[".gitattributes"])
    first = commit(oldest)
    for path, data in (files | {"w.safetensors": pointer.encode()}).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    assert [commit(newest, "-p", first), first] == hub.commits("bob/git")
    entries = json.loads(request(hub, "GET", "/api/models/bob/git/tree/main?recursive=true")[2])
    for line in git("ls-tree", "-r", "-t", git("write-tree")).splitlines():
        described, path = line.split("\t")
        assert described.split()[2] == next(entry["oid"] for entry in entries if entry["path"] == path)
    assert len(entries) == 9  # 7 files, 2 folders


def test_pull_request(hub, published, loaded):
    assert published["pull request"] == ["refs/pr/1", 1]
    expected = hub.files("alice/model", "v1") | {"config.json": b'{"a": 2}', "more.txt": b"more"}
    assert hub.files("alice/model", "refs/pr/1") == expected
    assert loaded["revisions"]["refs/pr/1"] == {path: digest(data) for path, data in expected.items()}
    # who may read may propose
    assert published["other's pull request"] == "refs/pr/2"
    assert hub.files("alice/model", "refs/pr/2")["by_other.safetensors"] == b"other"
    assert "by_other.safetensors" not in hub.files("alice/model")


def test_branches_and_tags(hub, published, loaded):
    assert published["refs"] == [["main", "dev", "gone too"], ["v1", "gone too"], ["1"]]
    assert published["tag twice"] == ["HfHubHTTPError", 409]
    assert published["no such branch"] == ["RevisionNotFoundError", 404]
    for revision in ("main", "v1", "dev"):
        files = {path: digest(data) for path, data in hub.files("alice/model", revision).items()}
        assert loaded["revisions"][revision] == files
    assert set(loaded["revisions"]["dev"]) - set(loaded["revisions"]["v1"]) == {"dev.txt"}
    assert loaded["by commit"] == loaded["revisions"]["v1"]
    assert loaded["snapshot"]


def test_deletions(hub, published):
    files = hub.files("alice/model")
    kept = {".gitattributes", "README.md", "unet/weights.safetensors", "encoder/weights.bin"}
    assert set(files) == {*kept, "config.json", "new_code.py"}
    assert files["config.json"] == b'{"a": 3}'
    assert published["delete nothing"] == ["BadRequestError", 400]


def test_refused_commits_leave_nothing(hub, published):
    assert published["stale parent"] == ["HfHubHTTPError", 412]
    assert published["wrong content"][1] == 400
    assert published["bad cards"] == [["ValueError", 400]] * 3
    assert published["bare card"]
    assert "late.safetensors" not in hub.files("alice/model")
    titles = json.loads(request(hub, "GET", "/api/models/alice/model/commits/main")[2])
    assert len(titles) == 5  # initial, folder, new folder, delete folder, delete file


def test_tokens(hub, published, loaded):
    for attempt in ("read token", "other user", "namespace"):
        assert published[attempt] == ["HfHubHTTPError", 403]
    assert published["no token"][1] == 401
    assert loaded["wrong token"] == ["HfHubHTTPError", 401]
    assert loaded["wrong token, whoami"] == ["HfHubHTTPError", 401]
    assert {call.user for call in hub.log if "alice/secret" in call.path and call.status < 300} == {"alice", None}


def test_private(hub, published, loaded):
    assert loaded["private with token"] == {path: digest(data) for path, data in hub.files("alice/secret").items()}
    assert digest(WEIGHTS) in loaded["private with token"].values()  # by LFS: the token did not reach the storage host
    for attempt in ("private", "private snapshot"):
        assert loaded[attempt] == ["RepositoryNotFoundError", 401]
    assert loaded["private of another"] == ["RepositoryNotFoundError", 404]


def test_missing_things(published, loaded):
    assert loaded["missing repo"] == ["RepositoryNotFoundError", 401]
    assert loaded["missing repo, logged in"] == ["RepositoryNotFoundError", 404]
    assert loaded["missing file"] == ["RemoteEntryNotFoundError", 404]
    assert loaded["missing revision"] == loaded["missing revision of repo"] == ["RevisionNotFoundError", 404]
    assert loaded["file exists"] == [True, False]
    assert (published["existed"], published["exists"]) == (True, False)


def test_interrupted_download_is_resumed(hub, loaded):
    assert loaded["lfs.safetensors"] == digest(BIG)
    assert loaded["text.json"] == digest(b"0123456789")
    calls = [call for call in hub.log if call.host == "cdn" and call.segments[-1] == digest(BIG)]
    assert [(call.method, call.status, call.range) for call in calls] == [
        ("GET", 200, ""),
        ("GET", 206, f"bytes={10 * 2**20}-"),
    ]
    assert len([call for call in hub.log if call.method == "GET" and call.path.endswith("text.json")]) == 2


def test_datasets(hub, published, loaded):
    files = hub.files("alice/images", repo_type="dataset")
    assert loaded["dataset"] == {path: digest(data) for path, data in files.items()}
    assert published["dataset again"] == ["RepositoryNotFoundError", 404]
    assert loaded["model as dataset"] == ["RepositoryNotFoundError", 401]


def test_offline(hub, loaded, reader):
    before = len(hub.log)
    seen = run(hub, load_offline, reader, HF_HUB_OFFLINE="1")
    assert seen["file"] == digest(WEIGHTS)
    assert seen["snapshot"] == hub.commits("alice/model")[0]
    assert seen["not cached"][0] == "LocalEntryNotFoundError"
    assert len(hub.log) == before


def test_load_dataset(hub, published, tmp_path):
    pytest.importorskip("datasets")
    assert run(hub, load_data, tmp_path) == {
        "train": [{"text": "one", "label": 1}, {"text": "two", "label": 2}],
        "test": [{"text": "three", "label": 3}],
    }


@pytest.mark.parametrize(
    ("asked", "status", "got"),
    [
        ("bytes=2-4", 206, b"234"),
        ("bytes=7-", 206, b"789"),
        ("bytes=-3", 206, b"789"),
        ("bytes=8-99", 206, b"89"),
        ("bytes=10-", 416, None),
        ("lines=1-2", 200, b"0123456789"),
    ],
)
@pytest.mark.parametrize("name", ["plain.txt", "stored.bin"])
def test_ranges(hub, name, asked, status, got):
    hub.put("bob/ranges", {name: b"0123456789"})
    path, host = f"/bob/ranges/resolve/main/{name}", "hub"
    if name == "stored.bin":
        url = urlsplit(request(hub, "GET", path)[1]["Location"])
        path, host = f"{url.path}?{url.query}", "cdn"
    answer = request(hub, "GET", path, host=host, Range=asked)
    assert answer[0] == status
    assert got is None or answer[2] == got
    if status == 206:
        start = b"0123456789".index(got)
        assert answer[1]["Content-Range"] == f"bytes {start}-{start + len(got) - 1}/10"


def test_storage_host(hub):
    """Another host name, signed addresses only, no tokens, contents checked."""
    oid = digest(b"0123456789")
    hub.put("bob/stored", {"weights.bin": b"0123456789"})
    status, headers, _ = request(hub, "HEAD", "/bob/stored/resolve/main/weights.bin")
    url = urlsplit(headers["Location"])
    assert (status, url.hostname, urlsplit(hub.endpoint).hostname) == (302, "localhost", "127.0.0.1")
    assert headers["X-Linked-Etag"] == f'"{oid}"'
    assert headers["X-Linked-Size"] == "10"
    assert headers["X-Repo-Commit"] == hub.commits("bob/stored")[0]
    signed = f"{url.path}?{url.query}"
    assert request(hub, "GET", signed, host="cdn")[0] == 200
    assert request(hub, "GET", signed, host="cdn", user="bob")[0] == 400
    assert request(hub, "GET", f"{url.path}?filename=weights.bin&signature=0", host="cdn")[0] == 403
    assert request(hub, "PUT", signed, b"0123456789", host="cdn")[0] == 403  # signed for GET

    wish = json.dumps({"objects": [{"oid": digest(b"new"), "size": 3}, {"oid": oid, "size": 10}]})
    batch = "/bob/stored.git/info/lfs/objects/batch"
    assert request(hub, "POST", batch, wish)[0] == 401
    new, old = json.loads(request(hub, "POST", batch, wish, user="bob")[2])["objects"]
    assert "actions" not in old
    url = urlsplit(new["actions"]["upload"]["href"])
    verify = urlsplit(new["actions"]["verify"]["href"]).path
    sent = json.dumps({"oid": digest(b"new"), "size": 3})
    assert request(hub, "PUT", f"{url.path}?{url.query}", b"bad", host="cdn")[0] == 400
    assert request(hub, "POST", verify, sent, user="bob")[0] == 404
    assert request(hub, "PUT", f"{url.path}?{url.query}", b"new", host="cdn")[0] == 200
    assert request(hub, "POST", verify, sent, user="bob")[0] == 200


@pytest.mark.parametrize("path", ["../up", "/root", "a//b", ".git/config", "file/below"])
def test_bad_paths(hub, path):
    hub.put("bob/paths", {"file": b"1"})
    before = hub.commits("bob/paths")
    lines = [
        {"key": "header", "value": {"summary": "x", "description": ""}},
        {"key": "file", "value": {"content": "", "encoding": "base64", "path": path}},
    ]
    body = "\n".join(map(json.dumps, lines))
    assert request(hub, "POST", "/api/models/bob/paths/commit/main", body, user="bob")[0] == 400
    assert hub.commits("bob/paths") == before


def test_binds_loopback_only_and_tells_of_its_own_failures():
    with pytest.raises(RuntimeError, match="JSONDecodeError"), HubServer() as hub:
        assert hub._server.server_address[0] == "127.0.0.1"
        hub.create_repo("bob/broken")
        assert request(hub, "POST", "/api/models/bob/broken/preupload/main", "no json", user="bob")[0] == 500
        assert request(hub, "GET", "/api/unknown")[0] == 404
