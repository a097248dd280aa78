"""`diffusers-ext demo-unclip`: the whole of unCLIP out of nothing, with pictures.

Steps that a user would take with one command or call each: train a small CLIP on captioned digits, embed them, train a
prior and a decoder at the same time, put all into one pipeline, load it in a process that has only diffusers, paint
texts, and edit a digit.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers.utils.logging import set_verbosity_error
from PIL import Image
from transformers.utils import logging as transformers_logging

from diffusers_ext.demo import check_recipe, is_finished, start_training
from diffusers_ext.evaluation.report import image_grid
from diffusers_ext.pipelines.unclip import UnCLIPTextToImagePipeline
from diffusers_ext.pipelines.unclip_prior import UnCLIPPriorPipeline
from diffusers_ext.training import precompute_clip_embeddings, train_toy_clip, train_unclip_decoder

# What somebody runs who has only diffusers. `None` in `sys.modules` makes the import fail, installed or not.
_READER = """
import sys
sys.modules["diffusers_ext"] = None
import torch
from diffusers import DiffusionPipeline
repo, file = sys.argv[1:]
expected = torch.load(file, weights_only=True)
torch.set_num_threads(1)
pipe = DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
output = pipe("a red three", num_inference_steps=10, generator=torch.Generator().manual_seed(0), output_type="pt")
torch.testing.assert_close(output.images, expected, rtol=0, atol=1e-4)
print(f"{type(pipe).__module__}.{type(pipe).__name__} paints the same image")
"""
_PROMPTS = ("a red three", "a small blue seven", "a large green zero", "a cyan digit", "a large five", "a small digit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the command.

    Args:
        parser (`argparse.ArgumentParser`): The command's parser.
    """
    parser.add_argument("--fast", action="store_true", help="about a minute: too few steps to paint digits")
    parser.add_argument("--output_dir", type=Path, help="by default `demo-unclip`, or `demo-unclip-fast` with --fast")
    parser.add_argument("--seed", type=int, default=0, help="seed of images, weights, data order and noise")


def train(folder: Path, seed: int = 0, fast: bool = False) -> None:
    """Trains what is not there yet, each part by its script: CLIP, then prior and decoder, in two processes.

    Args:
        folder (`Path`): Receives `images`, `clip`, `embeddings`, `embeddings-validation`, `prior` and `decoder`.
        seed (`int`, *optional*, defaults to 0): Seed of images, weights, data order and noise.
        fast (`bool`, *optional*, defaults to `False`): Few steps.

    Raises:
        ValueError: `folder` has parts that were trained with other arguments.
        RuntimeError: The training of the prior failed; `prior.log` says why.
    """
    images, clip, embeddings = folder / "images", folder / "clip", folder / "embeddings"
    prior, decoder = folder / "prior", folder / "decoder"
    shared = {"seed": seed, "report_to": "none", "checkpointing_steps": 500, "checkpoints_total_limit": 1}
    averaged = {"lr_scheduler": "cosine", "use_ema": True, "ema_decay": 0.995}
    clip_recipe = shared | {"max_train_steps": 350 if fast else 2800, "warm_start_steps": 250 if fast else 1200}
    prior_steps, decoder_steps = (150, 60) if fast else (1800, 2400)
    prior_recipe = shared | averaged | {
        "max_train_steps": prior_steps, "train_batch_size": 64, "learning_rate": 2e-3, "adam_beta2": 0.99,
        "validation_steps": prior_steps, "zero_shot_template": "a {}",
    }  # fmt: skip
    decoder_recipe = shared | averaged | {
        "max_train_steps": decoder_steps, "train_batch_size": 32, "learning_rate": 2e-3, "lr_warmup_steps": 50,
        "validation_steps": decoder_steps, "resolution": 16, "prediction_type": "v_prediction",
        "cache_embeddings": True, "random_flip": False,
    }  # fmt: skip
    for part, recipe in ((clip, clip_recipe), (prior, prior_recipe), (decoder, decoder_recipe)):
        check_recipe(part, recipe)
    folder.mkdir(parents=True, exist_ok=True)

    # 1. CLIP, and the images that it renders for those who come after
    if is_finished(clip):
        print(f"Using the CLIP in {clip}")
    else:
        for part in (prior, decoder):
            if is_finished(part):
                raise ValueError(f"{part} was trained on a CLIP that {clip} no longer holds: delete {part}.")
        print(f"Training a CLIP on captioned digits: {clip_recipe['max_train_steps']} steps")
        train_toy_clip.main(
            train_toy_clip.ToyCLIPArguments(
                output_dir=str(clip), image_dir=str(images), resume_from_checkpoint=_latest(clip), **clip_recipe
            )
        )
    for split, output_dir in (("train", embeddings), ("validation", folder / "embeddings-validation")):
        precompute_clip_embeddings.main(
            precompute_clip_embeddings.PrecomputeArguments(
                pretrained_clip_model_name_or_path=str(clip), train_data_dir=str(images), split=split,
                label_column="digit", output_dir=str(output_dir),
            )
        )  # fmt: skip

    # 2. The prior in a process of its own: it needs nothing of the decoder, nor the decoder of it
    training = None
    if is_finished(prior):
        print(f"Using the prior in {prior}")
    else:
        print(f"Training a prior: {prior_steps} steps, see {folder / 'prior.log'}")
        training = start_training(
            "train_unclip_prior",
            folder / "prior.log",
            output_dir=prior,
            resume_from_checkpoint=_latest(prior),
            embeddings_dir=embeddings,
            validation_embeddings_dir=folder / "embeddings-validation",
            **prior_recipe,
        )
    try:
        if is_finished(decoder):
            print(f"Using the decoder in {decoder}")
        else:
            print(f"Training a decoder: {decoder_steps} steps")
            train_unclip_decoder.main(
                train_unclip_decoder.UnCLIPDecoderArguments(
                    pretrained_clip_model_name_or_path=str(clip), train_data_dir=str(images),
                    output_dir=str(decoder), resume_from_checkpoint=_latest(decoder), **decoder_recipe,
                )
            )  # fmt: skip
        if training is not None and training.wait() != 0:
            raise RuntimeError(f"the training of the prior failed: see {folder / 'prior.log'}.")
    finally:
        if training is not None and training.poll() is None:
            training.terminate()
            training.wait()


