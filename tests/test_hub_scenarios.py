"""Repos end to end: published by one process to a Hub on this machine, loaded by others, each with a home of its own.

The processes are the clients of `hub_clients`. They run once, in the order in which they need each other; the tests
look at what they saw and at what the Hub holds.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from hub_clients import TESTS, make_unet, run
from hub_server import HubServer
from huggingface_hub import ModelCard
from reader_env import make_reader
from toy_sampler import ToySamplerPipeline

ROOT = TESTS.parent
GOOD = {"weights": True, "output": True}


def client(name: str, folder: Path, env: dict[str, str], python: str = sys.executable, package: bool = True) -> dict:
    """Run one client in `folder` and return what it saw."""
    path = {"PYTHONPATH": str(ROOT)} if package else {}
    done = subprocess.run(
        [python, TESTS / "hub_clients.py", name, folder],
        env={**env, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", **path},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clients")


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def publisher(hub: HubServer, folder: Path) -> dict:
    return client("publish", folder, hub.env(folder / "publisher"))


@pytest.fixture(scope="module")
def stock(hub: HubServer, folder: Path) -> DDPMPipeline:
    """A repo as the first DDPM checkpoints are: components at the root, pickled weights; and a repo with code only."""
    pipe = DDPMPipeline(make_unet(), DDPMScheduler())
    unet, scheduler = folder / "flat-unet", folder / "flat-scheduler"
    pipe.unet.save_pretrained(unet, safe_serialization=False)
    pipe.scheduler.save_pretrained(scheduler)
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": "0.1.1",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    files = {path.name: path.read_bytes() for path in (*unet.iterdir(), *scheduler.iterdir())}
    hub.put("alice/flat", {**files, "model_index.json": json.dumps(index).encode()})
    hub.put("alice/sampler", {"pipeline.py": (TESTS / "toy_sampler.py").read_bytes()})
    return pipe


@pytest.fixture(scope="module")
def reader(hub: HubServer, folder: Path, publisher: dict, stock: DDPMPipeline) -> dict:
    """Somebody else, without a token, who has diffusers and torch only."""
    python = make_reader(folder / "reader-env")
    return client("read", folder, hub.env(folder / "reader", token=None), python, package=False)


@pytest.fixture(scope="module")
def user(hub: HubServer, folder: Path, publisher: dict, stock: DDPMPipeline) -> dict:
    """Alice elsewhere, with the package, who lets no repo's code run."""
    env = {**hub.env(folder / "user", hub.token("alice", "read")), "DIFFUSERS_DISABLE_REMOTE_CODE": "1"}
    return client("use", folder, env)


