"""`diffusers-ext demo`: from real data to a published PDAE that somebody else loads, with pictures and numbers.

Steps that a user would take with one command or call each: train a base model, train PDAE on it, load the result in a
process that has only diffusers, measure it on held-out digits, draw it, fill holes in digits with the base model, and
steer the base model by a classifier.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline
from diffusers.utils.logging import set_verbosity_error

from diffusers_ext.data import load_image_dataset
from diffusers_ext.evaluation import cli as evaluation
from diffusers_ext.evaluation.report import image_grid
from diffusers_ext.pipelines.classifier_guidance import ClassifierGuidancePipeline, NoisyClassifier
from diffusers_ext.pipelines.copaint import CoPaintPipeline
from diffusers_ext.pipelines.pdae import PDAEPipeline
from diffusers_ext.pipelines.repaint import RePaintDDPMPipeline
from diffusers_ext.pipelines.replacement import ReplacementPipeline
from diffusers_ext.training import train_pdae, train_unconditional

# What somebody runs who has only diffusers. `None` in `sys.modules` makes the import fail, installed or not.
_READER = """
import sys
sys.modules["diffusers_ext"] = None
import torch
from diffusers import DiffusionPipeline
repo, file = sys.argv[1:]
inputs = torch.load(file, weights_only=True)
torch.set_num_threads(1)
pipe = DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
output = pipe(inputs["images"], latents=inputs["noise"], num_inference_steps=10, output_type="pt")
torch.testing.assert_close(output.images, inputs["expected"], rtol=0, atol=1e-5)
print(f"{type(pipe).__module__}.{type(pipe).__name__} gives the same images")
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the command.

    Args:
        parser (`argparse.ArgumentParser`): The command's parser.
    """
    parser.add_argument("--fast", action="store_true", help="about a minute, with fewer steps and images")
    parser.add_argument("--output_dir", type=Path, help="by default `demo`, or `demo-fast` with --fast")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, data order, noise and held-out split")


def run(args: argparse.Namespace) -> None:
    """Trains what is not there yet, and shows what it can do. A second call uses what is trained.

    Args:
        args (`argparse.Namespace`): What [`add_arguments`] declares.
    """
    started = time.monotonic()
    folder = args.output_dir or Path("demo-fast" if args.fast else "demo")
    base, pdae, classifier = folder / "base", folder / "pdae", folder / "classifier"
    steps = 300 if args.fast else 1500
    recipe = {
        "dataset_name": "digits",
        "seed": args.seed,
        "max_train_steps": steps,
        "train_batch_size": 64,
        "learning_rate": 2e-3,
        "lr_scheduler": "cosine_with_min_lr",
        "lr_warmup_steps": 50,
        "max_grad_norm": 1.0,
        "adam_weight_decay": 1e-2,
        "use_ema": True,
        "ema_decay": 0.999,
        "checkpointing_steps": 500,
        "checkpoints_total_limit": 1,
        "validation_steps": steps,
        "report_to": "none",
    }
    classifier_recipe = recipe | {
        "max_train_steps": steps // 3,
        "validation_steps": steps // 3,
        "lr_scheduler": "linear",
        "adam_weight_decay": 0.05,
        "use_ema": False,
    }
    set_verbosity_error()
    threads, training = torch.get_num_threads(), None
    torch.set_num_threads(1)  # networks of this size gain little by more, and lose much where cores are busy
    try:
        # 1. Train
        for part, wanted in ((base, recipe), (pdae, recipe), (classifier, classifier_recipe)):
            check_recipe(part, wanted)
        if not is_finished(base) and is_finished(pdae):
            raise ValueError(f"{pdae} was trained on a model that {base} no longer holds: delete {pdae}.")
        if is_finished(base):
            print(f"Using the diffusion model (DDPM) in {base}")
        else:
            print(f"Training a diffusion model (DDPM): {steps} steps")
            resume = "latest" if any(base.glob("checkpoint-*")) else None
            train_unconditional.main(
                train_unconditional.UnconditionalArguments(
                    output_dir=str(base),
                    resume_from_checkpoint=resume,
                    **recipe,
                )
            )
        if is_finished(classifier):
            print(f"Using the classifier in {classifier}")
        else:
            print(f"Training a classifier of noisy digits: {steps // 3} steps, see {folder / 'classifier.log'}")
            training = start_training(
                "train_noisy_classifier",
                folder / "classifier.log",
                output_dir=classifier,
                resume_from_checkpoint="latest" if any(classifier.glob("checkpoint-*")) else None,
                pretrained_model_name_or_path=base,
                random_flip=False,
                **classifier_recipe,
            )
        if is_finished(pdae):
            print(f"Using PDAE in {pdae}")
        else:
            print(f"Training PDAE on it, which stays frozen: {steps} steps")
            resume = "latest" if any(pdae.glob("checkpoint-*")) else None
            train_pdae.main(
                train_pdae.PDAEArguments(
                    output_dir=str(pdae),
                    resume_from_checkpoint=resume,
                    pretrained_model_name_or_path=str(base),
                    latent_dim=32,
                    random_flip=False,
                    **recipe,
                )
            )
        if training is not None and training.wait() != 0:
            raise RuntimeError(f"the training of the classifier failed: see {folder / 'classifier.log'}.")

        # 2. Load it where only diffusers is
        print("Loading it in a process without diffusers_ext, by DiffusionPipeline.from_pretrained")
        pipe = PDAEPipeline.from_pretrained(pdae)
        pipe.set_progress_bar_config(disable=True)
        held_out = load_image_dataset("digits", split="validation", seed=args.seed)
        images = torch.stack([held_out[i]["images"] for i in range(8)]) / 2 + 0.5
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(args.seed))
        expected = pipe(images, latents=noise, num_inference_steps=10, output_type="pt").images
        inputs = folder / "reader_inputs.pt"
        torch.save({"images": images, "noise": noise, "expected": expected}, inputs)
        subprocess.run([sys.executable, "-c", _READER, str(pdae), str(inputs)], check=True)
        inputs.unlink()

        # 3. Measure and draw, by the same command that anybody can run
        print("Measuring it on held-out digits")
        (folder / "images").mkdir(exist_ok=True)
        for i, picture in enumerate(pipe.image_processor.postprocess(images * 2 - 1, output_type="pil")):
            picture.save(folder / "images" / f"{i}.png")
        parser = argparse.ArgumentParser()
        evaluation.add_arguments(parser)
        steps = "20" if args.fast else "50"
        limits = ["--max_images", "64" if args.fast else "200"]
        limits += ["--num_inference_steps", steps, "--num_inversion_steps", steps]
        evaluation.run(
            parser.parse_args(
                [str(pdae), "--dataset_name", "digits", "--output_dir", str(folder), "--seed", str(args.seed), *limits]
            )
        )

        # 4. Fill holes with the base model, which was never trained for it
        print("Filling holes in two of the digits by four methods")
        masks = torch.zeros(3, 1, 8, 8)
        masks[0, :, :, 4:] = 1  # the right half
        masks[1, :, 2:6, 2:6] = 1  # a box
        masks[2, :, 1::2] = 1  # every second line
        whole, masks = images[:2].repeat_interleave(3, dim=0), masks.repeat(2, 1, 1, 1)
        rows = {"input": whole, "known": torch.where(masks > 0, 0.5, whole)}
        steps = {"num_inference_steps": 50 if args.fast else 250}
        methods = {
            "replacement": (ReplacementPipeline, {}),
            "RePaint": (RePaintDDPMPipeline, {}),
            "CoPaint": (CoPaintPipeline, {}),
            "CoPaint, swift": (CoPaintPipeline, {"preset": "swift"}),
        }
        for name, (pipeline, settings) in methods.items():
            painter = pipeline.from_pretrained(base)
            generator = torch.Generator().manual_seed(args.seed)
            settings = ({} if "preset" in settings else steps) | settings
            rows[name] = painter(whole, masks, generator=generator, output_type="pt", **settings).images
        image_grid(rows).save(folder / "inpainting.png")

        # 5. Steer the same model, which knows no classes, to one of each
        print("Drawing the ten digits with the classifier")
        guided = ClassifierGuidancePipeline.from_pipe(
            DDIMPipeline.from_pretrained(base), classifier=NoisyClassifier.from_pretrained(classifier)
        )
        noise = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(args.seed))
        rows = {
            f"scale {scale}": guided(
                list(range(10)), guidance_scale=scale, timestep_respacing="ddim25", latents=noise, output_type="pt"
            ).images
            for scale in (0, 1, 3, 10)
        }
        image_grid(rows).save(folder / "guidance.png")
        print(f"wrote\n  {folder / 'inpainting.png'}\n  {folder / 'guidance.png'}")
    finally:
        torch.set_num_threads(threads)
        if training is not None and training.poll() is None:
            training.terminate()
            training.wait()
    print(f"\n{time.monotonic() - started:.0f} s. Pictures and numbers are in {folder}, the pipeline in {pdae}.")


def is_finished(folder: Path) -> bool:
    """Whether a training is over.

    Args:
        folder (`Path`): Its `output_dir`, which need not exist.

    Returns:
        `bool`: Whether it holds the pipeline, or the model, of a finished training.
    """
    saved = (folder / "model_index.json").is_file() or (folder / "config.json").is_file()
    return saved and (folder / "training_metrics.json").is_file()


def start_training(script: str, log: Path, **options: Any) -> subprocess.Popen:
    """Starts a training script in a process of its own, with one thread.

    Args:
        script (`str`): Its name, such as `"train_pdae"`.
        log (`Path`): Receives what it prints.
        options (*optional*): Its arguments; those that are `None` are left out.

    Returns:
        `subprocess.Popen`: The process.
    """
    given = {name: value for name, value in options.items() if value is not None}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", f"diffusers_ext.training.{script}", *words],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def check_recipe(folder: Path, recipe: dict) -> None:
    """Refuses what another recipe has left: of another seed, it may have seen the held-out images.

    Args:
        folder (`Path`): The `output_dir` of a training, which need not exist.
        recipe (`dict`): Some of its arguments, as they are wanted.

    Raises:
        ValueError: The folder is of a training with other arguments.
    """
    if not (folder / "training_arguments.json").is_file():
        return
    trained = json.loads((folder / "training_arguments.json").read_text())
    differences = {name: trained.get(name) for name, value in recipe.items() if trained.get(name) != value}
    if differences:
        raise ValueError(
            f"{folder} was trained with {differences}, but this call would train with "
            f"{ {name: recipe[name] for name in differences} }: choose another `--output_dir`, or delete the folder."
        )
