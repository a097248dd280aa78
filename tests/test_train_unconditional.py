"""training/train_unconditional.py: its recipe, its targets, what it refuses, and the ways to start it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from hub_server import HubServer
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_ext.data import load_image_dataset
from diffusers_ext.training.train_unconditional import (
    UnconditionalArguments,
    default_unet_config,
    held_out_loss,
    main,
    sample_images,
    target,
    training_losses,
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


@pytest.fixture
def conditional_folder(tiny_unet, tmp_path):
    """A checkpoint with a learned variance, ten classes and the null class."""
    unet = UNet2DModel.from_config(tiny_unet.config, out_channels=2, num_class_embeds=11)
    DDPMPipeline(unet, DDPMScheduler(variance_type="learned_range")).save_pretrained(tmp_path / "conditional")
    return str(tmp_path / "conditional")


def saved_numbers(folder):
    return json.loads((Path(folder) / "training_metrics.json").read_text())["metrics"]


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


def test_held_out_loss_with_labels_and_variance(conditional_folder):
    """The hybrid loss of all images with their own labels, however they are batched."""
    pipeline = DDPMPipeline.from_pretrained(conditional_folder)
    images, labels = torch.rand(10, 1, 8, 8) * 2 - 1, torch.arange(10)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(7))
    timesteps = 100 * torch.arange(10)
    noisy_images = pipeline.scheduler.add_noise(images, noise, timesteps)
    with torch.no_grad():
        model_output = pipeline.unet(noisy_images, timesteps, class_labels=labels).sample
    losses = training_losses(pipeline.scheduler, images, noise, noisy_images, model_output, timesteps, vlb_weight=0.3)[
        "loss"
    ]
    for batch_size in (3, 10):
        loss = held_out_loss(
            pipeline.unet, pipeline.scheduler, images, batch_size, 7, class_labels=labels, vlb_weight=0.3
        )
        assert loss == pytest.approx(losses.mean().item(), rel=1e-5)


def test_validation_images_are_those_of_the_stock_pipeline(tiny_ddpm):
    pipeline = DDIMPipeline(tiny_ddpm.unet, DDIMScheduler.from_config(tiny_ddpm.scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(batch_size=3, num_inference_steps=4, generator=torch.Generator().manual_seed(5)).images
    images = sample_images(
        tiny_ddpm.unet, tiny_ddpm.scheduler, 3, num_inference_steps=4, generator=torch.Generator().manual_seed(5)
    )
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]
    assert len({image.tobytes() for image in images}) == 3 and images[0].mode == expected[0].mode == "L"


def test_validation_images_have_the_classes_in_turn(conditional_folder):
    """Two equal starts differ by the label alone; the predicted variance plays no part."""
    pipeline = DDPMPipeline.from_pretrained(conditional_folder)
    unet, scheduler = pipeline.unet, pipeline.scheduler

    def sample(**options):
        generator = [torch.Generator().manual_seed(0) for _ in range(5)]
        images = sample_images(unet, scheduler, 5, num_inference_steps=3, generator=generator, **options)
        return [image.tobytes() for image in images]

    a, b, c, again, and_again = sample(num_classes=3)
    assert (a, b) == (again, and_again) and len({a, b, c}) == 3
    with torch.no_grad():
        unet.conv_out.bias[1] += 1
    assert sample(num_classes=3)[:3] == [a, b, c]
    with torch.no_grad():
        unet.conv_out.bias[0] += 1
    assert sample(num_classes=3)[:3] != [a, b, c]


def test_learned_variance_and_classes(config_folder, tmp_path):
    args = arguments(
        tmp_path / "ddpm", model_config_name_or_path=config_folder, max_train_steps=60, train_batch_size=32,
        learning_rate=5e-3, validation_steps=60, use_ema=True, ema_decay=0.9, learn_variance=True,
        vlb_weight=0.02, class_conditional=True,
    )  # fmt: skip
    main(args)
    pipeline = DDPMPipeline.from_pretrained(args.output_dir)
    unet, scheduler = pipeline.unet, pipeline.scheduler
    assert (unet.config.in_channels, unet.config.out_channels, unet.config.num_class_embeds) == (1, 2, 11)
    assert scheduler.config.variance_type == "learned_range"

    # The numbers are those of the published weights; their variance beats the posterior's and the middle of the range.
    numbers = saved_numbers(args.output_dir)
    held_out = load_image_dataset("digits", split="validation")
    images = torch.stack([held_out[i]["images"] for i in range(256)])
    labels = torch.tensor([held_out[i]["labels"] for i in range(256)])

    def mse_and_bits():
        once, twice = (
            held_out_loss(unet, scheduler, images, 64, 0, class_labels=labels, vlb_weight=weight)
            for weight in (0.02, 0.04)
        )
        return 2 * once - twice, (twice - once) / 0.02

    mse, bits = mse_and_bits()
    assert mse + 0.02 * bits == pytest.approx(numbers["validation_loss"], rel=1e-5) and 0 < mse < 0.6
    constant = []
    for v in (-1.0, 0.0):
        with torch.no_grad():
            unet.conv_out.weight[1], unet.conv_out.bias[1] = 0, v
        constant.append(mse_and_bits()[1])
    assert bits < min(constant) - 0.2
    assert numbers["train_loss"] == pytest.approx(numbers["mse"] + 0.02 * numbers["vlb"], rel=1e-5)

    card = ModelCard.load(tmp_path / "ddpm" / "README.md")
    assert "| classes | 0: 0, 1: 1, 2: 2," in card.text and "| label dropout | 0.1, to 10 |" in card.text
    assert "| variance | learned, weight of the variational bound 0.02 |" in card.text
    names = {}
    example = card.text.split("```py\n")[1].split("```")[0]
    exec(example.replace('"ddpm"', repr(str(tmp_path / "ddpm"))).replace("=50", "=3"), names)
    assert len(names["images"]) == 2 and names["images"][0].size == (8, 8)
    assert card.data.eval_results[0].metric_name == "epsilon loss + 0.02 x bound, 256 held out"
    assert (tmp_path / "ddpm" / "samples" / "samples-000060.png").is_file()


def test_the_stock_pipeline_samples_with_the_learned_variance(config_folder, tmp_path):
    args = arguments(tmp_path, model_config_name_or_path=config_folder, learn_variance=True, validation_steps=2)
    main(args)
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    assert pipeline.unet.config.num_class_embeds is None

    def sample():
        return pipeline(num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np").images

    image = sample()
    assert image.shape == (1, 8, 8, 1)
    with torch.no_grad():
        pipeline.unet.conv_out.bias[1] += 1
    assert (sample() != image).any()


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_learned_variance_of_other_targets(prediction_type, config_folder, tmp_path):
    main(
        arguments(
            tmp_path, model_config_name_or_path=config_folder, prediction_type=prediction_type, learn_variance=True,
            ddpm_beta_schedule="squaredcos_cap_v2", validation_steps=2, mixed_precision="bf16",
        )
    )  # fmt: skip
    assert all(math.isfinite(value) for value in saved_numbers(tmp_path).values())


@pytest.mark.parametrize(
    ("dropout", "changed"), [(0.9999, [False] * 10 + [True]), (0.5, [True] * 11), (0, [True] * 10)]
)
def test_dropped_labels_are_of_the_null_class(dropout, changed, tiny_unet, tmp_path):
    """Without weight decay one step moves exactly those rows of the class embedding that were looked up."""
    unet = UNet2DModel.from_config(tiny_unet.config, num_class_embeds=len(changed))
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "base")
    args = arguments(
        tmp_path / "ddpm", pretrained_model_name_or_path=str(tmp_path / "base"), class_conditional=True,
        label_dropout=dropout, max_train_steps=1, train_batch_size=64, adam_weight_decay=0,
    )  # fmt: skip
    main(args)
    embedding = DDPMPipeline.from_pretrained(args.output_dir).unet.class_embedding.weight
    assert (embedding != unet.class_embedding.weight).any(1).tolist() == changed


def test_label_dropout_does_not_depend_on_the_division(conditional_folder, tmp_path):
    """The same labels are dropped for the same images, in one batch of 8 or in 4 of 2."""
    losses = {}
    for name, changes in {
        "8": {}, "2x4": {"train_batch_size": 2, "gradient_accumulation_steps": 4}, "none": {"label_dropout": 1e-6},
        "all": {"label_dropout": 0.999999},
    }.items():  # fmt: skip
        args = {
            "pretrained_model_name_or_path": conditional_folder, "class_conditional": True, "label_dropout": 0.5,
            "max_train_steps": 1, **changes,
        }  # fmt: skip
        main(arguments(tmp_path / name, **args))
        losses[name] = saved_numbers(tmp_path / name)["mse"]
    assert losses["2x4"] == pytest.approx(losses["8"], rel=1e-5)
    others = [losses[name] for name in ("8", "none", "all")]
    assert min(abs(a - b) for i, a in enumerate(others) for b in others[:i]) > 1e-3 * losses["8"]


def test_resume_is_bit_exact_with_classes_and_variance(config_folder, tmp_path):
    options = {
        "model_config_name_or_path": config_folder, "class_conditional": True, "label_dropout": 0.3,
        "learn_variance": True, "use_ema": True, "checkpointing_steps": 3, "validation_steps": 2,
        "train_batch_size": 3, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    main(arguments(tmp_path / "whole", max_train_steps=5, **options))
    main(arguments(tmp_path / "parts", max_train_steps=3, **options))
    main(arguments(tmp_path / "parts", max_train_steps=5, resume_from_checkpoint="latest", **options))
    whole, parts = (DDPMPipeline.from_pretrained(tmp_path / name).unet.state_dict() for name in ("whole", "parts"))
    assert whole and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert saved_numbers(tmp_path / "whole") == saved_numbers(tmp_path / "parts")
    with pytest.raises(ValueError, match="`label_dropout` 0.3 -> 0.1"):
        main(arguments(tmp_path / "parts", resume_from_checkpoint="latest", **(options | {"label_dropout": 0.1})))


@pytest.mark.parametrize("scheduler", [DDPMScheduler(variance_type="learned_range"), DDIMScheduler()])
def test_fine_tuning_keeps_the_variance_and_the_classes(scheduler, conditional_folder, tmp_path):
    """Also where a checkpoint comes with a scheduler that knows of no variance."""
    unet = DDPMPipeline.from_pretrained(conditional_folder).unet
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    main(
        arguments(
            tmp_path / "out", pretrained_model_name_or_path=base, learning_rate=1e-9, class_conditional=True,
            validation_steps=2,
        )
    )  # fmt: skip
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "out")
    assert (pipeline.unet.config.out_channels, pipeline.unet.config.num_class_embeds) == (2, 11)
    assert pipeline.scheduler.config.variance_type == "learned_range"
    before = unet.state_dict()
    for name, value in pipeline.unet.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)


def images_with_labels(folder, labels):
    """Pictures, with numbers as labels in `metadata.jsonl`, or with no labels."""
    folder.mkdir(parents=True)
    rows = []
    for i, label in enumerate(labels):
        Image.new("L", (8, 8), 60 * i).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "label": label}))
    if None not in labels:
        (folder / "metadata.jsonl").write_text("\n".join(rows))


def test_classes_of_numbered_labels(config_folder, tmp_path):
    images_with_labels(tmp_path / "images" / "train", [0, 4, 2])
    images_with_labels(tmp_path / "images" / "validation", [1, 3])
    args = arguments(
        tmp_path / "ddpm", dataset_name=None, train_data_dir=str(tmp_path / "images"), resolution=8, image_mode="L",
        model_config_name_or_path=config_folder, class_conditional=True, label_dropout=0, validation_steps=2,
    )  # fmt: skip
    main(args)
    assert DDPMPipeline.from_pretrained(args.output_dir).unet.config.num_class_embeds == 5
    text = (tmp_path / "ddpm" / "README.md").read_text()
    assert "| classes | 0: 0, 1: 1, 2: 2, 3: 3, 4: 4 |" in text and "| label dropout | 0 |" in text


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ([None, None], [None], "`class_conditional` is set, but the images have no labels: name their column"),
        (
            [0, 1],
            [None],
            "held-out images have no labels, but must have the 2 classes .* pass a `validation_fraction`",
        ),
        ([0, 1], [2], "held-out images have other labels, but must have the 2 classes"),
    ],
)
def test_missing_labels(train, validation, message, tmp_path):
    images_with_labels(tmp_path / "images" / "train", train)
    images_with_labels(tmp_path / "images" / "validation", validation)
    args = {
        "dataset_name": None, "train_data_dir": str(tmp_path / "images"), "resolution": 8, "image_mode": "L",
        "class_conditional": True, "validation_steps": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        main(arguments(tmp_path / "out", **args))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"class_conditional": True, "label_dropout": 0},
            "has 11 class embeddings .* but 10 are needed, for 10 classes",
        ),
        ({}, "has 11 class embeddings .* but none are needed: change `class_conditional`"),
        (
            {"dataset_name": "photos", "resolution": 8, "image_mode": "L", "class_conditional": True},
            "has 11 class embeddings .* but 3 are needed, for 2 classes and the null class of `label_dropout`",
        ),
        ({"image_mode": "RGB"}, "has in_channels 1, but the images have 3 channels"),
    ],
)
def test_models_that_do_not_fit_the_classes(changes, message, conditional_folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(arguments(tmp_path / "out", pretrained_model_name_or_path=conditional_folder, **changes))


def test_models_that_do_not_fit_the_variance(tiny_unet, tmp_path):
    for out_channels, variance_type in ((2, "learned"), (3, "fixed_small")):
        unet = UNet2DModel.from_config(tiny_unet.config, out_channels=out_channels)
        DDPMPipeline(unet, DDPMScheduler(variance_type=variance_type)).save_pretrained(tmp_path / str(out_channels))
    with pytest.raises(ValueError, match="variance of type 'learned', but only 'learned_range'"):
        main(arguments(tmp_path / "out", pretrained_model_name_or_path=str(tmp_path / "2")))
    with pytest.raises(ValueError, match="has out_channels 3, but the images have 1 channels"):
        main(arguments(tmp_path / "out", pretrained_model_name_or_path=str(tmp_path / "3")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vlb_weight": 0.0}, "`vlb_weight` is 0.0, but must be positive"),
        ({"vlb_weight": math.inf}, "`vlb_weight` is inf"),
        ({"label_dropout": 1.0}, r"`label_dropout` is 1.0, but must lie in \[0, 1\)"),
        ({"label_dropout": -0.1}, "`label_dropout` is -0.1"),
        (
            {"pretrained_model_name_or_path": "PRETRAINED", "learn_variance": True},
            "has out_channels 1, but `learn_variance` needs 2: leave it out",
        ),
        (
            {"pretrained_model_name_or_path": "PRETRAINED", "class_conditional": True},
            "has no class embeddings .* but 11 are needed, for 10 classes and the null class",
        ),
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
