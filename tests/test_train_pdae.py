"""training/train_pdae.py: the loss, what is trained and what stays frozen, exact resume, the published folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from hub_server import HubServer
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from diffusers_ext import PDAEPipeline, PDAEScheduler
from diffusers_ext.training import train_pdae
from diffusers_ext.training.train_pdae import PDAEArguments, main, make_encoder


@pytest.fixture
def arguments(tiny_ddpm_folder, tmp_path):
    def make(output_dir="pdae", **changes):
        defaults = {
            "pretrained_model_name_or_path": str(tiny_ddpm_folder), "dataset_name": "digits", "max_train_samples": 40,
            "random_flip": False, "latent_dim": 4, "encoder_block_out_channels": "8,16", "train_batch_size": 8,
            "max_train_steps": 4, "learning_rate": 1e-2, "checkpointing_steps": 0, "validation_steps": 0,
            "num_validation_images": 4, "report_to": "none", "output_dir": str(tmp_path / output_dir),
        }  # fmt: skip
        return PDAEArguments(**(defaults | changes))

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    names = ("encoder", "gradient_estimator")
    return {
        f"{name}.{key}": value
        for name in names
        for key, value in load_file(folder / name / "diffusion_pytorch_model.safetensors").items()
    }


def record(monkeypatch) -> list[dict[str, float]]:
    """Everything that a run logs, a row per optimizer step."""
    rows = []
    log = train_pdae.TrainingRun.log

    def spy(self, values):
        if "train_loss" in values:
            rows.append({})
        rows[-1].update(values)
        log(self, values)

    monkeypatch.setattr(train_pdae.TrainingRun, "log", spy)
    return rows


def test_a_run_learns_and_publishes(arguments, tiny_ddpm_folder, monkeypatch, tmp_path):
    rows = record(monkeypatch)
    passes = []
    forward = UNet2DModel.forward
    monkeypatch.setattr(UNet2DModel, "forward", lambda *args, **kwargs: passes.append(1) or forward(*args, **kwargs))
    main(arguments(max_train_steps=40, validation_steps=20, checkpointing_steps=20))
    assert not passes, "the U-Net was run as a whole: its halves are shared with the estimator"

    # G is zero at first, so that training starts exactly at the pretrained model
    assert rows[0]["loss_ratio"] == pytest.approx(1, abs=1e-6)
    assert sum(row["loss_ratio"] for row in rows[-10:]) / 10 < 0.97
    assert {"lr", "train_loss_t0-249", "train_loss_t750-999"} <= set().union(*rows)
    assert {"validation_mse", "validation_base_mse", "validation_gap_ratio_t500"} <= rows[19].keys()

    folder = tmp_path / "pdae"
    pipe = PDAEPipeline.from_pretrained(folder)
    base = load_file(tiny_ddpm_folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, base[key]) for key, value in pipe.unet.state_dict().items()), "the base was changed"
    assert (folder / "samples" / "reconstructions-000020.png").is_file()
    for component in ("encoder", "gradient_estimator", "encoder_ema", "gradient_estimator_ema"):
        assert (folder / "checkpoint-20" / component / "config.json").is_file()
    # what is published is the average, not the last weights
    last = load_file(folder / "checkpoint-40" / "encoder" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(value, last[key]) for key, value in pipe.encoder.state_dict().items())

    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "image-to-image" and "pdae" in card.data.tags
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results["MSE from random noise, 4 held-out images in [0, 1]"] == pytest.approx(
        rows[-1]["validation_mse"], abs=1e-5
    )
    assert "| size of the code | 4 |" in card.text and "gamma 0.1" in card.text
    assert not re.search(r"TODO|None|\{\{|\{%", card.text)
    assert json.loads((folder / "training_metrics.json").read_text())["steps"] == 40


def test_resume_is_bit_exact(arguments, tmp_path, monkeypatch):
    rows = record(monkeypatch)
    options = {"gradient_accumulation_steps": 2, "train_batch_size": 3, "validation_steps": 2}
    main(arguments("whole", checkpointing_steps=3, max_train_steps=5, **options))
    whole, rows[:] = list(rows), []
    main(arguments("parts", checkpointing_steps=3, max_train_steps=3, **options))
    main(arguments("parts", checkpointing_steps=3, max_train_steps=5, resume_from_checkpoint="latest", **options))
    assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in whole]
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_loss_is_the_papers(arguments, tiny_ddpm_folder, monkeypatch):
    """The first step's loss, from the formula: the estimator is zero, so that it needs no trained network."""
    seen = []
    original = PDAEScheduler.add_noise
    monkeypatch.setattr(PDAEScheduler, "add_noise", lambda self, *args: seen.append(args) or original(self, *args))
    rows = record(monkeypatch)
    for weighting, gamma in (("pdae", 0.1), ("pdae", 0.5), ("none", 0.1)):
        seen.clear()
        rows.clear()
        main(arguments(f"{weighting}{gamma}", weighting=weighting, gamma=gamma, max_train_steps=1))
        [(images, noise, timesteps)] = seen
        unet = UNet2DModel.from_pretrained(tiny_ddpm_folder, subfolder="unet")
        abar = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).cumprod(0)[timesteps]
        signal, sigma = (value.sqrt().float().reshape(-1, 1, 1, 1) for value in (abar, 1 - abar))
        with torch.no_grad():
            error = (noise - unet(signal * images + sigma * noise, timesteps).sample).square().mean((1, 2, 3))
        snr = abar / (1 - abar)
        weight = snr**gamma / (1 + snr) if weighting == "pdae" else torch.ones_like(snr)
        assert rows[0]["train_loss"] == pytest.approx((weight * error).mean().item(), rel=1e-5)


