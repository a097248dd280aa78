"""README, CONTRIBUTING and cards: their examples run, their commands parse, their links lead somewhere."""

import ast
import re
import shlex
import shutil
from pathlib import Path

import pytest
from diffusers import DDPMScheduler
from PIL import Image
from transformers import HfArgumentParser

from diffusers_ext import NoisyClassifier, PDAEEncoder, PDAEGradientEstimator, PDAEPipeline
from diffusers_ext.training.precompute_clip_embeddings import PrecomputeArguments
from diffusers_ext.training.train_noisy_classifier import NoisyClassifierArguments
from diffusers_ext.training.train_pdae import PDAEArguments
from diffusers_ext.training.train_toy_clip import ToyCLIPArguments
from diffusers_ext.training.train_unclip_decoder import UnCLIPDecoderArguments
from diffusers_ext.training.train_unclip_prior import UnCLIPPriorArguments
from diffusers_ext.training.train_unconditional import UnconditionalArguments

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
ARGUMENTS = {
    "precompute_clip_embeddings": PrecomputeArguments,
    "train_noisy_classifier": NoisyClassifierArguments,
    "train_pdae": PDAEArguments,
    "train_toy_clip": ToyCLIPArguments,
    "train_unclip_decoder": UnCLIPDecoderArguments,
    "train_unclip_prior": UnCLIPPriorArguments,
    "train_unconditional": UnconditionalArguments,
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def demo(tiny_ddpm, tmp_path, monkeypatch):
    """What the demo leaves behind, with untrained networks, in the working directory."""
    folder = tmp_path / "demo"
    tiny_ddpm.save_pretrained(folder / "base")
    encoder = PDAEEncoder(8, 1, latent_dim=32, block_out_channels=(8, 8), attention_block=None, norm_num_groups=4)
    estimator = PDAEGradientEstimator.from_unet(tiny_ddpm.unet, latent_dim=32)
    PDAEPipeline(tiny_ddpm.unet, encoder, estimator, DDPMScheduler()).save_pretrained(folder / "pdae")
    NoisyClassifier(
        8, in_channels=1, num_classes=10, layers_per_block=1, block_out_channels=(8, 16), attention_head_dim=8,
        norm_num_groups=4,
    ).save_pretrained(folder / "classifier")  # fmt: skip
    (folder / "images").mkdir()
    for i in range(2):
        Image.new("L", (8, 8), 60 * i).save(folder / "images" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize("example", blocks(README, "py"), ids=range(len(blocks(README, "py"))))
def test_readme_examples_run(example, demo, tiny_unclip_folder, capsys):
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    for comment, name in re.findall(r"^(\w+) = .*# shape (\(.*?\))", example, flags=re.MULTILINE):
        assert tuple(names[comment].shape) == ast.literal_eval(name)
    for printed in re.findall(r"^print\(.*# (.*)$", example, flags=re.MULTILINE):
        assert printed in capsys.readouterr().out


def test_readme_examples_give_what_they_say(demo):
    names = {}
    exec(blocks(README, "py")[0], names)
    assert len(names["path"]) == 8
    assert names["rough"].size == names["exact"].size == (8, 8)


def test_card_example_runs(demo):
    card = (demo / "pdae" / "README.md").read_text(encoding="utf-8")
    image, other_image = (Image.open(demo / "images" / f"{i}.png") for i in range(2))
    installed, remote, use = blocks(card, "py")
    for load in (installed, remote):
        names = {"image": image, "other_image": other_image}
        exec(load.replace('"pdae"', repr(str(demo / "pdae"))), names)
        exec(use, names)
        assert names["code"].shape == (1, 32) and len(names["path"]) == 8


def test_readme_and_docstring_commands_parse(tmp_path, monkeypatch):
    commands = blocks(README, "bash")
    for name in ARGUMENTS:
        source = (ROOT / "training" / f"{name}.py").read_text(encoding="utf-8")
        commands += blocks(ast.get_docstring(ast.parse(source), clean=True), "bash")
    parsed = 0
    for line in "".join(commands).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words or "..." in words:
            continue
        script = next(
            (i for i, word in enumerate(words) if re.search(r"training[./](train|precompute)_\w+(\.py)?$", word)), None
        )
        if script is None:
            assert words[0] in ("make", "pip", "diffusers-ext"), line
            continue
        name = Path(words[script].replace(".py", "").replace(".", "/")).name
        HfArgumentParser(ARGUMENTS[name]).parse_args_into_dataclasses(words[script + 1 :])
        parsed += 1
    assert parsed >= 12


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        for target in set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", text, flags=re.MULTILINE)):
            name = "".join(target)
            assert re.search(rf"^{name}:", makefile, flags=re.MULTILINE), f"`make {name}` is no target"


def test_links_lead_somewhere():
    for folder, text in ((ROOT, README), (ROOT / "docs", RESULTS)):
        targets = re.findall(r"\]\((?!https?://|#)([^)#]+)\)", text)
        assert targets
        for target in targets:
            assert (folder / target).is_file(), target


def test_readme_is_short_and_finished():
    assert len(README.splitlines()) <= 250
    assert not re.search(r"TODO|@[A-Z]+@|XXX", README)


def test_pictures_are_pictures():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    pictures += [f"docs/{name}" for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", RESULTS)]
    assert len(pictures) >= 4
    for picture in pictures:
        with Image.open(ROOT / picture) as image:
            assert min(image.size) >= 64 and image.convert("L").getextrema()[0] < image.convert("L").getextrema()[1]
    assert shutil.which("git") is None or max((ROOT / p).stat().st_size for p in pictures) < 500_000
