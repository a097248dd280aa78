"""The demos, as a user runs them: twice, with a claim about what they show."""

import json
import subprocess
import sys
import time

import pytest
from PIL import Image


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_fast_demo_and_its_second_run(tmp_path):
    command = [sys.executable, "-m", "diffusers_ext.cli", "demo", "--fast"]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-4000:]
    assert "PDAEPipeline gives the same images" in first.stdout

    folder = tmp_path / "demo-fast"
    metrics = json.loads((folder / "metrics.json").read_text())
    mse = {name: row["mse"] for name, row in metrics["reconstruction"].items()}
    # A fifth of the demo's steps shows all of it, if less of each: the code helps, only the right one does, and the
    # inferred noise gives the rest.
    assert mse["pdae_random"] < 0.6 * mse["base_random"]
    assert mse["pdae_random"] < mse["mean_image"]
    assert mse["pdae_random_wrong_code"] > 0.8 * mse["base_random"]
    assert mse["pdae_inferred"] < 0.1 * mse["pdae_random"]
    assert metrics["probe"]["code"]["accuracy"] > 0.85
    for picture in folder.glob("*.png"):
        with Image.open(picture) as image:
            assert min(image.size) >= 64
    assert {picture.name for picture in folder.glob("*.png")} >= {"reconstructions.png", "interpolation.png"}

    weights = folder / "pdae" / "encoder" / "diffusion_pytorch_model.safetensors"
    written, started = weights.stat().st_mtime_ns, time.monotonic()
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr[-4000:]
    assert "Using PDAE in" in second.stdout and "Training" not in second.stdout
    assert weights.stat().st_mtime_ns == written
    assert json.loads((folder / "metrics.json").read_text())["reconstruction"] == metrics["reconstruction"]
    print(f"second run: {time.monotonic() - started:.0f} s")

    # Another seed would hold out images that these models were trained on.
    third = subprocess.run([*command, "--seed", "1"], cwd=tmp_path, capture_output=True, text=True)
    assert third.returncode == 2 and "was trained with {'seed': 0}" in third.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_fast_demo_of_unclip_and_its_second_run(tmp_path):
    command = [sys.executable, "-m", "diffusers_ext.cli", "demo-unclip", "--fast"]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-4000:]
    assert "UnCLIPTextToImagePipeline paints the same image" in first.stdout

    folder = tmp_path / "demo-unclip-fast"
    metrics = {
        part: json.loads((folder / part / "training_metrics.json").read_text())["metrics"]
        for part in ("clip", "prior", "decoder")
    }
    # An eighth of the demo's steps: CLIP knows colors, the prior is better than the text in an image's place, and the
    # decoder has begun.
    assert metrics["clip"]["validation_color_accuracy"] > 0.9
    assert metrics["prior"]["validation_frechet"] < 0.7 * metrics["prior"]["validation_frechet_text"]
    assert metrics["decoder"]["validation_loss"] < 0.5
    for name in ("unclip.png", "unclip_edits.png"):
        with Image.open(folder / name) as image:
            assert image.width > 8 * 64

    weights = [folder / part / "diffusion_pytorch_model.safetensors" for part in ("prior/prior", "decoder/decoder")]
    written = [file.stat().st_mtime_ns for file in weights]
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr[-4000:]
    assert all(f"Using the {part} in" in second.stdout for part in ("CLIP", "prior", "decoder"))
    assert "Training" not in second.stdout
    assert written == [file.stat().st_mtime_ns for file in weights]

    third = subprocess.run([*command, "--seed", "1"], cwd=tmp_path, capture_output=True, text=True)
    assert third.returncode == 2 and "was trained with {'seed': 0}" in third.stderr
    (folder / "clip" / "config.json").unlink()
    fourth = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert fourth.returncode == 2 and "was trained on a CLIP that" in fourth.stderr
