"""What the client processes of `test_hub_scenarios` do. Run as `hub_clients.py CLIENT FOLDER`: prints JSON.

Each client is a process because huggingface_hub and diffusers read their environment at import, and because a process
that cannot import `diffusers_ext` needs another interpreter. FOLDER is shared by them.
"""

import importlib.util
import json
import os
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel

torch.set_num_threads(1)
TESTS = Path(__file__).parent
CARD = {
    "license": "mit",
    "datasets": "digits",
    "metrics": [{"dataset_name": "digits", "metric_type": "mse", "metric_value": 0.25}],
    "training": {"steps": 3},
}


def make_unet(seed: int = 0) -> UNet2DModel:
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    return unet.eval()


def make_toy(module: Any = None, seed: int = 0) -> DiffusionPipeline:
    import toy_method

    module = module or toy_method
    unet = make_unet(seed)
    return quiet(module.ToyPipeline(unet, module.ToyEncoder().eval(), module.ToyScheduler(factor=0.25)))


def make_pdae(seed: int = 0) -> DiffusionPipeline:
    from diffusers_ext import PDAEEncoder, PDAEGradientEstimator, PDAEPipeline

    unet = make_unet(seed)
    encoder = PDAEEncoder(8, 1, latent_dim=4, block_out_channels=(8, 8), attention_block=None, norm_num_groups=4)
    estimator = PDAEGradientEstimator.from_unet(unet, latent_dim=4)
    for parameter in estimator.parameters():  # a fresh one is zero
        torch.nn.init.normal_(parameter, std=0.05)
    return quiet(PDAEPipeline(unet, encoder.eval(), estimator.eval(), DDPMScheduler()))


def other_version(folder: Path, shift: float = 3.0) -> Any:
    """The toy's module with other code under the same file name."""
    folder.mkdir(parents=True, exist_ok=True)
    source = (TESTS / "toy_method.py").read_text(encoding="utf-8")
    (folder / "toy_method.py").write_text(source.replace("SHIFT = 1.0", f"SHIFT = {shift}"), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"other_toy_{int(shift)}", folder / "toy_method.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: DiffusionPipeline) -> torch.Tensor:
    quiet(pipe)
    image, generator = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8), torch.Generator().manual_seed(0)
    if "PDAE" in type(pipe).__name__:
        return pipe(image, num_inference_steps=3, generator=generator, output_type="pt").images
    return pipe(image, generator) if "encoder" in pipe.components else pipe(generator)


def state(pipe: DiffusionPipeline) -> dict[str, torch.Tensor]:
    models = {name: model for name, model in pipe.components.items() if isinstance(model, torch.nn.Module)}
    return {f"{name}.{key}": value for name, model in models.items() for key, value in model.state_dict().items()}


def same(pipe: DiffusionPipeline, expected: tuple[dict, torch.Tensor]) -> dict[str, bool]:
    """Whether `pipe` has the expected weights, to the bit, and output."""
    weights, (known, output) = state(pipe), expected
    return {
        "weights": weights.keys() == known.keys() and all(torch.equal(weights[key], known[key]) for key in known),
        "output": torch.allclose(run(pipe), output, atol=1e-5),
    }