def run(args: argparse.Namespace) -> None:
    """Trains what is not there yet, and shows what it can do. A second call uses what is trained.

    Args:
        args (`argparse.Namespace`): What [`add_arguments`] declares.
    """
    started = time.monotonic()
    folder = args.output_dir or Path("demo-unclip-fast" if args.fast else "demo-unclip")
    set_verbosity_error()
    transformers_logging.set_verbosity_error()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks of this size gain little by more; the prior has the other core
    try:
        # 1. Train
        train(folder, args.seed, args.fast)
        print(f"{time.monotonic() - started:.0f} s so far")

        # 2. One pipeline of all parts
        pipe = UnCLIPTextToImagePipeline.from_decoder(
            UnCLIPTextToImagePipeline.from_pretrained(folder / "decoder"),
            UnCLIPPriorPipeline.from_pretrained(folder / "prior"),
        )
        pipe.save_pretrained(folder / "unclip", card={"datasets": ["digits"]})
        pipe.set_progress_bar_config(disable=True)

        # 3. Load it where only diffusers is
        print("Loading it in a process without diffusers_ext, by DiffusionPipeline.from_pretrained")
        generator = torch.Generator().manual_seed(0)
        expected = pipe("a red three", num_inference_steps=10, generator=generator, output_type="pt").images
        torch.save(expected, folder / "expected.pt")
        subprocess.run(
            [sys.executable, "-c", _READER, str(folder / "unclip"), str(folder / "expected.pt")], check=True
        )
        (folder / "expected.pt").unlink()

        # 4. Paint texts
        print("Painting texts, and editing a digit")
        settings = {"num_inference_steps": 10 if args.fast else 50, "output_type": "pt"}
        noise = torch.randn(8, *expected.shape[1:], generator=torch.Generator().manual_seed(args.seed))
        rows = {}
        for prompt in _PROMPTS:
            generator = torch.Generator().manual_seed(args.seed)
            rows[prompt] = pipe(
                prompt, num_images_per_prompt=8, latents=noise, guidance_scale=3.0, generator=generator, **settings
            ).images
        image_grid(rows).save(folder / "unclip.png")

        # 5. Edit held-out digits
        held_out = folder / "images" / "validation"
        known = [json.loads(line) for line in (held_out / "metadata.jsonl").read_text().splitlines()]
        large = [row for row in known if row["size"] == "large"]
        image, other = (Image.open(held_out / row["file_name"]).convert("RGB") for row in large[:2])
        digit, color = large[0]["digit"], large[0]["color"]
        target = f"a {'red' if color != 'red' else 'blue'} {digit}"
        generator = torch.Generator().manual_seed(args.seed)
        inverted = pipe.variations(image, eta=0.0, **settings).images
        rows = {
            "decoded, and variations": torch.cat(
                [inverted, pipe.variations(image, num_images_per_prompt=7, generator=generator, **settings).images]
            ),
            "path to another digit": pipe.interpolate(image, other, num=8, **settings).images,
            f"turned to '{target}'": pipe.text_diff(image, target, f"a {color} {digit}", num=8, **settings).images,
        }
        image_grid(rows).save(folder / "unclip_edits.png")
        print(f"wrote\n  {folder / 'unclip.png'}\n  {folder / 'unclip_edits.png'}")
    finally:
        torch.set_num_threads(threads)
    metrics = json.loads((folder / "prior" / "training_metrics.json").read_text())["metrics"]
    for title, name in (
        ("Frechet distance to true embeddings", "frechet"),
        ("cosine to the text", "cos_text"),
        ("class accuracy", "zero_shot_accuracy"),
    ):
        values = (metrics[f"validation_{name}{suffix}"] for suffix in ("", "_true", "_linear"))
        print(title + ": prior {:.4f}, true embeddings {:.4f}, linear regression {:.4f}".format(*values))
    print(f"\n{time.monotonic() - started:.0f} s. Pictures are in {folder}, the pipeline in {folder / 'unclip'}.")


def _latest(folder: Path) -> str | None:
    return "latest" if any(folder.glob("checkpoint-*")) else None