@pytest.fixture(scope="module")
def traveller(hub: HubServer, folder: Path, user: dict) -> dict:
    """The same without network."""
    before = len(hub.log)
    env = {**hub.env(folder / "user"), "HF_HUB_OFFLINE": "1", "DIFFUSERS_EXT_NO_DISPATCH": "1"}
    env["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"
    seen = client("offline", folder, env)
    assert len(hub.log) == before
    if seen["stock"] != "no error":
        pytest.skip(f"this diffusers cannot load its own pipelines offline: {seen['stock']}")
    return seen


@pytest.fixture(scope="module")
def crashes() -> Iterator[dict]:
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # every save is synced, some hundred times
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield client("crash", Path(folder), {**os.environ, "HF_HOME": folder})


def sha8(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


# --- Publishing


def test_published_files(hub: HubServer, publisher: dict) -> None:
    files = hub.files("alice/toy", "v1")
    source = (TESTS / "toy_method.py").read_bytes()
    code = sha8(source)
    assert set(files) == {
        ".gitattributes",
        "README.md",
        "model_index.json",
        f"toy_method_{code}.py",
        "encoder/config.json",
        "encoder/diffusion_pytorch_model.safetensors",
        f"encoder/toy_method_encoder_{code}.py",
        "scheduler/scheduler_config.json",
        f"scheduler/toy_method_scheduler_{code}.py",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    assert all(content == source for name, content in files.items() if name.endswith(".py"))
    index = json.loads(files["model_index.json"])
    assert index.pop("_diffusers_version")
    assert index == {
        "_class_name": [f"toy_method_{code}", "ToyPipeline"],
        "encoder": [f"toy_method_encoder_{code}", "ToyEncoder"],
        "scheduler": [f"toy_method_scheduler_{code}", "ToyScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }


def test_published_card(hub: HubServer, publisher: dict) -> None:
    data = ModelCard(hub.files("alice/pdae")["README.md"].decode()).data
    assert (data.library_name, data.license, data.base_model) == ("diffusers", "mit", "google/ddpm-cifar10-32")
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in data.eval_results] == [("digits", "mse", 0.25)]
    for repo in ("toy-two", "secret", "pdae"):
        text = hub.files(f"alice/{repo}")["README.md"].decode()
        assert f'DiffusionPipeline.from_pretrained("alice/{repo}", trust_remote_code=True)' in text


def test_same_push_again_changes_nothing(publisher: dict) -> None:
    assert publisher["again"] == publisher["commit"]


def test_push_of_other_code_removes_the_old_and_keeps_what_is_the_users(hub: HubServer, publisher: dict) -> None:
    files, old = hub.files("alice/toy"), hub.files("alice/toy", "v1")
    code = {name for name in files if name.endswith(".py")}
    assert len(code) == 4
    assert "tool_deadbeef.py" in code
    assert not {name for name in old if name.endswith(".py")} & code
    assert files["keep.txt"] == b"mine"
    card = files["README.md"].decode()
    assert card.endswith("\n# My words\n")
    assert ModelCard(card).data.to_dict().items() >= {"license": "apache-2.0", "library_name": "diffusers"}.items()


def test_pull_request(hub: HubServer, publisher: dict) -> None:
    assert publisher["pull request"].endswith("/alice/toy/discussions/1")
    code, main = hub.files("alice/toy", "refs/pr/1"), hub.files("alice/toy")
    old = hub.files("alice/toy", "v1")
    assert {name for name in code if name.endswith(".py")} - {"tool_deadbeef.py"} == {
        name for name in old if name.endswith(".py")
    }
    assert set(main) != set(code)


def test_single_file_replaces_shards(hub: HubServer, publisher: dict) -> None:
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    assert index in publisher["shards"]
    assert not [name for name in publisher["shards"] if "optimizer" in name]
    weights = {name for name in hub.files("alice/sharded") if name.startswith("unet/diffusion")}
    assert weights == {"unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"}


def test_refused_push_leaves_the_saved_folder(publisher: dict, hub: HubServer) -> None:
    assert "401" in publisher["wrong token"]
    assert publisher["saved"]
    assert "tags" in publisher["wrong card"]
    assert set(hub.files("alice/refused")) == {".gitattributes"}
    assert "403" in publisher["someone else's"]


def test_pipeline_loaded_with_the_repos_code_publishes_it(hub: HubServer, publisher: dict) -> None:
    assert publisher["remote class"].startswith("diffusers_modules.")
    copy, original = hub.files("alice/copy"), hub.files("alice/toy", "v1")
    assert {n: c for n, c in copy.items() if n.endswith(".py")} == {
        n: c for n, c in original.items() if n.endswith(".py")
    }
    assert copy["model_index.json"] == original["model_index.json"]
    assert publisher["base model"] == "alice/toy"


# --- Loading with diffusers only


def test_reader_needs_trust_and_nothing_runs_without(reader: dict) -> None:
    assert reader["package"].startswith("ModuleNotFoundError")
    assert reader["accelerate"] is False
    for error in (*reader["no trust"], reader["no trust, local"]):
        assert error.startswith("ValueError")
        assert "trust_remote_code" in error
    assert reader["executed without trust"] == []


def test_reader_loads_and_runs(reader: dict) -> None:
    for repo in ("toy", "pdae", "pull request"):
        assert reader[repo] == GOOD, repo
    assert reader["half"] == "torch.bfloat16"
    assert reader["local folder"] == "ToyPipeline"
    assert reader["pickle"]


def test_two_repos_of_different_code_do_not_mix(reader: dict) -> None:
    assert reader["other code"]
    assert reader["first again"] == GOOD


def test_custom_pipeline_on_a_stock_repo(reader: dict, user: dict, stock: DDPMPipeline) -> None:
    expected = run(ToySamplerPipeline.from_pipe(stock)).sum().item()
    for how in ("file", "repo"):
        name, value = reader[f"custom pipeline, {how}"]
        assert name == "ToySamplerPipeline"
        assert value == pytest.approx(expected, abs=1e-4)
    assert user["class on a stock repo"] == pytest.approx(expected, abs=1e-4)
    assert user["stock repo"] == "DDPMPipeline"
    assert user["from_pipe"] == [True, "torch.float64"]


# --- Loading with the package


def test_classes_load_without_the_repos_code(user: dict) -> None:
    for what in ("toy", "pdae", "private", "pull request"):
        assert user[what] == GOOD, what
    assert user["encoder passed"]
    assert user["executed"] == []


def test_dispatch(user: dict) -> None:
    assert user["dispatched"] == [True, GOOD]
    assert user["cache_dir"]
    # What asks for the repo's code gets to where diffusers refuses it.
    for case in ("not ours", "trust_remote_code"):
        assert "remote code is disabled" in user[case]


@pytest.mark.parametrize(
    ("case", "repo"),
    [("private, no token", "alice/secret"), ("missing repo", "alice/nothing"), ("missing revision", "alice/pdae")],
)
def test_errors_of_the_hub_are_those_of_diffusers(user: dict, case: str, repo: str) -> None:
    assert user[case].startswith(f"OSError: Cannot load model {repo}")


def test_repo_of_another_version_is_noted(user: dict) -> None:
    assert user["other version"]["output"]
    assert any("another version of ToyPipeline" in note for note in user["note"])


def test_offline(traveller: dict) -> None:
    assert traveller["toy"] == traveller["pdae"] == traveller["other cache"] == GOOD
    assert traveller["never cached"] != "no error"


def test_dispatch_can_be_switched_off_and_wraps_once(traveller: dict) -> None:
    assert traveller["switched off"] != "no error"
    assert traveller["wrapped once"]


# --- Interrupted saves


def test_killed_save_leaves_a_whole_repo_or_none(crashes: dict) -> None:
    assert crashes["bad"] == []
    assert set(crashes["outcomes"]) == {"old", "new", "no index"}
    assert set(crashes["recovered"]) == {"old", "new"}
    assert crashes["recoveries killed"] > 10
    assert crashes["stock loads it"] is False
    assert crashes["went back"] == crashes["went on"] == GOOD
    assert crashes["next save"] == [True, False]


def test_two_processes_that_save_at_once(crashes: dict) -> None:
    assert crashes["savers"] == [0, 0]
    assert crashes["two savers"] == [True, False]


def test_full_disk(crashes: dict) -> None:
    assert crashes["limit"].startswith("OSError: the weights could not be written")
    assert crashes["limit, after"] == [True, False]
    if "full disk" not in crashes:
        pytest.skip("may not mount a small file system; the limit on file sizes was tested")
    error, note = crashes["full disk"]
    assert error.startswith("OSError")
    assert "No space left" in error
    assert "is as it was before" in note
    assert crashes["full disk, after"] == [True, False]
    assert crashes["full disk, loads"] == GOOD