def test_class_conditional_and_learned_variance(arguments, tmp_path):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=2, layers_per_block=1, block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), norm_num_groups=4,
        num_class_embeds=10,
    )  # fmt: skip
    scheduler = DDPMScheduler(variance_type="learned_range", prediction_type="v_prediction")
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "base")
    main(arguments(pretrained_model_name_or_path=str(tmp_path / "base"), validation_steps=2))
    pipe = PDAEPipeline.from_pretrained(tmp_path / "pdae")
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.encode(torch.rand(1, 1, 8, 8)).shape == (1, 4)


def test_bfloat16(arguments, tiny_ddpm_folder, tmp_path):
    main(arguments(mixed_precision="bf16", validation_steps=4))
    pipe = PDAEPipeline.from_pretrained(tmp_path / "pdae")
    assert pipe.unet.dtype == pipe.encoder.dtype == torch.float32
    base = load_file(tiny_ddpm_folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, base[key]) for key, value in pipe.unet.state_dict().items()), "the base was rounded"
    assert all(value.isfinite().all() for value in weights(tmp_path / "pdae").values())


@pytest.fixture
def conditional_folder(tmp_path):
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), num_class_embeds=5,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "conditional")
    return str(tmp_path / "conditional")


def test_what_does_not_fit_is_refused_before_training(arguments, conditional_folder, tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        Image.new("L", (8, 8), 40 * i).save(tmp_path / "pictures" / f"{i}.png")
    pictures = {"dataset_name": None, "train_data_dir": str(tmp_path / "pictures"), "resolution": 8}
    for changes, message in (
        ({"image_mode": "RGB"}, "`image_mode` 'RGB' gives 3 channels, but the U-Net .* has 1"),
        ({"pretrained_model_name_or_path": conditional_folder}, "class-conditional .5 classes.*from 0 to 9"),
        ({"pretrained_model_name_or_path": conditional_folder, **pictures}, "class-conditional.*missing"),
    ):
        with pytest.raises(ValueError, match=message):
            main(arguments(**changes))
    for widths in ("2,2", "0,16", "8,x"):
        with pytest.raises(ValueError, match="`encoder_block_out_channels` is .*at least 4"):
            arguments(encoder_block_out_channels=widths)


def test_a_run_is_not_resumed_on_another_model_or_other_images(arguments, tiny_ddpm, tmp_path):
    for folder, shade in (("pictures", 40), ("others", 41)):
        (tmp_path / folder).mkdir()
        for i in range(8):
            Image.effect_noise((8, 8), shade).save(tmp_path / folder / f"{i if folder == 'pictures' else 100 + i}.png")
    data = {"dataset_name": None, "train_data_dir": str(tmp_path / "pictures"), "resolution": 8, "image_mode": "L"}
    settings = {
        **data,
        "validation_fraction": 0,
        "checkpointing_steps": 2,
        "max_train_steps": 2,
        "train_batch_size": 4,
    }
    main(arguments(**settings))
    again = {**settings, "resume_from_checkpoint": "latest", "max_train_steps": 3}
    with pytest.raises(ValueError, match="names and sizes of the image files"):
        main(arguments(**again | {"train_data_dir": str(tmp_path / "others")}))
    torch.nn.init.normal_(tiny_ddpm.unet.conv_in.weight)
    tiny_ddpm.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="weights of the frozen model"):
        main(arguments(**again | {"pretrained_model_name_or_path": str(tmp_path / "other")}))
    with pytest.raises(ValueError, match="`max_train_steps` is 1, but .* is at step 2"):
        main(arguments(**again | {"max_train_steps": 1}))
    (tmp_path / "pictures").rename(tmp_path / "moved")
    main(arguments(**again | {"train_data_dir": str(tmp_path / "moved")}))


def test_nothing_has_to_be_held_out(arguments, tmp_path):
    main(arguments(validation_fraction=0, max_train_steps=1))
    assert (tmp_path / "pdae" / "model_index.json").is_file()


def test_a_short_noise_schedule(arguments, tiny_ddpm, tmp_path):
    DDPMPipeline(tiny_ddpm.unet, DDPMScheduler(num_train_timesteps=20)).save_pretrained(tmp_path / "short")
    main(arguments(pretrained_model_name_or_path=str(tmp_path / "short"), validation_steps=1, max_train_steps=1))
    card = ModelCard.load(tmp_path / "pdae" / "README.md")
    assert "![samples](reconstructions-000001.png)" in card.text and card.data.base_model is None


