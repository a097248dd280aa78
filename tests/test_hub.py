"""What `HubMixin` and `dispatch` do in one process with a local folder; `test_hub_scenarios` has Hub and processes."""

import doctest
import importlib.util
import inspect
import itertools
import json
import os
import signal
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import diffusers
import numpy as np
import pytest
import torch
import toy_method
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from hub_clients import CARD, make_pdae, make_toy, make_unet, other_version, run, same, state
from huggingface_hub import EvalResult, ModelCard
from packaging.version import Version
from PIL import Image
from toy_method import ToyPipeline
from toy_sampler import ToySamplerPipeline

import diffusers_ext
from diffusers_ext import HubMixin, PDAEPipeline, dispatch, hub

DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.40.0") else "torch_dtype"
WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture
def toy() -> ToyPipeline:
    return make_toy()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_module(folder: Path, name: str, source: str) -> ModuleType:
    """A file with `source`, imported as `name`."""
    path = folder / f"{name}.py"
    path.write_text(textwrap.dedent(source), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_examples() -> None:
    assert doctest.testmod(hub, optionflags=doctest.ELLIPSIS).failed == 0


# --- Saving and loading


def test_loads_the_same_and_runs_no_code_of_the_folder(toy: ToyPipeline, tmp_path: Path) -> None:
    toy.save_pretrained(tmp_path)
    code = list(tmp_path.rglob("*.py"))
    assert len(code) == 3
    for path in code:
        path.write_text("raise SystemExit('the code of the folder ran')")
    loaded = ToyPipeline.from_pretrained(tmp_path)
    assert same(loaded, (state(toy), run(toy))) == {"weights": True, "output": True}
    assert type(loaded.encoder) is toy_method.ToyEncoder
    assert loaded.scheduler.config.factor == 0.25


def test_save_load_save_is_a_fixed_point(toy: ToyPipeline, tmp_path: Path) -> None:
    toy.save_pretrained(tmp_path / "first" / "repo")
    for _ in range(2):
        ToyPipeline.from_pretrained(tmp_path / "first" / "repo").save_pretrained(tmp_path / "again" / "repo")
        first, again = contents(tmp_path / "first" / "repo"), contents(tmp_path / "again" / "repo")
        for name in ("encoder/config.json", "unet/config.json"):  # diffusers notes where a model was loaded from
            first[name], again[name] = (
                {key: value for key, value in json.loads(files[name]).items() if key != "_name_or_path"}
                for files in (first, again)
            )
        assert first == again


def test_folder_of_another_pipeline_is_named(toy: ToyPipeline, tiny_ddpm_folder: Path) -> None:
    with pytest.raises(ValueError) as error:
        PDAEPipeline.from_pretrained(tiny_ddpm_folder)
    for word in (str(tiny_ddpm_folder), "a DDPMPipeline without `encoder`, `gradient_estimator`", "PDAEPipeline"):
        assert word in str(error.value)
    # what the folder lacks may be given, and what it has suffices
    pdae = make_pdae()
    parts = {"encoder": pdae.encoder, "gradient_estimator": pdae.gradient_estimator}
    assert PDAEPipeline.from_pretrained(tiny_ddpm_folder, **parts).encoder is pdae.encoder
    assert type(ToySamplerPipeline.from_pretrained(tiny_ddpm_folder)) is ToySamplerPipeline


def test_index_names_no_path_of_this_machine(toy: ToyPipeline, tmp_path: Path) -> None:
    toy.save_pretrained(tmp_path / "a")
    ToyPipeline.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert str(tmp_path) not in (tmp_path / "b" / "model_index.json").read_text()
    assert str(tmp_path) not in (tmp_path / "b" / "README.md").read_text()


def test_a_local_folder_is_no_base_model(toy: ToyPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`you/model` may be a folder where it was loaded, and nothing where it is saved."""
    monkeypatch.chdir(tmp_path)
    toy.save_pretrained("you/model")
    loaded = ToyPipeline.from_pretrained("you/model")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded.save_pretrained("again", card={})
    assert "you/model" not in (tmp_path / "elsewhere" / "again" / "README.md").read_text()


def test_variant_is_added(toy: ToyPipeline, tmp_path: Path) -> None:
    toy.save_pretrained(tmp_path)
    make_toy(seed=1).to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert same(ToyPipeline.from_pretrained(tmp_path), (state(toy), run(toy)))["weights"]
    half = ToyPipeline.from_pretrained(tmp_path, variant="fp16")
    assert torch.equal(half.encoder.linear.weight, make_toy(seed=1).encoder.linear.weight.half().float())


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"max_shard_size": "100KB"}, {}),
        ({}, {"max_shard_size": "100KB"}),
        ({"max_shard_size": "100KB"}, {"max_shard_size": "50KB"}),
        ({}, {"safe_serialization": False}),
        ({"safe_serialization": False}, {}),
    ],
)
def test_weights_of_an_earlier_save_are_not_loaded(
    toy: ToyPipeline, tmp_path: Path, first: dict, second: dict, variant: str | None
) -> None:
    # diffusers leaves the old files, and prefers an old index to a new single file, old safetensors to new pickles.
    make_toy(seed=1).save_pretrained(tmp_path, variant=variant, **first)
    toy.save_pretrained(tmp_path, variant=variant, **second)
    assert same(ToyPipeline.from_pretrained(tmp_path, variant=variant), (state(toy), run(toy)))["weights"]
    fresh = tmp_path / "fresh"
    toy.save_pretrained(fresh, variant=variant, **second)
    assert {path.name for path in (tmp_path / "unet").iterdir()} == {path.name for path in (fresh / "unet").iterdir()}


def test_old_code_goes_and_the_users_files_stay(toy: ToyPipeline, tmp_path: Path) -> None:
    folder = tmp_path / "repo"
    other = make_toy(other_version(tmp_path / "other"))
    other.save_pretrained(folder)
    own = ("notes.txt", "tool_deadbeef.py", "unet/mine.py", f"unet/{WEIGHTS}.ema.safetensors", "logs/deep/run.log")
    for name in own:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    toy.save_pretrained(folder)
    found = contents(folder)
    assert all(found[name] == b"mine" for name in own)
    source = Path(toy_method.__file__).read_bytes()
    assert [found[name] == source for name in sorted(found) if "toy_method" in name] == [True] * 3
    assert not (folder / ".unfinished_save").exists()


def test_two_versions_in_one_process_keep_their_code(toy: ToyPipeline, tmp_path: Path) -> None:
    other = make_toy(other_version(tmp_path / "other"))
    toy.save_pretrained(tmp_path / "a")
    other.save_pretrained(tmp_path / "b")
    first = DiffusionPipeline.from_pretrained(tmp_path / "a", trust_remote_code=True)
    second = DiffusionPipeline.from_pretrained(tmp_path / "b", trust_remote_code=True)
    torch.testing.assert_close(run(first), run(toy))
    torch.testing.assert_close(run(second), run(toy) + 2)


def test_compiled_component(toy: ToyPipeline, tmp_path: Path) -> None:
    expected = state(toy), run(toy)
    toy.unet, toy.encoder = torch.compile(toy.unet), torch.compile(toy.encoder)  # compiled at the first call only
    toy.save_pretrained(tmp_path)
    assert same(ToyPipeline.from_pretrained(tmp_path), expected) == {"weights": True, "output": True}


def test_index_in_list_form_is_what_diffusers_gets(toy: ToyPipeline, tmp_path: Path) -> None:
    toy.save_pretrained(tmp_path)
    config = ToyPipeline.load_config(tmp_path)
    assert config["_class_name"] == "ToyPipeline"
    assert config["encoder"] == ["toy_method", "ToyEncoder"]
    assert config["unet"] == ["diffusers", "UNet2DModel"]
    config, unused, commit = ToyPipeline.load_config(tmp_path, return_unused_kwargs=True, return_commit_hash=True, x=1)
    assert config["scheduler"] == ["toy_method", "ToyScheduler"]
    assert (unused, commit) == ({"x": 1}, None)


def test_subclass_loads_the_components_of_its_base(toy: ToyPipeline, tmp_path: Path) -> None:
    class Derived(ToyPipeline):
        pass

    toy.save_pretrained(tmp_path)
    Derived.__module__ = __name__
    assert type(Derived.from_pretrained(tmp_path).encoder) is toy_method.ToyEncoder


# --- What cannot be saved


def assert_refused(pipe: DiffusionPipeline, folder: Path, *words: str, **kwargs: object) -> None:
    """Saving raises a `ValueError` with these words and touches nothing."""
    before = contents(folder) if folder.is_dir() else folder.exists()
    with pytest.raises(ValueError) as error:
        pipe.save_pretrained(folder, **kwargs)
    for word in words:
        assert word in str(error.value)
    assert (contents(folder) if folder.is_dir() else folder.exists()) == before


def test_class_from_a_notebook_is_refused(toy: ToyPipeline, tmp_path: Path) -> None:
    cell = {"__name__": "__main__", "ToyEncoder": toy_method.ToyEncoder}
    exec("class NotebookEncoder(ToyEncoder):\n    pass", cell)
    toy.encoder = cell["NotebookEncoder"]()
    assert_refused(toy, tmp_path / "new", "`encoder`", "NotebookEncoder", "notebook", "`.py` file")


def test_class_in_a_function_is_refused(toy: ToyPipeline, tmp_path: Path) -> None:
    class Local(ToyPipeline):
        pass

    assert_refused(Local(**toy.components), tmp_path / "new", "its class", "Local", "top level")


def test_component_without_named_base_is_refused(toy: ToyPipeline, tmp_path: Path) -> None:
    source = """
    import toy_method

    class Other(toy_method.ToyEncoder):
        pass
    """
    toy.encoder = write_module(tmp_path, "no_base", source).Other()
    assert_refused(toy, tmp_path / "new", "`encoder`", "no_base.py", "`ModelMixin`", "import it")


def test_component_that_diffusers_cannot_save_is_refused(toy: ToyPipeline, tmp_path: Path) -> None:
    toy.encoder = write_module(tmp_path, "plain", "class Plain:\n    pass\n").Plain()
    assert_refused(toy, tmp_path / "new", "`encoder`", "`ModelMixin` or `SchedulerMixin`")


def test_relative_import_is_refused(toy: ToyPipeline, tmp_path: Path) -> None:
    source = """
    from diffusers import ModelMixin
    import toy_method

    class Other(toy_method.ToyEncoder):
        pass

    def later():
        from .helper import x
    """
    toy.encoder = write_module(tmp_path, "relative", source).Other()
    assert_refused(toy, tmp_path / "new", "`encoder`", "relative.py", "line 9", "self-contained")


@pytest.mark.parametrize(("value", "refused"), [(["a", "b"], True), ([], True), ([1, 2.5], False), ("a,b", False)])
def test_list_in_the_config_is_refused(toy: ToyPipeline, tmp_path: Path, value: object, refused: bool) -> None:
    source = """
    import toy_method

    class Named(toy_method.ToyPipeline):
        def __init__(self, unet, encoder, scheduler, names=None):
            super().__init__(unet, encoder, scheduler)
            self.register_to_config(names=names)
    """
    named = write_module(tmp_path, "named", source).Named
    pipe = named(**toy.components, names=value)
    if refused:
        assert_refused(pipe, tmp_path / "new", "`names`", "register a dict")
    else:
        pipe.save_pretrained(tmp_path / "new")
        assert named.from_pretrained(tmp_path / "new").config.names == value


def test_file_in_place_of_the_folder_is_refused(toy: ToyPipeline, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert_refused(toy, tmp_path / "file", "`save_directory`", "which is a file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"license": "mit"}, "belongs in `card`"),
        ({"subfolder": "a"}, "subfolder"),
        ({"card": "text"}, "`card` is a str"),
    ],
)
def test_wrong_arguments_are_refused(toy: ToyPipeline, tmp_path: Path, arguments: dict, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        toy.save_pretrained(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("index", [b"\xff", b"[]", b'{"_class_name": [], "unet": [null, null]}'])
def test_damaged_repo_is_replaced(toy: ToyPipeline, tmp_path: Path, index: bytes) -> None:
    (tmp_path / "model_index.json").write_bytes(index)
    toy.save_pretrained(tmp_path)
    assert same(ToyPipeline.from_pretrained(tmp_path), (state(toy), run(toy)))["weights"]


@pytest.mark.parametrize("blocked", ["unet", "encoder/config.json"])
def test_blocked_save_leaves_all_as_it_was(toy: ToyPipeline, tmp_path: Path, blocked: str) -> None:
    make_toy(seed=1).save_pretrained(tmp_path)
    if blocked == "unet":  # a file where a folder has to go
        (tmp_path / "unet").rename(tmp_path / "moved")
        (tmp_path / "unet").write_text("mine")
    else:
        (tmp_path / blocked).unlink()
        (tmp_path / blocked).mkdir()
    before = contents(tmp_path)
    with pytest.raises(OSError) as error:
        toy.save_pretrained(tmp_path)
    assert blocked in str(error.value)
    assert "is as it was before" in error.value.__notes__[0]
    assert contents(tmp_path) == before


def test_load_during_a_save_mixes_nothing(toy: ToyPipeline, tmp_path: Path) -> None:
    def save(number: int) -> None:
        for model in (toy.unet, toy.encoder):
            for parameter in model.parameters():
                torch.nn.init.constant_(parameter, number)
        toy.save_pretrained(tmp_path)

    save(0)
    child = os.fork()
    if child == 0:
        for number in itertools.count(1):
            save(number)
    seen = set()
    try:
        for _ in range(12):
            loaded = ToyPipeline.from_pretrained(tmp_path)
            first, second = (next(model.parameters()).flatten()[0].item() for model in (loaded.unet, loaded.encoder))
            assert first == second, "parts of two saves"
            seen.add(first)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert len(seen) > 1, "the folder did not change meanwhile"


def test_failed_save_to_a_new_folder_leaves_none(toy: ToyPipeline, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        toy.save_pretrained(tmp_path / "new", max_shard_size=object())
    assert not (tmp_path / "new").exists()


# --- from_pipe


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_from_pipe_shares_components_and_keeps_their_dtype(dtype: torch.dtype) -> None:
    stock = DDPMPipeline(make_unet(), DDPMScheduler()).to(dtype)
    before = {name: value.clone() for name, value in stock.unet.state_dict().items()}
    pipe = ToySamplerPipeline.from_pipe(stock)
    assert pipe.unet is stock.unet
    assert pipe.scheduler is stock.scheduler
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    assert pipe.dtype == dtype


def test_from_pipe_keeps_mixed_dtypes(toy: ToyPipeline) -> None:
    toy.unet.to(torch.float16)
    toy.encoder.to(torch.bfloat16)
    before = {name: value.clone() for name, value in state(toy).items()}
    after = state(ToyPipeline.from_pipe(toy))
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before)


def test_from_pipe_keeps_mixed_dtypes_within_a_component(toy: ToyPipeline) -> None:
    toy.unet.to(torch.float16)
    toy.unet.conv_out.to(torch.float64)
    toy.unet.conv_in.register_buffer("scale", torch.tensor(1 / 3, dtype=torch.float64))
    before = {name: value.clone() for name, value in state(toy).items()}
    after = state(ToyPipeline.from_pipe(toy))
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before)


def test_from_pipe_with_dtype_and_component(toy: ToyPipeline) -> None:
    scheduler = toy_method.ToyScheduler(factor=1.0)
    pipe = ToyPipeline.from_pipe(toy, scheduler=scheduler, **{DTYPE: torch.bfloat16})
    assert pipe.scheduler is scheduler
    assert pipe.dtype == torch.bfloat16


# --- Model cards


def full_card(tmp_path: Path) -> dict:
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "strip.png")
    metrics = [
        {"dataset_name": "digits", "metric_type": "mse", "metric_value": np.float64(0.0125), "metric_name": "MSE"},
        EvalResult("image-to-image", "mnist", "MNIST", "ssim", torch.tensor(0.5)),
    ]
    return {
        "license": "apache-2.0",
        "datasets": ["digits", "mnist"],
        "base_model": "google/ddpm-cifar10-32",
        "tags": ["mine"],
        "metrics": metrics,
        "training": {"learning rate": 1e-4},
        "samples": tmp_path / "strip.png",
        "citation": "@article{toy}",
    }


def test_card_from_the_methods_template(toy: ToyPipeline, tmp_path: Path) -> None:
    toy.save_pretrained(tmp_path / "repo", card=full_card(tmp_path), repo_id="alice/toy")
    card = ModelCard.load(tmp_path / "repo" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image",
        "license": "apache-2.0",
        "base_model": "google/ddpm-cifar10-32",
        "datasets": ["digits", "mnist"],
        "tags": ["toy", "mine"],
        "model-index": [
            {
                "name": "toy",
                "results": [
                    {
                        "task": {"type": "image-to-image"},
                        "dataset": {"type": "digits", "name": "digits"},
                        "metrics": [{"type": "mse", "value": 0.0125, "name": "MSE"}],
                    },
                    {
                        "task": {"type": "image-to-image"},
                        "dataset": {"type": "mnist", "name": "MNIST"},
                        "metrics": [{"type": "ssim", "value": 0.5, "name": "ssim"}],
                    },
                ],
            }
        ],
    }
    for text in (
        "# alice/toy: a toy\n\nNoise, moved by an image's code.\n",
        "Base model: google/ddpm-cifar10-32.",
        "License apache-2.0, data digits, mnist.",
        'DiffusionPipeline.from_pretrained("alice/toy", trust_remote_code=True)',
        "- MSE on digits: 0.0125\n- ssim on MNIST: 0.5\n- learning rate: 0.0001\n",
        "![samples](strip.png)",
        "@article{toy}",
        f"ToyPipeline with diffusers-ext {diffusers_ext.__version__} diffusers ",
    ):
        assert text in card.text
    assert (tmp_path / "repo" / "strip.png").read_bytes() == (tmp_path / "strip.png").read_bytes()


@pytest.mark.parametrize("method", ["toy", "sampler", "pdae"])
@pytest.mark.parametrize("known", ["nothing", "everything"])
def test_card_has_no_placeholders(method: str, known: str, tmp_path: Path) -> None:
    # The sampler has no template of its own.
    sampler = ToySamplerPipeline(make_unet(), DDPMScheduler())
    pipe = {"toy": make_toy, "sampler": lambda: sampler, "pdae": make_pdae}[method]()
    pipe.save_pretrained(tmp_path / "repo", card=full_card(tmp_path) if known == "everything" else {})
    card = ModelCard.load(tmp_path / "repo" / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.tags
    text = str(card)
    for word in ("None", "{{", "}}", "{%", "TODO", "More Information Needed", "nan", "[]", "\n\n\n\n"):
        assert word not in text, word
    assert 'DiffusionPipeline.from_pretrained("repo", trust_remote_code=True)' in text
    if known == "everything":
        for value in ("0.0125", "google/ddpm-cifar10-32", "strip.png", "@article{toy}"):
            assert value in text, value


def test_snippet_of_the_card_runs(toy: ToyPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.save_pretrained(tmp_path / "repo")
    text = (tmp_path / "repo" / "README.md").read_text()
    snippet = text.split("```py\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(snippet, scope)
    torch.testing.assert_close(run(scope["pipe"]), run(toy))


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ({"licence": "mit"}, ("'licence'", "`metrics`", "'license'")),
        ({"eval_results": []}, ("'eval_results'",)),
        ({"metrics": [{"metric_type": "mse", "metric_value": 1.0}]}, ("`metrics`", "dataset_name")),
        ({"metrics": [{**CARD["metrics"][0], "value": 1}]}, ("`metrics`", "'value'")),
        ({"metrics": [{**CARD["metrics"][0], "metric_value": float("nan")}]}, ("mse = nan", "leave out")),
        ({"metrics": [{**CARD["metrics"][0], "metric_value": None}]}, ("mse = None",)),
        ({"metrics": [0.5]}, ("`metrics`", "0.5")),
        ({"samples": "nowhere.png"}, ("`samples`", "nowhere.png")),
        ({"license": "my own"}, ("`license`", "'my own'", "'other'", "`license_name`")),
        ({"license": ["mit", "Apache 2.0"]}, ("`license`", "'Apache 2.0'")),
    ],
)
def test_bad_card_is_refused_before_anything_is_written(
    toy: ToyPipeline, tmp_path: Path, card: dict, words: tuple[str, ...]
) -> None:
    assert_refused(toy, tmp_path / "new", *words, card=card)


HAND_WRITTEN = {
    "plain": "# My model\n\nIt is mine: {{ braces }} and %.\n",
    "metadata": "---\n# a comment\nlicense: cc0-1.0\ntags: [a]   # mine\nmine: 1\n---\n# My model\n",
    "empty block": "---\n---\n# My model\n",
    "windows": "---\r\nlicense: cc0-1.0\r\n---\r\n# My model\r\n",
    "rules": "# My model\n\n---\nnot: metadata\n---\n",
}


@pytest.mark.parametrize("case", HAND_WRITTEN)
def test_hand_written_card_is_kept_and_completed(toy: ToyPipeline, tmp_path: Path, case: str) -> None:
    text = HAND_WRITTEN[case]
    (tmp_path / "README.md").write_bytes(text.encode())
    toy.save_pretrained(tmp_path, card={**CARD, "license": "mit"})
    saved = (tmp_path / "README.md").read_bytes().decode()
    head, mark, body = text.rpartition("---\r\n" if case == "windows" else "---\n")
    if case in ("plain", "rules"):
        assert saved.endswith(f"\n---\n\n{text}")
    else:
        assert saved.startswith(head)
        assert saved.endswith(mark + body)
    data = ModelCard(saved).data
    assert data.library_name == "diffusers"
    assert data.license == ("cc0-1.0" if "cc0" in text else "mit")
    assert data.eval_results[0].metric_value == 0.25
    assert ("\r\n" in text) == ("\r\n" in saved)
    assert saved.count("\n") == saved.count("\r\n") or "\r" not in saved
    assert "Written by diffusers-ext" not in saved
    # Complete now: to the byte the same from here on.
    toy.save_pretrained(tmp_path, card={"license": "gpl"})
    assert (tmp_path / "README.md").read_bytes().decode() == saved


def test_unreadable_card_is_refused(toy: ToyPipeline, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\na: [1\n---\n# My model\n")
    assert_refused(toy, tmp_path, "`README.md`", "correct it")


def test_generated_card_is_written_again_until_its_mark_is_deleted(toy: ToyPipeline, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    toy.save_pretrained(tmp_path, card=CARD)
    first = readme.read_text()
    toy.save_pretrained(tmp_path)  # says nothing about the card
    assert readme.read_text() == first
    toy.save_pretrained(tmp_path, card={"license": "apache-2.0"})
    assert ModelCard.load(readme).data.license == "apache-2.0"
    assert ModelCard.load(readme).data.eval_results is None
    mine = readme.read_text().replace(hub._MARK, "")
    readme.write_text(mine)
    toy.save_pretrained(tmp_path, card={"license": "mit"})
    assert readme.read_text() == mine


def test_one_data_set_and_one_tag_may_be_a_word(toy: ToyPipeline, tmp_path: Path) -> None:
    own = {"license": "other", "license_name": "my own"}
    toy.save_pretrained(tmp_path, card={"datasets": "digits", "tags": "mine", **own})
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.datasets, data.tags) == (["digits"], ["toy", "mine"])
    assert (data.license, data.license_name) == ("other", "my own")
    toy.save_pretrained(tmp_path, card={"license": ["mit", "gpl-3.0"]})
    assert ModelCard.load(tmp_path / "README.md").data.license == ["mit", "gpl-3.0"]


def test_save_model_card_alone(toy: ToyPipeline, tmp_path: Path) -> None:
    toy.save_pretrained(tmp_path)
    before = contents(tmp_path)
    ToyPipeline.save_model_card(tmp_path, "alice/toy", {"license": "mit"}, base_model="alice/toy")
    after = contents(tmp_path)
    assert after.pop("README.md") != before.pop("README.md")
    assert after == before
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None  # a repo is not its own base


# --- dispatch


@pytest.fixture
def pdae_folder(tmp_path: Path) -> Path:
    make_pdae().save_pretrained(tmp_path / "pdae")
    return tmp_path / "pdae"


def test_dispatch_finds_our_class_in_a_folder(pdae_folder: Path) -> None:
    expected = make_pdae()
    pipe = DiffusionPipeline.from_pretrained(pdae_folder)
    assert type(pipe) is PDAEPipeline
    assert same(pipe, (state(expected), run(expected))) == {"weights": True, "output": True}
    scheduler = expected.scheduler
    pipe = DiffusionPipeline.from_pretrained(str(pdae_folder), scheduler=scheduler, **{DTYPE: torch.bfloat16})
    assert pipe.scheduler is scheduler
    assert pipe.dtype == torch.bfloat16


def test_dispatch_leaves_the_rest_to_diffusers(toy: ToyPipeline, tiny_ddpm_folder: Path, pdae_folder: Path) -> None:
    assert type(DiffusionPipeline.from_pretrained(tiny_ddpm_folder)) is DDPMPipeline
    assert type(DDPMPipeline.from_pretrained(tiny_ddpm_folder)) is DDPMPipeline
    remote = DiffusionPipeline.from_pretrained(pdae_folder, trust_remote_code=True)
    assert type(remote).__module__.startswith("diffusers_modules.")
    custom = str(Path(__file__).with_name("toy_sampler.py"))
    pipe = DiffusionPipeline.from_pretrained(tiny_ddpm_folder, custom_pipeline=custom, trust_remote_code=True)
    assert type(pipe).__name__ == "ToySamplerPipeline"
    toy.save_pretrained(pdae_folder.parent / "toy")
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(pdae_folder.parent / "toy")  # not one of the package's


@pytest.mark.parametrize("index", [None, "{", "[]", '{"_class_name": 3}', '{"_class_name": []}', '{"x": 1}'])
def test_dispatch_leaves_errors_to_diffusers(tmp_path: Path, index: str | None) -> None:
    if index is not None:
        (tmp_path / "model_index.json").write_text(index)
    stock = inspect.unwrap(DiffusionPipeline.from_pretrained.__func__)
    with pytest.raises(Exception) as expected:
        stock(DiffusionPipeline, tmp_path)
    with pytest.raises(type(expected.value)) as error:
        DiffusionPipeline.from_pretrained(tmp_path)
    assert str(error.value) == str(expected.value)


def test_dispatch_is_idempotent_and_documented() -> None:
    before = DiffusionPipeline.__dict__["from_pretrained"]
    dispatch()
    assert DiffusionPipeline.__dict__["from_pretrained"] is before
    assert "pretrained_model_name_or_path" in inspect.signature(DiffusionPipeline.from_pretrained).parameters
    assert "Instantiate a PyTorch diffusion pipeline" in DiffusionPipeline.from_pretrained.__doc__


def test_dispatch_puts_an_interrupted_save_right(pdae_folder: Path) -> None:
    # As a process leaves it that is killed while the new files move to their places.
    ready = pdae_folder / ".unfinished_save" / "ready"
    ready.mkdir(parents=True)
    (pdae_folder / "model_index.json").rename(ready / "model_index.json")
    assert type(DiffusionPipeline.from_pretrained(pdae_folder)) is PDAEPipeline
    assert not ready.parent.exists()


def test_mixin_is_no_pipeline() -> None:
    # or else diffusers would find two pipeline classes in a method's file
    assert not issubclass(HubMixin, DiffusionPipeline)


def test_unet_is_stock(toy: ToyPipeline) -> None:
    assert type(toy.unet) is UNet2DModel
