"""training/train_noisy_classifier.py: its numbers, its recipe, what it refuses, and what it leaves behind.

`goldens/guidance/classifier_training.npz` holds what OpenAI's guided-diffusion makes: the learning rate at some
steps, the quarter of the schedule that timesteps belong to, and loss and hits of given logits.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, EDMEulerScheduler, UNet2DModel
from hub_server import HubServer
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_ext.data import ImageDataset, load_image_dataset
from diffusers_ext.pipelines.classifier_guidance import (
    ClassifierGuidancePipeline,
    GuidedScheduler,
    NoisyClassifier,
    noise_levels,
)
from diffusers_ext.training.train_noisy_classifier import (
    NoisyClassifierArguments,
    default_classifier_config,
    evaluate,
    main,
    model_timesteps,
    sample_metrics,
)
from diffusers_ext.training_run import TrainingRun

ROOT = Path(__file__).parents[1]
TINY = {"layers_per_block": 1, "block_out_channels": (8, 16), "attention_head_dim": 8, "norm_num_groups": 4}


def tiny_classifier(**changes):
    return NoisyClassifier(**({"sample_size": 8, "in_channels": 1, "num_classes": 10, **TINY} | changes))


def arguments(output_dir, **changes):
    defaults = dict(
        dataset_name="digits", random_flip=False, train_batch_size=8, max_train_steps=2, validation_steps=0,
        checkpointing_steps=0, report_to="none", output_dir=str(output_dir),
    )  # fmt: skip
    return NoisyClassifierArguments(**(defaults | changes))


@pytest.fixture
def config_folder(tmp_path):
    tiny_classifier().save_config(tmp_path / "config")
    return str(tmp_path / "config")


def saved_numbers(folder):
    return json.loads((Path(folder) / "training_metrics.json").read_text())["metrics"]


def weights(folder):
    return NoisyClassifier.from_pretrained(folder).state_dict()


# --- Numbers


@pytest.fixture
def recorded(goldens):
    return dict(np.load(goldens / "guidance" / "classifier_training.npz"))


def test_loss_and_hits_are_the_recorded_ones(recorded):
    metrics = sample_metrics(torch.from_numpy(recorded["logits"]), torch.from_numpy(recorded["labels"]))
    np.testing.assert_allclose(metrics["loss"].numpy(), recorded["ce"], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(metrics["acc1"].numpy(), recorded["top1"])
    np.testing.assert_array_equal(metrics["acc5"].numpy(), recorded["top5"])
    assert set(recorded["top5"]) == {0, 1}


def test_hits_of_known_logits():
    logits = torch.eye(7)[[3, 3, 2]] * 9 - torch.arange(7) / 8
    metrics = sample_metrics(logits.bfloat16(), torch.tensor([3, 4, 6]))
    assert metrics["acc1"].tolist() == [1, 0, 0] and metrics["acc5"].tolist() == [1, 1, 0]
    assert {value.dtype for value in metrics.values()} == {torch.float32}
    assert sample_metrics(logits, torch.tensor([3, 2, 2]))["acc5"].tolist() == [1, 1, 1]
    assert "acc5" not in sample_metrics(logits[:, :5], torch.tensor([0, 1, 2]))  # all five of five are no news


def test_learning_rate_is_the_recorded_one(recorded, tmp_path):
    run = TrainingRun(arguments(tmp_path, max_train_steps=150_000))
    run.prepare({"classifier": tiny_classifier()}, run.load_dataset("train", ["labels"]))
    (rate,), (base,) = run.lr_scheduler.lr_lambdas, run.lr_scheduler.base_lrs
    rates = [base * rate(step) for step in recorded["lr_steps"]]
    np.testing.assert_allclose(rates, recorded["lr"], rtol=1e-12, atol=1e-18)


def test_evaluation_by_the_recorded_quarters(recorded):
    """One image per timestep: the means are those of a direct computation, however the images are batched."""
    classifier, scheduler = tiny_classifier(pool="adaptive").eval(), GuidedScheduler()
    pictures = np.random.default_rng(0).uniform(0, 255, (1000, 8, 8)).astype(np.float32)
    dataset = ImageDataset(list(pictures), [i % 10 for i in range(1000)], resolution=8, image_mode="L")
    images = torch.stack([dataset[i]["images"] for i in range(1000)])
    generator = torch.Generator().manual_seed(5)
    noise = torch.stack([torch.randn(1, 8, 8, generator=generator) for _ in range(1000)])
    level = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).view(-1, 1, 1, 1)
    noisy = (level.sqrt() * images + (1 - level).sqrt() * noise).float()
    labels = torch.arange(1000) % 10
    with torch.no_grad():
        logits = classifier(noisy, torch.arange(1000)).double()
    loss, hits = -logits.log_softmax(1)[torch.arange(1000), labels], (logits.argmax(1) == labels).double()
    for batch_size in (1000, 33):
        values = evaluate(classifier, scheduler, dataset, batch_size=batch_size, seed=5)
        assert values["loss"] == pytest.approx(loss.mean().item(), rel=1e-6)
        assert values["acc1"] == pytest.approx(hits.mean().item(), abs=1e-9)
        for quarter in range(4):
            first, last = recorded["quart_t"][recorded["quart"] == quarter][[0, -1]]
            assert values[f"loss_q{quarter}"] == pytest.approx(loss[first : last + 1].mean().item(), rel=1e-6)
            assert values[f"acc1_q{quarter}"] == pytest.approx(hits[first : last + 1].mean().item(), abs=1e-9)
    assert len(values) == 15

    # the first images only, spread over all timesteps; without noise
    few = evaluate(classifier, scheduler, dataset, num_images=4, batch_size=3)
    assert few["loss"] == pytest.approx(sum(few[f"loss_q{quarter}"] for quarter in range(4)) / 4)
    with torch.no_grad():
        logits = classifier(images, 0)
    clean = evaluate(classifier, scheduler, dataset, clean=True)
    assert clean.keys() == {"loss", "acc1", "acc5"}
    assert clean["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_rescaled_timesteps():
    timesteps = torch.tensor([0, 1, 99])
    assert model_timesteps(GuidedScheduler(100), timesteps).tolist() == [0, 1, 99]
    assert model_timesteps(GuidedScheduler(100, rescale_timesteps=True), timesteps).tolist() == [0, 10, 990]


@pytest.mark.parametrize(("resolution", "millions"), [(64, 65.4), (128, 42.6), (256, 54.1), (512, 54.4)])
def test_default_networks_have_the_size_of_the_published_ones(resolution, millions):
    with torch.device("meta"):
        classifier = NoisyClassifier(resolution, num_classes=1000, **default_classifier_config(resolution))
    assert sum(p.numel() for p in classifier.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    attention = [block.__class__.__name__ for block in classifier.down_blocks].index("AttnDownBlock2D")
    assert resolution >> attention == 32 and classifier.head[-1].positional_embedding.shape[1] == 8 * 8 + 1


# --- Training


def test_a_run_learns_and_leaves_a_classifier(tmp_path, tiny_ddpm):
    """Mostly right with little noise, chance where nothing but noise is left."""
    tiny_classifier(block_out_channels=(16, 32), attention_head_dim=16).save_config(tmp_path / "config")
    args = arguments(
        tmp_path / "clf", max_train_steps=300, train_batch_size=32, learning_rate=2e-3, validation_steps=200,
        classifier_config_name_or_path=str(tmp_path / "config"),
    )  # fmt: skip
    main(args)
    classifier = NoisyClassifier.from_pretrained(args.output_dir)
    assert {int(i): name for i, name in classifier.config.id2label.items()} == {i: str(i) for i in range(10)}
    assert classifier.config.trained_alphas_cumprod == noise_levels(GuidedScheduler())

    # The numbers are those of the published weights.
    numbers, held_out = saved_numbers(args.output_dir), load_image_dataset("digits", split="validation")
    values = evaluate(classifier, GuidedScheduler(), held_out, batch_size=100)
    assert len(held_out) == 500 and len(values) == 15
    for name, value in values.items():
        assert numbers[f"validation_{name}"] == pytest.approx(value, rel=1e-4), name
    assert values["acc1_q0"] > 0.5 and values["acc1_q0"] > values["acc1_q1"] > 0.2
    assert values["acc1_q3"] < 0.2 and values["acc5_q3"] < 0.65
    assert evaluate(classifier, GuidedScheduler(), held_out, clean=True)["acc1"] > 0.6
    assert numbers["lr"] == pytest.approx(2e-3 / 300)  # of the last step: it falls to 0 one step later
    assert 0 < numbers["train_acc1"] <= numbers["train_acc5"] <= 1

    # It guides a model with the same noise, and no other.
    pipeline = ClassifierGuidancePipeline(tiny_ddpm.unet, tiny_ddpm.scheduler, classifier)
    pipeline.set_progress_bar_config(disable=True)
    draw = {"class_labels": ["3"], "num_inference_steps": 5, "output_type": "pt"}
    plain, guided = (
        pipeline(**draw, guidance_scale=scale, generator=torch.Generator().manual_seed(0)).images for scale in (0, 3)
    )
    assert not torch.equal(plain, guided)
    other = ClassifierGuidancePipeline(tiny_ddpm.unet, DDPMScheduler(beta_schedule="squaredcos_cap_v2"), classifier)
    with pytest.raises(ValueError, match="trained with the noise schedule of the diffusion model"):
        other(**draw)

    card = ModelCard.load(tmp_path / "clf" / "README.md")
    assert card.data.pipeline_tag == "image-classification" and card.data.datasets == ["digits"]
    assert card.data.library_name == "diffusers" and "classifier-guidance" in card.data.tags
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert len(results) == 15
    assert results["accuracy@1, quarter 0 of the timesteps, held out"] == round(numbers["validation_acc1_q0"], 5)
    assert results["accuracy@5, all timesteps, held out"] == round(numbers["validation_acc5"], 5)
    assert "| classes | 10 |" in card.text and "| noise | linear, 1000 timesteps |" in card.text
    assert "| held out | 500 |" in card.text and "None" not in card.content and "[]" not in card.content
    example = card.text.split("```py\n")[1].split("```")[0].replace('"clf"', repr(args.output_dir))
    names = {"base": tiny_ddpm}
    exec(example.replace("guidance_scale=1.0", "num_inference_steps=2"), names)
    assert names["image"].size == (8, 8)


def test_the_loss_of_a_step(tiny_unet, tmp_path):
    """The cross-entropy of images with the noise and the timesteps that were drawn, in the units of the network."""
    scheduler = GuidedScheduler(100, beta_schedule="squaredcos_cap_v2", rescale_timesteps=True)
    ClassifierGuidancePipeline(tiny_unet, scheduler).save_pretrained(tmp_path / "base")
    classifier = tiny_classifier()
    classifier.save_pretrained(tmp_path / "start")
    options = {
        "pretrained_classifier_name_or_path": str(tmp_path / "start"),
        "pretrained_model_name_or_path": str(tmp_path / "base"),
        "max_train_steps": 1,
    }
    main(arguments(tmp_path / "clf", **options))

    draws = TrainingRun(arguments(tmp_path / "draws", **options))
    draws.prepare({"classifier": tiny_classifier()}, draws.load_dataset("train", ["labels"]))
    batch = next(draws.batches())
    t, noise = draws.randint(100), draws.randn_like(batch["images"])
    assert len(set(t.tolist())) > 4
    time = torch.arange(101, dtype=torch.float64) / 100
    level = torch.cos((time + 0.008) / 1.008 * torch.pi / 2) ** 2
    level = torch.cumprod(1 - (1 - level[1:] / level[:-1]).clamp(max=0.999), 0)[t].view(-1, 1, 1, 1)
    noisy_images = (level.sqrt() * batch["images"] + (1 - level).sqrt() * noise).float()
    with torch.no_grad():
        logits = classifier(noisy_images, 10.0 * t)
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"]).item()
    assert saved_numbers(tmp_path / "clf")["train_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_default_network_for_digits(tmp_path):
    main(arguments(tmp_path, max_train_steps=1, validation_steps=1, num_validation_images=8))
    classifier = NoisyClassifier.from_pretrained(tmp_path)
    assert tuple(classifier.config.block_out_channels) == (32, 64)
    assert [type(block).__name__ for block in classifier.down_blocks] == ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]
    assert "| held out | 8 |" in (tmp_path / "README.md").read_text()


def test_clean_training_sees_no_noise(config_folder, tmp_path):
    """Its loss of one image in a batch of copies does not depend on the seed's noise; a noisy one's does."""
    Image.new("L", (8, 8), 200).save(tmp_path / "0.png"), Image.new("L", (8, 8), 90).save(tmp_path / "1.png")
    rows = [json.dumps({"file_name": f"{i}.png", "label": name}) for i, name in enumerate("ab")]
    (tmp_path / "images").mkdir()
    for i in range(2):
        (tmp_path / f"{i}.png").rename(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(rows))
    classifier = tiny_classifier(num_classes=2)
    classifier.save_pretrained(tmp_path / "start")
    images = torch.tensor([200.0, 90.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8) / 127.5 - 1
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(classifier(images, 0), torch.tensor([0, 1])).item()
    losses = []
    for clean in (True, False):
        args = arguments(
            tmp_path / f"clf{clean}", dataset_name=None, train_data_dir=str(tmp_path / "images"), train_batch_size=2,
            pretrained_classifier_name_or_path=str(tmp_path / "start"), max_train_steps=1, clean=clean,
            validation_fraction=0,
        )  # fmt: skip
        main(args)
        losses.append(saved_numbers(args.output_dir)["train_loss"])
    assert losses[0] == pytest.approx(expected, rel=1e-5) and abs(losses[1] - expected) > 1e-3
    levels = [NoisyClassifier.from_pretrained(tmp_path / f"clf{clean}").config for clean in (True, False)]
    assert levels[0].trained_alphas_cumprod is None and len(levels[1].trained_alphas_cumprod) == 5

    args = arguments(tmp_path / "digits", classifier_config_name_or_path=config_folder, clean=True, validation_steps=2)
    main(args)
    numbers = saved_numbers(args.output_dir)
    assert {name for name in numbers if name.startswith("train_loss_t")} == {"train_loss_t0-249"}
    assert {name for name in numbers if name.startswith("validation")} == {
        "validation_loss", "validation_acc1", "validation_acc5",
    }  # fmt: skip
    text = (tmp_path / "digits" / "README.md").read_text()
    assert (
        "| noise | none |" in text and "With fixed noise" not in text and "accuracy@1, without noise, held out" in text
    )


def test_resume_is_bit_exact(config_folder, tmp_path):
    options = {
        "classifier_config_name_or_path": config_folder, "use_ema": True, "checkpointing_steps": 3,
        "validation_steps": 2, "train_batch_size": 3, "gradient_accumulation_steps": 2, "random_flip": True,
        "max_train_steps": 5, "num_validation_images": 20,
    }  # fmt: skip
    main(arguments(tmp_path / "whole", **options))
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole" / "checkpoint-3").rename(tmp_path / "parts" / "checkpoint-3")
    main(arguments(tmp_path / "parts", resume_from_checkpoint="latest", **options))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert saved_numbers(tmp_path / "whole") == saved_numbers(tmp_path / "parts")
    for change, message in (({"clean": True}, "`clean` False -> True"), ({"ddpm_num_steps": 500}, "`ddpm_num_steps`")):
        with pytest.raises(ValueError, match=message):
            main(arguments(tmp_path / "parts", resume_from_checkpoint="latest", **(options | change)))


def test_accumulation_equals_one_batch(config_folder, tmp_path):
    for name, changes in {"8": {}, "4x2": {"train_batch_size": 4, "gradient_accumulation_steps": 2}}.items():
        main(arguments(tmp_path / name, classifier_config_name_or_path=config_folder, max_train_steps=3, **changes))
    one, two = saved_numbers(tmp_path / "8"), saved_numbers(tmp_path / "4x2")
    assert one == pytest.approx(two, rel=1e-4)
    start = tiny_classifier().state_dict()
    one, two = weights(tmp_path / "8"), weights(tmp_path / "4x2")
    for name in start:  # Adam turns the rounding of tiny gradients into steps of up to the learning rate
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=3e-4)
    torch.testing.assert_close(one["conv_in.weight"], two["conv_in.weight"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{"mixed_precision": "bf16"}, {"gradient_checkpointing": True}])
def test_the_loss_is_of_float32(changes, config_folder, tmp_path):
    """Half precision rounds it a little, recomputing activations not at all."""
    options = {"classifier_config_name_or_path": config_folder, "max_train_steps": 1}
    main(arguments(tmp_path / "plain", **options))
    main(arguments(tmp_path / "changed", **options, **changes))
    plain, changed = (saved_numbers(tmp_path / name)["train_loss"] for name in ("plain", "changed"))
    assert changed == pytest.approx(plain, rel=2e-2 if "mixed_precision" in changes else 1e-6)
    assert torch.tensor(changed).bfloat16().item() != changed


def test_command_line_and_hub(config_folder, tmp_path):
    flags = f"""--dataset_name digits --no_random_flip --classifier_config_name_or_path {config_folder}
        --train_batch_size 8 --max_train_steps 2 --num_validation_images 8 --report_to none
        --output_dir {tmp_path / "clf"} --push_to_hub --hub_model_id alice/clf --hub_token hf_alice_write""".split()
    with HubServer() as hub:
        env = hub.env(tmp_path / "home", token=None)
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
        script = [sys.executable, str(ROOT / "training" / "train_noisy_classifier.py"), *flags]
        done = subprocess.run(script, env=env, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
        files = hub.files("alice/clf")
    assert set(files) - {".gitattributes"} == {
        "config.json", "diffusion_pytorch_model.safetensors", "README.md", "training_metrics.json",
        "training_arguments.json",
    }  # fmt: skip
    (tmp_path / "repo").mkdir()
    for name, content in files.items():
        (tmp_path / "repo" / name).write_bytes(content)
        assert b"hf_alice_write" not in content
    published, local = weights(tmp_path / "repo"), weights(tmp_path / "clf")
    assert all(torch.equal(published[name], local[name]) for name in local)
    assert 'NoisyClassifier.from_pretrained("alice/clf")' in files["README.md"].decode()


# --- The diffusion model and the classifier that it starts from


def test_noise_and_size_are_those_of_the_diffusion_model(config_folder, tiny_unet, tmp_path):
    """Also of a scheduler of ours that rescales timesteps, and of a model with a learned variance."""
    unet = UNet2DModel.from_config(tiny_unet.config, sample_size=12, out_channels=2)
    scheduler = GuidedScheduler(
        100, beta_schedule="squaredcos_cap_v2", variance_type="learned_range", rescale_timesteps=True
    )
    ClassifierGuidancePipeline(unet, scheduler).save_pretrained(tmp_path / "base")
    args = arguments(
        tmp_path / "clf", pretrained_model_name_or_path=str(tmp_path / "base"), validation_steps=2,
        classifier_config_name_or_path=config_folder,
    )  # fmt: skip
    main(args)
    classifier = NoisyClassifier.from_pretrained(args.output_dir)
    assert (classifier.config.sample_size, classifier.config.in_channels) == (12, 1)
    assert classifier.config.num_train_timesteps == 100
    assert classifier.config.trained_alphas_cumprod == pytest.approx(noise_levels(scheduler))
    held_out = load_image_dataset("digits", split="validation", resolution=12)
    loss = evaluate(classifier, scheduler, held_out)["loss"]
    assert saved_numbers(args.output_dir)["validation_loss"] == pytest.approx(loss, rel=1e-5)
    scheduler.register_to_config(rescale_timesteps=False)
    assert evaluate(classifier, scheduler, held_out)["loss"] != pytest.approx(loss, rel=1e-5)
    assert "| noise | squaredcos_cap_v2, 100 timesteps |" in (tmp_path / "clf" / "README.md").read_text()


def test_channels_of_a_scheduler_without_variance(config_folder, tiny_unet, tmp_path):
    """A U-Net with twice the outputs learns its variance, whether or not the scheduler knows of that."""
    unet = UNet2DModel.from_config(tiny_unet.config, out_channels=2)
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "base")
    options = {"pretrained_model_name_or_path": str(tmp_path / "base"), "max_train_steps": 1}
    main(arguments(tmp_path / "clf", classifier_config_name_or_path=config_folder, **options))
    assert NoisyClassifier.from_pretrained(tmp_path / "clf").config.in_channels == 1


def test_fine_tuning_starts_from_the_pretrained_weights(tiny_ddpm_folder, tmp_path):
    start = tiny_classifier(num_train_timesteps=50)
    start.save_pretrained(tmp_path / "start")
    options = {
        "pretrained_classifier_name_or_path": str(tmp_path / "start"),
        "pretrained_model_name_or_path": str(tiny_ddpm_folder),
        "learning_rate": 1e-9,
    }
    main(arguments(tmp_path / "clf", **options))
    after = NoisyClassifier.from_pretrained(tmp_path / "clf")
    assert after.config.num_train_timesteps == 1000 and len(after.config.trained_alphas_cumprod) == 5
    assert list(after.config.id2label.values()) == [str(i) for i in range(10)]
    for name, value in after.state_dict().items():
        torch.testing.assert_close(value, start.state_dict()[name], rtol=0, atol=1e-6)
    for changes, message in (
        ({"id2label": {i: f"digit {i}" for i in range(10)}}, r"has 10 classes \(.*digit 3.*, but the images have 10"),
        ({"num_classes": 7}, r"has 7 classes \(without names\), but the images have 10"),
    ):
        tiny_classifier(**changes).save_pretrained(tmp_path / "start")
        with pytest.raises(ValueError, match=message):
            main(arguments(tmp_path / "out", **options))


# --- What is refused


def pictures(folder, labels):
    folder.mkdir(parents=True)
    rows = []
    for i, label in enumerate(labels):
        Image.new("L", (8, 8), 60 * i).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "label": label}))
    if None not in labels:
        (folder / "metadata.jsonl").write_text("\n".join(rows))


@pytest.mark.parametrize(
    ("train", "validation", "changes", "message"),
    [
        ([None, None], [None], {}, "the images have no labels: name their column in `label_column`"),
        ([1, 1], [0], {}, "all 2 training images are of class 1, but there must be two classes"),
        ([0, 1], [None], {}, "held-out images have no labels, but must have the 2 classes"),
        ([0, 1], [2], {}, "held-out images have other labels, but must have the 2 classes"),
        ([0, 3], [1], {"num_classes": 3}, r"`num_classes` is 3, but the labels are of 4 classes \(0 to 3\)"),
        (["cat", "dog"], ["dog"], {"num_classes": 3}, r"`num_classes` is 3, .* of 2 classes \(cat, dog\): leave it"),
    ],
)
def test_labels_that_do_not_do(train, validation, changes, message, tmp_path):
    pictures(tmp_path / "images" / "train", train)
    pictures(tmp_path / "images" / "validation", validation)
    with pytest.raises(ValueError, match=message):
        main(
            arguments(
                tmp_path / "out", dataset_name=None, train_data_dir=str(tmp_path / "images"), resolution=8,
                image_mode="L", validation_steps=1, **changes,
            )
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_class_folders_and_numbers_without_names(config_folder, tmp_path):
    """Folders name the classes; of numbered labels, some may lack images."""
    for name in ("dog", "cat"):
        pictures(tmp_path / "folders" / name, [None, None])
    pictures(tmp_path / "numbers", [0, 1, 2])
    noise = {"ddpm_num_steps": 50, "ddpm_beta_schedule": "squaredcos_cap_v2"}
    for source, options, num_classes, id2label in (
        ("folders", {}, 2, {"0": "cat", "1": "dog"}), ("numbers", {"num_classes": 6, **noise}, 6, None),
    ):  # fmt: skip
        main(
            arguments(
                tmp_path / source[0], dataset_name=None, train_data_dir=str(tmp_path / source), resolution=8,
                image_mode="L", classifier_config_name_or_path=config_folder, validation_steps=2, **options,
                validation_fraction=1,
            )
        )  # fmt: skip
        config = NoisyClassifier.from_pretrained(tmp_path / source[0]).config
        assert config.num_classes == num_classes
        assert (config.id2label and {str(i): name for i, name in config.id2label.items()}) == id2label
        steps, schedule = options.get("ddpm_num_steps", 1000), options.get("ddpm_beta_schedule", "linear")
        assert config.num_train_timesteps == steps
        assert config.trained_alphas_cumprod == noise_levels(GuidedScheduler(steps, beta_schedule=schedule))
        assert ("validation_acc5" in saved_numbers(tmp_path / source[0])) == (num_classes > 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"resolution": 16},
            "1 channels of 16 x 16 pixels, but the model of `pretrained_model_name_or_path` has 1 of",
        ),
        ({"image_mode": "RGB"}, "3 channels of 8 x 8 pixels, but the model of `pretrained_model_name_or_path` has 1"),
        (
            {"pretrained_classifier_name_or_path": "CLASSIFIER"},
            "1 channels of 8 x 8 pixels, but the model of `pretrained_classifier_name_or_path` has 1 of size 12",
        ),
        ({"ddpm_num_steps": 100}, "brings its own noise schedule"),
        ({"ddpm_beta_schedule": "linear"}, "brings its own noise schedule"),
        ({"pretrained_model_name_or_path": "EDM"}, "has a EDMEulerScheduler, but the noise must be that of timesteps"),
        ({"pretrained_model_name_or_path": None, "ddpm_num_steps": 3}, "`ddpm_num_steps` is 3, but must be at least"),
        ({"num_classes": 1}, "`num_classes` is 1, but must be at least 2"),
        (
            {"pretrained_classifier_name_or_path": "CLASSIFIER", "classifier_config_name_or_path": "CLASSIFIER"},
            "are both given, but a pretrained classifier brings its own configuration",
        ),
    ],
)
def test_models_and_arguments_that_do_not_fit(changes, message, tiny_ddpm_folder, tiny_unet, tmp_path):
    tiny_classifier(sample_size=12).save_pretrained(tmp_path / "CLASSIFIER")
    DDPMPipeline(tiny_unet, EDMEulerScheduler()).save_pretrained(tmp_path / "EDM")
    options = {"pretrained_model_name_or_path": str(tiny_ddpm_folder)} | changes
    options = {k: str(tmp_path / v) if v in ("CLASSIFIER", "EDM") else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        main(arguments(tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def labelled_folder(folder, labels):
    """Grey 8 x 8 pictures with a metadata.jsonl that labels them."""
    folder.mkdir(exist_ok=True)
    rows = []
    for i, label in enumerate(labels):
        Image.new("L", (8, 8), 20 * i).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "label": label}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return str(folder)


def test_labels_that_changed_or_are_no_labels(tmp_path, caplog):
    def arguments(**changes):
        shared = {
            "output_dir": str(tmp_path / "run"), "max_train_steps": 1, "train_batch_size": 4, "resolution": 8,
            "image_mode": "L", "checkpointing_steps": 1, "report_to": "none", "validation_fraction": 0.0,
        }  # fmt: skip
        return NoisyClassifierArguments(**(shared | changes))

    folder = labelled_folder(tmp_path / "pictures", [0, 1, 3] * 4)
    with caplog.at_level("WARNING"):
        main(arguments(train_data_dir=folder))
    assert "no training image is of the classes [2]" in caplog.text
    labelled_folder(tmp_path / "pictures", [3, 1, 0] * 4)
    with pytest.raises(ValueError, match="labels of the images"):
        main(arguments(train_data_dir=folder, max_train_steps=2, resume_from_checkpoint="latest"))
    labelled_folder(tmp_path / "pictures", [True, False, True] * 4)
    with pytest.raises(ValueError, match="must all be names or all be"):
        main(arguments(train_data_dir=folder, output_dir=str(tmp_path / "other")))