def test_gradient_checkpointing_changes_nothing(arguments, tmp_path):
    main(arguments())
    main(arguments("checkpointed", gradient_checkpointing=True))
    for name, value in weights(tmp_path / "pdae").items():
        torch.testing.assert_close(weights(tmp_path / "checkpointed")[name], value)


def test_killed_while_it_validates(arguments, monkeypatch, tmp_path):
    """The checkpoint of a step is written after its validation: resumed, the run has all of its numbers."""
    settings = {"checkpointing_steps": 2, "validation_steps": 4}
    main(arguments("whole", **settings))
    with monkeypatch.context() as patched:
        patched.setattr(train_pdae, "validate", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(arguments(**settings))
    main(arguments(**settings, resume_from_checkpoint="latest"))
    metrics = [json.loads((tmp_path / n / "training_metrics.json").read_text())["metrics"] for n in ("whole", "pdae")]
    assert metrics[0] == metrics[1] and {"loss_ratio", "validation_mse"} <= metrics[1].keys()
    main(arguments(**settings, resume_from_checkpoint="latest"))  # nothing is left to do
    assert json.loads((tmp_path / "pdae" / "training_metrics.json").read_text())["metrics"] == metrics[0]


@pytest.mark.parametrize("script", ["train_pdae", "train_unconditional"])
def test_push_publishes_what_the_run_wrote(script, tiny_ddpm_folder, tmp_path):
    """Other files in the output folder are nobody's business."""
    folder = tmp_path / "run"
    for name in ("private_notes.txt", "private_photos/me.jpg", "sub/.env", ".env"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("secret")
    command = f"""--pretrained_model_name_or_path {tiny_ddpm_folder} --dataset_name digits --max_train_samples 20
        --train_batch_size 4 --max_train_steps 1 --learning_rate 1e-3 --validation_steps 1 --num_validation_images 2
        --checkpointing_steps 1 --output_dir {folder} --push_to_hub --hub_model_id alice/run""".split()
    command += ["--latent_dim", "4"] if script == "train_pdae" else ["--ddpm_num_inference_steps", "2"]
    with HubServer() as hub:
        environment = os.environ | hub.env(tmp_path / "home", hub.token("alice"))
        command = [sys.executable, "-m", f"diffusers_ext.training.{script}", *command]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        files = set(hub.files("alice/run"))
    assert {"model_index.json", "README.md", "training_metrics.json", "unet/config.json"} <= files
    assert any(name.startswith("samples/") for name in files)
    assert not [
        name for name in files if "private" in name or ".env" in name or "checkpoint" in name or "logs" in name
    ]


def test_colour_photographs(arguments, tmp_path):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "base")
    main(arguments(pretrained_model_name_or_path=str(tmp_path / "base"), dataset_name="photos", max_train_steps=1))
    assert PDAEPipeline.from_pretrained(tmp_path / "pdae").encode(torch.rand(2, 3, 16, 16)).shape == (2, 4)


@pytest.mark.parametrize(
    ("resolution", "channels", "attention"),
    [
        (8, (32, 64), None),
        (32, (64, 128, 128), 0),
        (64, (64, 128, 128, 128), 1),
        (128, (64, 128, 256, 256, 256), 2),
        (256, (64, 128, 256, 256, 256, 256), 3),
    ],
)
def test_default_encoder(arguments, resolution, channels, attention):
    config = make_encoder(arguments(encoder_block_out_channels=None), resolution, 3).config
    assert (tuple(config.block_out_channels), config.attention_block) == (channels, attention)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained_model_name_or_path": None}, "`pretrained_model_name_or_path` is missing"),
        ({"latent_dim": 0}, "`latent_dim` is 0"),
        ({"gamma": 1.5}, "`gamma` is 1.5"),
        ({"encoder_block_out_channels": "8,x"}, "`encoder_block_out_channels` is '8,x'"),
    ],
)
def test_bad_arguments(arguments, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        arguments(**changes)


def test_a_resolution_that_the_base_does_not_take(arguments):
    with pytest.raises(ValueError, match="multiple of 2"):
        main(arguments(resolution=9, encoder_block_out_channels="8,16"))


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({}, []),
        ({"resolution": 8}, []),
        ({"resolution": 12}, ["`resolution` is 12, but the base model's `sample_size` is 8"]),
        ({"dataset_name": "photos"}, ["in color, with 3 channels, but the base model has 1"]),
    ],
)
def test_images_of_another_kind_than_the_bases_are_warned_of(arguments, changes, messages, caplog):
    main(arguments(max_train_steps=1, max_train_samples=8, train_batch_size=2, **changes))
    warnings = [record.getMessage() for record in caplog.records if record.name == train_pdae.__name__]
    assert len(warnings) == len(messages)
    assert all(message in warning for message, warning in zip(messages, warnings, strict=True))
