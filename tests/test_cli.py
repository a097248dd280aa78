"""The `diffusers-ext` command: its exit statuses, its errors in one line, `card`."""

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_ext import cli, exit_status
from diffusers_ext.cli import _COMMANDS, _CONVERTERS, main


def test_help_and_version_need_no_torch() -> None:
    # The installed command is this import and this call, in a file of this name.
    code = "import sys; sys.argv = ['diffusers-ext', '--help']; from diffusers_ext.cli import main; main()"
    environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert all(command in done.stdout for command in _COMMANDS)
    assert "argparse" in done.stderr
    assert not any(line.split("|")[-1].strip() in ("torch", "diffusers") for line in done.stderr.splitlines())


@pytest.mark.parametrize("command", [*([name] for name in _COMMANDS), *(["convert", name] for name in _CONVERTERS)])
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as done:
        main([*command, "--help"])
    assert done.value.code == 0
    help_text = capsys.readouterr().out
    assert f"usage: diffusers-ext {' '.join(command)}" in help_text
    assert "--debug" in help_text or command == ["convert"]


@pytest.mark.parametrize("words", [[], ["convert"], ["no-such-command"], ["card"], ["card", "x", "--no-such-option"]])
def test_wrong_words_exit_2_with_the_usage(words: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as done:
        main(words)
    assert done.value.code == 2
    assert "usage: diffusers-ext" in capsys.readouterr().err


def test_wrong_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["card", str(tmp_path / "nowhere")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert "nowhere" in captured.err and "save_pretrained" in captured.err


def test_examples() -> None:
    for module in (cli, exit_status):
        result = doctest.testmod(module)
        assert result.attempted == 2 and result.failed == 0


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no `model_index.json`"):
        main(["card", str(tmp_path), "--debug"])


def test_card_of_a_saved_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "digits"
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": ["pdae_0123abcd", "PDAEPipeline"]}))
    metric = {"dataset_name": "digits", "metric_type": "mse", "metric_value": 0.0125}
    wishes = tmp_path / "card.json"
    wishes.write_text(json.dumps({"license": "mit", "metrics": [metric]}))

    assert main(["card", str(folder), "--card", str(wishes), "--repo_id", "somebody/digits"]) == 0
    assert capsys.readouterr().out == f"wrote {folder / 'README.md'}\n"
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "diffusers"
    assert [(result.metric_type, result.metric_value) for result in card.data.eval_results] == [("mse", 0.0125)]
    assert "somebody/digits" in card.text

    (folder / "README.md").write_text("# My own words\n")
    assert main(["card", str(folder)]) == 0
    card = ModelCard.load(folder / "README.md")
    assert card.text.strip() == "# My own words" and card.data.library_name == "diffusers"


@pytest.mark.parametrize("samples", ["reconstructions.png", "report/reconstructions.png"])
def test_samples_of_a_card_are_found_from_its_file(
    samples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the folder of the JSON file, wherever the command runs and whatever lies there; else where it runs."""
    (tmp_path / "report").mkdir()
    Image.new("L", (4, 4), 7).save(tmp_path / "report" / "reconstructions.png")
    (tmp_path / "report" / "card.json").write_text(json.dumps({"samples": samples}))
    Image.new("L", (4, 4), 200).save(tmp_path / "reconstructions.png")  # another one
    folder = tmp_path / "pdae"
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "PDAEPipeline"}))
    monkeypatch.chdir(tmp_path)
    assert main(["card", "pdae", "--card", "report/card.json", "--repo-id", "somebody/digits"]) == 0
    assert "![samples](reconstructions.png)" in (folder / "README.md").read_text()
    assert Image.open(folder / "reconstructions.png").getpixel((0, 0)) == 7


def test_card_refuses_what_is_not_ours(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    assert main(["card", str(tmp_path)]) == 2
    assert "DDPMPipeline, which is no pipeline of diffusers-ext" in capsys.readouterr().err
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "PDAEPipeline"}))
    (tmp_path / "card.json").write_text("[1, 2]")
    assert main(["card", str(tmp_path), "--card", str(tmp_path / "card.json")]) == 2
    assert "holds a list, but must hold a JSON object" in capsys.readouterr().err
    (tmp_path / "card.json").write_text('{"licence": "mit"}')
    assert main(["card", str(tmp_path), "--card", str(tmp_path / "card.json")]) == 2
    assert "licence" in capsys.readouterr().err
    assert not (tmp_path / "README.md").exists()
