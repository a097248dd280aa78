"""training/train_unconditional.py: its recipe, its targets, what it refuses, and the ways to start it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from hub_server import HubServer
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_ext.data import load_image_dataset
from diffusers_ext.training.train_unconditional import (
    UnconditionalArguments,
    default_unet_config,
    held_out_loss,
    main,
    target,
)

ROOT = Path(__file__).parents[1]


def arguments(output_dir, **changes):
    defaults = dict(
        dataset_name="digits", train_batch_size=8, max_train_steps=2, learning_rate=1e-3, validation_steps=0,
        checkpointing_steps=0, num_validation_images=4, ddpm_num_inference_steps=2, report_to="none",
        output_dir=str(output_dir),
    )  # fmt: skip
    return UnconditionalArguments(**(defaults | changes))


@pytest.fixture
def config_folder(tiny_unet, tmp_path):
    tiny_unet.save_config(tmp_path / "config")
    return str(tmp_path / "config")


def test_a_run_learns_and_leaves_a_stock_pipeline(config_folder, tmp_path):
    args = arguments(
        tmp_path / "ddpm", model_config_name_or_path=config_folder, max_train_steps=60, train_batch_size=32,
        learning_rate=5e-3, validation_steps=59, use_ema=True, ema_decay=0.9,
    )  # fmt: skip
    before = held_out_loss(
        UNet2DModel.from_config(UNet2DModel.load_config(config_folder)),
        DDPMScheduler(),
        torch.zeros(16, 1, 8, 8),
        8,
        0,
    )
    assert 0.7 < before < 1.6  # an untrained network knows nothing of noise of variance 1
    main(args)
    pipeline = DDPMPipeline.from_pretrained(args.output_dir)
    numbers = json.loads((tmp_path / "ddpm" / "training_metrics.json").read_text())["metrics"]
    assert numbers["validation_loss"] < 0.6
    # The numbers are those of the published weights.
    held_out = load_image_dataset("digits", split="validation")
    images = torch.stack([held_out[i]["images"] for i in range(256)])
    assert held_out_loss(pipeline.unet, pipeline.scheduler, images, 64, 0) == pytest.approx(
        numbers["validation_loss"], rel=1e-5
    )
    pictures = sorted(path.name for path in (tmp_path / "ddpm" / "samples").iterdir())
    assert pictures == ["samples-000059.png", "samples-000060.png"]
    assert Image.open(tmp_path / "ddpm" / "samples" / pictures[0]).size == (128, 128)
    assert Image.open(tmp_path / "ddpm" / "samples" / pictures[0]).getextrema()[0] != (0, 0)

    card = ModelCard.load(tmp_path / "ddpm" / "README.md")
    assert card.data.library_name == "diffusers" and card.data.datasets == ["digits"]
    assert card.data.eval_results[0].metric_value == round(numbers["validation_loss"], 5)
    assert "| optimizer steps | 60 |" in card.text and "![samples](samples-000060.png)" in card.text
    assert (tmp_path / "ddpm" / "samples-000060.png").is_file()
    assert "None" not in card.content and "[]" not in card.content
    example = card.text.split("```py\n")[1].split("```")[0].replace('"ddpm"', repr(args.output_dir))
    exec(example.replace("()", "(num_inference_steps=2)"), names := {})
    assert names["image"].size == (8, 8)


def test_the_default_network_for_digits(tmp_path):
    main(arguments(tmp_path, max_train_steps=1))
    unet = DDPMPipeline.from_pretrained(tmp_path).unet
    assert tuple(unet.config.block_out_channels) == (16, 32) and unet.config.attention_head_dim == 8
    assert unet(torch.zeros(1, 1, 8, 8), 5).sample.shape == (1, 1, 8, 8)


@pytest.mark.parametrize(("resolution", "attention"), [(8, 1), (32, 1), (64, 2), (128, 3), (256, 4), (512, 5)])
def test_default_networks_attend_at_16_pixels(resolution, attention):
    config = default_unet_config(resolution)
    assert config["down_block_types"].index("AttnDownBlock2D") == attention
    assert config["up_block_types"][::-1].index("AttnUpBlock2D") == attention
    with torch.device("meta"):
        UNet2DModel(sample_size=resolution, in_channels=3, out_channels=3, **config)


def test_targets_are_those_of_their_definitions():
    images, noise = torch.randn(2, 3, 1, 4, 4)
    timesteps = torch.tensor([0, 500, 999])
    alpha = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)[timesteps].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * images + (1 - alpha).sqrt() * noise
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        scheduler = DDPMScheduler(prediction_type=prediction_type)
        torch.testing.assert_close(scheduler.add_noise(images, noise, timesteps), noisy)
        predicted = target(scheduler, images, noise, timesteps)
        expected = {
            "epsilon": noise,
            "sample": images,
            "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * images,
        }
        torch.testing.assert_close(predicted, expected[prediction_type])


def test_held_out_loss_of_known_predictions():
    """A U-Net that predicts zero has a loss of the mean square of the fixed noise, however it is batched."""
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    torch.nn.init.zeros_(unet.conv_out.weight), torch.nn.init.zeros_(unet.conv_out.bias)
    images = torch.randn(10, 1, 8, 8)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(7))
    for batch_size in (3, 10):
        loss = held_out_loss(unet, DDPMScheduler(), images, batch_size, 7)
        assert loss == pytest.approx(noise.square().mean().item(), rel=1e-6)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_prediction_types_and_schedules(prediction_type, config_folder, tmp_path):
    args = arguments(
        tmp_path / "ddpm", model_config_name_or_path=config_folder, prediction_type=prediction_type,
        ddpm_num_steps=100, ddpm_beta_schedule="squaredcos_cap_v2", validation_steps=1,
    )  # fmt: skip
    main(args)
    config = DDPMPipeline.from_pretrained(args.output_dir).scheduler.config
    assert (config.prediction_type, config.num_train_timesteps) == (prediction_type, 100)
    assert config.beta_schedule == "squaredcos_cap_v2"
    metrics = json.loads((tmp_path / "ddpm" / "training_metrics.json").read_text())["metrics"]
    bands = {name for name in metrics if name.startswith("train_loss_t")}
    assert bands <= {"train_loss_t0-24", "train_loss_t25-49", "train_loss_t50-74", "train_loss_t75-99"}
    assert math.isfinite(metrics["validation_loss"])


def test_fine_tuning_starts_from_the_pretrained_weights(tiny_ddpm_folder, tmp_path):
    main(arguments(tmp_path / "out", pretrained_model_name_or_path=str(tiny_ddpm_folder), learning_rate=1e-9))
    before = DDPMPipeline.from_pretrained(tiny_ddpm_folder).unet.state_dict()
    for name, value in DDPMPipeline.from_pretrained(tmp_path / "out").unet.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)


def test_color_images(tmp_path):
    """The bundled photographs, held-out images included."""
    main(
        arguments(
            tmp_path, dataset_name="photos", resolution=16, max_train_samples=16, max_train_steps=1,
            validation_steps=1, train_batch_size=4, random_flip=True,
        )
    )  # fmt: skip
    unet = DDPMPipeline.from_pretrained(tmp_path).unet
    assert (unet.config.sample_size, unet.config.in_channels) == (16, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained_model_name_or_path": "a", "model_config_name_or_path": "b"}, "are both given"),
        ({"ddpm_num_steps": 2}, "`ddpm_num_steps` is 2"),
        ({"ddpm_num_inference_steps": 0}, "`ddpm_num_inference_steps` is 0"),
        ({"ddpm_num_steps": 20, "ddpm_num_inference_steps": 21}, "between 1 and the 20 steps"),
        ({"resolution": 9}, "`resolution` is 9, but the U-Net halves it 1 times: choose a multiple of 2"),
        ({"pretrained_model_name_or_path": "PRETRAINED", "image_mode": "RGB"}, "images have 3 channels"),
        ({"dataset_name": None}, "exactly one"),
    ],
)
def test_bad_input(changes, message, tiny_ddpm_folder, tmp_path):
    changes = {name: str(tiny_ddpm_folder) if value == "PRETRAINED" else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        main(arguments(tmp_path, **changes))


def test_command_lines_and_hub(config_folder, tmp_path):
    """Run as a file, publish to a Hub, go on as a module under `accelerate launch`: as a user does."""
    flags = f"""--dataset_name digits --model_config_name_or_path {config_folder} --train_batch_size 8
        --learning_rate 1e-3 --checkpointing_steps 2 --validation_steps 0 --num_validation_images 2
        --ddpm_num_inference_steps 2 --use_ema --output_dir {tmp_path / "ddpm"} --push_to_hub
        --hub_model_id alice/ddpm-digits --hub_private_repo --hub_token hf_alice_write""".split()
    with HubServer() as hub:
        env = hub.env(tmp_path / "home", token=None)
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
        run = dict(env=env, check=True, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        script = [sys.executable, str(ROOT / "training" / "train_unconditional.py")]
        first = subprocess.run([*script, *flags, "--max_train_steps", "2"], **run)
        files = hub.files("alice/ddpm-digits")
        assert {"model_index.json", "README.md", "unet/config.json", "training_metrics.json"} <= set(files)
        assert not [name for name in files if name.startswith(("checkpoint", "logs"))]

        launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        module = ["-m", "diffusers_ext.training.train_unconditional", "--resume_from_checkpoint", "latest"]
        second = subprocess.run([*launch, *module, *flags, "--max_train_steps", "3"], **run)
        assert json.loads(hub.files("alice/ddpm-digits")["training_metrics.json"])["steps"] == 3
    assert "3/3" in second.stderr and "0/3" not in second.stderr  # it went on from step 2
    for output in (first.stdout, first.stderr, second.stdout, second.stderr):
        assert "hf_alice_write" not in output
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"hf_alice_write" not in path.read_bytes(), path