def refusal(call: Callable) -> str:
    """The error of `call`, which must fail."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def remote_modules() -> list[str]:
    return sorted(name for name in sys.modules if name.startswith("diffusers_modules"))


# --- The clients


def publish(folder: Path) -> dict[str, Any]:
    """As alice, with the package: everything that writes to the Hub."""
    from huggingface_hub import HfApi

    api, seen = HfApi(), {}
    toy, pdae, other = make_toy(), make_pdae(), make_toy(other_version(folder / "other"))
    torch.save({"toy": (state(toy), run(toy)), "pdae": (state(pdae), run(pdae))}, folder / "expected.pt")

    # A first push, the same again, and a release.
    first = toy.push_to_hub("alice/toy", card=CARD)
    seen["commit"], seen["again"] = first.oid, toy.push_to_hub("alice/toy").oid
    api.create_tag("alice/toy", tag="v1")
    pdae.push_to_hub("alice/pdae", card={**CARD, "base_model": "google/ddpm-cifar10-32"})
    other.push_to_hub("alice/toy-two")
    toy.push_to_hub("alice/secret", private=True, commit_message="Keep it")

    # A card and files of the user's own, then a push of other code.
    own = {"README.md": b"# My words\n", "keep.txt": b"mine", "tool_deadbeef.py": b"mine"}
    for name, content in own.items():
        api.upload_file(repo_id="alice/toy", path_in_repo=name, path_or_fileobj=content)
    other.push_to_hub("alice/toy", card={"license": "apache-2.0"})
    seen["pull request"] = toy.push_to_hub("alice/toy", create_pr=True).pr_url

    # Shards give way to a single file. Only what was saved is uploaded, not what else is in the folder.
    (folder / "sharded").mkdir()
    (folder / "sharded" / "optimizer.bin").write_bytes(b"1")
    toy.save_pretrained(folder / "sharded", max_shard_size="100KB", push_to_hub=True, repo_id="alice/sharded")
    seen["shards"] = sorted(api.list_repo_files("alice/sharded"))
    make_toy(seed=1).save_pretrained(folder / "sharded", push_to_hub=True, repo_id="alice/sharded", variant="fp16")
    make_toy(seed=1).save_pretrained(folder / "sharded", push_to_hub=True)

    # What the Hub refuses: the folder is saved all the same.
    wrong = {"push_to_hub": True, "repo_id": "alice/refused"}
    seen["wrong token"] = refusal(lambda: toy.save_pretrained(folder / "refused", token="hf_wrong", **wrong))
    seen["saved"] = (folder / "refused" / "model_index.json").is_file()
    seen["wrong card"] = refusal(lambda: toy.save_pretrained(folder / "refused", card={"tags": [1]}, **wrong))
    seen["someone else's"] = refusal(lambda: toy.push_to_hub("bob/toy"))

    # A pipeline that runs the repo's code publishes that code.
    remote = DiffusionPipeline.from_pretrained("alice/toy", revision="v1", trust_remote_code=True)
    seen["remote class"] = type(remote).__module__
    remote.push_to_hub("alice/copy")
    seen["base model"] = api.model_info("alice/copy").card_data.base_model

    seen["dispatched"] = type(DiffusionPipeline.from_pretrained("alice/pdae")).__module__
    return seen


def read(folder: Path) -> dict[str, Any]:
    """With diffusers and torch only."""
    expected = torch.load(folder / "expected.pt", weights_only=True)
    load = DiffusionPipeline.from_pretrained
    seen = {"package": refusal(lambda: importlib.import_module("diffusers_ext"))}
    seen["accelerate"] = importlib.util.find_spec("accelerate") is not None
    seen["no trust"] = [refusal(lambda repo=repo: load(repo)) for repo in ("alice/pdae", "alice/toy")]
    seen["no trust, local"] = refusal(lambda: load(folder / "sharded"))
    seen["executed without trust"] = remote_modules()

    first = load("alice/toy", revision="v1", trust_remote_code=True)
    seen["toy"] = same(first, expected["toy"])
    second = load("alice/toy-two", trust_remote_code=True)
    seen["other code"] = torch.allclose(run(second), expected["toy"][1] + 2, atol=1e-5)
    seen["first again"] = same(first, expected["toy"])
    seen["pickle"] = type(pickle.loads(pickle.dumps(first.encoder))) is type(first.encoder)
    seen["pull request"] = same(load("alice/toy", revision="refs/pr/1", trust_remote_code=True), expected["toy"])
    seen["pdae"] = same(load("alice/pdae", trust_remote_code=True), expected["pdae"])
    seen["half"] = str(load("alice/pdae", trust_remote_code=True, torch_dtype=torch.bfloat16).encoder.dtype)
    seen["local folder"] = type(load(folder / "sharded", trust_remote_code=True)).__name__

    for how, custom in {"file": str(TESTS / "toy_sampler.py"), "repo": "alice/sampler"}.items():
        pipe = load("alice/flat", custom_pipeline=custom, trust_remote_code=True)
        seen[f"custom pipeline, {how}"] = [type(pipe).__name__, run(pipe).sum().item()]
    return seen


def use(folder: Path) -> dict[str, Any]:
    """With the package, where remote code is disabled."""
    from toy_method import ToyPipeline
    from toy_sampler import ToySamplerPipeline

    import diffusers_ext

    expected = torch.load(folder / "expected.pt", weights_only=True)
    load, seen = DiffusionPipeline.from_pretrained, {}
    seen["toy"] = same(ToyPipeline.from_pretrained("alice/toy", revision="v1"), expected["toy"])
    seen["pdae"] = same(diffusers_ext.PDAEPipeline.from_pretrained("alice/pdae"), expected["pdae"])
    pipe = load("alice/pdae", cache_dir=folder / "cache", revision="main", token="hf_alice_read")
    seen["dispatched"] = [type(pipe) is diffusers_ext.PDAEPipeline, same(pipe, expected["pdae"])]
    seen["cache_dir"] = (folder / "cache" / "models--alice--pdae").is_dir()
    encoder = diffusers_ext.PDAEEncoder.from_pretrained("alice/pdae", subfolder="encoder")
    seen["encoder passed"] = load("alice/pdae", encoder=encoder).encoder is encoder
    seen["pull request"] = same(ToyPipeline.from_pretrained("alice/toy", revision="refs/pr/1"), expected["toy"])

    seen["private"] = same(ToyPipeline.from_pretrained("alice/secret"), expected["toy"])
    seen["private, no token"] = refusal(lambda: load("alice/secret", token=False, cache_dir=folder / "no"))
    seen["missing repo"] = refusal(lambda: load("alice/nothing"))
    seen["missing revision"] = refusal(lambda: load("alice/pdae", revision="v9"))
    seen["not ours"] = refusal(lambda: load("alice/toy"))  # a class that the package does not ship
    seen["trust_remote_code"] = refusal(lambda: load("alice/pdae", trust_remote_code=True))  # disabled, so refused

    # A repo whose code is another version: the installed one is used, and a note says so.
    records, handler = [], diffusers.utils.logging.get_logger("diffusers_ext.hub")
    handler.setLevel("INFO")
    handler.addFilter(lambda record: records.append(record.getMessage()) or True)
    seen["other version"] = same(ToyPipeline.from_pretrained("alice/toy"), expected["toy"])
    seen["note"] = records

    seen["stock repo"] = type(load("alice/flat")).__name__
    pipe = ToySamplerPipeline.from_pretrained("alice/flat")
    seen["class on a stock repo"] = run(pipe).sum().item()
    stock = DDPMPipeline.from_pretrained("alice/flat").to(torch.float64)
    pipe = ToySamplerPipeline.from_pipe(stock)
    seen["from_pipe"] = [pipe.unet is stock.unet, str(pipe.dtype)]
    seen["executed"] = remote_modules()
    return seen


def offline(folder: Path) -> dict[str, Any]:
    """With the package and the cache that `use` left, without network, and not dispatching at import."""
    from toy_method import ToyPipeline

    import diffusers_ext

    expected = torch.load(folder / "expected.pt", weights_only=True)
    stock = DiffusionPipeline.__dict__["from_pretrained"]
    # diffusers 0.38 with its newest huggingface_hub finds no cached repo whole that has a README.md
    seen = {"stock": refusal(lambda: DDPMPipeline.from_pretrained("alice/flat"))}
    if seen["stock"] != "no error":
        return seen
    seen["toy"] = same(ToyPipeline.from_pretrained("alice/toy", revision="v1"), expected["toy"])
    seen["switched off"] = refusal(lambda: DiffusionPipeline.from_pretrained("alice/pdae"))
    diffusers_ext.dispatch()
    wrapped = DiffusionPipeline.__dict__["from_pretrained"]
    diffusers_ext.dispatch()
    seen["wrapped once"] = wrapped is not stock and DiffusionPipeline.__dict__["from_pretrained"] is wrapped
    seen["pdae"] = same(DiffusionPipeline.from_pretrained("alice/pdae"), expected["pdae"])
    pipe = DiffusionPipeline.from_pretrained("alice/pdae", cache_dir=folder / "cache", local_files_only=True)
    seen["other cache"] = same(pipe, expected["pdae"])
    seen["never cached"] = refusal(lambda: DiffusionPipeline.from_pretrained("alice/toy-two"))
    return seen


def crash(folder: Path) -> dict[str, Any]:
    """Saves that are killed, run into a full disk, or meet each other. Each runs in a fork."""
    import resource
    import subprocess

    from toy_method import ToyPipeline

    old, new = make_toy(), make_toy(other_version(folder / "other"), seed=1)
    (folder / "repo").mkdir(parents=True)
    (folder / "repo" / "notes.txt").write_text("mine")
    (folder / "repo" / "unet").mkdir()
    (folder / "repo" / "unet" / "notes.txt").write_text("mine")
    repo, seen = folder / "repo", {"outcomes": {}, "recovered": {}, "bad": []}

    def content() -> dict[str, bytes]:
        files = [path for path in repo.rglob("*") if path.is_file() and ".unfinished_save" not in path.parts]
        return {path.relative_to(repo).as_posix(): path.read_bytes() for path in files}

    def fork(call: Callable, kill_at: int | None = None) -> int:
        """Run `call` in a child, which kills itself at the n-th change that it makes to the file system."""
        child = os.fork()
        if child == 0:
            changes = 0

            def count(event: str, args: tuple) -> None:
                nonlocal changes
                writes = event == "open" and isinstance(args[1], str) and args[1][0] in "wax"
                if writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
                    changes += 1
                    if changes == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            try:
                call()
            except Exception as error:
                print(f"{type(error).__name__}: {error} {' '.join(getattr(error, '__notes__', []))}", file=sys.stderr)
                os._exit(1)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def reset() -> None:
        shutil.rmtree(repo)
        shutil.copytree(folder / "backup", repo)

    old.save_pretrained(repo, max_shard_size="100KB", card=CARD)
    shutil.copytree(repo, folder / "backup")
    before = content()
    new.save_pretrained(repo, card=CARD)
    after = content()

    # 1. Killed at each change. What is there loads in whole or not at all, and nothing is lost.
    kill_at, hard_cases = 0, []
    while True:
        kill_at += 1
        reset()
        code = fork(lambda: new.save_pretrained(repo, card=CARD), kill_at)
        if code == 0:
            break
        found = content()
        outcome = "old" if found == before else "new" if found == after else "no index"
        if code != -signal.SIGKILL or (outcome == "no index" and "model_index.json" in found):
            seen["bad"].append([kill_at, code, sorted(found)])
        seen["outcomes"][outcome] = seen["outcomes"].get(outcome, 0) + 1
        if outcome == "no index":
            if not hard_cases:
                error = fork(lambda: DiffusionPipeline.from_pretrained(repo, trust_remote_code=True))
                seen["stock loads it"] = error == 0
            hard_cases.append(kill_at)
        ToyPipeline.load_config(repo)  # recovers, as every load through the class does
        found = content()
        whole = "old" if found == before else "new" if found == after else "neither"
        seen["recovered"][whole] = seen["recovered"].get(whole, 0) + 1
        refusal(lambda: new.save_pretrained(repo, max_shard_size=object()))  # cleans up, then fails
        if content() != found or (repo / ".unfinished_save").exists():
            seen["bad"].append([kill_at, whole, "changed by a save that failed"])

    # 2. The recovery is killed at each change, too.
    seen["recoveries killed"] = 0
    for case in (hard_cases[len(hard_cases) // 4], hard_cases[3 * len(hard_cases) // 4]):
        again = 0
        while True:
            again += 2  # every second one
            reset()
            fork(lambda: new.save_pretrained(repo, card=CARD), case)
            if fork(lambda: ToyPipeline.load_config(repo), again) == 0:
                break
            seen["recoveries killed"] += 1
            found = content()
            if "model_index.json" in found and found not in (before, after):
                seen["bad"].append([case, again, "half"])
            ToyPipeline.load_config(repo)
            if content() not in (before, after):
                seen["bad"].append([case, again, sorted(content())])
    reset()
    fork(lambda: new.save_pretrained(repo, card=CARD), hard_cases[0])
    seen["went back"] = same(ToyPipeline.from_pretrained(repo), (state(old), run(old)))
    reset()
    fork(lambda: new.save_pretrained(repo, card=CARD), hard_cases[-1])
    seen["went on"] = same(ToyPipeline.from_pretrained(repo), (state(new), run(new) - 2))  # the installed code

    # 3. A save after a killed one takes the folder over and cleans up.
    reset()
    fork(lambda: new.save_pretrained(repo, card=CARD), hard_cases[-1])
    new.save_pretrained(repo, card=CARD)
    seen["next save"] = [content() == after, (repo / ".unfinished_save").exists()]

    # 4. Two processes save at the same time, again and again: the folder is one of the two.
    reset()
    children = []
    for pipe in (old, new):
        if (child := os.fork()) == 0:
            try:
                for _ in range(10):
                    pipe.save_pretrained(repo, card=CARD)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    seen["savers"] = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    index = json.loads(content()["model_index.json"])
    winner = old if index["_class_name"][0] == json.loads(before["model_index.json"])["_class_name"][0] else new
    found = ToyPipeline.from_pretrained(repo)
    seen["two savers"] = [same(found, (state(winner), run(found)))["weights"], (repo / ".unfinished_save").exists()]

    # 5. A file system that is full, and a process that may write no larger files.
    reset()
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    seen["limit"] = refusal(lambda: new.save_pretrained(repo, card=CARD))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    seen["limit, after"] = [content() == before, (repo / ".unfinished_save").exists()]
    seen["limit, new folder"] = (folder / "nowhere").exists()

    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True)
    if mounted.returncode == 0:
        try:
            repo = disk
            old.save_pretrained(repo, card=CARD)
            kept = content()
            (disk / "big").write_bytes(b"0" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 8192))
            try:
                new.save_pretrained(repo, card=CARD)
            except Exception as error:
                seen["full disk"] = [f"{type(error).__name__}: {error}", *error.__notes__]
            found = content()
            found.pop("big")
            seen["full disk, after"] = [found == kept, (repo / ".unfinished_save").exists()]
            seen["full disk, loads"] = same(ToyPipeline.from_pretrained(repo), (state(old), run(old)))
        finally:
            subprocess.run(["umount", disk], check=True)
    return seen


if __name__ == "__main__":
    diffusers.utils.logging.disable_progress_bar()
    client = {f.__name__: f for f in (publish, read, use, offline, crash)}[sys.argv[1]]
    start = time.time()
    result = client(Path(sys.argv[2]))
    print(f"{sys.argv[1]}: {time.time() - start:.1f} s", file=sys.stderr)
    print(json.dumps(result))
